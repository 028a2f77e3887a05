"""`panda-ad score`: verdicts for image files, streamed in small batches."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from panda_ad.data.images import batches, decode, pixel_count, read_bytes
from panda_ad.data.listing import image_files, printable
from panda_ad.errors import UserError
from panda_ad.registry.load import Model, load_model
from panda_ad.scoring.detector import Detector
from panda_ad.scoring.verdict import Verdict
from panda_ad.system.files import atomic_file

COLUMNS = ("path", "score", "p_value", "decision", "threshold", "whole_image", "worst_spot", "x0", "y0", "x1", "y1")


@dataclass(frozen=True)
class Scored:
    """What became of a set of files.

    Attributes
    ----------
    images : scored.  alarms : of these, called defect.  known : left out, since the log holds their verdict of this version.
    problems : one line per file that could not be read.
    """

    images: int
    alarms: int
    known: int
    problems: list[str]


def verdicts(
    detector: Detector, files: list[Path], heatmaps: bool = False
) -> Iterator[tuple[Path, np.ndarray | None, Verdict | str]]:
    """(file, its pixels, its verdict) in order; where a file cannot be read, (file, None, the reason)."""
    from tqdm import tqdm

    with tqdm(total=len(files), desc="score", unit="img", disable=None) as bar:
        for batch in batches(files, pixel_count):
            images: dict[Path, np.ndarray] = {}
            problems: dict[Path, str] = {}
            for file in batch:
                name = printable(str(file))
                try:
                    images[file] = decode(read_bytes(file, name), name)
                except UserError as e:
                    problems[file] = str(e)
            found = dict(zip(images, detector.score(list(images.values()), heatmaps), strict=True))
            for file in batch:
                yield (file, images[file], found[file]) if file in found else (file, None, problems[file])
            bar.update(len(images) + len(problems))


def score_paths(
    paths: list[Path],
    model: str | None,
    bundle: Path | None,
    out: Path | None,
    heatmaps: Path | None,
    false_alarm_rate: float | None,
    log: Path | None = None,
) -> None:
    """What the command line does: `score_files` with words. UserError at the end names files that could not be read."""
    files = image_files(paths)
    loaded = load_model(model, bundle, false_alarm_rate)
    if log is not None and not loaded.version:
        raise UserError("--log needs --model: the log says which registered version decided")
    limit = loaded.detector.threshold()
    if not limit.enough:
        print(f"panda-ad: {limit.message}", file=sys.stderr)
    done = score_files(files, loaded, out, heatmaps, log)
    known = f", {done.known} known to the log" if done.known else ""
    print(
        f"{done.images} image{'s' if done.images != 1 else ''} scored, {done.alarms} called defect{known}",
        file=sys.stderr,
    )
    if done.problems:
        more = f" and {len(done.problems) - 3} more" if len(done.problems) > 3 else ""
        raise UserError(
            f"{len(done.problems)} of {len(files)} files could not be read: {'; '.join(done.problems[:3])}{more}"
        )


def score_files(
    files: list[Path], model: Model, out: Path | None, heatmaps: Path | None = None, log: Path | None = None
) -> Scored:
    """Score images and write a CSV, a row per readable image.

    Parameters
    ----------
    out : the CSV file; None: standard output.  heatmaps : folder for overlays; None: none.
    log : the verdict log, which is appended to; images it holds of this version are left out. None: no log.
        It is written last, in one piece: a run that is killed has logged nothing, and the next one scores the same images.
    """
    detector = model.detector
    limit = detector.threshold()
    if heatmaps is not None and detector.localizer is None:
        raise UserError("--heatmaps: this model was built with localize.method: none and has no heat maps")
    if heatmaps is not None and heatmaps.exists() and not heatmaps.is_dir():
        raise UserError(f"--heatmaps {heatmaps}: is a file; give a folder")
    if out is not None and (out.is_dir() or not out.name):
        raise UserError(f"--out {out}: is a folder; give a file, e.g. {out / 'scores.csv'}")
    recorder = None
    fresh = files
    if log is not None:
        from panda_ad.monitor.record import Recorder

        recorder = Recorder(detector.config.category, model.name, model.version, limit.value, log)
        fresh = recorder.fresh(files)
    problems: list[str] = []
    alarms = 0

    def write(target) -> None:
        nonlocal alarms
        rows = csv.writer(target, lineterminator="\n")
        rows.writerow(COLUMNS)
        for n, (file, pixels, verdict) in enumerate(verdicts(detector, fresh, heatmaps is not None)):
            if isinstance(verdict, str) or pixels is None:
                problems.append(str(verdict))
                continue
            alarms += verdict.anomalous
            decision = "defect" if verdict.anomalous else "good"
            box = verdict.region or ("", "", "", "")
            parts = [f"{part:.3f}" for part in verdict.components] if verdict.components else ["", ""]
            # repr keeps every digit, so that the number is the same here, in the evaluation and over REST
            rows.writerow(
                [
                    printable(str(file)),
                    repr(verdict.score),
                    repr(verdict.p_value),
                    decision,
                    repr(limit.value),
                    *parts,
                    *box,
                ]
            )
            if recorder is not None:
                recorder.add(file, pixels, verdict)
            if heatmaps is not None and verdict.heatmap is not None:
                save_overlay(heatmaps / f"{n:05d}-{file.stem}-{decision}.jpg", pixels, verdict.heatmap, detector)

    if out is None:
        write(sys.stdout)
    else:
        with atomic_file(out) as temporary, open(temporary, "w", newline="", encoding="utf-8") as target:
            write(target)
    if recorder is not None:
        recorder.write()
    return Scored(len(fresh) - len(problems), alarms, len(files) - len(fresh), problems)


def save_overlay(path: Path, rgb: np.ndarray, heatmap: np.ndarray, detector: Detector) -> None:
    """Write the image with its heat map laid over it, colored where it exceeds what normal images show."""
    from PIL import Image

    assert detector.config.heatmap_range is not None, "only a model with a localizer makes heat maps"
    start, full = detector.config.heatmap_range
    path.parent.mkdir(parents=True, exist_ok=True)
    blend = np.empty_like(rgb)
    for pixels, heat, out in zip(
        rgb, heatmap, blend, strict=True
    ):  # row by row: in floating point a large image takes gigabytes
        strength = np.clip((heat - start) / max(full - start, 1e-12), 0, 1)[:, None]
        color = np.concatenate([np.full_like(strength, 255), 220 * (1 - strength), np.zeros_like(strength)], axis=1)
        out[:] = pixels * (1 - 0.65 * strength) + color * 0.65 * strength
    with atomic_file(path) as temporary:
        Image.fromarray(blend).save(temporary, "JPEG", quality=90)
