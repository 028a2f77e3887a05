# SPDX-License-Identifier: Apache-2.0
"""A real PostgreSQL of its own for the tests: a temporary folder, a free port on loopback, ended by its process id."""

from __future__ import annotations

import glob
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

USER = "panda"
FOLDERS = [os.environ.get("PATH", os.defpath), *sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True)]
"""Debian keeps the servers' programs outside PATH, by version."""


def program(name: str) -> str | None:
    """Path of one of PostgreSQL's programs, None where it is not installed."""
    return shutil.which(name, path=os.pathsep.join(FOLDERS))


class Postgres:
    """A running server. `address` and `create` speak of its databases."""

    def __init__(self, port: int, password: str) -> None:
        self.port, self.password = port, password

    def address(self, database: str, driver: str = "psycopg") -> str:
        return f"postgresql+{driver}://{USER}:{self.password}@127.0.0.1:{self.port}/{database}"

    def rows(self, statement: str, database: str = "postgres") -> list[tuple]:
        """What a statement gives, [] for one that gives nothing; each in a transaction of its own."""
        import psycopg

        address = self.address(database).replace("+psycopg", "")
        with psycopg.connect(address, autocommit=True, connect_timeout=5) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def create(self, database: str) -> str:
        """Create an empty database; its address."""
        self.rows(f'CREATE DATABASE "{database}"')
        return self.address(database)


@contextmanager
def running() -> Iterator[Postgres]:
    """Start a server with a password of its own; end it by its process id. It refuses to run as root."""
    import psycopg

    initdb, postgres = program("initdb"), program("postgres")
    assert initdb and postgres
    other = {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.geteuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(prefix="panda-postgres-"))  # pytest's own folders are closed to other users
    password = secrets.token_hex(8)
    (folder / "password").write_text(password)
    if other:
        shutil.chown(folder, "nobody", "nogroup")
        shutil.chown(folder / "password", "nobody", "nogroup")
    try:
        make = [initdb, "-D", "data", "-U", USER, "-A", "scram-sha-256", "--pwfile", "password", "--no-sync"]
        subprocess.run(make, cwd=folder, check=True, capture_output=True, **other)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        command = [
            postgres,
            "-D",
            str(folder / "data"),
            "-h",
            "127.0.0.1",
            "-p",
            str(port),
            "-k",
            "",
            "-c",
            "fsync=off",
        ]
        with (
            open(folder / "log", "wb") as log,
            subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, **other) as server,
        ):
            try:
                found, limit = Postgres(port, password), time.monotonic() + 60
                while True:
                    try:
                        found.rows("SELECT 1")
                        break
                    except psycopg.OperationalError:
                        running_still = server.poll() is None and time.monotonic() < limit
                        assert running_still, (folder / "log").read_text()[-2000:]
                        time.sleep(0.1)
                yield found
            finally:
                server.send_signal(2)  # SIGINT: 'fast', without waiting for clients
                server.wait(60)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
