# SPDX-License-Identifier: Apache-2.0
"""Snapshots of the adapted layers as what a bundle keeps of them: float16 differences from the pretrained weights.

Adapted weights lie within about 1e-3 of the pretrained ones, so in float16 they would lose the adaptation.
Float16 *differences* keep 11 bits of it at half the size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

_SCALE = "scale"


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


def _adapts(name: str) -> bool:
    """Return whether a tensor needs a place in a snapshot: batch-norm statistics stay as pretrained."""
    return not name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def pack_snapshots(base: Mapping[str, Tensor], snapshots: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return snapshots as float16 differences from `base`.

    Each snapshot has one power of two, its `scale`, that brings its largest difference near the top of float16's range,
    so that small differences are not flushed to zero. Packing what `unpack_snapshots` gave loses nothing more.

    Parameters
    ----------
    base : state dict of the pretrained layers, float32.
    snapshots : state dicts of adapted layers, same keys and shapes (`num_batches_tracked` may be absent).

    Returns
    -------
    `<s>.<parameter>` -> float16, and `<s>.scale` -> float32 (1,); difference = value / scale. Empty for no snapshots.
    """
    packed: dict[str, Tensor] = {}
    for s, state in enumerate(snapshots):
        deltas = {k: state[k].detach().cpu().float() - base[k].detach().cpu().float() for k in base if _adapts(k)}
        largest = max((float(d.abs().max()) for d in deltas.values() if d.numel()), default=0.0)
        if not math.isfinite(largest):
            raise ValueError(f"snapshot {s} holds a weight that is not finite")
        # rounded to float16's 11 bits first, so that a second packing finds the same scale
        mantissa, exponent = math.frexp(largest)
        exponent += round(mantissa * 2**11) == 2**11
        scale = 2.0 ** min(14 - exponent, 100) if largest > 0 else 1.0
        packed |= {f"{s}.{k}": (d * scale).half().contiguous() for k, d in deltas.items()}
        packed[f"{s}.{_SCALE}"] = torch.tensor([scale])
    return packed


def unpack_snapshots(base: Mapping[str, Tensor], packed: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return full float32 state dicts, in order: the inverse of `pack_snapshots`.

    Raises
    ------
    ValueError
        `packed` does not fit `base`: a parameter is missing or has another shape.
    """
    count = sum(name.endswith(f".{_SCALE}") for name in packed)
    states = []
    for s in range(count):
        state = {}
        for k, value in base.items():
            if k.endswith("num_batches_tracked"):
                continue
            full = value.detach().cpu().float().clone(memory_format=torch.contiguous_format)
            if _adapts(k):
                delta = packed.get(f"{s}.{k}")
                if delta is None or delta.shape != full.shape or f"{s}.{_SCALE}" not in packed:
                    raise ValueError(f"snapshot {s} does not fit the backbone: {k} is missing or of another shape")
                full += delta.float() / packed[f"{s}.{_SCALE}"]
            state[k] = full
        states.append(state)
    return states
