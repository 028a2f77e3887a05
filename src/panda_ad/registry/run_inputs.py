# SPDX-License-Identifier: Apache-2.0
"""What decides a run's figures: parameters, validated data and code, as one hash; and hashes of files and bundles."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import panda_ad
from panda_ad.errors import UserError
from panda_ad.system.files import digest_file

PACKAGE = Path(panda_ad.__file__).parent
VALIDATION = Path("build/validation")
TAG = "panda.inputs"
"""MLflow tag of a run and a version: the hash of its run inputs."""
_EARLIER_TAG = "panda.change"


@dataclass(frozen=True)
class RunInputs:
    """Identity of a run: equal for every way of running it (bare DVC, Prefect flow), different when an input differs.

    Attributes
    ----------
    hash : sha256 over params.yaml, the validated data, data.dvc, the package's source and requirements.lock, hex.
    data_hash : of the validated manifest, as build/validation/report.json has it.
    """

    hash: str
    data_hash: str


def current_inputs() -> RunInputs:
    """Return the run inputs of the working directory. UserError where validation has not run."""
    report = VALIDATION / "report.json"
    try:
        data_hash = str(json.loads(report.read_text(encoding="utf-8"))["data_hash"])
    except (OSError, ValueError, KeyError):
        raise UserError(f"{report}: missing or unreadable; run `dvc repro validate`") from None
    parts = {
        "params": digest_file(Path("params.yaml")),
        "data": data_hash,
        "data.dvc": digest_file(Path("data.dvc")),
        "code": digest_files(PACKAGE, source_files()),
        "lock": digest_file(Path("requirements.lock")),
    }
    return RunInputs(hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest(), data_hash)


def inputs_hash(tags: Mapping[str, str]) -> str:
    """Return the inputs hash among a run's or a version's tags, '' if there is none.

    One made before the tag had its name is found too.
    """
    return tags.get(TAG) or tags.get(_EARLIER_TAG, "")


def source_files() -> list[Path]:
    """Return the package's files that travel with a model: all but the embedded weights and compiled files."""
    files = (p for p in PACKAGE.rglob("*") if p.is_file())
    return sorted(p for p in files if not {"__pycache__", "weights"} & set(p.relative_to(PACKAGE).parts))


def digest_files(folder: Path, files: Iterable[Path]) -> str:
    """Return the sha256 over relative names and contents, hex, independent of order."""
    lines = sorted(f"{p.relative_to(folder).as_posix()} {digest_file(p)}\n" for p in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def bundle_hash(folder: Path) -> str:
    """Return the content hash of a bundle. UserError if there is none."""
    if not (folder / "bundle.json").is_file():
        raise UserError(f"{folder}: no bundle there; run `dvc repro index@{folder.name}`")
    return digest_files(folder, (p for p in folder.rglob("*") if p.is_file()))


def size_mb(folder: Path) -> float:
    """Return the bytes of all files below a folder / 10^6."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6
