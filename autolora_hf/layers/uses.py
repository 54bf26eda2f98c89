"""How a forward pass uses a layer, which decides which branches it can carry."""

from __future__ import annotations

from dataclasses import dataclass, field

from timm.layers import Conv2dSame
from timm.layers import Linear as TimmLinear
from torch import nn


@dataclass
class Use:
    """How one forward pass uses a layer.

    Args:
        called (`bool`): The layer was called.
        read (`set[str]`): Attributes that were read past its call, such as `weight`.
        order (`int`): Place of its last call among all calls; 0: not called.
        dimensions (`int`): Number of dimensions of what it was called with at last; 0: not called with a tensor.
    """

    called: bool = False
    read: set[str] = field(default_factory=set)
    order: int = 0
    dimensions: int = 0

    @property
    def any(self) -> bool:
        """The pass depends on the layer in one way or the other."""
        return self.called or bool(self.read)


def is_called(module: nn.Module, use: Use) -> bool:
    """Whether `module` is a linear layer or convolution that is called, so that something can be added to its output.

    Models may read its weight besides, for its type for instance.
    """
    return use.called and isinstance(module, (nn.Linear, nn.Conv2d))


def in_stock_peft(module: nn.Module, use: Use) -> bool:
    """Whether PEFT's own LoRA layer around `module` computes what it should.

    It adds the branch to the output of a call, so the weight must not be used in any other way, and it has no right
    counterpart of grouped, dilated or standardised convolutions.
    """
    if not use.called or use.read - {"bias", "in_features", "out_features"}:
        return False
    if isinstance(module, nn.Linear):
        return type(module).forward in (nn.Linear.forward, TimmLinear.forward)
    return (
        isinstance(module, nn.Conv2d)
        and type(module) in (nn.Conv2d, Conv2dSame)
        and module.groups == 1
        and module.dilation == (1, 1)
        and module.padding_mode == "zeros"
    )
