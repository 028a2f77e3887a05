# SPDX-License-Identifier: Apache-2.0
"""`panda-ad serve`: a registered model over REST, in MLflow's request format, with bounded work and errors of one line.

MLflow's own server answers a mistake with the whole request, ignores parameters that it does not know, and goes on
computing after a client has given up. This one refuses early: a body that is too large (413), a request that is none
or has unknown parameters (400), and more requests at a time than it can answer (429).

Started with an alias, it follows that: a new version is loaded beside the one in place, which answers until then.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import TYPE_CHECKING

from panda_ad.errors import UserError
from panda_ad.registry.connection import connect, mlflow_errors
from panda_ad.registry.versions import bundle_of, find_version, note_on, version_number

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from panda_ad.registry.serve_app import Serving

FOLLOW_SECONDS = 5.0
"""Between two looks at the alias."""


def serve(model: str, port: int, host: str = "127.0.0.1") -> None:
    """Serve a registered model until Ctrl-C. UserError if there is no such model or the port is taken."""
    import socket

    import uvicorn

    from panda_ad.registry.serve_app import application

    serving = load(model)
    # by its protocol asyncio knows that it may send the parts of an answer at once, else each waits 40 ms for an echo
    with socket.socket(proto=socket.IPPROTO_TCP) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except OSError as e:
            raise UserError(f"--port {port}: {e.strerror}; choose another one") from None
        s.listen(128)  # who reads the address below may connect at once
        note = note_on(model)
        address = f"http://{host}:{s.getsockname()[1]}/invocations"
        print(f"{serving.version}{f' ({note})' if note else ''}: {address}", flush=True)
        app = application(serving, _following(serving, model) if "@" in model else None)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[s])


def load(model: str) -> Serving:
    """Load a registered version. UserError where there is none, or its files are gone."""
    from panda_ad.registry.serve_app import Serving

    with mlflow_errors():
        import mlflow.pyfunc

        client = connect()
        version = find_version(client, model)
        bundle_of(client, version)  # files that are gone are said in a line
        loaded = mlflow.pyfunc.load_model(f"models:/{version.name}/{version.version}")
    return Serving(loaded, f"{version.name} version {version.version}")


async def _follow(serving: Serving, model: str, say: Callable[[str], None]) -> None:
    """Let the version that an alias names answer, whenever it changes; where that fails, the one in place goes on."""
    problem = ""
    while True:
        await asyncio.sleep(FOLLOW_SECONDS)
        try:
            number = await asyncio.to_thread(version_number, model)
            if number != serving.version.rpartition(" ")[2]:
                new = await asyncio.to_thread(load, model)
                serving.model, serving.version = new.model, new.version
                say(f"{new.version} answers from now on")
            problem = ""
        except Exception as e:  # whatever is wrong with a registry or a new version, the old one serves
            if str(e) != problem:
                problem = str(e)
                say(f"{serving.version} goes on: {' '.join(problem.split())[:300]}")


def _following(serving: Serving, model: str) -> Callable[[Starlette], AbstractAsyncContextManager[None]]:
    """Return what follows an alias while a web application runs."""

    @asynccontextmanager
    async def following(_: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(_follow(serving, model, lambda line: print(line, flush=True)))
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    return following
