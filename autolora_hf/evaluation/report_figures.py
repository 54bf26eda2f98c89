"""Figures of a robustness report: curve, classes, confusions, calibration and corruptions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..config import ThreatModel
from .accuracy import Accuracy
from .breakdown import ClassResult, class_name
from .calibration import Calibration
from .corruptions import CorruptionSummary
from .curve import RobustnessCurve
from .drawing import BLUE, GREY, RED, new_figure, plain_name


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# More classes than this have no room for a line or a name each.
MOST_NAMED_CLASSES = 30
_WIDTH = 5.2


def robustness_curve_figure(
    curve: RobustnessCurve, threat_model: ThreatModel | None = None, robust: Accuracy | None = None
) -> Figure:
    """Draws robust accuracy against the radius, with a band of the 95 % intervals.

    Args:
        curve (`RobustnessCurve`): What to draw.
        threat_model (`ThreatModel`, *optional*): Marks its radius.
        robust (`Accuracy`, *optional*): What the attacks of the report found at that radius.
    """
    # Radii of 8-bit images are known by their numerator.
    in_levels = threat_model is not None and threat_model.norm == "linf" and str(threat_model).endswith("/255")
    scale = 255 if in_levels else 1
    radii = [scale * point.eps for point in curve.points]
    accuracies = [point.accuracy for point in curve.points]
    figure = new_figure(_WIDTH, 3.4)
    axis = figure.subplots()
    axis.fill_between(radii, [one.low for one in accuracies], [one.high for one in accuracies], color=BLUE, alpha=0.18)
    axis.plot(radii, [one.value for one in accuracies], "o-", color=BLUE, markersize=4, linewidth=1.5)
    axis.lines[-1].set_label(f"under {plain_name(curve.attack, 'the attack')}")
    if threat_model is not None:
        radius = scale * threat_model.eps
        axis.axvline(radius, color=GREY, linestyle=(0, (4, 3)), linewidth=1, zorder=0.5)
        if robust is not None:
            axis.errorbar(
                [radius],
                [robust.value],
                [[max(0.0, robust.value - robust.low)], [max(0.0, robust.high - robust.value)]],
                fmt="s",
                color=RED,
                markersize=5,
                capsize=3,
                label="all attacks of this report",
            )
    axis.set_xlabel("radius in steps of 1/255" if in_levels else "radius, in [0, 1] pixels")
    axis.set_xlim(left=0)
    _accuracy_axis(axis)
    axis.legend(loc="lower left", bbox_to_anchor=(-0.01, 1), ncols=2, frameon=False, fontsize=8.5)
    return figure


def class_accuracy_figure(classes: Sequence[ClassResult]) -> Figure:
    """Draws natural and robust accuracy of every class, the lowest robust one at the top.

    Up to `MOST_NAMED_CLASSES` classes have a line each, with their 95 % intervals; more are drawn as two rows of
    points in the order of robust accuracy.

    Args:
        classes (`Sequence[ClassResult]`): At least one.
    """
    ordered = sorted(classes, key=lambda row: (row.robust.value, row.natural.value))
    series = (("natural", BLUE, "o", -0.14), ("robust", RED, "s", 0.14))
    if len(ordered) > MOST_NAMED_CLASSES:
        figure = new_figure(_WIDTH, 3.4)
        axis = figure.subplots()
        for kind, colour, marker, _ in series:
            values = [getattr(row, kind).value for row in ordered]
            axis.plot(values, marker, color=colour, markersize=2.5, linestyle="none", label=kind)
        axis.set_xlabel("classes, by robust accuracy")
        _accuracy_axis(axis)
    else:
        figure = new_figure(_WIDTH, 1.1 + 0.27 * len(ordered))
        axis = figure.subplots()
        for kind, colour, marker, shift in series:
            found = [getattr(row, kind) for row in ordered]
            ends = [
                [max(0.0, one.value - one.low) for one in found],
                [max(0.0, one.high - one.value) for one in found],
            ]
            places = np.arange(len(found)) + shift
            values = [one.value for one in found]
            axis.errorbar(values, places, xerr=ends, fmt=marker, color=colour, markersize=4, label=kind, linewidth=1)
        axis.set_yticks(range(len(ordered)), [plain_name(row.name, f"class {row.label}") for row in ordered])
        axis.set_ylim(len(ordered) - 0.5, -0.5)
        axis.set_xlim(-0.02, 1.02)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axis.set_xlabel("accuracy, with 95 % intervals")
        _tidy(axis)
    axis.legend(loc="lower left", bbox_to_anchor=(-0.01, 1), ncols=2, frameon=False, fontsize=8.5)
    return figure


def confusion_figure(
    confusions: Sequence[Sequence[int]], class_names: Sequence[str] | None = None, answer: str = "taken for"
) -> Figure:
    """Draws as a heat map which share of each class (row) is taken for each class (column), with the counts.

    Args:
        confusions (`Sequence[Sequence[int]]`): Counts, K x K, with at most `MOST_NAMED_CLASSES` classes.
        class_names (`Sequence[str]`, *optional*): In class order.
        answer (`str`): Name of the horizontal axis.

    Raises:
        ValueError: If there are more classes than a reader can tell apart.
    """
    counts = np.asarray(confusions)
    classes = len(counts)
    if classes > MOST_NAMED_CLASSES:
        raise ValueError(f"A heat map of {classes} classes cannot be read; {MOST_NAMED_CLASSES} is the most.")
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    side = min(9.0, 2.2 + 0.29 * classes)
    figure = new_figure(side + 0.6, side)
    axis = figure.subplots()
    picture = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    size = 9 if classes <= 12 else 7.5
    for (row, column), count in np.ndenumerate(counts):
        if count:
            colour = "white" if shares[row, column] > 0.55 else "black"
            axis.text(column, row, f"{count}", ha="center", va="center", fontsize=size, color=colour)
    names = [plain_name(class_name(label, class_names), f"class {label}", 14) for label in range(classes)]
    upright = max(map(len, names)) <= 2
    axis.set_xticks(range(classes), names, rotation=0 if upright else 90, fontsize=size)
    axis.set_yticks(range(classes), names, fontsize=size)
    axis.set_xlabel(answer)
    axis.set_ylabel("true class")
    bar = figure.colorbar(picture, ax=axis, shrink=0.8, format=lambda value, _: f"{value:.0%}")
    bar.set_label("share of the true class", fontsize=8.5)
    bar.ax.tick_params(labelsize=8)
    return figure


def reliability_figure(calibrations: dict[str, Calibration]) -> Figure:
    """Draws a reliability diagram for each entry: accuracy against confidence, and how many images a bin has.

    Args:
        calibrations (`dict[str, Calibration]`): By title, for instance of clean images and of those under attack.
    """
    figure = new_figure(max(3.2, 2.6 * len(calibrations)), 3.5)
    panels = figure.subplots(2, len(calibrations), sharex=True, sharey="row", squeeze=False, height_ratios=[3, 1])
    for number, (title, found) in enumerate(calibrations.items()):
        upper, lower = panels[:, number]
        bins = [one for one in found.bins if one.count]
        places, widths = [(one.low + one.high) / 2 for one in bins], [one.high - one.low for one in bins]
        upper.bar(places, [one.accuracy for one in bins], widths, color=BLUE, alpha=0.75, edgecolor="white")
        upper.plot([0, 1], [0, 1], color=GREY, linestyle=(0, (4, 3)), linewidth=1, label="perfect")
        upper.plot([one.confidence for one in bins], [one.accuracy for one in bins], "o", color=RED, markersize=3)
        upper.set_title(f"{title}\nECE {found.ece:.3f}", fontsize=9.5)
        upper.set_ylim(0, 1.03)
        upper.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        lower.bar(places, [one.count for one in bins], widths, color=GREY, edgecolor="white")
        lower.set_xlim(0, 1)
        lower.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        lower.set_xlabel("confidence")
        for axis in (upper, lower):
            _tidy(axis)
            axis.tick_params(labelsize=8.5)
    panels[0, 0].set_ylabel("accuracy")
    panels[1, 0].set_ylabel("images")
    figure.align_ylabels()
    return figure


def corruptions_figure(accuracies: dict[tuple[str, int], float], summary: CorruptionSummary) -> Figure:
    """Draws accuracy under each corruption (row) and severity (column) as a heat map, with the means.

    Args:
        accuracies (`dict[tuple[str, int], float]`): By corruption and severity, in [0, 1].
        summary (`CorruptionSummary`): Of the same accuracies.
    """
    names, severities = list(summary.by_corruption), summary.severities
    values = np.array(
        [[*(accuracies[name, severity] for severity in severities), summary.by_corruption[name]] for name in names]
    )
    figure = new_figure(_WIDTH, 1.3 + 0.27 * len(names))
    axis = figure.subplots()
    picture = axis.imshow(values, cmap="YlGnBu", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        weight = "bold" if column == len(severities) else "normal"
        colour = "white" if value > 0.6 else "black"
        axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=9, color=colour, weight=weight)
    axis.axvline(len(severities) - 0.5, color="white", linewidth=3)
    axis.set_xticks(range(len(severities) + 1), [*map(str, severities), "mean"])
    axis.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("severity")
    bar = figure.colorbar(picture, ax=axis, shrink=min(1.0, 0.5 + 0.03 * len(names)), format=lambda v, _: f"{v:.0%}")
    bar.set_label("accuracy", fontsize=8.5)
    bar.ax.axhline(summary.clean_accuracy, color=RED, linewidth=2)
    bar.ax.tick_params(labelsize=8)
    return figure


def _accuracy_axis(axis: Axes) -> None:
    axis.set_ylim(0, 1.02)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.set_ylabel("accuracy")
    _tidy(axis)


def _tidy(axis: Axes) -> None:
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
