# SPDX-License-Identifier: Apache-2.0
"""What a person should know of a version that keeps the gate's rules. Pure functions of the evaluation's figures."""

from __future__ import annotations

from collections.abc import Mapping

_CAUGHT = 0.5
"""Share of the test set's defects; less is worth a caution."""
_CHANCE = 0.6
"""Image AUROC; an interval that reaches below it does not tell the model from a coin."""
_FEW = 5
"""Test images of a kind, good or defective; with fewer, the figures say little."""


def cautions(metrics: Mapping[str, float], budget: float) -> list[str]:
    """Return a clause for each figure that the floors let pass and that hardly serves an inspection.

    Parameters
    ----------
    metrics : of `evaluate`: recall, false_alarm_rate, image_auroc with its interval, test_good, test_defect.
        Each may be missing.
    budget : the share of good parts that may raise an alarm.
    """
    found = []
    good, defects = metrics.get("test_good", 0), metrics.get("test_defect", 0)
    caught, alarms, auroc = metrics.get("recall"), metrics.get("false_alarm_rate"), metrics.get("image_auroc")
    if defects and caught is not None and caught < _CAUGHT:
        found.append(f"it catches {_percent(caught)} of the test set's defects")
    if good and alarms is not None and alarms > 2 * budget and alarms * good > 1.5:
        found.append(f"it alarms on {_percent(alarms)} of the good test images where {_percent(budget)} are promised")
    low, high = metrics.get("image_auroc_low"), metrics.get("image_auroc_high")
    if auroc is not None and low is not None and low < _CHANCE:
        found.append(f"image AUROC {auroc:.3f} [{low:.3f}, {high:.3f}] is hardly told from chance")
    return found + (_small(int(good), int(defects)) if "test_good" in metrics or "test_defect" in metrics else [])


def _small(good: int, defects: int) -> list[str]:
    """Return what so few test images leave unknown."""
    found = []
    if not good:
        found.append("there are no good test images: its false alarms have not been measured")
    if not defects:
        found.append("there are no defective test images: what it catches has not been measured")
    few = [f"{n} {kind} image{'s' * (n > 1)}" for n, kind in ((good, "good"), (defects, "defective")) if 0 < n < _FEW]
    if few:
        found.append(f"the test set has only {' and '.join(few)}, so its figures say little")
    return found


def promise(metrics: Mapping[str, float], budget: float) -> str:
    """Say what is promised of false alarms, and of what.

    Parameters
    ----------
    metrics : of `evaluate`: sessions, within_sessions_rate and unseen_session_rate with their intervals; without
        sessions none of them.
    budget : the share of good parts that may raise an alarm.
    """
    if not metrics.get("sessions"):
        return (
            f"{_percent(budget)} false alarms on parts photographed as those of the training were; what another shift, "
            "lot or camera brings is not known (data.sessions tells them apart)"
        )
    said = []
    for key, where in (("within_sessions_rate", "within sessions"), ("unseen_session_rate", "on a session never seen")):
        low, high = metrics.get(f"{key}_low", 0.0), metrics.get(f"{key}_high", 1.0)
        said.append(f"{where} {_percent(metrics[key], 2)} [{100 * low:.2g}, {100 * high:.2g}]")
    return f"false alarms {', '.join(said)}, by {metrics['sessions']:.0f} sessions"


def _percent(share: float, digits: int = 3) -> str:
    return f"{100 * share:.{digits}g} %"
