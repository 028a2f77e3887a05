# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning of the adapted layers on a category's normal images (paper, sections 3.2 to 3.4).

The methods are those of `params.METHODS`.
Training knows only one thing of a network's adapted layers: they map frozen activations to pooled features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd
from tqdm import trange

from panda_ad.adapt import losses
from panda_ad.adapt.batches import minibatches, pooled
from panda_ad.adapt.collapse import SAMPLE, Watch
from panda_ad.adapt.ewc import ElasticPenalty
from panda_ad.adapt.fisher import chosen_rows
from panda_ad.adapt.plan import Plan, check_images, plan_training, provenance
from panda_ad.adapt.snapshots import layer_state
from panda_ad.errors import UserError
from panda_ad.params import METHODS, AdaptParams


@dataclass(frozen=True)
class Adapted:
    """What adaptation gives.

    Attributes
    ----------
    snapshots : state dicts of the adapted layers, float32, without `num_batches_tracked`; [] for method none.
    steps : training steps behind each snapshot; 0 is as pretrained.
    history : per look: step, epoch, loss, penalty (ewc), gradient_norm, clipped (share of steps), center_distance,
        feature_variance, effective_rank. Step 0 has the features' figures only.
        Loss, norm and share are means over the steps since the look before.
    collapsed_at : first look at which the features had collapsed, or None.
        Not judged with outliers, which keep features apart.
    classifier : oe's linear classifier {weight (1, D), bias (1,)}, on features that are not L2-normalized; else None.
    provenance : what was done, JSON.
    """

    snapshots: list[dict[str, Tensor]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    collapsed_at: int | None = None
    classifier: dict[str, Tensor] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)


def adapt(
    layers: nn.Module,
    activations: Any,
    params: AdaptParams,
    *,
    seed: int,
    metric: Callable[[Tensor], nn.Module] | None = None,
    outliers: Any = None,
    fisher: Mapping[str, Tensor] | None = None,
) -> Adapted:
    """Fine-tune a copy of `layers` on the device where they lie; batch-norm statistics stay as pretrained.

    Parameters
    ----------
    layers : (B, C, h, w) float32 -> pooled features (B, D).
    activations, outliers : array-likes of float16 (N, C, h, w), indexed by integer arrays.
        `outliers` is for method oe only.
    seed : of shuffling and of oe's classifier. Equal seeds give equal weights on one machine.
    metric : pretrained features of the normal images, (N, D) -> a module like `metric.Metric`.
        The loss is measured on what that makes of features (B, D). None: on the features as they are.
        Not for oe, whose classifier takes features as they are.
    fisher : for ewc: parameter name -> F_i.

    Raises
    ------
    UserError
        No images, no outliers for oe, a Fisher diagonal of another network, training that diverges.
    """
    if not METHODS[params.method].loss:
        return Adapted(provenance={"method": params.method})
    check_images(params, activations, outliers)
    method, plan = METHODS[params.method], plan_training(params, len(activations))
    exposed = outliers if method.outliers else None
    layers = copy.deepcopy(layers).eval().requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    pretrained, network = pooled(layers, activations), layers  # (N, D)
    if metric is not None and exposed is None:
        compared = metric(pretrained)
        pretrained = compared(pretrained)
        network = nn.Sequential(layers, compared.to(next(layers.parameters()).device))
    center = pretrained.double().mean(dim=0).float()  # (D,)
    classifier = losses.linear_classifier(len(center), generator) if exposed is not None else None
    penalty = ElasticPenalty(layers, fisher or {}, params.ewc_lambda) if method.penalty else None
    rows = chosen_rows(len(activations), SAMPLE, seed)
    watch = Watch(pretrained[rows], center, layer_state(layers), plan.keep, judge=exposed is None)
    batches = minibatches(activations, exposed, params.batch_size, generator, next(layers.parameters()).device)
    facts = provenance(params, plan, fisher) | {"as_scored": network is not layers, "seed": seed}
    facts |= {"images": len(activations), "outliers": 0 if exposed is None else len(exposed)}
    for figures in descend(network, classifier, batches, center, penalty, params, plan):
        fallen = watch.look(figures, pooled(network, activations, rows), layer_state(layers))
        if fallen and params.on_collapse == "fallback":
            facts["fell_back_to"] = watch.fall_back()
            break
    steps, states = zip(*sorted(watch.snapshots.items()), strict=True)
    trained = None if classifier is None else layer_state(classifier)
    return Adapted(list(states), list(steps), watch.history, watch.collapsed_at, trained, facts)


def descend(
    network: nn.Module,
    classifier: nn.Module | None,
    batches: Iterator[tuple[Tensor, Tensor]],
    center: Tensor,
    penalty: ElasticPenalty | None,
    params: AdaptParams,
    plan: Plan,
) -> Iterator[dict[str, float]]:
    """Train by SGD with momentum, the gradient's norm clipped (paper, section 4).

    Yields a history row at each of `plan.looks`.
    """
    loss_of = getattr(losses, METHODS[params.method].loss)
    parameters = [*network.parameters(), *(classifier.parameters() if classifier is not None else ())]
    device, bf16 = parameters[0].device, params.precision == "bf16"
    center, recent = center.to(device), []
    velocities = [torch.zeros_like(p) for p in parameters]
    for step in trange(1, plan.steps + 1, desc=params.method, unit="step", disable=None):
        x, labels = next(batches)  # (B, C, h, w), (B,)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            features = network(x)  # (B, D)
        if classifier is None:
            loss = loss_of(features.float(), center)
        else:
            loss = loss_of(classifier(features.float())[:, 0], labels)
        for p in parameters:
            p.grad = None
        loss.backward()
        if penalty is not None:
            penalty.add_gradient()
        # as in the authors' code, weight decay is added after the clip
        norm = nn.utils.clip_grad_norm_(parameters, params.clip_norm)
        if not torch.isfinite(norm):
            raise UserError(
                f"adapt: the gradient is not finite at step {step} of {plan.steps}; lower adapt.learning_rate"
            )
        sgd_step(parameters, velocities, plan.learning_rate, params)
        recent.append((loss.item(), norm.item(), float(norm > params.clip_norm)))
        if step in plan.looks:
            row = {"step": float(step), "epoch": step * plan.epochs / plan.steps}
            row |= zip(("loss", "gradient_norm", "clipped"), np.mean(recent, axis=0).tolist(), strict=True)
            yield row if penalty is None else row | {"penalty": penalty.value()}
            recent.clear()


@torch.no_grad()
def sgd_step(parameters: list[nn.Parameter], velocities: list[Tensor], rate: float, params: AdaptParams) -> None:
    """Take one step of `torch.optim.SGD` in place; parameters without a gradient stay.

    `torch.optim.SGD` itself imports PyTorch's compiler when it is made, which takes as much processor time as some ten
    steps on a small network.

    Parameters
    ----------
    velocities : momentum buffers, of the parameters' shapes; zeros before the first step.
    rate : learning rate.
    """
    moved = [(p, p.grad, v) for p, v in zip(parameters, velocities, strict=True) if p.grad is not None]
    weights, gradients, buffers = map(list, zip(*moved, strict=True))
    sgd(
        weights,
        gradients,
        buffers,
        lr=rate,
        momentum=params.momentum,
        weight_decay=params.weight_decay,
        dampening=0,
        nesterov=False,
        maximize=False,
    )
