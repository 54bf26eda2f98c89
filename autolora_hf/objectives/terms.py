"""Terms that several objectives share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def kl_divergences(target: Tensor, logits: Tensor) -> Tensor:
    """`KL(softmax(target) || softmax(logits))` of every image, N, from logits N x K. The target is not detached."""
    return F.kl_div(F.log_softmax(logits, -1), F.log_softmax(target, -1), reduction="none", log_target=True).sum(-1)


def similarity(embeddings: Tensor) -> Tensor:
    """Mean cosine between different rows of N x D, a scalar; 1 if there is only one."""
    count = len(embeddings)
    total = F.normalize(embeddings.double(), dim=-1).sum(0).square().sum()
    return (total - count) / (count * (count - 1)) if count > 1 else total


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of right answers, a scalar."""
    return (logits.argmax(-1) == labels).to(logits.dtype).mean()
