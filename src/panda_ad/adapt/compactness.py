"""The compactness loss (paper, section 3.2, equation 2) and the SGD loop that all methods share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from panda_ad.errors import UserError

_PASS = 64  # images per forward pass without gradients


def compactness_loss(features: Tensor, center: Tensor) -> Tensor:
    """mean over images of ||f(x) - c||^2 / d.

    Parameters
    ----------
    features : (B, D).  center : (D,), the mean of the unadapted training features; a constant.

    Returns
    -------
    scalar tensor.
    """
    return (features - center).square().sum(dim=1).mean() / features.shape[1]


def rows_of(layer2: Any, rows: np.ndarray, device: torch.device) -> Tensor:
    """Rows of an array-like of float16 (N, C2, h, w) as float32 (B, C2, h, w), channels last, on `device`."""
    x = torch.from_numpy(np.array(layer2[rows], copy=True)).to(device)
    return x.float().contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def features_of(head: nn.Module, layer2: Any, rows: np.ndarray | None = None) -> Tensor:
    """Pooled float32 features (N, D), on the CPU, of all rows of `layer2` or of some, in bounded memory."""
    device = next(head.parameters()).device
    rows = np.arange(len(layer2)) if rows is None else rows
    return torch.cat(
        [head(rows_of(layer2, rows[i : i + _PASS], device)).float().cpu() for i in range(0, len(rows), _PASS)]
    )


def minibatches(n: int, batch: int, generator: torch.Generator) -> Iterator[np.ndarray]:
    """Row numbers, `batch` at a time, without end: each epoch is a fresh shuffle, its last batch what remains."""
    while True:
        order = torch.randperm(n, generator=generator).numpy()
        for i in range(0, n, batch):
            yield order[i : i + batch]


def in_memory(x: Tensor, like: Tensor) -> Tensor:
    """The values of x, 1-D, in the order in which those of `like`, dense and of the same shape, lie in memory: a view where x lies so too.

    The fused update takes several times as long on tensors that are not contiguous in this sense.
    """
    strides = zip(x.shape, x.stride(), like.stride(), strict=True)
    if any(n > 1 and own != other for n, own, other in strides):
        x = torch.empty_like(like).copy_(x)
    return x.as_strided((x.numel(),), (1,))


@dataclass(frozen=True)
class Since:
    """Means over the steps since the last call of `watch`: loss; gradient norm before clipping; share of steps clipped, 0 to 1."""

    loss: float
    gradient_norm: float
    clipped: float


def descend(
    parameters: list[nn.Parameter],
    loss: Callable[[], Tensor],
    *,
    steps: int,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
    clip_norm: float,
    watch_at: list[int],
    watch: Callable[[int, Since], bool],
    add_gradient: Callable[[], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """SGD with momentum, the gradient's norm clipped as in the paper; as in the authors' code, weight decay comes after the clip.

    Parameters
    ----------
    loss : the next minibatch's loss.
    add_gradient : adds to `.grad` after the loss's backward pass and before the clip.
    watch_at : steps after which `watch(step, since)` is called, ascending; training ends early where it returns True.
    progress : called after each step with (step, steps).

    Raises
    ------
    UserError
        Loss or gradient is no longer finite.
    """
    waiting, sums, last = set(watch_at), np.zeros(3), 0
    flat: list[Tensor] = []
    for step in range(1, steps + 1):
        for p in parameters:
            p.grad = None
        value = loss()
        value.backward()
        if add_gradient is not None:
            add_gradient()
        if step == 1:  # the first forward pass may have laid weights out anew
            flat = [in_memory(p.detach(), p) for p in parameters]
            optimizer = torch.optim.SGD(
                flat, lr=learning_rate, momentum=momentum, weight_decay=weight_decay, fused=True
            )
        for p, values in zip(parameters, flat, strict=True):
            assert p.grad is not None
            values.grad = in_memory(p.grad, p)
        norm = float(torch.nn.utils.clip_grad_norm_(flat, clip_norm))
        if not np.isfinite(norm):
            raise UserError(f"adapt: the gradient is not finite at step {step} of {steps}; lower adapt.learning_rate")
        optimizer.step()
        sums += (value.item(), norm, norm > clip_norm)
        if progress is not None:
            progress(step, steps)
        if step in waiting:
            mean, last, sums = sums / (step - last), step, np.zeros(3)
            if watch(step, Since(*map(float, mean))):
                return
