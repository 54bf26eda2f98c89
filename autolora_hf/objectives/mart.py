"""MART, misclassification-aware adversarial training (Wang et al., ICLR 2020)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from ..routes import ROBUST
from ..schedules import LossScalars
from .base import Batch, Objective, ObjectiveOutput, RouteForward
from .terms import accuracy, kl_divergences


@dataclass
class Mart(Objective):
    """`BCE(p(x~), y) + weight KL(p(x) || p(x~)) (1 - p_y(x))` (Wang et al., ICLR 2020, Algorithm 1), with

    `BCE(p, y) = -log p_y - log(1 - max_{k != y} p_k)`: images that are misclassified anyway weigh more in the KL term.

    Args:
        weight (`float`): Weight lambda of the KL term; 5 in the paper, 6 in later comparisons.
    """

    weight: float = field(default=5.0, metadata={"help": "Weight of the KL term."})

    description: ClassVar[str] = (
        "[MART](https://openreview.net/forum?id=rklOg6EFwS) (Wang et al., ICLR 2020): adversarial training that "
        "weighs misclassified images more."
    )
    milestones: ClassVar[tuple[float, ...]] = (3 / 4, 9 / 10)

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ValueError(f"`weight` must not be negative, got {self.weight}.")

    def adversarial_term(self, clean: Tensor, robust: Tensor, labels: Tensor, scalars: LossScalars) -> Tensor:
        doubt = 1 - clean.softmax(-1).gather(1, labels[:, None]).squeeze(1)
        kl = (kl_divergences(clean, robust) * doubt).mean()
        return boosted_cross_entropies(robust, labels).mean() + self.weight * kl

    def __call__(self, forward: RouteForward, batch: Batch, scalars: LossScalars) -> ObjectiveOutput:
        clean, robust = forward(ROBUST, batch.pixels), forward(ROBUST, batch.adversarial)
        doubt = 1 - clean.softmax(-1).gather(1, batch.labels[:, None]).squeeze(1)
        bce = boosted_cross_entropies(robust, batch.labels).mean()
        kl = (kl_divergences(clean, robust) * doubt).mean()
        terms = {"robust_loss": bce.detach(), "kl": kl.detach()}
        terms["train_natural_accuracy"] = accuracy(clean, batch.labels)
        terms["train_robust_accuracy"] = accuracy(robust, batch.labels)
        return ObjectiveOutput(bce + self.weight * kl, terms)


def boosted_cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """`-log p_y - log(1 - max_{k != y} p_k)` of every image, N, from logits N x K."""
    log_p = F.log_softmax(logits, -1)
    right = log_p.gather(1, labels[:, None])
    others = log_p.scatter(1, labels[:, None], float("-inf"))
    # 1 - p_k is the sum of all other probabilities: exact where p_k is nearly 1.
    largest = others.argmax(1, keepdim=True)
    rest = log_p.scatter(1, largest, float("-inf")).logsumexp(1)
    return -right.squeeze(1) - rest
