"""The disentangled objective of AutoLoRa (Xu et al., ICLR 2024)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from ..routes import NATURAL, ROBUST
from ..schedules import LossScalars
from .base import Batch, Objective, ObjectiveOutput, RouteForward
from .terms import accuracy, kl_divergences


@dataclass
class AutoLora(Objective):
    """`l1 CE(natural(x), y) + (1 - l1) CE(robust(x~), y) + l2 KL(natural(x) || robust(x~))`.

    The KL term is summed over classes and averaged over the batch; its target is not detached, so it also trains the
    natural branch and the head. The natural pass comes first: with a shared BatchNorm the order decides what the
    running statistics see last.

    Args:
        detach_target (`bool`): Keep the gradient of the KL term from its target.
    """

    detach_target: bool = field(default=False, metadata={"help": "Stop the KL term's gradient at its target."})

    description: ClassVar[str] = (
        "[AutoLoRa](https://arxiv.org/abs/2310.01818) (Xu, Zhang, Kankanhalli, ICLR 2024): a robust route that is "
        "deployed and, during training only, a natural route with a {branch} branch of its own."
    )
    routes: ClassVar[tuple[str, ...]] = (ROBUST, NATURAL)
    config: ClassVar[dict[str, Any]] = {}
    uses_scalars = True
    schedule: ClassVar[str] = "plateau"

    def adversarial_term(self, clean: Tensor, robust: Tensor, labels: Tensor, scalars: LossScalars) -> Tensor:
        target = clean.detach() if self.detach_target else clean
        kl = kl_divergences(target, robust).mean()
        return (1 - scalars.lambda1) * F.cross_entropy(robust, labels) + scalars.lambda2 * kl

    def __call__(self, forward: RouteForward, batch: Batch, scalars: LossScalars) -> ObjectiveOutput:
        natural = forward(NATURAL, batch.pixels)
        robust = forward(ROBUST, batch.adversarial)
        natural_ce = F.cross_entropy(natural, batch.labels)
        robust_ce = F.cross_entropy(robust, batch.labels)
        target = natural.detach() if self.detach_target else natural
        kl = F.kl_div(F.log_softmax(robust, -1), F.log_softmax(target, -1), reduction="batchmean", log_target=True)
        lambda1, lambda2 = scalars
        loss = lambda1 * natural_ce + (1 - lambda1) * robust_ce + lambda2 * kl
        terms = {"natural_loss": natural_ce.detach(), "robust_loss": robust_ce.detach(), "kl": kl.detach()}
        terms["train_natural_accuracy"] = accuracy(natural, batch.labels)
        terms["train_robust_accuracy"] = accuracy(robust, batch.labels)
        return ObjectiveOutput(loss, terms)
