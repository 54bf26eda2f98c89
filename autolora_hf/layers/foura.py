"""FouRA (Borse et al., NeurIPS 2024, arXiv 2406.08798): LoRA in the frequency domain of the channels.

`h = W0 x + F^-1(B s G(z) z)` with `z = A F(x)`. `F` is the orthonormal real DCT-II along the channels here (a variant
that the paper studies), whose inverse is its transpose, `s` is `lora_alpha / r`, and the gate `G` is off unless asked
for. Without it the change of the weight is `D_out^T B A D_in s`: exact to merge, and a LoRA with rotated factors.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor, nn

from .output import OutputBranch, RankGate
from .weight import WeightLora


# Shared by all layers of a width: as a buffer of each it would take more memory than the model. A plain dictionary,
# which torch.compile can look into.
_MATRICES: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}
_MOST_MATRICES = 64


def dct_matrix(size: int, like: Tensor) -> Tensor:
    """Matrix of the orthonormal DCT-II, `size x size`, row by frequency, on the device and in the type of `like`."""
    key = (size, like.device, like.dtype)
    if key not in _MATRICES:
        while len(_MATRICES) >= _MOST_MATRICES:
            del _MATRICES[next(iter(_MATRICES))]
        _MATRICES[key] = _dct_matrix(*key)
    return _MATRICES[key]


def _dct_matrix(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    # What is made in inference mode could not take part in training later.
    with torch.inference_mode(False):
        matrix = torch.empty(size, size, dtype=dtype)
        for start in range(0, size, 512):  # a part at a time, since it is computed in double precision
            frequency = np.arange(start, min(start + 512, size))[:, None]
            rows = np.cos(math.pi / size * frequency * (np.arange(size) + 0.5)) * math.sqrt(2 / size)
            matrix[start : start + 512] = torch.from_numpy(rows)
        matrix[0] /= math.sqrt(2)
        return matrix.to(device)


class WeightFoura(WeightLora):
    """FouRA without a gate, as a change of the weight of any layer.

    The transforms act on the channels of the weight, `c_out x c_in x k x k`; within one group of a grouped
    convolution. Factors are those of PEFT's layout: `A` is `r x c_in k k`, `B` is `c_out x r`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "layout": "peft"})

    def get_delta_weight(self, adapter: str) -> Tensor:
        weight, first, second = self._base_weight, self.lora_A[adapter], self.lora_B[adapter]
        # r x c_in x k k, transformed along the channels.
        channels = first.view(len(first), weight.shape[1], -1).transpose(1, 2)
        first = (channels @ dct_matrix(weight.shape[1], first)).transpose(1, 2).flatten(1)
        second = dct_matrix(weight.shape[0], second).T @ second
        return (second @ first).view(weight.shape) * self.scaling[adapter]


class GatedFoura(OutputBranch):
    """FouRA with the hard gate of [`RankGate`], on a linear layer that is called.

    Which ranks are used depends on the input, so it cannot be merged, and the loss is not continuous in the input:
    gradient attacks see the straight-through estimate only, and robust accuracy is to be measured with AutoAttack,
    whose Square needs no gradient. It has `2 r (r + 1) + 2` parameters more than LoRA.
    """

    adapter_layer_names = ("lora_A", "lora_B", "lora_gate")
    module_names = ("lora_gate",)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        self._scale(adapter_name, r, lora_alpha, config)
        weight = self.base_layer.weight
        self.lora_A[adapter_name] = nn.Parameter(weight.new_empty(r, weight.shape[1]))
        self.lora_B[adapter_name] = nn.Parameter(weight.new_zeros(weight.shape[0], r))
        self.lora_gate[adapter_name] = RankGate(r, device=weight.device, dtype=weight.dtype)
        nn.init.kaiming_uniform_(self.lora_A[adapter_name], a=math.sqrt(5))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def change(self, adapter: str, inputs: Tensor, outputs: Tensor) -> Tensor:
        first, second = self.lora_A[adapter], self.lora_B[adapter]
        # Transforming the factors instead of the tokens is the same, and less work.
        low = F.linear(inputs.to(first.dtype), first @ dct_matrix(first.shape[1], first))
        low = low * self.lora_gate[adapter](low) * self.scaling[adapter]
        return F.linear(low, dct_matrix(len(second), second).T @ second)
