# SPDX-License-Identifier: Apache-2.0
"""Galleries that are taught, in a real registry: added, removed, taken back; each a version, through the gate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import save
from monitor_project import drop, make_monitored
from registry_project import NAME, aliases, set_gate
from typer.testing import CliRunner

from panda_ad.cli import app
from panda_ad.data.images import read_image
from panda_ad.errors import UserError
from panda_ad.registry import audit
from panda_ad.registry.connection import connect
from panda_ad.registry.evidence import artifact
from panda_ad.registry.lineage import explain_version
from panda_ad.registry.load import load_model
from panda_ad.registry.new_threshold import set_threshold
from panda_ad.registry.promote import promote
from panda_ad.system.files import digest_file
from panda_ad.teach import change, look


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return make_monitored(tmp_path_factory, tmp_path_factory.mktemp("built") / "plant")


@pytest.fixture
def plant(built, tmp_path, monkeypatch):
    """A copy of a project whose version 1 is in place; its inbox holds four good images."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = shutil.copytree(built, tmp_path / "plant")
    monkeypatch.chdir(folder)
    set_gate(folder, decision_margin=None, recall_margin=None, margin=None)
    drop(folder, 4, seed=5)
    return folder


def inbox() -> list[Path]:
    return sorted(Path("inbox/fabric").iterdir())


def detector(version: int | str):
    return load_model(f"models:/{NAME}/{version}", None).detector


def figures(model) -> tuple:
    images = [np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8) for i in range(3)]
    return [v.score for v in model.score(images)], model.calibration.tolist(), model.threshold().value


def test_teach_and_undo(plant):
    new = inbox()[0]
    sha256 = digest_file(new)
    with audit.on_behalf("Anna", "seam is normal"):
        decision = change.add("fabric", [new])
    assert decision.outcome == "promoted" and aliases() == {"staging": 2, "challenger": 2}
    new.unlink()  # an inbox is emptied; the copy stays
    old, taught = detector(1), detector(2)
    (before,), (after,) = (m.score([read_image(f"monitoring/taught/fabric/{sha256}.png")]) for m in (old, taught))
    assert after.score < before.score and sha256 in taught.seen and len(taught.images) == len(old.images) + 1
    assert len(taught.calibration) == len(old.calibration), "what was picked for its alarm does not calibrate"
    about = explain_version(NAME, 2)
    (log,) = about["gallery_changes"]
    assert log["what"] == "add" and log["images"] == [sha256] and log["who"].startswith("Anna (")
    assert log["why"] == "seam is normal" and about["moves"][-1]["why"].endswith("; seam is normal")
    assert explain_version(NAME, 1)["gallery_changes"] == []
    run = connect().get_run(connect().get_model_version(NAME, "2").run_id)
    metrics = json.loads(artifact(connect(), run.info.run_id, "fabric/metrics.json"))
    assert metrics["threshold"] == taught.threshold().value == run.data.metrics["fabric/threshold"]
    assert change.undo("fabric").outcome == "promoted"
    assert figures(detector(3)) == figures(old) and [c["what"] for c in explain_version(NAME, 3)["gallery_changes"]] == [
        "add", "undo",
    ]  # fmt: skip
    with pytest.raises(UserError, match="no change of this gallery is left"):
        change.undo("fabric")
    assert [d.outcome for d in promote("fabric")] == ["unchanged"]


def test_remove_by_path_and_by_digits_then_another_threshold(plant):
    names = [path for _, path, _ in look.listed("fabric").images]
    keys = [sha256 for sha256, _, _ in look.listed("fabric").images]
    assert change.remove("fabric", [names[0], keys[3][:10]]).outcome == "promoted"
    left = look.listed("fabric")
    assert [k for k, _, _ in left.images] == [k for i, k in enumerate(keys) if i not in (0, 3)]
    assert len(detector(2).calibration) == len(detector(1).calibration), "six images were kept out for that"
    assert set_threshold("fabric", 2 / 7).outcome == "promoted"
    assert [c.what for c in look.listed("fabric").log] == ["remove"], "a threshold keeps what was taught"
    change.undo("fabric")
    rate = detector(4)
    assert rate.config.false_alarm_rate == 2 / 7 and rate.calibration.tolist() == detector(1).calibration.tolist()


def test_what_the_gate_refuses_moves_nothing(plant):
    set_gate(plant, must_catch=["nowhere.png"])
    decision = change.add("fabric", inbox()[:1])
    assert decision.outcome == "refused" and aliases() == {"staging": 1, "challenger": 1}
    assert look.listed("fabric").log == []


def test_bad_changes_are_one_line_and_change_nothing(plant):
    broken = plant / "broken.png"
    broken.write_bytes(b"no image")
    test_image = next(Path("data/fabric/test/good").iterdir())
    other = save(np.full((32, 32, 3), 9, np.uint8), plant / "x.png")
    for act, said in (
        (lambda: change.add("fabric", [broken]), "broken.png"),
        (lambda: change.add("fabric", [test_image]), "a test image of this version"),
        (lambda: change.add("fabric", [next(Path("data/fabric/train/good").iterdir())]), "is in the gallery already"),
        (lambda: change.remove("fabric", ["0" * 64]), "no image of the gallery"),
        (lambda: change.remove("fabric", ["../../etc/passwd"]), "no image of the gallery"),
        (lambda: change.add("silk", [other]), "no such category"),
    ):
        with pytest.raises(UserError, match=said):
            act()
    assert aliases() == {"staging": 1, "challenger": 1} and not Path("monitoring/taught").exists()


def test_a_kept_image_that_was_replaced_is_noticed(plant):
    change.add("fabric", inbox()[:1])
    (kept,) = Path("monitoring/taught/fabric").iterdir()
    save(np.zeros((32, 32, 3), np.uint8), kept)
    with pytest.raises(UserError, match="has changed|not the"):
        change.add("fabric", inbox()[1:2])
    kept.unlink()
    with pytest.raises(UserError, match="is gone; bring it back"):
        change.add("fabric", inbox()[1:2])
    assert aliases()["staging"] == 2


def test_commands(plant):
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["gallery", *arguments])
        assert result.exit_code == 0, result.output
        return result.output

    assert "version 1: 14 images, 0 changes" in run("list", "fabric")
    assert "version 2, @staging: promoted" in run("add", "fabric", "inbox/fabric", "--reason", "new lot")
    assert "18 images, 1 changes" in run("list", "fabric") and ": new lot" in run("list", "fabric")
    suspects = run("suspect", "fabric", "-n", "3").splitlines()
    assert len(suspects) == 4
    assert "ingest --remove" in run("remove", "fabric", suspects[1].split()[1])
    assert "version 4, @staging: promoted" in run("undo", "fabric")
