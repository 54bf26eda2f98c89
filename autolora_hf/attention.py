"""Attention in half precision on a CPU, where the fused kernel's backward pass is slower than plain products."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


@contextmanager
def plain_attention(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Inside, `scaled_dot_product_attention` is computed by plain products if that is faster: half precision on a CPU.

    Whatever library the model comes from. The mathematics are the same; see `docs/speed.md` for the times.
    """
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        yield
        return
    with _PlainAttention():
        yield


class _PlainAttention(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` by its definition; same arguments and shapes."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query * scale) @ key.transpose(-2, -1)
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    if attn_mask is not None:
        # A boolean mask says what takes part, any other is added.
        is_boolean = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if is_boolean else scores + attn_mask.to(scores.dtype)
    weights = scores.softmax(-1)
    if attn_mask is not None:
        # Where nothing takes part, the fused kernels answer zero.
        weights = weights.masked_fill((scores == -math.inf).all(-1, keepdim=True), 0)
    return F.dropout(weights, dropout_p) @ value
