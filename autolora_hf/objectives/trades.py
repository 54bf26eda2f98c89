"""TRADES (Zhang et al., ICML 2019), the vanilla robust fine-tuning (AFF) that AutoLoRa is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from ..routes import ROBUST
from ..schedules import LossScalars
from .base import Batch, Objective, ObjectiveOutput, RouteForward
from .terms import accuracy, kl_divergences


@dataclass
class Trades(Objective):
    """`CE(robust(x), y) + beta KL(robust(x) || robust(x~))` (Zhang et al., ICML 2019, Algorithm 1), one route.

    Args:
        beta (`float`): Weight of the KL term; 6 in the paper.
        attack_loss (`str`): `"ce"`: the attack maximises the cross-entropy of the labels, as in the fine-tuning that
            AutoLoRa, TWINS and RobustSSL call TRADES. `"kl"`: the KL term, as in the TRADES paper (from a uniform
            start in the ball; the paper's has a width of 0.001).
        automatic (`bool`): Replace the weights by AutoLoRa's automatic scalars, `l1 CE(x) + (1 - l1) CE(x~) + l2 KL`,
            everything through the one route: AutoLoRa without its branch.
    """

    beta: float = field(default=6.0, metadata={"help": "Weight of the KL term."})
    attack_loss: Literal["ce", "kl"] = field(default="ce", metadata={"help": "What the attack maximises: ce or kl."})
    automatic: bool = field(default=False, metadata={"help": "AutoLoRa's automatic scalars instead of beta."})

    description: ClassVar[str] = (
        "[TRADES](https://arxiv.org/abs/1901.08573) (Zhang et al., ICML 2019): the cross-entropy of clean images and "
        "the divergence between clean and adversarial predictions."
    )
    milestones: ClassVar[tuple[float, ...]] = (1 / 2, 5 / 6)

    def __post_init__(self) -> None:
        if not self.beta >= 0:
            raise ValueError(f"`beta` must not be negative, got {self.beta}.")
        if self.attack_loss not in ("ce", "kl"):
            raise ValueError(f"`attack_loss` must be 'ce' or 'kl', got {self.attack_loss!r}.")
        self.uses_scalars = self.automatic

    def adversarial_term(self, clean: Tensor, robust: Tensor, labels: Tensor, scalars: LossScalars) -> Tensor:
        kl = kl_divergences(clean, robust).mean()
        if self.automatic:
            return (1 - scalars.lambda1) * F.cross_entropy(robust, labels) + scalars.lambda2 * kl
        return self.beta * kl

    def __call__(self, forward: RouteForward, batch: Batch, scalars: LossScalars) -> ObjectiveOutput:
        clean, robust = forward(ROBUST, batch.pixels), forward(ROBUST, batch.adversarial)
        natural_ce, kl = F.cross_entropy(clean, batch.labels), kl_divergences(clean, robust).mean()
        robust_ce = F.cross_entropy(robust, batch.labels)
        if self.automatic:
            lambda1, lambda2 = scalars
            loss = lambda1 * natural_ce + (1 - lambda1) * robust_ce + lambda2 * kl
        else:
            loss = natural_ce + self.beta * kl
        terms = {"natural_loss": natural_ce.detach(), "robust_loss": robust_ce.detach(), "kl": kl.detach()}
        terms["train_natural_accuracy"] = accuracy(clean, batch.labels)
        terms["train_robust_accuracy"] = accuracy(robust, batch.labels)
        return ObjectiveOutput(loss, terms)
