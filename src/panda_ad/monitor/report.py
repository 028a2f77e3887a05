# SPDX-License-Identifier: Apache-2.0
"""The drift report: one HTML page that opens offline, with the verdict, the tests and the figures over time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from panda_ad.features.image_statistics import STATISTICS
from panda_ad.monitor.alarms import PROMISE
from panda_ad.monitor.drift import Sample
from panda_ad.monitor.judge import Judgement
from panda_ad.monitor.window import Window
from panda_ad.report.page import render
from panda_ad.system.files import write_text

if TYPE_CHECKING:
    from panda_ad.monitor.check import Check

SCRIPTS = ("vendor/uPlot.iife.min.js", "charts.js", "monitor.js")
NAMES = {
    "alarms": "alarms",
    "scores": "scores",
    "content": "content",
    "red_green": "red against green",
    "yellow_blue": "yellow against blue",
}
"""Words for tests and statistics whose name is not one."""
ADVICE = {
    "darker": "lamp, exposure, shutter, dirt on the window",
    "brighter": "lamp, exposure, shutter, daylight",
    "lower contrast": "stray light, fog on the lens, background",
    "higher contrast": "stray light, background",
    "out of focus": "focus, distance, vibration, dirt on the lens",
    "sharper or noisier": "gain, exposure time, a resizing step",
    **dict.fromkeys(
        (f"color cast towards {c}" for c in ("red", "green", "yellow", "blue")), "lamp’s age, white balance, daylight"
    ),
    **dict.fromkeys(("paler colors", "stronger colors"), "lamp’s age, white balance, material"),
    "content has changed while light, focus and color have not": "another product, position or background",
    "more images score as defects": "the parts, then the other findings",
    PROMISE: "`panda-ad audit`: in which sessions; then retrain with images of those",
    **dict.fromkeys(
        ("scores are higher", "scores are lower"), "the other findings; alone, a slow change of the product"
    ),
}
"""Where to look first, by finding, as in docs/operation.md."""
BAND = (0.05, 0.5, 0.95)
"""Quantiles of the calibration images that the plots show."""


def write_report(check: Check, found: Judgement, rate: float) -> None:
    """Write the page of a check atomically.

    Parameters
    ----------
    found : what the check rests on.  rate : false-alarm budget.
    """
    write_text(check.report, build_report(check, found, rate))


def build_report(check: Check, found: Judgement, rate: float) -> str:
    """Return the page as HTML."""
    window = found.window
    group = max(10, len(window) // 20)
    times = [str(t)[:19].replace("T", " ") for t in window.times]
    return render(
        "monitor.html.j2",
        SCRIPTS,
        _data(found.reference, window, rate, group, times),
        check=check,
        found=found,
        drift=found.drift,
        window=window,
        statistics=STATISTICS,
        names={s.name: s.name for s in STATISTICS} | NAMES,
        advice=ADVICE,
        group=group,
        rate=rate,
        first=times[0],
        last=times[-1],
        checked=f"{check.checked:%Y-%m-%d %H:%M} UTC",
    )


def _data(reference: Sample, window: Window, rate: float, group: int, times: list[str]) -> dict[str, Any]:
    """Return what the page's script reads."""
    figures = {"score": _figure(reference.scores, window.sample.scores)}
    for i, statistic in enumerate(STATISTICS):
        figures[statistic.name] = _figure(reference.statistics[:, i], window.sample.statistics[:, i])
    ends = [*range(group, len(window), group), len(window)]
    return {
        "threshold": window.threshold,
        "rate": rate,
        "calibration": reference.scores.tolist(),
        "scores": window.sample.scores.tolist(),
        "alarms": [
            {"until": end, "share": float(window.alarms[start:end].mean())}
            for start, end in zip([0, *ends], ends, strict=False)
        ],
        "times": times,
        "paths": window.paths,
        "figures": figures,
    }


def _figure(reference: np.ndarray, window: np.ndarray) -> dict[str, list[float]]:
    return {"values": [float(f"{v:.5g}") for v in window], "band": np.quantile(reference, BAND).tolist()}
