# SPDX-License-Identifier: Apache-2.0
"""Errors a user can act on. The command line prints them as one line, without a stack trace."""


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
