# SPDX-License-Identifier: Apache-2.0
"""Errors a user can act on. The command line prints them as one line, without a stack trace."""

from __future__ import annotations

import errno
from pathlib import Path


class UserError(Exception):
    """What is wrong, where, and what to do, in one line. Exit code 2."""

    exit_code = 2


class GateRefused(UserError):
    """A model was not promoted; the message names each failed rule and by how much. Exit code 3."""

    exit_code = 3


class Busy(UserError):
    """Another run holds the repository's lock; the message names its process. Exit code 4."""

    exit_code = 4


class Unavailable(UserError):
    """A server does not answer or fails; trying again later may help. Exit code 2."""


_ADVICE = {
    errno.EACCES: "you may not write or read there; name another folder, or run it from one of your own",
    errno.EPERM: "you may not do that there; name another folder, or run it from one of your own",
    errno.EROFS: "nothing can be written there; name another folder, or run it from one that can be written to",
    errno.ENOSPC: "free some space, or name a folder on another disk",
}


def told(error: OSError) -> str:
    """Say in one line what the operating system refused, where, and what to do. Temporary files are their folder's."""
    name = str(error.filename or "")
    place = Path(name).parent if name.endswith(".tmp") else Path(name)
    parts = [str(place.absolute()) if name else "", error.strerror or "", _ADVICE.get(error.errno or 0, "")]
    return ": ".join(part for part in parts if part)
