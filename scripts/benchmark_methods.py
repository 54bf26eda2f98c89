"""Every method of the package on the quickstart's task, with its defaults: accuracy, time and sizes in one table.

The robust backbone that ships is fine-tuned on 950 digits (8 epochs, PGD-5 in training, Linf 0.1) by each system in
`GROUPS`, three seeds each. All share data, epochs, batch size, learning rate at the start (0.01, adapters 0.005),
attack, and the choice of the weights by robust validation accuracy; each has its own published loss weights and shape
of the learning rate, and nothing was tuned on this task, for any of them. Measured are natural accuracy and PGD-20 on
the 1,000 test digits, and AutoAttack (standard; images that PGD-10 breaks are not attacked again) on 40 of them, the
same for all. Writes docs/methods_benchmark.json after every run, so that it can be stopped and started again, and
docs/methods_benchmark.md.

    python scripts/benchmark_methods.py                       # everything, with one process for each core
    python scripts/benchmark_methods.py --only autolora trades
    python scripts/benchmark_methods.py --render              # the table of what is there
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import tempfile
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from autolora_hf import PGD, config_for
from autolora_hf.evaluation import Accuracy
from autolora_hf.files import read_json, write_atomically, write_json
from autolora_hf.quickstart import QuickstartSettings, load_digits, train_on_digits
from autolora_hf.saving import deployed_tensors


DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "methods_benchmark.json"
SEEDS = (0, 1, 2)
ATTACKED = 40


@dataclass(frozen=True)
class System:
    """One combination of the four concepts.

    Args:
        name (`str`): What the table calls it.
        objective (`str`): Of `OBJECTIVES`.
        config (`dict`): Fields of `AutoLoraConfig` besides those of the objective.
        arguments (`dict`): Training arguments that make the method.
    """

    name: str
    objective: str
    config: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """The options of `autolora train` that stand for it."""
        parts = [f"--objective {self.objective}"]
        for name, value in {**self.config, **self.arguments}.items():
            if isinstance(value, dict):
                value = f"'{json.dumps(value)}'"
            elif isinstance(value, list):
                value = " ".join(map(str, value))
            parts.append(f"--{name.replace('_', '-')} {value}")
        return " ".join(parts)


def adapter(branch: str, **options: Any) -> dict[str, Any]:
    return {"mode": "adapter", "branch": branch, **options}


PROBE = {"init": "adversarial-linear-probe"}
GROUPS: dict[str, tuple[System, ...]] = {
    "The whole network trains": (
        System("AutoLoRa", "autolora"),
        System("natural fine-tuning", "natural"),
        System("SLF (head alone, clean)", "slf"),
        System("ALF (head alone, PGD-AT)", "alf"),
        System("PGD-AT", "pgd-at"),
        System("TRADES (vanilla RFT)", "trades"),
        System("MART", "mart"),
        System("TWINS-AT", "twins-at"),
        System("TWINS-TRADES", "twins-trades"),
        System("AR-AT", "ar-at"),
        System("RoLI, then PGD-AT", "pgd-at", arguments=PROBE),
        System("RoLI, then AutoLoRa", "autolora", arguments=PROBE),
    ),
    "Schedules and post-processing": (
        System("PGD-AT, radius by two hinges", "pgd-at", arguments={"eps_schedule": "two-hinge"}),
        System("PGD-AT, EMA of the weights", "pgd-at", arguments={"average_weights": "ema"}),
        System("PGD-AT, SWA", "pgd-at", arguments={"average_weights": "swa"}),
        System("PGD-AT, RiFT afterwards", "pgd-at", arguments={"finish": "rift"}),
    ),
    "An adapter trains (published: branch, head, norms)": (
        System("AutoLoRa, mode adapter", "autolora", adapter("lora")),
        System("LoRA-AT", "pgd-at", adapter("lora")),
        System("RoLI, then LoRA-AT", "pgd-at", adapter("lora"), PROBE),
        System("FullLoRA-AT (LNLoRA)", "pgd-at", adapter("lnlora")),
        System("FouRA, PGD-AT", "pgd-at", adapter("foura")),
        System("EFFT, PGD-AT", "pgd-at", adapter("efft")),
        System("AdaKron, PGD-AT", "pgd-at", adapter("adakron", target_modules=r".*\.conv2")),
        System("DoRA, PGD-AT", "pgd-at", adapter("dora")),
        System("LoHa, PGD-AT", "pgd-at", adapter("loha")),
        System("LoKr, PGD-AT", "pgd-at", adapter("lokr")),
        System("HRA, PGD-AT", "pgd-at", adapter("hra")),
        System("(IA)3, PGD-AT", "pgd-at", adapter("ia3")),
    ),
    "What AutoLoRa is without one of its parts": (
        System("no stop-gradient", "autolora", {"stop_gradient": False}),
        System("no KL term", "autolora", arguments={"scalar_lambda2_max": 0.0}),
        System("fixed scalars 0.5 and 3", "autolora", arguments={"loss_scalars": [0.5, 3.0]}),
        System("detached KL target", "autolora", arguments={"objective_kwargs": {"detach_target": True}}),
        System("dual norm", "autolora", {"norm": "dual"}),
        System("scalars from 100 images", "autolora", arguments={"scalar_images": 100}),
        System("scalars from a running average", "autolora", arguments={"scalar_accuracy": "running"}),
        System("TRADES with automatic scalars", "trades", arguments={"objective_kwargs": {"automatic": True}}),
        System("TRADES with the automatic learning rate", "trades", arguments={"schedule": "plateau"}),
    ),
}
SYSTEMS = {system.name: system for systems in GROUPS.values() for system in systems}


def measure(name: str, seed: int, attacked: int) -> dict[str, Any]:
    """Trains and attacks one system; runs in a process of its own, with one thread."""
    system, settings = SYSTEMS[name], QuickstartSettings(seed=seed)
    test = load_digits()["test"]
    with tempfile.TemporaryDirectory() as folder:
        config = config_for(system.objective, **system.config)
        # One for all: TWINS' published 0.003 is too low for 240 steps, for PGD-AT as well.
        rate = 0.01 if config.mode == "full" else 0.005
        started = time.process_time()
        trainer = train_on_digits(
            system.objective,
            settings,
            Path(folder) / "run",
            quiet=True,
            config=config,
            learning_rate=rate,
            **system.arguments,
        )
        seconds = time.process_time() - started
        model = trainer.model
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        pgd = trainer.evaluate_robustness(test, PGD(trainer.args.threat_model, steps=20), progress=False)
        # The same digits for every system and seed.
        report = trainer.evaluate_robustness(
            test, ["pgd-bf16", "autoattack"], max_samples=attacked, seed=0, progress=False
        )
    return {
        "system": name,
        "seed": seed,
        "natural": pgd.natural_accuracy,
        "pgd20": pgd.robust_accuracy,
        "autoattack": [report.robust.correct, report.robust.total],
        "training_seconds": seconds,
        "trained": trained,
        "published": sum(tensor.numel() for tensor in deployed_tensors(model).values()),
        "date": str(datetime.date.today()),
        "machine": f"{platform.machine()}, torch {torch.__version__}, 1 thread",
    }


# ---- the table ----


def _spread(values: list[float]) -> str:
    mean = 100 * statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.1f}"
    return f"{mean:.1f} [{100 * min(values):.1f}, {100 * max(values):.1f}]"


def _rows(rows: list[dict[str, Any]]) -> Iterator[str]:
    own = [row for row in rows if row["system"] == "AutoLoRa"]
    unit = statistics.median(row["training_seconds"] for row in own) if own else math.nan
    for group, systems in GROUPS.items():
        yield f"\n## {group}\n"
        yield "| system | natural | PGD-20 | AutoAttack [95 % interval] | time | trained | published |"
        yield "|---|---|---|---|---|---|---|"
        for system in systems:
            found = [row for row in rows if row["system"] == system.name]
            if not found:
                yield f"| {system.name} | not measured | | | | | |"
                continue
            right, total = (sum(row["autoattack"][index] for row in found) for index in (0, 1))
            robust = Accuracy.from_counts(right, total)
            seconds = statistics.median(row["training_seconds"] for row in found)
            last = found[-1]
            yield (
                f"| {system.name} | {_spread([row['natural'] for row in found])} "
                f"| {_spread([row['pgd20'] for row in found])} "
                f"| {100 * robust.value:.1f} [{100 * robust.low:.1f}, {100 * robust.high:.1f}] "
                f"| {seconds / unit:.2f} | {last['trained']:,} | {last['published']:,} |"
            )
        yield ""
        for system in systems:
            yield f"- {system.name}: `autolora train {system.command}`"


def _ahead(rows: list[dict[str, Any]]) -> str:
    """Which systems are above AutoLoRa's defaults under AutoAttack, in words."""
    share = {name: [0, 0] for name in SYSTEMS}
    for row in rows:
        for index in (0, 1):
            share[row["system"]][index] += row["autoattack"][index]
    found = {name: right / total for name, (right, total) in share.items() if total}
    above = sorted((name for name in found if found[name] > found.get("AutoLoRa", 1)), key=lambda name: -found[name])
    if not above:
        return "No system is above AutoLoRa's defaults under AutoAttack."
    return (
        f"Under AutoAttack {len(above)} systems are above AutoLoRa's defaults here ({100 * found['AutoLoRa']:.1f}): "
        + ", ".join(f"{name} ({100 * found[name]:.1f})" for name in above)
        + "."
    )


def render(rows: list[dict[str, Any]]) -> str:
    seeds = sorted({row["seed"] for row in rows})
    dates = sorted({row["date"] for row in rows})
    attacked = rows[0]["autoattack"][1] if rows else ATTACKED
    own = [row["training_seconds"] for row in rows if row["system"] == "AutoLoRa"]
    seconds = f"AutoLoRa's ({statistics.median(own):.0f} s)" if own else "AutoLoRa's"
    paragraphs = [
        f"`python scripts/benchmark_methods.py`, {dates[0]} to {dates[-1]}, {rows[0]['machine']}; seeds "
        f"{', '.join(map(str, seeds))}. The shipped backbone, adversarially trained on Fashion-MNIST, becomes a "
        "classifier of digits: 950 training digits, 50 for validation, 8 epochs, batches of 32, PGD-5 in training, "
        "Linf 0.1. Every system has its published loss weights and shape of the learning rate, and starts at the "
        "package's 0.01 (adapters: 0.005); nothing was tuned here, for any of them. (TWINS' own 0.003 is too low for "
        "240 steps: at 0.003 neither TWINS nor PGD-AT becomes robust. Linear probes have hardly converged at 0.01.)",
        "Natural accuracy and PGD-20 are of the 1,000 test digits: mean over the seeds [lowest, highest], per cent. "
        f"AutoAttack (standard) is of the same {attacked} test digits for every system and seed; its interval is "
        "Clopper-Pearson's of the verdicts of all seeds together. They are not independent, so it is narrow "
        f'rather than wide. Time is the CPU time of the training, {seconds} being 1. "Trained" counts parameters that '
        'get a gradient, "published" the values of the deployed route that training changes.',
        "Under each table stand the options that make a system; data, eps, epochs, batch size and attack steps of the "
        "script come on top of them.",
        "**How to read it.** A difference of less than about ten points of AutoAttack, or less than the spread of the "
        "seeds, says nothing. One small convolutional network, one small task, and 50 validation images that choose "
        "the weights are no ranking of methods; they show what each costs here, and that each works.",
        _ahead(rows),
    ]
    head = "\n\n".join(["# Methods on the quickstart's task", *(textwrap.fill(text, 119) for text in paragraphs)])
    return "\n".join([head, *_rows(rows)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="SYSTEM", help="systems whose names contain one of these words")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--attacked", type=int, default=ATTACKED, help="test digits for AutoAttack")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--again", action="store_true", help="measure what is there once more")
    parser.add_argument("--render", action="store_true", help="only write the table of what is there")
    args = parser.parse_args()
    rows = read_json(RESULTS)["rows"] if RESULTS.is_file() else []
    wanted = [name for name in SYSTEMS if not args.only or any(word.lower() in name.lower() for word in args.only)]
    if not args.render:
        there = {(row["system"], row["seed"]) for row in rows}
        # Seed by seed, so that a run that is stopped early has something of every system.
        todo = [(name, seed) for seed in args.seeds for name in wanted if args.again or (name, seed) not in there]
        failed: list[str] = []
        os.environ["OMP_NUM_THREADS"] = "1"
        with ProcessPoolExecutor(args.workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            jobs = {pool.submit(measure, name, seed, args.attacked): (name, seed) for name, seed in todo}
            for number, job in enumerate(as_completed(jobs), start=1):
                name, seed = jobs[job]
                try:
                    row = job.result()
                except (ValueError, RuntimeError, FloatingPointError) as error:
                    failed.append(f"{name}, seed {seed}: {type(error).__name__}: {error}")
                    print(failed[-1], flush=True)
                    continue
                rows = [other for other in rows if (other["system"], other["seed"]) != (name, seed)] + [row]
                order = list(SYSTEMS)
                rows.sort(key=lambda entry: (order.index(entry["system"]), entry["seed"]))
                write_json({"rows": rows}, RESULTS)
                right, total = row["autoattack"]
                print(
                    f"{number}/{len(todo)} {name}, seed {seed}: natural {row['natural']:.3f}, "
                    f"PGD-20 {row['pgd20']:.3f}, AutoAttack {right}/{total}, {row['training_seconds']:.0f} s",
                    flush=True,
                )
    write_atomically(DOCS / "methods_benchmark.md", render(rows).encode())
    if not args.render and failed:
        raise SystemExit("Failed:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
