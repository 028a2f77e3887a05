# SPDX-License-Identifier: Apache-2.0
"""What scoring makes of pooled features before it compares them, as training sees it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Metric(nn.Module):
    """L2 normalization, then whitening, each where scoring does so.

    A loss on what this returns pulls features together by the distance that scoring measures.
    The whitening is that of the pretrained features and a constant: one fitted anew at each step would undo whatever
    the loss gains.

    Parameters
    ----------
    normalize : whether to scale features to unit L2 norm.
    mean, matrix : (D,) and (D, D) float32, whitened = (x - mean) matrix; None: not whitened.
    """

    mean: Tensor | None
    matrix: Tensor | None

    def __init__(self, normalize: bool, mean: Tensor | None = None, matrix: Tensor | None = None):
        super().__init__()
        self.normalize = normalize
        self.register_buffer("mean", mean)
        self.register_buffer("matrix", matrix)

    def forward(self, features: Tensor) -> Tensor:
        """Map pooled features (B, D) to what scoring compares, float32 (B, D)."""
        with torch.autocast(features.device.type, enabled=False):
            x = features.float()
            if self.normalize:
                x = nn.functional.normalize(x)
            return x if self.mean is None or self.matrix is None else (x - self.mean) @ self.matrix
