# SPDX-License-Identifier: Apache-2.0
"""What the parameters of adaptation come to: steps, rate, and what is kept of the way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from panda_ad.adapt.collapse import LOOKS
from panda_ad.adapt.snapshots import snapshot_steps
from panda_ad.errors import UserError
from panda_ad.features.backbones import fingerprint
from panda_ad.params import METHODS, AdaptParams


@dataclass(frozen=True)
class Plan:
    """A method's training in numbers.

    Attributes
    ----------
    epochs : passes over the training images.
    learning_rate : of SGD.
    steps : batches in all epochs.
    keep : steps after which weights are kept; 0 is the pretrained ones.
    looks : steps after which features are looked at.
    """

    epochs: int
    learning_rate: float
    steps: int
    keep: list[int]
    looks: list[int]


def plan_training(params: AdaptParams, images: int) -> Plan:
    """Return the plan for so many images; the paper's epochs and rate where the parameters say null."""
    method = METHODS[params.method]
    epochs = params.epochs or method.epochs
    steps = epochs * math.ceil(images / params.batch_size)
    keep = snapshot_steps(steps, params.snapshots) if method.snapshots else [steps]
    looks = sorted({*keep, *snapshot_steps(steps, min(LOOKS, epochs) + 1)} - {0})
    return Plan(epochs, params.learning_rate or method.learning_rate, steps, keep, looks)


def check_images(params: AdaptParams, normal: Any, outliers: Any) -> None:
    """Raise UserError where there are no normal images, or no outliers for a method that needs them."""
    if len(normal) == 0:
        raise UserError("adapt: there are no normal training images")
    if METHODS[params.method].outliers and (outliers is None or len(outliers) == 0):
        raise UserError(
            f"adapt.outliers: holds no images; method {params.method} needs some to tell normal images from"
        )


def provenance(params: AdaptParams, plan: Plan, fisher: Mapping[str, Tensor] | None) -> dict[str, Any]:
    """Return what the method trained with, JSON."""
    facts: dict[str, Any] = {
        "method": params.method,
        "steps": plan.steps,
        "epochs": plan.epochs,
        "learning_rate": plan.learning_rate,
        "precision": params.precision,
    }
    if METHODS[params.method].penalty:
        source = "estimated from the training images" if params.fisher is None else "given"
        facts |= {"ewc_lambda": params.ewc_lambda, "fisher": source, "fisher_sha256": fingerprint(dict(fisher or {}))}
    return facts
