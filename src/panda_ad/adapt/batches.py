# SPDX-License-Identifier: Apache-2.0
"""Frozen activations as the batches that training and feature passes read, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PASS = 64  # images per forward pass without gradients


def load_batch(activations: Any, rows: np.ndarray, device: torch.device) -> Tensor:
    """Return rows of an array-like of float16 (N, C, h, w) as float32 (B, C, h, w), channels last, on `device`."""
    x = torch.from_numpy(np.array(activations[rows], copy=True)).to(device)
    return x.float().contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def pooled(network: nn.Module, activations: Any, rows: np.ndarray | None = None) -> Tensor:
    """Return what `network` makes of all rows of `activations`, or of some: float32 (N, D), on the CPU."""
    device = next(network.parameters()).device
    rows = np.arange(len(activations)) if rows is None else rows
    starts = range(0, len(rows), _PASS)
    return torch.cat([network(load_batch(activations, rows[i : i + _PASS], device)).float().cpu() for i in starts])


def shuffled(n: int, batch: int, generator: torch.Generator) -> Iterator[np.ndarray]:
    """Yield row numbers, `batch` at a time, without end: each epoch is a fresh shuffle, its last batch what remains."""
    while True:
        order = torch.randperm(n, generator=generator).numpy()
        for i in range(0, n, batch):
            yield order[i : i + batch]


def minibatches(
    normal: Any, outliers: Any, batch: int, generator: torch.Generator, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches without end: activations (B, C, h, w), and labels (B,), 0 for normal images and 1 for outliers.

    As in the authors' code, a batch holds `batch` images of either kind; normal ones alone where `outliers` is None.
    """
    exposed = None if outliers is None else shuffled(len(outliers), batch, generator)
    for rows in shuffled(len(normal), batch, generator):
        x = load_batch(normal, rows, device)  # (b, C, h, w)
        count = len(x)
        if exposed is not None:
            x = torch.cat([x, load_batch(outliers, next(exposed), device)])  # (2b, C, h, w)
        labels = torch.zeros(len(x), device=device)
        labels[count:] = 1
        yield x.contiguous(memory_format=torch.channels_last), labels
