"""What a finisher is: something that runs once, after training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor


if TYPE_CHECKING:
    from ..attacks import PGD
    from ..modeling import AutoLoraModel


# Makes a new pass over data: batches of pixels in [0, 1], N x 3 x H x W, and labels, N.
Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Finished:
    """A trained model and the data it was trained and selected with; never test data.

    Args:
        model (`AutoLoraModel`): With the weights that training ended with.
        train (`Batches`), validation (`Batches`): A new pass each time they are called.
        attack (`PGD`): The validation attack.
        epochs (`float`): Length of the training.
    """

    model: AutoLoraModel
    train: Batches
    validation: Batches
    attack: PGD
    epochs: float


class Finisher:
    """Changes nothing."""

    def prepare(self, model: AutoLoraModel) -> None:
        """Called before training; raises `ValueError` if it could not do anything with this model."""

    def __call__(self, finished: Finished) -> dict[str, Any]:
        """Changes the model, in place; returns what it did, for the training plan."""
        return {}
