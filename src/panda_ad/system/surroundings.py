# SPDX-License-Identifier: Apache-2.0
"""What the libraries should find around them: telemetry off, a user's name, git or word that there is none."""

from __future__ import annotations

import configparser
import os
import pwd
import sys
from collections.abc import MutableMapping
from pathlib import Path

from panda_ad.system.files import renamed_file

QUIET = {
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
}
"""Environment variables with which nothing is reported to the makers of the libraries."""

_LOCAL = Path(".dvc/config.local")


def prepare() -> None:
    """Set up this process and the repository in the working directory, before the libraries are imported."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    name_user(os.environ)
    if Path(".dvc").is_dir():
        work_without_git()


def name_user(environment: MutableMapping[str, str]) -> None:
    """Name a user whom the system does not know (OpenShift, `docker run --user`): DVC asks for the name and for a home.

    The name is e.g. `user12345`. The home, where none is set or it may not be written to, is `.cache/home`.
    """
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        environment.setdefault("LOGNAME", f"user{os.getuid()}")
        if environment.get("HOME", "/") == "/" or not os.access(environment["HOME"], os.W_OK):
            home = Path(".cache/home").absolute()
            home.mkdir(parents=True, exist_ok=True)
            environment["HOME"] = str(home)


def work_without_git() -> None:
    """Let DVC work without `.git` (an unpacked archive, a container's COPY), and stop that once there is one."""
    config = configparser.ConfigParser(strict=False, interpolation=None)
    config.read(_LOCAL, encoding="utf-8")
    off, git = config.getboolean("core", "no_scm", fallback=False), Path(".git").exists()
    if git == (not off):
        return
    if git:
        config.remove_option("core", "no_scm")
        said = "git is used again"
    else:
        config.read_dict({"core": {"no_scm": "true"}})
        said = "no .git here: DVC works without it, and models do not say from which commit they were made"
    with renamed_file(_LOCAL) as temporary, open(temporary, "w", encoding="utf-8") as file:
        config.write(file)
    print(f"panda-ad: {said} ({_LOCAL}: core.no_scm)", file=sys.stderr)
