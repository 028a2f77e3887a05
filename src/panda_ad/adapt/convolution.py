"""Convolutions over small maps as one matrix product, for training in bfloat16.

At 64 px layer3 and layer4 see maps of 4 x 4 and 2 x 2. There the library's weight gradient takes three to six times as long as the
product of patches and gradients that it equals (Chellapilla et al., High Performance Convolutional Neural Networks for Document
Processing, IWFHR 2006: 'unrolling'), and a training step is mostly weight gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

POSITIONS = 16
"""Largest map, in output positions, that is taken; over larger ones the library is the faster."""


class small_convolutions(TorchFunctionMode):
    """Within it, `conv2d` over small maps, square kernels, without bias, groups or dilation, is `UnrolledConvolution` in bfloat16."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.conv2d and len(args) == 7 and not kwargs:
            x, weight, bias, stride, padding, dilation, groups = args
            k, s, p = weight.shape[2], stride[0], padding[0]
            square = weight.shape[3] == k and tuple(stride) == (s, s) and tuple(padding) == (p, p)
            if square and bias is None and groups == 1 and tuple(dilation) == (1, 1):
                h, w = out_shape(x.shape[2], x.shape[3], k, s, p)
                if h * w <= POSITIONS:
                    return UnrolledConvolution.apply(x, weight, s, p)
        return func(*args, **(kwargs or {}))


class UnrolledConvolution(torch.autograd.Function):
    """conv2d(x, weight, stride, padding) in bfloat16: (B, C, H, W), (C', C, k, k) -> bfloat16 (B, C', h, w), channels last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        k = weight.shape[2]
        h, w = out_shape(x.shape[2], x.shape[3], k, stride, padding)
        unrolled = patches(x.bfloat16().permute(0, 2, 3, 1), k, stride, padding)
        matrix = weight.permute(0, 2, 3, 1).bfloat16().reshape(weight.shape[0], -1)  # (C', k k C)
        ctx.save_for_backward(unrolled, matrix)
        ctx.geometry = (x.shape, k, stride, padding)
        return (unrolled @ matrix.t()).view(len(x), h, w, -1).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        unrolled, matrix = ctx.saved_tensors
        shape, k, stride, padding = ctx.geometry
        b, c, height, width = shape
        h, w = out_shape(height, width, k, stride, padding)
        g = gradient.bfloat16().permute(0, 2, 3, 1).reshape(b * h * w, -1)
        for_weight = (g.t() @ unrolled).view(-1, k, k, c).permute(0, 3, 1, 2)
        if not ctx.needs_input_grad[0]:
            return None, for_weight, None, None
        parts = (g @ matrix).view(b, h, w, k, k, c)
        padded = parts.new_zeros(b, height + 2 * padding, width + 2 * padding, c)
        for i in range(k):
            for j in range(k):
                padded[:, i : i + stride * h : stride, j : j + stride * w : stride] += parts[:, :, :, i, j]
        return padded[:, padding : padding + height, padding : padding + width].permute(0, 3, 1, 2), for_weight, None, None


def out_shape(height: int, width: int, k: int, stride: int, padding: int) -> tuple[int, int]:
    """Height and width of a convolution's result."""
    return (height + 2 * padding - k) // stride + 1, (width + 2 * padding - k) // stride + 1


def patches(x: Tensor, k: int, stride: int, padding: int) -> Tensor:
    """What each output position sees: (B, H, W, C) -> (B h w, k k C), rows and columns of the kernel before channels."""
    h, w = out_shape(x.shape[1], x.shape[2], k, stride, padding)
    x = F.pad(x, (0, 0, padding, padding, padding, padding)) if padding else x
    taps = [x[:, i : i + stride * h : stride, j : j + stride * w : stride] for i in range(k) for j in range(k)]
    return torch.cat(taps, dim=3).reshape(-1, k * k * x.shape[3])
