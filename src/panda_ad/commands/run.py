# SPDX-License-Identifier: Apache-2.0
"""`panda-ad run`: data, pipeline, promotion, summary. What has not changed is not done again."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from panda_ad.commands.summary import summary
from panda_ad.data.links import refuse_links
from panda_ad.errors import GateRefused, UserError
from panda_ad.params_file import load_params
from panda_ad.system.lock import repository_lock
from panda_ad.system.processes import Group, child_environment


def run() -> None:
    """Run all; GateRefused at the end if a category was not promoted, UserError if a stage failed."""
    params = load_params()
    with repository_lock("panda-ad run"):
        root = Path(params.data.root)
        if Path("data.dvc").exists() and params.data.root == "data" and not root.exists():
            fetch_images("data.dvc")
        if root.is_dir():
            refuse_links(root)
        dvc("repro")
        from panda_ad.registry.promote import promote

        refused = None
        try:
            promote(params.categories)
        except GateRefused as e:
            refused = e
    print(summary(params))
    if refused is not None:
        raise refused


def fetch_images(tracked: str) -> None:
    """Get the images that a .dvc file records from the remote.

    Raises
    ------
    UserError
        No remote has them, which DVC says nothing of.
    """
    try:
        dvc("pull", "--quiet", tracked)
    except UserError:
        from dvc.repo import Repo

        with Repo() as repo:
            remotes = ", ".join(f"{name} ({remote['url']})" for name, remote in repo.config["remote"].items())
        where = f"the remote, {remotes}, lacks them" if remotes else "no remote is set (`dvc remote add -d NAME PLACE`)"
        raise UserError(
            f"{tracked}: its images are not here and could not be fetched: {where}, or it does not answer. "
            f"Where they are, run `dvc push {tracked}`; "
            f"or copy them to {tracked.removesuffix('.dvc')}/ and run `dvc add {tracked.removesuffix('.dvc')}`"
        ) from None


@contextmanager
def dvc_meanwhile(
    *arguments: str, folder: Path | str | None = None, extra: Mapping[str, str] | None = None
) -> Iterator[None]:
    """`dvc` as a child beside what the block does; the block's end waits for it, an exception in the block ends it."""
    with Group([sys.executable, "-m", "dvc", *arguments], cwd=folder, env=child_environment(extra)) as child:
        yield
        for line in child.lines():
            print(line, flush=True)
        _check(arguments, child.wait())


def dvc(*arguments: str, folder: Path | str | None = None, extra: Mapping[str, str] | None = None) -> None:
    """Run DVC as a child that ends with this process; UserError if it fails (its own output has said why).

    Parameters
    ----------
    folder : where it runs; None: here.  extra : environment variables beside this process's.
    """
    if sys.stdout.isatty():  # progress bars draw on the terminal itself
        command = [sys.executable, "-m", "dvc", *arguments]
        _check(arguments, subprocess.run(command, cwd=folder, env=child_environment(extra), check=False).returncode)
    else:
        with dvc_meanwhile(*arguments, folder=folder, extra=extra):
            pass


def _check(arguments: Sequence[str], status: int) -> None:
    if status != 0:
        raise UserError(
            f"`dvc {' '.join(arguments)}` failed; what it printed above says why, and running again resumes there"
        )
