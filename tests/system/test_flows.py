# SPDX-License-Identifier: Apache-2.0
import json
import logging
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from prefect.logging import disable_run_logger
from prefect.states import Failed
from prefect_project import call, make_project, new_data

import flows.common
from flows.common import Stage, read_pipeline, select
from flows.retrain import run_stage
from panda_ad.errors import Busy, UserError
from panda_ad.registry.provenance import provenance
from panda_ad.system.processes import child_environment
from panda_ad.system.workspace import changed_copy


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return make_project(tmp_path_factory, tmp_path_factory.mktemp("flows") / "project")


@pytest.fixture
def project(pristine, monkeypatch):
    monkeypatch.chdir(pristine)
    yield pristine
    call("git", "checkout", "-q", ".", cwd=pristine)


def dvc_edges(folder):
    """'adapt@grid -> validate' for each edge, as `dvc dag` has it."""
    text = call("dvc", "dag", "--mermaid", cwd=folder)
    names = dict(re.findall(r'(node\d+)\["?([^"\]]+)"?\]', text))
    return {(names[b], names[a]) for a, b in re.findall(r"(node\d+)-->(node\d+)", text)}


def test_the_graph_is_dvcs(project):
    stages, changed = read_pipeline()
    names = [s.name for s in stages]
    assert set(names) == {"data.dvc", *call("dvc", "stage", "list", "--name-only", cwd=project).split()}
    assert {(s.name, p) for s in stages for p in s.parents} == dvc_edges(project)
    assert all(names.index(p) < names.index(s.name) for s in stages for p in s.parents)
    assert changed == set(names) - {"data.dvc"}, "nothing has run"
    assert {s.name: s.retries for s in stages if s.retries} == {"publish@fabric": 1, "publish@grid": 1}


def test_changed_is_what_dvc_status_says(project):
    call("dvc", "repro", "-q", cwd=project)
    assert read_pipeline()[1] == set()
    with changed_copy(["adapt.epochs=7"]):
        published = {"publish@fabric", "publish@grid"}  # whose outputs are in no cache
        assert read_pipeline()[1] == {"adapt@fabric", "adapt@grid"} | published
    new_data(project, "two")
    assert read_pipeline()[1] == {"validate"}


def test_data_added_by_hand_is_recorded_as_dvc_repro_does(project, tmp_path):
    """Else a version would name, and `reproduce` would look for, data that it was not trained on."""
    call("dvc", "repro", "-q", cwd=project)
    Path("data/more").write_text("by hand\n")
    before = Path("data.dvc").read_text()
    stages, changed = read_pipeline()
    assert stages[0].name == "data.dvc" and {"data.dvc", "validate"} <= changed
    with disable_run_logger():
        assert run_stage.fn("data.dvc", True).is_completed()
    assert "data.dvc" not in read_pipeline()[1]
    assert provenance()["panda.git_dirty"] == "true" and "nfiles: 2" in Path("data.dvc").read_text() != before

    recorded = Path("data.dvc").read_bytes()
    Path("data.dvc").write_text(before)
    call("dvc", "repro", "-q", cwd=project)
    assert Path("data.dvc").read_bytes() == recorded
    Path("data/more").unlink()
    call("dvc", "checkout", "-q", "data.dvc", cwd=project)
    assert Path("data/more").read_text() == "by hand\n", "the cache has it"
    Path("data/more").unlink()


def test_a_broken_dvc_yaml_is_one_line(project):
    with open("dvc.yaml", "a") as file:
        file.write("  nonsense: {cmd: [}\n")
    with pytest.raises(UserError, match="dvc.yaml") as error:
        read_pipeline()
    assert "\n" not in str(error.value)


def test_a_dvc_process_that_is_dying_is_waited_for_and_another_named(project, monkeypatch):
    """As after a killed run: DVC's own lock names a process that still lives."""
    with subprocess.Popen(["sleep", "60"]) as blocker:
        lock = {"write": {str(project / "build/adapt-fabric"): {"pid": blocker.pid, "cmd": "dvc repro"}}, "read": {}}
        (project / ".dvc/tmp/rwlock").write_text(json.dumps(lock))
        with monkeypatch.context() as patch:
            patch.setattr(flows.common, "PATIENCE", 0.0)
            with pytest.raises(Busy, match=f"PID {blocker.pid}"):
                read_pipeline()
        threading.Timer(1.0, lambda: (blocker.kill(), blocker.wait())).start()
        assert read_pipeline()[0]


def test_a_category_brings_what_it_depends_on():
    stages = [
        Stage("validate", (), 0),
        Stage("a@x", ("validate",), 0),
        Stage("a@y", ("validate",), 0),
        Stage("b@y", ("a@y",), 0),
    ]
    assert [s.name for s in select(stages, ["y"])] == ["validate", "a@y", "b@y"]
    assert select(stages, ["z"]) == []


def test_children_get_this_pythons_commands(project):
    assert child_environment()["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


def test_a_stages_own_last_line_is_the_message_and_dvcs_hints_are_not_logged():
    lines = [
        "work",
        "panda-ad: adapt: no images",
        "",
        "Use `dvc push` to send your updates to remote storage.",
        "ERROR: failed to reproduce 'adapt'",
    ]
    logged: list[str] = []
    logger = logging.getLogger("test_flows")
    logger.setLevel(logging.INFO)
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    code = f"import sys; print({chr(10).join(lines)!r}); sys.exit(2)"
    assert flows.common.run_logged([sys.executable, "-c", code], logger, {}) == (2, "panda-ad: adapt: no images")
    assert logged == [lines[0], lines[1], lines[4]]
    assert flows.common.run_logged([sys.executable, "-c", "print('done')"], logger, {}) == (0, "done")


def test_figures_in_the_artifacts():
    from flows.results import _figure, artifact_key

    metrics, intervals = {"image_auroc": 0.91234, "threshold": 12.3456}, {"image_auroc": (0.88, 0.94)}
    assert _figure(metrics, intervals, "image_auroc") == "0.912 [0.880, 0.940]"
    assert _figure(metrics, intervals, "threshold") == "12.35"
    assert _figure(metrics, intervals, "pixel_auroc") == ""
    assert [artifact_key("Metal Nut"), artifact_key("Grün_1"), artifact_key("布")] == ["metal-nut", "grun-1", "e5b883"]


def test_the_reason_repeats_nothing_and_is_short_in_a_table(project):
    from flows.results import GateResult

    folder = Path("build/decisions")
    folder.mkdir(parents=True, exist_ok=True)
    rules = [
        {
            "name": "recall",
            "passed": False,
            "text": "0.2, at least 0.9 needed on a line that is far too long for a cell",
        },
        {"name": "size", "passed": True, "text": "3 MB"},
    ]
    decision = {"outcome": "refused", "reason": "recall: " + rules[0]["text"], "rules": rules}
    (folder / "fabric.json").write_text(json.dumps(decision))
    state = Failed(
        name="Refused", message=f"panda-sample-fabric version 3 not promoted to @staging: {decision['reason']}"
    )
    gate = GateResult.of("fabric", state)
    assert gate.reason == decision["reason"]
    assert gate.in_short() == "1 of 2 rules failed: recall"
    stale = GateResult.of("fabric", Failed(name="Unavailable", message="MLflow does not answer"))
    assert stale.reason == stale.in_short() == "MLflow does not answer"


def test_the_link_leads_to_the_version_and_holds_no_password(project, monkeypatch):
    from flows.results import _mlflow_link

    assert _mlflow_link("fabric") is None
    Path("build/publish").mkdir(parents=True, exist_ok=True)
    Path("build/publish/fabric.json").write_text('{"model_name": "panda-sample-fabric", "version": "3"}')
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://user:secret@mlflow.example:8443/")
    assert _mlflow_link("fabric") == "https://mlflow.example:8443/#/models/panda-sample-fabric/versions/3"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert _mlflow_link("fabric") == "http://127.0.0.1:5000/#/models/panda-sample-fabric/versions/3"


def test_nothing_to_promote_fails_with_one_line(project, monkeypatch):
    """The real registry, a store of its own, no model in it."""
    from flows.retrain import promote_category

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    state = promote_category.fn("fabric")
    assert state.is_failed() and state.name == "Failed"
    assert state.message.startswith("panda-sample-fabric: no") and "\n" not in state.message
