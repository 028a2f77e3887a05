"""A small DVC project with this repository's flows, for the tests of the Prefect side: real stages, a second each."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BIN = str(Path(sys.executable).parent)

# Stages look at files that DVC does not know of, so that a test can make one slow or fail.
DVC_YAML = """
stages:
  validate:
    cmd: mkdir -p build && cat data/images > build/manifest && echo validated
    deps: [data]
    outs: [build/manifest]
  adapt:
    matrix: {category: [fabric, grid]}
    cmd:
      - if [ -e slow ]; then echo waiting; sleep 98765; fi
      - if [ -e paused ]; then echo paused; while [ -e paused ]; do sleep 0.5; done; fi
      - cat build/manifest > build/adapt-${item.category}
      - echo ${adapt.method} ${adapt.epochs} >> build/adapt-${item.category}
      - echo "adapted ${item.category}"
    params: [adapt.method, adapt.epochs]
    deps: [build/manifest]
    outs: ["build/adapt-${item.category}"]
  publish:
    matrix: {category: [fabric, grid]}
    cmd:
      - echo once >> attempts-${item.category}
      - if [ -e down-once-${item.category} ]; then rm down-once-${item.category}; echo no server; exit 9; fi
      - if [ -e down-${item.category} ]; then echo no server; exit 9; fi
      - mkdir -p build/publish && echo "{\\"prefect_run\\":\\"$PANDA_PREFECT_RUN\\"}" > build/publish/${item.category}.json
    meta: {retries: 1}
    deps: ["build/adapt-${item.category}"]
    outs: ["build/publish/${item.category}.json": {cache: false}]
"""


def clean_environment() -> dict[str, str]:
    """The environment without servers, locks and settings of whoever runs the tests."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "PANDA_", "DVC_"))}
    return kept | {"PATH": os.pathsep.join([BIN, kept.get("PATH", os.defpath)]), "DVC_NO_ANALYTICS": "1", "DO_NOT_TRACK": "true"}


def call(*command: str, cwd: Path, check: bool = True) -> str:
    """Run a command to its end; stdout and stderr together."""
    result = subprocess.run(
        command, cwd=cwd, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert not check or result.returncode == 0, result.stdout
    return result.stdout


def make_project(folder: Path) -> Path:
    """A git and DVC repository in `folder`, committed, nothing run yet."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT / "flows", folder / "flows", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("prefect.yaml", "params.yaml"):
        shutil.copy(ROOT / name, folder / name)
    params = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(re.sub(r"(?m)^categories:.*", "categories: [fabric, grid]", params))
    (folder / "dvc.yaml").write_text(DVC_YAML)
    (folder / "data").mkdir()
    (folder / "data/images").write_text("one\n")
    ignored = ["/data", "/build", "/.cache", "/.prefect", "/slow", "/paused", "/down-*", "/attempts-*", "__pycache__"]
    (folder / ".gitignore").write_text("\n".join(ignored) + "\n")
    call("git", "init", "-q", cwd=folder)
    call("git", "config", "user.email", "test@example.org", cwd=folder)
    call("git", "config", "user.name", "test", cwd=folder)
    call("dvc", "init", "-q", cwd=folder)
    call("dvc", "config", "core.analytics", "false", cwd=folder)
    call("dvc", "add", "-q", "data", cwd=folder)
    call("git", "add", "-A", cwd=folder)
    call("git", "commit", "-q", "-m", "A project", cwd=folder)
    return folder


def new_data(project: Path, text: str) -> None:
    """Change the data, so that every stage has work."""
    (project / "data/images").write_text(text + "\n")
    call("dvc", "add", "-q", "data", cwd=project)
