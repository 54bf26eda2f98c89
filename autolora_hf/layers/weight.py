"""LoRA as a low-rank change of a layer's weight, for layers of any kind.

PEFT adds the branch to a layer's *output*, which is right for plain linear layers and convolutions that are called.
Here it is added to the *weight*, so the branch is right however the layer or the model uses the weight: grouped,
depthwise, dilated, "same" padded and weight-standardised convolutions, attention that hands `qkv.weight` to
`F.linear` itself, `nn.MultiheadAttention`. Merging is exact for all of them.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.func import functional_call

from .base import BranchLayer


def _is_hooked(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))


class WeightBranch(BranchLayer):
    """Wraps a layer and adds a change to its weight for each adapter; subclasses say which.

    Attributes of the layer can be read through the wrapper; its weight then is the changed one.
    """

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Change of the weight that `adapter` makes, in the weight's shape."""
        raise NotImplementedError

    @property
    def _base_weight(self) -> nn.Parameter:
        return getattr(self.base_layer, self.parameter_name)

    @property
    def weight(self) -> Tensor:
        """The weight with the changes of the active adapters; the layer's own one if none is active."""
        weight = self._base_weight
        for name in self._live_adapters():
            weight = weight + self.get_delta_weight(name).to(weight.dtype)
        return weight

    def __getattr__(self, name: str) -> Any:
        if name == self.__dict__.get("parameter_name"):
            return self.weight
        return super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters and self.merged:
            self.unmerge()
        base_layer = self.base_layer
        if not self._live_adapters():
            return base_layer(*args, **kwargs)
        weight = self.weight
        # The two common kinds, without the overhead of the general way.
        if len(args) == 1 and not kwargs and not _is_hooked(base_layer):
            if type(base_layer).forward is nn.Linear.forward:
                return F.linear(args[0], weight, base_layer.bias)
            if type(base_layer).forward is nn.Conv2d.forward:
                return base_layer._conv_forward(args[0], weight, base_layer.bias)
        return functional_call(base_layer, {self.parameter_name: weight}, args, kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for name in check_adapters_to_merge(self, adapter_names) or []:
            if name not in self._get_available_adapters():
                continue
            weight = self._base_weight
            merged = weight.data + self.get_delta_weight(name).to(weight.dtype)
            if safe_merge and not merged.isfinite().all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            weight.data = merged
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            weight = self._base_weight
            weight.data -= self.get_delta_weight(self.merged_adapters.pop()).to(weight.dtype)


class WeightLora(WeightBranch):
    """Wraps a layer and adds low-rank changes to its weight, one for each adapter.

    The change is `reshape(B A, shape of the weight) * lora_alpha / r`. For a weight of `c_out x c_in x k x k`:

    - `layout="released"`: `A` is `r k x c_in k`, `B` is `c_out k x r k` (microsoft/LoRA's `ConvLoRA`, which the code
      of AutoLoRa uses);
    - `layout="peft"`: `A` is `r x c_in k k`, `B` is `c_out x r`, the change that PEFT's own convolution makes.

    A linear layer is the case k = 1, where both are the same. With groups, `c_in` is the number of input channels of
    one group, and the rank is at most that of the weight. A kernel with sides `k_1`, `k_2` has `r min(k_1, k_2)`,
    `c_in k_2` and `c_out k_1` in the released layout.
    """

    def __init__(self, *args: Any, layout: str = "released", **kwargs: Any) -> None:
        self.layout = layout
        super().__init__(*args, **kwargs)

    @property
    def kernel_width(self) -> int:
        """k: side of the kernel (the smaller one), 1 for a linear layer."""
        kernel = self._base_weight.shape[2:]
        return min(kernel[0], math.prod(kernel[1:])) if kernel else 1

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        self._scale(adapter_name, r, lora_alpha, config)
        weight = self._base_weight
        rows, rank = weight.shape[0], r
        if self.layout == "released":
            rows, rank = rows * (weight.shape[2] if weight.ndim > 2 else 1), r * self.kernel_width
        columns = weight.numel() // rows
        if getattr(self.base_layer, "groups", 1) > 1:
            # One group is often narrower than the rank: more factors than this could not change more.
            rank = min(rank, rows, columns)
        self.lora_A[adapter_name] = nn.Parameter(weight.new_empty(rank, columns))
        self.lora_B[adapter_name] = nn.Parameter(weight.new_zeros(rows, rank))
        self._initialise(adapter_name, config.init_lora_weights)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _initialise(self, adapter_name: str, how: bool | str) -> None:
        factor_a, factor_b = self.lora_A[adapter_name], self.lora_B[adapter_name]
        if self.layout == "released":
            nn.init.normal_(factor_a)
        elif how == "gaussian":
            nn.init.normal_(factor_a, std=1 / self.r[adapter_name])
        else:
            nn.init.kaiming_uniform_(factor_a, a=math.sqrt(5))
            if how is False:
                nn.init.kaiming_uniform_(factor_b, a=math.sqrt(5))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Change of the weight that `adapter` makes, in the weight's shape."""
        delta = self.lora_B[adapter] @ self.lora_A[adapter]
        return delta.view(self._base_weight.shape) * self.scaling[adapter]


def unfold_factors(lora_a: Tensor, lora_b: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Factors of PEFT's layout that make exactly the same change of the weight as the released layout's.

    The released product, read row by row in the weight's order, is `B' blockdiag(A, ..., A)` with k copies of A:
    PEFT's factorisation of rank `r k^2`. Only copies are made, so [`fold_factors`] gives back the same bits.

    Args:
        lora_a (`Tensor`): `A`, `r k x c_in k`.
        lora_b (`Tensor`): `B`, `c_out k x r k`.
        width (`int`): k.

    Returns:
        The weights of PEFT's `lora_A` (`r k^2 x c_in x k x k`) and `lora_B` (`c_out x r k^2 x 1 x 1`) convolutions.
    """
    rows, columns = lora_a.shape
    first = lora_a.new_zeros(width, rows, width, columns)
    for block in range(width):
        first[block, :, block] = lora_a
    return first.reshape(width * rows, -1, width, width), lora_b.reshape(-1, width * rows, 1, 1)


def fold_factors(first: Tensor, second: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Inverse of [`unfold_factors`]: `A` and `B` of the released layout, bit for bit."""
    rows = first.shape[0] // width
    lora_a = first.reshape(width, rows, width, -1)[0, :, 0]
    return lora_a.contiguous(), second.reshape(-1, rows).contiguous()
