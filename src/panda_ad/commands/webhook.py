# SPDX-License-Identifier: Apache-2.0
"""Rows of a table that grows, sent to an address: each at least once, in order, signed, however long nobody answers.

The table itself is the queue. Beside it a small file holds how far it has been sent, so that a restart goes on there.
"""

from __future__ import annotations

import csv
import hashlib
import hmac
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread

from panda_ad.errors import UserError
from panda_ad.system.files import write_text

SECRET = "PANDA_WEBHOOK_SECRET"
"""Environment variable with the key that bodies are signed with."""
_FIRST, _LONGEST = 0.5, 60.0  # seconds between tries
_TIMEOUT = 10.0


def sent_mark(table: Path) -> Path:
    """Return the file that says how far a table has been sent."""
    return table.with_name(f"{table.name}.sent")


@dataclass
class Webhook:
    """What sends the rows.

    Attributes
    ----------
    url : of the receiver.
    table : CSV file with a header; a row is a line.
    secret : of the signature; empty: none is sent.
    sent : bytes of the table that have been delivered.
    unkept : whether the last try to write that down failed.
    """

    url: str
    table: Path
    stop: Event
    say: Callable[[str], None]
    secret: bytes
    sent: int = 0
    unkept: bool = False
    _thread: Thread | None = field(default=None, repr=False)

    @classmethod
    def started(cls, url: str, table: Path, stop: Event, say: Callable[[str], None]) -> Webhook:
        """Send what has not been sent yet, and what comes, in a thread, until `stop`.

        Raises
        ------
        UserError
            The address is not one of HTTP.
        """
        if not url.startswith(("http://", "https://")):
            raise UserError(f"--webhook {url}: an address that begins with http:// or https:// is expected")
        hook = cls(url, table, stop, say, os.environ.get(SECRET, "").encode())
        hook.sent = hook.place()
        hook._thread = Thread(target=hook._run, daemon=True)
        hook._thread.start()
        return hook

    @property
    def mark(self) -> Path:
        """Return the file that says how far the table has been sent."""
        return sent_mark(self.table)

    def place(self) -> int:
        """Return where the first row begins that has not been sent. What the mark says must be the begin of a row."""
        data = self.table.read_bytes()
        first = data.find(b"\n") + 1
        try:
            place = int(self.mark.read_text(encoding="ascii")) if self.mark.exists() else first
        except (OSError, ValueError):
            place = 0
        if first <= place <= len(data) and data[place - 1 : place] == b"\n":
            return place
        self.say(f"webhook: {self.mark}: cannot be read, or is not of this table; all rows are sent again")
        return first

    def idle(self) -> bool:
        """Tell whether everything has been delivered."""
        return self.sent == self.table.stat().st_size

    def join(self) -> None:
        """Wait until a delivery under way has ended."""
        if self._thread is not None:
            self._thread.join(_TIMEOUT + 1)

    def _keep(self) -> None:
        """Write how far the table has been sent; where that fails, say so once, and go on."""
        try:
            write_text(self.mark, f"{self.sent}\n")
            self.unkept = False
        except OSError as e:
            if not self.unkept:
                self.say(f"webhook: {self.mark}: cannot be written ({e.strerror}); a restart would send rows again")
            self.unkept = True

    def _run(self) -> None:
        wait = _FIRST
        while not self.stop.is_set():
            try:
                with open(self.table, "rb") as f:
                    names = f.readline().decode()
                    f.seek(self.sent)
                    line = f.readline()
            except OSError as e:
                self.say(f"webhook: {self.table}: cannot be read ({e.strerror}); tried again in {wait:g} s")
                self.stop.wait(wait)
                wait = min(2 * wait, _LONGEST)
                continue
            if not line.endswith(b"\n"):
                self.stop.wait(0.05)
                continue
            row = next(csv.DictReader([names, line.decode()]))
            # the row's time is in the line: a later table of this name has other ids
            problem = self._post(row, f"{self.table.name}-{self.sent}-{hashlib.sha256(line).hexdigest()[:16]}")
            if not problem:
                self.sent += len(line)
                self._keep()
                wait = _FIRST
                continue
            self.say(f"webhook: {problem}; tried again in {wait:g} s")
            self.stop.wait(wait)
            wait = min(2 * wait, _LONGEST)

    def _post(self, row: dict[str, str], delivery: str) -> str:
        """Send a row; return '' where the receiver has taken it, else why not."""
        body = json.dumps(row, ensure_ascii=False).encode()
        headers = {"Content-Type": "application/json", "X-Panda-Delivery": delivery}
        if self.secret:
            headers["X-Panda-Signature"] = f"sha256={hmac.new(self.secret, body, hashlib.sha256).hexdigest()}"
        request = urllib.request.Request(self.url, body, headers, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT):
                return ""
        except urllib.error.HTTPError as e:
            return f"answered {e.code}"
        except (OSError, ValueError) as e:
            return f"does not answer ({getattr(e, 'reason', e)})"
