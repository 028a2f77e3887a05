# SPDX-License-Identifier: Apache-2.0
"""Verdicts in parts: each picture has one row, what is done is not done again, and nothing of another model is mixed in."""

import csv
import os
import threading
from collections import Counter
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import noise, save
from pyarrow import parquet
from tiny_bundle import make_bundle

from panda_ad.commands import parts
from panda_ad.commands.score import score_paths
from panda_ad.commands.score_parts import make_job, score_parts, score_shard
from panda_ad.errors import UserError


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def drop(tmp_path, monkeypatch):
    """Seventy images, more than a part holds."""
    monkeypatch.chdir(tmp_path)
    for i in range(70):
        save(noise(100 + i), Path(f"in/{i:02d}.png"))
    return Path("in")


def rows_of(folder) -> list[dict]:
    return [row for file in sorted(Path(folder).glob("*.parquet")) for row in parquet.read_table(file).to_pylist()]


def test_parts_hold_what_the_table_holds(drop, bundle, capsys):
    score_paths([drop], None, bundle, Path("scores.csv"), None, None)
    score_parts(["in"], None, bundle, "parts")
    with open("scores.csv", newline="") as file:
        table = {str(Path(row["path"]).absolute()): row for row in csv.DictReader(file)}
    rows = rows_of("parts")
    assert len(rows) == len(table) == 70 and len(list(Path("parts").iterdir())) == 2
    for row in rows:
        expected = table[row["path"]]
        assert [repr(row[name]) for name in ("score", "p_value", "threshold")] == [
            expected[name] for name in ("score", "p_value", "threshold")
        ]
        assert row["decision"] == expected["decision"] and row["problem"] is None and len(row["sha256"]) == 64
    assert (
        f"70 images scored, {sum(row['decision'] == 'defect' for row in rows)} called defect" in capsys.readouterr().err
    )


def test_what_has_a_row_is_not_scored_again(drop, bundle, capsys):
    score_parts(["in"], None, bundle, "parts")
    before = {file: file.stat().st_mtime_ns for file in Path("parts").iterdir()}
    save(noise(999), drop / "new.png")
    save(noise(998), drop / "05.png")  # another content is another picture
    capsys.readouterr()
    score_parts(["in"], None, bundle, "parts")
    assert "2 images scored" in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in before} == before
    score_parts(["in"], None, bundle, "parts")
    assert "0 images scored, 0 called defect, 71 known: parts" in capsys.readouterr().err
    counts = Counter(Path(row["path"]).name for row in rows_of("parts"))
    assert counts.pop("05.png") == 2 and set(counts.values()) == {1} and len(counts) == 70


def test_a_part_that_is_lost_is_made_again(drop, bundle):
    score_parts(["in"], None, bundle, "parts")
    first = sorted(Path("parts").iterdir())[0]
    content = parquet.read_table(first).drop_columns("time")
    first.unlink()
    (Path("parts") / f".{first.name}.1.tmp").write_bytes(b"half")  # of a writer that was killed
    score_parts(["in"], None, bundle, "parts")
    assert parquet.read_table(first).drop_columns("time").equals(content)


def test_every_file_has_a_row(drop, bundle):
    (drop / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    (drop / "cut.png").write_bytes((drop / "00.png").read_bytes()[:60])
    os.rename(drop / "00.png", os.fsencode(drop) + b"/bad\xff\n.png")
    os.mkfifo(drop / "pipe.png")
    with pytest.raises(
        UserError, match=r"^3 of 73 files could not be read: .*cut.png: .*phone.heic: .*pipe.png: cannot"
    ):
        score_parts(["in"], None, bundle, "parts")
    rows = {Path(row["path"]).name: row for row in rows_of("parts")}
    assert len(rows) == 73 and {name for name, row in rows.items() if row["score"] is None} == {
        "phone.heic", "cut.png", "pipe.png"
    }  # fmt: skip
    assert rows["bad\\xff\\x0a.png"]["score"] is not None and rows["cut.png"]["decision"] == "unreadable"
    score_parts(["in"], None, bundle, "parts")  # all known


def test_addresses(drop, bundle, capsys):
    """Pictures behind a web server, verdicts in a store that is no file system."""
    (drop / "note.txt").write_text("no picture")
    (drop / ".hidden.png").write_bytes(b"")
    handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory="in"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/"
    try:
        score_parts([address], None, bundle, "memory://verdicts/a")
        assert "70 images scored" in capsys.readouterr().err
        score_parts([address], None, bundle, "memory://verdicts/a")
        assert "70 known" in capsys.readouterr().err
    finally:
        server.shutdown()
        server.server_close()
    score_parts(["in"], None, bundle, "here")
    fs, root = parts.opened("memory://verdicts/a")
    there = {}
    for path in fs.glob(f"{root}/*.parquet"):
        with fs.open(path) as file:
            there |= {Path(row["path"]).name: row["score"] for row in parquet.read_table(file).to_pylist()}
    assert there == {Path(row["path"]).name: row["score"] for row in rows_of("here")}
    with pytest.raises(UserError, match=r"^http://127.0.0.1:\d+/: "):
        score_parts([address], None, bundle, "memory://verdicts/b")


@pytest.mark.parametrize(
    ("paths", "folder", "cluster", "message"),
    [
        (["nowhere"], "parts", None, "^nowhere: no such file or folder"),
        (["empty"], "parts", None, "^no images in empty"),
        (["odd://x"], "parts", None, "^odd://x: Protocol not known: odd"),
        (["in"], "odd://x", None, "^odd://x: Protocol not known: odd"),
        (["memory://none"], "parts", None, "^memory://none: nothing there"),
        (["in"], "file", None, r"^\S+file: cannot be written \("),
        (["in"], "parts", "0", "^--cluster 0: a number of processes, or a scheduler's address"),
        (["in"], "parts", "two", "^--cluster two: a number of processes"),
        (["in"], "parts", "gossip://x", "^--cluster gossip://x: no scheduler answers"),
    ],
)
def test_mistakes_are_one_line(drop, bundle, paths, folder, cluster, message):
    Path("empty").mkdir()
    Path("file").write_text("x")
    with pytest.raises(UserError, match=message) as error:
        score_parts(paths, None, bundle, folder, cluster=cluster)
    assert "\n" not in str(error.value)


def test_parts_of_another_model_or_damaged_ones_are_refused(drop, bundle, tmp_path_factory):
    score_parts(["in"], None, bundle, "parts")
    other = make_bundle(tmp_path_factory.mktemp("other"), seed=50)
    with pytest.raises(UserError, match=r"^parts: holds verdicts of another model \(bundle \w+, threshold \S+\); name"):
        score_parts(["in"], None, other, "parts")
    with pytest.raises(UserError, match=r"holds verdicts of another model"):
        score_parts(["in"], None, bundle, "parts", false_alarm_rate=0.5)  # decisions would be of two thresholds
    (Path("parts") / "x.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match=r"x.parquet: no part of verdicts, or damaged \(.*\); delete it$"):
        score_parts(["in"], None, bundle, "parts")


def test_a_worker_with_other_versions_refuses(drop, bundle):
    job = make_job(None, bundle, "parts")
    other = replace(job, versions=(*job.versions[:-1], "pillow 1.0"))
    with pytest.raises(UserError, match=r"^worker \S+: pillow \S+ here, pillow 1.0 there; its scores may differ"):
        score_shard(other, parts.sources(["in"])[:2])
    assert not Path("parts").exists()
