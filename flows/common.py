# SPDX-License-Identifier: Apache-2.0
"""What the flows share: DVC's graph, and stages as children."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter

from prefect.exceptions import FailedRun

from panda_ad.errors import Busy, UserError
from panda_ad.system.processes import Group, child_environment


def says_more_than_the_state(record: logging.LogRecord) -> bool:
    """Return whether a record is more than a failed run's message repeated below a stack trace of Prefect's code."""
    return not (record.exc_info and record.exc_info[0] is FailedRun)


for _logger in ("prefect.engine", "prefect.flow_runs"):
    logging.getLogger(_logger).addFilter(says_more_than_the_state)

HINTS = {
    "",
    "To track the changes with git, run:",
    "git add data.dvc",
    "git add dvc.lock",
    "To enable auto staging, run:",
    "dvc config core.autostage true",
    "Use `dvc push` to send your updates to remote storage.",
}
"""Lines that DVC ends each stage with, left out of a run's log."""

PATIENCE = 20.0
"""Seconds that a run waits for another DVC process in this repository."""


@dataclass(frozen=True)
class Stage:
    """One stage as DVC has it.

    Attributes
    ----------
    name : str
        As in `dvc repro NAME`, e.g. `adapt@fabric`; `data.dvc` for tracked data.
    parents : tuple of str
        The stages it directly depends on, in DVC's order.
    retries : int
        How often to try again when it fails: `meta: {retries: N}` in dvc.yaml, for stages that talk to servers.
    """

    name: str
    parents: tuple[str, ...]
    retries: int

    @property
    def category(self) -> str | None:
        """Return the matrix item, None for a stage that runs once."""
        return self.name.partition("@")[2] or None


def read_pipeline() -> tuple[list[Stage], set[str]]:
    """Return DVC's graph of the repository here, parents before children, and the stages that have changed.

    The latter are those that `dvc status` calls changed. Tracked data (`*.dvc`) is a stage, too: it has nothing to run,
    but `dvc repro` records what has been added by hand, and what a model is trained on has to be recorded. Another DVC
    process here, such as one of a killed run that takes a moment to die, is waited for, at most `PATIENCE` seconds.

    Raises
    ------
    Busy
        It did not end.
    UserError
        What else DVC refuses.
    """
    from dvc.exceptions import DvcException
    from dvc.lock import LockError

    limit = time.monotonic() + PATIENCE
    while True:
        try:
            return _read_pipeline()
        except LockError as e:
            if time.monotonic() > limit:
                raise Busy(f"DVC: {' '.join(str(e).split())}") from None
            time.sleep(0.5)
        except DvcException as e:
            raise UserError(f"DVC: {' '.join(str(e).split())}") from None


def _read_pipeline() -> tuple[list[Stage], set[str]]:
    from dvc.repo import Repo

    with Repo() as repo:
        graph = repo.index.graph  # edges point from a stage to what it depends on
        stages = {
            node.addressing: Stage(
                name=node.addressing,
                parents=tuple(parent.addressing for parent in graph.successors(node)),
                retries=int((getattr(node, "meta", None) or {}).get("retries", 0)),
            )
            for node in graph
        }
        changed = set(repo.status())
    order = TopologicalSorter({stage.name: stage.parents for stage in stages.values()}).static_order()
    return [stages[name] for name in order], changed & set(stages)


def select(stages: Sequence[Stage], categories: Sequence[str]) -> list[Stage]:
    """Return the stages of these categories and all they depend on, in the same order."""
    by_name = {stage.name: stage for stage in stages}
    wanted: set[str] = set()
    queue = [stage.name for stage in stages if stage.category in categories]
    while queue:
        name = queue.pop()
        if name not in wanted:
            wanted.add(name)
            queue.extend(by_name[name].parents)
    return [stage for stage in stages if stage.name in wanted]


def run_logged(
    command: Sequence[str], logger: logging.Logger | logging.LoggerAdapter, extra: Mapping[str, str]
) -> tuple[int, str]:
    """Run a command and log its output line by line.

    Return its exit status and the line that says most about a failure. That is panda-ad's own last line
    ('panda-ad: ...'), which DVC follows with one that names only the stage; else the last line.
    Whatever ends the caller (an exception, a signal, SIGKILL) ends the command and its descendants.
    """
    last = said = ""
    with Group(command, env=child_environment(extra)) as group:
        for line in group.lines():
            if line.strip() not in HINTS:
                last = line
                said = line if line.startswith("panda-ad: ") else said
                logger.info("%s", line)
        return group.wait(), said or last
