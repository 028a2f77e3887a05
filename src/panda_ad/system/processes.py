# SPDX-License-Identifier: Apache-2.0
"""Child processes that end with everything they start, even if this process is killed; and this process's memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

PROGRESS_SECONDS = 10.0
"""A progress bar redraws itself many times a second; a log gets one line of it per so many seconds."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h

# The command runs in a session of its own, next to a guard that waits for the end of a pipe.
# Only the starter holds the pipe open. When it closes the pipe, or dies in any way (SIGKILL too), the guard kills the
# whole process group, itself included.
_GUARDED = """
exec 3<&0 </dev/null
( trap '' HUP INT TERM; read -r _ <&3; kill -KILL 0 ) >/dev/null 2>&1 &
exec "$@" 3<&-
"""


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return this process's environment with this folder's code and this Python's commands first.

    Output is unbuffered and telemetry is off.
    """
    code = [str(Path.cwd() / "src")] if Path("src/panda_ad").is_dir() else []
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*code, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
        "DVC_NO_ANALYTICS": "1",
        "DO_NOT_TRACK": "true",
        **(extra or {}),
    }


class Group:
    """A running command with all its descendants. Use as a context manager: leaving it ends them.

    Attributes
    ----------
    pid : int
        Process id of the command, and id of its process group.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: Path | str | None = None,
        env: Mapping[str, str] | None = None,
        output: BinaryIO | None = None,
    ):
        """Start `command`; stdout and stderr go to the file `output`, or to `lines()` where that is None.

        The exit status of a command that does not exist is 127.
        """
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", _GUARDED, "sh", *command],
            stdin=subprocess.PIPE,  # the guard's: this process alone has its other end
            stdout=subprocess.PIPE if output is None else output,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=None if env is None else dict(env),
            start_new_session=True,
        )
        self.pid = self._process.pid

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def running(self) -> bool:
        """Whether the command has not ended yet."""
        return self._process.poll() is None

    def wait(self, timeout: float | None = None) -> int:
        """Exit status of the command. Raises subprocess.TimeoutExpired after `timeout` seconds."""
        return self._process.wait(timeout)

    def lines(self) -> Iterator[str]:
        """Yield the output line by line as it comes, until the command ends.

        Of a progress bar only one state per PROGRESS_SECONDS is given.
        """
        assert self._process.stdout is not None, "output goes to a file"
        source = self._process.stdout.fileno()
        pending, shown = b"", -PROGRESS_SECONDS
        while True:
            if not select.select([source], [], [], 0.5)[0]:
                if self.running:
                    continue
                break  # the command ended, but a child it left behind keeps the pipe open
            data = os.read(source, 65536)
            if not data:
                break
            *whole, pending = (pending + data).replace(b"\r\n", b"\n").split(b"\n")
            for line in whole:
                yield from _text(line.rsplit(b"\r", 1)[-1])
            if b"\r" in pending:
                state, pending = pending.rsplit(b"\r", 1)
                if time.monotonic() - shown >= PROGRESS_SECONDS:
                    shown = time.monotonic()
                    yield from _text(pending or state.rsplit(b"\r", 1)[-1])
        yield from _text(pending)

    def stop(self, grace: float = 1.5) -> int:
        """Ask the group to end (SIGTERM), kill it after `grace` seconds; return the command's exit status."""
        assert self._process.stdin is not None
        if self._process.stdin.closed:  # already stopped; the group's id may be another's by now
            return self._process.wait()
        if self.running:
            self._signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace)
        self._signal(signal.SIGKILL)  # the guard, and whatever outlived the command
        self._process.stdin.close()
        if self._process.stdout is not None:
            self._process.stdout.close()
        return self._process.wait()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(
            ProcessLookupError, PermissionError
        ):  # macOS: PermissionError where only zombies are left
            os.killpg(self.pid, number)


def _text(line: bytes) -> Iterator[str]:
    text = line.decode("utf-8", "replace").rstrip()
    if text:
        yield text


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next allocation.

    By default large blocks go back to the kernel at once, and each pass through the network faults its pages in anew:
    a tenth of the frozen layers' time on a virtual machine.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 2**25)  # the most that it takes
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
