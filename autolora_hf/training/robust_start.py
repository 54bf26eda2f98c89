"""What is measured of a backbone before training: whether it looks robustly pre-trained, that is how far an attack
moves its features; and of a tower how similar its embeddings are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..attacks.pgd import Ball, attack_mode
from ..config import ThreatModel
from ..modeling import AutoLoraModel
from ..objectives.terms import similarity
from ..progress import progress_bar
from ..routes import ROBUST
from .distributed import random_starts


# Where the balls of two typical images begin to meet in feature space. Measured at Linf 0.1 (and 8/255): 0.15
# (0.05) for the robust backbone of the quickstart, 2.1 (0.95) for its natural twin, see `scripts/robust_start.py`.
MOVABLE = 0.5
# With ten steps about an eighth of the passes of one training step of 128 images.
IMAGES = 16
STEPS = 10


def feature_displacement(model: AutoLoraModel, pixels: Tensor, threat_model: ThreatModel, seed: int = 0) -> float:
    """How far an attack inside `threat_model` moves the features before the head, in units of the distance between
    the features of two images: the ratio of the medians.

    No head and no labels are needed, and scale and width of the features cancel out. The model, its gradients and the
    global random state are left alone.

    Args:
        model (`AutoLoraModel`): Its deployed route is measured, in eval mode.
        pixels (`Tensor`): Images in [0, 1], N x 3 x H x W, N at least 2, best of different classes.
        threat_model (`ThreatModel`): The ball.
        seed (`int`): Of the random starts.

    Returns:
        Infinity if all images have the same features, and NaN if these cannot be moved either.
    """
    with attack_mode(model), _features(model) as features:
        with torch.no_grad():
            clean = features(pixels)
            apart = torch.pdist(clean).median()
        moved, ball = random_starts(pixels, threat_model, seed, first=0), Ball(pixels, threat_model)
        for _ in progress_bar(range(STEPS), title="robustness of the backbone", unit="step"):
            moved.requires_grad_(True)
            distance = (features(moved) - clean).square().sum()
            (gradient,) = torch.autograd.grad(distance, moved)
            moved = ball.ascend(moved.detach(), gradient, threat_model.eps / 4)
        with torch.no_grad():
            way = (features(moved) - clean).norm(dim=1).median()
    return (way / apart).item()


@torch.no_grad()
def embedding_similarity(model: AutoLoraModel, pixels: Tensor) -> float:
    """Mean cosine between the embeddings of different images, N x 3 x H x W, by the deployed route in eval mode."""
    view = model.pixel_space(ROBUST)
    with attack_mode(model):
        return similarity(torch.cat([view(part) for part in pixels.split(IMAGES)])).item()


@contextmanager
def _features(model: AutoLoraModel) -> Iterator:
    """Function from pixels to what the heads get, N x D, in at least float32."""
    seen: list[Tensor] = []
    hooks = [head.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0])) for head in model.heads]
    pixel_model = model.pixel_space(ROBUST)

    def features(pixels: Tensor) -> Tensor:
        seen.clear()
        with torch.enable_grad() if pixels.requires_grad else torch.no_grad():
            pixel_model(pixels)
        return torch.cat([tensor.reshape(len(pixels), -1).float() for tensor in seen], dim=1)

    try:
        yield features
    finally:
        for hook in hooks:
            hook.remove()
