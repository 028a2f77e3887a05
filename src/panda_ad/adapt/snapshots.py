# SPDX-License-Identifier: Apache-2.0
"""Snapshots: when SES keeps one (paper, section 3.2), and what it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def snapshot_steps(total: int, snapshots: int) -> list[int]:
    """Return the steps after which SES keeps a snapshot.

    They are equally spaced from 0 (pretrained) to `total`; with one snapshot it is the last step.
    """
    if snapshots == 1:
        return [total]
    return sorted({round(total * s / (snapshots - 1)) for s in range(snapshots)})


def layer_state(layers: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the weights and batch-norm statistics, float32 on the CPU, without `num_batches_tracked`."""
    return {
        k: v.detach().cpu().float().clone(memory_format=torch.contiguous_format)
        for k, v in layers.state_dict().items()
        if not k.endswith("num_batches_tracked")
    }
