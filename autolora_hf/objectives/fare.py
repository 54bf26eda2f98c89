"""Objectives without labels for image towers: FARE and Sim-CLIP."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attacks.pgd import attack_mode
from ..digests import weights_digest
from ..frozen import FrozenRoute
from ..routes import ROBUST
from ..schedules import LossScalars
from .base import Batch, Objective, ObjectiveOutput, RouteForward


if TYPE_CHECKING:
    from ..modeling import AutoLoraModel


class _EmbeddingObjective(Objective):
    """What both share: no labels, validation by the distance that the attack drives up, FARE's published recipe."""

    classifies: ClassVar[bool] = False
    selection_metric: ClassVar[str] = "loss"
    schedule: ClassVar[str] = "cosine"
    # 1,400 of 20,000 steps (two epochs of ImageNet with 128 images a step), as in the released command.
    warmup: ClassVar[float] = 0.07
    steps: ClassVar[int] = 20_000
    learning_rate: ClassVar[float] = 1e-5
    optimizer: ClassVar[str] = "adamw_torch"

    def losses(self, outputs: Tensor, labels: Tensor, reference: Tensor | None) -> Tensor:
        assert reference is not None  # these objectives have one
        return distances(self.attack_loss, outputs, reference)


@dataclass
class Fare(_EmbeddingObjective):
    """`max_{x~} ||phi(x~) - phi_orig(x)||^2` (Schlarmann, Singh, Croce, Hein, ICML 2024).

    The embedding of the attacked image is drawn to the one that the *original* tower has for the clean image, which
    the attack moves away from. So the tower stays exchangeable for the original: text embeddings, and models that were
    trained on top of it, keep their meaning. The distance is not divided by D, and embeddings are not normalised.

    The original is a frozen copy of the deployed route, made when the trainer is. A run that is resumed makes it of
    the backbone, before the weights of the checkpoint are loaded; give it the same backbone. It costs the memory of
    one more copy of the weights and one forward pass a step.

    Args:
        distance (`str`): `"l2"`, the paper's squared distance, or `"cosine"`, one minus the cosine, for attack and
            loss. The latter is, up to its l2 attack and a factor of 2, what the released code of Sim-CLIP minimises:
            there the clean embedding comes from the frozen original.
    """

    distance: Literal["l2", "cosine"] = field(
        default="l2", metadata={"help": "Distance of embeddings: l2 (squared) or cosine."}
    )

    description: ClassVar[str] = (
        "[FARE](https://arxiv.org/abs/2402.12336) (Schlarmann et al., ICML 2024): without labels, embeddings of "
        "attacked images are drawn to those of the original image tower."
    )

    def __post_init__(self) -> None:
        if self.distance not in ("l2", "cosine"):
            raise ValueError(f"`distance` must be 'l2' or 'cosine', got {self.distance!r}.")
        self.attack_loss = self.distance

    def prepare(self, model: AutoLoraModel, seed: int) -> None:
        super().prepare(model, seed)
        # Never refreshed: it stays what the tower was before training.
        self._teacher: FrozenRoute = FrozenRoute(model, ROBUST)

    def describe(self) -> dict[str, Any]:
        # A resumed run that was given other weights has another teacher, which then is said.
        return {"teacher_sha256": weights_digest(self._teacher.network.state_dict())}

    @torch.no_grad()
    def reference(self, pixels: Tensor) -> Tensor:
        """Embeddings of the original tower, N x D."""
        # The trainer moves the model after the copy was made.
        return self._teacher.to(pixels.device)(pixels)

    def __call__(self, forward: RouteForward, batch: Batch, scalars: LossScalars) -> ObjectiveOutput:
        assert batch.reference is not None  # what `reference` gave
        found = forward(ROBUST, batch.adversarial)
        loss = distances(self.distance, found, batch.reference).mean()
        return ObjectiveOutput(loss, {"embedding_distance": loss.detach()})


@dataclass
class SimClip(_EmbeddingObjective):
    """`1 + [D(z~, sg(z)) + D(z, sg(z~))] / 2`, `D` the negative cosine (Hossain & Imteaj, arXiv 2407.14971).

    `z` and `z~` are the embeddings of the clean and the attacked image by the *same* tower, `sg` stops the gradient.
    Both directions are in the loss, as summaries of the paper give it. Without a predictor between them they add up to
    half the gradient of the plain cosine, so nothing but the small learning rate keeps the embeddings of all images
    from becoming one, which a warning tells, or from leaving the space of the text embeddings. With FARE the original
    tower prevents both. The released code differs, see [`Fare`].

    Args:
        symmetric (`bool`): Both directions; else the adversarial embedding alone is moved, `1 + D(z~, sg(z))`.
    """

    symmetric: bool = field(default=True, metadata={"help": "Draw clean embeddings to adversarial ones as well."})

    description: ClassVar[str] = (
        "[Sim-CLIP](https://arxiv.org/abs/2407.14971) (Hossain & Imteaj, 2024): without labels, embeddings of "
        "attacked and of clean images by the same tower are drawn together."
    )
    attack_loss = "cosine"

    def prepare(self, model: AutoLoraModel, seed: int) -> None:
        super().prepare(model, seed)
        self._model = model

    @torch.no_grad()
    def reference(self, pixels: Tensor) -> Tensor:
        """Embeddings that the tower itself has for the clean images now, N x D, in eval mode as in an attack."""
        with attack_mode(self._model):
            return self._model.pixel_space(ROBUST)(pixels)

    def __call__(self, forward: RouteForward, batch: Batch, scalars: LossScalars) -> ObjectiveOutput:
        clean, robust = forward(ROBUST, batch.pixels), forward(ROBUST, batch.adversarial)
        loss = distances("cosine", robust, clean.detach()).mean()
        if self.symmetric:
            loss = (loss + distances("cosine", clean, robust.detach()).mean()) / 2
        return ObjectiveOutput(loss, {"embedding_distance": loss.detach()})


def distances(kind: str, first: Tensor, second: Tensor) -> Tensor:
    """Of each pair of rows of N x D, N: `"l2"`, the squared distance, or `"cosine"`, one minus the cosine."""
    if kind == "l2":
        return (first - second).square().sum(-1)
    return 1 - F.cosine_similarity(first, second, dim=-1)
