"""The released layout of LoRA for convolutions, as a PEFT layer.

For a k x k convolution of `c_in` to `c_out` channels the branch adds `reshape(B A, shape of W) * lora_alpha / r` to
the weight, with `A` of shape `r k x c_in k` and `B` of shape `c_out k x r k` (microsoft/LoRA's `ConvLoRA`, which the
code of AutoLoRa uses). A linear layer is the case k = 1. PEFT's own convolution factorises differently.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn


class ReleasedLora(nn.Module, LoraLayer):
    """Wraps an `nn.Conv2d` or `nn.Linear` and adds low-rank changes to its weight, one for each adapter."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        # Bare parameters instead of PEFT's inner layers: the factors are matrices, whatever the layer is.
        self.lora_A = nn.ParameterDict({})
        self.lora_B = nn.ParameterDict({})
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    @property
    def kernel_width(self) -> int:
        """k: side of the square kernel, 1 for a linear layer."""
        base_layer = self.get_base_layer()
        return base_layer.kernel_size[0] if isinstance(base_layer, nn.Conv2d) else 1

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        if r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {r}")
        width, weight = self.kernel_width, self.get_base_layer().weight
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = lora_alpha / (r**0.5 if config.use_rslora else r)
        self.use_rslora[adapter_name] = config.use_rslora
        self.lora_bias[adapter_name] = False
        self.lora_A[adapter_name] = nn.Parameter(weight.new_empty(r * width, self.in_features * width))
        self.lora_B[adapter_name] = nn.Parameter(weight.new_zeros(self.out_features * width, r * width))
        nn.init.normal_(self.lora_A[adapter_name])
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Change of the weight that `adapter` makes, in the weight's shape."""
        delta = self.lora_B[adapter] @ self.lora_A[adapter]
        return delta.view(self.get_base_layer().weight.shape) * self.scaling[adapter]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        base_layer = self.get_base_layer()
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        weight = base_layer.weight
        for name in active:
            weight = weight + self.get_delta_weight(name).to(weight.dtype)
        if isinstance(base_layer, nn.Linear):
            return F.linear(x, weight, base_layer.bias)
        return base_layer._conv_forward(x, weight, base_layer.bias)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for name in check_adapters_to_merge(self, adapter_names) or []:
            if name not in self.lora_A:
                continue
            weight = self.get_base_layer().weight
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
            weight = self.get_base_layer().weight
            weight.data -= self.get_delta_weight(self.merged_adapters.pop()).to(weight.dtype)

    def __repr__(self) -> str:
        return "autolora." + super().__repr__()


def unfold_factors(lora_a: Tensor, lora_b: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Factors of PEFT's layout that make exactly the same change of the weight.

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
