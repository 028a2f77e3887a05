# SPDX-License-Identifier: Apache-2.0
"""A sequential test: has a stream of numbers changed since its reference, when, and in which direction.

Each number gets its conformal p-value among the reference and all numbers before it (Vovk et al., Algorithmic Learning
in a Random World, 2005, section 7.1). While all of them are exchangeable these p-values are independent and uniform,
however few the reference has. Against that one bets: for each possible start of a change a martingale multiplies
densities that are large where p-values are extreme, and the Shiryaev-Roberts sum over the starts is the evidence
(Vovk et al., 'Retrain or not retrain', COPA 2021; Shin, Ramdas and Rinaldo, 'E-detectors', 2022).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass

import numpy as np

STEP = 4
"""A change may start at every so many numbers of the stream; each start counts as often in the sum."""
STARTS = 500
"""Latest starts that are kept: older ones have had 2,000 numbers to show a change."""
BETS = ((0.0, 0.95), (0.1, 0.8), (0.3, 0.6), (0.05, 0.3))
"""(v, w): a share w of the numbers since the change lies among the most extreme share v of those before it."""
MOST = 20_000
"""Newest numbers of a stream that are tested; older ones, in which no change was found, count as reference."""

_MOST_EVIDENCE = 1e200
"""Of one martingale: products stay finite."""


@dataclass(frozen=True)
class Evidence:
    """What a stream says against 'nothing has changed'.

    Attributes
    ----------
    value : the Shiryaev-Roberts sum after the last number; 0 for an empty stream.
    start : index of the first number of the likeliest change; None for an empty stream.
    path : (T,) float64, the sum after each number.
    """

    value: float
    start: int | None
    path: np.ndarray


def limit_of(significance: float, window: int, tests: int) -> float:
    """Return the evidence from which a change counts as found.

    While nothing changes, the evidence less the count of numbers is a martingale. So by Doob's and Ville's inequality
    the chance that the evidence ever reaches c among the first n numbers is at most n / c. With `tests` streams of the
    same images and this limit, the chance of any false alarm among n images, n rounded up to a multiple of `STEP`, is
    at most significance * n / window.

    Parameters
    ----------
    significance : in (0, 1), for a window of images.  window : images.  tests : streams that are watched at once.
    """
    return tests * window / significance


def conformal_p_values(reference: np.ndarray, stream: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return for each number of the stream its p-value among the reference and the numbers before it.

    The p-value is (#{greater} + u (1 + #{equal})) / (1 + #{all}) with u uniform in (0, 1): small for large numbers.

    Parameters
    ----------
    reference : (n,) finite.  stream : (T,) finite, in order.  seed : of u.

    Returns
    -------
    (T,) float64 in (0, 1), independent and uniform while all n + T numbers are exchangeable.
    """
    pool = sorted(reference.tolist())
    u = 1 - np.random.default_rng(seed).random(len(stream))
    p = np.empty(len(stream))
    for t, x in enumerate(stream.tolist()):
        low, high = bisect_left(pool, x), bisect_right(pool, x)
        p[t] = (len(pool) - high + u[t] * (1 + high - low)) / (len(pool) + 1)
        insort(pool, x)
    return p


def evidence_of_change(reference: np.ndarray, stream: np.ndarray, seed: int = 0) -> Evidence:
    """Weigh a stream against 'exchangeable with the reference'; see `limit_of` for what the result guarantees.

    Parameters
    ----------
    reference : (n,) finite, n >= 1.  stream : (T,) finite, in order; of more than `MOST` the newest are tested.
    seed : of the p-values' ties.
    """
    older = max(0, len(stream) - MOST)
    known = np.concatenate([reference, stream[:older]])
    p = conformal_p_values(known, stream[older:], seed)
    path = np.empty(len(p))
    products = np.empty((0, 2 * len(BETS)))  # each start's and bet's martingale
    starts = np.empty(0, dtype=np.int64)
    for t, at in enumerate(p):
        if t % STEP == 0:
            starts = np.append(starts, t)[-STARTS:]
            products = np.vstack([products, np.ones((1, products.shape[1]))])[-STARTS:]
        products = np.minimum(products * _bets(at, len(known) + starts, t - starts + 1), _MOST_EVIDENCE)
        path[t] = STEP * float(products.mean(axis=1).sum())
    if not len(p):
        return Evidence(0.0, None, path)
    best = int(products.max(axis=1).argmax())
    return Evidence(float(path[-1]), older + int(starts[best]), path)


def _bets(p: float, before: np.ndarray, since: np.ndarray) -> np.ndarray:
    """Return the densities at p that each start bets, float64 (starts, 2 * len(BETS)): high numbers, then low ones.

    Had the stream changed at a start with `before` numbers in the pool, the `since`-th number after it would lie among
    the most extreme v of those before and anywhere among those after: its p-value is below the zone
    a = (since + v before) / (since + before). The density is w / a + 1 - w below a, and 1 - w above.

    Parameters
    ----------
    p : in (0, 1).  before, since : int64 (starts,).
    """
    v, w = np.array(BETS).T
    zone = (since[:, None] + v * before[:, None]) / (since + before)[:, None]
    gain = w / zone
    return np.concatenate([gain * (p <= zone), gain * (1 - p <= zone)], axis=1) + np.tile(1 - w, 2)
