# SPDX-License-Identifier: Apache-2.0
"""Where a run comes from: git commit, DVC experiment, Prefect run, user."""

from __future__ import annotations

import getpass
import os
import subprocess
from urllib.parse import urlsplit

INPUTS = ("params.yaml", "dvc.yaml", "data.dvc", "requirements.lock", "src")
"""Files and folders that a commit must hold as they are, for its hash to say what a run was made from."""


def provenance() -> dict[str, str]:
    """Return tags that say where a run comes from.

    They are the git commit, whether inputs differ from it, the DVC experiment, the Prefect run and the user.
    """
    tags = {"mlflow.user": user(), "mlflow.source.name": "dvc.yaml", "mlflow.source.type": "PROJECT"}
    if commit := git("rev-parse", "HEAD"):
        tags["mlflow.source.git.commit"] = commit
        tags["panda.git_dirty"] = str(bool(git("status", "--porcelain", "--", *INPUTS))).lower()
    if branch := git("rev-parse", "--abbrev-ref", "HEAD"):
        tags["mlflow.source.git.branch"] = branch
    if experiment := os.environ.get("DVC_EXP_NAME"):
        tags["panda.dvc_experiment"] = experiment
    if run := prefect_run():
        tags["panda.prefect_run"] = run
        api = urlsplit(os.environ.get("PREFECT_API_URL", ""))
        if api.scheme in ("http", "https"):
            server = f"{api.scheme}://{api.netloc.rpartition('@')[2]}{api.path.rstrip('/').removesuffix('/api')}"
            tags["panda.prefect_url"] = f"{server}/runs/flow-run/{run}"
    return tags


def git(*arguments: str) -> str:
    """Return the output of a git command in the working directory; '' if it fails (no repository, no git)."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=20, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def prefect_run() -> str:
    """Return the id of the Prefect flow run this process works for; '' if none."""
    return os.environ.get("PANDA_PREFECT_RUN") or os.environ.get("PREFECT__FLOW_RUN_ID") or ""


def user() -> str:
    """Return the login name, or the numeric id where the machine has no name for it (containers)."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"
