"""When an attack may search in reduced precision."""

from __future__ import annotations

import math

from ..config import ThreatModel


# Changes of less than this a pixel are lost in the rounding of bfloat16: the attack gets weaker (docs/speed.md).
LEAST_CHANGE = 2 / 255


def bf16_keeps_strength(threat_model: ThreatModel, image_size: tuple[int, int]) -> bool:
    """Whether an attack in bfloat16 is as strong as in float32, up to 0.5 % of the loss it reaches.

    Args:
        threat_model (`ThreatModel`): For L2 the mean change of a pixel counts, when all of them change alike.
        image_size (`tuple[int, int]`): Height and width.
    """
    change = threat_model.eps
    if threat_model.norm == "l2":
        change /= math.sqrt(3 * math.prod(image_size))
    # Room for the rounding of eps = 2/255 itself.
    return change >= LEAST_CHANGE * (1 - 1e-6)
