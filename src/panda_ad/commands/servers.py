"""`make ui`: MLflow and Prefect servers with a worker, on this machine, until Ctrl-C."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from panda_ad.errors import UserError
from panda_ad.registry.connection import server_command, server_environment, without_credentials
from panda_ad.system.processes import Group, child_environment

HOST = "127.0.0.1"
HOME = Path(".prefect")
POOL = "panda"
READY_SECONDS = 180.0

QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GX_ANALYTICS_ENABLED": "false",
}

FORGETTING = "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED"
"""Left to itself, Prefect's server keeps every flow run with its log for ever; this one, unless told otherwise, for Prefect's 90 days."""


@dataclass(frozen=True)
class Addresses:
    """Where the servers answer, e.g. http://127.0.0.1:5000."""

    mlflow: str
    prefect: str


def serve_ui(mlflow_port: int = 5000, prefect_port: int = 4200, say: Callable[[str], None] = print) -> None:
    """Run the servers until Ctrl-C or SIGTERM, then end them and everything they started.

    Parameters
    ----------
    mlflow_port, prefect_port : TCP ports on 127.0.0.1; 0 takes any free one.
    say : called with each line for the user.

    Raises
    ------
    UserError
        A port is taken, or a server does not start or ends; names its log.
    """
    with _sigterm_as_interrupt(), running_servers(mlflow_port, prefect_port, say) as (addresses, groups):
        say(f"MLflow   {without_credentials(addresses.mlflow)}")
        say(
            f"Prefect  {without_credentials(addresses.prefect)}/deployments   (press Run on 'retrain'; switch its schedule on there)"
        )
        say("Ctrl-C stops both.")
        try:
            while True:
                for name, group in groups.items():
                    if not group.running:
                        raise UserError(f"{name} ended (exit status {group.wait()}); see {_log(name)}")
                time.sleep(1)
        except KeyboardInterrupt:
            say("stopping")


@contextmanager
def running_servers(
    mlflow_port: int = 0, prefect_port: int = 0, say: Callable[[str], None] = print
) -> Iterator[tuple[Addresses, dict[str, Group]]]:
    """MLflow, Prefect with its deployments, and a worker; all ended on leaving.

    A server elsewhere, named by MLFLOW_TRACKING_URI or PREFECT_API_URL (http...), is used and not started.
    """
    mlflow, prefect = _remote("MLFLOW_TRACKING_URI"), _remote("PREFECT_API_URL")
    home = HOME.absolute()
    home.mkdir(exist_ok=True)
    env = child_environment({**QUIET, "PREFECT_HOME": str(home)})
    groups: dict[str, Group] = {}
    with ExitStack() as stack:

        def start(name: str, command: list[str], extra: dict[str, str]) -> None:
            log = stack.enter_context(open(_log(name), "wb"))
            groups[name] = Group([sys.executable, "-m", *command], env={**env, **extra}, output=log)

        # One callback for all: a stop takes seconds, and the worker must go before the servers it reports to.
        stack.callback(lambda: [group.stop(grace=10) for group in reversed(groups.values())])
        if mlflow is None:
            port = _free_port(mlflow_port, "--mlflow-port")
            mlflow = f"http://{HOST}:{port}"
            start("mlflow", server_command(HOST, port), server_environment())
        if prefect is None:
            port = _free_port(prefect_port, "--prefect-port")
            prefect = f"http://{HOST}:{port}"
            start(
                "prefect",
                ["prefect", "server", "start", "--host", HOST, "--port", str(port)],
                {
                    "PREFECT_SERVER_UI_API_URL": f"{prefect}/api",
                    FORGETTING: os.environ.get(FORGETTING, "events,flow_runs"),
                },
            )
        addresses = Addresses(mlflow=mlflow, prefect=prefect.removesuffix("/api"))
        env |= {
            "PREFECT_API_URL": f"{addresses.prefect}/api",
            "MLFLOW_TRACKING_URI": mlflow,
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
            "PREFECT_WORKER_QUERY_SECONDS": "3",  # of the UI's Run button until something happens
        }
        if "prefect" in groups:
            _await(groups["prefect"], "prefect", f"{addresses.prefect}/api/health")
        start("deploy", ["flows.deploy"], {})
        deploy = groups.pop("deploy")
        with deploy:
            if deploy.wait():
                raise UserError(f"deployments could not be registered: {_last_line('deploy')}")
        start("worker", ["prefect", "worker", "start", "--pool", POOL, "--type", "process"], {})
        if "mlflow" in groups:
            _await(groups["mlflow"], "mlflow", f"{mlflow}/health")
        yield addresses, groups


def _remote(variable: str) -> str | None:
    address = os.environ.get(variable, "")
    return address.rstrip("/") if urlsplit(address).scheme in ("http", "https") else None


def _free_port(port: int, option: str) -> int:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((HOST, port))
        except OSError as e:
            raise UserError(
                f"port {port} on {HOST} cannot be used ({e.strerror}); choose another with {option}, or 0 for any free one"
            ) from None
        return int(s.getsockname()[1])


def _log(name: str) -> Path:
    return HOME / f"{name}.log"


def _last_line(name: str) -> str:
    lines = _log(name).read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), f"see {_log(name)}")


def _await(group: Group, name: str, address: str) -> None:
    limit = time.monotonic() + READY_SECONDS
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < limit:
        if not group.running:
            raise UserError(f"{name} server did not start: {_last_line(name)} ({_log(name)})")
        try:
            with opener.open(address, timeout=5) as response:
                if response.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise UserError(f"{name} server does not answer after {READY_SECONDS:.0f} s; see {_log(name)}")


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
