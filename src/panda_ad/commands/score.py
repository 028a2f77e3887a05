# SPDX-License-Identifier: Apache-2.0
"""`panda-ad score`: verdicts for image files, streamed in small batches."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO

import numpy as np

from panda_ad.commands.overlay import save_overlay
from panda_ad.data.damage import doubt
from panda_ad.data.data_warnings import narrow_range
from panda_ad.data.images import Decoding, batches, picture, pixel_count, read_bytes
from panda_ad.data.listing import describe, find_images, no_images, one_line, settled
from panda_ad.data.quarantine import plain_stem
from panda_ad.errors import UserError
from panda_ad.registry.load import Model, load_model
from panda_ad.scoring.detector import Detector
from panda_ad.scoring.verdict import Verdict
from panda_ad.system.cores import cores, side_by_side
from panda_ad.system.files import atomic_file

if TYPE_CHECKING:
    from panda_ad.monitor.record import Recorder

COLUMNS = ("path", "score", "p_value", "decision", "threshold", "whole_image", "worst_spot", "x0", "y0", "x1", "y1")
"""Of the CSV; a file that cannot be read has a row of its path and the decision `unreadable`."""
_NAMED = 3
_SETTLE_SECONDS = 5.0


class Judged(NamedTuple):
    """One file: its pixels, uint8 (H, W, 3), and verdict, or why there is none.

    `doubt` says that it is only part of a picture, or is ''; `values` are the smallest and largest of 16-bit gray.
    """

    file: Path
    pixels: np.ndarray | None
    verdict: Verdict | None
    problem: str
    doubt: str
    values: tuple[int, int] | None = None


@dataclass(frozen=True)
class Scored:
    """What became of a set of files.

    Attributes
    ----------
    images : scored.
    alarms : how many of these were called defect.
    logged : left out, since the log holds their verdict of this version.
    problems : one line per file that could not be read.
    warnings : one line per image that may be damaged, and per output that could not be written.
    """

    images: int
    alarms: int
    logged: int
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def verdicts(detector: Detector, files: list[Path], heatmaps: bool = False) -> Iterator[Judged]:
    """Judge files, in order."""
    from tqdm import tqdm

    decoding = Decoding.of(detector.config)
    with tqdm(total=len(files), desc="score", unit="img", disable=None) as bar:
        for batch in batches(files, pixel_count):
            opened = side_by_side(lambda file: _read(file, decoding), batch)
            found = iter(detector.score([judged.pixels for judged in opened if judged.pixels is not None], heatmaps))
            for judged in opened:
                yield judged if judged.pixels is None else judged._replace(verdict=next(found))
            bar.update(len(batch))


def judge(detector: Detector, file: Path) -> Judged:
    """Judge one file, with its region where the model makes heat maps."""
    judged = _read(file, Decoding.of(detector.config))
    if judged.pixels is None:
        return judged
    return judged._replace(verdict=detector.score([judged.pixels], detector.localizer is not None)[0])


def _read(file: Path, decoding: Decoding) -> Judged:
    """Decode a file, or say why it cannot be; its verdict is still to come."""
    name = one_line(str(file))
    try:
        data = read_bytes(file, name, decoding)
        read = picture(data, name, decoding=decoding)
        return Judged(file, read.rgb, None, "", doubt(data, read.rgb), read.values)
    except UserError as e:
        return Judged(file, None, None, str(e), "")


def score_paths(
    paths: list[Path],
    model: str | None,
    bundle: Path | None,
    out: Path | None,
    heatmaps: Path | None,
    false_alarm_rate: float | None,
    log: Path | None = None,
) -> None:
    """Do what the command line does: `score_files` with words.

    Raises
    ------
    UserError
        At the end, with the names of the files that could not be read.
    """
    found = find_images(paths)
    files = [*found.images, *found.unread]
    if not files:
        raise UserError(no_images(paths, found))
    loaded = load_model(model, bundle, false_alarm_rate)
    if log is not None and not loaded.version:
        raise UserError("--log needs --model: the log says which registered version decided")
    if loaded.note:
        print(f"{model}: {loaded.note}", file=sys.stderr)
    limit = loaded.detector.threshold()
    if not limit.enough:
        _say(limit.message)
    if log is not None:
        files, moving = settled(files, _SETTLE_SECONDS)
        if moving:
            _say(f"left for the next run, still being written: {describe(moving)}")
    done = score_files(files, loaded, out, heatmaps, log)
    if found.passed_over:
        _say(f"passed over, no images: {describe(found.passed_over)}")
    for warning in done.warnings:
        _say(f"warning: {warning}")
    logged = f", {done.logged} known to the log" if done.logged else ""
    plural = "s" if done.images != 1 else ""
    print(f"{done.images} image{plural} scored, {done.alarms} called defect{logged}", file=sys.stderr)
    if done.problems:
        raise UserError(f"{len(done.problems)} of {len(files)} files could not be read: {named(done.problems)}")


def named(lines: Sequence[str]) -> str:
    """Join the first of some lines, and say how many more there are."""
    more = f" and {len(lines) - _NAMED} more" if len(lines) > _NAMED else ""
    return "; ".join(lines[:_NAMED]) + more


def _say(line: str) -> None:
    print(f"panda-ad: {line}", file=sys.stderr)


def score_files(
    files: list[Path], model: Model, out: Path | None, heatmaps: Path | None = None, log: Path | None = None
) -> Scored:
    """Score images and write a CSV, a row per file. What else cannot be written is said, and costs nothing but itself.

    Parameters
    ----------
    out : the CSV file; None: standard output.  heatmaps : folder for overlays; None: none.
    log : the verdict log, which is appended to; images it holds of this version are left out. None: no log.
        It is written last, in one piece: a run that is killed has logged nothing, and the next one scores the same
        images.
    """
    _check_outputs(model.detector, out, heatmaps)
    recorder, wanted = None, files
    if log is not None:
        from panda_ad.monitor.record import Recorder

        limit = model.detector.threshold().value
        recorder = Recorder(model.detector.config.category, model.name, model.version, limit, log)
        wanted = recorder.fresh(files)
    with _table(out) as target:
        done = _write_rows(target, model.detector, wanted, heatmaps, recorder)
    if recorder is not None:
        recorder.write()
    return Scored(len(wanted) - len(done.problems), done.alarms, len(files) - len(wanted), done.problems, done.warnings)


def _check_outputs(detector: Detector, out: Path | None, heatmaps: Path | None) -> None:
    """Refuse what cannot be written before anything is scored. UserError."""
    if heatmaps is not None and detector.localizer is None:
        raise UserError("--heatmaps: this model was built with localize.method: none and has no heat maps")
    if heatmaps is not None and heatmaps.exists() and not heatmaps.is_dir():
        raise UserError(f"--heatmaps {heatmaps}: is a file; give a folder")
    if out is not None and (out.is_dir() or not out.name):
        raise UserError(f"--out {out}: is a folder; give a file, e.g. {out / 'scores.csv'}")


@contextmanager
def _table(out: Path | None) -> Iterator[TextIO]:
    if out is None:
        yield sys.stdout
    else:
        with atomic_file(out) as temporary, open(temporary, "w", newline="", encoding="utf-8") as target:
            yield target


def _write_rows(
    target: TextIO, detector: Detector, files: list[Path], heatmaps: Path | None, recorder: Recorder | None
) -> Scored:
    """Write a row per file and an overlay per image; the recorder gets the verdicts.

    `logged` of the result says nothing.
    """
    limit, alarms = detector.threshold().value, 0
    problems: list[str] = []
    warnings: list[str] = []
    rows = csv.writer(target, lineterminator="\n")
    rows.writerow(COLUMNS)
    gray: list[int] = []
    for judged, unwritten in _with_overlays(detector, files, heatmaps):
        file, pixels, verdict, problem, doubtful, values = judged
        gray += values or ()
        name = one_line(str(file))
        if verdict is None or pixels is None:
            problems.append(problem)
            rows.writerow([name, "", "", "unreadable", *[""] * (len(COLUMNS) - 4)])
            continue
        alarms += verdict.anomalous
        decision = "defect" if verdict.anomalous else "good"
        box = verdict.region or ("", "", "", "")
        parts = [f"{part:.3f}" for part in verdict.components] if verdict.components else ["", ""]
        # repr keeps every digit, so that the number is the same here, in the evaluation and over REST
        numbers = repr(verdict.score), repr(verdict.p_value), decision, repr(limit)
        rows.writerow([name, *numbers, *parts, *box])
        if doubtful:
            warnings.append(f"{name}: called {decision}, but may be damaged: {doubtful}")
        if recorder is not None:
            recorder.add(file, pixels, verdict)
        if unwritten:
            warnings.append(f"{name}: scored, but its overlay was not written ({unwritten})")
    if gray and (narrow := narrow_range(min(gray), max(gray), Decoding.of(detector.config).gray_range)):
        warnings.append(f"{narrow}, and make the model anew with it")
    return Scored(0, alarms, 0, problems, warnings)


def _with_overlays(detector: Detector, files: list[Path], heatmaps: Path | None) -> Iterator[tuple[Judged, str]]:
    """Judge files, in order, and write their overlays side by side; yield why one was not written, '' otherwise."""

    def overlay(numbered: tuple[int, Judged]) -> str:
        n, judged = numbered
        file, pixels, verdict = judged.file, judged.pixels, judged.verdict
        if heatmaps is None or pixels is None or verdict is None or verdict.heatmap is None:
            return ""
        stem = file.stem if len(os.fsencode(file.stem)) <= 200 else plain_stem(file)
        decision = "defect" if verdict.anomalous else "good"
        try:
            save_overlay(heatmaps / f"{n:05d}-{stem}-{decision}.jpg", pixels, verdict, detector)
        except (OSError, ValueError, MemoryError) as e:  # the disk, or more pixels than a JPEG holds
            return " ".join(str(e).split())[:120] or type(e).__name__
        return ""

    judged = enumerate(verdicts(detector, files, heatmaps is not None))
    while part := list(islice(judged, 2 * cores())):
        yield from zip((found for _, found in part), side_by_side(overlay, part), strict=True)
