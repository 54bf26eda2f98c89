"""The weights of a layer with branches merged into them, without a change of the layer."""

from __future__ import annotations

import copy

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from .base import weight_name


@torch.no_grad()
def merged_tensors(layer: BaseTunerLayer, adapters: list[str]) -> dict[str, Tensor]:
    """Parameters and buffers of the layer inside `layer`, by name, as `adapters` change them; see [`can_merge`].

    The tensors that no adapter changes are the layer's own.
    """
    base = layer.get_base_layer()
    tensors = dict(base.named_parameters(recurse=False)) | dict(base.named_buffers(recurse=False))
    if not adapters:
        return tensors
    # Only a change of PEFT's plain LoRA layers and of ours is a sum.
    if isinstance(layer, LoraLayer) and not layer.lora_variant:
        key = weight_name(base)
        for adapter in adapters:
            tensors[key] = tensors[key] + layer.get_delta_weight(adapter).to(tensors[key].dtype)
        return tensors
    # PEFT merges in place, so into a copy of the base layer, with the adapters of the live one.
    scratch = copy.copy(layer)
    scratch._modules = {**layer._modules, "base_layer": copy.deepcopy(base)}
    scratch.merged_adapters = []
    scratch._caches = {}
    scratch.merge(adapter_names=adapters)
    merged = scratch.get_base_layer()
    return dict(merged.named_parameters(recurse=False)) | dict(merged.named_buffers(recurse=False))
