# SPDX-License-Identifier: Apache-2.0
"""What takes seconds to make is made once in a run of the tests, by the worker that needs it first; tests work on copies."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name` that `make(folder)` has filled, the same for all workers (the way of pytest-xdist's docs)."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / "made once" / name
    folder.parent.mkdir(exist_ok=True)
    finished = folder.with_name(f"{name} is finished")
    with FileLock(folder.with_name(f"{name}.lock")):
        if not finished.exists():
            shutil.rmtree(folder, ignore_errors=True)  # half made, by a test that failed
            make(folder)
            finished.touch()
    return folder


def copied(folder: Path, to: Path) -> Path:
    """A copy of such a folder; links within it stay links."""
    return Path(shutil.copytree(folder, to, symlinks=True))
