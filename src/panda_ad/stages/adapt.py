# SPDX-License-Identifier: Apache-2.0
"""Stage `adapt`: fine-tune the adapted layers on a category's normal training images (paper, sections 3.2 to 3.5)."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from panda_ad.adapt.fisher import cached_fisher, chosen_rows, load_fisher, source_labels
from panda_ad.adapt.metric import Metric
from panda_ad.adapt.train import Adapted, adapt
from panda_ad.data.outliers import coarseness, folder_files, is_gray, outlier_item, plain_item
from panda_ad.errors import UserError
from panda_ad.features.export import with_snapshots
from panda_ad.features.network import ADAPTED
from panda_ad.params import METHODS, GalleryParams, Params
from panda_ad.params_file import load_params
from panda_ad.scoring.whitening import fit_whitening
from panda_ad.stages.common import (
    activations_for,
    backbone_for,
    category_rows,
    check_weights,
    items_of,
    network_for,
    threads,
)
from panda_ad.system.files import atomic_folder, write_json
from panda_ad.system.paths import BUILD, NETWORK
from panda_ad.system.stage import run_stage

if TYPE_CHECKING:
    from torch import Tensor

    from panda_ad.features.backbones import Backbone
    from panda_ad.features.cache import Activations, Item


def main(category: str) -> None:
    """Write adapted_<step>.onnx of each snapshot, history.csv, adapt.json and, of `oe`, classifier.safetensors."""
    import pandas as pd

    params = load_params()
    threads()
    backbone, network = backbone_for(params), network_for()
    check_weights(network.facts.fingerprint, backbone.fingerprint, str(NETWORK), "extract")
    activations = activations_for(params, network)
    by_split = category_rows(category)
    rows = by_split["train"]
    if METHODS[params.adapt.method].outliers and by_split["calibration"].empty:
        raise UserError(
            f"data.calibration_fraction: method {params.adapt.method} is calibrated on good images that its training "
            "has not seen; set it to 0.2"
        )
    items = items_of(rows, params)
    size = (round(rows["height"].median()), round(rows["width"].median()))
    method = params.adapt.method
    outliers = outlier_files(params, size, category) if METHODS[method].outliers else []
    adapted = adapt_images(backbone, activations, items, params, outliers, size)
    trained = [state for state, step in zip(adapted.snapshots, adapted.steps, strict=True) if step > 0]
    found = with_snapshots(network, backbone.adapted, trained, adapted.steps or [0])
    with atomic_folder(BUILD / "adapt" / category) as folder:
        for layers, at in zip(found.adapted, found.steps, strict=True):
            if at > 0:
                (folder / ADAPTED.format(at)).write_bytes(layers.model)
        if adapted.classifier:
            save_file(dict(adapted.classifier), folder / "classifier.safetensors")
        pd.DataFrame(adapted.history).to_csv(folder / "history.csv", index=False)
        facts = {
            "method": method,
            "steps": found.steps,
            "collapsed_at": adapted.collapsed_at,
            "fingerprint": backbone.fingerprint,
            "provenance": adapted.provenance,
        }
        write_json(folder / "adapt.json", facts)
    print(f"{category}: {summary(method, adapted)}")
    if (step := adapted.collapsed_at) is not None:
        print(f"{category}: features collapsed at step {step} (adapt.on_collapse: {params.adapt.on_collapse})")


def adapt_images(
    backbone: Backbone,
    activations: Activations,
    items: Sequence[Item],
    params: Params,
    outliers: Sequence[Path],
    size: tuple[int, int],
) -> Adapted:
    """Fine-tune on normal images by `params.adapt`, as this stage and the benchmark do.

    Parameters
    ----------
    items : the normal images.
    outliers : files of the images to tell them from, for methods that do.
    size : (height, width) in pixels that outliers are reduced to, that of the normal images.
    """
    activations.warm(items)
    exposed = fisher = None
    if outliers:
        gray = is_gray(items[0].read())
        outlier_items = [outlier_item(file, size, gray) for file in outliers]
        activations.warm(outlier_items, label="outliers")
        exposed = activations.view(outlier_items)
    if METHODS[params.adapt.method].penalty:
        fisher = fisher_diagonal(backbone, activations, items, params)
    return adapt(
        backbone.adapted,
        activations.view(items),
        params.adapt,
        seed=params.seed,
        metric=functools.partial(fit_metric, gallery=params.gallery),
        outliers=exposed,
        fisher=fisher,
    )


def fit_metric(features: Tensor, gallery: GalleryParams) -> Metric:
    """Return what scoring makes of features, fitted to normal images' pretrained ones, (N, D) float32."""
    metric = Metric(gallery.normalize)
    if not gallery.whiten:
        return metric
    whitening = fit_whitening(metric(features).numpy())
    return Metric(gallery.normalize, torch.from_numpy(whitening.mean), torch.from_numpy(whitening.matrix))


def fisher_diagonal(
    backbone: Backbone, activations: Activations, items: Sequence[Item], params: Params
) -> dict[str, Tensor]:
    """Return the Fisher diagonal that `adapt.fisher` asks for.

    It is that of a file, of labeled source images, or of the training images.
    """
    samples, seed = params.adapt.fisher_samples, params.seed
    kept, labels = activations.root.parent / "fisher", None
    if params.adapt.fisher is not None:
        source = Path(params.adapt.fisher)
        if not source.is_dir():
            return load_fisher(source, backbone)
        files = folder_files(source, "adapt.fisher")
        labels = source_labels([file.parent.name for file in files], backbone, str(source))
        chosen = chosen_rows(len(files), samples, seed)
        items, labels = [plain_item(files[i]) for i in chosen], labels[chosen]
        activations.warm(items, label="Fisher's source")
    return cached_fisher(kept, backbone, activations.view(items), labels, samples=samples, seed=seed)


def outlier_files(params: Params, size: tuple[int, int], category: str) -> list[Path]:
    """Return the images of `adapt.outliers`.

    A warning is printed if they are coarser than a category's, of `size` (height, width) in pixels.
    """
    files = folder_files(Path(params.adapt.outliers or ""), "adapt.outliers")
    times = coarseness(files, size, params.backbone.size)
    if times > 1:
        print(
            f"{category}: the images of adapt.outliers are {times:.1f} times coarser than the normal ones "
            f"({size[1]} x {size[0]} pixels); "
            "training may tell them apart by sharpness alone, use larger ones",
            file=sys.stderr,
        )
    return files


def summary(method: str, adapted: Adapted) -> str:
    """Return one line: method, steps, and what adaptation did to the training images' features.

    It reads like 'ses, 9 steps: ...'.
    """
    if len(adapted.history) < 2:
        return f"{method}, features as pretrained"
    first, last = adapted.history[0], adapted.history[-1]
    moved = (
        f"{key.replace('_', ' ')} {first[key]:.4g} to {last[key]:.4g}" for key in ("center_distance", "effective_rank")
    )
    return f"{method}, {last['step']:.0f} steps: {', '.join(moved)}"


if __name__ == "__main__":
    run_stage("adapt", main)
