# SPDX-License-Identifier: Apache-2.0
"""Publishing, promotion, rollback and lineage against a real SQLite store."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import pytest
import yaml
from registry_project import (
    NAME,
    aliases,
    make_project,
    moves,
    read_rows,
    retrained,
    set_gate,
    the_run,
    write,
    write_bundle,
    write_json,
    write_rows,
    write_scores,
)  # fmt: skip

from panda_ad.commands.summary import summary
from panda_ad.errors import GateRefused, Unavailable, UserError
from panda_ad.registry import audit
from panda_ad.registry.connection import connect
from panda_ad.registry.evidence import artifact
from panda_ad.registry.lineage import explain_version
from panda_ad.registry.promote import promote, rollback
from panda_ad.registry.versions import download_version, note_on
from panda_ad.stages.publish import main as publish


def test_publish_puts_everything_on_record(project, monkeypatch):
    monkeypatch.setenv("PANDA_PREFECT_RUN", "f00d")
    monkeypatch.setenv("PREFECT_API_URL", "http://user:secret@127.0.0.1:4200/api")
    publish("fabric")
    out = json.loads((project / "build/publish/fabric.json").read_text())
    client, run = connect(), the_run()
    assert (out["run_id"], out["model_name"], out["version"]) == (run.info.run_id, NAME, 1)
    assert run.info.status == "FINISHED" and run.info.end_time
    assert run.info.run_name == f"ses {run.data.tags['panda.inputs'][:8]}, efficientnet_lite0, 32 x 32"
    assert run.data.params["adapt.method"] == "ses" and run.data.params["categories"] == '["fabric"]'
    assert run.data.metrics["fabric/image_auroc"] == out["metrics"]["image_auroc"]
    assert run.data.metrics["fabric/seconds/adapt"] == 1.5 and run.data.metrics["peak_mb/extract"] == 300
    loss = client.get_metric_history(run.info.run_id, "fabric/adapt/loss")
    assert [(m.step, m.value) for m in loss] == [(i, 1 / (i + 1)) for i in range(20)]
    assert run.data.tags["panda.data"] == "d" * 64
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest, data.tags[0].value) == (
        "sample",
        "d" * 36,
        "training and evaluation",
    )
    profile = json.loads(data.dataset.profile)
    assert profile["train"] == 8 and profile["num_rows"] == sum(v for k, v in profile.items() if k != "num_rows")
    assert run.data.tags["panda.prefect_url"] == "http://127.0.0.1:4200/runs/flow-run/f00d"
    files = {
        f.path for folder in ("", "data", "fabric") for f in client.list_artifacts(run.info.run_id, folder or None)
    }
    assert {
        "params.yaml",
        "dvc.lock",
        "dvc.yaml",
        "data/manifest.csv",
        "data/index.html",
        "data/problems.csv",
    } <= files
    assert {"fabric/report.html", "fabric/scores.csv", "fabric/roc.csv", "fabric/histogram.csv"} <= files
    version = client.get_model_version(NAME, "1")
    assert aliases() == {"challenger": 1}
    assert version.tags["panda.bundle"] == out["bundle"] and version.tags["panda.image_auroc"] == "1"
    for words in (
        "# panda-sample-fabric version 1",
        f"panda-ad reproduce {NAME} 1",
        f"mlflow artifacts download --run-id {run.info.run_id} --artifact-path params.yaml",
        "image AUROC **1.0000** (95 % interval 0.9800 to 1.0000)",
        "14 good images, 6 of them kept out of the adaptation",
        "Test: 10 good, ",
        "Score > 0.6",
    ):
        assert words in version.description
    assert explain_version(NAME, 1)["reproduce"] == card_commands(version.description)
    note = run.data.tags["mlflow.note.content"]
    assert note.startswith(f"## fabric\n\n{NAME} version 1; report: `fabric/report.html`")
    assert "| image AUROC | 1.0000 | 0.9800 to 1.0000 |" in note
    assert not any(name.endswith(("_low", "_high")) for name in run.data.metrics)
    assert explain_version(NAME, 1)["metrics"]["image_auroc_low"] == 0.98


def card_commands(card):
    """The commands of a card's section Reproduce."""
    return [line.strip() for line in card.partition("## Reproduce")[2].splitlines() if line.startswith("    ")]


def test_the_model_holds_no_pickle_and_its_own_code(project):
    publish("fabric")
    bundle = download_version(f"models:/{NAME}@challenger")[2]
    model = bundle.parent.parent
    names = {p.relative_to(model).as_posix() for p in model.rglob("*") if p.is_file()}
    assert (bundle / "learned.safetensors").read_bytes() == b"weights 1"
    assert {"MLmodel", "model.py", "code/panda_ad/scoring/detector.py", "input_example.json"} <= names
    assert not any(n.endswith((".pkl", ".pickle", ".pyc")) or "/weights/" in n for n in names)
    requirements = (model / "requirements.txt").read_text()
    assert (
        "onnxruntime==" in requirements
        and "torch" not in requirements
        and "+" not in requirements
        and "://" not in requirements
    )


def test_publishing_again_adds_nothing(project):
    publish("fabric")
    before = (project / "build/publish/fabric.json").read_text()
    files = {p: p.stat().st_mtime_ns for p in (project / "mlartifacts").rglob("*") if p.is_file()}
    publish("fabric")
    assert (project / "build/publish/fabric.json").read_text() == before
    assert {p: p.stat().st_mtime_ns for p in (project / "mlartifacts").rglob("*") if p.is_file()} == files
    assert len(connect().get_metric_history(the_run().info.run_id, "fabric/adapt/loss")) == 20
    assert len(connect().get_metric_history(the_run().info.run_id, "fabric/image_auroc")) == 1


def test_categories_share_the_run_of_their_change(tmp_path, monkeypatch, empty_store):
    folder = make_project(tmp_path / "p", ("fabric", "metal nut (v2)"))
    shutil.copyfile(empty_store, folder / "mlflow.db")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(folder)
    for category in ("fabric", "metal nut (v2)"):
        publish(category)
    metrics = the_run().data.metrics
    assert {"fabric/image_auroc", "metal nut _v2_/image_auroc"} <= set(metrics)
    assert [str(d) for d in promote()] and connect().get_model_version_by_alias(
        "panda-sample-metal nut (v2)", "staging"
    ).version


def test_a_new_change_is_a_new_run_and_only_a_new_bundle_a_new_version(project):
    publish("fabric")
    write(project / "requirements.lock", "# other\n")
    publish("fabric")
    assert len(connect().search_runs(["1"])) == 2
    assert aliases() == {"challenger": 1}
    assert connect().get_model_version(NAME, "1").tags["panda.run"] != connect().get_model_version(NAME, "1").run_id
    write_bundle(project, "fabric", b"other weights")
    publish("fabric")
    assert aliases() == {"challenger": 2}


def test_first_promotion_looks_at_floors_only_and_again_does_nothing(project):
    publish("fabric")
    (decision,) = promote()
    assert decision.outcome == "promoted" and {r.name for r in decision.rules} == {
        "image AUROC floor", "pixel AUROC floor", "calibration holds",
    }  # fmt: skip
    assert aliases() == {"challenger": 1, "staging": 1}
    (again,) = promote()
    assert again.outcome == "unchanged" and moves() == [("promote", "staging", None, "1")]
    version = connect().get_model_version(NAME, "1")
    assert version.tags["gate.staging"].startswith("promoted ")
    assert version.tags["gate.staging.image AUROC floor"].startswith("passed: 1 (limit >= 0.6)")
    assert json.loads((project / "build/decisions/fabric.json").read_text())["outcome"] == "unchanged"


def test_a_better_version_takes_over_and_the_old_one_stays_at_previous(project):
    publish("fabric")
    promote()
    retrained(project)
    publish("fabric")
    (decision,) = promote("fabric")
    assert (decision.version, decision.incumbent) == ("2", "1")
    assert aliases() == {"challenger": 2, "staging": 2} and before() == ["1"]
    run = connect().get_model_version(NAME, "2").tags["panda.run"]
    saved = json.loads(artifact(connect(), run, "fabric/decisions/staging-version-2.json"))
    assert saved["outcome"] == "promoted" and "image AUROC not worse" in {r["name"] for r in saved["rules"]}


def test_a_worse_version_is_refused_by_name_and_amount(project):
    publish("fabric")
    promote()
    retrained(project, quality=0.1)
    publish("fabric")
    with pytest.raises(
        GateRefused, match=r"version 2 not promoted to @staging: .*image AUROC not worse.*too much"
    ) as refusal:
        promote()
    assert refusal.value.exit_code == 3 and "\n" not in str(refusal.value)
    assert aliases() == {"challenger": 2, "staging": 1} and moves() == [("promote", "staging", None, "1")]
    assert connect().get_model_version(NAME, "2").tags["gate.staging"].startswith("refused ")
    set_gate(
        project,
        margin=None,
        recall_margin=None,
        decision_margin=None,
        min_image_auroc=0.0,
        min_pixel_auroc=None,
        false_alarm_risk=None,
    )
    (decision,) = promote()
    assert decision.outcome == "promoted" and decision.rules[0].name == "image AUROC floor"
    assert "gate.staging.image AUROC not worse" not in connect().get_model_version(NAME, "2").tags


def test_a_person_may_choose_what_the_gate_refused_and_is_told(project):
    publish("fabric")
    promote()
    retrained(project, quality=0.1)
    publish("fabric")
    with pytest.raises(GateRefused):
        promote()
    assert rollback("fabric", 2).reason == "from version 1, asked for version 2, which the gate had refused"


def test_a_misspelt_defect_does_not_switch_its_floor_off(project):
    set_gate(project, min_defect_recall={"holes": 0.9, "stain": 0.1})
    publish("fabric")
    with pytest.raises(GateRefused, match="recall floor of defect holes: no such kind of defect") as error:
        promote()
    assert "stain" not in str(error.value).partition("this one has")[0]
    decision = json.loads((project / "build/decisions/fabric.json").read_text())
    assert next(r for r in decision["rules"] if "holes" in r["name"])["value"] is None
    set_gate(project, min_defect_recall={"hole": 0.9, "stain": 0.1})
    assert promote()[0].outcome == "promoted"


def test_rollback_goes_back_one_by_one_and_holds_the_left_version_back(project):
    for weights in (b"1", b"2", b"3"):
        retrained(project, weights=weights)
        publish("fabric")
        promote()
    assert rollback("fabric").version == "2"
    assert aliases() == {"challenger": 3, "staging": 2} and before() == ["1"]
    (held,) = promote()
    assert held.outcome == "held back" and "--to-version 3" in held.reason and aliases()["staging"] == 2
    rollback("fabric")
    assert aliases() == {"challenger": 3, "staging": 1}
    with pytest.raises(UserError, match="no version before version 1"):
        rollback("fabric")
    rollback("fabric", to_version=3)
    assert aliases() == {"challenger": 3, "staging": 3} and before() == ["1"]
    assert promote()[0].outcome == "unchanged"
    assert moves()[-3:] == [
        ("rollback", "staging", "3", "2"),
        ("rollback", "staging", "2", "1"),
        ("rollback", "staging", "1", "3"),
    ]
    last = audit.history(connect().get_registered_model(NAME))[-1]
    assert last["who"] and last["when"].endswith("+00:00") and last["why"] == "asked for version 3"
    with pytest.raises(UserError, match="version 3 is @staging already"):
        rollback("fabric", 3)
    with pytest.raises(UserError, match="no such model, version or alias"):
        rollback("fabric", 99)


def before():
    """The versions that rolling @staging back leads to."""
    return audit.versions_before(connect().get_registered_model(NAME), "staging")


def test_a_rollback_after_a_rollback_to_a_named_version_goes_back_to_what_was_there(project):
    """Also where that version was refused, or had been @staging before."""
    publish("fabric")
    promote()
    retrained(project, quality=0.1)
    publish("fabric")
    with pytest.raises(GateRefused):
        promote()
    rollback("fabric", to_version=2)
    assert rollback("fabric").version == "1" and aliases()["staging"] == 1
    rollback("fabric", to_version=2)
    rollback("fabric", to_version=1)
    assert rollback("fabric").version == "2"
    assert rollback("fabric").version == "1"
    with pytest.raises(UserError, match="held no version before version 1"):
        rollback("fabric")


def test_moves_keep_their_order_where_another_machine_has_its_clock_ahead(project, monkeypatch):
    publish("fabric")
    with monkeypatch.context() as patch:
        patch.setattr(audit, "now", lambda: "2999-01-01T00:00:00.000000+00:00")
        promote()
    for weights in (b"2", b"3"):
        retrained(project, weights=weights)
        publish("fabric")
        promote()
    assert [to for *_, to in moves()] == ["1", "2", "3"] and before() == ["2", "1"]


def test_a_registry_with_a_stored_alias_and_records_of_moves_that_were_made_goes_on(project):
    """As the package wrote it before the version before was computed: @previous, records after the move and without `done`."""
    publish("fabric")
    promote()
    retrained(project)
    publish("fabric")
    client = connect()
    (key,) = [k for k in client.get_registered_model(NAME).tags if k.startswith("panda.audit.")]
    for n, (before_it, version) in enumerate(((None, "1"), ("1", "2"))):
        old = {"action": "promote", "alias": "staging", "from": before_it, "to": version, "why": "3 rules passed"}
        old |= {"when": f"2026-01-0{n + 1}T00:00:00.000000+00:00", "who": "me@plant", "prefect_run": None}
        client.set_registered_model_tag(NAME, f"panda.audit.2026-01-0{n + 1}T000000.000000Z", json.dumps(old))
    client.delete_registered_model_tag(NAME, key)
    client.set_registered_model_alias(NAME, "staging", "2")
    client.set_registered_model_alias(NAME, "previous", "1")
    assert before() == ["1"] and "by hand" not in summary()
    assert rollback("fabric").version == "1"
    assert aliases() == {"challenger": 2, "staging": 1}, "a stored @previous would be wrong from now on"
    assert promote()[0].outcome == "held back" and before() == []


def test_a_version_set_by_hand_is_named_everywhere_and_evaluated_on_request(project, monkeypatch):
    publish("fabric")
    promote()
    retrained(project, quality=0.1)
    publish("fabric")
    connect().set_registered_model_alias(NAME, "staging", "2")
    said = "version 2 was set by hand, never judged"
    (decision,) = promote()
    assert decision.outcome == "unchanged" and said in decision.reason
    assert "`panda-ad promote -c fabric --in-place`" in decision.reason
    assert said in summary() and explain_version(NAME, 2)["set_by_hand"] == [said]
    assert note_on(f"models:/{NAME}@staging") == said and note_on(f"models:/{NAME}/2") == ""
    with pytest.raises(
        GateRefused,
        match=r"version 2 does not keep the rules at @staging: .*`panda-ad rollback fabric` goes back to version 1",
    ):
        promote(in_place=True)
    assert "version 2 was set by hand, the gate had refused it on 20" in summary()
    assert aliases()["staging"] == 2 and moves()[-1] == ("by hand", "staging", "1", "2")
    assert rollback("fabric").version == "1"
    retrained(project, weights=b"3")
    publish("fabric")
    connect().set_registered_model_alias(NAME, "staging", "3")
    (decision,) = promote(in_place=True)
    assert (decision.outcome, decision.incumbent) == ("confirmed", "1")
    assert "by hand" not in summary() and note_on(f"models:/{NAME}@staging") == ""
    assert before() == ["1"] and moves()[-2:] == [("by hand", "staging", "1", "3"), ("confirm", "staging", "3", "3")]


def test_summary_says_what_the_gate_said_and_what_is_in_place(project):
    with pytest.raises(UserError, match=r"fabric.json: not there yet; run `make run`"):
        summary()
    publish("fabric")  # as a plain `dvc repro` leaves it
    assert "version 1 was not put to the gate yet: `panda-ad promote -c fabric`" in (text := summary())
    assert "nothing is @staging" in text and "--bundle build/bundle/fabric" in text and "models:/" not in text
    promote()
    assert f"version 1 is @staging since {date.today():%Y}" in (text := summary())
    assert f"--model models:/{NAME}@staging" in text and "caution" not in text
    retrained(project, quality=0.1)
    publish("fabric")
    assert "version 2 was not put to the gate yet" in summary()
    with pytest.raises(GateRefused):
        promote()
    text = summary()
    assert "version 2 was refused on 20" in text and "image AUROC not worse: " in text
    assert "fabric: version 1 is @staging, image AUROC 1.0000 [0.9800, 1.0000], caught 100 %, false alarms 0 %" in text
    assert "fabric: caution: it catches " in text
    params = yaml.safe_load(Path("params.yaml").read_text())
    Path("params.yaml").write_text(yaml.safe_dump(params | {"categories": ["fabric", "washer"]}))
    assert "washer: never trained here; `panda-ad run` does it" in summary()


def test_a_first_version_that_hardly_serves_is_promoted_with_a_caution(project):
    write_scores(project, "fabric", 0.3)
    folder = project / "build/evaluation/fabric"
    metrics = json.loads((folder / "metrics.json").read_text())
    write_json(folder / "metrics.json", metrics | {"image_auroc": 0.677, "recall": 0.12, "false_alarm_rate": 0.3})
    write_json(folder / "intervals.json", {"image_auroc": [0.52, 0.818]})
    publish("fabric")
    (decision,) = promote()
    assert decision.outcome == "promoted" and "; caution: it catches 12 % of the test set's defects" in str(decision)
    version = connect().get_model_version(NAME, "1")
    for words in (
        "it catches 12 % of the test set's defects",
        "it alarms on 30 % of the good test images where 5 % are promised",
        "image AUROC 0.677 [0.520, 0.818] is hardly told from chance",
    ):
        assert words in decision.cautions and words in version.tags["gate.staging.caution"]
        assert f"- **Caution: {words}.**" in version.description and f"fabric: caution: {words}" in summary()


def test_files_that_were_lost_are_published_again(project):
    publish("fabric")
    bundle = download_version(f"models:/{NAME}/1")[2]
    shutil.rmtree(project / "mlartifacts")
    with pytest.raises(UserError, match="its files are gone from .*; `dvc repro --force --single-item publish@fabric`"):
        download_version(f"models:/{NAME}/1")
    publish("fabric")
    assert download_version(f"models:/{NAME}/1")[2] == bundle and (bundle / "learned.safetensors").is_file()
    (bundle / "learned.safetensors").write_bytes(b"weights of another model")
    with pytest.raises(UserError, match="damaged, 'learned.safetensors' is not what was written in .*; `dvc repro"):
        download_version(f"models:/{NAME}/1")
    publish("fabric")
    assert download_version(f"models:/{NAME}/1")[2] == bundle
    assert promote()[0].outcome == "promoted"


def test_a_moved_and_a_copied_checkout_keep_their_models_and_write_where_they_are(project, monkeypatch, capsys):
    publish("fabric")
    promote()
    copy = project.with_name("a copy")
    shutil.copytree(project, copy)
    before = {p for p in project.rglob("mlartifacts/**/*")}
    monkeypatch.chdir(copy)
    assert download_version(f"models:/{NAME}@staging")[2].is_relative_to(copy)
    assert "artifacts of 1 runs are here now, no longer in " in capsys.readouterr().err
    retrained(copy)
    publish("fabric")
    assert promote()[0].outcome == "promoted" and {p for p in project.rglob("mlartifacts/**/*")} == before
    assert download_version(f"models:/{NAME}/2")[2].is_relative_to(copy)
    moved = project.with_name("moved")
    copy.rename(moved)
    monkeypatch.chdir(moved)
    for version in "12":
        assert download_version(f"models:/{NAME}/{version}")[2].is_relative_to(moved)
    assert explain_version(NAME, 2)["metrics"]["image_auroc_low"] == 0.98
    publish("fabric")
    assert not copy.exists() and len(capsys.readouterr().err.splitlines()) == 1


def test_a_path_that_a_person_gave_an_experiment_stays(project, tmp_path):
    place = (tmp_path / "elsewhere").as_uri()
    client = connect()
    mine = client.create_experiment("mine", artifact_location=place)
    publish("fabric")
    assert connect().get_experiment(mine).artifact_location == place


def test_staging_becomes_champion(project):
    publish("fabric")
    with pytest.raises(UserError, match="promote one to staging first"):
        promote(to="champion")
    promote()
    assert promote(to="champion")[0].outcome == "promoted"
    assert aliases() == {"challenger": 1, "staging": 1, "champion": 1}


def test_explain_version_names_what_reproduces_it(project):
    publish("fabric")
    promote()
    facts = explain_version(NAME, "@staging")
    assert (facts["version"], facts["aliases"], facts["data_hash"]) == (1, ["challenger", "staging"], "d" * 64)
    assert facts["params"]["gallery.k"] == "2" and facts["metrics"]["image_auroc"] == 1.0
    assert facts["moves"][0]["to"] == "1" and facts["gate"]["staging"].startswith("promoted")
    assert facts["run_id"] == the_run().info.run_id and any("dvc repro" in c for c in facts["reproduce"])
    assert explain_version(NAME, "staging") == explain_version(NAME, 1) == facts
    with pytest.raises(UserError, match="no such model, version or alias"):
        explain_version(NAME, 7)


def test_a_wrong_folder_is_said_and_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="neither mlflow.db nor params.yaml is here; run from the repository's folder"):
        explain_version(NAME)
    assert list(tmp_path.iterdir()) == []


def test_the_commit_is_on_record_and_whether_inputs_differ_from_it(project):
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t"]
    for command in (["init", "-q"], ["add", "params.yaml"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    publish("fabric")
    assert the_run().data.tags["panda.git_dirty"] == "true"
    subprocess.run([*git, "add", "dvc.yaml", "data.dvc", "requirements.lock"], check=True)
    subprocess.run([*git, "commit", "-qm", "y"], check=True)
    publish("fabric")
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert (the_run().data.tags["panda.git_dirty"], the_run().data.tags["mlflow.source.git.commit"]) == ("false", head)


@pytest.mark.parametrize(
    "text",
    ["nonsense", "models:/x", "models:/x/y", f"models:/{NAME}@nobody", f"models:/{NAME}/9", "models:/no@staging"],
)
def test_a_model_that_is_not_there_is_one_clear_line(project, text):
    publish("fabric")
    with pytest.raises(UserError) as error:
        download_version(text)
    assert text in str(error.value) and "\n" not in str(error.value)


def test_what_cannot_be_promoted_says_so(project):
    with pytest.raises(UserError, match="no such registered model; run `dvc repro`"):
        promote()
    with pytest.raises(UserError, match="nuts: no such category"):
        promote("nuts")
    with pytest.raises(UserError, match="staging or champion"):
        promote(to="moon")


@pytest.mark.parametrize(
    "missing",
    ["build/validation/report.json", "build/evaluation/fabric/metrics.json", "build/bundle/fabric/bundle.json"],
)
def test_publish_before_the_other_stages_says_what_to_run(project, missing):
    (project / missing).unlink()
    with pytest.raises(UserError, match="dvc repro"):
        publish("fabric")


def test_a_new_test_set_without_its_images_is_refused_clearly(project):
    publish("fabric")
    promote()
    rows = read_rows(project / "build/validation/manifest.csv")
    write_rows(project / "build/validation/manifest.csv", rows[:-1])
    retrained(project)
    publish("fabric")
    shutil.rmtree(project / "data")
    with pytest.raises(UserError, match=r"(dvc checkout|not a bundle|damaged bundle)"):
        promote()
    assert aliases()["staging"] == 1


def test_an_unreachable_server_is_named_within_seconds(project, monkeypatch):
    with socket.socket() as listener:  # accepts, and never answers
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        silent = f"127.0.0.1:{listener.getsockname()[1]}"
        for place in ("127.0.0.1:1", silent):
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@{place}")
            start = time.monotonic()
            with pytest.raises(Unavailable, match=f"MLflow at http://{place} does not answer") as error:
                publish("fabric")
            assert time.monotonic() - start < 90, "MLflow itself would try for four minutes"
            assert "secret" not in str(error.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret@127.0.0.1:1/db")
    with pytest.raises(Unavailable, match="does not answer"):
        connect()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:///tmp/runs")
    with pytest.raises(UserError, match="sqlite:///FILE"):
        connect()


def test_the_command_prints_one_line_and_exits_2(project):
    env = {**os.environ, "MLFLOW_TRACKING_URI": "http://127.0.0.1:1"}
    done = subprocess.run(
        [sys.executable, "-m", "panda_ad.stages.publish", "fabric"],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "http://127.0.0.1:1" in done.stderr
    assert not (project / "build/publish").exists()
