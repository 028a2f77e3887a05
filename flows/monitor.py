# SPDX-License-Identifier: Apache-2.0
"""Watching the models at work as a Prefect flow: have the images of a category changed since the last change.

A new alarm is an event, `panda.drift`, once, on which the automation of `flows/deploy.py` runs `retrain`. The gate
decides whether the new model is any better. Nothing here promotes.

python -m flows.monitor        # the same without a deployment
"""

from __future__ import annotations

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event
from prefect.states import Completed, Failed, State

from flows.results import artifact_key, cell
from flows.retrain import BACKOFF
from flows.score import Alias
from panda_ad.commands.audit import confirmed_good
from panda_ad.errors import UserError
from panda_ad.monitor.alarms import tell
from panda_ad.monitor.check import Check, check_category, chosen_categories, record
from panda_ad.monitor.drift import TooFew
from panda_ad.monitor.log import NothingLogged
from panda_ad.params_file import load_params

EVENT = "panda.drift"


def tell_alarms(check: Check) -> None:
    """Tell Prefect of the alarms that it has not had yet, each once, whoever found them.

    The event is `panda.drift` of resource `panda.category.<category>`, its payload the findings and since when. One
    event causes one retraining, however long an alarm stays open.
    """
    for alarm in check.open:
        if alarm.told:
            continue
        emit_event(
            EVENT,
            resource={
                "prefect.resource.id": f"panda.category.{check.category}",
                "prefect.resource.name": check.category,
            },
            payload={
                "category": check.category,
                "model": alarm.model,
                "version": alarm.version,
                "findings": list(alarm.findings),
                "shifts": dict(alarm.shifts),
                "since": alarm.since,
                "images": check.drift.window,
            },
        )
        tell(check.category, alarm)


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=BACKOFF)
def check(category: str, alias: str) -> State:
    """Test one category for drift; the state is Waiting where too few images have been scored."""
    try:
        params = load_params()
        found = check_category(category, alias, params=params, good=confirmed_good(params, category))
    except (TooFew, NothingLogged) as e:
        return Completed(name="Waiting", message=str(e))
    except UserError as e:
        return Failed(message=str(e))
    create_markdown_artifact(summary(found), key=f"monitor-{artifact_key(category)}", description=str(found))
    return Completed(name="Drift" if found.alarms else "Steady", message=str(found), data=found)


@task(cache_policy=NO_CACHE, retries=3, retry_delay_seconds=BACKOFF)
def log_check(found: Check) -> None:
    """Log report and figures of a check to MLflow."""
    record(found, load_params().dataset)


@flow(
    name="monitor",
    description="Tests each category's images for a change. A new one is event panda.drift, once, which runs retrain.",
)
def monitor(
    categories: list[str] = [],  # noqa: B006  never changed, and the UI's form shows a plain list
    alias: Alias = "staging",
) -> State:
    """Find out whether images have changed.

    Args:
        categories: What to look at, e.g. fabric. No items: all categories of params.yaml.
        alias: The registered version whose verdicts are looked at.
    """
    try:
        chosen = chosen_categories(categories, load_params())
    except UserError as e:
        return Failed(message=str(e))
    states: dict[str, State] = {
        c: check.with_options(task_run_name=f"check {c}")(c, alias, return_state=True) for c in chosen
    }
    failed = {c: str(s.message) for c, s in states.items() if not s.is_completed()}
    checks: list[Check] = [s.result() for s in states.values() if s.name in ("Drift", "Steady")]
    for found in checks:
        if found.alarms:
            get_run_logger().warning("%s", found)
        tell_alarms(found)  # first, so that it does not wait for MLflow
        logged = log_check.with_options(task_run_name=f"log {found.category}")(found, return_state=True)
        if not logged.is_completed():
            failed[found.category] = str(logged.message)
    rows = [{"category": c, "state": s.name, "finding": s.message} for c, s in states.items()]
    create_table_artifact(rows, key="monitor-results", description="What has drifted, per category.")
    if failed:
        return Failed(message="; ".join(f"{c}: {m}" for c, m in failed.items()))
    drifted = [f"{f.category}: {f.headline}" for f in checks if f.alarms]
    waiting = sum(s.name == "Waiting" for s in states.values())
    return Completed(
        name="Drift" if drifted else "Completed",
        message="; ".join(drifted) or f"{len(checks)} categories steady, {waiting} with too few images",
    )


def summary(found: Check) -> str:
    """Return alarms and every test of a check, as Markdown."""
    lines = [f"**{found.category}: {cell(found.headline)}**", ""]
    lines += [
        f"{found.model} version {found.version}, {found.drift.window} images against {found.drift.reference}; "
        f"{found.report}",
        "",
    ]
    if found.open:
        command = f"`panda-ad monitor --acknowledge -c {found.category} --reason TEXT`"
        lines += [f"A person who knows and accepts the change ends the alarm with {command}.", ""]
    lines += ["| what | reference | recent | shift | p | finding |", "| --- | --- | --- | --- | --- | --- |"]
    for t in found.drift.tests:
        before, after = ("" if v is None else f"{v:.4g}" for v in (t.before, t.after))
        lines.append(f"| {t.name} | {before} | {after} | {t.shift:.2f} | {t.adjusted:.2g} | {t.finding} |")
    return "\n".join(lines)


if __name__ == "__main__":
    monitor()
