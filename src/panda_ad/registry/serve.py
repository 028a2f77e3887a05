# SPDX-License-Identifier: Apache-2.0
"""`panda-ad serve`: a registered model over REST, in MLflow's request format, with bounded work and errors of one line.

MLflow's own server answers a mistake with the whole request, ignores parameters that it does not know, and goes on
computing after a client has given up. This one refuses early: a body that is too large (413), a request that is none
or has unknown parameters (400), and more requests at a time than it can answer (429).
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

from panda_ad.errors import UserError
from panda_ad.registry.connection import connect, mlflow_errors
from panda_ad.registry.versions import bundle_of, find_version, note_on

if TYPE_CHECKING:
    from mlflow.pyfunc import PyFuncModel
    from starlette.applications import Starlette
    from starlette.requests import Request

MAX_BODY = 64 * 2**20
"""Bytes of a request."""
_DROPPED = 16 * MAX_BODY
MAX_WAITING = 4
"""Requests at a time, the one that is computed among them."""
FORMATS = ("inputs", "instances", "dataframe_split", "dataframe_records")
_JSON = "application/json"
_SHOWN = 500  # characters of an error


def serve(model: str, port: int, host: str = "127.0.0.1") -> None:
    """Serve a registered model until Ctrl-C. UserError if there is no such model or the port is taken."""
    import socket

    import uvicorn

    with mlflow_errors():
        import mlflow.pyfunc

        client = connect()
        version = find_version(client, model)
        bundle_of(client, version)  # files that are gone are said in a line
        loaded = mlflow.pyfunc.load_model(f"models:/{version.name}/{version.version}")
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except OSError as e:
            raise UserError(f"--port {port}: {e.strerror}; choose another one") from None
        port = s.getsockname()[1]
    note = note_on(model)
    print(
        f"{version.name} version {version.version}{f' ({note})' if note else ''}: http://{host}:{port}/invocations",
        flush=True,
    )
    uvicorn.run(application(loaded), host=host, port=port, log_level="warning")


def application(model: PyFuncModel) -> Starlette:
    """Return the web application: GET /ping, GET /health, POST /invocations."""
    from mlflow.exceptions import MlflowException
    from mlflow.pyfunc.scoring_server import init, invocations
    from starlette.applications import Starlette
    from starlette.responses import Response
    from starlette.routing import Route

    init(model)  # MLflow's preparations for serving
    turn = asyncio.Semaphore(1)
    schema, known = model.metadata.get_input_schema(), {p.name for p in model.metadata.get_params_schema().params}
    waiting = 0

    def refuse(status: int, text: str) -> Response:
        body = json.dumps({"error_code": status, "message": " ".join(text.split())[:_SHOWN]})
        return Response(body, status, {"Retry-After": "5"} if status == 429 else None, "application/json")

    async def ping(_: Request) -> Response:
        return Response("\n", media_type="application/json")

    async def answer(request: Request) -> Response:
        nonlocal waiting
        if waiting >= MAX_WAITING:
            await _body(request, most=0)
            return refuse(429, f"{waiting} requests are being answered; try again in some seconds")
        waiting += 1
        try:
            body = await _body(request, MAX_BODY)
            if body is None:
                return refuse(413, f"more than {MAX_BODY // 2**20} MiB; send fewer images in one request")
            content = request.headers.get("content-type", _JSON)
            if content.partition(";")[0].strip().lower() != _JSON:
                return refuse(415, f"content type {content}: {_JSON} is expected")
            if wrong := _mistake(body, known):
                return refuse(400, wrong)
            async with turn:
                if await request.is_disconnected():
                    return refuse(499, "the client is gone")
                result = await asyncio.to_thread(invocations, body, _JSON, model, schema)
            return Response(result.response, result.status, media_type=_JSON)
        except MlflowException as e:
            return refuse(e.get_http_status_code(), _reason(e.message))
        finally:
            waiting -= 1

    pings = [Route(path, ping) for path in ("/ping", "/health")]
    return Starlette(routes=[*pings, Route("/invocations", answer, methods=["POST"])])


async def _body(request: Request, most: int) -> bytes | None:
    """Return a request's body; None if it is more than `most` bytes.

    What is too much is read and dropped, up to a limit: a client that is still sending would not see the answer.
    """
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size <= most:
            parts.append(part)
        else:
            parts.clear()
        if size > _DROPPED:
            break
    return b"".join(parts) if size <= most else None


def _mistake(body: bytes, known: set[str]) -> str:
    """Return what is wrong with a JSON request, '' if nothing is."""
    try:
        request = json.loads(body)
    except ValueError as e:
        return f"the body is no JSON ({e})"
    if not isinstance(request, dict) or len(found := [k for k in FORMATS if k in request]) != 1:
        return f"a JSON object with one of {', '.join(FORMATS)} is expected"
    if extra := sorted(set(request) - {*found, "params"}):
        return f"unknown: {', '.join(extra)}; there are {', '.join(FORMATS)} and params"
    params = request.get("params") or {}
    if not isinstance(params, dict):
        return "params: an object is expected"
    if extra := sorted(set(params) - known):
        return f"params: unknown: {', '.join(extra)}; there is {', '.join(sorted(known))}"
    return ""


def _reason(message: str) -> str:
    """Return the end of an MLflow error, which has the request before it, as one line."""
    return " ".join(message.rpartition("Error: ")[2].split())
