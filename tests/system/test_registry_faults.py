# SPDX-License-Identifier: Apache-2.0
"""Publishing, promotion and rollback killed, or out of disk, between any two of their writes, against a real SQLite store."""

import contextlib
import functools
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys

import pytest
from registry_project import NAME, aliases, make_project, moves, retrained, the_run

from panda_ad.errors import GateRefused, Unavailable
from panda_ad.registry import audit
from panda_ad.registry.connection import connect
from panda_ad.registry.moves import move_alias, settled
from panda_ad.registry.promote import promote, rollback
from panda_ad.stages.publish import main as publish

pytestmark = pytest.mark.slow


class Killed(BaseException):
    """Stands in for SIGKILL: nothing catches it."""


WRITES = (
    "create_experiment", "create_run", "update_run", "log_inputs", "log_batch", "log_artifact", "log_artifacts", "set_tag", "create_registered_model",
    "create_logged_model", "log_model_artifacts", "log_outputs", "finalize_logged_model", "create_model_version",
    "set_model_version_tag", "delete_model_version_tag", "set_registered_model_alias", "delete_registered_model_alias",
    "set_registered_model_tag", "delete_registered_model_tag", "set_terminated", "update_model_version",
)  # fmt: skip


def killed_after(monkeypatch, number):
    """Let `number` writes to MLflow happen, then die; returns the list that counts them."""
    from mlflow import MlflowClient

    done: list[str] = []

    def wrap(name, real):
        @functools.wraps(real)
        def write_then_die(self, *args, **kwargs):
            result = real(self, *args, **kwargs)
            done.append(name)
            if len(done) == number:
                raise Killed
            return result

        return write_then_die

    for name in WRITES:
        monkeypatch.setattr(MlflowClient, name, wrap(name, getattr(MlflowClient, name)))
    return done


def writes_of(monkeypatch, action):
    """The names of an undisturbed action's writes."""
    with monkeypatch.context() as patch:
        writes = killed_after(patch, -1)
        action()
    return writes


def snapshot():
    """All that a publish leaves, without ids and times."""
    client, run = connect(), the_run()
    history = {k: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, k)] for k in run.data.metrics}
    version = client.get_model_version(NAME, "1")
    ids = ("panda.run", "panda.inputs")
    models = client.search_logged_models(["1"])
    return (
        run.info.status, run.data.params, history, sorted(run.data.tags), version.description.replace(version.run_id, "RUN"), version.aliases,
        {k: v for k, v in version.tags.items() if k not in ids and not k.startswith("gate.")}, [str(m.status) for m in models],
        len(client.search_model_versions(f"name = '{NAME}'")), len(run.outputs.model_outputs), aliases(), moves(),
        [(i.dataset.name, i.dataset.digest, i.dataset.profile) for i in run.inputs.dataset_inputs],
    )  # fmt: skip


def test_killed_after_any_kind_of_write_publish_and_promote_end_as_if_undisturbed(project, monkeypatch):
    def fresh():
        shutil.rmtree(project / "mlartifacts", ignore_errors=True)
        from mlflow.store.db.utils import create_sqlalchemy_engine

        with create_sqlalchemy_engine(
            f"sqlite:///{project / 'mlflow.db'}"
        ).begin() as db:  # the open store keeps the file
            for table in ("registered_model_aliases", "registered_model_tags", "model_version_tags", "model_versions", "registered_models",
                          "logged_model_metrics", "logged_model_tags", "logged_model_params", "logged_models", "inputs", "input_tags",
                          "latest_metrics", "metrics", "params", "tags", "runs", "datasets"):  # fmt: skip
                db.exec_driver_sql(f"DELETE FROM {table}")
            db.exec_driver_sql("DELETE FROM experiments WHERE name <> 'Default'")

    def both():
        publish("fabric")
        promote("fabric")

    writes = writes_of(monkeypatch, both)
    undisturbed = snapshot()
    assert {"create_model_version", "set_registered_model_alias", "finalize_logged_model"} <= set(writes)
    first, last = (
        {name: n for n, name in order} for order in (reversed([*enumerate(writes, 1)]), enumerate(writes, 1))
    )
    for number in sorted({*first.values(), *last.values()}):
        fresh()
        with monkeypatch.context() as patch:
            killed_after(patch, number)
            with pytest.raises(Killed):
                both()
        found = aliases() if number > writes.index("create_registered_model") + 1 else {}
        assert found.get("staging") in (None, 1)
        both()
        end = snapshot()
        assert end == undisturbed, f"killed after write {number}, {writes[number - 1]}"


@pytest.fixture(scope="module")
def plant(tmp_path_factory, empty_store):
    """A repository whose version 3 is to follow 2 at staging, which 1 held before; kept.db is its store."""
    folder = make_project(tmp_path_factory.mktemp("third") / "my plant")
    shutil.copyfile(empty_store, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(folder)
        for weights in (b"1", b"2", b"3"):
            retrained(folder, weights=weights)
            publish("fabric")
            if weights != b"3":
                promote()
    shutil.copyfile(folder / "mlflow.db", folder / "kept.db")
    shutil.copyfile(folder / "build/publish/fabric.json", folder / "kept.json")
    return folder


@pytest.fixture
def third(plant, monkeypatch):
    """The working directory is `plant`; gives a function that puts its store, and what was published, back."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(plant)

    def fresh():
        with (
            contextlib.closing(sqlite3.connect("kept.db")) as kept,
            contextlib.closing(sqlite3.connect("mlflow.db")) as store,
        ):
            kept.backup(store)  # into the file that MLflow holds open
        shutil.copyfile("kept.json", "build/publish/fabric.json")

    fresh()
    assert aliases() == {"challenger": 3, "staging": 2}
    return fresh


def state():
    """What readers of the registry see, without times."""
    client = connect()
    versions = [client.get_model_version(NAME, n) for n in "123"]
    verdicts = [{k: re.sub(r"\d{4}-\S+", "", v) for k, v in v.tags.items() if k.startswith("gate.")} for v in versions]
    return aliases(), moves(), before(), verdicts


def before():
    """The versions that rolling @staging back leads to."""
    return audit.versions_before(connect().get_registered_model(NAME), "staging")


def test_a_promotion_killed_after_any_write_is_the_old_state_or_the_new_and_the_next_command_finishes_it(
    third, monkeypatch
):
    writes = writes_of(monkeypatch, promote)
    done = state()
    assert done[0] == {"challenger": 3, "staging": 3} and done[2] == ["2", "1"]
    assert done[1][-1] == ("promote", "staging", "2", "3")
    move = writes.index("set_registered_model_alias") + 1
    assert writes[move - 2 :] == ["set_registered_model_tag", "set_registered_model_alias", "set_registered_model_tag"]
    for number in (1, *range(move - 2, len(writes))):

        def killed(number=number):
            third()
            with monkeypatch.context() as patch:
                killed_after(patch, number)
                with pytest.raises(Killed):
                    promote()
            assert aliases() == {"challenger": 3, "staging": 2 if number < move else 3}
            assert before() == (["1"] if number < move else ["2", "1"]), "computed from what happened, at any time"

        killed()
        assert promote()[0].outcome == ("promoted" if number < move else "unchanged")
        assert state()[::2] == done[::2] and state()[3] == done[3], f"killed after write {number}, {writes[number - 1]}"
        made = [m for m in audit.history(connect().get_registered_model(NAME)) if m["done"]]
        assert [(m["from"], m["to"]) for m in made] == [(None, "1"), ("1", "2"), ("2", "3")]
        if number >= move:
            killed()
            assert rollback("fabric").version == "2"
            assert moves()[-2:] == [("promote", "staging", "2", "3"), ("rollback", "staging", "3", "2")]


def test_a_promoting_process_killed_right_after_the_move_is_finished_by_the_command_line(third):
    code = (
        "import os, signal\nfrom mlflow import MlflowClient\nfrom panda_ad.registry.promote import promote\n"
        "move = MlflowClient.set_registered_model_alias\n"
        "MlflowClient.set_registered_model_alias = lambda *a: (move(*a), os.kill(os.getpid(), signal.SIGKILL))\npromote()"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert aliases() == {"challenger": 3, "staging": 3} and before() == ["2", "1"]
    done = subprocess.run([sys.executable, "-m", "panda_ad.cli", "promote"], capture_output=True, text=True, check=True)
    assert done.stdout == f"{NAME} version 3, @staging: unchanged (it is @staging already)\n"
    assert aliases() == {"challenger": 3, "staging": 3} and moves()[-1] == (
        "promote",
        "staging",
        "2",
        "3",
    )


FULL = """
mkdir -p small && mount -t tmpfs -o size=2m tmpfs small && cp mlflow.db small/ || exit 77
head -c 100m /dev/zero > small/filler 2>/dev/null; truncate -s -36K small/filler
"$@" 2> said; echo $? > code
rm small/filler; cp small/mlflow.db half.db
"$@" && cp small/mlflow.db .
"""
"""The same command twice with the store on a disk of its own: 36 KB are left the first time, enough the second time."""


def test_a_full_disk_below_the_store_is_one_line_and_the_next_publish_goes_on(project):
    command = [sys.executable, "-m", "panda_ad.stages.publish", "fabric"]
    env = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{project}/small/mlflow.db"}
    script = ["unshare", "-rm", "sh", "-c", FULL, "sh", *command]
    done = subprocess.run(script, env=env, capture_output=True, text=True, check=False)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("mounting a small file system is not allowed here")
    (said,) = (project / "said").read_text().strip().splitlines()
    assert (project / "code").read_text().strip() == "2" and said.startswith("panda-ad: publish fabric: "), said
    assert "disk is full" in said
    with contextlib.closing(sqlite3.connect("half.db")) as half:
        begun = [
            half.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in ("runs", "metrics", "model_versions")
        ]
    assert begun == [1, 0, 0], "in the middle: a run, and not all of it"
    assert done.returncode == 0 and "version 1 @challenger" in done.stdout, done.stderr
    assert aliases() == {"challenger": 1} and the_run().info.status == "FINISHED" and promote()[0].outcome == "promoted"


def test_what_a_killed_promotion_left_is_finished_though_the_next_one_is_refused(third, plant, monkeypatch):
    move = writes_of(monkeypatch, promote).index("set_registered_model_alias") + 1
    third()
    with monkeypatch.context() as patch:
        killed_after(patch, move)
        with pytest.raises(Killed):
            promote()
    retrained(plant, quality=0.1, weights=b"4")
    publish("fabric")
    with pytest.raises(GateRefused, match="version 4"):
        promote()
    assert aliases() == {"challenger": 4, "staging": 3} and before() == ["2", "1"]
    assert moves()[-1] == ("promote", "staging", "2", "3")


def test_a_move_that_was_recorded_and_never_made_is_no_move(third, plant, monkeypatch):
    move = writes_of(monkeypatch, promote).index("set_registered_model_alias") + 1
    third()
    with monkeypatch.context() as patch:
        killed_after(patch, move - 1)
        with pytest.raises(Killed):
            promote()
    retrained(plant, quality=1.0, weights=b"5")
    publish("fabric")
    assert promote()[0].incumbent == "2"
    assert before() == ["2", "1"] and aliases()["staging"] == int(promote()[0].version)
    assert [m["done"] for m in audit.history(connect().get_registered_model(NAME))] == [True, True, False, True]


def test_a_move_made_by_hand_in_mlflow_is_told_and_can_be_rolled_back(third):
    connect().set_registered_model_alias(NAME, "staging", "3")
    assert moves()[-1] == ("by hand", "staging", "2", "3")
    assert rollback("fabric").version == "2"
    assert moves()[-2:] == [("by hand", "staging", "2", "3"), ("rollback", "staging", "3", "2")]
    assert aliases() == {"challenger": 3, "staging": 2} and before() == ["1"]


def test_a_rollback_killed_after_any_write_is_finished_by_the_next_command(third, monkeypatch):
    promote()
    writes = writes_of(monkeypatch, lambda: rollback("fabric"))
    assert writes == ["set_registered_model_tag", "set_registered_model_alias", "set_registered_model_tag"]
    for number in range(1, len(writes) + 1):
        third()
        promote()
        with monkeypatch.context() as patch:
            killed_after(patch, number)
            with pytest.raises(Killed):
                rollback("fabric")
        if (
            number < 3
        ):  # not moved: asking again does it; moved and not marked: asking again finishes that and goes back no further
            decision = rollback("fabric")
            assert (decision.version, decision.incumbent, decision.outcome) == ("2", "3", "rolled back")
        (decision,) = promote()
        assert decision.outcome == "held back"
        assert aliases() == {"challenger": 3, "staging": 2} and before() == ["1"], writes[number - 1]
        assert moves()[-1] == ("rollback", "staging", "3", "2")


def test_of_two_moves_that_saw_the_same_state_the_second_is_taken_back(project):
    """As two checkouts: each has looked at the registered model before the other one moved its alias."""
    publish("fabric")
    retrained(project)
    publish("fabric")
    client = connect()
    mine, theirs, late = (settled(client, NAME, "staging") for _ in range(3))
    move_alias(client, theirs, "promote", "staging", "1", "3 rules passed")
    with pytest.raises(Unavailable, match=r"@staging is moved at the same time by .*, to version 1; nothing was moved"):
        move_alias(client, mine, "promote", "staging", "2", "3 rules passed")
    assert moves() == [("promote", "staging", None, "1")] and len(audit.history(settled(client, NAME, "staging"))) == 1

    held = settled(client, NAME, "staging")
    client.set_registered_model_alias(NAME, "staging", "2")
    with pytest.raises(Unavailable, match="at the same time in MLflow"):
        move_alias(client, held, "promote", "staging", "1", "")
    with pytest.raises(Unavailable):
        move_alias(client, late, "promote", "staging", "2", "")
    assert aliases()["staging"] == 2 and [m["action"] for m in audit.records(settled(client, NAME, "staging"))] == [
        "promote"
    ]
