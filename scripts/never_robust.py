"""What becomes of a backbone that was never robust: the quickstart's task from its natural twin, in several ways.

The twin is trained on the same images as the shipped backbone (Fashion-MNIST, see `benchmark_data.py` for where it
comes from), without an attack. Every way is run with every seed; rows that are in `docs/never_robust.json` already are
not run again. The table goes into `docs/guides/never-robust-backbones.md`.

    python scripts/never_robust.py
"""

from __future__ import annotations

import argparse
import datetime
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from benchmark_data import clothes_folder
from benchmark_run import AUTOATTACK
from benchmark_tasks import DIGIT_RESNET, TASKS, device_in_words
from robust_start import natural_twin
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from autolora_hf import PGD, ThreatModel, evaluate_robustness
from autolora_hf.files import read_json, write_atomically, write_json


FILE = Path(__file__).parents[1] / "docs" / "never_robust.json"
PAGE = FILE.parent / "guides" / "never-robust-backbones.md"
# Of the page: what is between them is written by this script.
BEGIN, END = "<!-- table: never_robust.json -->\n", "<!-- end of table -->\n"
TASK = TASKS["digits"]
TWIN_STEPS = 468


@dataclass(frozen=True)
class Way:
    """One way to train: a row of the table.

    Args:
        name (`str`): What the table calls it.
        objective (`str`): Of the training.
        frozen (`bool`): With the statistics and affine parameters of BatchNorm frozen.
        share (`float`): Of the radius, in training; the attacks on the result have all of it.
        longer (`int`): How many times as many epochs.
        arguments (`dict`): Further training arguments.
    """

    name: str
    objective: str
    frozen: bool = False
    share: float = 1.0
    longer: int = 1
    arguments: dict[str, Any] = field(default_factory=dict)


HINGES = {"eps_schedule": "two-hinge"}
WAYS = (
    Way("AutoLoRa", "autolora"),
    Way("AutoLoRa, two hinges", "autolora", arguments=HINGES),
    Way("PGD-AT", "pgd-at"),
    Way("PGD-AT, two hinges", "pgd-at", arguments=HINGES),
    Way("PGD-AT, frozen norms", "pgd-at", frozen=True),
    Way("PGD-AT at half the radius", "pgd-at", share=0.5),
    Way("PGD-AT, four times as long", "pgd-at", longer=4),
)


def measure(way: Way, seed: int, twin: dict[str, Tensor]) -> dict[str, Any]:
    """Trains and attacks once: a row of the file."""

    def backbone() -> nn.Module:
        # Of the same shape and normalisation as the shipped one.
        network = replace(DIGIT_RESNET, data="clothes").network()
        network.load_state_dict(twin)
        return freeze_batch_norm_2d(network) if way.frozen else network

    task = replace(TASK, backbone=backbone, eps=TASK.eps * way.share, epochs=TASK.epochs * way.longer)
    test = TensorDataset(*TASK.test())
    row: dict[str, Any] = {"way": way.name, "seed": seed, "date": str(datetime.date.today())}
    with tempfile.TemporaryDirectory() as folder:
        trainer = task.trainer(way.objective, seed, folder, **way.arguments)
        trainer.train()
    whole, half = (ThreatModel("linf", eps) for eps in (TASK.eps, TASK.eps / 2))
    quiet = {"progress": False, "diagnostics": False}
    for name, threat_model in {"pgd20": whole, "pgd20_at_half": half}.items():
        attack = PGD(threat_model, steps=20)
        report = evaluate_robustness(trainer.model, test, threat_model, attack, **quiet)
        row |= {"natural": report.natural_accuracy, name: report.robust_accuracy}
    sample = {"max_samples": TASK.attacked, "seed": 0}
    report = evaluate_robustness(trainer.model, test, whole, AUTOATTACK, **sample, **quiet)
    row["autoattack"] = [report.robust.correct, report.robust.total]
    row["warnings"] = [warning["kind"] for warning in trainer.plan.get("warnings", [])]
    return {**row, "device": device_in_words()}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line a way, mean over the seeds [lowest, highest], per cent; and when it was measured."""
    lines = ["| from the natural twin | seeds | natural | PGD-20 | AutoAttack | PGD-20 at half the radius |"]
    lines.append("|---|---:|---|---|---|---|")
    for way in WAYS:
        mine = [row for row in rows if row["way"] == way.name]
        if not mine:
            continue
        columns = [[100 * row[key] for row in mine] for key in ("natural", "pgd20")]
        columns.append([100 * row["autoattack"][0] / row["autoattack"][1] for row in mine])
        columns.append([100 * row["pgd20_at_half"] for row in mine])
        cells = [f"{sum(found) / len(found):.1f} [{min(found):.1f}, {max(found):.1f}]" for found in columns]
        lines.append(f"| {way.name} | {len(mine)} | {' | '.join(cells)} |")
    dates, devices = (sorted({row[key] for row in rows}) for key in ("date", "device"))
    return "\n".join([*lines, "", f"{', '.join(dates)}; {'; '.join(devices)}.", ""])


def with_table(page: str, rows: Sequence[dict[str, Any]]) -> str:
    """The page with the table of `rows` in its place."""
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n{table(rows)}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = read_json(FILE)["rows"] if FILE.is_file() else []
    done = {(row["way"], row["seed"]) for row in rows}
    jobs = [(way, seed) for seed in args.seeds for way in WAYS if (way.name, seed) not in done]
    if jobs:
        torch.manual_seed(0)
        twin = natural_twin(clothes_folder(), TWIN_STEPS).state_dict()
    for way, seed in jobs:
        rows.append(measure(way, seed, twin))
        write_json({"rows": rows}, FILE)
        print(f"{way.name}, seed {seed}: {rows[-1]}", flush=True)
    write_atomically(PAGE, with_table(PAGE.read_text(), rows).encode())


if __name__ == "__main__":
    main()
