"""TWINS, a fine-tuning framework with two norm sets (Liu, Xu, Ji, Chan, CVPR 2023)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from ..routes import NATURAL, ROBUST
from ..schedules import LossScalars
from .base import ADVICE, Batch, Objective, ObjectiveOutput, RouteForward
from .terms import accuracy, kl_divergences


if TYPE_CHECKING:
    from ..modeling import AutoLoraModel


@dataclass
class TwinsAT(Objective):
    """`weight CE_frozen(x~_1) + CE_adaptive(x~_2)`: each batch is split in two halves.

    The first half runs through the Frozen net, which normalises with the pre-training statistics in training too (here
    the natural route, `norm="frozen"`), the second through the Adaptive net with ordinary BatchNorm (the robust route:
    attacked and deployed). Everything but the two sets of norms is shared and gets both gradients.

    Args:
        weight (`float`): Weight lambda of the Frozen net. The authors search it for each task (0.3 in their code, 0.4
            for Caltech-256, 1.0 for CIFAR); here it is 0.3 unless you choose.
    """

    weight: float = field(default=0.3, metadata={"help": "Weight of the Frozen net's half."})

    description: ClassVar[str] = (
        "[TWINS](https://arxiv.org/abs/2303.11135) (Liu, Xu, Ji, Chan, CVPR 2023): half of every batch is normalised "
        "with the pre-training statistics, during training only."
    )
    routes: ClassVar[tuple[str, ...]] = (ROBUST, NATURAL)
    config: ClassVar[dict[str, Any]] = {"natural_route": "plain", "norm": "frozen", "stop_gradient": False}
    learning_rate: ClassVar[float | None] = 0.003

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ValueError(f"`weight` must not be negative, got {self.weight}.")

    def prepare(self, model: AutoLoraModel, seed: int) -> None:
        super().prepare(model, seed)
        config = model.autolora_config
        if config.norm != "frozen" or config.stop_gradient:
            raise ValueError(
                f"TWINS needs `norm='frozen'` and `stop_gradient=False`, and this model has {config.norm!r} and "
                f"{config.stop_gradient}. {ADVICE}"
            )

    def __call__(self, forward: RouteForward, batch: Batch, scalars: LossScalars) -> ObjectiveOutput:
        # A batch of one image cannot be split: both nets see it.
        half = len(batch.labels) // 2
        first, second = (slice(0, half), slice(half, None)) if half else (slice(None), slice(None))
        frozen, _ = self._half(forward, NATURAL, batch, first)
        adaptive, logits = self._half(forward, ROBUST, batch, second)
        terms = {"frozen_loss": frozen.detach(), "adaptive_loss": adaptive.detach()}
        terms["train_robust_accuracy"] = accuracy(logits, batch.labels[second])
        return ObjectiveOutput(self.weight * frozen + adaptive, terms)

    def _half(self, forward: RouteForward, route: str, batch: Batch, part: slice) -> tuple[Tensor, Tensor]:
        """Loss of one half through one net, and the logits of its adversarial images."""
        labels = batch.labels[part]
        # A process with fewer images of its own gets repeated ones after them, which do not count.
        logits = forward(route, batch.adversarial[part])[: len(labels)]
        return F.cross_entropy(logits, labels), logits


@dataclass
class TwinsTrades(TwinsAT):
    """TWINS with the loss of TRADES in both nets: `CE(x) + beta KL(x || x~)`.

    As in the authors' code the KL term is divided by the size of the whole batch, though only half of it is in the
    sum: beside the mean cross-entropy its weight is beta / 2.

    Args:
        beta (`float`): Weight of the KL term.
    """

    beta: float = field(default=6.0, metadata={"help": "Weight of the KL term."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta >= 0:
            raise ValueError(f"`beta` must not be negative, got {self.beta}.")

    def adversarial_term(self, clean: Tensor, robust: Tensor, labels: Tensor, scalars: LossScalars) -> Tensor:
        return self.beta / 2 * kl_divergences(clean, robust).mean()

    def _half(self, forward: RouteForward, route: str, batch: Batch, part: slice) -> tuple[Tensor, Tensor]:
        labels = batch.labels[part]
        clean = forward(route, batch.pixels[part])[: len(labels)]
        robust = forward(route, batch.adversarial[part])[: len(labels)]
        kl = kl_divergences(clean, robust).sum() / len(batch.labels)
        return F.cross_entropy(clean, labels) + self.beta * kl, robust
