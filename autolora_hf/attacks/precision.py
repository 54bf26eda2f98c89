"""When an attack may search in reduced precision."""

from __future__ import annotations

import math

from ..config import ThreatModel


# bfloat16 has 8 significant bits, so changes of less than this a pixel may be lost in its rounding. That is caution:
# no loss of strength was measured below it on small digits (docs/attack_strength.md).
LEAST_CHANGE = 2 / 255


def bf16_keeps_strength(threat_model: ThreatModel, image_size: tuple[int, int]) -> bool:
    """Whether an attack in bfloat16 is taken to be as strong as in float32: within 0.5 % of the loss where measured.

    Args:
        threat_model (`ThreatModel`): For L2 and L1 the mean change of a pixel counts, when all of them change alike.
        image_size (`tuple[int, int]`): Height and width.
    """
    change = threat_model.eps
    values = 3 * math.prod(image_size)
    if threat_model.norm != "linf":
        change /= math.sqrt(values) if threat_model.norm == "l2" else values
    # Room for the rounding of eps = 2/255 itself.
    return change >= LEAST_CHANGE * (1 - 1e-6)
