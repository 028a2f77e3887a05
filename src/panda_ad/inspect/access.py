# SPDX-License-Identifier: Apache-2.0
"""Who may do what on the page, and what a request must bring along before it changes anything.

Roles are had by a token from the environment; without any token whoever reaches the page may do everything, and it is
served on loopback only. A change needs the session's token in its form and comes from the page itself (Origin).
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from starlette.requests import Request

from panda_ad.errors import UserError

ROLES = ("look", "decide", "promote")
"""Each may do what those before it may."""

TOKENS = {role: f"PANDA_INSPECT_{role.upper()}" for role in ROLES}
"""Environment variables with the roles' tokens."""

USER_HEADER = "PANDA_INSPECT_USER_HEADER"
"""Environment variable that names the header in which a reverse proxy says who it is; nobody else may set it."""

POLICY = (
    "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
FORM_BYTES = 16_384
UPLOAD_BYTES = 64 * 2**20
"""Most bytes of a form, and of an image that is dropped on the page."""

_KEY = Path(".cache/inspect.key")


class Refused(UserError):
    """A request that may not do what it asks. `status` is that of HTTP."""

    def __init__(self, text: str, status: int = 403) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True)
class Access:
    """How roles are had.

    Attributes
    ----------
    tokens : token by role; empty: no tokens, everybody has all roles.
    user_header : header with the name of the person, set by a reverse proxy; '' for none.
    """

    tokens: Mapping[str, str] = field(default_factory=dict, repr=False)
    user_header: str = ""

    @classmethod
    def of_environment(cls) -> Access:
        """Read it. UserError for a token that is too short to be one."""
        tokens = {role: value for role, name in TOKENS.items() if (value := os.environ.get(name, ""))}
        for role, value in tokens.items():
            if len(value) < 16:
                raise UserError(f"{TOKENS[role]}: a token has 16 characters or more")
        return cls(tokens, os.environ.get(USER_HEADER, ""))

    def role_of(self, token: str) -> str | None:
        """Return the highest role that a token gives; None if it is none."""
        given = token.encode()
        found = [role for role, value in self.tokens.items() if hmac.compare_digest(value.encode(), given)]
        return max(found, key=ROLES.index, default=None)

    def role(self, request: Request) -> str | None:
        """Return the role of a request's session; None: not even looking."""
        if not self.tokens:
            return ROLES[-1]
        grant = request.session.get("grant")
        held = [role for role, token in self.tokens.items() if grant == _mark(token)]
        return max(held, key=ROLES.index, default=None if "look" in self.tokens else "look")

    def sign_in(self, request: Request, token: str) -> bool:
        """Give the session what a token allows, as long as the environment has that token; False if it is none."""
        role = self.role_of(token)
        if role is not None:
            request.session["grant"] = _mark(token)
        return role is not None

    def who(self, request: Request) -> str:
        """Return the name of the person, '' where it is not known."""
        if self.user_header:
            return _name(request.headers.get(self.user_header, ""))
        return _name(str(request.session.get("who", "")))

    def require(self, request: Request, role: str) -> None:
        """Raise Refused where the session has not the role."""
        held = self.role(request)
        if held is None or ROLES.index(held) < ROLES.index(role):
            raise Refused(f"{role}: sign in with a token that allows it", 401 if held is None else 403)


def _mark(token: str) -> str:
    """Return what a session keeps of a token."""
    return hashlib.sha256(token.encode()).hexdigest()[:32]


def _name(text: str) -> str:
    text = " ".join(text.split())[:100]
    return text if text.isprintable() else ""


def csrf(request: Request) -> str:
    """Return the session's token for forms, made at first use."""
    token: Any = request.session.get("csrf")
    if not isinstance(token, str):
        token = request.session["csrf"] = secrets.token_urlsafe(24)
    return token


def check_origin(request: Request) -> None:
    """Raise Refused unless a request that changes something comes from this very site."""
    origin = request.headers.get("origin", "")
    if urlsplit(origin).netloc != request.headers.get("host", ""):
        raise Refused("the request comes from another page than this one")


def check_csrf(request: Request, token: str) -> None:
    """Raise Refused unless the token is the session's."""
    held = request.session.get("csrf")
    if not isinstance(held, str) or not hmac.compare_digest(held.encode(), token.encode()):
        raise Refused("the page is out of date or cookies are off; load it again")


async def body(request: Request, limit: int) -> bytes:
    """Return a request's body. Refused where it has more than `limit` bytes, as soon as that is known."""
    refusal = Refused(f"more than the {limit / 2**20:.3g} MiB that a request may hold", 413)
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise refusal
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise refusal
        parts.append(part)
    return b"".join(parts)


async def checked_form(request: Request) -> dict[str, str]:
    """Return a form's fields after all checks of what changes something. Refused."""
    check_origin(request)
    text = (await body(request, FORM_BYTES)).decode("utf-8", "replace")
    try:
        fields = parse_qs(text, keep_blank_values=True, max_num_fields=32)
    except ValueError:
        raise Refused("the form has too many fields", 400) from None
    form = {name: values[-1] for name, values in fields.items()}
    check_csrf(request, form.get("csrf", ""))
    return form


def session_key(path: Path = _KEY) -> str:
    """Return the key that signs session cookies, made at first use and readable by its owner alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    except FileExistsError:
        pass
    key = path.read_text(encoding="ascii").strip()
    if len(key) < 64:
        raise UserError(f"{path}: not a key; delete it, and sign in again")
    return key
