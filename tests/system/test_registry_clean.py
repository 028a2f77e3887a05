# SPDX-License-Identifier: Apache-2.0
"""Cleaning the registry: what is in use stays and still loads, what is not goes with its files."""

import shutil
from pathlib import Path

import pytest
import yaml
from registry_project import NAME, aliases, make_project, moves, retrained
from shared import copied
from typer.testing import CliRunner

from panda_ad.cli import app
from panda_ad.errors import UserError
from panda_ad.registry.clean import clean
from panda_ad.registry.connection import connect
from panda_ad.registry.monitoring import record_check
from panda_ad.registry.promote import promote, rollback
from panda_ad.stages.publish import main as publish


@pytest.fixture(scope="module")
def six_versions(tmp_path_factory, empty_store):
    """1 and 2 promoted, 3 promoted and rolled back, 4 to 6 published only; version 4 is monitored, 2 is @staging."""
    folder = make_project(tmp_path_factory.mktemp("six") / "my plant")
    shutil.copyfile(empty_store, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(folder)
        for version in range(1, 7):
            retrained(folder, weights=f"weights {version}".encode())
            publish("fabric")
            if version <= 3:
                promote()
            if version == 3:
                rollback("fabric")
        report = folder / "report.html"
        report.write_text("<html></html>")
        check = {
            "checked": "2026-01-01T00:00:00",
            "window": 30,
            "drifted": False,
            "findings": [],
            "tests": [],
            "evidence": {},
            "open": [],
        }
        for version in ("2", "4"):
            record_check("sample", NAME, version, check, [report])
    return folder


@pytest.fixture
def project(six_versions, tmp_path, monkeypatch):
    """A copy of it, the working directory."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(copied(six_versions, tmp_path / "my plant"))
    return Path.cwd()


def versions():
    return {int(v.version) for v in connect().search_model_versions(f"name='{NAME}'")}


def test_what_is_in_use_stays_and_the_rest_goes_with_its_files(project):
    client = connect()
    files = {
        int(v.version): Path(
            client.get_logged_model(v.source.rpartition("/")[2])
            .artifact_location.removeprefix("file://")
            .replace("%20", " ")
        )
        for v in client.search_model_versions(f"name='{NAME}'")
    }
    assert all(folder.exists() for folder in files.values())
    held, history = aliases(), moves()
    named = clean(1, delete=False)
    assert versions() == {1, 2, 3, 4, 5, 6}
    assert clean(1, delete=True) == named
    stay = {6, 3, 1} | set(held.values())  # the newest, the one rolled back, the one before, and the aliases'
    assert versions() == stay
    assert {v for v, folder in files.items() if folder.exists()} == stay
    assert aliases() == held and moves() == history
    assert {f"{NAME} version {v}" for v in {1, 2, 3, 4, 5, 6} - stay} == {
        line for line in named if not line.startswith("run ")
    }
    assert any(f"{NAME} version 4" in line for line in named if line.startswith("run "))  # its monitoring
    assert not any(f"{NAME} version 2 (" in line for line in named)
    assert clean(1, delete=True) == []
    for version in stay:  # the runs that speak for them
        run = client.get_run(client.get_model_version(NAME, str(version)).tags["panda.run"])
        assert run.info.lifecycle_stage == "active"


def test_other_models_of_the_server_are_no_concern(project):
    client = connect()
    client.create_registered_model("bob's model")
    client.create_model_version("bob's model", source=client.search_model_versions(f"name='{NAME}'")[0].source)
    assert any(NAME in line for line in clean(1, delete=False))


def test_categories_that_params_yaml_does_not_name_now_keep_versions_and_runs(project):
    client = connect()
    runs = {version.run_id for version in client.search_model_versions(f"name='{NAME}'")}
    params = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    Path("params.yaml").write_text(yaml.safe_dump(params | {"categories": ["washer"]}), encoding="utf-8")
    assert clean(1, delete=True) == []
    assert versions() == {1, 2, 3, 4, 5, 6}
    assert {client.get_run(run).info.lifecycle_stage for run in runs} == {"active"}


def test_the_same_model_again_is_a_new_version_after_its_old_one_is_gone(project):
    clean(1, delete=True)
    retrained(project, weights=b"weights 5")
    publish("fabric")
    assert aliases()["challenger"] == 7
    assert 7 in versions()


def test_the_command_only_says_what_would_go(project):
    done = CliRunner().invoke(app, ["clean", "--keep", "1"])
    assert done.exit_code == 0
    assert "nothing is deleted yet: add --delete" in done.output
    assert len(versions()) == 6
    assert "nothing to delete" in CliRunner().invoke(app, ["clean", "--keep", "6"]).output


def test_at_least_one_version_stays(project):
    with pytest.raises(UserError, match="--keep 0"):
        clean(0, delete=True)
