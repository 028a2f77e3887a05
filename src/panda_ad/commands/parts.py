# SPDX-License-Identifier: Apache-2.0
"""Very many images and their verdicts: where pictures lie, and a folder of Parquet files that is the memory of a run.

Both may be folders here, or addresses that fsspec reads (s3://, gs://, abfs://, ...), with credentials from the
environment. A file of verdicts, a part, is there whole or not at all. It is named after the pictures it judges, so that
a task done twice writes the same file again.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from panda_ad.data.images import Decoding, read_bytes
from panda_ad.data.listing import SUFFIXES, UNREAD, find_images, hidden, no_images, one_line
from panda_ad.errors import UserError
from panda_ad.system.cores import side_by_side
from panda_ad.system.files import renamed_file

if TYPE_CHECKING:
    import pyarrow as pa
    from fsspec import AbstractFileSystem

PART = 64
"""Pictures of a part."""
_MODEL = b"panda.model"
_TEXT = ("path", "state", "sha256", "decision", "problem", "warning")
_NUMBERS = ("score", "p_value", "threshold", "whole_image", "worst_spot")


class Source(NamedTuple):
    """A picture.

    `path` is a file or an address. `state` differs where its content may: size and time, or an object's ETag.
    """

    path: str
    state: str


def is_address(path: str) -> bool:
    """Tell whether a path is an address such as s3://bucket/folder."""
    return "://" in path


def opened(folder: str) -> tuple[AbstractFileSystem, str]:
    """Return the file system of a folder or address, and the folder's path there.

    Raises
    ------
    UserError
        No file system of this kind is known, or its package is not installed.
    """
    from fsspec.core import url_to_fs

    try:
        fs, path = url_to_fs(folder)
    except (ImportError, ValueError) as e:
        raise UserError(f"{folder}: {' '.join(str(e).split())}") from None
    return fs, str(path)


def sources(paths: Iterable[str]) -> list[Source]:
    """Return the pictures in folders, at addresses and as given, each once, by name.

    Raises
    ------
    UserError
        There are none, or a place does not exist or cannot be listed.
    """
    paths = list(paths)
    here = [Path(path) for path in paths if not is_address(path)]
    found = find_images(here)
    listed = {str(file.absolute()): _state(file) for file in (*found.images, *found.unread)}
    for address in filter(is_address, paths):
        listed |= _remote(address)
    if not listed:
        raise UserError(no_images([Path(path) for path in paths], found))
    return [Source(path, state) for path, state in sorted(listed.items())]


def _state(file: Path) -> str:
    try:
        stat = file.stat()
    except OSError:  # gone meanwhile: reading it says so
        return ""
    return f"{stat.st_size}-{stat.st_mtime_ns}"


def _remote(address: str) -> dict[str, str]:
    """Return the pictures below an address with their state, by their endings."""
    fs, root = opened(address)
    try:
        if not fs.exists(root):
            raise UserError(f"{address}: nothing there")
        entries = fs.find(root, detail=True)
    except UserError:
        raise
    except Exception as e:  # each kind of store has its own
        raise UserError(f"{address}: cannot be listed ({_reason(e)})") from None
    found = {}
    for path, facts in entries.items():
        name = PurePosixPath(path)
        if name.suffix.lower() not in SUFFIXES | UNREAD or any(map(hidden, name.relative_to(root).parts)):
            continue
        changed = next((facts[key] for key in ("ETag", "etag", "md5Hash", "LastModified", "mtime") if key in facts), "")
        found[fs.unstrip_protocol(path)] = f"{facts.get('size', '')}-{changed}".replace('"', "")
    return found


def contents(group: Sequence[Source], decoding: Decoding) -> list[bytes | str]:
    """Read pictures side by side; in the place of one that cannot be read stands why."""

    def read(source: Source) -> bytes | str:
        name = one_line(source.path)
        try:
            if not is_address(source.path):
                return read_bytes(source.path, name, decoding)
            fs, path = opened(source.path)
            with fs.open(path, "rb") as f:
                return bytes(f.read(decoding.max_bytes + 1))
        except UserError as e:
            return str(e)
        except Exception as e:  # each kind of store has its own; one that does not answer costs this picture alone
            return f"{name}: cannot be read ({_reason(e)})"

    return side_by_side(read, group)


def shards(pictures: Iterable[Source], size: int = PART) -> Iterator[list[Source]]:
    """Divide pictures into lists of `size`."""
    rest = iter(pictures)
    while shard := list(islice(rest, size)):
        yield shard


def part_name(shard: Sequence[Source]) -> str:
    """Return the name of a shard's part: the sha256 of what it judges."""
    text = "\n".join(f"{path}\t{state}" for path, state in shard)
    return f"{hashlib.sha256(text.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.parquet"


def write_part(folder: str, name: str, model: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write verdicts, a dict per picture, as a Parquet file that knows its model. UserError where that fails."""
    import pyarrow as pa
    from pyarrow import parquet

    content = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(list(rows), schema=_schema(model)), content)
    fs, root = opened(folder)
    try:
        if is_address(folder):
            fs.pipe_file(f"{root}/{name}", content.getvalue())  # an object appears whole
        else:
            Path(root).mkdir(parents=True, exist_ok=True)
            with renamed_file(Path(root) / name) as temporary:
                temporary.write_bytes(content.getvalue())
    except Exception as e:  # each kind of store has its own
        raise UserError(f"{folder}: cannot be written ({_reason(e)})") from None


def _schema(model: str) -> pa.Schema:
    import pyarrow as pa

    fields = [(name, pa.string()) for name in _TEXT] + [(name, pa.float64()) for name in _NUMBERS]
    return pa.schema([*fields, ("time", pa.timestamp("ms", "UTC"))], metadata={_MODEL: model.encode()})


def judged(folder: str, model: str) -> set[Source]:
    """Return the pictures that have a row in a folder of parts.

    Raises
    ------
    UserError
        A part is damaged, or of another model.
    """
    from pyarrow import parquet

    fs, root = opened(folder)

    def read(path: str) -> list[Source]:
        try:
            with fs.open(path, "rb") as f:
                part = parquet.ParquetFile(f)
                made = (part.schema_arrow.metadata or {}).get(_MODEL, b"").decode()
                table = part.read(["path", "state"]).to_pydict()
        except Exception as e:  # pyarrow's and each store's own
            raise UserError(f"{path}: no part of verdicts, or damaged ({_reason(e)}); delete it") from None
        if made != model:
            raise UserError(f"{folder}: holds verdicts of another model ({made or 'unknown'}); name another folder")
        return [Source(*row) for row in zip(table["path"], table["state"], strict=True)]

    fs.invalidate_cache()
    parts = [p for p in fs.glob(f"{root}/*.parquet") if not hidden(PurePosixPath(p).name)] if fs.exists(root) else []
    return {source for found in side_by_side(read, parts) for source in found}


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
