# SPDX-License-Identifier: Apache-2.0
"""A password in the tracking server's address is seen by nobody else."""

import http.server
import threading
import traceback

import pytest

from panda_ad.errors import Unavailable, UserError
from panda_ad.registry import connection
from panda_ad.registry.connection import connect, mlflow_errors, server_command, server_environment, without_credentials


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://me:pa@ss@host:5000/x", "https://host:5000/x"),
        ("http://me:pa#ss@host", "http://host"),
        ("http://me:12/ss@host:80", "http://host:80"),
        ("postgresql+psycopg2://me:pa?ss@host/db", "postgresql+psycopg2://host/db"),
        ("http://host:5000/x", "http://host:5000/x"),
        ("sqlite:////home/a@b/mlflow.db", "sqlite:////home/a@b/mlflow.db"),
        ("", ""),
    ],
)
def test_credentials_are_not_printed(uri, shown):
    assert without_credentials(uri) == shown


@pytest.mark.parametrize(
    "uri",
    [
        "http://me:hunter2@127.0.0.1:1",
        "http://me:hunter2#and3@127.0.0.1:1",
        "postgresql://me:hunter2/and3@127.0.0.1:1/db",
        "http://me:hunter2@127.0.0.1 :1",
    ],
)
def test_an_address_that_leads_nowhere_is_named_without_its_password(uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError) as error:
        connect()
    text = "".join(traceback.format_exception(error.value))
    assert "hunter2" not in text and "and3" not in text and "\n" not in str(error.value)


class Broken(http.server.BaseHTTPRequestHandler):
    """Healthy, and no MLflow."""

    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 503)
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *args):
        pass


def test_what_mlflow_says_of_a_failed_request_is_passed_on_without_the_password(monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Broken) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:hunter2@127.0.0.1:{server.server_port}")
        monkeypatch.setitem(connection.DEFAULTS, "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        with pytest.raises(Unavailable) as error, mlflow_errors():
            connect().get_registered_model("x")
        server.shutdown()
    assert f"http://127.0.0.1:{server.server_port}/api" in str(error.value)
    assert "hunter2" not in "".join(traceback.format_exception(error.value))


def test_the_servers_store_is_in_its_environment_and_not_on_its_command_line(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:hunter2@127.0.0.1/db")
    assert not any("hunter2" in word for word in server_command("127.0.0.1", 5000))
    from click import Context
    from mlflow.cli import server

    with monkeypatch.context() as patch:
        for name, value in server_environment().items():
            patch.setenv(name, value)
        taken = server.make_context("server", [], resilient_parsing=True)
    assert isinstance(taken, Context) and taken.params["backend_store_uri"] == "postgresql://me:hunter2@127.0.0.1/db"
