"""The disentangled objective of AutoLoRa (Xu et al., ICLR 2024)."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F

from ..routes import NATURAL, ROBUST
from ..schedules import LossScalars
from .base import Batch, ObjectiveOutput, RouteForward


class AutoLora:
    """`l1 CE(natural(x), y) + (1 - l1) CE(robust(x~), y) + l2 KL(natural(x) || robust(x~))`.

    The KL term is summed over classes and averaged over the batch; its target is not detached, so it also trains the
    natural branch and the head. The natural pass comes first: with a shared BatchNorm the order decides what the
    running statistics see last.
    """

    needs_adversarial: ClassVar[bool] = True
    uses_scalars: ClassVar[bool] = True
    selection_metric: ClassVar[str] = "robust_accuracy"

    def __call__(self, forward: RouteForward, batch: Batch, scalars: LossScalars) -> ObjectiveOutput:
        natural = forward(NATURAL, batch.pixels)
        robust = forward(ROBUST, batch.adversarial)
        natural_ce = F.cross_entropy(natural, batch.labels)
        robust_ce = F.cross_entropy(robust, batch.labels)
        kl = F.kl_div(F.log_softmax(robust, -1), F.log_softmax(natural, -1), reduction="batchmean", log_target=True)
        lambda1, lambda2 = scalars
        loss = lambda1 * natural_ce + (1 - lambda1) * robust_ce + lambda2 * kl
        terms = {"natural_loss": natural_ce.detach(), "robust_loss": robust_ce.detach(), "kl": kl.detach()}
        terms["train_natural_accuracy"] = (natural.argmax(-1) == batch.labels).to(loss).mean()
        terms["train_robust_accuracy"] = (robust.argmax(-1) == batch.labels).to(loss).mean()
        return ObjectiveOutput(loss, terms)
