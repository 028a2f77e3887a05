# SPDX-License-Identifier: Apache-2.0
"""Scoring a drop folder as a Prefect flow: each category's new images through its registered model into the log.

python -m flows.score        # the same without a deployment
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed, State

from flows.retrain import BACKOFF
from panda_ad.commands.score import Scored, score_files
from panda_ad.data.listing import describe, find_images, settled
from panda_ad.errors import UserError
from panda_ad.monitor.check import chosen_categories, model_at
from panda_ad.monitor.inbox import due
from panda_ad.monitor.log import LOG
from panda_ad.params_file import load_params

VERDICTS = Path("monitoring/verdicts")
"""A CSV per category and run with new images."""

Alias = Literal["staging", "champion", "challenger"]


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=BACKOFF)
def score_category(category: str, folder: Path, alias: str) -> dict[str, Any]:
    """Score a category's new images and return its row of the flow's table. What is scored: see `due`."""
    params = load_params()
    model = model_at(category, alias, params)
    row: dict[str, Any] = {"category": category, "model": f"{model.name} version {model.version}"}
    out = VERDICTS / category / f"{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}.csv"
    found = find_images([folder] if folder.is_dir() else [])
    files, moving = settled([*found.images, *found.unread], params.monitor.settle_seconds)
    for what, passed in (("still being written, left for the next run", moving), ("no images", found.passed_over)):
        if passed:
            get_run_logger().info("%s: passed over, %s: %s", category, what, describe(passed))
    wanted = due(files, category, model.name, model.version, params.monitor.window, model.detector.seen)
    done = score_files(wanted, model, out, log=LOG) if wanted else Scored(0, 0, 0)
    if not done.images:
        out.unlink(missing_ok=True)
    for warning in done.warnings:
        get_run_logger().warning("%s: %s", category, warning)
    for problem in done.problems:
        get_run_logger().warning("%s: not scored: %s", category, problem)
    row |= {"scored": done.images, "called defect": done.alarms, "known": len(files) - done.images - len(done.problems)}
    return row | {"unreadable": len(done.problems), "verdicts": str(out) if done.images else ""}


@flow(
    name="score",
    description="Scores what is new in a drop folder with the registered models and appends to the verdict log.",
)
def score(
    inbox: str = "inbox",
    categories: list[str] = [],  # noqa: B006  never changed, and the UI's form shows a plain list
    alias: Alias = "staging",
) -> State:
    """Score new images and keep their verdicts.

    Args:
        inbox: Folder with one folder of images per category, e.g. inbox/fabric. Images stay where they are.
        categories: What to score, e.g. fabric. No items: all categories of params.yaml.
        alias: Which registered version decides.
    """
    try:
        chosen = chosen_categories(categories, load_params())
        if not Path(inbox).is_dir():
            raise UserError(f"inbox: no folder {inbox}; make it, with one folder of images per category")
    except UserError as e:
        return Failed(message=str(e))
    states: dict[str, State] = {
        c: score_category.with_options(task_run_name=f"score {c}")(c, Path(inbox) / c, alias, return_state=True)
        for c in chosen
    }
    rows: list[dict[str, Any]] = [state.result() for state in states.values() if state.is_completed()]
    if rows:
        create_table_artifact(rows, key="score-results", description="Images scored in this run, per category.")
    if failed := [f"{c}: {state.message}" for c, state in states.items() if not state.is_completed()]:
        return Failed(message="; ".join(failed))
    return Completed(
        message=f"{sum(r['scored'] for r in rows)} images scored, {sum(r['called defect'] for r in rows)} called defect"
    )


if __name__ == "__main__":
    score()
