"""Digests of weights, by which one knows whether a model is still the one that was measured."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor


def backbone_digest(tensors: dict[str, Tensor], heads: list[str], record: dict[str, Any]) -> str:
    """Identity of a backbone's weights; without its head, which is made afresh for another number of classes.

    Args:
        tensors (`dict[str, Tensor]`): State dict of the backbone without any branch.
        heads (`list[str]`): Its classification layers.
        record (`dict`): What [`describe_backbone`] gives.
    """
    prefixes = tuple(f"{head}." for head in heads)
    # What was resampled for another image size differs in the last bit between processors.
    resampled = record.get("resampled", ())
    return weights_digest({k: v for k, v in tensors.items() if not k.startswith(prefixes) and k not in resampled})


def weights_digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values of `tensors`, independent of their order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
