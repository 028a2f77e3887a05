# SPDX-License-Identifier: Apache-2.0
"""`make ui`: MLflow and Prefect servers with a worker and the inspector's page, on this machine, until Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from panda_ad.errors import Busy, UserError
from panda_ad.registry.connection import server_command, server_environment, without_credentials
from panda_ad.system.files import write_json
from panda_ad.system.processes import Group, child_environment
from panda_ad.system.surroundings import QUIET

HOST = "127.0.0.1"
HOME = Path(".prefect")
POOL = "panda"
READY_SECONDS = 180.0
SCHEDULE = "schedule: "
"""How `flows.deploy` begins its line on a deployment's schedule."""

FORGETTING = "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED"
"""Variable that names what Prefect's server deletes after its 90 days.

By default Prefect's server keeps every flow run with its log forever. This one deletes them unless the variable says
otherwise.
"""


@dataclass(frozen=True)
class Addresses:
    """Where the servers answer, e.g. http://127.0.0.1:5000; '' for the inspector's page where it was not asked for."""

    mlflow: str
    prefect: str
    inspect: str = ""


def serve_ui(
    mlflow_port: int = 5000, prefect_port: int = 4200, inspect_port: int = 5002, say: Callable[[str], None] = print
) -> None:
    """Run the servers until Ctrl-C or SIGTERM, then end them and everything they started.

    Parameters
    ----------
    mlflow_port, prefect_port, inspect_port : TCP ports on 127.0.0.1; 0 takes any free one.
    say : called with each line for the user.

    Raises
    ------
    Busy
        The servers of this checkout run already.
    UserError
        A port is taken, or a server does not start or ends; names its log.
    """
    servers = running_servers(mlflow_port, prefect_port, say, inspect_port)
    with _sigterm_as_interrupt(), servers as (addresses, groups):
        say(f"MLflow   {without_credentials(addresses.mlflow)}")
        say(f"Prefect  {without_credentials(addresses.prefect)}/deployments   (there: Run, and each schedule's switch)")
        say(f"Inspect  {addresses.inspect}   (decide, thresholds, versions)")
        say("Ctrl-C stops all.")
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
    mlflow_port: int = 0, prefect_port: int = 0, say: Callable[[str], None] = print, inspect_port: int | None = None
) -> Iterator[tuple[Addresses, dict[str, Group]]]:
    """Give the addresses and processes of MLflow, Prefect with its deployments, and a worker; end all on leaving.

    With a port for it, the inspector's page is one of them.
    A server elsewhere, named by MLFLOW_TRACKING_URI or PREFECT_API_URL (http...), is used and not started.
    """
    mlflow, prefect = _remote("MLFLOW_TRACKING_URI"), _remote("PREFECT_API_URL")
    groups: dict[str, Group] = {}
    began = time.monotonic()

    def ready(what: str) -> None:
        say(f"  {time.monotonic() - began:3.0f} s  {what}")

    with _only_one() as publish, ExitStack() as stack:

        def start(name: str, command: list[str], **extra: str) -> Group:
            log = stack.enter_context(open(_log(name), "wb"))
            groups[name] = Group([sys.executable, "-m", *command], env={**_environment(), **extra}, output=log)
            return groups[name]

        # One callback for all: a stop takes seconds, and the worker must go before the servers it reports to.
        stack.callback(lambda: [group.stop(grace=10) for group in reversed(groups.values())])
        say(f"starting (logs: {HOME}/*.log); ready in half a minute, longer on a busy machine")
        if mlflow is None:
            port = _free_port(mlflow_port, "--mlflow-port")
            mlflow = f"http://{HOST}:{port}"
            start("mlflow", server_command(HOST, port), **server_environment())
        new_server = ["--new-server"] if prefect is None else []
        if prefect is None:
            port = _free_port(prefect_port, "--prefect-port")
            prefect = f"http://{HOST}:{port}"
            server = start("prefect", ["flows.server", HOST, str(port)], **server_settings(prefect))
            _await(server, "prefect", f"{prefect}/api/health")
            ready("Prefect answers")
        addresses = Addresses(mlflow=mlflow, prefect=prefect.removesuffix("/api"))
        clients = _client_settings(addresses)
        with start("deploy", ["flows.deploy", *new_server], **clients) as deploy:
            if deploy.wait():
                raise UserError(f"deployments could not be registered: {_last_line('deploy')}")
        del groups["deploy"]
        ready("deployments registered; their schedules:")
        for line in _lines("deploy"):
            if line.startswith(SCHEDULE):
                say(f"         {line.removeprefix(SCHEDULE)}")
        start("worker", ["prefect", "worker", "start", "--pool", POOL, "--type", "process"], **clients)
        if "mlflow" in groups:
            _await(groups["mlflow"], "mlflow", f"{mlflow}/health")
            ready("MLflow answers")
        if inspect_port is not None:
            port = _free_port(inspect_port, "--inspect-port")
            addresses = replace(addresses, inspect=f"http://{HOST}:{port}")
            page = start("inspect", ["panda_ad.cli", "inspect", "--port", str(port)], MLFLOW_TRACKING_URI=mlflow)
            _await(page, "inspect", f"{addresses.inspect}/static/icon.svg")
            ready("the inspector's page answers")
        publish(addresses)
        yield addresses, groups


def _environment() -> dict[str, str]:
    """Return the environment that all of them share."""
    return child_environment({**QUIET, "PREFECT_HOME": str(HOME.absolute())})


def server_settings(address: str) -> dict[str, str]:
    """Return the settings, as environment variables, of a Prefect server at `address`."""
    return {
        "PREFECT_SERVER_UI_API_URL": f"{address}/api",
        FORGETTING: os.environ.get(FORGETTING, "events,flow_runs"),
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "10",  # of a schedule's switch until its runs are there
        # On disk: kept in memory, a restart of the server would lose them,
        # and Prefect cancels a run that cannot renew its own.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    }


def _client_settings(addresses: Addresses) -> dict[str, str]:
    """Return the settings of the worker and of what it runs."""
    return {
        "PREFECT_API_URL": f"{addresses.prefect}/api",
        "MLFLOW_TRACKING_URI": addresses.mlflow,
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "PREFECT_WORKER_QUERY_SECONDS": "3",  # of the UI's Run button until something happens
    }


@contextmanager
def _only_one() -> Iterator[Callable[[Addresses], None]]:
    """Hold this checkout's servers' lock; give what tells a second `ui` where they are.

    Raises
    ------
    Busy
        Another process holds it.
    """
    HOME.mkdir(exist_ok=True)
    known = HOME / "ui.json"
    lock = FileLock(HOME / "ui.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise Busy(_running_elsewhere(known)) from None
    holder: dict[str, object] = {"pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M")}
    try:
        write_json(known, holder)
        yield lambda addresses: write_json(
            known, holder | {name: without_credentials(value) for name, value in asdict(addresses).items()}
        )
    finally:
        known.unlink(missing_ok=True)
        lock.release()


def _running_elsewhere(known: Path) -> str:
    try:
        holder = json.loads(known.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it is just writing, or ending
        return f"another `ui` of this checkout holds {HOME}/ui.lock; wait until it has ended"
    where = f": MLflow {holder['mlflow']}, Prefect {holder['prefect']}/deployments" if "mlflow" in holder else ""
    return (
        f"`ui` of this checkout runs already (pid {holder['pid']}, since {holder['since']}){where}; "
        "use that, or stop it first"
    )


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
                f"port {port} on {HOST} cannot be used ({e.strerror}); "
                f"run `.venv/bin/panda-ad ui {option} 0` for any free one"
            ) from None
        return int(s.getsockname()[1])


def _log(name: str) -> Path:
    return HOME / f"{name}.log"


def _lines(name: str) -> list[str]:
    return _log(name).read_text(encoding="utf-8", errors="replace").split("\n")


def _last_line(name: str) -> str:
    return next((line.strip() for line in reversed(_lines(name)) if line.strip()), f"see {_log(name)}")


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
