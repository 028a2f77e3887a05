# SPDX-License-Identifier: Apache-2.0
"""The pipeline as a Prefect flow: DVC's graph, one task per stage, then gate and promotion.

python -m flows.retrain        # the same without a deployment
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run
from prefect.states import Completed, Failed, State

from flows.common import Stage, read_pipeline, run_logged, select
from flows.results import GateResult, publish_artifacts
from panda_ad.errors import GateRefused, Unavailable, UserError
from panda_ad.params import METHODS
from panda_ad.params_file import load_params
from panda_ad.registry.connection import root
from panda_ad.system.lock import repository_lock
from panda_ad.system.workspace import changed_copy, has_commit

BACKOFF: list[float] = [5, 20, 60]
"""Seconds before the first, second and any further retry of what talks to servers."""

Method = Literal["as in params.yaml", *METHODS]  # type: ignore[valid-type]


@task(cache_policy=NO_CACHE, retry_delay_seconds=BACKOFF)
def run_stage(name: str, needed: bool) -> State:
    """Run `dvc repro --single-item NAME`, its output in the task's log.

    Of tracked data that records what has changed, in the cache too.
    """
    if not needed:
        return Completed(name="Unchanged", message="neither the stage nor anything it depends on has changed")
    status, last = run_logged(
        ["dvc", "repro", "--single-item", name], get_run_logger(), {"PANDA_PREFECT_RUN": str(flow_run.id or "")}
    )
    if status:
        return Failed(message=f"stage {name} failed (exit status {status}): {last}")
    return Completed()


@task(
    cache_policy=NO_CACHE,
    retries=3,
    retry_delay_seconds=BACKOFF,
    retry_condition_fn=lambda _t, _r, state: state.name == "Unavailable",
)
def promote_category(category: str) -> State:
    """Ask the gate: the challenger moves to @staging, or the state is Refused and says why.

    Unavailable is tried again.
    """
    from panda_ad.registry.promote import promote

    try:
        (decision,) = promote([category], "staging")
    except GateRefused as e:
        return Failed(name="Refused", message=str(e))
    except Unavailable as e:
        return Failed(name="Unavailable", message=str(e))
    except UserError as e:
        return Failed(message=str(e))
    return Completed(name=decision.outcome.capitalize(), message=str(decision))


@task(cache_policy=NO_CACHE)
def record_experiment(name: str) -> State:
    """`dvc exp save` in the run's copy, and the experiment from there into the repository."""
    experiment = f"refs/exps/*/{name}"
    fetch = ["git", "-C", str(root()), "fetch", "--quiet", str(Path.cwd()), f"{experiment}:{experiment}"]
    for command in (["dvc", "exp", "save", "--name", name], fetch):
        status, last = run_logged(command, get_run_logger(), {})
        if status:
            return Failed(message=f"{' '.join(command)} failed (exit status {status}): {last}")
    return Completed(
        message=f"experiment {name}: `dvc exp show` lists it, `dvc exp apply {name}` makes it the repository's"
    )


@flow(
    name="retrain", description="The pipeline of dvc.yaml, one task per stage, then the gate and promotion to staging."
)
def retrain(
    categories: list[str] = [],  # noqa: B006  never changed, and the UI's form shows a plain list
    method: Method = "as in params.yaml",
    set_params: list[str] = [],  # noqa: B006
    promote: bool = True,
) -> State:
    """Run the pipeline of dvc.yaml, then the gate.

    Args:
        categories: What to retrain, e.g. fabric. No items: all categories of params.yaml.
        method: How features are adapted in this run: none (DN2, the fastest), compactness, ses (sample-wise early
            stopping), ewc (elastic regularization), oe (outlier exposure, needs a folder: adapt.outliers).
        set_params: Parameters changed for this run, one per item, e.g. adapt.epochs=5; not those of the gate, which
            judges the run. A run with changes works in a copy of the checkout, which stays as it is, and is recorded as
            a DVC experiment of the run's name.
        promote: Let the gate decide about promotion to staging. Off: only the challenger is registered.
    """
    changes = set_params + ([] if method == "as in params.yaml" else [f"adapt.method={method}"])
    try:
        with repository_lock(f"Prefect flow run {flow_run.name}"), changed_copy(changes) if changes else nullcontext():
            return _retrain(categories, promote, recorded=bool(changes) and has_commit(Path.cwd()))
    except UserError as e:
        return Failed(message=str(e))


def _retrain(categories: Sequence[str], promote: bool, recorded: bool) -> State:
    known = load_params().categories
    chosen = list(categories or known)
    if unknown := [c for c in chosen if c not in known]:
        raise UserError(f"categories: {', '.join(unknown)} not in params.yaml, which has {', '.join(known)}")
    stages, changed = read_pipeline()
    stages = select(stages, chosen)
    last = [s for s in stages if not any(s.name in other.parents for other in stages)]
    states = _run_stages(stages, changed)
    if recorded and all(s.is_completed() for s in states.values()):
        states["record"] = record_experiment.with_options(task_run_name="record experiment")(
            str(flow_run.name), wait_for=[states[s.name] for s in last], return_state=True
        )
    gates: dict[str, State] = {}
    if promote:
        for category in chosen:
            done = [states[s.name] for s in last if s.category == category]
            gates[category] = promote_category.with_options(name="promote", task_run_name=f"promote {category}")(
                category, wait_for=done, return_state=True
            )
    publish_artifacts([GateResult.of(c, gates.get(c)) for c in chosen], states)
    return _summary(states, gates)


def _run_stages(stages: Sequence[Stage], changed: set[str]) -> dict[str, State]:
    """Run the stages one after another, since DVC locks its repository.

    What depends on a failed stage is not run, everything else is.
    """
    states: dict[str, State] = {}
    ran: set[str] = set()
    for stage in stages:
        needed = stage.name in changed or not ran.isdisjoint(stage.parents)
        if needed:
            ran.add(stage.name)
        states[stage.name] = run_stage.with_options(name=stage.name, task_run_name=stage.name, retries=stage.retries)(
            stage.name, needed, wait_for=[states[p] for p in stage.parents], return_state=True
        )
    return states


def _summary(states: Mapping[str, State], gates: Mapping[str, State]) -> State:
    failed = [str(s.message) for s in [*states.values(), *gates.values()] if s.is_failed() and s.name != "Refused"]
    if failed:
        return Failed(message="; ".join(failed))
    refused = {c: s.message for c, s in gates.items() if s.name == "Refused"}
    if refused:
        return Failed(name="Refused", message="; ".join(f"{c}: {m}" for c, m in refused.items()))
    ran = sum(s.name != "Unchanged" for s in states.values())
    return Completed(
        message=f"{ran} of {len(states)} tasks had work"
        + (f", {'; '.join(f'{c} {str(s.name).lower()}' for c, s in gates.items())}" if gates else "")
    )


if __name__ == "__main__":
    retrain()
