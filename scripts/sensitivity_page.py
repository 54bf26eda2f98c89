"""The grids of the study of sensitivity, and what their results say: a section of docs/results.md, and a figure."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from benchmark_run import packed, unpacked
from benchmark_systems import System, adapter
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from results_text import FEWEST_SEEDS, points, probability, wrap

from autolora_hf.evaluation.comparison import LEVEL, Difference, crossed_difference


DOCS = Path(__file__).parents[1] / "docs"
SENSITIVITY, FIGURE = DOCS / "sensitivity.json", DOCS / "sensitivity.png"
Row = dict[str, Any]
ATTACKS = {"autoattack": "AutoAttack", "pgd20": "PGD-20"}


class Point(NamedTuple):
    """One setting of a method: a system of the benchmark that starts at a learning rate."""

    system: System
    rate: float


RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
# From the lowest rate to the highest; they differ in lightness, too.
SHADES = ("#FFFFFF", "#BFD7EA", "#6FA8D0", "#2F6C9E", "#0B2545")


def _grid(name: str, objective: str, options: list[dict[str, float]], **config: Any) -> list[Point]:
    """Every learning rate with all options; those of adapters are half as high, as their default is."""
    rates = [rate / 2 for rate in RATES] if config else RATES
    found = []
    for kwargs in options:
        for rate in rates:
            setting = ", ".join([f"rate {rate:g}", *(f"{key} {value:g}" for key, value in kwargs.items())])
            arguments = {"objective_kwargs": kwargs} if kwargs else {}
            found.append(Point(System(f"{name}, {setting}", objective, config, arguments), rate))
    return found


GRIDS: dict[str, list[Point]] = {
    "AutoLoRa": _grid("AutoLoRa", "autolora", [{}]),
    "PGD-AT": _grid("PGD-AT", "pgd-at", [{}]),
    "TRADES": _grid("TRADES", "trades", [{"beta": beta} for beta in (1.0, 3.0, 6.0, 12.0)]),
    "TWINS-TRADES": _grid("TWINS-TRADES", "twins-trades", [{"weight": weight} for weight in (0.3, 1.0)]),
    "LoRA-AT": _grid("LoRA-AT", "pgd-at", [{}], **adapter("lora")),
}
DEFAULT = "AutoLoRa, rate 0.01"
# Points that are systems of the benchmark as they stand, so that they need no second training.
SAME = {
    DEFAULT: "AutoLoRa",
    "PGD-AT, rate 0.01": "PGD-AT",
    "TRADES, rate 0.01, beta 6": "TRADES (vanilla RFT)",
    "TWINS-TRADES, rate 0.01, weight 0.3": "TWINS-TRADES",
    "LoRA-AT, rate 0.005": "LoRA-AT",
}


class Setting:
    """What was measured of one point, on the seeds that are compared."""

    def __init__(self, name: str, rate: float, rows: list[Row]) -> None:
        self.name, self.rate, self.rows = name, rate, rows
        # A training that diverged leaves no model: nobody picks it, and no image withstands.
        self.diverged = sum("stopped" in row for row in rows)
        self.validation = -1.0 if self.diverged else statistics.fmean(row["validation"] for row in rows)

    def verdicts(self, attack: str) -> list[list[bool]]:
        """By seed and image."""
        return [unpacked(row["verdicts"][attack]) for row in self.rows]

    def accuracy(self, attack: str) -> float:
        return float(np.mean(self.verdicts(attack)))

    @property
    def short(self) -> str:
        return self.name.partition(", ")[2]


def settings(rows: list[Row]) -> dict[str, list[Setting]]:
    """By method, its points with every seed that AutoLoRa's default was measured with.

    Empty as long as one of them is missing: what part of a grid is there says nothing of its best and its median.
    """
    by_name: dict[str, dict[int, Row]] = {}
    for row in rows:
        by_name.setdefault(row["system"], {})[row["seed"]] = row
    seeds = sorted(by_name.get(DEFAULT, {}))
    names = [point.system.name for grid in GRIDS.values() for point in grid]
    if not seeds or any(seed not in by_name.get(name, {}) for name in names for seed in seeds):
        return {}
    images = {name: len(unpacked(found)) for name, found in by_name[DEFAULT][seeds[0]]["verdicts"].items()}
    nothing = {"verdicts": {name: packed([False] * number) for name, number in images.items()}}
    rows_of = {name: [nothing | by_name[name][seed] for seed in seeds] for name in names}
    return {
        method: [Setting(point.system.name, point.rate, rows_of[point.system.name]) for point in grid]
        for method, grid in GRIDS.items()
    }


class Summary(NamedTuple):
    """A method's grid under one attack: what validation picks, and the best, median and worst test accuracy."""

    picked: Setting
    best: Setting
    median: float
    worst: float


def summarise(grid: list[Setting], attack: str) -> Summary:
    accuracies = [setting.accuracy(attack) for setting in grid]
    best = grid[accuracies.index(max(accuracies))]
    picked = max(grid, key=lambda setting: setting.validation)
    return Summary(picked, best, statistics.median(accuracies), min(accuracies))


def default_of(found: dict[str, list[Setting]]) -> Setting:
    return next(setting for setting in found["AutoLoRa"] if setting.name == DEFAULT)


def against(default: Setting, other: Setting, attack: str) -> Difference | None:
    """AutoLoRa's defaults less another setting; `None` with too few seeds, or for the same one."""
    if len(default.rows) < FEWEST_SEEDS or other is default:
        return None
    return crossed_difference(default.verdicts(attack), other.verdicts(attack))


# ---- the section ----


def sensitivity_section(rows: list[Row]) -> Iterator[str]:
    found = settings(rows)
    if not found:
        return
    default = default_of(found)
    seeds = sorted(row["seed"] for row in default.rows)
    dates = sorted({row["date"] for row in rows})
    devices = "; ".join(sorted({row["device"] for row in rows}))
    yield "## Sensitivity: does anything have to be tuned?"
    yield wrap(
        f"`python scripts/sensitivity.py`, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, {devices}; seeds "
        f"{', '.join(map(str, seeds))}; {sum(map(len, found.values()))} points. "
        f"The task is `digits`, with AutoAttack on {len(default.verdicts('autoattack')[0])} of its test images and "
        f"PGD-20 on all. Every learning rate at the start ({', '.join(f'{rate:g}' for rate in RATES)}; half of that "
        "for adapters) is combined with every loss weight; everything else, the shape of the learning rate included, "
        "is each method's own. AutoLoRa's paper promises that it needs no such search and shows no grid. MART, AR-AT "
        "and the other systems of the benchmark have no grid here."
    )
    diverged = {setting.name: setting.diverged for grid in found.values() for setting in grid if setting.diverged}
    if diverged:
        names = ", ".join(f"{name} ({number} of {len(seeds)})" for name, number in diverged.items())
        yield wrap(
            f"{sum(diverged.values())} trainings diverged and were stopped: {names}. They leave no model and count as "
            "0, and what diverged with any seed cannot be picked."
        )
    yield wrap(
        "*Picked* is what somebody gets who searches the grid: the point with the highest robust validation accuracy "
        "(mean over the seeds; 50 images each), measured on test images. *Best* is the highest accuracy on the test "
        "images themselves, which nobody can pick beforehand and which chance makes too high. Differences are "
        "AutoLoRa's defaults less the other, tested as above, without an adjustment for the number of tests."
    )
    for attack, name in ATTACKS.items():
        yield f"### {name}"
        yield "\n".join(_table(found, default, attack))
    yield "### What the learning rate does"
    yield "\n".join(_table_of_rates(found))
    yield wrap(_rates_in_words(found))
    yield "### What this says"
    yield wrap(_conclusion(found, default))
    yield from map(wrap, _reasons(found, default))
    yield f"![Robust accuracy of every point of the grids]({FIGURE.name})"


def _table(found: dict[str, list[Setting]], default: Setting, attack: str) -> Iterator[str]:
    head = "| method | points | picked | default less picked [95 %] | p | best | default less best [95 %] | p "
    yield head + "| median | worst |"
    yield "|---|---:|---|---:|---:|---|---:|---:|---:|---:|"
    yield f"| **AutoLoRa, defaults** | 1 | {_percent(default.accuracy(attack))} | | | | | | | |"
    for method, grid in found.items():
        summary = summarise(grid, attack)
        cells = [method, str(len(grid))]
        for one in (summary.picked, summary.best):
            difference = against(default, one, attack)
            cells.append(f"{_percent(one.accuracy(attack))} ({one.short})")
            cells += ["", ""] if difference is None else [points(difference), probability(difference.p_value)]
        yield f"| {' | '.join([*cells, _percent(summary.median), _percent(summary.worst)])} |"


def by_rate(grid: list[Setting], attack: str = "pgd20") -> list[list[float]]:
    """For each learning rate, from the lowest on, the accuracies with every loss weight."""
    rates = sorted({setting.rate for setting in grid})
    return [[setting.accuracy(attack) for setting in grid if setting.rate == rate] for rate in rates]


def _table_of_rates(found: dict[str, list[Setting]]) -> Iterator[str]:
    yield f"| PGD-20, starting at | {' | '.join(f'{rate:g}' for rate in RATES)} |"
    yield f"|---|{'---:|' * len(RATES)}"
    for method, grid in found.items():
        cells = [
            _percent(min(values)) + (f" to {_percent(max(values))}" if len(values) > 1 else "")
            for values in by_rate(grid)
        ]
        yield f"| {method} | {' | '.join(cells)} |"


def _rates_in_words(found: dict[str, list[Setting]]) -> str:
    """How much the learning rate decides, and how much the loss weight."""
    weighted = {method: by_rate(grid) for method, grid in found.items() if len(by_rate(grid)[0]) > 1}
    weights = ", ".join(
        f"at most {100 * max(max(values) - min(values) for values in rates):.0f} points for {method}"
        for method, rates in weighted.items()
    )
    spreads = ", ".join(
        f"{100 * (max(map(max, rates)) - min(map(max, rates))):.0f} for {method}"
        for method, rates in ((method, by_rate(grid)) for method, grid in found.items())
    )
    return (
        "LoRA-AT's rates are half of those in the head of the table; where a method has loss weights, the lowest and "
        f"the highest of them. Between the worst and the best rate, with the best weight each, there are {spreads} "
        f"points; between the worst and the best weight at one rate, {weights}."
    )


def _reasons(found: dict[str, list[Setting]], default: Setting) -> Iterator[str]:
    """Why the defaults stand where they do: from the grid of AutoLoRa itself, with the rate as the only difference."""
    own = max(found["AutoLoRa"], key=lambda setting: setting.validation)
    others = [setting for method, grid in found.items() if method != "AutoLoRa" for setting in grid]
    same = [setting for setting in others if setting.rate == default.rate]
    best = max(same, key=lambda setting: setting.accuracy("pgd20"))
    top = max(others, key=lambda setting: setting.accuracy("pgd20"))
    yield (
        f"AutoLoRa starts at {default.rate:g}, halves its rate when validation stalls, and never raises it. "
        + (
            f"Here {own.rate:g} would have been the better start: validation picks it, with {_both(own)} in the place "
            f"of {_both(default)} (PGD-20 / AutoAttack). "
            if own is not default
            else "Here that is the start that validation picks. "
        )
        + f"Among baselines that start at {default.rate:g} too, the highest is {best.name}, {_both(best)}; of all of "
        f"them, {top.name}, {_both(top)}."
    )
    yield (
        "So what AutoLoRa takes off its user's hands is the loss weights and the moments at which the rate falls, not "
        "the rate that a training starts with. The paper's trainings have 60 epochs in batches of 128, or 23,000 "
        "steps on CIFAR-10; with the 240 steps of this task a rate that is too low is not made up for. Whoever can "
        "afford a second training of this length should spend it on a higher starting rate, and keep what has the "
        "higher robust validation accuracy."
        if own.rate > default.rate
        else "What AutoLoRa takes off its user's hands is the loss weights and the moments at which the rate falls."
    )


def _both(setting: Setting) -> str:
    return f"{_percent(setting.accuracy('pgd20'))} / {_percent(setting.accuracy('autoattack'))}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _conclusion(found: dict[str, list[Setting]], default: Setting) -> str:
    """Whether the defaults match the best of the grids, in words."""
    sentences = []
    for attack, name in ATTACKS.items():
        baselines = {method: summarise(grid, attack) for method, grid in found.items() if method != "AutoLoRa"}
        for what in ("best", "picked"):
            behind, ahead, open_ = [], [], []
            for method, summary in baselines.items():
                difference = against(default, getattr(summary, what), attack)
                if difference is None:
                    continue
                shown = difference.p_value <= LEVEL
                (ahead if shown and difference.value > 0 else behind if shown else open_).append(
                    f"{method} ({points(difference)})"
                )
            text = [f"below the {what} point of {', '.join(behind)}"] if behind else []
            text += [f"above the {what} point of {', '.join(ahead)}"] if ahead else []
            text += [f"not shown to differ from the {what} point of {', '.join(open_)}"] if open_ else []
            if text:
                sentences.append(f"Under {name} AutoLoRa's defaults are {'; '.join(text)}.")
        top = max(baselines.values(), key=lambda summary: summary.best.accuracy(attack)).best
        own = default.accuracy(attack)
        sentences.append(
            f"The best of all their points is {top.name} ({_percent(top.accuracy(attack))}), AutoLoRa's "
            f"defaults have {_percent(own)}"
            + (": they are at least as high." if own >= top.accuracy(attack) else ": they do not reach it.")
        )
    return " ".join(sentences)


def draw(rows: list[Row], path: Path) -> None:
    """A strip of points a method, and AutoLoRa's defaults as a line across, with its interval."""
    found = settings(rows)
    if not found:
        return
    default = default_of(found)
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    for axis, (attack, name) in zip(figure.subplots(1, 2, sharey=True), ATTACKS.items(), strict=True):
        own = default.verdicts(attack)
        # With trainings and images as samples: of the difference from a method that has nothing right.
        interval = crossed_difference(own, np.zeros_like(own))
        axis.axhspan(100 * interval.low, 100 * interval.high, color="#0072B2", alpha=0.12, linewidth=0)
        line = axis.axhline(100 * interval.value, color="#0072B2", label="AutoLoRa, defaults")
        band = Patch(color="#0072B2", alpha=0.12, label="its 95 % interval (other seeds and images)")
        for place, grid in enumerate(found.values()):
            # From the lowest learning rate to the highest, so that the picture shows what it decides.
            grid = sorted(grid, key=lambda setting: setting.rate)
            offsets = np.linspace(-0.34, 0.34, len(grid))
            values = [100 * setting.accuracy(attack) for setting in grid]
            rates = sorted({setting.rate for setting in grid})
            colors = [SHADES[rates.index(setting.rate)] for setting in grid]
            axis.scatter(place + offsets, values, s=26, c=colors, edgecolors="#333333", linewidths=0.4, zorder=3)
            picked = grid.index(summarise(grid, attack).picked)
            star = axis.scatter(
                place + offsets[picked],
                values[picked],
                s=170,
                marker="*",
                facecolors="none",
                edgecolors="#C43C00",
                linewidths=1.4,
                label="picked by validation",
                zorder=4,
            )
            middle, ends = statistics.median(values), (place - 0.38, place + 0.38)
            median = axis.hlines(middle, *ends, color="#8A8A8A", linewidth=1, label="median of the grid")
        axis.set_xticks(range(len(found)), list(found), rotation=15)
        axis.set_title(f"{name}, mean of {len(default.rows)} seeds", fontsize=10)
        axis.grid(axis="y", alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("robust test accuracy, per cent")
    spots = [
        Line2D(
            [], [], marker="o", linestyle="", color=shade, markeredgecolor="#333333", markeredgewidth=0.4, label=name
        )
        for shade, name in zip(SHADES, (f"rate {rate:g}" for rate in RATES), strict=True)
    ]
    style = {"frameon": False, "fontsize": 9}
    figure.legend(handles=[line, band, star, median], loc="outside upper center", ncols=4, **style)
    figure.legend(
        handles=spots, loc="outside lower center", ncols=len(spots), title="starting at (LoRA-AT: half)", **style
    )
    figure.savefig(path, dpi=130)
