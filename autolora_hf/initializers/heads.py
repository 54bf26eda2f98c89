"""Initialisers of the classification layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .base import Initializer


if TYPE_CHECKING:
    from ..modeling import AutoLoraModel


class ZeroHead(Initializer):
    """Zeros in the classification layers, as in the released fine-tuning code of RobustSSL and AutoLoRa."""

    @torch.no_grad()
    def __call__(self, model: AutoLoraModel) -> None:
        for head in model.heads:
            for parameter in head.parameters():
                parameter.zero_()


@dataclass
class LinearProbe(Initializer):
    """Trains the head alone on clean images first, all else in eval mode (linear probing, then fine-tuning).

    SGD with a cosine and a rise over the first quarter; the head with the best validation accuracy under attack is
    kept. It runs as a training of its own, in the folder `initialization` of the output folder, on the same training
    and validation images.

    Args:
        epochs (`float`, *optional*): Its length. `None`: that of the training it is for.
        learning_rate (`float`): RoLI has 0.05 for CIFAR-10, and others for other tasks.
    """

    epochs: float | None = field(default=None, metadata={"help": "Length of the stage. Default: the training's."})
    learning_rate: float = field(default=0.05, metadata={"help": "Learning rate of the stage."})

    objective: ClassVar[str] = "slf"

    def __post_init__(self) -> None:
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"`epochs` of a linear probe must be at least 1, got {self.epochs}.")
        if not self.learning_rate > 0:
            raise ValueError(f"`learning_rate` of a linear probe must be positive, got {self.learning_rate}.")

    def stage(self, epochs: float) -> dict[str, Any]:
        return {
            "objective": self.objective,
            "num_train_epochs": epochs if self.epochs is None else self.epochs,
            "learning_rate": self.learning_rate,
            "optim": "sgd",
            "schedule": "cosine",
            "warmup_steps": 0.25,
        }


@dataclass
class AdversarialLinearProbe(LinearProbe):
    """The first stage of RoLI (Hua, Gu, Xue, Carlini, Wong, Qin, CVPR 2024): PGD-AT of the head alone.

    Any objective and any branch then start from this head instead of a random one. An epoch costs about nine tenths of
    one of adversarial training, since the attack goes through the whole network.
    """

    objective: ClassVar[str] = "alf"
