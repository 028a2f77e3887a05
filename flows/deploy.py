# SPDX-License-Identifier: Apache-2.0
"""Bring a Prefect server up to date with this checkout: work pool, deployments of prefect.yaml, automations.

python -m flows.deploy                 # the server of PREFECT_API_URL; may be run again at any time
python -m flows.deploy --new-server    # one that has just been started, with its worker still to come
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from datetime import timedelta
from typing import Any
from uuid import UUID

from prefect.automations import Automation
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.events import EventTrigger, Posture
from prefect.events.actions import CallWebhook, ChangeFlowRunState, RunDeployment
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectAlreadyExists
from prefect.states import Crashed, State
from prefect.workers.process import ProcessWorker
from pydantic import SecretStr

from panda_ad.errors import UserError
from panda_ad.system.processes import child_environment

POOL = "panda"
WEBHOOK = "PANDA_WEBHOOK_URL"
"""Environment variable: where failed runs and refusals are posted. Kept on the server as a secret, never logged."""
SILENCE = timedelta(seconds=65)
"""A run whose heartbeats (every 30 s) stop for so long is marked crashed."""

MESSAGE = '(flow.name ~ " run " ~ flow_run.name ~ ": " ~ flow_run.state.name ~ ": " ~ (flow_run.state.message or ""))'
ENDED = {f"prefect.flow-run.{name}" for name in ("Completed", "Failed", "Refused", "Cancelled", "Crashed")}


def deploy(new_server: bool = False) -> None:
    """Create or update everything, and print a line per schedule. Raises UserError where prefect.yaml is refused.

    Parameters
    ----------
    new_server : no worker is alive: runs that a worker of before had begun are marked crashed, which frees their place.
    """
    with get_client(sync_client=True) as client:
        _create_pool(client)
        if new_server:
            _crash_abandoned_runs(client)
        switched_on = _active_schedules(client)
        result = subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
            env=child_environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if result.returncode:
            raise UserError(f"prefect.yaml: {' '.join((result.stderr or result.stdout).split())[-400:]}")
        _restore(client, switched_on)
        for deployment in client.read_deployments():
            for schedule in deployment.schedules:
                state = "ON " if schedule.active else "off"
                print(f"schedule: {deployment.name:8} {state}  {_text(schedule.schedule)}")
    asyncio.run(_automate())


async def _automate() -> None:
    await _save(crash_silent_runs())
    async with get_client() as client:
        deployment = await client.read_deployment_by_name("retrain/retrain")
    await _save(retrain_on_drift(deployment.id))
    if url := os.environ.get(WEBHOOK):
        block_id = await Webhook(method="POST", url=SecretStr(url)).save("panda-notifications", overwrite=True)
        await _save(notify(block_id))


def crash_silent_runs() -> Automation:
    """Return what marks a run crashed whose process, worker or machine died without saying so."""
    return Automation(
        name="panda: crash silent runs",
        description="A run that stops sending heartbeats is dead: its process, worker or machine was killed.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat"} | ENDED,
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=SILENCE,
        ),
        actions=[
            ChangeFlowRunState(
                name=None,
                state=StateType.CRASHED,
                force=False,
                message="No heartbeat: its process, worker or machine died.",
            )
        ],
    )


def retrain_on_drift(deployment_id: UUID) -> Automation:
    """Return what runs `retrain` for a category that has drifted; its result goes through the gate as any other."""
    category: dict[str, Any] = {"__prefect_kind": "jinja", "template": "{{ event.payload.category }}"}
    return Automation(
        name="panda: retrain on drift",
        description="Runs retrain for the category that the monitor flow found to have drifted. "
        "The gate decides about promotion.",
        trigger=EventTrigger(
            expect={"panda.drift"},
            match=ResourceSpecification({"prefect.resource.id": "panda.category.*"}),
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[
            RunDeployment(
                source="selected",
                deployment_id=deployment_id,
                parameters={"categories": [category]},
                job_variables=None,
            )
        ],
    )


def notify(block_id: UUID) -> Automation:
    """Return what posts to the webhook when a run fails or crashes, or a gate refuses."""
    return Automation(
        name="panda: notify",
        description=f"Posts failed runs and refused gates to the webhook of {WEBHOOK}.",
        trigger=EventTrigger(
            expect={f"prefect.flow-run.{name}" for name in ("Failed", "Refused", "Crashed")},
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[CallWebhook(block_document_id=block_id, payload=f'{{"text": {{{{ {MESSAGE} | tojson }}}}}}')],
    )


async def _save(automation: Automation) -> None:
    """Create the automation, or bring the one of this name up to date; on or off stays as the user left it."""
    try:
        known = await Automation.aread(name=automation.name)
    except ValueError:
        await automation.acreate()
        return
    automation.id, automation.enabled = known.id, known.enabled
    await automation.aupdate()


def _crash_abandoned_runs(client: SyncPrefectClient) -> None:
    """Mark crashed what a worker had begun that is dead.

    A run that is Pending forever keeps its deployment's only place.
    """
    begun = FlowRunFilter(
        state=FlowRunFilterState(
            type=FlowRunFilterStateType(any_=[StateType.PENDING, StateType.RUNNING, StateType.CANCELLING])
        )
    )
    pool = WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL]))
    for run in client.read_flow_runs(flow_run_filter=begun, work_pool_filter=pool):
        state: State[None] = Crashed(message="`make ui` ended, and with it the worker that had this run.")
        client.set_flow_run_state(run.id, state)


def _text(schedule: object) -> str:
    """Return a schedule as prefect.yaml has it, e.g. '0 2 * * * UTC'."""
    if isinstance(schedule, CronSchedule):
        return f"{schedule.cron} {schedule.timezone or 'UTC'}"
    return f"every {schedule.interval}" if isinstance(schedule, IntervalSchedule) else str(schedule)


def _create_pool(client: SyncPrefectClient) -> None:
    pool = WorkPoolCreate(
        name=POOL,
        type=ProcessWorker.type,
        description="Processes in the checkout that `make ui` was started in.",
        base_job_template=ProcessWorker.get_default_base_job_template(),
    )
    with contextlib.suppress(ObjectAlreadyExists):
        client.create_work_pool(pool)


def _active_schedules(client: SyncPrefectClient) -> dict[tuple[str, str], bool]:
    return {(d.name, s.slug): s.active for d in client.read_deployments() for s in d.schedules if s.slug}


def _restore(client: SyncPrefectClient, active: dict[tuple[str, str], bool]) -> None:
    """Switch schedules back to what the user chose in the UI: deploying writes `active` as prefect.yaml has it."""
    for deployment in client.read_deployments():
        for schedule in deployment.schedules:
            wanted = active.get((deployment.name, schedule.slug or ""), schedule.active)
            if wanted != schedule.active:
                response = client.request(
                    "PATCH",
                    "/deployments/{id}/schedules/{schedule_id}",
                    path_params={"id": deployment.id, "schedule_id": schedule.id},
                    json={"active": wanted},
                )
                response.raise_for_status()


if __name__ == "__main__":
    try:
        deploy(new_server="--new-server" in sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
