# SPDX-License-Identifier: Apache-2.0
"""Old versions and their runs out of the registry, so that its disk use stays bounded."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from panda_ad.errors import UserError
from panda_ad.params_file import load_params
from panda_ad.registry import audit
from panda_ad.registry.connection import connect, local_store, mlflow_errors, tracking_uri
from panda_ad.registry.names import model_name
from panda_ad.registry.run_inputs import inputs_hash
from panda_ad.system.lock import repository_lock
from panda_ad.system.processes import child_environment

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.store.entities import PagedList

_PAGE = 1000  # entries of one answer


def clean(keep: int, delete: bool) -> list[str]:
    """Delete versions and runs that are no longer needed, and return a line for each.

    Of each of params.yaml's categories the newest `keep` versions stay, and the runs of the data set that belong to a
    version that stays. What an alias points to stays too, and so do the version before it and versions that were
    rolled back: the same model made again must be recognized as held back. Alias moves stay recorded on the
    registered model. With `delete` false nothing is deleted, and the lines say what would be.

    Raises
    ------
    UserError
        `keep` is less than 1, or MLflow does not answer.
    Busy
        Another run holds the repository's lock.
    """
    if keep < 1:
        raise UserError(f"--keep {keep}: at least one version of each category stays")
    params = load_params()
    with repository_lock("panda-ad clean"), mlflow_errors():
        client = connect()
        gone: list[str] = []
        used: set[str] = set()
        named = {model_name(params.dataset, category) for category in params.categories}
        registered = _every(lambda token: client.search_registered_models(max_results=_PAGE, page_token=token))
        for name in sorted(model.name for model in registered if model.name.startswith(model_name(params.dataset, ""))):
            for version, stays in _versions(client, name, keep):
                if stays or name not in named:  # a category that params.yaml does not name now may be needed again
                    used |= {str(version.run_id), version.tags.get("panda.run", ""), f"{name} {version.version}"}
                    continue
                gone.append(f"{name} version {version.version}")
                if delete:
                    client.delete_model_version(name, version.version)
                    client.delete_logged_model(str(version.source).rpartition("/")[2])
        for run in _runs(client, params.dataset):
            tags = run.data.tags
            checked = f"{tags.get('panda.model')} {tags.get('panda.version')}"  # of a run that `monitor` made
            ours = bool(inputs_hash(tags)) or "panda.model" in tags
            if ours and run.info.status != "RUNNING" and not used & {run.info.run_id, checked}:
                gone.append(f"run {run.info.run_name} ({run.info.run_id})")
                if delete:
                    client.delete_run(run.info.run_id)
        if delete:  # even where nothing is left to mark: a kill may have come before the files went
            _remove_files(gone)
    return gone


def _versions(client: MlflowClient, name: str, keep: int) -> list[tuple[ModelVersion, bool]]:
    """Return a model's versions, newest first, and whether each stays; none if it was never registered."""
    versions: list[ModelVersion] = _every(
        lambda token: client.search_model_versions(f"name='{name}'", max_results=_PAGE, page_token=token)
    )
    found = sorted(versions, key=lambda v: -int(v.version))
    used: set[str] = set()
    if found:
        model = client.get_registered_model(name)
        used = {str(version) for version in model.aliases.values()}
        there = {str(v.version) for v in found}
        for alias in audit.ALIASES:
            before = [number for number in audit.versions_before(model, alias) if number in there]
            used |= {*before[:1], *audit.held_back(model, alias)}
    return [(v, n < keep or str(v.version) in used) for n, v in enumerate(found)]


def _runs(client: MlflowClient, dataset: str) -> list[Run]:
    """Return the runs of the data set's experiments: training and monitoring."""
    found = [client.get_experiment_by_name(name) for name in (f"panda-{dataset}", f"panda-{dataset}-monitoring")]
    experiments = [experiment.experiment_id for experiment in found if experiment is not None]
    return (
        _every(lambda token: client.search_runs(experiments, max_results=_PAGE, page_token=token))
        if experiments
        else []
    )


def _every(search: Callable[[str | None], PagedList]) -> list[Any]:
    """All pages of a search."""
    page = search(None)
    found = list(page)
    while page.token:
        page = search(page.token)
        found += page
    return found


def _remove_files(gone: list[str]) -> None:
    """MLflow only marks what is deleted; its files go with `mlflow gc`, which needs the store itself."""
    if not local_store():
        if gone:
            gone.append(
                "marked as deleted; `mlflow gc` on the tracking server, with its --backend-store-uri, removes the files"
            )
        return
    command = [sys.executable, "-m", "mlflow", "gc", "--backend-store-uri", tracking_uri()]
    done = subprocess.run(
        command,
        env=child_environment({"MLFLOW_TRACKING_URI": tracking_uri()}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise UserError(
            f"mlflow gc failed, the files of what was deleted are still there: {done.stderr.strip().splitlines()[-1:]}"
        )
