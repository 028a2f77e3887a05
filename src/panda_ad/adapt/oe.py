"""Outlier exposure (paper, section 3.4; Hendrycks et al., ICLR 2019): a linear head tells normal images from outliers.

The score of an image is the logit of 'outlier'. As in the authors' code each step takes a batch of both kinds.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def linear_head(dimension: int, generator: torch.Generator) -> nn.Linear:
    """nn.Linear(dimension, 1), float32, with torch's default initialization (uniform in +-1/sqrt(dimension)) drawn from `generator`."""
    head = nn.Linear(dimension, 1)
    bound = 1 / math.sqrt(dimension)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    return head


def outlier_loss(logits: Tensor, normal: int) -> Tensor:
    """Binary cross-entropy of logits (B,), of which the first `normal` belong to normal images (label 0), the rest to outliers (1)."""
    labels = torch.zeros_like(logits)
    labels[normal:] = 1
    return F.binary_cross_entropy_with_logits(logits, labels)
