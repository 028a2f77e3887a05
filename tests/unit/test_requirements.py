# SPDX-License-Identifier: Apache-2.0
"""The locked environment: its versions fit each other, are the ones these tests run with, and are those that the docs name."""

from __future__ import annotations

import re
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]

PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(r"(?m)^([\w.-]+)==([^\s;]+)", (ROOT / "requirements.lock").read_text())
}
INSTALLED = {canonicalize_name(found.metadata["Name"]): found for found in distributions()}


def test_these_tests_run_with_the_locked_versions():
    other = {
        name: (pin, INSTALLED[name].version if name in INSTALLED else "missing")
        for name, pin in PINS.items()
        if name not in INSTALLED or INSTALLED[name].version != pin
    }
    assert other == {}, "locked and installed differ: run `make`"


def test_every_package_gets_what_it_asks_for():
    """Each package's own stated bounds, ours among them, with the extras that are asked for."""
    extras: dict[str, set[str]] = {"panda-ad": {"dev"}}
    done: set[tuple[str, str]] = set()
    problems = []
    while left := [(n, e) for n in sorted(INSTALLED) for e in ("", *sorted(extras.get(n, ()))) if (n, e) not in done]:
        for name, extra in left:
            done.add((name, extra))
            for text in INSTALLED[name].requires or []:
                wanted = Requirement(text)
                if wanted.marker and not wanted.marker.evaluate({"extra": extra}):
                    continue
                other = canonicalize_name(wanted.name)
                extras.setdefault(other, set()).update(wanted.extras)
                pin = PINS.get(other) or (INSTALLED[other].version if other == "panda-ad" else None)
                if name in {*PINS, "panda-ad"} and (
                    pin is None or not wanted.specifier.contains(pin, prereleases=True)
                ):
                    problems.append(f"{name} asks for {text}, locked is {pin}")
    assert problems == []


def test_the_docs_name_the_versions_that_were_tested_together():
    page = (ROOT / "docs/operation.md").read_text()
    table = page.partition("## Versions tested together")[2].partition("\n## ")[0]
    named = dict(re.findall(r"(?m)^\| ([\w-]+) \| ([\d.]+) \|", table))
    packages = (
        "dvc",
        "faiss-cpu",
        "fastapi",
        "great-expectations",
        "mlflow",
        "onnxruntime",
        "prefect",
        "sqlalchemy",
        "torch",
    )
    assert named == {name: PINS[name] for name in packages}
