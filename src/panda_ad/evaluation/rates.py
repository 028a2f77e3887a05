# SPDX-License-Identifier: Apache-2.0
"""What a count of alarms says of a rate, however often one looks."""

from __future__ import annotations

import math

from scipy.optimize import brentq
from scipy.special import betaln

_HALF = 0.5  # Jeffreys' prior


def lower_bound(alarms: int, images: int, confidence: float) -> float:
    """Return a lower confidence bound of a rate that holds at all times at once.

    The ratio of the likelihood mixed over Jeffreys' prior to that of the true rate is a martingale. By Ville's
    inequality it ever exceeds 1 / (1 - confidence) with a chance of at most 1 - confidence (Robbins 1970, Statistical
    methods related to the law of the iterated logarithm). So the bound may be looked at after each image; a bound of
    Clopper and Pearson may be looked at once.

    Parameters
    ----------
    alarms, images : of so many images, each an alarm with the same chance.  confidence : in (0, 1).

    Returns
    -------
    In [0, alarms / images].
    """
    if not alarms:
        return 0.0
    good = images - alarms
    mixed = float(betaln(alarms + _HALF, good + _HALF) - betaln(_HALF, _HALF))
    limit = -math.log(1 - confidence)

    def excess(rate: float) -> float:
        return mixed - alarms * math.log(rate) - (good * math.log1p(-rate) if good else 0.0) - limit

    top = alarms / images if good else 1 - 1e-12
    return 0.0 if excess(1e-12) < 0 else top if excess(top) > 0 else float(brentq(excess, 1e-12, top))
