"""Attacks that search on another model than the one they are to fool."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from ..attacks import PGD, attack_mode
from ..config import ThreatModel
from ..digests import weights_digest
from ..frozen import FrozenRoute
from ..modeling import AutoLoraModel
from .view import AttackView


TRANSFER_STEPS = 50


@dataclass(eq=False)
class TransferAttack:
    """PGD on a source model, whose images are then shown to the model under evaluation.

    It needs no gradient of the model that it attacks, so that it finds what masked gradients hide. Called as
    `attack(model, pixels, labels) -> pixels`, it ignores `model`:
    `evaluate_robustness(model, data, attack=["autoattack", TransferAttack(other)])`.

    The source is left as it was. Of an [`AutoLoraModel`] a copy of the deployed route is attacked, with the weights
    that it has now; a plain module is attacked itself. The search runs where the source is.

    Args:
        source (`nn.Module`): An [`AutoLoraModel`], or a module that maps pixels in [0, 1], N x C x H x W, to logits
            N x K of the same classes in the same order.
        attack (`PGD`, *optional*): How to search. `None`: with 50 steps under the threat model of the source.
        name (`str`): What to call the source in reports.

    Raises:
        TypeError: If `source` is no module or `attack` no [`PGD`].
        ValueError: If `attack` is needed because the source states no threat model, or does not search by labels.
    """

    source: nn.Module
    attack: PGD | None = None
    name: str = "another model"
    source_sha256: str = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.source, nn.Module):
            raise TypeError(f"`source` must be a module, got {type(self.source).__name__}.")
        threat_model = getattr(self.source, "threat_model", None)
        if self.attack is None and threat_model is None:
            raise ValueError(
                "`attack` is required: this source states no threat model. For instance "
                f"PGD(ThreatModel('linf', 8 / 255), steps={TRANSFER_STEPS})."
            )
        if self.attack is None:
            self.attack = PGD(cast(ThreatModel, threat_model), steps=TRANSFER_STEPS)
        if not isinstance(self.attack, PGD):
            raise TypeError(f"`attack` must be a PGD, got {type(self.attack).__name__}.")
        if self.attack.loss not in ("ce", "kl"):
            raise ValueError(f"`attack` must search with the loss 'ce' or 'kl', got {self.attack.loss!r}.")
        if not isinstance(self.name, str) or not self.name.isprintable():
            raise ValueError(f"`name` must be a line of printable characters, got {self.name!r}.")
        view = AttackView(self.source)
        if isinstance(self.source, AutoLoraModel):
            # Under another route it may have other norm statistics.
            with self.source.route("robust"):
                self.source_sha256 = _digest(view)
            view = AttackView(FrozenRoute(self.source)).eval()
        else:
            self.source_sha256 = _digest(view)
        self._view = view

    def __str__(self) -> str:
        return f"transfer from {self.name} ({self.attack})"

    def __repr__(self) -> str:
        # By it a checkpoint recognises the attack.
        return f"TransferAttack(source_sha256={self.source_sha256!r}, attack={self.attack!r}, name={self.name!r})"

    def __call__(self, model: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
        """Images of the shape, dtype and device of `pixels`, made to fool the source."""
        device = self._view.device
        attack = cast(PGD, self.attack)  # since `__post_init__`
        return attack(self._view, pixels.to(device), labels.to(device)).to(pixels)

    @torch.no_grad()
    def check(self, model: nn.Module, pixels: Tensor, num_classes: int) -> None:
        """Whether the source can stand in for `model`.

        Args:
            model (`nn.Module`): The model under evaluation.
            pixels (`Tensor`): An image that it takes, 1 x C x H x W.
            num_classes (`int`): Its number of classes.

        Raises:
            ValueError: If the source takes other images or has other classes.
        """
        size, expected = tuple(pixels.shape[-2:]), getattr(self.source, "preprocessing", None)
        if expected is not None and tuple(expected.image_size) != size:
            raise ValueError(
                f"{self} cannot work: its source takes images of {' x '.join(map(str, expected.image_size))} pixels, "
                f"the model under evaluation {' x '.join(map(str, size))}."
            )
        try:
            with attack_mode(self._view):
                logits = self._view(pixels.to(self._view.device))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise ValueError(
                f"{self} cannot work: its source does not take images of shape {tuple(pixels.shape[1:])}: {error}"
            ) from error
        if logits.shape != (len(pixels), num_classes):
            raise ValueError(
                f"{self} cannot work: its source returns {tuple(logits.shape)} for {len(pixels)} image(s), the model "
                f"under evaluation has {num_classes} classes."
            )
        names, others = getattr(model, "label_names", None), getattr(self.source, "label_names", None)
        if names and others and list(names) != list(others):
            index = next(index for index, pair in enumerate(zip(names, others, strict=True)) if len(set(pair)) > 1)
            raise ValueError(
                f"{self} cannot work: class {index} is {others[index]!r} of its source and {names[index]!r} of the "
                "model under evaluation."
            )


def _digest(view: AttackView) -> str:
    """What the answers depend on: weights, buffers and the layers around them."""
    weights = weights_digest({**dict(view.named_parameters()), **dict(view.named_buffers())})
    return hashlib.sha256(f"{weights} {view!r}".encode()).hexdigest()
