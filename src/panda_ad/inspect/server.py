# SPDX-License-Identifier: Apache-2.0
"""`panda-ad inspect`: the inspector's page on this machine, until Ctrl-C."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from panda_ad.data.listing import find_images
from panda_ad.errors import UserError
from panda_ad.inspect.access import TOKENS, Access, session_key
from panda_ad.inspect.app import create_app
from panda_ad.inspect.decisions import open_decisions
from panda_ad.inspect.models import Models
from panda_ad.inspect.scorer import Scorer
from panda_ad.inspect.site import Site
from panda_ad.params import Params
from panda_ad.params_file import load_params

HOSTS = "PANDA_INSPECT_HOSTS"
"""Environment variable: names, with commas, under which a reverse proxy or others address the page."""


def inspect(port: int, host: str, alias: str, category: str | None, folder: Path | None) -> None:
    """Serve the page until Ctrl-C.

    Parameters
    ----------
    port : 0 takes any free one.
    host : to listen on; other machines reach the page only where it is not loopback, which needs tokens.
    alias : which registered versions score.
    category, folder : images to score into the log first, in the background; None: none.

    Raises
    ------
    UserError
        The port is taken, the page would be open to everybody, or the database cannot be opened.
    """
    import uvicorn

    params, access = load_params(), Access.of_environment()
    check_open(host, access)
    with _socket(host, port) as listening:
        site = make_site(params, access, alias)
        if folder is not None:
            site.scorer.folder(*_files(params, category, folder))
        app = create_app(site, session_key(), [*_names(host)])
        shown = f"[{host}]" if ":" in host else host
        print(f"inspect  http://{shown}:{listening.getsockname()[1]}/   (Ctrl-C stops it)")
        config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, proxy_headers=False)
        uvicorn.Server(config).run(sockets=[listening])


def make_site(params: Params, access: Access, alias: str = "staging") -> Site:
    """Return a page's services; each category's model is loaded in the background, the first one first."""
    models = Models(params, alias)
    scorer = Scorer(models)
    site = Site(params, access, open_decisions(), models, scorer)
    scorer.refresh(params.categories[0])
    return site


def check_open(host: str, access: Access) -> None:
    """Raise UserError where other machines could decide or promote without a token."""
    if not _loopback(host) and "decide" not in access.tokens and "promote" not in access.tokens:
        raise UserError(
            f"--host {host}: other machines would reach the page; set {TOKENS['decide']} and {TOKENS['promote']} "
            "(and a TLS proxy before it), or leave --host at 127.0.0.1"
        )


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _names(host: str) -> Sequence[str]:
    """Return the names under which the page may be addressed."""
    more = [name.strip() for name in os.environ.get(HOSTS, "").split(",") if name.strip()]
    return [*{"127.0.0.1", "localhost", "[::1]", host, *more} - {"0.0.0.0", "::"}]


def _socket(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as e:
        listening.close()
        raise UserError(f"port {port} on {host} cannot be used ({e.strerror}); --port 0 takes any free one") from None
    return listening


def _files(params: Params, category: str | None, folder: Path) -> tuple[str, list[Path]]:
    if category is None or category not in params.categories:
        raise UserError(f"--folder: say what it shows with --category, one of {', '.join(params.categories)}")
    if not folder.is_dir():
        raise UserError(f"--folder: no folder {folder}")
    return category, list(find_images([folder]).images)
