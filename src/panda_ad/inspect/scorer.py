# SPDX-License-Identifier: Apache-2.0
"""Scoring for the page, in one thread beside the server: what led to a verdict, and images that are dropped on it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from panda_ad.data.images import Decoding, batches, decode, pixel_count, read_image
from panda_ad.errors import Busy, UserError
from panda_ad.inspect.models import Models
from panda_ad.inspect.pictures import heat_png, read_exactly
from panda_ad.inspect.queue import Row
from panda_ad.monitor.log import LOG
from panda_ad.monitor.record import Recorder
from panda_ad.registry.load import Model
from panda_ad.system.files import atomic_file

DROPPED = Path("monitoring/dropped")
"""Images that were dropped on the page, by content: monitoring/dropped/<category>/<sha256>.<format>."""

_KEPT = 512
_WAITING = 16
"""Images dropped on the page that may wait to be scored."""
_MAP = 512
"""Longer side in pixels of a heat map that is sent."""


@dataclass(frozen=True)
class Evidence:
    """What led to a verdict, by the model in place.

    Attributes
    ----------
    model, version : that made it.
    score, p_value, threshold, anomalous : its verdict.
    typical : median score of its calibration images; calibration : how many they are.
    components : (feature score, map score) in robust standard deviations, or None.
    width, height : of the image, pixels.
    region : what stands out most, (x0, y0, x1, y1) in shares of width and height, or None.
    heat : PNG of the heat map; b'' without.
    neighbors : nearest normal images, as positions in the gallery, nearest first.
    """

    model: str
    version: str
    score: float
    p_value: float
    threshold: float
    anomalous: bool
    typical: float
    calibration: int
    components: tuple[float, float] | None
    width: int
    height: int
    region: tuple[float, float, float, float] | None
    heat: bytes
    neighbors: tuple[int, ...]


class Scorer:
    """Computes evidence, each once, and scores new images, one after the other."""

    def __init__(self, models: Models, log: Path = LOG, dropped: Path = DROPPED) -> None:
        self.models, self._log, self._dropped = models, log, dropped
        self._thread = ThreadPoolExecutor(1, "scorer")
        self._lock = threading.Lock()
        self._found: OrderedDict[tuple[str, str, str], Future[Evidence]] = OrderedDict()
        self._waiting = threading.Semaphore(_WAITING)

    def refresh(self, category: str) -> None:
        """Look up the category's model in the background where it is time to."""
        if self.models.stale(category):
            self._thread.submit(self._look, category)

    def model(self, category: str) -> Future[Model]:
        """Return the category's model in place; the future raises UserError if there is none."""
        return self._thread.submit(self.models.current, category)

    def evidence(self, category: str, row: Row) -> Future[Evidence]:
        """Return what the model in place says of an image of the log; the future raises UserError if it cannot."""
        model = self.models.known(category)
        key = (category, model.version if model else "", row.sha256)
        with self._lock:
            found = self._found.get(key)
            if found is None or (found.done() and found.exception() is not None):  # the image may be back by now
                found = self._found[key] = self._thread.submit(self._explain, category, row)
            self._found.move_to_end(key)
            while len(self._found) > _KEPT:
                self._found.popitem(last=False)
            return found

    def drop(self, category: str, data: bytes) -> Future[str]:
        """Score an image file and log the verdict; the future gives its sha256.

        Raises
        ------
        Busy
            Too many wait.
        """
        if not self._waiting.acquire(blocking=False):
            raise Busy(f"{_WAITING} images wait to be scored; send more when they are done")
        done = self._thread.submit(self._take, category, data)
        done.add_done_callback(lambda _: self._waiting.release())
        return done

    def folder(self, category: str, files: Sequence[Path]) -> None:
        """Score files in the background; those that the log holds of the model in place are left out."""
        self._thread.submit(self._score_files, category, list(files))

    def close(self) -> None:
        """End the thread after what it is doing now."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _look(self, category: str) -> None:
        with contextlib.suppress(UserError):  # `models.problems` has it
            self.models.current(category)

    def _explain(self, category: str, row: Row) -> Evidence:
        model = self.models.current(category)
        rgb = read_exactly(Path(row.path), row.sha256, Decoding.of(model.detector.config))
        return explain(model, rgb)

    def _take(self, category: str, data: bytes) -> str:
        model = self.models.current(category)
        rgb = decode(data, "the picture", Decoding.of(model.detector.config))
        sha256 = hashlib.sha256(data).hexdigest()
        with Image.open(io.BytesIO(data)) as image:
            suffix = (image.format or "img").lower()
        path = self._dropped / category / f"{sha256}.{suffix}"
        recorder = self._recorder(category, model)
        if not path.exists():
            with atomic_file(path) as temporary:
                temporary.write_bytes(data)
        if recorder.fresh([path]):
            recorder.add(path, rgb, model.detector.score([rgb])[0])
            recorder.write()
        return sha256

    def _score_files(self, category: str, files: list[Path]) -> None:
        try:
            model = self.models.current(category)
            wanted = self._recorder(category, model).fresh(files)
            for batch in batches(wanted, pixel_count):
                recorder = self._recorder(category, model)
                for path, rgb in _decoded(batch, Decoding.of(model.detector.config)):
                    recorder.add(path, rgb, model.detector.score([rgb])[0])
                recorder.write()
        except (UserError, OSError) as e:
            self.models.problems[category] = str(e)

    def _recorder(self, category: str, model: Model) -> Recorder:
        limit = model.detector.threshold().value
        return Recorder(category, model.name, model.version, limit, self._log)


def _decoded(files: Sequence[Path], decoding: Decoding) -> Iterator[tuple[Path, np.ndarray]]:
    """Yield the files that can be decoded; `panda-ad score` names the others."""
    for path in files:
        try:
            yield path, read_image(path, decoding=decoding)
        except UserError:
            continue


def explain(model: Model, rgb: np.ndarray) -> Evidence:
    """Return what a model says of an image, uint8 (H, W, 3)."""
    detector, (height, width) = model.detector, rgb.shape[:2]
    activations = detector.network.activations(detector.network.preprocess([rgb]))
    scores = detector.score_activations(activations, heatmaps=detector.localizer is not None, pixels=[rgb])
    scale = min(1.0, _MAP / max(height, width))
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    (verdict,) = detector.verdicts(scores, [(rows, columns)])
    region, heat = None, b""
    if verdict.heatmap is not None and verdict.region is not None and detector.config.heatmap_range is not None:
        x0, y0, x1, y1 = verdict.region
        region = (x0 / columns, y0 / rows, x1 / columns, y1 / rows)
        heat = heat_png(verdict.heatmap, detector.config.heatmap_range)
    nearest = tuple(detector.distinct(scores.neighbors[0]))
    return Evidence(
        model.name, model.version, verdict.score, verdict.p_value, detector.threshold().value, verdict.anomalous,
        float(np.median(detector.calibration)), len(detector.calibration),
        verdict.components, width, height, region, heat, nearest,
    )  # fmt: skip
