"""What an objective gets to run the routes with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ..attacks.pgd import logits_of
from ..attention import plain_attention
from ..modeling import AutoLoraModel
from ..objectives.features import FeatureReader


class TrainingForward:
    """Runs routes in training, see [`RouteForward`].

    Args:
        model (`AutoLoraModel`): The model.
        images_of (`Callable`): Pixels in [0, 1] to what the model takes.
        precision (`torch.dtype`): In which attention is computed.
        own (`int`): Images of a batch that count, which come first; the rest repeats those of other processes.
    """

    def __init__(
        self, model: AutoLoraModel, images_of: Callable[[Tensor], Tensor], precision: torch.dtype, own: int
    ) -> None:
        self.model, self.images_of, self.precision, self.own = model, images_of, precision, own

    def _attention(self, pixels: Tensor) -> AbstractContextManager[None]:
        return plain_attention(pixels.device, self.precision)

    def __call__(self, route: str, pixels: Tensor) -> Tensor:
        with self.model.route(route), self._attention(pixels):
            return logits_of(self.model(self.images_of(pixels)))[: self.own]

    def with_features(self, route: str, pixels: Tensor, layers: Sequence[str] = ()) -> tuple[Tensor, list[Tensor]]:
        with self.model.route(route), FeatureReader(self.model, layers) as reader, self._attention(pixels):
            logits = logits_of(self.model(self.images_of(pixels)))[: self.own]
            return logits, [feature[: self.own] for feature in reader.features()]
