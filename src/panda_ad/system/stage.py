# SPDX-License-Identifier: Apache-2.0
"""A stage as a process: the lock, one line for a user's mistake, the exit code, and its timing."""

from __future__ import annotations

import errno
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from panda_ad.errors import UserError, told
from panda_ad.system.files import write_json
from panda_ad.system.lock import repository_lock
from panda_ad.system.paths import BUILD


def run_stage(name: str, main: Callable[..., None]) -> NoReturn:
    """Run a stage's `main` and end the process with its exit code.

    `main` is called with the category if the command line gives one. The stage's timing is left in
    build/timings. A user's mistake ends as one line on standard error.
    """
    status = _run(name, main)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(
        status
    )  # outputs are closed and renamed; taking torch's modules apart would cost each stage most of a second


def _run(name: str, main: Callable[..., None]) -> int:
    category = sys.argv[1] if len(sys.argv) > 1 else None
    label = f"{name}{f' {category}' if category else ''}"
    start = time.perf_counter()
    try:
        with repository_lock(f"stage {label.replace(' ', '@', 1)}"):
            main(*([category] if category else []))
        peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024
        timing = {
            "stage": name,
            "category": category,
            "seconds": round(time.perf_counter() - start, 2),
            "peak_mb": round(peak),
        }
        write_json(BUILD / "timings" / f"{name}{f'-{category}' if category else ''}.json", timing)
    except UserError as e:
        print(f"panda-ad: {label}: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        print(f"panda-ad: {label}: stopped; the next run starts this stage again", file=sys.stderr)
        return 130
    except Exception as e:
        # safetensors and faiss have exceptions of their own for it
        if getattr(e, "errno", None) == errno.ENOSPC or "No space left on device" in str(e):
            where = getattr(e, "filename", None) or BUILD
            print(f"panda-ad: {label}: no space left on the disk ({where}); free some and run again", file=sys.stderr)
            return UserError.exit_code
        if isinstance(e, OSError) and e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            print(f"panda-ad: {label}: {told(e)}", file=sys.stderr)
            return UserError.exit_code
        traceback.print_exc()
        return 1
    return 0
