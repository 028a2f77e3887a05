"""Adaptation of the head to a category's normal images (paper, sections 3.2 to 3.4)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from panda_ad.adapt.collapse import SAMPLE
from panda_ad.adapt.compactness import compactness_loss, descend, features_of, minibatches, rows_of
from panda_ad.adapt.convolution import products
from panda_ad.adapt.ewc import ElasticPenalty
from panda_ad.adapt.fisher import cached_fisher, chosen_rows
from panda_ad.adapt.oe import linear_head, outlier_loss
from panda_ad.adapt.snapshots import snapshot_steps
from panda_ad.adapt.watch import Watch
from panda_ad.errors import UserError
from panda_ad.features.backbones import Backbone, fingerprint
from panda_ad.params import AdaptParams

EPOCHS = {"compactness": 15, "ses": 15, "ewc": 50, "oe": 50}
LEARNING_RATE = {"compactness": 1e-2, "ses": 1e-2, "ewc": 1e-2, "oe": 1e-1}
"""The paper's, where the parameters say null."""


@dataclass(frozen=True)
class Adapted:
    """What adaptation gives.

    Attributes
    ----------
    snapshots : head state dicts, float32, without `num_batches_tracked`; [] for method none.
    steps : training steps behind each snapshot; 0 is the pretrained head.
    history : per watched step: step, epoch, loss, penalty (ewc), gradient_norm, clipped, center_distance, feature_variance,
        effective_rank. Step 0 has features' figures only.
    collapsed_at : first watched step at which the features had collapsed, or None. Not judged for oe, which has no center to fall into.
    classifier : oe's linear head {weight (1, D), bias (1,)}, on features as the head gives them, not L2-normalized; else None.
    provenance : what was done, JSON.
    """

    snapshots: list[dict[str, Tensor]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    collapsed_at: int | None = None
    classifier: dict[str, Tensor] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)


def adapt(
    backbone: Backbone,
    layer2: Any,
    params: AdaptParams,
    *,
    seed: int,
    outliers: Any = None,
    fisher: Mapping[str, Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
    precision: torch.dtype = torch.float32,
    fisher_cache: Path | None = None,
) -> Adapted:
    """Fine-tune layer3 and layer4; stem, layer1, layer2 and all batch-norm statistics stay as pretrained.

    Parameters
    ----------
    backbone : left untouched; a copy of its head trains, on the device it lies on.
    layer2, outliers : array-likes of float16 (N, C2, h, w), indexed by integer arrays. `outliers` for method oe only.
    params : `epochs` and `learning_rate` null mean the paper's for the method.
    seed : of shuffling, of oe's linear head and of the Fisher estimate. Equal seeds give equal weights on one machine.
    fisher : for ewc: parameter name -> F_i; None estimates it from `layer2` (kept in `fisher_cache` where given).
    progress : called after each step with (step, steps) in place of the progress bar.
    precision : of the convolutions in training, float32 or bfloat16 (autocast; weights, their updates and snapshots stay float32).

    Raises
    ------
    UserError
        No images, no outliers for oe, a Fisher diagonal of another backbone, training that diverges.
    """
    method = params.method
    if method == "none":
        return Adapted(provenance={"method": "none"})
    n = len(layer2)
    if n == 0:
        raise UserError("adapt: there are no normal training images")
    if method == "oe" and (outliers is None or len(outliers) == 0):
        raise UserError("adapt.outliers: holds no images; method oe needs some to tell normal images from")
    head = copy.deepcopy(backbone.adapted).eval().requires_grad_(True)
    device = next(head.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    epochs = params.epochs or EPOCHS[method]
    learning_rate = params.learning_rate or LEARNING_RATE[method]
    steps = epochs * math.ceil(n / params.batch_size)
    provenance: dict[str, Any] = {
        "method": method,
        "steps": steps,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "images": n,
        "seed": seed,
    }
    provenance |= {"precision": str(precision).removeprefix("torch.")}

    # The unadapted features: their mean is the center, a choice of them the collapse watch's reference.
    with products(torch.float32, device):
        everything = features_of(head, layer2)
    center = everything.double().mean(dim=0).float()
    rows = chosen_rows(n, SAMPLE, seed)
    reference, dimension = everything[rows], everything.shape[1]
    del everything

    on_device = center.to(device)
    normal = minibatches(n, params.batch_size, generator)
    parameters = list(head.parameters())
    linear = penalty = None
    if method == "oe":
        linear = linear_head(dimension, generator).to(device)
        parameters += list(linear.parameters())
        exposed = minibatches(len(outliers), params.batch_size, generator)
        provenance["outliers"] = len(outliers)
    if method == "ewc":
        provenance |= {
            "ewc_lambda": params.ewc_lambda,
            "fisher": "given" if fisher is not None else "estimated from the training images",
        }
        if fisher is None:
            fisher = cached_fisher(fisher_cache, backbone, layer2, samples=params.fisher_samples, seed=seed)
        penalty = ElasticPenalty(head, fisher, params.ewc_lambda)
        provenance["fisher_sha256"] = fingerprint(dict(fisher))

    def loss() -> Tensor:
        rows = next(normal)
        x = rows_of(layer2, rows, device)
        if linear is not None:
            x = torch.cat([x, rows_of(outliers, next(exposed), device)]).contiguous(memory_format=torch.channels_last)
        with (
            torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16),
            products(precision, device),
        ):
            features = head(x)
        features = features.float()
        return (
            compactness_loss(features, on_device) if linear is None else outlier_loss(linear(features)[:, 0], len(rows))
        )

    watch = Watch(
        head,
        layer2,
        rows,
        reference,
        center,
        keep_at=snapshot_steps(steps, params.snapshots) if method == "ses" else [steps],
        steps=steps,
        epochs=epochs,
        judge=linear is None,
        fall_back=params.on_collapse == "fallback",
        penalty=penalty,
    )
    with tqdm(total=steps, desc=method, unit="step", disable=None if progress is None else True) as bar:

        def tick(step: int, total: int) -> None:
            bar.update()
            if progress is not None:
                progress(step, total)

        descend(
            parameters,
            loss,
            steps=steps,
            learning_rate=learning_rate,
            momentum=params.momentum,
            weight_decay=params.weight_decay,
            clip_norm=params.clip_norm,
            watch_at=watch.at,
            watch=watch,
            add_gradient=penalty.add_gradient if penalty is not None else None,
            progress=tick,
        )
    if (step := watch.fallen_back_to) is not None:
        provenance["fell_back_to"] = step
    kept = sorted(watch.snapshots)
    classifier = None if linear is None else {k: v.detach().cpu().clone() for k, v in linear.state_dict().items()}
    return Adapted([watch.snapshots[s] for s in kept], kept, watch.history, watch.collapsed_at, classifier, provenance)
