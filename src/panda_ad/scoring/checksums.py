# SPDX-License-Identifier: Apache-2.0
"""A bundle's files are those that were written together: checksums.sha256, which `sha256sum --check` reads too."""

from __future__ import annotations

from pathlib import Path

from panda_ad.system.files import digest_file, write_text

CHECKSUMS = "checksums.sha256"
_ENDINGS = {".json", ".safetensors", ".faiss", ".npy", ".onnx", ".txt"}
"""Of the files that loading reads. A file server's own files beside them do no harm."""


def write_checksums(folder: Path) -> None:
    """Write the sha256 of every file below a folder into its checksums.sha256, a line each."""
    lines = (f"{digest_file(path)}  {name}\n" for name, path in sorted(_files(folder).items()))
    write_text(folder / CHECKSUMS, "".join(lines))


def damage(folder: Path) -> str:
    """Return what differs from when the checksums were written, '' if nothing does or there are none.

    Raises
    ------
    OSError
        A file cannot be read.
    """
    if not (folder / CHECKSUMS).is_file():
        return ""
    text = (folder / CHECKSUMS).read_bytes().decode("utf-8", "replace")
    written = {name: digest for digest, _, name in (line.partition("  ") for line in text.split("\n") if line)}
    files = _files(folder)
    if missing := sorted(written.keys() - files.keys()):
        return f"{missing[0]!r} is missing"
    if added := sorted(name for name in files.keys() - written.keys() if files[name].suffix in _ENDINGS):
        return f"{added[0]!r} is none of its files and to be removed"
    changed = (name for name in sorted(written) if digest_file(files[name]) != written[name])
    return "".join(f"{name!r} is not what was written" for name in list(changed)[:1])


def _files(folder: Path) -> dict[str, Path]:
    """Return the files below a folder by relative POSIX name, without hidden ones and the checksums themselves."""
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: path
        for name, path in names.items()
        if name != CHECKSUMS and not any(part.startswith(".") for part in name.split("/"))
    }
