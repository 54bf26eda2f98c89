"""What an objective is: a weighted sum of terms over routes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from ..schedules import LossScalars


# `forward(route, pixels) -> logits`: runs a route, with that route's gradient mask, on pixels in [0, 1].
RouteForward = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Batch:
    """Clean images, their adversarial versions (`None` if the objective asks for none) and labels.

    Shapes: N x 3 x H x W in [0, 1], the same, and N.
    """

    pixels: Tensor
    adversarial: Tensor | None
    labels: Tensor


@dataclass(frozen=True)
class ObjectiveOutput:
    """The loss to minimise, and its terms (detached scalars) for the log."""

    loss: Tensor
    terms: dict[str, Tensor]


class Objective(Protocol):
    """A training objective.

    Attributes:
        needs_adversarial (`bool`): Whether the trainer runs the attack.
        uses_scalars (`bool`): Whether the trainer measures the natural route's training accuracy for the loss scalars.
        selection_metric (`str`): Validation metric that the schedule and the choice of the best weights go by.
    """

    needs_adversarial: ClassVar[bool]
    uses_scalars: ClassVar[bool]
    selection_metric: ClassVar[str]

    def __call__(self, forward: RouteForward, batch: Batch, scalars: LossScalars) -> ObjectiveOutput: ...
