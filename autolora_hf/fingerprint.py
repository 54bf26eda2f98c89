"""A fingerprint of what a model computes, and whether it still does.

Names and shapes of weights do not tell everything about a model: with it a loader notices a network whose forward is
another one, in a later release of its library for instance.
"""

from __future__ import annotations

import logging
import math
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .attacks.pgd import attack_mode
from .pixels import Preprocessing
from .record import Record


if TYPE_CHECKING:
    from .modeling import AutoLoraModel


logger = logging.getLogger(__name__)


def fingerprint(model: AutoLoraModel) -> dict[str, list[list[float]]] | None:
    """Logits of every route for two fixed images; `None` if they are not finite."""
    logits = {route: _fixed_logits(model, route) for route in model.routes}
    if not all(values.isfinite().all() for values in logits.values()):
        return None
    return {route: [[float(f"{x:.7g}") for x in row] for row in values.tolist()] for route, values in logits.items()}


def check_fingerprint(model: AutoLoraModel, record: Record, source: str | os.PathLike) -> None:
    """Warns if the loaded model does not compute what it computed when it was saved."""
    for route, saved in (record.fingerprint or {}).items():
        if route not in model.routes:
            continue
        expected, found = torch.tensor(saved, dtype=torch.float64), _fixed_logits(model, route)
        if expected.shape == found.shape:
            # Rounding is magnified a thousandfold in some networks; another forward is not that near.
            difference = ((found - expected).abs().max() / expected.abs().max().clamp(min=1)).item()
            if difference < 0.05:
                continue
        logger.warning(
            "The %s route of %s does not compute what it computed when it was saved: its logits for two fixed images "
            "differ. Its figures may not hold. It was saved with %s.",
            route,
            source,
            ", ".join(f"{name} {version}" for name, version in record.versions.items()),
        )


@torch.no_grad()
def _fixed_logits(model: AutoLoraModel, route: str) -> Tensor:
    with attack_mode(model):
        view = model.pixel_space(route)
        pixels = _fixed_images(model.preprocessing).to(next(model.parameters()).device)
        return view(pixels).double().cpu()


def _fixed_images(preprocessing: Preprocessing) -> Tensor:
    """Two smooth coloured patterns, 2 x 3 x H x W, of whole 255ths: the same on every machine."""
    height, width = preprocessing.image_size
    rows = torch.linspace(0, 1, height, dtype=torch.float64)[:, None]
    columns = torch.linspace(0, 1, width, dtype=torch.float64)[None, :]
    waves = [torch.sin(math.tau * (n * rows + (5 - n) * columns) + n) for n in range(6)]
    pixels = torch.stack(waves).view(2, 3, height, width)
    return ((pixels + 1) * 127).round().float() / 255
