# SPDX-License-Identifier: Apache-2.0
"""Elastic weight consolidation, EWC (paper, section 3.2, equation 4; Kirkpatrick et al., PNAS 2017)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from panda_ad.errors import UserError


class ElasticPenalty:
    """lambda / 2 * sum_i F_i (theta_i - theta*_i)^2 over the adapted layers' parameters theta.

    theta* are the parameters' values at construction.

    The gradient, lambda F (theta - theta*), is added in place.
    Going through autograd would pass over the parameters three more times per step.

    Parameters
    ----------
    layers : the module that will adapt.
    fisher : parameter name -> F_i, non-negative, of the parameter's shape.
    strength : lambda, unitless; 1e4 in the paper.

    Raises
    ------
    UserError
        `fisher` does not fit the layers' parameters.
    """

    def __init__(self, layers: nn.Module, fisher: Mapping[str, Tensor], strength: float):
        named = dict(layers.named_parameters())
        check_fisher(fisher, layers, "Fisher diagonal")
        self.strength = strength
        self.parameters = list(named.values())
        self.anchors = [p.detach().clone() for p in self.parameters]
        self.weights = [
            torch.empty_like(p).copy_(fisher[name]) * strength for name, p in named.items()
        ]  # in the order in memory of p

    @torch.no_grad()
    def value(self) -> float:
        """Return the penalty at the parameters' present values."""
        return float(
            sum(
                (w * (p - a).square()).sum()
                for w, p, a in zip(self.weights, self.parameters, self.anchors, strict=True)
            )
            / 2
        )

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Add the penalty's gradient to `.grad` of every parameter."""
        for p, anchor, weight in zip(self.parameters, self.anchors, self.weights, strict=True):
            assert p.grad is not None
            p.grad.addcmul_(p - anchor, weight)


def check_fisher(fisher: Mapping[str, Tensor], layers: nn.Module, source: str) -> None:
    """Raise UserError, naming `source`, unless each parameter of the layers has a finite, non-negative value."""
    for name, parameter in layers.named_parameters():
        if name not in fisher or fisher[name].shape != parameter.shape:
            found = (
                "missing"
                if name not in fisher
                else f"of shape {tuple(fisher[name].shape)}, not {tuple(parameter.shape)}"
            )
            raise UserError(
                f"{source}: {name} is {found}; it was made for another backbone, set adapt.fisher to one made for this"
            )
        if not bool((fisher[name] >= 0).all()) or not bool(torch.isfinite(fisher[name]).all()):
            raise UserError(f"{source}: {name} has values that are negative or not finite; estimate it again")
