"""What a change is: the inputs that decide a run's figures, and the facts about where they came from."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import panda_ad
from panda_ad.errors import UserError
from panda_ad.system.files import digest_file

PACKAGE = Path(panda_ad.__file__).parent
INPUTS = ("params.yaml", "dvc.yaml", "data.dvc", "requirements.lock", "src")
VALIDATION = Path("build/validation")


@dataclass(frozen=True)
class Change:
    """Identity of a change: equal for every way of running it (bare DVC, Prefect flow), different when an input differs.

    Attributes
    ----------
    key : sha256 over params.yaml, the validated data, data.dvc, the package's source and requirements.lock, hex.
    data_hash : of the validated manifest, as build/validation/report.json has it.
    """

    key: str
    data_hash: str


def current_change() -> Change:
    """The change in the working directory. UserError where validation has not run."""
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
    return Change(hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest(), data_hash)


def source_files() -> list[Path]:
    """The package's files that travel with a model: all but the embedded weights and compiled files."""
    files = (p for p in PACKAGE.rglob("*") if p.is_file())
    return sorted(p for p in files if not {"__pycache__", "weights"} & set(p.relative_to(PACKAGE).parts))


def digest_files(folder: Path, files: Iterable[Path]) -> str:
    """sha256 over relative names and contents, hex, independent of order."""
    lines = sorted(f"{p.relative_to(folder).as_posix()} {digest_file(p)}\n" for p in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def bundle_hash(folder: Path) -> str:
    """Content hash of a bundle. UserError where there is none."""
    if not (folder / "bundle.json").is_file():
        raise UserError(f"{folder}: no bundle there; run `dvc repro index@{folder.name}`")
    return digest_files(folder, (p for p in folder.rglob("*") if p.is_file()))


def size_mb(folder: Path) -> float:
    """Bytes of all files / 10^6."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6


def git(*arguments: str) -> str:
    """Output of a git command in the working directory; '' where it fails (no repository, no git)."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=20, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def provenance() -> dict[str, str]:
    """Tags that say where a run comes from: git commit, whether inputs differ from it, DVC experiment, Prefect run, user."""
    tags = {"mlflow.user": user(), "mlflow.source.name": "dvc.yaml", "mlflow.source.type": "PROJECT"}
    if commit := git("rev-parse", "HEAD"):
        tags["mlflow.source.git.commit"] = commit
        tags["panda.git_dirty"] = str(bool(git("status", "--porcelain", "--", *INPUTS))).lower()
    if branch := git("rev-parse", "--abbrev-ref", "HEAD"):
        tags["mlflow.source.git.branch"] = branch
    if experiment := os.environ.get("DVC_EXP_NAME"):
        tags["panda.dvc_experiment"] = experiment
    if run := prefect_run():
        tags["panda.prefect_run"] = run
        api = urlsplit(os.environ.get("PREFECT_API_URL", ""))
        if api.scheme in ("http", "https"):
            server = f"{api.scheme}://{api.netloc.rpartition('@')[2]}{api.path.rstrip('/').removesuffix('/api')}"
            tags["panda.prefect_url"] = f"{server}/runs/flow-run/{run}"
    return tags


def prefect_run() -> str:
    """Id of the Prefect flow run this process works for; '' if none."""
    return os.environ.get("PANDA_PREFECT_RUN") or os.environ.get("PREFECT__FLOW_RUN_ID") or ""


def user() -> str:
    """Login name, or the numeric id where the machine has no name for it (containers)."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def model_name(dataset: str, category: str) -> str:
    """Name of the registered model."""
    return f"panda-{dataset}-{category}"


def plain(category: str) -> str:
    """A category as part of metric names and artifact paths, where MLflow allows fewer characters than a folder's name."""
    return re.sub(r"[^\w\- ]", "_", category)
