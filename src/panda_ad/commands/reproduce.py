# SPDX-License-Identifier: Apache-2.0
"""`panda-ad reproduce`: make a version's figures again from what was recorded of it, and compare the digits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from panda_ad.commands.run import dvc
from panda_ad.errors import UserError
from panda_ad.registry import connection, runs
from panda_ad.registry.lineage import explain_version
from panda_ad.registry.provenance import git
from panda_ad.system.processes import child_environment


@dataclass(frozen=True)
class Comparison:
    """A figure as logged and as made again, as text with every digit; '' where one side lacks it."""

    name: str
    logged: str
    reproduced: str

    @property
    def equal(self) -> bool:
        """Whether both figures are the same to the last digit."""
        return self.logged == self.reproduced


def reproduce(name: str, version: int | str, keep: bool = False) -> None:
    """Run a version's pipeline up to `evaluate` in a temporary clone, and print its figures beside the logged ones.

    Everything is computed anew: the clone has no activation cache, and DVC runs every stage whatever its cache holds.
    The working tree, its lock and build/ are left alone; of DVC's cache only images that are missing there are fetched
    into it.

    Parameters
    ----------
    version : a number, or an alias as '@staging'.
    keep : leave the clone, and say where it is.

    Raises
    ------
    UserError
        There is no such version; its commit or data cannot be had; a stage fails; or a figure differs (which ones, in
        the message).
    """
    facts = explain_version(name, version)
    category, label = facts["category"], f"{name} version {facts['version']}"
    if facts["gallery_changes"]:
        raise UserError(
            f"{label}: its gallery was changed after training, so the pipeline makes another version; reproduce "
            "the one that was trained, and repeat the changes that `panda-ad explain-version` lists"
        )
    if facts["uncommitted_changes"]:
        print(
            f"{label} was published with uncommitted changes: its parameters, data and lock file are known, "
            "but the code may differ from the commit's"
        )
    with _clone(facts["commit"], label, keep) as folder:
        runs.download_inputs(facts["run_id"], folder)
        print(f"{label}: commit {facts['commit'][:12]}, data {facts['data_hash'][:12]}, in {folder}", flush=True)
        extra = _environment(folder)
        _fetch_data(folder, label, extra)
        # --force: what DVC's caches hold was computed before, and would prove nothing
        dvc("repro", "--force", "--no-commit", f"evaluate@{category}", folder=folder, extra=extra)
        report = folder / "build/validation/report.json"
        logged = {"data_hash": facts["data_hash"], **{k: repr(float(v)) for k, v in _figures(facts["metrics"]).items()}}
        made = {"data_hash": _read(report)["data_hash"]}
        evaluation = folder / "build/evaluation" / category
        found = _read(evaluation / "metrics.json")
        if (evaluation / "intervals.json").exists():  # commits of before have the ends of intervals among the metrics
            found |= runs.interval_ends(_read(evaluation / "intervals.json"))
        made |= {k: repr(float(v)) for k, v in found.items() if isinstance(v, int | float)}
    table = [Comparison(k, logged.get(k, ""), made.get(k, "")) for k in dict.fromkeys([*logged, *made])]
    print("\n".join(rows(table)))
    if different := [c.name for c in table if not c.equal]:
        hint = "; it was published with uncommitted changes" if facts["uncommitted_changes"] else ""
        raise UserError(f"{label}: {len(different)} of {len(table)} figures differ: {', '.join(different)}{hint}")
    print(f"{label}: all {len(table)} figures are equal, digit by digit")


def rows(table: list[Comparison]) -> Iterator[str]:
    """Return the comparison as lines of text, columns aligned."""
    cells = [
        ("metric", "logged", "reproduced", "equal"),
        *((c.name, c.logged or "-", c.reproduced or "-", "yes" if c.equal else "NO") for c in table),
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(4)]
    for row in cells:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _figures(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics of evaluate: timings and histories have a '/' in their names."""
    return {k: v for k, v in metrics.items() if "/" not in k}


@contextmanager
def _clone(commit: str, label: str, keep: bool) -> Iterator[Path]:
    """Clone the repository at a commit into a temporary folder that only its owner can read."""
    if not commit:
        raise UserError(
            f"{label}: no commit was recorded (it was published outside a git repository), so its code is not known"
        )
    scratch = Path(tempfile.mkdtemp(prefix="panda-reproduce-"))
    folder = scratch / "repository"
    try:
        _git(
            "clone",
            "--quiet",
            "--no-checkout",
            str(connection.root()),
            str(folder),
            error=f"{connection.root()} cannot be cloned",
        )
        shallow = git("-C", str(connection.root()), "rev-parse", "--is-shallow-repository") == "true"
        fetch = "this is a shallow clone: `git fetch --unshallow`" if shallow else "fetch it (`git fetch --all`)"
        error = f"{label}: its commit {commit[:12]} is not in this repository; {fetch} and run again"
        _git("-C", str(folder), "checkout", "--quiet", commit, error=error)
        yield folder
    finally:
        if keep:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(scratch, ignore_errors=True)


def _git(*arguments: str, error: str) -> None:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{error} ({(done.stderr.strip().splitlines() or ['git failed'])[-1]})")


def _environment(folder: Path) -> dict[str, str]:
    """Return variables that put the clone's code before the installed one, and DVC's notes inside the clone."""
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(folder / "src"), os.environ.get("PYTHONPATH", "")])),
        "DVC_SITE_CACHE_DIR": str(folder.parent / "dvc"),
    }


def _fetch_data(folder: Path, label: str, extra: Mapping[str, str]) -> None:
    """Fetch the version's images, from the repository's own DVC cache, else from its remotes."""
    # not load_params: the parameters are that commit's, and may lack keys that this code knows
    root = Path(yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))["data"]["root"])
    tracked = next(
        (f for f in (Path(f"{p}.dvc") for p in (root, *root.parents) if p.name) if (folder / f).is_file()), None
    )
    if tracked is None:
        if root.is_absolute() and root.is_dir():
            return  # nothing else names its version: the data's hash is compared at the end
        raise UserError(f"{label}: its data (data.root: {root}) are not versioned with DVC and cannot be had again")
    _share_storage(folder, extra)
    try:
        dvc("checkout", "--quiet", str(tracked), folder=folder, extra=extra)
    except UserError:
        print(f"{label}: some of its images are not in DVC's cache here; asking the remote", flush=True)
        try:
            dvc("pull", "--quiet", str(tracked), folder=folder, extra=extra)
        except UserError:
            wanted = yaml.safe_load((folder / tracked).read_text(encoding="utf-8"))["outs"][0].get("md5", "")
            raise UserError(
                f"{label}: its images (version {str(wanted).removesuffix('.dir')} in {tracked}) "
                "are neither in DVC's cache here nor in its remote; "
                f"`dvc push` them from where they are"
            ) from None


_SHARE = """
import os, sys
from dvc.repo import Repo
with Repo(sys.argv[1]) as source, Repo(sys.argv[2]) as clone, clone.config.edit("local") as config:
    config.setdefault("cache", {})["dir"] = os.path.abspath(source.cache.local_cache_dir)
    for name, remote in source.config["remote"].items():
        if "://" not in remote["url"]:  # a folder, perhaps relative to the repository: the clone lies elsewhere
            place = os.path.abspath(os.path.join(sys.argv[1], remote["url"]))
            config.setdefault("remote", {}).setdefault(name, {})["url"] = place
"""


def _share_storage(folder: Path, extra: Mapping[str, str]) -> None:
    """Let the clone use the repository's DVC cache and remotes.

    Those set up, with credentials, in .dvc/config.local are among them.
    """
    source = connection.root()
    local = source / ".dvc" / "config.local"
    if local.is_file():
        shutil.copy(local, folder / ".dvc" / "config.local")
    env = child_environment(extra)
    done = subprocess.run(
        [sys.executable, "-c", _SHARE, str(source), str(folder)], env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(
            f"{source}: DVC's settings cannot be taken over ({(done.stderr.strip().splitlines() or [''])[-1]})"
        )


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"{path}: the pipeline of that commit did not write it, so there is nothing to compare"
        ) from None
