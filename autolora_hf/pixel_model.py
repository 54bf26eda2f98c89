"""A route of a model as a function of pixels: what attacks and evaluation take."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .attacks.pgd import logits_of
from .pixels import Normalize


if TYPE_CHECKING:
    from .modeling import AutoLoraModel


class PixelModel(nn.Module):
    """One route of a model as a function of pixels in [0, 1]; see [`AutoLoraModel.pixel_space`]."""

    if TYPE_CHECKING:
        # `nn.Module` says of a call that it takes and gives anything.
        def __call__(self, pixels: Tensor) -> Tensor: ...

    def __init__(self, model: AutoLoraModel, route: str) -> None:
        super().__init__()
        self.model = model
        self.route = model._switch._checked(route)
        reference = next(model.parameters())
        dtype = torch.promote_types(reference.dtype, torch.float32)
        self.normalize = Normalize(model.preprocessing, dtype).to(reference.device)

    def forward(self, pixels: Tensor) -> Tensor:
        # Normalised in the precision of the pixels: rounding before it could swallow a small perturbation.
        images = self.normalize(pixels).to(next(self.model.parameters()).dtype)
        with self.model.own_precision(), self.model.route(self.route):
            return logits_of(self.model(images))
