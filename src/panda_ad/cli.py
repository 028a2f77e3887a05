# SPDX-License-Identifier: Apache-2.0
"""Visual anomaly detection that runs for years.

Exit codes: 0 done, 2 a mistake to correct, 3 the gate refused, 4 another run is at work, 5 drift found.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

import typer

from panda_ad.commands import cli_benchmark, cli_gallery, cli_pictures, cli_project, cli_versions
from panda_ad.errors import UserError, told
from panda_ad.system.surroundings import prepare

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__, rich_markup_mode=None
)
for command in (
    cli_project.run,
    cli_project.summary,
    cli_pictures.start,
    cli_pictures.score,
    cli_pictures.watch,
    cli_pictures.monitor,
    cli_pictures.ingest,
    cli_pictures.inspect,
    cli_versions.promote,
    cli_versions.audit,
    cli_versions.rollback,
    cli_versions.explain_version,
    cli_versions.reproduce,
    cli_versions.export,
    cli_versions.clean,
    cli_project.ui,
    cli_project.serve,
    cli_benchmark.benchmark,
):
    app.command()(command)
app.add_typer(cli_gallery.gallery, name="gallery")


def refuse_empty(arguments: Sequence[str]) -> None:
    """UserError where an argument is empty, as a shell's unset variable leaves it.

    As a path it would be the working directory.
    """
    for before, argument in zip(["", *arguments], arguments, strict=False):
        option, equals, value = argument.partition("=")
        if argument and not (option.startswith("--") and equals and not value):
            continue
        where = option or (before if before.startswith("-") else "an argument")
        raise UserError(f"{where}: empty; name a value, or leave it out (is a variable of the shell unset?)")


def main() -> None:
    """Entry point: a user's mistake is one line and its exit code, never a stack trace."""
    # closed by whoever started this (`>&-`, some services): what is printed goes nowhere, as they wish
    nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, as long as the process
    sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
    if isinstance(sys.stdout, io.TextIOWrapper):
        # into a file or a service's journal too, `ui` says at once where it listens; a name of which the locale has no
        # letter is written in escapes
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        refuse_empty(sys.argv[1:])
        prepare()
        app()
    except UserError as e:
        print(f"panda-ad: {e}", file=sys.stderr)
        sys.exit(e.exit_code)
    except OSError as e:
        if e.strerror is None:  # not from the operating system: a defect, and its trace is wanted
            raise
        print(f"panda-ad: {told(e)}", file=sys.stderr)
        sys.exit(UserError.exit_code)
    except SystemExit as e:
        if e.code == 130:  # typer's for Ctrl-C, without a word
            print("panda-ad: stopped", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
