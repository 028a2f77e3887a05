# SPDX-License-Identifier: Apache-2.0
"""The version in place with another threshold: a version of its own, through the gate.

Scores stay as they are. The new bundle differs in the false-alarm rate and the threshold that follows from it. The new
run holds the old one's files, with the parameter and the figures that depend on the threshold changed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from panda_ad.errors import UserError
from panda_ad.evaluation.image_metrics import binomial_interval
from panda_ad.params import plain_name
from panda_ad.params_file import load_params, read_yaml
from panda_ad.registry.evidence import score_table
from panda_ad.registry.new_version import Successor, succeed, version_to_change
from panda_ad.registry.promote import Decision
from panda_ad.scoring.bundle import load_bundle
from panda_ad.scoring.refit import with_provenance
from panda_ad.system.files import write_json


def set_threshold(category: str, rate: float) -> Decision:
    """Register the version at @staging with another false-alarm rate, and put it there if the gate lets it through.

    Parameters
    ----------
    rate : share of good parts that may raise an alarm, in (0, 1).

    Returns
    -------
    The gate's decision, 'promoted' or 'refused' with its rules. A refused version stays registered, as any other.

    Raises
    ------
    UserError
        Unknown category, no version in place, it has that rate already, or MLflow does not answer.
    """
    params = load_params()
    if not 0 < rate < 1:
        raise UserError(f"{category}: a rate between 0 and 1 is expected, found {rate}")
    with version_to_change(params, category, f"set threshold of {category}") as held:
        before = float(held.version.tags["panda.budget"])
        if before == rate:
            raise UserError(f"{held.model.name} version {held.number}: its false-alarm rate is {rate:.4g} already")
        detector = load_bundle(held.bundle, rate)
        same = [*detector.config.provenance.get("scores_of_versions", []), held.number]
        new = Successor(
            with_provenance(detector, {"scores_of_versions": same}),
            f"verdict.false_alarm_rate={rate!r}",
            "panda-ad inspect",
            f"Version {held.number} with false-alarm rate {rate:.4g} in place of {before:.4g}.",
            f"false-alarm rate {before:.4g} to {rate:.4g}",
            {"verdict.false_alarm_rate": rate},
            {"panda.budget": repr(rate)},
        )
        limit = detector.threshold().value

        def rewrite(folder: Path) -> None:
            _change_params(folder / "params.yaml", rate)
            _change_figures(folder / plain_name(category), limit, params.evaluate.confidence)

        return succeed(held, new, rewrite)


def _change_params(path: Path, rate: float) -> None:
    values = read_yaml(path.read_text(encoding="utf-8")) or {} if path.exists() else {}
    if "verdict" in values:
        values["verdict"]["false_alarm_rate"] = rate
        path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _change_figures(folder: Path, limit: float, confidence: float) -> None:
    """Compute recall and false alarms at another threshold, with their intervals, as `evaluation.figures` does."""
    table = score_table((folder / "scores.csv").read_bytes())
    table["anomalous"] = table["score"] > limit
    table.to_csv(folder / "scores.csv", index=False)
    figures: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    intervals: dict[str, Any] = {}
    if (folder / "intervals.json").exists():
        intervals = json.loads((folder / "intervals.json").read_text(encoding="utf-8"))
    figures["threshold"] = limit
    for name, label in (("false_alarm_rate", 0), ("recall", 1)):
        chosen = table["score"][table["label"] == label]
        if len(chosen):
            alarms = int((chosen > limit).sum())
            figures[name] = alarms / len(chosen)
            intervals[name] = binomial_interval(alarms, len(chosen), confidence)
    write_json(folder / "metrics.json", figures)
    write_json(folder / "intervals.json", intervals)
