# SPDX-License-Identifier: Apache-2.0
"""From the bundle's reference through scoring, log and check to report, MLflow and exit codes, on a real project."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from browser import browser, file_url, watch  # noqa: F401
from monitor_project import drop, make_monitored
from PIL import Image
from prefect.logging import disable_run_logger
from typer.testing import CliRunner

from flows import monitor as monitor_flow
from flows import score as score_flow
from panda_ad.cli import app
from panda_ad.data.images import read_image
from panda_ad.errors import UserError
from panda_ad.features.image_statistics import NAMES, image_statistics
from panda_ad.monitor import inbox
from panda_ad.monitor.check import check_category, model_at, record, reference_of
from panda_ad.monitor.drift import TooFew
from panda_ad.monitor.inbox import due
from panda_ad.monitor.log import LOG, NothingLogged, read_window
from panda_ad.params_file import load_params
from panda_ad.registry.connection import connect
from panda_ad.scoring.bundle import load_bundle, save_bundle
from panda_ad.scoring.checksums import write_checksums
from panda_ad.system.files import digest_file

NAME = "panda-sample-fabric"
MODEL = f"models:/{NAME}@staging"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return make_monitored(tmp_path_factory, tmp_path_factory.mktemp("monitored") / "my plant")


@pytest.fixture
def project(built, monkeypatch):
    """The built project as working directory, without log, reports and inbox."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(built)
    for name in ("monitoring", "inbox"):
        shutil.rmtree(name, ignore_errors=True)
    return built


def run(*arguments: str):
    """Exit code, stdout, stderr; a UserError is what main() makes of it."""
    result = CliRunner().invoke(app, list(arguments))
    if isinstance(result.exception, UserError):
        return result.exception.exit_code, result.stdout, str(result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_the_bundle_keeps_what_its_calibration_images_are_like(project):
    detector = load_bundle("build/bundle/fabric")
    with open("build/features/fabric/rows.csv", newline="") as f:
        paths = [row["path"] for row in csv.DictReader(f) if row["split"] == "calibration"]
    images = [read_image(Path("data") / path) for path in paths]
    reference = reference_of(detector)
    np.testing.assert_allclose(
        reference.statistics, [[image_statistics(i)[n] for n in NAMES] for i in images], rtol=1e-6
    )
    assert reference.scores.tolist() == detector.calibration.tolist() and len(reference.features) == len(images)
    seen = detector.score(images)  # as training images, which look too normal: those are not what is kept
    assert np.median([v.score for v in seen]) < np.median(reference.scores)
    known = np.stack([v.features for v in seen])
    assert np.linalg.norm(reference.features.astype(float), axis=1).mean() > np.linalg.norm(known, axis=1).mean()


def test_scoring_logs_each_image_once_and_the_log_agrees_with_the_verdicts(project):
    drop(project, 5, seed=1)
    (project / "inbox/fabric/broken.png").write_bytes(b"\x89PNG half")
    shutil.copy("inbox/fabric/1-000.png", "inbox/fabric/zz-same.png")
    code, _, said = run("score", "inbox", "--model", MODEL, "--log", "--out", "first.csv")
    assert code == 2 and "1 of 7 files could not be read" in said
    every = list(csv.DictReader(open("first.csv", newline="")))  # noqa: SIM115
    rows = [r for r in every if r["decision"] != "unreadable"]
    assert [r["path"] for r in every if r not in rows] == ["inbox/fabric/broken.png"]
    window = read_window("fabric", NAME, "1")
    assert window.paths == [r["path"] for r in rows] and len(rows) == 5
    assert [repr(s) for s in window.sample.scores.tolist()] == [r["score"] for r in rows]
    assert ["defect" if a else "good" for a in window.alarms] == [r["decision"] for r in rows]
    Path("inbox/fabric/broken.png").unlink()
    drop(project, 2, seed=2)
    code, said, errors = run("score", "inbox", "--model", MODEL, "--log")
    assert code == 0 and said.count("\n") == 1 + 2 and "2 images scored" in errors and "6 known to the log" in errors
    assert len(list((LOG / "fabric").glob("*.parquet"))) == 2


@pytest.mark.parametrize("out", [[], ["--out", "verdicts.csv"]])
def test_a_name_that_is_not_utf8_is_scored_logged_and_written_in_a_form_that_is(project, out):
    drop(project, 2, seed=1)
    inbox = os.fsencode(project / "inbox/fabric")
    os.rename(os.path.join(inbox, b"1-000.png"), os.path.join(inbox, b"teil_\xe4.png"))
    with open(os.path.join(inbox, b"halb_\xe4.png"), "wb") as file:
        file.write(b"\x89PNG half")
    code, said, errors = run("score", "inbox", "--model", MODEL, "--log", *out)
    assert code == 2 and r"halb_\xe4.png" in errors and errors.encode()
    written = Path("verdicts.csv").read_text(encoding="utf-8") if out else said
    rows = list(csv.DictReader(written.splitlines()))
    assert [row["path"] for row in rows if row["decision"] == "unreadable"] == [r"inbox/fabric/halb_\xe4.png"]
    names = [row["path"] for row in rows if row["decision"] != "unreadable"]
    assert names == ["inbox/fabric/1-001.png", r"inbox/fabric/teil_\xe4.png"] == read_window("fabric", NAME, "1").paths
    again = run("score", "inbox", "--model", MODEL, "--log")[1]
    assert again.count("\n") == 2 and again.count("unreadable") == 1, "the log knows the others"


def test_a_killed_run_has_logged_nothing_and_the_next_scores_the_same(project, monkeypatch):
    drop(project, 4, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr("panda_ad.monitor.log.atomic_file", None)  # gone before the log is written
        with pytest.raises(TypeError):
            CliRunner().invoke(app, ["score", "inbox", "--model", MODEL, "--log"], catch_exceptions=False)
    assert not LOG.exists()
    assert run("score", "inbox", "--model", MODEL, "--log")[0] == 0
    assert len(read_window("fabric", NAME, "1")) == 4


def test_steady_and_darker_images_by_exit_code_report_and_mlflow(project, browser):  # noqa: F811
    drop(project, 30, seed=1)
    run("score", "inbox", "--model", MODEL, "--log", "--out", "a.csv")
    code, said, _ = run("monitor")
    assert code == 0 and said.startswith(f"fabric: no drift in 30 images ({NAME} version 1, 30 images; ")
    assert connect().get_model_version(NAME, "1").tags["panda.drift"] == "none"
    for name in ("monitoring", "inbox"):
        shutil.rmtree(name)
    drop(project, 30, seed=3, shift=-40)
    run("score", "inbox/fabric", "--model", MODEL, "--log", "--out", "b.csv")
    code, said, _ = run("monitor", "-c", "fabric")
    assert code == 5 and "darker" in said
    found = json.loads(Path("monitoring/reports/fabric.json").read_text())
    assert found["drifted"] and "darker" in found["findings"] and found["window"] == 30

    client = connect()
    tags = client.get_model_version(NAME, "1").tags
    assert "darker" in tags["panda.drift"] and tags["panda.monitored"] == found["checked"]
    experiment = client.get_experiment_by_name("panda-sample-monitoring")
    (logged,) = client.search_runs([experiment.experiment_id])
    assert (logged.data.tags["panda.model"], logged.data.tags["panda.version"]) == (NAME, "1")
    history = client.get_metric_history(logged.info.run_id, "shift/brightness")
    assert [m.step for m in history] == [0, 1] and history[1].value < -0.5
    (folder,) = [
        a.path for a in client.list_artifacts(logged.info.run_id) if a.path == found["checked"].replace(":", "")
    ]
    assert {Path(a.path).name for a in client.list_artifacts(logged.info.run_id, folder)} == {
        "fabric.html",
        "fabric.json",
    }
    assert client.get_registered_model(NAME).aliases["staging"] == 1, "monitoring promotes nothing"

    log: list[str] = []
    page = browser.new_context().new_page()
    watch(page, log)
    page.goto(file_url(Path("monitoring/reports/fabric.html")))
    assert page.inner_text("h1") == "fabric: drift"
    assert "darker" in page.inner_text(".findings").lower() and "lamp, exposure" in page.inner_text(".findings")
    assert page.locator("#tests tbody tr").count() == len(NAMES) + 3
    assert page.locator(".uplot canvas").count() == len(NAMES) + 3
    page.hover("#brightness .u-over")
    assert "inbox/fabric/3-0" in page.inner_text("#brightness-readout")
    assert log == []


def test_an_alarm_is_raised_once_and_a_person_ends_it(project):
    drop(project, 20, seed=1)
    run("score", "inbox", "--model", MODEL, "--log", "--out", "a.csv")
    assert run("monitor")[0] == 0
    assert run("monitor", "--acknowledge")[0::2] == (2, "no alarm is open, nothing to acknowledge")
    drop(project, 20, seed=3, shift=-40)
    run("score", "inbox", "--model", MODEL, "--log", "--out", "b.csv")
    code, said, _ = run("monitor")
    since = read_window("fabric", NAME, "1").times[20]
    assert code == 5 and "darker" in said and f"since {str(since)[:16].replace('T', ' ')} UTC" in said
    code, said, _ = run("monitor")
    assert code == 0 and "no new drift; open: " in said and "darker" in said
    assert "darker" in connect().get_model_version(NAME, "1").tags["panda.drift"]
    drop(project, 20, seed=4, shift=-40)
    run("score", "inbox", "--model", MODEL, "--log", "--out", "c.csv")
    assert run("monitor")[0] == 0, "more of the same is nothing new"
    code, said, _ = run("monitor", "--acknowledge", "--reason", "lamp of line 2")
    assert code == 0 and "acknowledged by" in said and said.rstrip().endswith(": lamp of line 2")
    code, said, _ = run("monitor")
    assert code == 0 and said.startswith("fabric: no drift in 20 images")
    assert connect().get_model_version(NAME, "1").tags["panda.drift"] == "none"
    drop(project, 20, seed=5, shift=40)
    run("score", "inbox", "--model", MODEL, "--log", "--out", "d.csv")
    code, said, _ = run("monitor")
    assert code == 5 and "brighter" in said, "what comes next is an alarm again"
    assert run("monitor", "--reason", "x")[0] == 2


def test_a_lamp_that_is_mended_ends_its_alarm(project):
    for seed, shift in ((1, 0), (3, -40)):
        drop(project, 20, seed=seed, shift=shift)
        run("score", "inbox", "--model", MODEL, "--log", "--out", f"{seed}.csv")
        run("monitor")
    drop(project, 30, seed=6)
    run("score", "inbox", "--model", MODEL, "--log", "--out", "6.csv")
    code, said, _ = run("monitor")
    assert code == 0 and "over: " in said and "images are as before again since" in said
    assert run("monitor")[1].startswith("fabric: no drift")


def test_a_version_trained_on_the_new_state_ends_the_alarm_and_the_flow_tells_once(project, monkeypatch):
    events: list[dict] = []
    monkeypatch.setattr(monitor_flow, "emit_event", lambda event, resource, payload: events.append(payload))
    for seed, shift in ((1, 0), (3, -40)):
        drop(project, 20, seed=seed, shift=shift)
        run("score", "inbox", "--model", MODEL, "--log", "--out", f"{seed}.csv")
    first = check_category("fabric")
    assert first.alarms
    monitor_flow.tell_alarms(first)
    again = check_category("fabric")
    assert again.open and not again.alarms
    monitor_flow.tell_alarms(again)
    assert [e["category"] for e in events] == ["fabric"] and "darker" in events[0]["findings"]

    model = model_at("fabric", "staging", load_params())
    dark = [digest_file(path) for path in sorted(Path("inbox/fabric").glob("3-*"))[:9]]
    knows = dataclasses.replace(model.detector, seen=model.detector.seen | set(dark))
    monkeypatch.setattr("panda_ad.monitor.check.model_at", lambda *_: dataclasses.replace(model, detector=knows))
    check = check_category("fabric")
    assert not check.open and "trained on 9 images since then" in check.ended[0].end
    assert not check_category("fabric").ended


def test_a_promise_that_good_parts_did_not_meet_is_broken_everywhere(project):
    drop(project, 30, seed=1)
    ramp = np.repeat(np.linspace(0, 250, 32)[:, None, None], 32, axis=1) * np.ones(3)
    for i in range(30):  # another design, as good as any
        Image.fromarray(np.roll(ramp, i, axis=0).astype(np.uint8)).save(f"inbox/fabric/3-{i:03d}.png")
    run("score", "inbox", "--model", MODEL, "--log", "--out", "a.csv")
    code, said, _ = run("audit")
    assert code == 0 and "no good part confirmed yet" in said
    proved_good = project / "data/fabric/train/good"
    before = set(proved_good.iterdir())
    try:
        for path in sorted((project / "inbox/fabric").glob("3-*")):
            shutil.copy(path, proved_good / path.name)
        code, said, _ = run("audit", "-c", "fabric")
        alarms = sum(row["decision"] == "defect" for row in csv.DictReader(open("a.csv")) if "/3-" in row["path"])  # noqa: SIM115
        assert alarms > 20, "the new design is called a defect"
        assert code == 5 and f"{alarms} of 30" in said and "BROKEN: at least" in said
        assert Path("monitoring/audit/fabric.svg").read_text().startswith("<svg")
        (figures,) = json.loads(Path("monitoring/audit/fabric.json").read_text())
        assert (figures["alarms"], figures["images"], figures["broken"]) == (alarms, 30, True)
        tags = connect().get_model_version(NAME, "1").tags
        assert (tags["panda.confirmed_good"], tags["panda.confirmed_alarms"]) == ("30", str(alarms))
        code, said, _ = run("monitor")
        assert code == 5 and "the promise is broken since" in said
        code, said, _ = run("monitor")
        assert code == 0 and "open: " in said and "the promise is broken" in said
        code, _, said = run("promote", "--in-place")
        assert code == 3 and f"the promise is kept: {alarms} alarms on 30 parts" in said
        assert run("monitor", "--acknowledge", "--reason", "known")[0] == 0
        assert "the promise" not in run("monitor")[1]
    finally:
        for path in set(proved_good.iterdir()) - before:
            path.unlink()


def test_recording_a_check_again_adds_nothing(project):
    drop(project, 10, seed=1)
    run("score", "inbox", "--model", MODEL, "--log", "--out", "a.csv")
    check = check_category("fabric")
    client = connect()
    for _ in range(2):
        record(check, "sample")
    (logged,) = client.search_runs([client.get_experiment_by_name("panda-sample-monitoring").experiment_id])
    steps = [m.step for m in client.get_metric_history(logged.info.run_id, "images")]
    assert len(set(steps)) == len(steps)
    assert (
        len(
            [
                a
                for a in client.list_artifacts(logged.info.run_id)
                if a.path == check.checked.isoformat().replace(":", "")
            ]
        )
        == 1
    )


def test_what_cannot_be_checked_is_one_line(project, tmp_path):
    assert run("monitor", "-c", "nowhere")[0::2] == (2, "categories: nowhere not in params.yaml, which has fabric")
    code, _, said = run("monitor")
    assert code == 2 and "no verdict of panda-sample-fabric version 1" in said and said.count("\n") == 1
    with pytest.raises(NothingLogged):
        check_category("fabric")
    drop(project, 5, seed=1)
    run("score", "inbox", "--model", MODEL, "--log", "--out", "a.csv")
    with pytest.raises(TooFew, match="panda-sample-fabric version 1: 5 images in the log, 8 are needed"):
        check_category("fabric")
    with pytest.raises(UserError, match="no such model, version or alias"):
        check_category("fabric", "champion")
    code, _, said = run("score", "inbox", "--bundle", "build/bundle/fabric", "--log")
    assert code == 2 and said.startswith("--log needs --model")


def test_a_bundle_from_before_monitoring_scores_but_has_nothing_to_compare_with(project, tmp_path):
    old, same = tmp_path / "old", tmp_path / "same"
    shutil.copytree("build/bundle/fabric", old)
    (old / "reference.safetensors").unlink()
    write_checksums(old)
    detector = load_bundle(old)
    assert detector.reference is None and len(detector.score([np.zeros((8, 8, 3), np.uint8)])) == 1
    with pytest.raises(UserError, match="category fabric: this version keeps no calibration images"):
        reference_of(detector)
    same.mkdir()
    save_bundle(load_bundle("build/bundle/fabric"), same)
    assert (same / "reference.safetensors").read_bytes() == Path(
        "build/bundle/fabric/reference.safetensors"
    ).read_bytes()


def test_the_flows_tasks(project):
    with disable_run_logger():
        drop(project, 6, seed=1)
        (project / "inbox/fabric/broken.png").write_bytes(b"")
        row = score_flow.score_category.fn("fabric", Path("inbox/fabric"), "staging")
        assert (row["scored"], row["known"], row["unreadable"]) == (6, 0, 1) and Path(row["verdicts"]).is_file()
        row = score_flow.score_category.fn("fabric", Path("inbox/fabric"), "staging")
        assert (row["scored"], row["known"], row["verdicts"]) == (0, 6, "")
        assert score_flow.score_category.fn("fabric", Path("inbox/none"), "staging")["scored"] == 0
        state = monitor_flow.check.fn("fabric", "staging")
        assert (state.name, state.is_completed()) == ("Waiting", True) and "8 are needed" in state.message
        assert monitor_flow.check.fn("fabric", "champion").is_failed()
    assert model_at("fabric", "staging", load_params()).version == "1"


def test_after_a_promotion_the_flow_scores_what_is_new_and_the_newest_of_the_rest(project, monkeypatch):
    """Oldest first, so that the drift window holds the newest images and not those whose names come last."""
    drop(project, 20, seed=1)
    names = sorted(Path("inbox/fabric").iterdir(), reverse=True)  # the last name is the oldest
    for age, path in enumerate(names):
        os.utime(path, ns=(age * 10**9, age * 10**9))
    params = load_params()
    params = params.model_copy(update={"monitor": params.monitor.model_copy(update={"window": 8})})
    monkeypatch.setattr(score_flow, "load_params", lambda: params)
    with disable_run_logger():
        assert score_flow.score_category.fn("fabric", Path("inbox/fabric"), "staging")["scored"] == 20
        assert read_window("fabric", NAME, "1", 8).paths == [str(p) for p in names[-8:]]

        promoted = dataclasses.replace(model_at("fabric", "staging", params), version="2")
        monkeypatch.setattr(score_flow, "model_at", lambda *_: promoted)
        drop(project, 3, seed=2)
        row = score_flow.score_category.fn("fabric", Path("inbox/fabric"), "staging")
        assert (row["scored"], row["known"]) == (8, 15)
        window = read_window("fabric", NAME, "2")
        assert window.paths[:5] == [str(p) for p in names[-5:]] and all("/2-" in p for p in window.paths[5:])
        drop(project, 12, seed=3)
        assert score_flow.score_category.fn("fabric", Path("inbox/fabric"), "staging")["scored"] == 12, (
            "all that is new, however much"
        )
        assert score_flow.score_category.fn("fabric", Path("inbox/fabric"), "staging")["scored"] == 0


def test_a_version_is_not_monitored_by_what_it_was_made_from(project):
    drop(project, 12, seed=1)
    files = sorted(Path("inbox/fabric").iterdir(), key=lambda p: p.stat().st_mtime_ns)
    assert run("score", "inbox", "--model", MODEL, "--log", "--out", "a.csv")[0] == 0
    seen = {digest_file(file) for file in files[8:]}
    assert due(files, "fabric", NAME, "2", 3, seen) == files[5:8]  # a promoted version, trained on the newest four
    model = model_at("fabric", "staging", load_params())
    with open("build/features/fabric/rows.csv", newline="") as f:
        assert model.detector.seen == {row["sha256"] for row in csv.DictReader(f) if row["split"] != "test"}
    shutil.rmtree("inbox")
    shutil.copytree("data/fabric/train/good", "inbox/fabric")
    shutil.rmtree("monitoring")
    assert run("score", "inbox", "--model", MODEL, "--log", "--out", "a.csv")[0] == 0
    with pytest.raises(NothingLogged, match="nothing yet but images that it was made from"):
        check_category("fabric")


def test_an_image_that_stays_in_the_inbox_is_not_read_again(project, monkeypatch):
    drop(project, 4, seed=1)
    files = sorted(Path("inbox/fabric").iterdir())
    assert due(files, "fabric", NAME, "1", 8) == sorted(files, key=lambda p: p.stat().st_mtime_ns)
    read: list[Path] = []
    monkeypatch.setattr(inbox, "digest_if_readable", lambda path: read.append(path) or digest_file(path))
    due(files, "fabric", NAME, "1", 8)
    assert read == []
    shutil.copy(files[1], files[0])
    assert due(files, "fabric", NAME, "1", 8)[-1] == files[3] and read == files[:1]
    inbox.CACHE.joinpath("fabric.json").write_text("{")
    assert len(due(files, "fabric", NAME, "1", 8)) == 3 and len(read) == 5, "a damaged cache costs time only"
