"""Automatic loss scalars of AutoLoRa (Xu et al., ICLR 2024)."""

from __future__ import annotations

from typing import NamedTuple


class LossScalars(NamedTuple):
    """Weights of the objective: `lambda1` of the natural cross-entropy, `1 - lambda1` of the robust one, `lambda2` of
    the KL term."""

    lambda1: float
    lambda2: float


def loss_scalars(accuracy: float, alpha: float = 1.0, lambda2_max: float = 6.0) -> LossScalars:
    """`lambda1 = 1 - SA^alpha` and `lambda2 = lambda2_max * SA^alpha`.

    Args:
        accuracy (`float`): SA, accuracy of the natural route on clean training images, in [0, 1].
        alpha (`float`): Sharpness of the change from natural to robust training.
        lambda2_max (`float`): Weight of the KL term at SA = 1, TRADES' usual 6.
    """
    if not 0 <= accuracy <= 1:
        raise ValueError(f"`accuracy` must be in [0, 1], got {accuracy}.")
    trust = accuracy**alpha
    return LossScalars(1 - trust, lambda2_max * trust)
