# SPDX-License-Identifier: Apache-2.0
"""The web application of `panda-ad serve`: requests in, bounded work, verdicts or one line out."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Lifespan

from panda_ad.system.cores import cores

if TYPE_CHECKING:
    from mlflow.pyfunc import PyFuncModel

MAX_BODY = 64 * 2**20
"""Bytes of a request."""
_DROPPED = 16 * MAX_BODY
MAX_WAITING = 32
"""Requests at a time, those that are computed among them."""
MAX_HELD = 4 * MAX_BODY
"""Bytes of all of them together."""
_AT_ONCE = 8
FORMATS = ("inputs", "instances", "dataframe_split", "dataframe_records")
_JSON = "application/json"
_SHOWN = 500  # characters of an error


@dataclass
class Serving:
    """What answers, and what has been counted since the start.

    Attributes
    ----------
    model : of the version in place.
    version : name and number.
    waiting, held : requests that are being answered, and their bytes.
    answers : responses by status.  seconds : spent on those of status 200.
    verdicts : images by decision (good, defect, error).
    """

    model: PyFuncModel
    version: str = ""
    waiting: int = 0
    held: int = 0
    answers: Counter[int] = field(default_factory=Counter)
    seconds: float = 0.0
    verdicts: Counter[str] = field(default_factory=Counter)
    _turn: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(min(cores(), _AT_ONCE)), repr=False)

    async def ping(self, _: Request) -> Response:
        """Say that the server is there."""
        return Response("\n", media_type=_JSON)

    async def metrics(self, _: Request) -> Response:
        """Return the counts in Prometheus' text format."""
        lines = [
            "# TYPE panda_requests_total counter",
            *(f'panda_requests_total{{status="{status}"}} {n}' for status, n in sorted(self.answers.items())),
            "# TYPE panda_verdicts_total counter",
            *(f'panda_verdicts_total{{decision="{decision}"}} {n}' for decision, n in sorted(self.verdicts.items())),
            "# TYPE panda_requests_waiting gauge",
            f"panda_requests_waiting {self.waiting}",
            "# TYPE panda_answer_seconds summary",
            f"panda_answer_seconds_sum {self.seconds:.6f}",
            f"panda_answer_seconds_count {self.answers[200]}",
            "# TYPE panda_version_info gauge",
            f"panda_version_info{{version={json.dumps(self.version)}}} 1",
        ]
        return Response("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    async def invoke(self, request: Request) -> Response:
        """Answer a request, and count it."""
        from mlflow.exceptions import MlflowException

        start = perf_counter()
        size = _announced(request)
        if self.waiting >= MAX_WAITING or self.held + size > MAX_HELD:
            await _body(request, most=0)
            response = refuse(429, f"{self.waiting} requests are being answered; try again in some seconds")
        else:
            self.waiting += 1
            self.held += size
            try:
                response = await self._answer(request)
            except MlflowException as e:
                response = refuse(e.get_http_status_code(), reason(e.message))
            finally:
                self.waiting -= 1
                self.held -= size
        self.answers[response.status_code] += 1
        self.seconds += (perf_counter() - start) * (response.status_code == 200)
        return response

    async def _answer(self, request: Request) -> Response:
        body = await _body(request, MAX_BODY)
        if body is None:
            return refuse(413, f"more than {MAX_BODY // 2**20} MiB; send fewer images in one request")
        content = request.headers.get("content-type", _JSON)
        if content.partition(";")[0].strip().lower() != _JSON:
            return refuse(415, f"content type {content}: {_JSON} is expected")
        if wrong := _mistake(body, {p.name for p in self.model.metadata.get_params_schema().params}):
            return refuse(400, wrong)
        async with self._turn:
            if await request.is_disconnected():
                return refuse(499, "the client is gone")
            status, text, verdicts = await asyncio.to_thread(_judge, body, self.model)
        self.verdicts += verdicts
        return Response(text, status, media_type=_JSON)


def _judge(body: bytes, model: PyFuncModel) -> tuple[int, str, Counter[str]]:
    """Return status and text of an answer, and its images by decision; one version judges all of a request."""
    from mlflow.pyfunc.scoring_server import invocations

    result = invocations(body, _JSON, model, model.metadata.get_input_schema())
    rows = json.loads(result.response)["predictions"] if result.status == 200 else []
    return result.status, result.response, Counter(row["decision"] for row in rows)


def application(serving: Serving, lifespan: Lifespan[Starlette] | None = None) -> Starlette:
    """Return the web application: GET /ping, /health and /metrics, POST /invocations."""
    from mlflow.pyfunc.scoring_server import init

    init(serving.model)  # MLflow's preparations for serving
    routes = [Route("/ping", serving.ping), Route("/health", serving.ping), Route("/metrics", serving.metrics)]
    return Starlette(routes=[*routes, Route("/invocations", serving.invoke, methods=["POST"])], lifespan=lifespan)


def refuse(status: int, text: str) -> Response:
    """Return an error of one line."""
    body = json.dumps({"error_code": status, "message": " ".join(text.split())[:_SHOWN]})
    return Response(body, status, {"Retry-After": "5"} if status == 429 else None, _JSON)


def _announced(request: Request) -> int:
    """Return the bytes of a request's body, as its header has it; the most where it does not say."""
    length = request.headers.get("content-length", "")
    return min(int(length), MAX_BODY) if length.isdecimal() else MAX_BODY


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


def reason(message: str) -> str:
    """Return the end of an MLflow error, which has the request before it, as one line."""
    return " ".join(message.rpartition("Error: ")[2].split())
