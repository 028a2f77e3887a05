# SPDX-License-Identifier: Apache-2.0
"""Losses of training, by the names that `params.METHODS` gives them.

A loss is a function of the network's outputs, float32 (B, ...), and of their target.
For training on normal images alone the outputs are pooled features (B, D), and the target is their center (D,).
The center is a constant: the mean of the pretrained features of all training images.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

NU = 0.1
"""Share of normal images that `soft_boundary` leaves outside its sphere (Ruff et al. try 0.01 and 0.1)."""


def compactness(features: Tensor, center: Tensor) -> Tensor:
    """Return the mean over images of ||f(x) - c||^2 / D (PANDA, section 3.2, equation 2).

    On L2-normalized features it is the angular center loss -f(x).c, up to a constant and a factor of 2 / D (Reiss and
    Hoshen, Mean-Shifted Contrastive Loss for Anomaly Detection, 2021, section 4.2).
    """
    return (features - center).square().sum(dim=1).mean() / features.shape[1]


def soft_boundary(features: Tensor, center: Tensor) -> Tensor:
    """Return R^2 + 1/nu times the mean over images of max(0, ||f(x) - c||^2 / D - R^2).

    This is the soft-boundary loss of Deep SVDD (Ruff et al., ICML 2018, equation 3).

    For given features the best R^2 is the (1 - nu) quantile of the distances, where the loss is flat in R^2.
    So R^2 is a constant to the gradient, and only the images outside the sphere are drawn in.
    """
    distance = (features - center).square().mean(dim=1)  # (B,)
    radius = distance.detach().quantile(1 - NU)
    return radius + (distance - radius).clamp(min=0).mean() / NU


def outlier_exposure(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the binary cross-entropy of logits (B,) and labels (B,), 0 for normal images and 1 for outliers.

    Outlier exposure (PANDA, section 3.4; Hendrycks et al., ICLR 2019): a linear classifier learns with the adapted
    layers, and its logit is the score of an image.
    """
    return nn.functional.binary_cross_entropy_with_logits(logits, labels)


def linear_classifier(dimension: int, generator: torch.Generator) -> nn.Linear:
    """Return nn.Linear(dimension, 1), float32, initialized from `generator`.

    The initialization is PyTorch's default: uniform in +-1/sqrt(dimension).
    """
    classifier = nn.Linear(dimension, 1)
    bound = 1 / math.sqrt(dimension)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    return classifier
