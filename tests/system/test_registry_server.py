# SPDX-License-Identifier: Apache-2.0
"""The registry on a real MLflow server on loopback, and the same store read without it."""

import contextlib
import os
import signal
import socket
import sys
import time
import urllib.request

import pytest
from registry_project import make_project, write, write_bundle, write_scores

from panda_ad.errors import Unavailable, UserError
from panda_ad.registry import audit
from panda_ad.registry.connection import DEFAULTS, connect, server_command, server_environment
from panda_ad.registry.promote import promote, rollback
from panda_ad.registry.versions import download_version
from panda_ad.stages.publish import main as publish
from panda_ad.system.processes import Group

pytestmark = pytest.mark.slow
NAME = "panda-sample-fabric"


@contextlib.contextmanager
def serving(folder, port, command, environment):
    """An MLflow server; ended on leaving."""
    env = {**os.environ, **environment}
    with (
        open(folder / "server.log", "ab") as log,
        Group([sys.executable, "-m", *command], env=env, cwd=folder, output=log) as server,
    ):
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert server.running and time.monotonic() < deadline, (folder / "server.log").read_text()[-2000:]
                time.sleep(0.3)
        yield server


def aliases_of(version):
    """Aliases that point at a version, sorted."""
    return sorted(connect().get_model_version(NAME, version).aliases)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_server_and_file_are_one_store_and_a_lost_server_loses_nothing(tmp_path, monkeypatch):
    folder, port = make_project(tmp_path / "my plant"), free_port()
    address = f"http://127.0.0.1:{port}"
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    connect()
    command, environment = server_command("127.0.0.1", port), server_environment()
    assert not any("sqlite" in word for word in command), "with a database its password would be there for all to see"

    with serving(folder, port, command, environment) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        publish("fabric")
        publish("fabric")
        assert promote()[0].outcome == "promoted" and promote()[0].outcome == "unchanged"
        assert len(connect().search_runs(["1"])) == 1

        monkeypatch.delenv(
            "MLFLOW_TRACKING_URI"
        )  # the same store as a file: what the server wrote can be read, and back
        assert aliases_of("1") == ["challenger", "staging"]
        assert (download_version(f"models:/{NAME}@staging")[2] / "learned.safetensors").read_bytes() == b"weights 1"
        write(folder / "requirements.lock", "# 2\n")
        write_bundle(folder, "fabric", b"weights 2")
        write_scores(folder, "fabric")
        publish("fabric")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        assert (download_version(f"models:/{NAME}@challenger")[2] / "learned.safetensors").read_bytes() == b"weights 2"

        os.killpg(server.pid, signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(UserError, match="does not answer"):
            promote()
        with pytest.raises(UserError, match="does not answer"):
            rollback("fabric")
        assert time.monotonic() - start < 90, "MLflow itself would try for four minutes each"

    with serving(folder, port, command, environment):
        assert aliases_of("1") == ["staging"]
        assert promote()[0].version == "2"
        assert rollback("fabric").version == "1"
        assert [m["action"] for m in audit.history(connect().get_registered_model(NAME))] == [
            "promote",
            "promote",
            "rollback",
        ]


def test_a_server_lost_between_the_calls_of_publish_and_promote_is_one_line_and_the_next_one_goes_on(
    tmp_path, monkeypatch
):
    """Team mode: a server that keeps the artifacts itself. It is killed in the middle of a publish, before a promotion moves, and after."""
    from mlflow import MlflowClient

    def lost_during(command, method, before):
        """The server is killed right before or after what `method` does; the command fails with one line, as something to try again."""

        def lost(*args, **kwargs):
            result = None if before else real(*args, **kwargs)
            os.killpg(server.pid, signal.SIGKILL)
            server.wait(60)
            return real(*args, **kwargs) if before else result

        real = getattr(MlflowClient, method)
        start = time.monotonic()
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, method, lost)
            with pytest.raises(Unavailable, match=f"^MLflow at http://127.0.0.1:{port}") as error:
                command()
        assert time.monotonic() - start < 180, "MLflow itself would try for four minutes"
        assert "\n" not in str(error.value)

    folder, port = make_project(tmp_path / "team"), free_port()
    server_folder = tmp_path / "server"
    server_folder.mkdir()
    command = [
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--backend-store-uri",
        "sqlite:///team.db",
        "--workers",
        "1",
    ]
    command += ["--artifacts-destination", "kept"]
    environment = {**DEFAULTS, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    with serving(server_folder, port, command, environment) as server:
        lost_during(lambda: publish("fabric"), "finalize_logged_model", before=True)
        assert not (folder / "build/publish").exists()
    with serving(server_folder, port, command, environment) as server:
        publish("fabric")
        (run,) = connect().search_runs(["1"])
        assert run.info.status == "FINISHED" and len(run.outputs.model_outputs) == 1
        assert len(connect().search_model_versions(f"name = '{NAME}'")) == 1
        lost_during(promote, "download_artifacts", before=True)
    with serving(server_folder, port, command, environment) as server:
        assert aliases_of("1") == ["challenger"] and audit.history(connect().get_registered_model(NAME)) == []
        lost_during(promote, "set_registered_model_alias", before=False)
    with serving(server_folder, port, command, environment):
        assert aliases_of("1") == ["challenger", "staging"]
        assert promote()[0].outcome == "unchanged"
        assert [(m["action"], m["from"], m["to"]) for m in audit.history(connect().get_registered_model(NAME))] == [
            ("promote", None, "1")
        ]
        bundle = download_version(f"models:/{NAME}@staging")[2]
        assert bundle.is_relative_to(".cache/models") and (bundle / "learned.safetensors").read_bytes() == b"weights 1"
        (bundle / "learned.safetensors").write_bytes(b"damaged")  # the copy is fetched again
        assert download_version(f"models:/{NAME}/1")[2] == bundle
        assert (bundle / "learned.safetensors").read_bytes() == b"weights 1"
    assert not (folder / "mlflow.db").exists() and not (folder / "mlartifacts").exists()
