# SPDX-License-Identifier: Apache-2.0
"""The page as an ASGI application: middleware, errors as one line, signing in; what it shows is in *_page.py."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Annotated
from urllib.parse import quote

import anyio.to_thread
from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.sessions import SessionMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response

from panda_ad.errors import Busy, Unavailable, UserError
from panda_ad.inspect import learn_page, queue_page, state_page, threshold_page
from panda_ad.inspect.access import POLICY, Refused, checked_form
from panda_ad.inspect.site import Site, asset, notify
from panda_ad.inspect.texts import LANGUAGES

HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with no-referrer browsers would not say where a form comes from
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_STATIC = {
    "style.css": "text/css",
    "queue.js": "text/javascript",
    "learn.js": "text/javascript",
    "threshold.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
_LOG = logging.getLogger("panda_ad.inspect")
Form = Annotated[dict[str, str], Depends(checked_form)]


def create_app(site: Site, key: str, hosts: Sequence[str]) -> FastAPI:
    """Return the application.

    Parameters
    ----------
    key : signs session cookies.
    hosts : names under which it may be addressed; a page elsewhere cannot reach it under another one.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await anyio.to_thread.run_sync(site.close)

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)

    app.add_middleware(
        SessionMiddleware, secret_key=key, session_cookie="panda_inspect", max_age=30 * 86400, same_site="strict"
    )

    @app.middleware("http")
    async def add_headers(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        if response.headers.get("cache-control", "").startswith("private") and "vary" in response.headers:
            del response.headers["vary"]  # each decision changes the cookie; a picture fetched in advance stays good
        return response

    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    _add_errors(app, site)
    _add_entrance(app, site)
    _add_people(app, site)
    for page in (queue_page, learn_page, threshold_page, state_page):
        app.include_router(page.routes(site))
    return app


def _add_errors(app: FastAPI, site: Site) -> None:
    def line(request: Request, message: str, status: int) -> Response:
        text = " ".join(message.split())
        if "text/html" in request.headers.get("accept", ""):
            return site.render(request, "error.html.j2", status, message=text, answer=status)
        return PlainTextResponse(text, status)

    @app.exception_handler(UserError)
    def user_error(request: Request, error: UserError) -> Response:
        status = error.status if isinstance(error, Refused) else 503 if isinstance(error, Busy | Unavailable) else 422
        return line(request, str(error), status)

    @app.exception_handler(OSError)
    def os_error(request: Request, error: OSError) -> Response:
        return line(request, f"{error.filename or 'disk'}: {error.strerror or type(error).__name__}", 503)

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, _: RequestValidationError) -> Response:
        return line(request, site.text(request)("page.not_found"), 404)

    @app.exception_handler(HTTPException)
    def not_found(request: Request, error: HTTPException) -> Response:
        said = site.text(request)("page.not_found") if error.status_code == 404 else str(error.detail)
        return line(request, said, error.status_code)

    @app.exception_handler(Exception)
    def failed(_: Request, error: Exception) -> Response:
        _LOG.error("inspect: %s", error, exc_info=error)
        return PlainTextResponse(f"{type(error).__name__}: a defect of this page; its log says more", 500)


def _add_entrance(app: FastAPI, site: Site) -> None:
    @app.get("/")
    def entrance(request: Request) -> Response:
        chosen = request.session.get("category")
        category = chosen if chosen in site.params.categories else site.params.categories[0]
        return RedirectResponse(f"/queue/{quote(category)}", 303)

    @app.get("/static/{name}")
    def static(name: str) -> Response:
        if name not in _STATIC:
            raise Refused("there is no such file", 404)
        kept = {"Cache-Control": "public, max-age=31536000, immutable"}
        return Response(asset(f"static/{name}"), media_type=_STATIC[name], headers=kept)


def _add_people(app: FastAPI, site: Site) -> None:
    @app.get("/me")
    def me(request: Request) -> HTMLResponse:
        return site.render(
            request, "me.html.j2", named_by_proxy=bool(site.access.user_header),
            wants_token=bool(site.access.tokens), signed_in="grant" in request.session,
        )  # fmt: skip

    @app.post("/me")
    async def sign_in(request: Request, form: Form) -> Response:
        if "who" in form:
            request.session["who"] = " ".join(form["who"].split())[:100]
        if (token := form.get("token", "")) and not site.access.sign_in(request, token):
            await anyio.sleep(1)  # for those who try many
            notify(request, site.text(request)("page.token_wrong"), "bad")
            return RedirectResponse("/me", 303)
        return RedirectResponse("/", 303)

    @app.post("/sign-out")
    def sign_out(request: Request, form: Form) -> Response:  # noqa: ARG001  the form is checked
        request.session.clear()
        return RedirectResponse("/me", 303)

    @app.post("/language")
    def choose_language(request: Request, form: Form) -> Response:
        if form.get("language") in LANGUAGES:
            request.session["language"] = form["language"]
        back = form.get("back", "")
        local = back.startswith("/") and not back.startswith(("//", "/\\"))
        return RedirectResponse(back if local else "/", 303)
