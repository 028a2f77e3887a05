"""Convolutions over small maps as few matrix products, for training the head on a CPU.

At 64 px layer3 and layer4 see maps of 4 x 4 and 2 x 2, at 128 px 8 x 8 and 4 x 4. There the library multiplies with the zeros of the
padding too, and its weight gradient takes up to four times as long as the forward pass. Two ways to do with less:

- 3 x 3, stride 1: minimal filtering (Winograd, Arithmetic Complexity of Computations, SIAM 1980; Lavin and Gray, Fast Algorithms for
  Convolutional Neural Networks, CVPR 2016, section 4.1): Y = A [(G w G') . (B x B')] A'. Two outputs of a row of three taps take 4
  multiplications instead of 6, so a 2 x 2 tile takes 16 instead of 36; four outputs take 6 instead of 12. A row of only two positions,
  its surroundings known to be zero, takes 3 (a 2 x 2 Toeplitz matrix), so a 2 x 2 map takes 9. The gradients are the same products
  with the matrices transposed. In bfloat16 a tile is at most 2 x 2: results err twice as much as directly summed ones, with larger
  tiles many times as much.
- otherwise: one product of patches and weights (Chellapilla et al., High Performance Convolutional Neural Networks for Document
  Processing, IWFHR 2006: 'unrolling').

Maps lie in memory as (H, W, B, C) and weights as (k, k, C, C'), so that the products need no copies.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.amp import custom_fwd
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

POSITIONS = 64
"""Largest map, in output positions, that is taken; over larger ones the library is as fast."""

_Tile = tuple[list[list[float]], list[list[float]], list[list[float]]]
# Lavin and Gray's F(2, 3) and F(4, 3), A and B transposed: outputs x products, products x taps, products x inputs
_F2: _Tile = (
    [[1, 1, 1, 0], [0, 1, -1, -1]],
    [[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]],
    [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
)
_F4: _Tile = (
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ],
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
)
# rows of one and of two positions between zeros
_ALONE: _Tile = ([[1]], [[0, 1, 0]], [[0, 1, 0]])
_PAIR: _Tile = ([[0, 1, 1], [1, 1, 0]], [[1, -1, 0], [0, 1, 0], [0, -1, 1]], [[0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0]])


class small_convolutions(TorchFunctionMode):
    """Within it, `conv2d` over small maps on the CPU, square kernels, without bias, groups or dilation, is done as above, and batch norm
    with fixed statistics is one multiplication and addition.

    A weight's first use lays its values out anew (`.data`); its shape and values stay.

    Parameters
    ----------
    precision : of the matrix products, float32 or bfloat16; results are float32.
    """

    def __init__(self, precision: torch.dtype = torch.float32):
        super().__init__()
        self.precision = precision
        self._filters: dict[tuple[int, int, int], tuple[Tensor, int, Tensor]] = {}

    def kept_filters(self, weight: Tensor, h: int, w: int) -> Tensor | None:
        """`filters_of` a weight that no gradient is asked for, made once while its values stay; else None.

        The fused update of weights does not count as a change of theirs, but a pass with gradients comes before it.
        """
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            self._filters.clear()
            return None
        key = (id(weight), h, w)
        if key not in self._filters or self._filters[key][1] != weight._version:
            self._filters[key] = (weight, weight._version, filters_of(weight, h, w, self.precision))
        return self._filters[key][2]

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.conv2d and len(args) == 7 and not kwargs:
            x, weight, bias, stride, padding, dilation, groups = args
            k, s, p = weight.shape[2], stride[0], padding[0]
            square = weight.shape[3] == k and tuple(stride) == (s, s) and tuple(padding) == (p, p)
            plain = square and bias is None and groups == 1 and tuple(dilation) == (1, 1)
            if plain and x.device.type == "cpu" and weight.dtype == torch.float32:
                h, w = out_shape(x.shape[2], x.shape[3], k, s, p)
                if h * w <= POSITIONS:
                    if weight.is_leaf and not torch.is_inference_mode_enabled():
                        weight.data = taps_first(weight.data).permute(3, 2, 0, 1)
                    if (k, s, p) == (3, 1, 1):
                        return FilteredConvolution.apply(x, weight, self.precision, self.kept_filters(weight, h, w))
                    return UnrolledConvolution.apply(x, weight, s, p, self.precision)
        if (
            func is F.batch_norm
            and kwargs.get("training") is False
            and len(args) == 3
            and args[0].dim() == 4
            and kwargs["weight"] is not None
        ):
            return fixed_batch_norm(*args, kwargs["weight"], kwargs["bias"], kwargs["eps"])
        return func(*args, **kwargs)


def products(precision: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """`small_convolutions` on the CPU; elsewhere the library's."""
    return small_convolutions(precision) if device.type == "cpu" else nullcontext()


def fixed_batch_norm(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Batch norm of (B, C, h, w) with fixed statistics (C,), in the order in memory of x; the library's copies what is not channels last."""
    scale = weight * (variance + eps).rsqrt()
    return torch.addcmul((bias - mean * scale).view(1, -1, 1, 1), x, scale.view(1, -1, 1, 1))


@functools.cache
def filtering(n: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """A (n, m, T), G (m, 3), B (m, T, n): sum_it A (G w)_i (B x)_it is the convolution of n values, zeros around them, with three taps.

    T tiles of `outputs` each (2 or 4), m products a tile.
    """
    if n <= 2:
        matrices, outputs = (_ALONE, _PAIR)[n - 1], n
    else:
        matrices = {2: _F2, 4: _F4}[outputs]
    a_tile, g, b_tile = (torch.tensor(matrix, dtype=torch.float32) for matrix in matrices)
    tiles, m = -(-n // outputs), len(g)
    a, b = torch.zeros(tiles * outputs, m, tiles), torch.zeros(m, tiles, tiles * outputs + 2)
    for t in range(tiles):
        here = t * outputs
        a[here : here + outputs, :, t] = a_tile
        b[:, t, here : here + outputs + 2] = b_tile
    return a[:n], g, b[:, :, 1 : n + 1]


@functools.cache
def filtering_2d(h: int, w: int, precision: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """`filtering` along both axes at once: A (h w, m m T T) and B (m m T T, h w) in `precision`, G (m m, 9) in float32.

    T may differ between the axes, and so may m.
    """
    # as measured: over 4 x 4, tiles of 4 x 4 lose to the transforms of their weights what their products save over 4 x 2
    tall, wide = (2, 2) if precision == torch.bfloat16 else (4, 4 if max(h, w) > 4 else 2)
    (ay, gy, by), (ax, gx, bx) = filtering(h, tall), filtering(w, wide)
    a = torch.einsum("pit,qjs->pqijts", ay, ax).reshape(h * w, -1)
    b = torch.einsum("itp,jsq->ijtspq", by, bx).reshape(-1, h * w)
    return (
        a.to(precision),
        torch.kron(gy, gx),
        b.to(precision),
    )  # bfloat16 holds what A and B of 2 x 2 tiles hold, -1, 0 and 1


def filters_of(weight: Tensor, h: int, w: int, precision: torch.dtype) -> Tensor:
    """G w, (C', C, 3, 3) -> (m m, C, C') in `precision`."""
    taps, g = taps_first(weight), filtering_2d(h, w, precision)[1]
    if (h, w) == (2, 2):  # _PAIR in place, in half the time
        taps = taps.to(precision, copy=True)
        taps[0::2].sub_(taps[1])
        taps[:, 0::2].sub_(taps[:, 1:2])
    else:
        taps = g @ taps.view(9, -1)
    return taps.to(precision).view(len(g), *weight.shape[1::-1])


def weights_of(filters: Tensor, h: int, w: int) -> Tensor:
    """G' u, the transpose of `filters_of`: (m m, C, C'), overwritten -> float32 (C', C, 3, 3)."""
    m, c, _ = filters.shape
    taps, g = filters.float(), filtering_2d(h, w, filters.dtype)[1]
    if (h, w) == (2, 2):
        taps = taps.view(3, 3, c, -1)
        taps[1].sub_(taps[0]).sub_(taps[2])
        taps[:, 1].sub_(taps[:, 0]).sub_(taps[:, 2])
    else:
        taps = (g.t() @ taps.view(m, -1)).view(3, 3, c, -1)
    return taps.permute(3, 2, 0, 1)


class FilteredConvolution(torch.autograd.Function):
    """conv2d(x, weight, padding=1): (B, C, h, w), (C', C, 3, 3) -> float32 (B, C', h, w); `filters`: those of the weight, where they are known."""

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx: Any, x: Tensor, weight: Tensor, precision: torch.dtype, filters: Tensor | None) -> Tensor:
        b, c, h, w = x.shape
        ctx.shape, ctx.matrices = x.shape, filtering_2d(h, w, precision)
        to_outputs, _, to_inputs = ctx.matrices
        # autocast brings tensors among the arguments to float32
        filters = filters_of(weight, h, w, precision) if filters is None else filters.to(precision)
        inputs = (to_inputs @ positions_first(x).to(precision).view(h * w, -1)).view(
            len(filters), -1, c
        )  # (m m, T T B, C)
        ctx.save_for_backward(inputs, filters)
        products = torch.bmm(inputs, filters)  # (m m, T T B, C')
        return (to_outputs @ products.view(to_outputs.shape[1], -1)).float().view(h, w, b, -1).permute(2, 3, 0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        inputs, filters = ctx.saved_tensors
        b, c, h, w = ctx.shape
        to_outputs, _, to_inputs = ctx.matrices
        g = positions_first(gradient).to(filters.dtype).view(h * w, -1)
        products = (to_outputs.t() @ g).view(len(filters), -1, filters.shape[2])  # (m m, T T B, C')
        for_weight = weights_of(torch.bmm(inputs.transpose(1, 2), products), h, w)
        if not ctx.needs_input_grad[0]:
            return None, for_weight, None, None
        for_inputs = torch.bmm(products, filters.transpose(1, 2))  # (m m, T T B, C)
        for_x = (to_inputs.t() @ for_inputs.view(len(to_inputs), -1)).float().view(h, w, b, c)
        return for_x.permute(2, 3, 0, 1), for_weight, None, None


class UnrolledConvolution(torch.autograd.Function):
    """conv2d(x, weight, stride, padding): (B, C, H, W), (C', C, k, k) -> float32 (B, C', h, w)."""

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int, precision: torch.dtype) -> Tensor:
        k = weight.shape[2]
        h, w = out_shape(x.shape[2], x.shape[3], k, stride, padding)
        unrolled = patches(positions_first(x).to(precision), k, stride, padding)  # (h w B, k k C)
        matrix = taps_first(weight).to(precision).view(-1, weight.shape[0])  # (k k C, C')
        ctx.save_for_backward(unrolled, matrix)
        ctx.geometry = (x.shape, k, stride, padding)
        return (unrolled @ matrix).float().view(h, w, len(x), -1).permute(2, 3, 0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
        unrolled, matrix = ctx.saved_tensors
        (b, c, height, width), k, stride, padding = ctx.geometry
        h, w = out_shape(height, width, k, stride, padding)
        g = positions_first(gradient).view(h * w * b, -1).to(matrix.dtype)
        for_weight = (unrolled.t() @ g).float().view(k, k, c, -1).permute(3, 2, 0, 1)
        if not ctx.needs_input_grad[0]:
            return None, for_weight, None, None, None
        parts = (g @ matrix.t()).float().view(h, w, b, k, k, c)
        padded = parts.new_zeros(height + 2 * padding, width + 2 * padding, b, c)
        for i in range(k):
            for j in range(k):
                padded[i : i + stride * h : stride, j : j + stride * w : stride] += parts[:, :, :, i, j]
        return (
            padded[padding : padding + height, padding : padding + width].permute(2, 3, 0, 1),
            for_weight,
            None,
            None,
            None,
        )


def out_shape(height: int, width: int, k: int, stride: int, padding: int) -> tuple[int, int]:
    """Height and width of a convolution's result."""
    return (height + 2 * padding - k) // stride + 1, (width + 2 * padding - k) // stride + 1


def positions_first(x: Tensor) -> Tensor:
    """(B, C, H, W) -> contiguous (H, W, B, C)."""
    return x.permute(2, 3, 0, 1).contiguous()


def taps_first(weight: Tensor) -> Tensor:
    """(C', C, k, k) -> contiguous (k, k, C, C')."""
    return weight.permute(2, 3, 1, 0).contiguous()


def patches(x: Tensor, k: int, stride: int, padding: int) -> Tensor:
    """What each output position sees: (H, W, B, C) -> (h w B, k k C), rows and columns of the kernel before channels."""
    h, w = out_shape(x.shape[0], x.shape[1], k, stride, padding)
    x = F.pad(x, (0, 0, 0, 0, padding, padding, padding, padding)) if padding else x
    taps = [x[i : i + stride * h : stride, j : j + stride * w : stride] for i in range(k) for j in range(k)]
    return torch.cat(taps, dim=3).view(-1, k * k * x.shape[3])
