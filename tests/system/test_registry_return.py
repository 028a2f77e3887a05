# SPDX-License-Identifier: Apache-2.0
"""Publishing a model that was published before: through DVC, after others, after a rollback."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from registry_project import NAME, ROOT, aliases, moves, retrained, write_json

from panda_ad.errors import GateRefused
from panda_ad.registry.connection import connect
from panda_ad.registry.promote import promote, rollback
from panda_ad.stages.publish import main as publish


def published():
    """The bundle and version that build/publish has."""
    found = json.loads(Path("build/publish/fabric.json").read_text())
    return found["bundle"], found["version"]


@pytest.mark.slow
def test_dvc_publishes_again_what_returns_to_an_earlier_state_and_nothing_twice(project):
    """A, B, A with the stage as dvc.yaml has it: DVC's run cache must not answer for the registry."""
    stage = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]["publish"]
    stage["deps"] = [d for d in stage["deps"] if not d.startswith("src/")]
    (project / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"publish": stage}}), encoding="utf-8")
    shutil.copy(ROOT / ".gitignore", project)
    (project / "dvc.lock").unlink()
    (project / "data.dvc").unlink()
    env = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "DVC_NO_ANALYTICS": "1",
    }

    def run(*command):
        return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout

    run("git", "init", "-q")
    run("dvc", "init", "-q")
    for weights in (b"A", b"B", b"A"):
        retrained(project, weights=weights)
        run("dvc", "repro")
        bundle, version = published()
        assert connect().get_model_version_by_alias(NAME, "challenger").tags["panda.bundle"] == bundle
        assert aliases()["challenger"] == version
    written = Path("build/publish/fabric.json").stat().st_mtime_ns
    assert "Running stage" not in run("dvc", "repro")
    assert Path("build/publish/fabric.json").stat().st_mtime_ns == written
    assert "build/publish" not in run("git", "status", "--porcelain", "--untracked-files=all")


def test_a_challenger_that_is_not_what_was_published_here_is_refused_in_one_line(project):
    publish("fabric")
    kept = Path("build/publish/fabric.json").read_text()
    promote()
    retrained(project)
    publish("fabric")
    Path("build/publish/fabric.json").write_text(kept)  # as another checkout that shares the registry has it
    with pytest.raises(
        GateRefused, match=r"version 2 not promoted .*build/publish/fabric\.json .*publish@fabric`"
    ) as error:
        promote()
    assert "\n" not in str(error.value)
    assert aliases() == {"challenger": 2, "staging": 1} and len(moves()) == 1
    assert json.loads(Path("build/decisions/fabric.json").read_text())["outcome"] == "refused"
    write_json(project / "build/publish/fabric.json", {"prefect_run": "says nothing of a bundle"})
    assert promote()[0].outcome == "promoted"


def test_a_model_that_returns_is_its_old_version_and_stays_held_back(project):
    for weights in (b"1", b"2"):
        retrained(project, weights=weights)
        publish("fabric")
        promote()
    rollback("fabric")
    retrained(project, quality=0.1, weights=b"3")
    publish("fabric")
    with pytest.raises(GateRefused, match="version 3"):
        promote()
    retrained(project, quality=0.9, weights=b"2")  # evaluated anew: other scores
    publish("fabric")
    assert aliases() == {"challenger": 2, "staging": 1} and published()[1] == 2
    version = connect().get_model_version(NAME, "2")
    assert version.tags["panda.run"] == json.loads(Path("build/publish/fabric.json").read_text())["run_id"]
    assert promote()[0].outcome == "held back"
    retrained(project, weights=b"3")  # refused for its figures, which are others now: judged as any other
    publish("fabric")
    (decision,) = promote()
    assert (decision.outcome, decision.version, decision.incumbent) == ("promoted", "3", "1")
    assert len(connect().search_model_versions(f"name = '{NAME}'")) == 3
