"""Pictures of a model's answers under attack, chosen by what a report found."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from ..attacks import PGD
from ..data import as_pixel_dataset
from ..modeling import AutoLoraModel
from .drawing import write_figure
from .figures import adversarial_examples_figure
from .report import RobustnessReport


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def examples_figure(model: AutoLoraModel, dataset: Any, report: RobustnessReport, rows: int = 6) -> Figure:
    """Draws images that withstood the attacks of a report, and two that did not, or more where too few withstood.

    The pictures show PGD with 50 steps, since a report does not keep the adversarial images.

    Args:
        model (`AutoLoraModel`): The model the report is about.
        dataset: The data the report was measured on, as [`as_pixel_dataset`] takes them.
        report (`RobustnessReport`): Names the route and the images, and says which of them withstood.
        rows (`int`): Number of images.
    """
    outcome = list(zip(report.sample_indices, report.natural_correct, report.robust_correct, strict=True))
    broken = [index for index, natural, robust in outcome if natural and not robust]
    held = [index for index, _, robust in outcome if robust]
    # More of those that did not where there are not enough others.
    of_broken = min(len(broken), max(2, rows - len(held)), rows)
    spaced = held[:: max(1, len(held) // rows)][: rows - of_broken]
    # Nothing else to show of a model that is always wrong.
    chosen = [*spaced, *broken[:of_broken]] or report.sample_indices[:rows]
    pixel_dataset = as_pixel_dataset(dataset, model.preprocessing)
    items = [pixel_dataset[index] for index in chosen]
    reference = next(model.parameters())
    pixels = torch.stack([item["pixel_values"] for item in items]).to(reference.device)
    labels = torch.tensor([item["labels"] for item in items], device=reference.device)
    pixel_model = model.pixel_space(report.route)
    adversarial = PGD(report.threat_model, steps=50, restarts=2)(pixel_model, pixels, labels)
    return adversarial_examples_figure(
        pixel_model, pixels, labels, adversarial, report.class_names or model.label_names
    )


def draw_examples(
    model: AutoLoraModel, dataset: Any, report: RobustnessReport, path: str | os.PathLike, rows: int = 6
) -> None:
    """Writes [`examples_figure`] to `path`; the suffix (.png, .pdf, .svg) decides the format."""
    write_figure(examples_figure(model, dataset, report, rows), path)
