# SPDX-License-Identifier: Apache-2.0
"""The model card: what a version is, written from facts at hand only. The text is card.md.j2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from panda_ad.params import plain_name
from panda_ad.registry.cautions import cautions, promise
from panda_ad.registry.lineage import Origin, commands

TITLES = {
    "image_auroc": "image AUROC",
    "average_precision": "average precision",
    "fpr_at_95_tpr": "false alarms where 95 % of defects are found",
    "pixel_auroc": "pixel AUROC",
    "au_pro": "AU-PRO (to 30 % false positives)",
    "pixel_f1": "best pixel F1",
    "recall": "defects found at the threshold",
    "false_alarm_rate": "false alarms at the threshold",
}
"""Figures that people read, with their names in words."""


@dataclass(frozen=True)
class CardFacts:
    """What a card says.

    Attributes
    ----------
    bundle : content of bundle.json.  figures : of the evaluation, intervals among them; at a level of `confidence`.
    counts : images per split and kind, e.g. {'train': 96, 'calibration': 24, 'test good': 30, 'test crack': 12}.
    """

    bundle: Mapping[str, Any]
    figures: Mapping[str, float]
    counts: Mapping[str, int]
    size_mb: float
    confidence: float


def model_card(name: str, version: str, origin: Origin, facts: CardFacts) -> str:
    """Return Markdown for the version's page."""
    rate = float(facts.bundle.get("false_alarm_rate", 0.0))
    provenance = facts.bundle.get("provenance", {})
    tests = [f"{n} {kind.removeprefix('test ')}" for kind, n in facts.counts.items() if kind.startswith("test ")]
    return _template().render(
        name=name,
        version=version,
        bundle=facts.bundle,
        provenance=provenance,
        figures=facts.figures,
        titles=TITLES,
        confidence=facts.confidence,
        cautions=cautions(facts.figures, rate),
        promise=promise(facts.figures, rate),
        folder=plain_name(str(facts.bundle.get("category", ""))),
        counts=facts.counts,
        calibration=provenance.get("calibration_images", facts.counts.get("calibration", 0)),
        held=facts.counts.get("calibration", 0),
        test=", ".join(tests),
        size_mb=facts.size_mb,
        rate=rate,
        facts=origin,
        commands=commands(name, version, origin),
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=False, keep_trailing_newline=True)  # Markdown, shown as text by MLflow
    environment.filters["percent"] = lambda share: f"{100 * share:.3g} %"
    return environment.from_string(Path(__file__).with_name("card.md.j2").read_text(encoding="utf-8"))
