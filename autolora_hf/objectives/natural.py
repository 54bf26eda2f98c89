"""Plain fine-tuning on clean images: the baseline every robust method is compared with."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F

from ..routes import ROBUST
from ..schedules import LossScalars
from .base import Batch, ObjectiveOutput, RouteForward


class NaturalFineTuning:
    """Cross-entropy of clean images through the deployed route. No attack, so no robustness is to be expected."""

    needs_adversarial: ClassVar[bool] = False
    uses_scalars: ClassVar[bool] = False
    selection_metric: ClassVar[str] = "natural_accuracy"

    def __call__(self, forward: RouteForward, batch: Batch, scalars: LossScalars) -> ObjectiveOutput:
        loss = F.cross_entropy(forward(ROBUST, batch.pixels), batch.labels)
        return ObjectiveOutput(loss, {})
