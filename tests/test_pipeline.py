"""dvc.yaml as DVC runs it."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent


_PLUMBING = {f"src/panda_ad/{name}.py" for name in ("__init__", "changed_params", "errors", "files", "lock", "params", "processes")}
"""What moves files, and the parameters, which each stage declares one by one."""
_DECIDED = {f"src/panda_ad/data/{name}.py" for name in ("__init__", "layouts", "manifest", "records", "torchvision_sets")}
"""What has its say in `validate`: the manifest."""


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
    files = (ROOT / "src" / name.replace(".", "/") for name in names if name.split(".")[0] == "panda_ad")
    return {file for stem in files for file in (stem.with_suffix(".py"), stem / "__init__.py") if file.is_file()}


@pytest.mark.parametrize("stage", ["extract", "adapt", "index", "evaluate"])
def test_a_stage_depends_on_the_code_that_it_runs(stage):
    """Or a correction there would leave its old results in place."""
    declared = [ROOT / path for path in yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"][stage]["deps"]]
    used, todo = set(), [ROOT / "src" / "panda_ad" / "stages" / f"{stage}.py"]
    while todo:
        file = todo.pop()
        if file not in used:
            used.add(file)
            todo += _imports(file)
    used = {file for file in used if str(file.relative_to(ROOT)) not in _PLUMBING | _DECIDED}
    assert len(used) > 5
    assert not {file for file in used if not any(file == path or path in file.parents for path in declared)}


def test_what_python_writes_beside_the_code_runs_no_stage_again(tmp_path):
    """A stage depends on folders of the package, of which it imports a part, and a later stage another: their `__pycache__` fills up."""
    shutil.copy(ROOT / ".dvcignore", tmp_path)
    (tmp_path / "parts").mkdir()
    for name in ("__init__", "one", "other"):
        (tmp_path / "parts" / f"{name}.py").touch()
    first = {"cmd": f"{sys.executable} -c 'import parts.one' && echo 1 > first", "deps": ["parts"], "outs": ["first"]}
    second = {"cmd": f"{sys.executable} -c 'import parts.other' && echo 2 > second", "deps": ["first"], "outs": ["second"]}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"first": first, "second": second}}), encoding="utf-8")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {"DVC_NO_ANALYTICS": "1", "PYTHONPATH": str(tmp_path)}

    def run(*command: str) -> str:
        return subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True, text=True).stdout

    run("git", "init", "-q")
    run(sys.executable, "-m", "dvc", "init", "-q")
    assert "Running stage" in run(sys.executable, "-m", "dvc", "repro")
    assert len(list((tmp_path / "parts").glob("__pycache__/*.pyc"))) == 3
    assert "Running stage" not in run(sys.executable, "-m", "dvc", "repro")
