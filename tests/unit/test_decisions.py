# SPDX-License-Identifier: Apache-2.0
"""The table of decisions: nobody overwrites what they have not seen, and every decision can be taken back."""

from __future__ import annotations

import itertools
import threading
from dataclasses import replace

import pytest
import sqlalchemy as sa
from conftest import noise, save
from hypothesis import given, settings
from hypothesis import strategies as st

from panda_ad.errors import Unavailable, UserError
from panda_ad.inspect.decisions import AlreadyDecided, Subject, open_decisions
from panda_ad.system.files import digest_file


def subject(number: int = 1, category: str = "nut") -> Subject:
    return Subject(category, f"{number:064x}", f"in/{number}.png", "panda-x-nut", "3", 4.5, 4.0)


@pytest.fixture
def table(tmp_path):
    found = open_decisions(f"sqlite:///{tmp_path / 'monitoring/decisions.db'}")
    yield found
    found.close()


def test_a_decision_stands_with_who_when_and_version(table):
    made = table.decide(subject(), "defect", " long  scratch ", "Anna", seen=0)
    (stands,) = table.standing("nut").values()
    assert stands == made and stands.subject == subject()
    assert (stands.kind, stands.who, stands.version, stands.replaces) == ("long scratch", "Anna", "3", 0)
    assert stands.at.endswith("+00:00") and table.standing("bolt") == {}
    assert table.decide(subject(2), "defect", "", "Anna", 0).kind == "defect"
    assert table.decide(subject(3), "good", "scratch", "Anna", 0).kind == ""


def test_nobody_overwrites_what_they_have_not_seen(table, tmp_path):
    first = table.decide(subject(), "good", "", "Anna", seen=0)
    other = open_decisions(f"sqlite:///{tmp_path / 'monitoring/decisions.db'}")  # another process, with its own memory
    with pytest.raises(AlreadyDecided, match="decided meanwhile by Anna: good") as error:
        other.decide(subject(), "defect", "hole", "Ben", seen=0)
    assert error.value.standing == first
    second = other.decide(subject(), "defect", "hole", "Ben", seen=first.id)
    with pytest.raises(AlreadyDecided):
        table.decide(subject(), "good", "", "Anna", seen=first.id)
    assert table.standing("nut")[subject().sha256] == second
    other.close()


def test_of_eight_at_once_one_decides(tmp_path):
    address = f"sqlite:///{tmp_path / 'd.db'}"
    tables = [open_decisions(address) for _ in range(8)]
    won, lost = [], []
    start = threading.Barrier(8)

    def decide(number: int) -> None:
        start.wait()
        try:
            won.append(tables[number].decide(subject(), "good", "", f"person {number}", 0))
        except AlreadyDecided as e:
            lost.append(e.standing)

    threads = [threading.Thread(target=decide, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and lost == won * 7
    for table in tables:
        table.close()


STEPS = st.lists(
    st.tuples(st.sampled_from(["good", "defect", "unsure", "undo"]), st.integers(1, 3), st.sampled_from("AB")),
    max_size=25,
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One table for many examples, each in a category of its own, and numbers for these."""
    table = open_decisions(f"sqlite:///{tmp_path_factory.mktemp('d') / 'd.db'}")
    yield table, itertools.count()
    table.close()


@given(STEPS)
@settings(max_examples=25)
def test_any_way_of_decisions_and_undos_is_that_of_stacks(shared, steps):
    """Against a naive model: per image a stack of (label, who); undo takes back the person's newest that is on top."""
    table, category = shared[0], f"nut {next(shared[1])}"
    stacks: dict[int, list[tuple[str, str, int]]] = {n: [] for n in (1, 2, 3)}
    for number, (what, image, who) in enumerate(steps):
        sha256 = subject(image).sha256
        if what != "undo":
            stands = table.standing(category).get(sha256)
            table.decide(subject(image, category), what, "", who, stands.id if stands else 0)
            stacks[image].append((what, who, number))
            continue
        mine = [s for s in stacks.values() if s and s[-1][1] == who]
        taken = table.undo(category, who)
        if not mine:
            assert taken is None
            continue
        stack = max(mine, key=lambda s: s[-1][2])
        stack.pop()
        label, _, order = stack[-1] if stack else ("undecided", "", -1)
        if stack:  # it stands again in the name of the one who took back: nobody takes that back in turn
            stack[-1] = (label, "", order)
        assert taken is not None and taken.label == label
    labels = {subject(n).sha256: s[-1][0] if s else "undecided" for n, s in stacks.items()}
    stands = {sha256: d.label for sha256, d in table.standing(category).items()}
    assert stands == {sha256: labels[sha256] for sha256 in stands}
    assert all(labels[k] == "undecided" for k in labels.keys() - stands.keys())


def test_what_cannot_be_is_one_line_and_records_nothing(table):
    for label, kind, who in (("bad", "", "A"), ("undecided", "", "A"), ("good", "", " "), ("good", "", "A\n")):
        with pytest.raises(UserError):
            table.decide(subject(), label, kind, who, 0)
    for kind in ("../x", "a/b", "good", ".hidden", "k" * 101):
        with pytest.raises(UserError, match="kind"):
            table.decide(subject(), "defect", kind, "A", 0)
    assert table.standing("nut") == {}


def test_a_locked_database_is_one_line(table, tmp_path, monkeypatch):
    monkeypatch.setattr("panda_ad.inspect.decisions._WAIT", 0.1)
    path = tmp_path / "monitoring/decisions.db"
    other = open_decisions(f"sqlite:///{path}")
    with sa.create_engine(f"sqlite:///{path}").connect() as holder:
        holder.exec_driver_sql("BEGIN EXCLUSIVE")
        with pytest.raises(Unavailable, match="database is locked.*nothing was recorded") as error:
            other.decide(subject(), "good", "", "A", 0)
    assert "\n" not in str(error.value)
    assert other.decide(subject(), "good", "", "A", 0).label == "good"
    other.close()


def test_an_address_that_leads_nowhere_is_said_without_its_password(tmp_path):
    for address in ("nonsense", "postgresql+nodriver://me:secret@host/x"):
        with pytest.raises(UserError, match="PANDA_DECISIONS") as error:
            open_decisions(address)
        assert "secret" not in str(error.value)


def test_a_table_of_a_newer_version_is_refused(tmp_path):
    address = f"sqlite:///{tmp_path / 'd.db'}"
    open_decisions(address).close()
    with sa.create_engine(address).begin() as connection:
        connection.exec_driver_sql("UPDATE panda_decisions_version SET version_num = '9999'")
    with pytest.raises(UserError, match="newer panda-ad"):
        open_decisions(address)


def test_ingest_takes_what_was_decided(tmp_path, monkeypatch, make_params, capsys):
    """Good to train, defects to test by kind; unsure, undone, replaced and gone ones stay out; a second time adds none."""
    from panda_ad.commands import ingest as command

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PANDA_DECISIONS", raising=False)
    params = make_params(["nut"])
    monkeypatch.setattr(command, "load_params", lambda: params)
    for split in ("train", "test"):
        save(noise(90), tmp_path / "data/nut" / split / "good/000.png")
    table = open_decisions()
    for number, (label, kind) in enumerate(
        [("good", ""), ("defect", "hole"), ("unsure", ""), ("good", ""), ("good", "")]
    ):
        path = save(noise(number), tmp_path / f"inbox/nut/{number}.png")
        decided = replace(subject(number), sha256=digest_file(path), path=str(path.relative_to(tmp_path)))
        table.decide(decided, label, kind, "Anna", 0)
    table.undo("nut", "Anna")
    save(noise(77), tmp_path / "inbox/nut/3.png")  # replaced since
    command.ingest_decided("nut", check=False)
    found = {
        p.parent.relative_to(tmp_path / "data/nut").as_posix(): p.name[0] for p in (tmp_path / "data").rglob("?-*")
    }
    assert found == {"train/good": "0", "test/hole": "1"}
    assert "gone or replaced since: inbox/nut/3.png" in capsys.readouterr().err
    command.ingest_decided("nut", check=False)
    assert len(list((tmp_path / "data").rglob("?-*"))) == 2
    with pytest.raises(UserError, match="no image of bolt was decided"):
        command.ingest_decided("bolt")
    table.close()
