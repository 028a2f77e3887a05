"""What is kept of training as it goes: its history, the snapshots asked for, and whether the features have collapsed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from panda_ad.adapt.collapse import collapsed, feature_statistics
from panda_ad.adapt.compactness import Since, features_of
from panda_ad.adapt.convolution import products
from panda_ad.adapt.ewc import ElasticPenalty
from panda_ad.adapt.snapshots import head_state, snapshot_steps
from panda_ad.errors import UserError

WATCHED = 10
"""Most intervals of training at whose ends the collapse watch looks; at most one an epoch, so that looking stays cheaper than training."""


class Watch:
    """`descend`'s watch over a head in training.

    Parameters
    ----------
    head : as yet unadapted.
    layer2, rows : the training images (`adapt`), and those that are looked at.
    reference : their unadapted features, (len(rows), D).  center : (D,).
    keep_at : steps whose heads are kept; 0 is the unadapted one.
    steps, epochs : of the training.
    judge : whether collapse is judged.  fall_back : whether it ends training, the last good head kept.
    penalty : whose value is logged.

    Attributes
    ----------
    at : steps to be called after.
    snapshots : step -> head state.  history, collapsed_at : see `Adapted`.
    """

    def __init__(
        self,
        head: nn.Module,
        layer2: Any,
        rows: np.ndarray,
        reference: Tensor,
        center: Tensor,
        *,
        keep_at: Sequence[int],
        steps: int,
        epochs: int,
        judge: bool,
        fall_back: bool,
        penalty: ElasticPenalty | None,
    ):
        self.adapted, self.layer2, self.rows, self.center = head, layer2, rows, center
        self.keep_at, self.steps, self.epochs = keep_at, steps, epochs
        self.judge, self.fall_back, self.penalty = judge, fall_back, penalty
        self.at = sorted({*keep_at, *snapshot_steps(steps, min(WATCHED, epochs) + 1)} - {0})
        self.start = feature_statistics(reference, center)
        self.history: list[dict[str, float]] = [{"step": 0.0, "epoch": 0.0, **self.start}]
        self.collapsed_at: int | None = None
        self._last_good = (0, head_state(head))
        self.snapshots = {0: head_state(head)} if 0 in keep_at else {}

    def __call__(self, step: int, since: Since) -> bool:
        """Look at the head after `step`; True ends training. UserError where its features are not finite."""
        with products(torch.float32, next(self.adapted.parameters()).device):
            features = features_of(self.adapted, self.layer2, self.rows)
        if not torch.isfinite(features).all():
            raise UserError(
                f"adapt: the features are not finite after step {step} of {self.steps}; lower adapt.learning_rate"
            )
        now = feature_statistics(features, self.center)
        row = {"step": float(step), "epoch": step * self.epochs / self.steps, "loss": since.loss}
        if self.penalty is not None:
            row["penalty"] = self.penalty.value()
        self.history.append({**row, "gradient_norm": since.gradient_norm, "clipped": since.clipped, **now})
        if self.collapsed_at is None and self.judge and collapsed(now, self.start):
            self.collapsed_at = step
            if self.fall_back:
                good, state = self._last_good
                self.snapshots[good] = state
                return True
        if step in self.keep_at:
            self.snapshots[step] = head_state(self.adapted)
        if self.collapsed_at is None:
            self._last_good = (step, head_state(self.adapted))
        return False

    @property
    def fallen_back_to(self) -> int | None:
        """The step whose head is kept in place of the collapsed one; None where none collapsed, or no fall-back was asked for."""
        return self._last_good[0] if self.fall_back and self.collapsed_at is not None else None
