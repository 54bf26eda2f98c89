"""Adversarial training with PGD, of everything or of the head alone."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F

from ..routes import ROBUST
from ..schedules import LossScalars
from .base import Batch, Objective, ObjectiveOutput, RouteForward
from .terms import accuracy


class AdversarialTraining(Objective):
    """PGD-AT (Madry et al., ICLR 2018, eq. 2.1): cross-entropy of adversarial images, `CE(robust(x~), y)`.

    With `mode="adapter"` and `branch="lora"` it is LoRA-AT; with `branch="lnlora"` FullLoRA-AT (Yuan, Zhang, Shan,
    2024).
    """

    description: ClassVar[str] = (
        "[adversarial training](https://arxiv.org/abs/1706.06083) (Madry et al., ICLR 2018): the cross-entropy of "
        "images under PGD."
    )

    def __call__(self, forward: RouteForward, batch: Batch, scalars: LossScalars) -> ObjectiveOutput:
        logits = forward(ROBUST, batch.adversarial)
        return ObjectiveOutput(
            F.cross_entropy(logits, batch.labels), {"train_robust_accuracy": accuracy(logits, batch.labels)}
        )


class AdversarialLinearFineTuning(AdversarialTraining):
    """ALF: PGD-AT of the head alone, all else in eval mode. Also the first stage of RoLI (Hua et al., CVPR 2024)."""

    description: ClassVar[str] = (
        "adversarial linear fine-tuning (ALF): the classification layer alone, on images under PGD."
    )
    heads_only: ClassVar[bool] = True
    milestones: ClassVar[tuple[float, ...]] = (2 / 5, 4 / 5)
