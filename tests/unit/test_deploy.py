# SPDX-License-Identifier: Apache-2.0
"""deploy/: what images, units and pipelines call is what the command line knows, on the ports that the docs name."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import typer.main
import yaml

from panda_ad.cli import app

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
DOCKERFILE = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
CLI = typer.main.get_command(app)
LOOSE = re.compile(r"\$\{\w+(:\?[^}]*)?\}")


def targets() -> dict[str, list[str]]:
    """The Dockerfile's instructions by stage, those of its base stages first."""
    found: dict[str, list[str]] = {}
    for line in DOCKERFILE.splitlines():
        if line.startswith("FROM "):
            base, _, name = line.removeprefix("FROM ").partition(" AS ")
            found[name] = list(found.get(base, []))
        elif line and not line.startswith("#"):
            found[name].append(" ".join(line.split()))
    return found


def words_of(target: str, instruction: str) -> list[str]:
    """The last ENTRYPOINT or CMD of a stage, [] where it has none."""
    lines = [line for line in targets()[target] if line.startswith(f"{instruction} ")]
    return json.loads(lines[-1].removeprefix(f"{instruction} ")) if lines else []


def commands() -> dict[str, list[str]]:
    """Every command of compose, Dockerfile, units and CI templates, as words."""
    serve, worker = words_of("serve", "ENTRYPOINT"), words_of("worker", "CMD")
    found = {"Dockerfile serve": serve + words_of("serve", "CMD"), "Dockerfile worker": worker}
    for name, service in COMPOSE.items():
        if service.get("image") == "panda-ad-serve":
            found[f"compose {name}"] = serve + service["command"]
        elif service.get("image") == "panda-ad-worker":
            found[f"compose {name}"] = service.get("command", worker)
    for unit in UNITS:
        for key, line in re.findall(r"(?m)^(Exec\w+)=(.*)$", unit.read_text()):
            path, *arguments = shlex.split(line)
            assert path.startswith("/srv/panda-ad/.venv/bin/")
            found[f"{unit.name} {key}"] = [Path(path).name, *arguments]
    (job,) = yaml.safe_load((DEPLOY / "ci/github.yml").read_text())["jobs"].values()
    pipeline = yaml.safe_load((DEPLOY / "ci/gitlab-ci.yml").read_text())
    lines = [step["run"] for step in job["steps"] if "run" in step]
    lines += [
        line for part in ("test", "model") for key in ("script", "after_script") for line in pipeline[part].get(key, [])
    ]
    for number, line in enumerate(lines):
        path, *arguments = shlex.split(line)
        found[f"ci {number}: {line}"] = [Path(path).name, *arguments]
    return found


@pytest.mark.parametrize("words", [pytest.param(words, id=name) for name, words in commands().items()])
def test_each_command_is_known_with_its_options(words):
    program, *arguments = words
    if program == "panda-ad":
        name, *options = arguments
        CLI.commands[name].make_context(name, options)  # parses and checks, runs nothing
    elif program == "make":
        assert arguments
        for target in arguments:
            assert re.search(rf"(?m)^{target}:.*## ", (ROOT / "Makefile").read_text()), target
    elif program == "python" and arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]) is not None
    elif program == "python":
        assert (ROOT / arguments[0]).is_file()
    else:  # tests/system/test_deploy_servers.py starts these
        assert program in ("mlflow", "prefect", "true")


def test_an_option_that_the_command_line_does_not_know_would_be_found():
    with pytest.raises(Exception, match="--hots"):
        CLI.commands["serve"].make_context("serve", ["models:/a@staging", "--hots", "0.0.0.0"])


def test_ports_are_those_of_the_command_line_and_the_docs_and_open_on_loopback_alone():
    defaults = {p.name: p.default for name in ("ui", "serve") for p in CLI.commands[name].params}
    ports = {
        "mlflow": defaults["mlflow_port"], "prefect": defaults["prefect_port"],
        "serve": defaults["port"], "inspect": defaults["inspect_port"],
    }  # fmt: skip
    assert {name: service["ports"] for name, service in COMPOSE.items() if "ports" in service} == {
        name: [f"127.0.0.1:{port}:{port}"] for name, port in ports.items()
    }
    known = commands()
    for name, port in ports.items():
        assert str(port) in known[f"compose {name}"]
        if name != "inspect":
            assert str(port) in known[f"panda-{name}.service ExecStart"]
    page = (ROOT / "docs/deployment.md").read_text()
    assert {int(port) for port in re.findall(r"\| (\d{4}) \|", page)} == set(ports.values())


def test_images_run_as_nobody_in_particular_say_how_they_are_and_copy_what_there_is():
    for name in ("serve", "worker"):
        lines = targets()[name]
        assert [line for line in lines if line.startswith("USER ")][-1] == "USER 10001"
        assert any(line.startswith("HEALTHCHECK ") for line in lines)
    allowed = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    copied = [
        line.split()[1:-1]
        for lines in targets().values()
        for line in lines
        if line.startswith("COPY ") and "--from" not in line
    ]
    for source in {name for names in copied for name in names}:
        assert (ROOT / source).exists() and f"!{source}" in allowed


def test_secrets_come_from_the_environment_only():
    secret = re.compile(r"PASSWORD|SECRET|TOKEN|DECIDE|PROMOTE")
    for service in COMPOSE.values():
        for name, value in service.get("environment", {}).items():
            if secret.search(name):
                assert LOOSE.fullmatch(str(value)), name
            assert not re.search(r"://\w+:(?!\$)[^@]*@", str(value)), name
    assert not secret.search("".join(line for line in DOCKERFILE.splitlines() if line.startswith(("ENV", "ARG"))))
    example = dict(re.findall(r"(?m)^#?(\w+)=(.*)$", (DEPLOY / "env.example").read_text()))
    assert all(value == "" for name, value in example.items() if secret.search(name))
    asked = set(re.findall(r"\$\{(\w+)", (DEPLOY / "compose.yaml").read_text() + "".join(u.read_text() for u in UNITS)))
    assert asked <= set(example), "env.example names each variable that compose and units ask for"


def test_units_are_hardened_and_come_back():
    common = (DEPLOY / "systemd/panda-.service.d/common.conf").read_text()
    for line in (
        "User=panda",
        "NoNewPrivileges=yes",
        "ProtectSystem=strict",
        "Restart=always",
        "RestartMaxDelaySec=120",
    ):
        assert line in common.splitlines()
    assert [unit.name for unit in UNITS] == [
        f"panda-{n}.service" for n in ("mlflow", "prefect", "serve", "watch", "worker")
    ]
