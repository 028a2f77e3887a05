# SPDX-License-Identifier: Apache-2.0
"""`panda-ad start`: from a folder of pictures to verdicts and a page, without DVC, MLflow or params.yaml.

Good ones are learned from, the others judged. Where nobody has sorted the pictures, the odd ones are put first.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from panda_ad.commands.overlay import blend, save_picture
from panda_ad.commands.score import score_files
from panda_ad.commands.start_page import Shown, ranking_page, verdict_page
from panda_ad.data.images import read_image
from panda_ad.data.listing import one_line, printable
from panda_ad.data.sorting import Sorted, sort_pictures
from panda_ad.errors import UserError
from panda_ad.features.backbones import load_backbone
from panda_ad.features.export import export_network
from panda_ad.features.images import Index
from panda_ad.features.network import Network
from panda_ad.params import GalleryParams, LocalizeParams, VerdictParams
from panda_ad.registry.load import Model
from panda_ad.scoring.bundle import load_bundle, save_bundle
from panda_ad.scoring.config import DetectorConfig, FitParams
from panda_ad.scoring.detector import Detector
from panda_ad.scoring.fit import fit_detector
from panda_ad.scoring.fit_calibration import heatmap_range
from panda_ad.scoring.localize.maps import resize
from panda_ad.scoring.mutual import mutual_maps
from panda_ad.system.cores import side_by_side
from panda_ad.system.files import atomic_file, atomic_folder, digest_file

NETWORK = ("efficientnet_lite0", "DEFAULT")
FIT = FitParams(
    gallery=GalleryParams(k=2, normalize=True, whiten=True, compression="none", size=100, relight=True),
    localize=LocalizeParams(method="patch_memory", neighbors=50, memory_limit=2000, sigma=4.0, tiles=None),
    verdict=VerdictParams(score="both", false_alarm_rate=0.05),
)
"""As in the repository's params.yaml; a test compares them. Nothing adapts: that is what a project does."""
LEAST = 3
"""Images that a model, or a ranking, needs: one and two neighbors."""
FEW = 8
"""Good images from which on a threshold is worth looking at."""
MOST = 1000
"""Good images that are taken, and unsorted ones that are ranked; a project takes all."""
_BATCH = 32


@dataclass(frozen=True)
class FileImages:
    """Image files for fitting (`features.images.Images`); what the network makes of them is kept in memory."""

    network: Network
    files: Sequence[Path]

    @property
    def names(self) -> Sequence[str]:
        """See `Images`."""
        return [one_line(str(file)) for file in self.files]

    @cached_property
    def keys(self) -> Sequence[str]:
        """See `Images`."""
        return side_by_side(digest_file, self.files)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> np.ndarray:
        """See `Images`."""
        return read_image(self.files[index])

    @cached_property
    def _known(self) -> dict[str, np.ndarray]:
        parts = []
        with tqdm(total=len(self.files), desc="learn", unit="img", disable=None) as bar:
            for start in range(0, len(self.files), _BATCH):
                part = self.files[start : start + _BATCH]
                parts.append(self.network.activations(self.network.preprocess(side_by_side(read_image, part))))
                bar.update(len(part))
        return {level: np.concatenate([part[level] for part in parts]) for level in self.network.frozen_levels}

    def activations(self, index: Index, levels: Sequence[str]) -> dict[str, np.ndarray]:
        """See `Images`."""
        return {level: self._known[level][index] for level in levels}

    def pretrained(self, _index: Index) -> np.ndarray | None:
        """See `Images`: unknown."""
        return None


def start(folder: Path, out: Path | None, good: bool, size: int, say: Callable[[str], None] = print) -> None:
    """Judge or rank the pictures of a folder, and write the page, a CSV and, where there are good ones, the model.

    Parameters
    ----------
    folder : see `data.sorting`. Nothing is written into it.
    out : folder of results; None: <name>-start here. It takes the place of an earlier one.
    good : whether pictures that no folder's name tells of are good.
    size : network input, pixels.

    Raises
    ------
    UserError
        No pictures, too few that can be read, or a folder `out` that this command has not written.
    """
    found = sort_pictures(folder, good)
    out = out or Path(f"{folder.resolve().name or 'pictures'}-start")
    if out.exists() and not (out / "index.html").is_file():
        raise UserError(f"--out {out}: exists, and is no result of panda-ad start; name another folder")
    if out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--out {out}: lies in {folder}, whose pictures are read; name a folder elsewhere")
    network = export_network(load_backbone(*NETWORK), (size, size))
    with atomic_folder(out) as folder_out:
        lines = list((_judge if found.good else _rank)(found, network, folder_out, folder))
    for line in [*lines, f"page     {out / 'index.html'}"]:
        say(one_line(line.replace("{out}", str(out)).replace("{folder}", str(folder))))


def _judge(found: Sorted, network: Network, out: Path, folder: Path) -> Iterator[str]:
    """Learn from the good pictures and judge the others."""
    kept, broken = _readable(found.good, "learned from")
    train = FileImages(network, kept)
    name = printable(folder.resolve().name)
    config = DetectorConfig(dataset="start", category=name, provenance={"train_images": len(train)})
    detector = fit_detector(network, train, FIT, config)
    (out / "model").mkdir()
    save_bundle(detector, out / "model")
    judged = [*found.others, *((file, "good") for file in broken)]  # a row `unreadable` for each of these
    done = score_files(
        [file for file, _ in judged], Model(load_bundle(out / "model")), out / "verdicts.csv", out / "heatmaps"
    )
    for line in [*done.problems[: len(done.problems) - len(broken)], *done.warnings]:
        _warn(line)
    with open(out / "verdicts.csv", newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    shown = []
    for n, (row, (file, kind)) in enumerate(zip(rows, judged, strict=True)):
        if row["score"]:
            overlay = next((out / "heatmaps").glob(f"{n:05d}-*.jpg"), file)
            shown.append(Shown(overlay, _within(folder, file), kind, float(row["score"]), row["decision"] == "defect"))
    promise = _promise(detector)
    counts = _counts(shown)
    odd = [
        Shown(file, _within(folder, file), "good", score, False)
        for score, file in sorted(zip(detector.calibration, train.files, strict=True), reverse=True)
    ]
    verdict_page(out / "index.html", name, len(train), shown, odd, [counts, promise] if counts else [promise])
    yield f"learned  {len(train)} good pictures"
    if counts:
        yield f"verdicts {counts}; {{out}}/verdicts.csv"
    yield f"promise  {promise}"
    yield "next     panda-ad score NEW_PICTURES --bundle {out}/model --heatmaps overlays"
    yield "for good schedule, adaptation, registry, page at the line: README, 'Your own images'"


def _promise(detector: Detector) -> str:
    """Say what the threshold promises."""
    limit = detector.threshold()
    if limit.enough:
        low, high = (100 * end for end in limit.interval)
        return (
            f"at most {100 * limit.rate:g} % of good parts raise an alarm (true rate between {low:.1f} and {high:.1f} "
            f"% with 95 % confidence), if they are photographed as these {limit.n} were"
        )
    few = "; so few tell the order of pictures rather than verdicts" if limit.n < FEW else ""
    return f"{limit.message}{few}"


def _counts(shown: Sequence[Shown]) -> str:
    """Say how verdicts and folder names agree."""
    parts = []
    for name, group in (
        ("known defects called defect", [s for s in shown if s.kind not in ("", "good")]),
        ("good pictures kept back raised an alarm", [s for s in shown if s.kind == "good"]),
        ("pictures nobody has sorted called defect", [s for s in shown if not s.kind]),
    ):
        if group:
            parts.append(f"{sum(s.alarm for s in group)} of {len(group)} {name}")
    return ", ".join(parts)


def _rank(found: Sorted, network: Network, out: Path, folder: Path) -> Iterator[str]:
    """Put the odd pictures first."""
    if any(kind for _, kind in found.others):
        kinds = sorted({kind for _, kind in found.others if kind})
        raise UserError(
            f"no good pictures to learn from, only {', '.join(kinds)}: put good ones into a folder named good beside"
        )
    kept, broken = _readable([file for file, _ in found.others], "ranked")
    images = FileImages(network, kept)
    levels = network.map_levels
    maps = mutual_maps(lambda i: _maps(images, i, levels), len(images), levels, network.size, FIT.localize.sigma)
    scores = maps.max(axis=(1, 2))
    order = np.argsort(-scores, kind="stable")
    limits = heatmap_range(maps, scores)
    shown = []
    with atomic_file(out / "ranking.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as f:
        rows = csv.writer(f, lineterminator="\n")
        rows.writerow(["rank", "path", "oddness"])
        for rank, i in enumerate(tqdm(order, desc="draw", unit="img", disable=None), start=1):
            rgb, overlay = images.read(i), out / "heatmaps" / f"{rank:05d}.jpg"
            save_picture(overlay, blend(rgb, resize(maps[i], rgb.shape[:2]), limits))
            rows.writerow([rank, images.names[i], repr(float(scores[i]))])
            shown.append(Shown(overlay, _within(folder, images.files[i]), "", float(scores[i]), False))
        rows.writerows(["unreadable", one_line(str(file)), ""] for file in broken)
    ranking_page(out / "index.html", printable(folder.resolve().name), shown)
    yield f"ranked   {len(images)} pictures, the oddest first; {{out}}/ranking.csv. An order is no verdict"
    yield "next     move good pictures into a folder named good, defects into one named bad, and start again"
    yield "         (if all are good: panda-ad start {folder} --good)"


def _maps(images: FileImages, index: int, levels: Sequence[str]) -> dict[str, np.ndarray]:
    """Return an image's levels, float16 (C, h, w) each."""
    network = images.network
    maps = network.maps(images.activations(np.array([index]), network.frozen_levels), levels)
    return {level: maps[level][0] for level in levels}


def _readable(files: list[Path], use: str) -> tuple[list[Path], list[Path]]:
    """Return, of at most `MOST` files, those that can be decoded, and the others, which are named.

    UserError where too few remain.
    """
    if len(files) > MOST:
        chosen = np.sort(np.random.default_rng(0).permutation(len(files))[:MOST])
        _warn(f"{MOST} of {len(files)} pictures are {use}, drawn at random; a project takes all")
        files = [files[i] for i in chosen]
    kept, broken = [], []
    for file, problem in zip(files, side_by_side(_problem, files), strict=True):
        if problem:
            _warn(f"left out: {problem}")
            broken.append(file)
        else:
            kept.append(file)
    if len(kept) < LEAST:
        raise UserError(f"{len(kept)} pictures to be {use} are too few: {LEAST} are needed, {FEW} for verdicts")
    return kept, broken


def _within(folder: Path, file: Path) -> str:
    return printable(file.relative_to(folder).as_posix())


def _problem(file: Path) -> str:
    try:
        read_image(file)
    except UserError as e:
        return str(e)
    return ""


def _warn(line: str) -> None:
    print(f"panda-ad: {one_line(line)}", file=sys.stderr)
