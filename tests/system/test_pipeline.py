# SPDX-License-Identifier: Apache-2.0
"""dvc.yaml as DVC runs it."""

import ast
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


def _foundation() -> tuple[str, ...]:
    """The layers below the method's: they move files and read parameters, which each stage declares one by one."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = [name for layer in contracts[0]["layers"] for name in layer.split(" | ")]
    return tuple(layers[layers.index("panda_ad.features") + 1 :])


def _imports(path: Path) -> set[Path]:
    """Files of the package that a module imports anywhere, but for types."""
    names: set[str] = set()
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        todo += ast.iter_child_nodes(node)
    names = {name for name in names if name.startswith("panda_ad.") and not name.startswith(_foundation())}
    files = ((ROOT / "src" / name.replace(".", "/")).with_suffix(".py") for name in names)
    return {file for file in files if file.is_file()}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_the_code_that_it_runs(stage):
    """Or a correction there would leave its old results in place; and on no folder of which it runs nothing."""
    declared = {ROOT / path for path in STAGES[stage]["deps"] if path.startswith("src/")}
    used: set[Path] = set()
    todo = [ROOT / "src" / "panda_ad" / "stages" / f"{stage}.py"]
    while todo:
        file = todo.pop()
        if file not in used:
            used.add(file)
            todo += _imports(file)
    assert len(used) > 3
    reached = {file: {path for path in declared if file == path or path in file.parents} for file in used}
    assert not [str(file.relative_to(ROOT)) for file, by in reached.items() if not by]
    assert declared == {path for by in reached.values() for path in by}


def test_code_dependencies_can_be_read_in_a_minute():
    assert (ROOT / "dvc.yaml").read_text(encoding="utf-8").count("- src/") < 6 * len(STAGES)


def test_what_python_writes_beside_the_code_runs_no_stage_again(tmp_path):
    """A stage depends on folders of the package, of which it imports a part, and a later stage another: their `__pycache__` fills up."""
    shutil.copy(ROOT / ".dvcignore", tmp_path)
    (tmp_path / "parts").mkdir()
    for name in ("__init__", "one", "other"):
        (tmp_path / "parts" / f"{name}.py").touch()
    python = shlex.quote(sys.executable)
    first = {"cmd": f"{python} -c 'import parts.one' && echo 1 > first", "deps": ["parts"], "outs": ["first"]}
    second = {
        "cmd": f"{python} -c 'import parts.other' && echo 2 > second",
        "deps": ["first"],
        "outs": ["second"],
    }
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"first": first, "second": second}}), encoding="utf-8")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {
        "DVC_NO_ANALYTICS": "1",
        "PYTHONPATH": str(tmp_path),
    }

    def run(*command: str) -> str:
        return subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True, text=True).stdout

    run("git", "init", "-q")
    run(sys.executable, "-m", "dvc", "init", "-q")
    assert "Running stage" in run(sys.executable, "-m", "dvc", "repro")
    assert len(list((tmp_path / "parts").glob("__pycache__/*.pyc"))) == 3
    assert "Running stage" not in run(sys.executable, "-m", "dvc", "repro")
