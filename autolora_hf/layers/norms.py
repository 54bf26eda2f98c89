"""Norm layers with running statistics that stay as they are."""

from __future__ import annotations

from typing import Any

from torch import nn


class FixedStatistics:
    """Mixed into a norm layer: it normalises with its running statistics in train mode too, and never updates them.

    The Frozen net of TWINS (Liu, Xu, Ji, Chan, CVPR 2023) normalises so.
    """

    training: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        training, self.training = self.training, False
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]  # of the norm that this is mixed into
        finally:
            self.training = training


def fix_statistics(norm: nn.Module) -> nn.Module:
    """Makes `norm` keep its running statistics, in place."""
    kind = type(norm)
    norm.__class__ = type(f"Fixed{kind.__name__}", (FixedStatistics, kind), {})
    return norm
