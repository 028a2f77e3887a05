"""dvc.yaml as DVC runs it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent


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
