# SPDX-License-Identifier: Apache-2.0
"""One look at a category's images: the sequential tests, then the tests by name of the images since the change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from panda_ad.monitor.alarms import State, Status
from panda_ad.monitor.drift import Drift, Sample, find_drift
from panda_ad.monitor.log import read_window
from panda_ad.monitor.sequence import Evidence, limit_of
from panda_ad.monitor.stream import Stream
from panda_ad.monitor.watch import (
    SHARES,
    Change,
    Reference,
    as_before,
    find_change,
    find_content_change,
    newest_block,
    reference_images,
    watch,
)
from panda_ad.monitor.window import Window
from panda_ad.params import Params
from panda_ad.registry.load import Model

FEW = 4
"""Fewer images since a change are not tested by name; what has changed is known from the sequential tests."""
COMPARED = 1000
"""Newest reference images, scored by the version, whose features are read."""


@dataclass(frozen=True)
class Look:
    """What there is to look at: a category's logged images, what its record of alarms comes to, and the log."""

    stream: Stream
    status: Status
    log: Path


@dataclass(frozen=True)
class Judgement:
    """What was found.

    Attributes
    ----------
    kind, facts : of the record to be added; without facts there is nothing to record.
    drift : the tests by name; without any where too few images came after the reference.
    reference, window : the images that they compare, or else the newest.
    evidence : of the sequential tests.  limit : from which it counts.
    compared_with : the reference in words.
    """

    kind: str
    facts: Mapping[str, Any]
    drift: Drift
    reference: Sample
    window: Window
    evidence: Mapping[str, Evidence]
    limit: float
    compared_with: str


def judge(category: str, model: Model, calibration: Sample, look: Look, params: Params) -> Judgement:
    """Find out whether a category's images have changed, and in what."""
    limits, rate = params.monitor, float(model.detector.config.false_alarm_rate)
    reference = _reference(look, look.status.state, calibration, params)
    evidence = watch(reference, params.seed)
    block = newest_block(reference, limits.window)
    logged = _logged(category, model, look, reference, block, limits.window)
    sample = _sample(reference, calibration, look, logged)
    change = find_change(reference, evidence, rate, limits)
    if change is None and len(block):
        features = logged.of(reference.tested.sha256[block]).sample.features
        change = find_content_change(reference, (sample.features, features), limits, params.seed)
    drift, window = _by_name(reference, sample, logged, change, params, rate)
    kind = ""
    facts: dict[str, Any] = {}
    if change is not None:
        kind, facts = _record(look, change, reference, calibration, params, rate, drift)
        facts |= {"model": model.name, "version": model.version}
    least = limit_of(limits.significance, limits.window, SHARES)
    return Judgement(kind, facts, drift, sample, window, evidence, least, _words(reference, look))


def _by_name(
    reference: Reference, sample: Sample, logged: Window, change: Change | None, params: Params, rate: float
) -> tuple[Drift, Window]:
    """Return the tests by name of the images since the change, or else of the newest, and these images."""
    limits = params.monitor
    recent = reference.scored if change is None else reference.scored[reference.scored >= change.first]
    least = limits.min_images if change is None else FEW
    if len(recent) < least or len(sample) < FEW:
        newest = logged.last(limits.window)
        return Drift([], [], len(sample), len(newest)), newest
    window = logged.of(reference.tested.sha256[recent[-limits.window :]])
    limits = limits.model_copy(update={"min_images": least})
    return find_drift(sample, window.sample, rate, limits, params.seed), window


def _record(
    look: Look,
    change: Change,
    reference: Reference,
    calibration: Sample,
    params: Params,
    rate: float,
    drift: Drift,
) -> tuple[str, dict[str, Any]]:
    """Return what goes on record of a change: an alarm, or that images are again as before the open one."""
    since, alarm = f"{change.since}+00:00", look.status.open_change
    before = _reference(look, look.status.before, calibration, params)
    if alarm is not None and as_before(before, reference, change, rate, params.monitor):
        return "as before", {"alarm": alarm.number, "since": since}
    return "alarm", {
        "since": since,
        "findings": list(dict.fromkeys([*drift.findings, *change.findings])),
        "shifts": {t.name: t.shift for t in change.tests},
        "images": len(reference.tested) - change.first,
    }


def _words(reference: Reference, look: Look) -> str:
    state = look.status.state
    if reference.images is None:
        return f"{len(reference.statistics)} calibration images"
    return (
        f"{len(reference.statistics)} images logged since the change of {str(state.since)[:16].replace('T', ' ')} UTC"
    )


def _reference(look: Look, state: State, calibration: Sample, params: Params) -> Reference:
    known = calibration.statistics, calibration.scores
    return reference_images(look.stream, state, known, params.monitor.min_images)


def _logged(category: str, model: Model, look: Look, reference: Reference, block: np.ndarray, window: int) -> Window:
    """Return the verdicts, features among them, of all images that may be tested by name."""
    newest = look.stream.sha256[look.stream.own & ~look.stream.seen][-window:]
    wanted = (
        set(newest) | set(reference.tested.sha256[reference.scored[-COMPARED:]]) | set(reference.tested.sha256[block])
    )
    if reference.images is not None:
        wanted |= set(look.stream.sha256[reference.images[-COMPARED:]])
    return read_window(category, model.name, model.version, log=look.log, only={str(key) for key in wanted})


def _sample(reference: Reference, calibration: Sample, look: Look, logged: Window) -> Sample:
    """Return the reference images as the tests by name take them."""
    if reference.images is None:
        return calibration
    features = logged.of(look.stream.sha256[reference.images[-COMPARED:]]).sample.features
    return Sample(reference.scores[-COMPARED:], reference.statistics, features)
