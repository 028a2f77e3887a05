# SPDX-License-Identifier: Apache-2.0
"""Where MLflow is, and quick clear failure when it is not there.

MLFLOW_TRACKING_URI names a server. Without it a SQLite file and a folder beside params.yaml are used. Credentials come
from MLflow's own variables (MLFLOW_TRACKING_USERNAME and others) and are never printed.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from panda_ad.errors import Unavailable, UserError
from panda_ad.registry.repoint import repoint

if TYPE_CHECKING:
    from mlflow import MlflowClient

DEFAULTS = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # with MLflow's own 7, a lost server blocks for four minutes
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_RECORD_ENV_VARS_IN_MODEL_LOGGING": "false",
    "MLFLOW_UV_AUTO_DETECT": "false",  # the model's requirements are written by publish
}
"""Environment of every MLflow client here, where the user has not set it; read by MLflow when it is imported."""

WAIT = 3.0
"""Seconds that a server has to answer before it counts as down."""

_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}


def root() -> Path:
    """Return the repository's folder.

    It is the working directory or, in DVC's temporary copy for a queued experiment, the one it was copied from.
    """
    here = Path.cwd()
    for folder in here.parents:
        if folder.name == ".dvc":
            return folder.parent
    return here


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or the repository's SQLite file."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root() / 'mlflow.db'}"


def artifact_root() -> str:
    """Where a local store keeps artifacts, as a file: URI (a path may hold spaces)."""
    return (root() / "mlartifacts").as_uri()


def server_command(host: str, port: int) -> list[str]:
    """Return the arguments after `python -m` of an MLflow server on the local store, which `server_environment` names.

    Clients write artifacts to the folder themselves, so runs made with and without the server can each be read both
    ways.
    """
    _follow_checkout()
    command = ["mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    return [*command, "--default-artifact-root", artifact_root(), "--no-serve-artifacts"]


def server_environment() -> dict[str, str]:
    """Return the variables of the server of `server_command`.

    The store is among them, since every user of a machine can read command lines.
    """
    return {**DEFAULTS, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_BACKEND_STORE_URI": tracking_uri()}


def without_credentials(uri: str) -> str:
    """Return a URI that may be printed and logged."""
    credentials = _credentials(uri)
    return uri.replace(credentials, "", 1) if credentials else uri


def _credentials(uri: str) -> str:
    """Return the part 'user:password@' of a server's URI, '' if there is none.

    It goes to the last '@' of all: a password whose '/' or '#' is not written as %2F or %23 seems to end the host's
    name.
    """
    scheme, _, rest = uri.partition("://")
    return rest[: rest.rfind("@") + 1] if scheme.partition("+")[0].lower() in _PORTS else ""


def connect() -> MlflowClient:
    """Return a client of the tracking server and registry; a local store is created on first use.

    Raises
    ------
    UserError
        The server does not answer within seconds, the local store cannot be opened, or this is no repository and a
        store of its own would be created for nothing.
    """
    uri = tracking_uri()
    if (
        not os.environ.get("MLFLOW_TRACKING_URI")
        and not (root() / "mlflow.db").exists()
        and not (root() / "params.yaml").exists()
    ):
        raise UserError(
            f"{root()}: neither mlflow.db nor params.yaml is here; "
            "run from the repository's folder, or set MLFLOW_TRACKING_URI"
        )
    require_server()
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    with mlflow_errors():
        import mlflow
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic", "urllib3.connectionpool"):  # retries too: the error at their end says it all
            logging.getLogger(name).setLevel(logging.ERROR)
        logging.getLogger("mlflow.store.db.utils").setLevel(
            logging.CRITICAL
        )  # a stack trace of the error that it raises as well
        _follow_checkout()
        if uri.startswith("sqlite:///"):
            _create_store(Path(uri.removeprefix("sqlite:///")))
        before = {name: os.environ.get(name) for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")}
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        for name, was in before.items():
            if was is None:  # MLflow also sets the variable, and a child in another repository would write here
                os.environ.pop(name, None)
        return MlflowClient(uri, uri)


def _follow_checkout() -> None:
    """Let the repository's own store look for artifacts where the repository is now."""
    if tracking_uri() == f"sqlite:///{root() / 'mlflow.db'}":
        repoint(root() / "mlflow.db", artifact_root())


def require_server() -> None:
    """Raise Unavailable if the tracking server does not answer within seconds."""
    _preflight(tracking_uri())


def local_store() -> bool:
    """Whether artifacts of new experiments go to this repository's folder."""
    return tracking_uri().startswith("sqlite:")


@contextlib.contextmanager
def mlflow_errors() -> Iterator[None]:
    """Raise what MLflow or its transport raises as one line that names the server.

    It is Unavailable unless MLflow says that the request is wrong.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        kinds = {f"{k.__module__.partition('.')[0]}.{k.__name__}" for k in type(e).__mro__}
        if kinds & {"mlflow.MlflowException", "requests.RequestException", "sqlalchemy.SQLAlchemyError"}:
            status = getattr(e, "get_http_status_code", lambda: 503)()
            error = Unavailable if status >= 500 else UserError
            # without its cause, whose text may hold the URI: Prefect logs the whole chain
            raise error(f"MLflow at {without_credentials(tracking_uri())}: {first_line(e)}") from None
        raise


def first_line(error: Exception) -> str:
    """Return the first line of an exception's text, without the tracking server's credentials."""
    text = str(error).strip().splitlines() or [type(error).__name__]
    credentials = _credentials(tracking_uri())
    return (text[0].replace(credentials, "") if credentials else text[0])[:300]


def _preflight(uri: str) -> None:
    """Raise Unavailable if nothing answers.

    Any HTTP status counts as an answer: what it means is for the client to find out.
    """
    parts = urlsplit(uri)
    scheme, shown = parts.scheme.partition("+")[0], without_credentials(uri)
    down = (
        f"MLflow at {shown} does not answer; "
        "start the server or correct MLFLOW_TRACKING_URI, then run the same command again"
    )
    try:
        port = parts.port
    except ValueError:  # its text would be the password's beginning
        raise UserError(
            f"MLFLOW_TRACKING_URI: {shown}: not an address; write / # ? of a password as %2F %23 %3F"
        ) from None
    if scheme in ("http", "https"):
        bare = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        try:
            urllib.request.urlopen(f"{bare.rstrip('/')}/health", timeout=WAIT).close()
        except urllib.error.HTTPError:
            return
        except (OSError, ValueError, http.client.HTTPException) as e:
            raise Unavailable(f"{down} ({getattr(e, 'reason', e)})") from None
    elif scheme in _PORTS and parts.hostname:
        try:
            socket.create_connection((parts.hostname, port or _PORTS[scheme]), timeout=WAIT).close()
        except OSError as e:
            raise Unavailable(f"{down} ({e})") from None
    elif scheme == "file" or not scheme:
        raise UserError(
            f"MLFLOW_TRACKING_URI: {shown}: MLflow no longer keeps runs in folders; "
            "use sqlite:///FILE or a server's address"
        )


def _create_store(path: Path) -> None:
    """Create the SQLite store under another name: one that was killed half-way could never be opened again."""
    if path.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        SqlAlchemyStore(f"sqlite:///{temporary}", artifact_root())._dispose_engine()
        try:
            os.link(temporary, path)  # unlike a rename, leaves alone what another process created meanwhile
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            os.replace(temporary, path)
    finally:
        for leftover in path.parent.glob(f"{temporary.name}*"):
            leftover.unlink(missing_ok=True)
