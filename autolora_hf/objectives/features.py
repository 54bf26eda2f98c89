"""Reading features of a network while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from ..checks import listed
from .base import pooled


if TYPE_CHECKING:
    from ..modeling import AutoLoraModel


class FeatureReader:
    """Context in which the pooled outputs of layers are kept from every pass; enter it inside the route.

    Args:
        model (`AutoLoraModel`): The model.
        layers (`Sequence[str]`): Names of layers of the base model. Of norms the rectified output is taken, as in
            AR-AT. None: what the classification layers get.

    Raises:
        ValueError: If there is no such layer.
    """

    def __init__(self, model: AutoLoraModel, layers: Sequence[str] = ()) -> None:
        base = model.get_base_model()
        known = dict(base.named_modules())
        unknown = [name for name in layers if name not in known]
        if unknown:
            raise ValueError(f"`layers` names {listed(unknown)}, which {type(base).__name__} does not have.")
        # Not from `known`: a route may put other norms in the place of these.
        self._layers = [base.get_submodule(name) for name in layers]
        self._heads = [] if layers else model.heads
        self._seen: dict[int, Tensor] = {}
        self._hooks: list[Any] = []

    def features(self) -> list[Tensor]:
        """Of the last pass: N x D for each layer, in the order of `layers`."""
        return [self._seen[index] for index in range(len(self._layers) + len(self._heads))]

    def __enter__(self) -> Self:
        for index, layer in enumerate(self._layers):
            is_norm = any(key.startswith("running_") for key in layer._buffers) or isinstance(layer, nn.LayerNorm)

            def after(_module: nn.Module, _inputs: Any, output: Any, index: int = index, norm: bool = is_norm) -> None:
                output = output[0] if isinstance(output, tuple) else output
                self._seen[index] = pooled(torch.relu(output) if norm else output)

            self._hooks.append(layer.register_forward_hook(after))
        for index, head in enumerate(self._heads):

            def before(_module: nn.Module, inputs: tuple[Any, ...], index: int = index) -> None:
                self._seen[index] = pooled(inputs[0])

            self._hooks.append(head.register_forward_pre_hook(before))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
