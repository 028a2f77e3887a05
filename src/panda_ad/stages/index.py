"""Stage `index`: build a category's model, the bundle: galleries, localizer, calibration, thumbnails."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from safetensors.torch import load_file

from panda_ad import __version__
from panda_ad.adapt.snapshots import unpack_snapshots
from panda_ad.features.image_statistics import Reference, as_float16, image_statistics, statistics_matrix
from panda_ad.params import load_params
from panda_ad.scoring.bundle import save_bundle
from panda_ad.scoring.calibration import threshold
from panda_ad.scoring.detector import Detector, with_state
from panda_ad.scoring.gallery import check_finite
from panda_ad.scoring.whitening import fit_whitening
from panda_ad.stages.common import (
    activations_for,
    backbone_for,
    category_rows,
    check_weights,
    items_of,
    layers_needed,
    pretrained_features,
    score_items,
    threads,
)
from panda_ad.stages.index_gallery import build_galleries, check_neighbors, normal_mean, out_of_fold_scores
from panda_ad.stages.index_localizer import add_localizer
from panda_ad.system.files import atomic_folder
from panda_ad.system.paths import BUILD
from panda_ad.system.stage import run_stage

if TYPE_CHECKING:
    from panda_ad.features.cache import Activations, Item
    from panda_ad.params import Params
    from panda_ad.scoring.detector import Scores

_THUMBNAIL = 96  # pixels, longest side
_COLOURED = 256  # most calibration images whose heat maps set the overlays' colors


def main(category: str) -> None:
    """Write build/bundle/<category>."""
    params = load_params()
    threads()
    rows = category_rows(category)
    activations = activations_for(params, backbone_for(params), category)
    train, calibration = (items_of(rows[split], params) for split in ("train", "calibration"))
    layers = layers_needed(params)
    activations.warm([*train, *calibration], layers)

    detector = adapted_detector(
        params, category, activations, {"train_images": len(train), "calibration_images": len(calibration)}
    )
    plain = training_features(detector, activations, train, pretrained_features(category)[rows["train"].index])
    matrices = plain
    if detector.config["whiten"]:
        detector.whitenings = [fit_whitening(matrix) for matrix in plain]
        matrices = [whiten(matrix) for whiten, matrix in zip(detector.whitenings, plain, strict=True)]
    detector.galleries, kept, members = build_galleries(matrices, params.gallery, params.seed)
    check_neighbors(params.gallery.k, detector.galleries[0])
    whitened, out_of_fold = detector.config["whiten"], None
    if whitened or params.verdict.score == "both":
        out_of_fold = out_of_fold_scores(plain, params.gallery, whitened, params.seed)
    if (
        whitened and out_of_fold is not None
    ):  # an image that has shaped the whitening looks too normal, whichever gallery it is left out of
        detector.train_means = out_of_fold.mean(axis=1)
    else:
        detector.train_means = np.array(
            [
                normal_mean(g, m, kept, members, params.gallery.k)
                for g, m in zip(detector.galleries, matrices, strict=True)
            ]
        )
    chosen = rows["train"].iloc[kept]
    detector.images = [
        {"path": path, "sha256": key} for path, key in zip(chosen["path"], chosen["sha256"], strict=True)
    ]
    detector.seen = frozenset(rows["train"]["sha256"]) | frozenset(rows["calibration"]["sha256"])
    detector.thumbnails = [thumbnail(train[i].read()) for i in kept]
    if params.localize.method != "none":
        add_localizer(detector, activations, train, matrices, out_of_fold, params)
    calibrate(detector, activations, calibration, params)

    limit = threshold(detector.calibration, params.verdict.false_alarm_rate)
    with atomic_folder(BUILD / "bundle" / category) as folder:
        save_bundle(detector, folder)
    heads = f"{len(detector.heads)} snapshot(s)"
    print(
        f"{category}: {len(train)} normal images, {heads}, threshold {limit.value:.4g}"
        + (f"; {limit.message}" if limit.message else "")
    )


def adapted_detector(params: Params, category: str, activations: Activations, counts: dict[str, int]) -> Detector:
    """What `adapt` has left, as a detector that has learned nothing else yet. `counts` go to its provenance."""
    folder, backbone = BUILD / "adapt" / category, activations.backbone
    facts = json.loads((folder / "adapt.json").read_text())
    check_weights(facts["fingerprint"], backbone, str(folder), f"adapt@{category}")
    tensors = load_file(folder / "snapshots.safetensors")
    classifier = {
        k.removeprefix("classifier."): tensors.pop(k) for k in list(tensors) if k.startswith("classifier.")
    } or None
    states = iter(unpack_snapshots(backbone.adapted.state_dict(), tensors))
    steps = facts["steps"] or [0]
    config = {
        "dataset": params.dataset,
        "category": category,
        "input_size": list(params.backbone.size),
        "precision": "bf16" if str(activations.precision) == "torch.bfloat16" else "fp32",
        "scorer": "knn" if classifier is None else "logit",
        "method": facts["method"],
        "k": params.gallery.k,
        # outlier exposure's classifier was trained on features as they come
        "normalize": params.gallery.normalize and classifier is None,
        "whiten": params.gallery.whiten and classifier is None,
        "steps": steps,
        "score": params.verdict.score,
        "false_alarm_rate": params.verdict.false_alarm_rate,
        "provenance": {
            "panda_ad": __version__,
            "backbone": params.backbone.name,
            "weights": params.backbone.weights,
            "fingerprint": backbone.fingerprint,
            **counts,
            "collapsed_at": facts["collapsed_at"],
            "adaptation": facts["provenance"],
        },
    }
    heads = [backbone.adapted if step == 0 else with_state(backbone.adapted, next(states)) for step in steps]
    return Detector(config, backbone, heads, [], np.empty(0), classifier)


def training_features(
    detector: Detector, activations: Activations, train: Sequence[Item], raw: np.ndarray
) -> list[np.ndarray]:
    """Features under each head, S times (M, D) float32; `raw` (M, D) are those under the unadapted one. UserError where they are not finite."""
    features: list[list[np.ndarray]] = [[] for _ in detector.heads]
    at = 0
    for batch in activations.batches(train, ("layer2",)):
        known = raw[at : at + len(batch["layer2"])]
        for s, part in enumerate(detector.features(batch["layer2"], known)[0]):
            features[s].append(part)
        at += len(known)
    matrices = [np.concatenate(parts) for parts in features]
    for matrix in matrices:
        check_finite(matrix)
    return matrices


def calibrate(detector: Detector, activations: Activations, calibration: Sequence[Item], params: Params) -> None:
    """The calibration images' scores, what monitoring compares with, and the range of the overlays' colors."""
    every = params.localize.tiles or 1
    held_out: list[Scores] = []
    usual: list[np.ndarray] = []
    peaks: list[np.ndarray] = []
    for scores in score_items(detector, activations, calibration, layers_needed(params)):
        held_out.append(replace(scores, heatmaps=None))
        if scores.heatmaps is not None:  # joined maps are large: of each, as many pixels as of an untiled one
            room = max(0, _COLOURED - sum(len(maps) for maps in usual))
            usual.append(scores.heatmaps[:room, ::every, ::every].copy())
            peaks.append(scores.heatmaps.max(axis=(1, 2)))
    detector.calibration = np.concatenate([part.score for part in held_out])
    statistics = statistics_matrix([image_statistics(item.read()) for item in calibration])
    detector.reference = Reference(
        statistics.astype(np.float32), as_float16(np.concatenate([part.features for part in held_out]))
    )
    if detector.localizer is not None:
        detector.config["heatmap_range"] = heatmap_range(np.concatenate(usual), np.concatenate(peaks))


def heatmap_range(maps: np.ndarray, peaks: np.ndarray) -> list[float]:
    """Where an overlay's color starts and where it is full, from the calibration images' maps (M, h, w) and their maxima (M,).

    A good part stays nearly clear.
    """
    usual, peak = float(np.median(maps)), float(np.median(peaks))
    return [usual + 0.8 * (peak - usual), usual + 2.0 * (peak - usual)]


def thumbnail(rgb: np.ndarray) -> bytes:
    """uint8 (H, W, 3) -> JPEG bytes of at most 96 pixels a side."""
    from PIL import Image

    image = Image.fromarray(rgb)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80)
    return out.getvalue()


if __name__ == "__main__":
    run_stage("index", main)
