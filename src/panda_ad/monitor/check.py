# SPDX-License-Identifier: Apache-2.0
"""A category's recent window against its model's calibration images, with a report.

This is what `panda-ad monitor` and the flow do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from panda_ad.errors import UserError
from panda_ad.monitor.drift import Drift, Sample, TooFew, find_drift
from panda_ad.monitor.log import LOG, Window, read_window
from panda_ad.monitor.report import write_report
from panda_ad.params import Params, load_params
from panda_ad.registry.load import Model, load_model
from panda_ad.registry.monitoring import record_check
from panda_ad.registry.names import model_name
from panda_ad.scoring.detector import Detector
from panda_ad.system.files import write_json

REPORTS = Path("monitoring/reports")
DRIFT_FOUND = 5
"""Exit code of `panda-ad monitor` where a category has drifted."""


@dataclass(frozen=True)
class Check:
    """What was found in a category's window.

    Attributes
    ----------
    model, version : registered name and number.  checked : when, UTC.
    report, data : files: the HTML page, and the findings with every figure as JSON.
    note : '' or what the registry says of how the version came to its alias.
    """

    category: str
    model: str
    version: str
    checked: datetime
    drift: Drift
    report: Path
    data: Path
    note: str = ""

    def __str__(self) -> str:
        note = f"; {self.note}" if self.note else ""
        by = f"{self.model} version {self.version}{note}, {self.drift.window} images; {self.report}"
        return f"{self.category}: {self.drift.headline} ({by})"

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        names = {
            "category": self.category,
            "model": self.model,
            "version": self.version,
            "checked": self.checked.isoformat(),
            "note": self.note,
        }
        return names | self.drift.to_dict()


def chosen_categories(wanted: Sequence[str], params: Params) -> list[str]:
    """`wanted`, or all categories where it is empty. UserError where one is not in params.yaml."""
    if unknown := [c for c in wanted if c not in params.categories]:
        raise UserError(
            f"categories: {', '.join(unknown)} not in params.yaml, which has {', '.join(params.categories)}"
        )
    return list(wanted or params.categories)


def model_at(category: str, alias: str, params: Params) -> Model:
    """Return the registered model that a category's alias points at; raise UserError if there is none."""
    return load_model(f"models:/{model_name(params.dataset, category)}@{alias}", None)


def reference_of(detector: Detector) -> Sample:
    """Return the calibration images of a model; raise UserError if its bundle is from before monitoring."""
    if detector.reference is None:
        name = detector.config.category
        raise UserError(
            f"category {name}: this version keeps no calibration images to compare with; "
            f"run `dvc repro` and `panda-ad promote -c {name}`"
        )
    known = detector.reference
    return Sample(detector.calibration, known.statistics.astype(np.float64), known.features.astype(np.float32))


def check_category(
    category: str, alias: str = "staging", log: Path = LOG, reports: Path = REPORTS, params: Params | None = None
) -> Check:
    """Compare the newest images that the version at `alias` has scored with its calibration images.

    The report and the figures are written. Images that the version was made from do not count: it has seen them, and to
    it they look more normal than others.

    Raises
    ------
    TooFew
        The log has fewer images of that version than `monitor.min_images`.
    UserError
        No such version, its bundle keeps no reference, or the log is damaged.
    """
    params = params or load_params()
    model = model_at(category, alias, params)
    reference = reference_of(model.detector)
    window = read_window(
        category, model.name, model.version, last=params.monitor.window, log=log, without=model.detector.seen
    )
    rate = float(model.detector.config.false_alarm_rate)
    try:
        drift = find_drift(reference, window.sample, rate, params.monitor, params.seed)
    except TooFew as e:
        raise TooFew(f"{model.name} version {model.version}: {e}") from None
    return _written(category, model, drift, reference, window, rate, reports)


def _written(
    category: str, model: Model, drift: Drift, reference: Sample, window: Window, rate: float, reports: Path
) -> Check:
    checked = datetime.now(UTC)
    check = Check(
        category,
        model.name,
        model.version,
        checked,
        drift,
        reports / f"{category}.html",
        reports / f"{category}.json",
        model.note,
    )
    write_report(check.report, drift, reference, window, rate, checked)
    write_json(check.data, check.to_dict())
    return check


def record(check: Check, dataset: str) -> None:
    """Log report and figures to MLflow and tag the version; UserError if MLflow does not answer."""
    record_check(dataset, check.model, check.version, check.to_dict(), [check.report, check.data])


def monitor(categories: Sequence[str], alias: str = "staging") -> tuple[list[Check], list[str]]:
    """Call `check_category` and `record` for each category.

    Return what was found, and one line for each that could not be checked.
    """
    params = load_params()
    checks, problems = [], []
    for category in chosen_categories(categories, params):
        try:
            check = check_category(category, alias, params=params)
            checks.append(check)
            record(check, params.dataset)
        except UserError as e:
            problems.append(str(e))
        except Exception as e:  # what nobody foresaw in one category says nothing of the others
            problems.append(
                f"category {category}: could not be checked ({type(e).__name__}: {' '.join(str(e).split())[:300]})"
            )
    return checks, problems
