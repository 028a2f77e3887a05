# SPDX-License-Identifier: Apache-2.0
"""What a user sees of a mistake: one line, an exit code, nothing left behind."""

import os
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from panda_ad import cli
from panda_ad.commands import cli_gallery


def said(monkeypatch, capsys, *arguments):
    """Exit code and standard error of `panda-ad ARGUMENTS`."""
    monkeypatch.setattr("sys.argv", ["panda-ad", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code, capsys.readouterr().err


def test_every_command_is_named_with_a_whole_sentence():
    """A first sentence that does not fit 80 columns is cut off with dots."""
    for app in (cli.app, cli_gallery.gallery):
        text = CliRunner().invoke(app, ["--help"]).stdout
        commands = dict(re.findall(r"^  ([a-z-]+)  +(\S.*)$", text.partition("Commands:")[2], re.M))
        assert len(commands) == len(app.registered_commands) + len(app.registered_groups)
        assert [line for line in commands.values() if line.endswith("...")] == []


@pytest.mark.parametrize(
    "command",
    [
        ["run"],
        ["summary"],
        ["ui"],
        ["monitor"],
        ["promote"],
        ["rollback", "fabric"],
        ["explain-version", "x"],
        ["score", "."],
    ],
)
def test_a_wrong_folder_is_one_line_and_stays_empty(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    code, line = said(monkeypatch, capsys, *command)
    assert code == 2 and line.startswith("panda-ad: ") and line.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_the_operating_system_refuses_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")

    def write(*_arguments):
        (tmp_path / "file" / "overlays").mkdir()

    monkeypatch.setattr("panda_ad.commands.score.score_paths", write)
    assert said(monkeypatch, capsys, "score", tmp_path) == (2, f"panda-ad: {tmp_path}/file/overlays: Not a directory\n")


def test_ctrl_c_is_one_line_and_130(monkeypatch, capsys):
    def stop(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("panda_ad.commands.summary.summary", stop)
    assert said(monkeypatch, capsys, "summary") == (130, "panda-ad: stopped\n")


def test_an_error_of_our_own_keeps_its_trace(monkeypatch):
    def fail(*_arguments):
        raise OSError("no error of the operating system")

    monkeypatch.setattr("panda_ad.commands.score.score_paths", fail)
    monkeypatch.setattr("sys.argv", ["panda-ad", "score", "x"])
    with pytest.raises(OSError, match="no error of"):
        cli.main()


def test_each_line_is_written_at_once_into_a_file_too(tmp_path):
    program = "import atexit, sys; atexit.register(lambda: print(sys.stdout.line_buffering, file=sys.stderr)); from panda_ad.cli import main; sys.argv = ['panda-ad', '--help']; main()"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    with open(tmp_path / "out", "w") as out:
        done = subprocess.run(
            [sys.executable, "-c", program], env=env, stdout=out, stderr=subprocess.PIPE, text=True, check=True
        )
    assert done.stderr.strip() == "True"


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_do_no_harm(tmp_path, closed):
    """As some services and cron scripts start their children."""
    command = f"'{sys.executable}' -m panda_ad.cli score . --bundle . {closed}"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_verdicts_for_a_closed_stdout_go_nowhere(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.argv", ["panda-ad", "--help"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["score", "", "--bundle", "b"], "an argument"),
        (["start", ""], "an argument"),
        (["watch", "in", "--out", ""], "--out"),
        (["ingest", "-c", "", "in"], "-c"),
        (["export", "--out=", "--bundle", "b"], "--out"),
        (["score", "in", "--bundle", "b", "--log", ""], "--log"),
    ],
)
def test_an_empty_argument_is_not_the_working_directory(tmp_path, monkeypatch, capsys, arguments, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["panda-ad", *arguments])
    with pytest.raises(SystemExit) as e:
        cli.main()
    said = capsys.readouterr()
    assert e.value.code == 2 and said.err.startswith(f"panda-ad: {named}: empty;") and not said.out
    assert not list(tmp_path.iterdir())
