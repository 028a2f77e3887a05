"""Exact nearest-neighbor distance of many positions to many positions, in bounded memory.

The gain over a plain matrix of distances comes from a lower bound. In an orthonormal basis whose first r directions hold
most of the gallery's variance, with a vector's other C - r coordinates known by their length alone,

    |q - g|^2 = |q_r - g_r|^2 + |q' - g'|^2 >= |q_r - g_r|^2 + (|q'| - |g'|)^2

(r leading coordinates, ' the rest; reversed triangle inequality). The right side is one inner product of r + 2 numbers, so
a matrix product of that width gives the bound for all pairs; its minimum is kept per block of `BLOCK` gallery rows. Where the
processor has bfloat16 the product is in it, and what it may round off is taken off the bound. Only
the blocks whose bound lies below the best distance found so far are computed in full, as sums of squared differences in
float32. A query with too many such blocks is searched by the full-width product, and its best few blocks are
computed in full. So the result is that of the plain search in float32, and no tensor of all pairs ever exists.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from panda_ad.features.backbones import resolve_precision

BLOCK = 16
"""Gallery rows per lower bound kept."""
GROUP = 64
"""Blocks per group: groups are looked at first."""
QUERIES = 4096
"""Most queries searched at a time."""
ROUNDING = 2.0**-8
"""Most that bfloat16 rounds off, relative."""
_PRODUCT = 2**21  # elements of one matrix product: small enough for its minimum to be taken from the processor's cache
_BOUNDS = 2**22  # lower bounds held at a time (16 MB)
_PAIRS = 2**20  # gathered numbers per pass of the full computation
_HARD = 64  # a query with more than 1 / _HARD of all blocks left is cheaper to search by the full-width product ...
_WORTH = 4  # ... if that saves this many times as many pairs as there are blocks: the product has to unpack all of them


@dataclass(frozen=True)
class Basis:
    """An orthonormal basis of the gallery's rows: mean (C,), axes (C, C) by falling variance, both float32, and the rank r.

    Distances are the same in any basis; a good one only makes the bound tight.
    """

    mean: Tensor
    axes: Tensor
    rank: int


@dataclass(frozen=True)
class Rows:
    """Gallery rows as they are stored.

    Attributes
    ----------
    values : float16 (N, C).
    bounds : float32 (N, 2): length of the part outside the basis' leading r directions, squared length; both of the centered row.
    """

    values: Tensor
    bounds: Tensor


def fit_basis(sample: Tensor, energy: float = 0.96) -> Basis:
    """Principal axes of `sample` (N, C); the rank keeps a share `energy` of the variance, at least C / 8."""
    x = sample.double()
    mean = x.mean(0)
    x = x - mean
    variance, axes = torch.linalg.eigh(x.T @ x)
    variance, axes = variance.flip(0).clamp(min=0), axes.flip(1)
    kept = variance.cumsum(0) >= energy * variance.sum()
    rank = max(int(kept.int().argmax()) + 1, len(mean) // 8, 1)
    return Basis(mean.float(), axes.float().contiguous(), rank)


def bounds(values: Tensor, basis: Basis) -> Tensor:
    """float (N, C) -> `Rows.bounds`, float32 (N, 2)."""
    rotated = (values.float() - basis.mean) @ basis.axes
    return torch.stack([rotated[:, basis.rank :].norm(dim=1), rotated.square().sum(1)], dim=1)


@dataclass(frozen=True)
class Packed:
    """Rows made ready for search: keys (N, r + 2) float32 or (N, r + 5) bfloat16, blocks (N / BLOCK, BLOCK, C) float16, length of the longest centered row."""

    keys: Tensor
    blocks: Tensor
    longest: Tensor


@torch.inference_mode()
def pack(rows: Rows, basis: Basis, precision: torch.dtype | None = None) -> Packed:
    """Leading coordinates and lengths of the rows, in whole blocks: with `_narrow`'s row of a query, an inner product gives the bound.

    `precision` of that product: float32 or bfloat16; None: the faster one on this processor.
    """
    precision = resolve_precision("auto") if precision is None else precision
    values, extra = _whole_blocks(rows.values), _whole_blocks(rows.bounds)
    rank, axes = basis.rank, basis.axes[:, : basis.rank]
    shift = basis.mean @ axes
    squared = extra[:, 1:]
    if precision == torch.bfloat16:
        high = squared.bfloat16()
        middle = (squared - high).bfloat16()
        lengths = [
            high,
            middle,
            (squared - high - middle).bfloat16(),
            squared.sqrt(),
        ]  # three parts hold what float32 holds
    else:
        lengths = [squared]
    keys = torch.empty(len(values), rank + 1 + len(lengths), dtype=precision)
    for i in range(0, len(values), 4096):
        keys[i : i + 4096, :rank] = values[i : i + 4096].float() @ axes - shift
    keys[:, rank : rank + 1] = extra[:, :1]
    for i, column in enumerate(lengths):
        keys[:, rank + 1 + i : rank + 2 + i] = column
    return Packed(keys, values.view(-1, BLOCK, values.shape[1]), squared.max().sqrt())


def _narrow(rotated: Tensor, rank: int, precision: torch.dtype) -> Tensor:
    """(P, C) in the basis -> the queries' side of the bound's product, without |q|^2: (P, r + 2) float32 or (P, r + 5) bfloat16.

    In bfloat16 both sides are rounded, each number by up to `ROUNDING` of itself: by Cauchy and Schwarz their product loses at most
    2 (2 + ROUNDING) ROUNDING |q| |g|, which a last column takes off.
    """
    rest, ones = rotated[:, rank:].norm(dim=1, keepdim=True), torch.ones(len(rotated), 1)
    columns = [-2 * rotated[:, :rank], -2 * rest, ones]
    if precision == torch.bfloat16:
        columns += [ones, ones, -4.2 * ROUNDING * rotated.norm(dim=1, keepdim=True)]
    return torch.cat(columns, dim=1).to(precision)


@torch.inference_mode()
def nearest(queries: Tensor, gallery: Iterable[Packed], basis: Basis) -> Tensor:
    """Euclidean distance from each query to the nearest gallery row.

    Parameters
    ----------
    queries : float (P, C).
    gallery : its rows in parts of any size, so that only one part need be in memory; at least one row.

    Returns
    -------
    float32 (P,), equal to the plain float32 search: the winner's distance is a float32 sum of squared differences, and no other row is
    nearer by more than the rounding of float32 products, C x 1.2e-7 x (|q| + |g|)^2 of centered vectors, in squared distance.
    """
    queries = queries.float()
    best = torch.full((len(queries),), torch.inf)
    rotated = (queries - basis.mean) @ basis.axes
    squared = rotated.square().sum(1)
    for part in gallery:
        narrow = _narrow(rotated, basis.rank, part.keys.dtype)
        constant = squared - queries.shape[1] * 1.2e-7 * (squared.sqrt() + part.longest).square()
        for i in range(0, len(queries), QUERIES):
            j = slice(i, i + QUERIES)
            step = max(1, _BOUNDS // len(queries[j]))  # blocks
            for k in range(0, len(part.blocks), step):
                low = _block_minima(part.keys[k * BLOCK : (k + step) * BLOCK], narrow[j], constant[j])
                _search(queries[j], low, part.blocks[k : k + step], best[j], basis)
    return best.sqrt()


def _search(queries: Tensor, low: Tensor, blocks: Tensor, best: Tensor, basis: Basis) -> None:
    """Lower `best` (P,), squared distances, in place by what `blocks` (N / BLOCK, BLOCK, C) hold; `low`: their bounds by `_block_minima`."""
    coarse = low.amin(1)
    value, block = _smallest(low, coarse)
    promising = torch.nonzero(value <= best)[:, 0]
    _compute(queries, blocks, promising, block[promising], best)
    group, query = torch.nonzero(coarse <= best, as_tuple=True)
    which, at = torch.nonzero(low[group, :, query] <= best[query, None], as_tuple=True)
    query, at = query[which], group[which] * GROUP + at
    fresh = at != block[query]  # else computed above
    query, at = query[fresh], at[fresh]
    left = torch.bincount(query, minlength=len(queries))
    hard = left > max(16, len(blocks) // _HARD)
    if int(left[hard].sum()) > _WORTH * len(blocks):
        easy = ~hard[query]
        query, at = query[easy], at[easy]
        _search_full_width(queries, blocks, torch.nonzero(hard)[:, 0], best, basis)
    _compute(queries, blocks, query, at, best)


def _search_full_width(queries: Tensor, blocks: Tensor, which: Tensor, best: Tensor, basis: Basis) -> None:
    """For the queries `which`, compute the 4 blocks of smallest distance by the full-width product."""
    rows = blocks.flatten(0, 1).float() - basis.mean
    centered = queries[which] - basis.mean
    keys = torch.cat([rows, rows.square().sum(1, keepdim=True)], dim=1)
    low = _block_minima(keys, torch.cat([-2 * centered, torch.ones(len(which), 1)], dim=1), torch.zeros(len(which)))
    columns = torch.arange(len(which))
    for _ in range(min(4, len(blocks))):
        _, at = _smallest(low, low.amin(1))
        _compute(queries, blocks, which, at, best)
        low[at // GROUP, at % GROUP, columns] = torch.inf


def _block_minima(keys: Tensor, queries: Tensor, constant: Tensor) -> Tensor:
    """(N, r), (P, r), (P,) -> minimum of keys @ queries.T + constant over each block of rows, float32 (groups, GROUP, P), filled up with infinity.

    From bfloat16, whose products are rounded too, by up to `ROUNDING`, it is lowered by that.
    """
    blocks = len(keys) // BLOCK
    out = torch.empty(-(-blocks // GROUP) * GROUP, len(queries))
    out[blocks:] = torch.inf
    step = max(BLOCK, _PRODUCT // len(queries) // BLOCK * BLOCK)
    buffer = torch.empty(min(step, len(keys)), len(queries), dtype=keys.dtype)
    for i in range(0, len(keys), step):
        part = keys[i : i + step]
        product = torch.mm(part, queries.T, out=buffer[: len(part)])
        low = out[i // BLOCK : (i + len(part)) // BLOCK]
        low.copy_(product.view(-1, BLOCK, len(queries)).amin(1))
        if keys.dtype == torch.bfloat16:
            low.sub_(low.abs(), alpha=1.01 * ROUNDING)
        low.add_(constant)
    return out.view(-1, GROUP, len(queries))


def _smallest(low: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum (P,) of bounds (groups, GROUP, P) over all blocks, and its block (P,); coarse (groups, P) are the groups' minima."""
    value, group = coarse.min(0)
    return value, group * GROUP + low[group, :, torch.arange(low.shape[2])].argmin(1)


def _compute(queries: Tensor, blocks: Tensor, query: Tensor, block: Tensor, best: Tensor) -> None:
    """Squared distances of pairs (query, block) in full; lowers `best` in place."""
    step = max(1, _PAIRS // blocks[0].numel())
    for i in range(0, len(query), step):
        q = query[i : i + step]
        rows = blocks[block[i : i + step]].float()  # (pairs, BLOCK, C)
        distance = rows.sub_(queries[q][:, None]).square_().sum(2).amin(1)
        best.scatter_reduce_(0, q, distance, "amin")


def _whole_blocks(x: Tensor) -> Tensor:
    """Repeat the last row up to a multiple of BLOCK rows; a repeated row changes no minimum."""
    missing = -len(x) % BLOCK
    return torch.cat([x, x[-1:].expand(missing, -1)]) if missing else x
