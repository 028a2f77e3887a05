# SPDX-License-Identifier: Apache-2.0
"""False alarms and delays of the sequential tests, on simulated images: no network, only numbers.

    python benchmarks/drift_detection.py [--repetitions 200]

An image is seven numbers (six statistics and a score), correlated, with heavy tails in the score. A stream has as many
calibration images as named, and is checked every 20 images, as a nightly flow would. Beside the sequential tests
stands what monitoring did before: the window test of the newest 200 images against the calibration images, each night.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import numpy as np

from panda_ad.features.image_statistics import NAMES
from panda_ad.monitor.alarms import State
from panda_ad.monitor.drift import Sample, find_drift
from panda_ad.monitor.sequence import evidence_of_change
from panda_ad.monitor.stream import Stream
from panda_ad.monitor.watch import SHARES, find_change, limit_of, reference_images, spacing, watch
from panda_ad.params import MonitorParams
from panda_ad.params_file import load_params

NIGHT = 20
RATE = 0.05
WINDOWS = 5
Images = tuple[np.ndarray, np.ndarray]
"""Statistics (N, S) and scores (N,)."""


def draw(rng: np.random.Generator, count: int, alike: float = 0.0) -> Images:
    """Return images; `alike` is the correlation of an image with the one before."""
    mix = np.random.default_rng(5).normal(size=(len(NAMES) + 1, len(NAMES) + 1)) * 0.4 + np.eye(len(NAMES) + 1)
    noise = rng.normal(size=(count, len(NAMES) + 1)) @ mix
    for t in range(1, count):
        noise[t] = alike * noise[t - 1] + np.sqrt(1 - alike**2) * noise[t]
    return noise[:, :-1], np.exp(0.5 * noise[:, -1])


def shifted(images: Images, first: int, size: float, columns: int) -> Images:
    """Move the first `columns` statistics from image `first` on by `size` standard deviations."""
    statistics, scores = images[0].copy(), images[1].copy()
    statistics[first:, :columns] += size * statistics.std(axis=0)[:columns]
    return statistics, scores


def defective(images: Images, first: int, share: float, rng: np.random.Generator) -> Images:
    """Raise the score of a share of the images from `first` on."""
    scores = images[1].copy()
    scores[first:][rng.random(len(scores) - first) < share] += 20
    return images[0], scores


def as_stream(images: Images) -> Stream:
    """Return images as the log has them."""
    n = len(images[1])
    times = np.datetime64("2026-01-01", "us") + np.arange(n) * np.timedelta64(1, "m")
    return Stream(times, np.array([f"{i:064d}" for i in range(n)]), *images, np.zeros(n, bool))


def first_alarm(calibration: Images, images: Images, limits: MonitorParams) -> tuple[int | None, int | None]:
    """Return how many images had come at the first alarm, and from which image on it says there is a change.

    Each night looks at all images so far. The evidence after each image is computed once, not each night.
    """
    stream, least = as_stream(images), limit_of(limits.significance, limits.window, SHARES)
    known = [*calibration[0].T, calibration[1]]
    values = [*images[0].T, images[1]]
    paths: dict[tuple[int, int], np.ndarray] = {}
    for end in range(NIGHT, len(stream) + 1, NIGHT):
        certain = False
        for i, column in enumerate(values):
            apart = spacing(column[:end])
            if (i, apart) not in paths:
                paths[i, apart] = evidence_of_change(known[i], column[::apart], i).path
            certain |= paths[i, apart][(end - 1) // apart] >= least
        if end < limits.min_images or not certain:
            continue
        reference = reference_images(stream.take(np.arange(end)), State(), calibration, limits.min_images)
        change = find_change(reference, watch(reference, 0), RATE, limits)
        if change is not None:
            return end, change.first
    return None, None


def first_window_alarm(calibration: Images, images: Images, limits: MonitorParams, seed: int) -> int | None:
    """Return how many images had come when the newest window first differed from the calibration images."""
    rng = np.random.default_rng(seed)
    known = Sample(calibration[1], calibration[0], rng.normal(size=(len(calibration[1]), 2)))
    for end in range(NIGHT, len(images[1]) + 1, NIGHT):
        start = max(0, end - limits.window)
        if end - start < limits.min_images:
            continue
        window = Sample(images[1][start:end], images[0][start:end], rng.normal(size=(end - start, 2)))
        if find_drift(known, window, RATE, limits, seed).drifted:
            return end
    return None


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=200)
    repetitions = parser.parse_args().repetitions
    limits = load_params().monitor
    false_alarms(limits, repetitions)
    delays(limits, repetitions)


def false_alarms(limits: MonitorParams, repetitions: int) -> None:
    """Print how often streams in which nothing changes raise an alarm, per 1,000 windows."""
    head = f"Streams of {WINDOWS} windows of {limits.window} images in which nothing changes; alarms per 1,000 windows"
    print(
        f"{head}\n\n| calibration images | neighbors' correlation | sequential, any size | sequential | window test |"
    )
    print("| --- | --- | --- | --- | --- |")
    for count, alike in itertools.product((24, 100), (0.0, 0.5, 0.9)):
        print(false_alarm_row(limits, repetitions, count, alike), flush=True)


def false_alarm_row(limits: MonitorParams, repetitions: int, count: int, alike: float) -> str:
    """Return a row: sequential tests without and with the limit on size, and a tenth as many streams by window test."""
    length, cells = WINDOWS * limits.window, []
    for size in (0.0, limits.min_shift):
        settings = limits.model_copy(update={"min_shift": size})
        ends = [first_alarm(*steady(count, length, alike, r), settings)[0] for r in range(repetitions)]
        cells.append(rate_of(ends, length, limits.window))
    few = range(max(1, repetitions // 10))
    ends = [first_window_alarm(*steady(count, length, alike, r), limits, r) for r in few]
    cells.append(rate_of(ends, length, limits.window))
    return f"| {count} | {alike:g} | {' | '.join(cells)} |"


def steady(count: int, length: int, alike: float, repetition: int) -> tuple[Images, Images]:
    """Return calibration images and a stream in which nothing changes."""
    rng = np.random.default_rng([count, repetition])
    return draw(rng, count), draw(rng, length, alike)


def rate_of(ends: list[int | None], length: int, window: int) -> str:
    """Return alarms per 1,000 windows; a stream is watched until its first alarm."""
    alarms = sum(end is not None for end in ends)
    seen = sum(length if end is None else end for end in ends) / window
    return f"{1000 * alarms / seen:.1f} ({alarms} in {seen:.0f})"


def delays(limits: MonitorParams, repetitions: int) -> None:
    """Print after how many images a change is found, when it is said to have begun, and what the window test does."""
    before, few = 400, max(1, repetitions // 10)
    print(f"\nThe change comes after {before} images; {limits.window} more are looked at in nights of {NIGHT}\n")
    print(
        "| calibration images | change | found | median delay, images | 9 of 10 within "
        "| said to begin (median, middle 80 %) | window test: found, median delay |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    changes: dict[str, Callable[[Images, np.random.Generator], Images]] = {
        "two statistics by 1 deviation": lambda x, _: shifted(x, before, 1, 2),
        "two statistics by 2": lambda x, _: shifted(x, before, 2, 2),
        "two statistics by 5": lambda x, _: shifted(x, before, 5, 2),
        "a fifth of the parts defective": lambda x, rng: defective(x, before, 0.2, rng),
    }
    for count in (24, 100):
        for name, change in changes.items():
            found: list[int] = []
            starts: list[int] = []
            other: list[int] = []
            for r in range(repetitions):
                rng = np.random.default_rng([count, r, 1])
                calibration, images = draw(rng, count), change(draw(rng, before + limits.window), rng)
                end, first = first_alarm(calibration, images, limits)
                if end is not None and end > before:
                    found.append(end - before)
                    starts.append((first or 0) - before)
                later = images[0][before - limits.window :], images[1][before - limits.window :]
                end = first_window_alarm(calibration, later, limits, r) if r < few else None
                if end is not None and end > limits.window:
                    other.append(end - limits.window)
            middle = (
                f"{np.median(starts):+.0f} ({np.quantile(starts, 0.1):+.0f} to {np.quantile(starts, 0.9):+.0f})"
                if starts
                else "-"
            )
            times = f"{np.median(found):.0f} | {np.quantile(found, 0.9):.0f}" if found else "- | -"
            window = f"{len(other) / few:.0%}, {np.median(other):.0f}" if other else "0 %"
            print(f"| {count} | {name} | {len(found) / repetitions:.0%} | {times} | {middle} | {window} |", flush=True)


if __name__ == "__main__":
    main()
