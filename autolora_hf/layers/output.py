"""Branches that depend on the input of a layer, or follow its output: they cannot be merged into its weight."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor, nn

from .base import BranchLayer


class OutputBranch(BranchLayer):
    """Wraps a linear layer or convolution that is called, and adds something to its output for each adapter."""

    def change(self, adapter: str, inputs: Tensor, outputs: Tensor) -> Tensor:
        """What `adapter` adds.

        Args:
            adapter (`str`): Name of the adapter.
            inputs (`Tensor`): What the layer was called with: `N x ... x c_in`, of a convolution `N x c_in x H x W`.
            outputs (`Tensor`): What came out so far, the adapters before this one included: `N x ... x c_out`, of a
                convolution `N x c_out x H' x W'`.

        Returns:
            A tensor of the shape of `outputs`.
        """
        raise NotImplementedError

    def forward(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        outputs = self.base_layer(inputs, *args, **kwargs)
        for adapter in self._live_adapters():
            outputs = outputs + self.change(adapter, inputs, outputs).to(outputs.dtype)
        return outputs

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(
            f"A {type(self).__name__} branch depends on its input, so it cannot be merged into the weight of a layer."
        )


def takes_patches(conv: nn.Module) -> bool:
    """Whether `conv` is a convolution of patches side by side, as in the first layer of a ViT.

    Every input then belongs to at most one output place, so that it is a linear layer of flattened patches.
    """
    return (
        isinstance(conv, nn.Conv2d)
        and conv.stride == conv.kernel_size
        and conv.groups == 1
        and conv.padding in (0, (0, 0), "valid")
        and conv.dilation == (1, 1)
    )


def patches_of(images: Tensor, kernel: tuple[int, int]) -> Tensor:
    """Patches side by side, flattened as a convolution's weight is: `N x C x H x W` to `N x h x w x C k_1 k_2`."""
    (height, width), (count, channels) = kernel, images.shape[:2]
    rows, columns = images.shape[2] // height, images.shape[3] // width
    images = images[:, :, : rows * height, : columns * width]
    patches = images.reshape(count, channels, rows, height, columns, width).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(count, rows, columns, channels * height * width)


class LNLora(OutputBranch):
    """LNLoRA of FullLoRA-AT (Yuan, Zhang and Shan, arXiv 2401.01752): `h = W0 x + s B A LN(x)`.

    `LN` is a LayerNorm of the adapter's own over the `c_in` inputs, `A` is `r x c_in`, `B` is `c_out x r`, `s` is
    `lora_alpha / r`. On a convolution of patches side by side `x` is a flattened patch, and `c_in` is `C k_1 k_2`.
    `B` starts at zero. It has `r (c_in + c_out) + 2 c_in` parameters.

    The paper is about transformers. On any other convolution without groups, LN is of the channels at each place, `A`
    a convolution to r channels with the kernel, stride and padding of the layer, and `B` one of 1 x 1:
    `r (c_in k_1 k_2 + c_out) + 2 c_in` parameters.
    """

    adapter_layer_names = ("lora_A", "lora_B", "lora_norm")
    module_names = ("lora_norm",)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        self._scale(adapter_name, r, lora_alpha, config)
        weight = self.base_layer.weight
        rows, columns = weight.shape[0], weight[0].numel()
        self.lora_A[adapter_name] = nn.Parameter(weight.new_empty(r, columns))
        self.lora_B[adapter_name] = nn.Parameter(weight.new_zeros(rows, r))
        # Of a patch, a token, or the channels at one place.
        width = columns if self._takes_whole_inputs else weight.shape[1]
        self.lora_norm[adapter_name] = nn.LayerNorm(width, device=weight.device, dtype=weight.dtype)
        # The spread of PEFT's: uniform, of variance 1 / (3 c_in).
        nn.init.kaiming_uniform_(self.lora_A[adapter_name], a=5**0.5)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @property
    def _takes_whole_inputs(self) -> bool:
        """Whether every output comes of one flattened input that no other shares."""
        return not isinstance(self.base_layer, nn.Conv2d) or takes_patches(self.base_layer)

    def change(self, adapter: str, inputs: Tensor, outputs: Tensor) -> Tensor:
        first, second, norm = self.lora_A[adapter], self.lora_B[adapter], self.lora_norm[adapter]
        if not self._takes_whole_inputs:
            normed = norm(inputs.to(first.dtype).movedim(1, -1)).movedim(-1, 1)
            low = self.base_layer._conv_forward(normed, first.view(-1, *self.base_layer.weight.shape[1:]), None)
            return F.conv2d(low, second[:, :, None, None]) * self.scaling[adapter]
        is_conv = isinstance(self.base_layer, nn.Conv2d)
        if is_conv:
            inputs = patches_of(inputs, self.base_layer.kernel_size)
        low = F.linear(norm(inputs.to(first.dtype)), first)
        found = F.linear(low, second) * self.scaling[adapter]
        return found.permute(0, 3, 1, 2) if is_conv else found


class AdaKron(OutputBranch):
    """The adapter of AdaKron (Braga, Raganato and Pasi, LREC-COLING 2024), after the layer it wraps.

    Of the output `x` of the layer, with d channels, `u1 = W1 x + b1` has `r / 4` values and `u2 = W2 x + b2` has four;
    the result is `x + W_up GELU(u2 (x) u1) + b_up`, where `(x)` is the Kronecker product. `W_up` and `b_up` start at
    zero. It has `(d + 1)(r / 4 + 4) + (r + 1) d` parameters; there is no scale. After a convolution it stands at
    every place, on the channels.
    """

    SECOND = 4
    adapter_layer_names = ("lora_down_1", "lora_down_2", "lora_up")
    module_names = adapter_layer_names

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        self._scale(adapter_name, r, lora_alpha, config)
        if r % self.SECOND:
            raise ValueError(f"The rank of an AdaKron branch must be a multiple of {self.SECOND}, got {r}.")
        weight = self.base_layer.weight
        width, like = weight.shape[0], {"device": weight.device, "dtype": weight.dtype}
        self.lora_down_1[adapter_name] = nn.Linear(width, r // self.SECOND, **like)
        self.lora_down_2[adapter_name] = nn.Linear(width, self.SECOND, **like)
        self.lora_up[adapter_name] = nn.Linear(r, width, **like)
        nn.init.zeros_(self.lora_up[adapter_name].weight)
        nn.init.zeros_(self.lora_up[adapter_name].bias)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def change(self, adapter: str, inputs: Tensor, outputs: Tensor) -> Tensor:
        up = self.lora_up[adapter]
        is_conv = isinstance(self.base_layer, nn.Conv2d)
        values = (outputs.movedim(1, -1) if is_conv else outputs).to(up.weight.dtype)
        first, second = self.lora_down_1[adapter](values), self.lora_down_2[adapter](values)
        found = up(F.gelu((second.unsqueeze(-1) * first.unsqueeze(-2)).flatten(-2)))
        return found.movedim(-1, 1) if is_conv else found


class RankGate(nn.Module):
    """The adaptive rank gate of FouRA (Borse et al., NeurIPS 2024, section 4): which ranks an input uses.

    A two-layer network makes scores of the low-rank values `z`; for each rank, a softmax over the tokens of an image
    makes a distribution of them, whose entropy, as a share of the largest possible one, is `e`. The gate is open, 1,
    where `sigmoid(slope (e - offset))` is above one half, else it is 0. `slope` and `offset` are learnt. A single
    token has no entropy to speak of: its gate is that of `e = 1`.

    The step has no derivative. In the backward pass that of the sigmoid takes its place (straight-through estimator,
    Bengio et al. 2013), so that training and attacks see a gradient.

    The paper leaves the distribution open; this is the reading nearest to its text and to public code.
    """

    def __init__(self, r: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(r, r, device=device, dtype=dtype)
        self.second = nn.Linear(r, r, device=device, dtype=dtype)
        self.slope = nn.Parameter(torch.full((), 4.0, device=device, dtype=dtype))
        self.offset = nn.Parameter(torch.full((), 0.5, device=device, dtype=dtype))

    def forward(self, values: Tensor) -> Tensor:
        """Gate of `values`, `N x ... x r`: zeros and ones, `N x 1 ... x r`."""
        tokens = values.flatten(1, -2) if values.ndim > 2 else values.unsqueeze(1)
        scores = self.second(F.gelu(self.first(tokens)))
        logs = scores.log_softmax(1)
        entropy = -(logs.exp() * logs).sum(1)
        most = math.log(tokens.shape[1])
        share = entropy / most if most > 0 else entropy + 1
        soft = torch.sigmoid(self.slope * (share - self.offset))
        # In this order nothing but zeros and ones comes out.
        gate = (soft > 0.5).to(soft.dtype) + (soft - soft.detach())
        return gate.view(gate.shape[0], *[1] * (values.ndim - 2), gate.shape[-1])
