# SPDX-License-Identifier: Apache-2.0
"""Run stages in children that are killed at their n-th change to the file system; a program of its own, so that it can fork.

python tests/helpers/kill_points.py undisturbed|killed     (in a project's folder)
"""

from __future__ import annotations

import importlib
import os
import random
import signal
import sys
from pathlib import Path

import faiss  # noqa: F401  imported once here, as the stages are, instead of in every child
import great_expectations.expectations  # noqa: F401
import pandas  # noqa: F401
import scipy.ndimage  # noqa: F401
import torch

STAGES = ("validate", "extract", "adapt", "index", "evaluate")
CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
POINTS = 4
"""Kills per stage, spread over its changes by chance."""


def changes_here(event: str, arguments: tuple[object, ...], root: str) -> bool:
    """Whether an audit event is a change below `root` (a path opened for writing, a rename, ...)."""
    if event == "open":
        mode, flags = arguments[1], arguments[2]
        writes = (
            isinstance(mode, str)
            and any(c in mode for c in "wax+")
            or isinstance(flags, int)
            and bool(flags & (os.O_WRONLY | os.O_RDWR))
        )
    else:
        writes = event in CHANGES
    path = arguments[0] if arguments else None
    return writes and isinstance(path, (str, os.PathLike)) and os.path.abspath(path).startswith(root)


def run(stage: str, kill_at: int | None) -> int | None:
    """Run a stage in a child: None if it was killed, else the number of its changes."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        root, count = os.getcwd(), 0

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal count
            if (event == "open" or event in CHANGES) and changes_here(event, arguments, root):
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        module = importlib.import_module(f"panda_ad.stages.{stage}")
        module.main(*([] if stage in ("validate", "extract") else ["nut"]))
        os.write(writer, str(count).encode())
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    with open(reader) as f:
        said = f.read()
    if os.WIFSIGNALED(status):
        return None
    if status or not said:
        sys.exit(f"{stage}: ended with {status}")
    return int(said)


def main() -> None:
    """Undisturbed: each stage once. Killed: each stage killed at POINTS of its changes, then run to its end."""
    torch.set_num_threads(1)  # a forked child has none of its parent's threads
    for stage in STAGES:
        importlib.import_module(f"panda_ad.stages.{stage}")
    rng = random.Random(0)
    for stage in STAGES:
        if sys.argv[1] == "killed":
            for position in sorted(rng.sample(range(1, int(Path(f"changes-{stage}").read_text()) + 1), POINTS)):
                if run(stage, position) is not None:
                    break  # what an earlier try had finished is not done again: fewer changes are left than before
        changes = run(stage, None)
        if sys.argv[1] == "undisturbed":
            Path(f"changes-{stage}").write_text(str(changes))


if __name__ == "__main__":
    main()
