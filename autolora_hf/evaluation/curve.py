"""Robust accuracy against the radius of the ball."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..config import ThreatModel
from .accuracy import Accuracy


# Shares of the radius of the threat model.
DEFAULT_SHARES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
CURVE_STEPS = 20


@dataclass(frozen=True)
class CurvePoint:
    """Robust accuracy within one radius.

    Args:
        eps (`float`): The radius, in [0, 1] pixels; 0 for clean images.
        accuracy (`Accuracy`): Of the images that no attack within this radius or a smaller one broke.
    """

    eps: float
    accuracy: Accuracy


@dataclass(frozen=True)
class RobustnessCurve:
    """Robust accuracy at growing radii, under PGD: an upper bound at every one of them.

    Each radius is attacked on the images that withstood the smaller ones, whose balls it contains, so that the curve
    never rises.

    Args:
        attack (`str`): The attack in words.
        points (`list[CurvePoint]`): By growing radius, clean images first.
    """

    attack: str
    points: list[CurvePoint]

    @property
    def expected_robustness(self) -> float:
        """Mean robust accuracy over radii between 0 and the largest one, all alike: the area under the curve by its
        width, by the trapezoidal rule; in [0, 1]. Compare it between curves of the same radii alone."""
        area = sum(
            (right.eps - left.eps) * (left.accuracy.value + right.accuracy.value) / 2
            for left, right in itertools.pairwise(self.points)
        )
        return area / self.points[-1].eps


def curve_radii(threat_model: ThreatModel, radii: Sequence[float] | bool) -> list[ThreatModel]:
    """The threat models of a curve, by growing radius.

    Args:
        threat_model (`ThreatModel`): Its norm is that of the curve.
        radii (`Sequence[float]` or `bool`): In [0, 1] pixels, each once. `True`: from a quarter to four times the
            radius of `threat_model`, as far as its norm allows. `False`: none.

    Raises:
        ValueError: If there are no radii, one is no radius of that norm (see [`ThreatModel`]), or one comes twice.
    """
    if radii is False:
        return []
    if radii is True:
        return [
            ThreatModel(threat_model.norm, share * threat_model.eps)
            for share in DEFAULT_SHARES
            if share <= 1 or share * threat_model.eps <= threat_model.largest_eps
        ]
    if isinstance(radii, str) or not isinstance(radii, Sequence) or not radii:
        raise ValueError(f"`curve` must be True, False or a list of radii in [0, 1] pixels, got {radii!r}.")
    models = sorted((ThreatModel(threat_model.norm, radius) for radius in radii), key=lambda model: model.eps)
    for one, other in itertools.pairwise(models):
        if math.isclose(one.eps, other.eps):
            raise ValueError(f"`curve` has the radius {one.eps:g} twice.")
    return models
