"""Figures: adversarial examples next to the clean images, and the curves of a training run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..attacks import attack_mode
from ..pixels import check_pixels
from .breakdown import class_name
from .drawing import BLUE, GREEN, GREY, ORANGE, RED, new_figure, plain_name, write_figure
from .view import AttackView


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_ACCURACIES = (
    ("eval_natural_accuracy", "natural accuracy, deployed route", BLUE, "o-"),
    ("eval_robust_accuracy", "robust accuracy (PGD), deployed route", RED, "s-"),
    ("eval_natural_route_accuracy", "natural accuracy, natural route", BLUE, "o--"),
    ("train_natural_route_accuracy", "natural accuracy, natural route, training images", GREY, "^:"),
)
# Of objectives that do not classify.
_LOSSES = (
    ("eval_clean_loss", "without attack", BLUE, "o-"),
    ("eval_loss", "under attack (PGD)", RED, "s-"),
)
_SCALARS = (
    ("lambda1", "λ₁", BLUE, "o-"),
    ("lambda2", "λ₂", ORANGE, "s-"),
    ("eps_share", "share of ε", GREEN, "^-"),
    ("loss", "training loss", GREY, "-"),
)
# Of the natural and the adversarial gradient of the feature extractor.
_COSINES = (
    ("gradient_cosine", "without the branch", RED, "s-"),
    ("gradient_cosine_branch", "with the branch", BLUE, "o-"),
)


def adversarial_examples_figure(
    model: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    adversarial: Tensor,
    class_names: Sequence[str] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draws one row an image: clean, perturbation (amplified), adversarial, each with the model's answer.

    A correct answer is green with a tick, a wrong one red with a cross, so that the signs alone tell.

    Args:
        model (`nn.Module`): An [`AutoLoraModel`] (its deployed route is used), or a module that maps pixels to logits.
        pixels (`Tensor`): Clean images, N x 3 x H x W or N x 1 x H x W, in [0, 1].
        labels (`Tensor`): True class indices, N.
        adversarial (`Tensor`): Adversarial images, of the shape of `pixels`, in [0, 1].
        class_names (`Sequence[str]`, *optional*): Names in class order. `None`: "class 3".
        path (*optional*): Where to write the figure; the suffix (.png, .pdf, .svg) decides the format.

    Returns:
        The `matplotlib.figure.Figure`; pyplot is not involved.

    Raises:
        ValueError: If the tensors do not belong together.
    """
    check_pixels(pixels)
    check_pixels(adversarial, "adversarial")
    if adversarial.shape != pixels.shape or labels.shape != pixels.shape[:1]:
        raise ValueError(
            f"`pixels` {tuple(pixels.shape)}, `labels` {tuple(labels.shape)} and `adversarial` "
            f"{tuple(adversarial.shape)} must be one label and one adversarial image for each clean image."
        )
    clean_answers, adversarial_answers = _answers(model, pixels), _answers(model, adversarial)
    pixels, adversarial = pixels.detach().cpu().float(), adversarial.detach().cpu().float()
    amplified, factor = amplified_change(adversarial - pixels)
    columns = (
        ("clean", pixels, clean_answers),
        (f"perturbation \N{MULTIPLICATION SIGN} {factor}\n(grey: no change)", amplified, None),
        ("adversarial", adversarial, adversarial_answers),
    )

    def named(label: int) -> str:
        return plain_name(class_name(label, class_names), f"class {label}")

    figure = new_figure(6.6, 2.35 * len(pixels) + 0.6)
    axes = figure.subplots(len(pixels), len(columns), squeeze=False)
    for column, (title, images, answers) in enumerate(columns):
        axes[0, column].set_title(title, fontsize=11, pad=10)
        for row, image in enumerate(images):
            axis = axes[row, column]
            picture = image.permute(1, 2, 0).numpy()
            grey = {"cmap": "gray", "vmin": 0, "vmax": 1} if picture.shape[-1] == 1 else {}
            axis.imshow(picture, interpolation="nearest", **grey)
            axis.set_xticks([])
            axis.set_yticks([])
            if column == 0:
                axis.set_ylabel(f"true: {named(int(labels[row]))}", fontsize=9)
            if answers is not None:
                predicted, confidence = answers[0][row], answers[1][row]
                correct = predicted == labels[row].item()
                colour = GREEN if correct else RED
                axis.set_xlabel(
                    f"{'✓' if correct else '✗'} {named(predicted)}, {confidence:.0%}", color=colour, fontsize=10
                )
                for spine in axis.spines.values():
                    spine.set(color=colour, linewidth=2)
    if path is not None:
        write_figure(figure, path)
    return figure


def training_curves_figure(
    log_history: Sequence[dict[str, Any]], path: str | os.PathLike[str] | None = None
) -> Figure:
    """Draws a training run: accuracies, or the validation loss where there are none; loss and its scalars; learning
    rate with the reloads of the best weights; and, if they were measured, the cosines of natural and adversarial
    gradients.

    Args:
        log_history (`Sequence[dict]`): `trainer.state.log_history`. Quantities that were not logged are left out.
        path (*optional*): Where to write the figure; the suffix (.png, .pdf, .svg) decides the format.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    has_cosines = any(_series(log_history, key) for key, *_ in _COSINES)
    ratios = [1.5, 1.2, 1] + [1] * has_cosines
    figure = new_figure(7.2, 8 * sum(ratios) / 3.7)
    accuracies, scalars, rates, *cosines = panels = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios)
    cast(Any, figure.get_layout_engine()).set(hspace=0.04)

    _plot(accuracies, log_history, _ACCURACIES)
    if accuracies.lines or not _series(log_history, "eval_clean_loss"):
        accuracies.set_ylabel("accuracy")
        accuracies.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    else:
        _plot(accuracies, log_history, _LOSSES)
        accuracies.set_ylabel("validation loss")
    accuracies.set_ylim(bottom=0)
    _plot(scalars, log_history, _SCALARS)
    scalars.set_ylabel("loss and its scalars")
    _plot(rates, log_history, (("learning_rate", "learning rate", BLUE, "-"),))
    for line in rates.lines:
        # Logged at the end of the epoch in which it was in force.
        line.set_drawstyle("steps-pre")
    values = [value for line in rates.lines for value in line.get_ydata() if value > 0]
    if values:
        rates.set_yscale("log")
        rates.set_ylim(min(values) / 1.5, max(values) * 1.5)
        rates.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        rates.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        rates.yaxis.set_minor_formatter(NullFormatter())
    rates.set_ylabel("learning rate")
    for axis in cosines:
        _plot(axis, log_history, _COSINES)
        axis.axhline(0, color=GREY, linewidth=1, zorder=0.5)
        axis.set_ylim(min(-0.05, axis.dataLim.ymin - 0.05), 1.05)
        axis.set_ylabel("gradient cosine")
    panels[-1].set_xlabel("epoch")
    panels[-1].set_xlim(left=0)
    for number, (epoch, _) in enumerate(_series(log_history, "reload", skip_zero=True)):
        for axis in panels:
            label = "best weights reloaded" if number == 0 and axis is rates else None
            axis.axvline(epoch, color=ORANGE, linestyle=(0, (4, 3)), linewidth=1, zorder=0.5, label=label)
    for axis in panels:
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[1]:
            # Above the panel, where no curve runs through it.
            columns = 2 if axis is accuracies else 3
            axis.legend(loc="lower left", bbox_to_anchor=(-0.01, 1), ncols=columns, frameon=False, fontsize=8.5)
        else:
            axis.text(0.5, 0.5, "not logged", transform=axis.transAxes, ha="center", va="center", color=GREY)
    figure.align_ylabels()
    if path is not None:
        write_figure(figure, path)
    return figure


@torch.no_grad()
def _answers(model: nn.Module, pixels: Tensor) -> tuple[list[int], list[float]]:
    """Predicted classes and their softmax probabilities."""
    with attack_mode(model):
        view = AttackView(model)
        confidence, predicted = view(pixels.detach().float().to(view.device)).softmax(1).max(1)
    return predicted.tolist(), confidence.tolist()


def amplified_change(change: Tensor) -> tuple[Tensor, int]:
    """A picture of a change of pixels, on grey, and the factor by which it is amplified: the roundest one that makes
    the change clearly visible without cutting it off."""
    largest = change.abs().max().item()
    factors = (100, 50, 30, 20, 15, 10, 8, 5, 4, 3, 2) if largest > 0 else ()
    factor = next((factor for factor in factors if factor * largest <= 0.5 + 1e-6), 1)
    return (0.5 + factor * change).clamp(0, 1), factor


def _series(log_history: Sequence[dict[str, Any]], key: str, skip_zero: bool = False) -> list[tuple[float, float]]:
    """The (epoch, value) pairs of one quantity, in order of time; the last of equal epochs counts."""
    found = {
        float(entry["epoch"]): float(entry[key])
        for entry in log_history
        if entry.get("epoch") is not None and entry.get(key) is not None
    }
    return [(epoch, value) for epoch, value in sorted(found.items()) if value or not skip_zero]


def _plot(axis: Axes, log_history: Sequence[dict[str, Any]], quantities: Sequence[tuple[str, str, str, str]]) -> None:
    for key, label, colour, style in quantities:
        points = _series(log_history, key)
        if not points:
            continue
        epochs, values = zip(*points, strict=True)
        (line,) = axis.plot(epochs, values, style, color=colour, label=label, markersize=4, linewidth=1.5)
        if len(points) == 1 and line.get_marker() == "None":
            line.set_marker("o")
        elif len(points) > 60:
            # One at every step of a long run would hide the line.
            line.set_marker("")
