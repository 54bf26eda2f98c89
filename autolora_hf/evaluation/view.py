"""What attacks see of a model."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..attacks.pgd import is_embedding, logits_of


class AttackView(nn.Module):
    """What attacks see of a model: float32 pixels in [0, 1] to a fresh float32 tensor of logits N x K.

    Args:
        model (`nn.Module`): An [`AutoLoraModel`], or a module that maps pixels to logits or an output with `.logits`.
        route (`str`): Route of the AutoLoRa model.
    """

    def __init__(self, model: nn.Module, route: str = "robust") -> None:
        super().__init__()
        self.dtype = torch.float32
        if hasattr(model, "pixel_space"):
            self.model: nn.Module = cast(Any, model).pixel_space(route=route)
        else:
            self.model = model
            kinds = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
            # A model wholly in half or double precision takes only its own kind.
            if len(kinds) == 1:
                self.dtype = kinds.pop()
        self.on_pass: Callable[[], None] | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is; the CPU for one without parameters and buffers."""
        return next(itertools.chain(self.parameters(), self.buffers()), torch.empty(0)).device

    def forward(self, pixels: Tensor) -> Tensor:
        if not len(pixels):
            # AutoAttack's Square asks for the logits of no images when its first try has broken all of them, and the
            # attention of transformers cannot reshape nothing.
            return self(pixels.new_zeros(1, *pixels.shape[1:]))[:0]
        output = self.model(pixels.to(self.dtype))
        # An embedding is none: that of an encoder has no `logits`, which is what the error says then.
        logits = (output.logits if is_embedding(output) else logits_of(output)).float()
        if pixels.requires_grad and torch.is_grad_enabled() and not logits.requires_grad:
            # Attacks differentiate without asking. A model that is not differentiable has zero gradient here, and the
            # report says so.
            logits = logits + 0 * pixels.flatten(1)[:, :1]
        if self.on_pass is not None:
            self.on_pass()
        # AutoAttack's Square writes into the logits, which may be a view of the model's own memory.
        return logits.clone()
