"""The page of `benchmark_speed.py`, from its figures."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import benchmark_peers as peers
from benchmark_cases import ATTACKS, NATURAL_MODEL, PLAIN_TRAINING

from autolora_hf.files import write_atomically


INTRO = """# Speed

`python scripts/benchmark_speed.py`, which says how each kind of row is measured. "released" is a training step as it
is published and copied, written plainly for this comparison (`scripts/released_step.py`; the same images, loss and
gradients as the package, see `tests/test_benchmark_speed.py`). Ratios are of two times of one round, median
[smallest..largest]; above 1 is faster than what is compared with. Seconds are medians, of CPU time in one thread on a
CPU. "Of peak" is the work of the released version over the time, as a share of what a matrix product or a convolution
reaches in the same precision, whichever is faster. "First call" is its wall time, with compiling unless an earlier row
has compiled the same. All times are in `speed.json`.
"""


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *rows)) + "\n\n"


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f}..{max(values):.2f}]"


def ratio(row: dict[str, Any], base: dict[str, Any]) -> str:
    """How many times faster `row` is than `base`."""
    if "seconds" not in row or "seconds" not in base:
        return "-"
    return spread([theirs / own for own, theirs in zip(row["seconds"], base["seconds"], strict=True)])


def of_peak(entry: dict[str, Any], name: str) -> str:
    """Mixed precisions have no peak, and rows that are not AutoLoRa have another amount of work."""
    row = entry["rows"][name]
    dtype = "bfloat16" if name in ("bfloat16", "bfloat16, compiled") or name.startswith("all bf") else "float32"
    if name.startswith("bfloat16 attack") or units(name) != 26:
        return "-"
    rate = entry["flops"] / statistics.median(row["seconds"]) / 1e9
    peak = max(value for kind, value in entry["peaks"].items() if kind.endswith(dtype))
    return f"{100 * rate / peak:.0f} %"


def units(name: str) -> int:
    """Forward-equivalents of a step, an image: plain adversarial training has no natural pass."""
    return 23 if name in PLAIN_TRAINING or name in peers.TRAININGS else 26


def timed_table(entry: dict[str, Any]) -> str:
    rows, attack = entry["rows"], entry["section"] == "attack"
    lines = []
    for name, row in rows.items():
        if "missing" in row:
            lines.append([name, row["missing"], *["-"] * 4])
            continue
        extra = f"{row['loss']:.4f}" if attack else str(units(name))
        seconds, first = f"{statistics.median(row['seconds']):.3g}", f"{row['first_call']:.3g}"
        lines.append([name, ratio(row, rows["released"]), seconds, extra, of_peak(entry, name), first])
    column = f"adversarial loss (clean {entry['clean_loss']:.4f})" if attack else "forward-equivalents"
    text = table(["", "ratio to released", "seconds", column, "of peak", "first call"], lines)
    if attack:
        text += (
            "This package and the released attack start from the same images, within 0.001 of the clean ones; the "
            "other libraries draw one of their own from the whole ball.\n\n"
        )
    elif any(name in rows for name in peers.TRAININGS):
        text += "The steps of MAIR and ART are whole calls of their trainers, with what these do around a step.\n\n"
    theirs = [name for name in (peers.ATTACKS if attack else peers.TRAININGS) if name in rows]
    own = [name for name in rows if name in (ATTACKS if attack else PLAIN_TRAINING) and " not " not in name]
    if theirs:
        text += "The same times against the other libraries:\n\n"
        text += table(["", *theirs], [[name, *(ratio(rows[name], rows[other]) for other in theirs)] for name in own])
    measured = ", ".join(f"{name} {value:,.0f}" for name, value in entry["peaks"].items())
    return text + f"Work of the released row: {entry['flops'] / 1e9:,.0f} GFLOP. GFLOP/s at most: {measured}.\n\n"


def scaling_table(entry: dict[str, Any]) -> str:
    rows = entry["rows"]
    base = ", ".join(f"{name} {value}" for name, value in entry["base"].items())
    lines = [[name, ratio(rows["base"], row)] for name, row in rows.items()]
    return f"Time of a float32 step as a multiple of the base: {base}.\n\n" + table(["", "times the base"], lines)


def memory_table(entry: dict[str, Any]) -> str:
    rows, released = entry["rows"], entry["rows"]["released"]["peak"]
    lines = [[name, f"{row['peak']:.0f}", f"{row['peak'] / released:.2f}"] for name, row in rows.items()]
    return table(["", "peak of a step, MiB", "share of released"], lines)


def loading_table(entry: dict[str, Any]) -> str:
    lines = []
    for name, row in entry["rows"].items():
        seconds = statistics.median(row["seconds"])
        lines.append([name, f"{1000 * seconds:.0f}", f"{entry['images'] / seconds:,.0f}"])
    return table(["", f"ms for {entry['images']} images", "images a second and process"], lines)


def autoattack_table(entry: dict[str, Any]) -> str:
    rows, lines = entry["rows"], []
    for name, row in rows.items():
        base = rows["library" + (NATURAL_MODEL if NATURAL_MODEL in name else "")]
        wall = spread([theirs / own for own, theirs in zip(row["wall"], base["wall"], strict=True)])
        verdicts = f"{row['agree']} of {len(row['verdicts'])}"
        lines.append([name, ratio(row, base), wall, str(row["robust"]), verdicts])
    return table(["", "ratio to the library", "ratio of wall times", "robust", "same verdict as the library"], lines)


def epoch_table() -> str:
    """Forward-equivalents of an epoch by formula; nothing is measured."""
    lines = []
    for name, train, test in (("CIFAR-10-sized", 50_000, 10_000), ("STL-10-sized", 5_000, 8_000)):
        # An attacked image: 20 steps of a forward pass and an input gradient, and a pass that judges it.
        released = [[26 * train, passes * train, 41 * train, 41 * test] for passes in (5, 6)]
        held_out = min(0.05 * train, 2000)
        kept = train - held_out
        for row, passes in (("this package", 1), ('this package, `scalar_accuracy="running"`', 0)):
            own = [26 * kept, passes * kept, 23 * held_out, 0]
            fewer = " to ".join(f"{sum(terms) / sum(own):.2f}" for terms in released)
            lines.append([f"{name}, {row}", *_thousands(own), fewer])
        lines.insert(-2, [f"{name}, released", *_thousands(released[0]), ""])
    columns = ["", "training", "loss scalars", "validation", "test set", "sum", "times fewer"]
    return EPOCH + table(columns, lines)


def _thousands(terms: Sequence[float]) -> list[str]:
    return [f"{term / 1e3:,.1f}" for term in (*terms, sum(terms))]


EPOCH = """## An epoch

Thousands of forward-equivalents, by formula. Released low-resolution program, with N training and M test images: 26 N
for the steps, 5 to 6 N for the loss scalars (5 in the row, both in the last column), PGD-20 on the whole training set
for the learning rate, 41 N (20 steps of 2, one pass to judge), and on the test set, 41 M. This package holds out V,
5 % of N and at most 2,000 images: 26 (N - V) for the steps, N - V for the loss scalars, 23 V for PGD-10 and 3 passes
on what is held out, nothing on test data.

"""

TITLES = {
    "attack": "## The attack alone",
    "step": "## A training step",
    "scaling": "## How a step grows",
    "memory": "## Memory",
    "loading": "## Reading images",
    "autoattack": "## AutoAttack",
}
TABLES = {
    "attack": timed_table,
    "step": timed_table,
    "scaling": scaling_table,
    "memory": memory_table,
    "loading": loading_table,
    "autoattack": autoattack_table,
}


def render(content: dict[str, Any], path: Path) -> None:
    text = INTRO
    for section, title in TITLES.items():
        entries = [entry for entry in content["entries"].values() if entry["section"] == section]
        text += f"\n{title}\n\n" if entries else ""
        for entry in entries:
            versions = ", ".join(f"{name} {release}" for name, release in entry["versions"].items())
            threads = f", {entry['threads']} thread" if entry["kind"] == "cpu" else ""
            text += f"### {entry['case']}, {entry['images']} images, {entry['device']}\n\n"
            text += TABLES[section](entry) + f"{entry['date']}{threads}, {versions}.\n\n"
    write_atomically(path, (text + epoch_table()).rstrip().encode() + b"\n")
