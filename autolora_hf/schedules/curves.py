"""Learning rates that are a function of the progress of a run alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal


# Share of a run that is done, in [0, 1], to the factor of the learning rate.
Curve = Callable[[float], float]


def constant() -> Curve:
    return lambda progress: 1.0


def milestones(shares: Sequence[float], gamma: float = 0.1) -> Curve:
    """Multiplies the learning rate by `gamma` at each of these shares of the run, as in most robust fine-tuning.

    Args:
        shares (`Sequence[float]`): In (0, 1), rising. The paper's baselines: (30 / 60, 50 / 60).
        gamma (`float`): Factor.
    """
    if not shares or sorted(set(shares)) != list(shares) or not 0 < shares[0] or not shares[-1] < 1:
        raise ValueError(f"`milestones` must be rising shares of the run between 0 and 1, got {list(shares)}.")
    return lambda progress: gamma ** sum(progress >= share for share in shares)


def cosine(warmup: float = 0.0) -> Curve:
    """Half a cosine from 1 to 0 (Loshchilov & Hutter, ICLR 2017), after a linear rise.

    Args:
        warmup (`float`): Share of the run that the rise takes, in [0, 1).
    """
    if not 0 <= warmup < 1:
        raise ValueError(f"`warmup` must be a share of the run in [0, 1), got {warmup}.")

    def factor(progress: float) -> float:
        if progress < warmup:
            return progress / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))

    return factor


CurveName = Literal["milestones", "cosine", "constant"]
