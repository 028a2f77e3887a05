# SPDX-License-Identifier: Apache-2.0
"""Intervals of the figures in metrics.json, in a file of their own: DVC and MLflow would show each end as a metric."""

from __future__ import annotations

import json
from pathlib import Path

Intervals = dict[str, tuple[float, float]]
"""Name of a figure in metrics.json -> (low, high) at `evaluate.confidence`."""


def read_intervals(folder: Path) -> Intervals:
    """Read the intervals beside a category's metrics.json.

    Parameters
    ----------
    folder : build/evaluation/<category>, or a folder with the run's artifact intervals.json.

    Returns
    -------
    Empty where the file is missing: evaluations of before it have none.
    """
    path = folder / "intervals.json"
    if not path.exists():
        return {}
    return {name: (low, high) for name, (low, high) in json.loads(path.read_text(encoding="utf-8")).items()}
