# SPDX-License-Identifier: Apache-2.0
"""Has what a category's model sees changed: the alarms, their record, a report.

This is what `panda-ad monitor` and the flow do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from panda_ad.errors import UserError
from panda_ad.monitor.alarms import PROMISE, Alarm, Status, acknowledge, add, moment, read_status, recording
from panda_ad.monitor.budget import audit_version
from panda_ad.monitor.drift import Drift, Sample, TooFew
from panda_ad.monitor.judge import Look, judge
from panda_ad.monitor.log import LOG, read_window
from panda_ad.monitor.promise import confirmed_verdicts
from panda_ad.monitor.report import write_report
from panda_ad.monitor.stream import Stream, read_stream
from panda_ad.params import Params
from panda_ad.params_file import load_params
from panda_ad.registry.load import Model, load_model
from panda_ad.registry.monitoring import record_check, record_promise
from panda_ad.registry.names import model_name
from panda_ad.scoring.detector import Detector
from panda_ad.system.files import write_json

LEARNED = 8
"""A version knows a change if at least so many of the images since then are among those that it was made from."""
REPORTS = Path("monitoring/reports")
DRIFT_FOUND = 5
"""Exit code of `panda-ad monitor` where a category has a new alarm."""


@dataclass(frozen=True)
class Check:
    """What was found in a category's images.

    Attributes
    ----------
    model, version : registered name and number.  checked : when, UTC.
    drift : the tests of the images since the change, or of the newest, against the reference.
    alarms : that this check has raised.  open : all that have not ended, these among them.
    ended : that this check found to have ended.
    evidence : of the sequential tests, by what is watched.
    report, data : files: the HTML page, and the findings with every figure as JSON.
    note : '' or what the registry says of how the version came to its alias.
    """

    category: str
    model: str
    version: str
    checked: datetime
    drift: Drift
    alarms: Sequence[Alarm]
    open: Sequence[Alarm]
    ended: Sequence[Alarm]
    evidence: Mapping[str, float]
    report: Path
    data: Path
    note: str = ""

    @property
    def findings(self) -> list[str]:
        """What the new alarms say, in plain words; empty without one."""
        return [finding for alarm in self.alarms for finding in alarm.findings]

    @property
    def headline(self) -> str:
        """One line: 'no drift in 200 images', or the alarms; those of before are open until they have ended."""
        said = [f"drift: {alarm}" for alarm in self.alarms]
        said += [f"no new drift; open: {alarm}" for alarm in self.open if alarm not in self.alarms]
        said += [f"over: {'; '.join(alarm.findings)} ({alarm.end})" for alarm in self.ended]
        return "; ".join(said) or f"no drift in {self.drift.window} images"

    def __str__(self) -> str:
        note = f"; {self.note}" if self.note else ""
        by = f"{self.model} version {self.version}{note}, {self.drift.window} images; {self.report}"
        return f"{self.category}: {self.headline} ({by})"

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        names = {
            "category": self.category,
            "model": self.model,
            "version": self.version,
            "checked": self.checked.isoformat(),
            "note": self.note,
            "drifted": bool(self.alarms),
            "headline": self.headline,
            "findings": self.findings,
            "since": min((alarm.since for alarm in self.alarms), default=None),
            "open": [asdict(alarm) for alarm in self.open],
            "ended": [asdict(alarm) for alarm in self.ended],
            "evidence": dict(self.evidence),
        }
        return self.drift.to_dict() | names


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
    category: str,
    alias: str = "staging",
    log: Path = LOG,
    reports: Path = REPORTS,
    params: Params | None = None,
    good: Mapping[str, str] | None = None,
) -> Check:
    """Test the images logged since the last change, or since the version at `alias` is in use, for another one.

    A change is an alarm, once: it goes on record, and from then on images are compared with those since the change.
    The report and the figures are written. Images that the version was made from do not count: it has seen them, and to
    it they look more normal than others.

    Parameters
    ----------
    good : sha256 of the images of parts that were confirmed good -> session, or ''. With them a false-alarm rate that
        is certainly above the promised one is an alarm too, once per version.

    Raises
    ------
    TooFew
        The log has fewer images of that version than `monitor.min_images`.
    UserError
        No such version, its bundle keeps no reference, or the log or the record of alarms is damaged.
    """
    params = params or load_params()
    model = model_at(category, alias, params)
    calibration = reference_of(model.detector)
    with recording(category):
        stream = read_stream(category, model.name, model.version, model.detector.seen, log)
        count = int((stream.own & ~stream.seen).sum())
        if not count:
            read_window(category, model.name, model.version, 1, log, model.detector.seen)  # says what is missing
        if count < params.monitor.min_images:
            needed = f"{params.monitor.min_images} are needed (monitor.min_images); score more"
            raise TooFew(f"{model.name} version {model.version}: {count} images in the log, {needed}")
        earlier = read_status(category)
        end_alarms(category, alias, model, stream, earlier)
        found = judge(category, model, calibration, Look(stream, read_status(category), log), params)
        if found.facts:
            add(category, found.kind, {**found.facts, "alias": alias})
        if good:
            judge_promise(category, alias, model, good, log, 1 - params.monitor.significance)
        status = read_status(category)
    known = {alarm.number for alarm in earlier.alarms}
    were_open = {alarm.number for alarm in earlier.open}
    check = Check(
        category,
        model.name,
        model.version,
        datetime.now(UTC),
        found.drift,
        [a for a in status.alarms if a.number not in known],
        status.open,
        [a for a in status.alarms if a.number in were_open and a.end],
        {name: e.value for name, e in found.evidence.items()},
        reports / f"{category}.html",
        reports / f"{category}.json",
        model.note,
    )
    write_report(check, found, float(model.detector.config.false_alarm_rate))
    write_json(check.data, check.to_dict())
    return check


def judge_promise(
    category: str, alias: str, model: Model, good: Mapping[str, str], log: Path, confidence: float
) -> None:
    """Raise an alarm where the version in place has alarmed on more good parts than it promised; once per version.

    What it met is left on the registered version, where the gate finds it.
    """
    _, own = confirmed_verdicts(category, model.name, good, {model.version: model.detector.seen}, log)
    audit = audit_version(category, model, (alias,), own[model.version], confidence)
    record_promise(model.name, model.version, audit.found.alarms, audit.found.images, audit.verdict)
    this = model.name, model.version
    said = [a for a in read_status(category).alarms if a.about_promise and (a.model, a.version) == this]
    if audit.broken and not said:
        facts = {"since": f"{audit.verdicts.times[0]}+00:00", "findings": [PROMISE], "images": audit.found.images}
        add(category, "alarm", facts | {"model": model.name, "version": model.version, "alias": alias})


def end_alarms(category: str, alias: str, model: Model, stream: Stream, status: Status) -> None:
    """Record the end of alarms that the version in place has answered.

    A change has been learned where the version was trained on enough of the images since then. What a version has
    promised ends with it.
    """
    for alarm in status.open:
        if alarm.about_promise:
            if alarm.alias == alias and (alarm.model, alarm.version) != (model.name, model.version):
                add(category, "replaced", {"alarm": alarm.number, "version": model.version})
            continue
        images = int((stream.seen & (stream.times >= moment(alarm.since))).sum())
        if images >= LEARNED:
            add(category, "retrained", {"alarm": alarm.number, "version": model.version, "images": images})


def acknowledge_alarms(categories: Sequence[str], reason: str = "") -> list[str]:
    """End the open alarms of categories (none given: of all that have any), and say of each how it ended.

    Raises
    ------
    UserError
        No alarm is open, or one of the categories is not in params.yaml.
    """
    chosen = chosen_categories(categories, load_params())
    ready = [c for c in chosen if categories or read_status(c).open]
    if not ready:
        raise UserError("no alarm is open, nothing to acknowledge")
    ended = [(c, alarm) for c in ready for alarm in acknowledge(c, reason)]
    return [f"{c}: {alarm}: {alarm.end}" for c, alarm in ended]


def record(check: Check, dataset: str) -> None:
    """Log report and figures to MLflow and tag the version; UserError if MLflow does not answer."""
    record_check(dataset, check.model, check.version, check.to_dict(), [check.report, check.data])


def monitor(
    categories: Sequence[str], alias: str, confirmed: Callable[[Params, str], Mapping[str, str]]
) -> tuple[list[Check], list[str]]:
    """Call `check_category` and `record` for each category.

    Parameters
    ----------
    confirmed : returns the images of a category's parts that a person called good.

    Return what was found, and one line for each that could not be checked.
    """
    params = load_params()
    checks, problems = [], []
    for category in chosen_categories(categories, params):
        try:
            check = check_category(category, alias, params=params, good=confirmed(params, category))
            checks.append(check)
            record(check, params.dataset)
        except UserError as e:
            problems.append(str(e))
        except Exception as e:  # what nobody foresaw in one category says nothing of the others
            problems.append(
                f"category {category}: could not be checked ({type(e).__name__}: {' '.join(str(e).split())[:300]})"
            )
    return checks, problems
