# SPDX-License-Identifier: Apache-2.0
"""How many processor cores this process may use, and work done side by side on them."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

_CGROUP = Path("/sys/fs/cgroup")
_worker = threading.local()


@cache
def cores() -> int:
    """Return the number of cores: those of the process's affinity, within the container's quota, at least one.

    `OMP_NUM_THREADS`, which people set to share a machine, is an upper limit.
    """
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    limits = [own, quota(_CGROUP), int(asked) if asked.isdecimal() else math.inf]
    return max(1, math.ceil(min(limits)))


def quota(folder: Path) -> float:
    """Return the cores that a control group's quota comes to (version 2 or 1); infinity without one."""
    try:
        if (folder / "cpu.max").exists():
            allowed, period = (folder / "cpu.max").read_text().split()
        else:
            allowed, period = ((folder / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return float(allowed) / float(period) if float(allowed) > 0 else math.inf
    except (OSError, ValueError):
        return math.inf


def one_blas_thread() -> None:
    """Have NumPy's matrix products stay in the thread that calls them, whoever loaded NumPy, and however.

    The last bits of a product depend on how it was divided among threads, and with them, where two rows are equally
    near, which is nearest. OPENBLAS_NUM_THREADS says the same, but only to who imports this package before NumPy.
    """
    from threadpoolctl import ThreadpoolController

    for library in ThreadpoolController().lib_controllers:
        if library.internal_api == "openblas" and library.threading_layer == "pthreads":  # faiss's own uses OpenMP
            library.set_num_threads(1)


def side_by_side(function: Callable[[T], R], items: Iterable[T], start: Callable[[], None] | None = None) -> list[R]:
    """Apply a function to each item, in threads of their own where there are several, and return the results in order.

    Called by one of those threads, or for one item, it stays in the thread: work is divided once.

    Parameters
    ----------
    start : called first in each thread.
    """
    items = list(items)
    count = 1 if getattr(_worker, "busy", False) else min(cores(), len(items))
    if count <= 1:
        return [function(item) for item in items]

    def begin() -> None:
        _worker.busy = True
        if start is not None:
            start()

    with ThreadPoolExecutor(count, initializer=begin) as pool:
        return list(pool.map(function, items))
