"""Training on clean images: plain fine-tuning, and standard linear fine-tuning of the head alone."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F

from ..routes import ROBUST
from ..schedules import LossScalars
from .base import Batch, Objective, ObjectiveOutput, RouteForward
from .terms import accuracy


class NaturalFineTuning(Objective):
    """Cross-entropy of clean images through the deployed route. No attack, so no robustness is to be expected."""

    description: ClassVar[str] = (
        "plain fine-tuning on clean images, so no robustness is to be expected beyond what the backbone lends."
    )
    needs_adversarial: ClassVar[bool] = False
    selection_metric: ClassVar[str] = "natural_accuracy"
    schedule: ClassVar[str] = "plateau"

    def __call__(self, forward: RouteForward, batch: Batch, scalars: LossScalars) -> ObjectiveOutput:
        logits = forward(ROBUST, batch.pixels)
        terms = {"train_natural_accuracy": accuracy(logits, batch.labels)}
        return ObjectiveOutput(F.cross_entropy(logits, batch.labels), terms)


class StandardLinearFineTuning(NaturalFineTuning):
    """SLF: cross-entropy of clean images, the head alone trains, all else stays in eval mode.

    What robustness the backbone has is kept as far as a linear layer can use it (as measured in RobustSSL, Xu et al.,
    2023), so the weights are chosen by robust accuracy.
    """

    description: ClassVar[str] = "standard linear fine-tuning (SLF): the classification layer alone, on clean images."
    heads_only: ClassVar[bool] = True
    selection_metric: ClassVar[str] = "robust_accuracy"
    schedule: ClassVar[str] = "milestones"
    milestones: ClassVar[tuple[float, ...]] = (2 / 5, 4 / 5)
