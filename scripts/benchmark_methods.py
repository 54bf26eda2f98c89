"""Every method of the package, with its defaults, on real data that packages carry: accuracy, time, memory and sizes.

A task is a backbone that is fine-tuned on few images (`benchmark_tasks.py`), a system a method
(`benchmark_systems.py`). All systems of a task share data, epochs, batch size, learning rate at the start (0.01,
adapters 0.005), attack, and the choice of the weights by robust validation accuracy; each has its own published loss
weights and shape of the learning rate, and nothing was tuned, for any of them. Measured are natural accuracy and
PGD-20 on all test images, and AutoAttack (standard; images that PGD-10 breaks are not attacked again) on some of them,
the same for all. The task `digits` has all systems, the others have the objectives in training of the whole network,
AutoLoRa's adapter and its baseline.

Writes docs/results.json after every run, so that it can be stopped and started again, and docs/results.md. Images and
weights come from packages, see `benchmark_data.py`.

    python scripts/benchmark_methods.py                            # one process for each core
    python scripts/benchmark_methods.py --task photos --only autolora trades
    python scripts/benchmark_methods.py --task clothing --cards    # an adapter in model_cards/
    python scripts/benchmark_methods.py --render                   # the page of what is there
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from benchmark_cards import write_card
from benchmark_data import MissingDataError
from benchmark_page import RESULTS, load_results, write_page
from benchmark_run import run_all
from benchmark_systems import ELSEWHERE, SYSTEMS
from benchmark_tasks import TASKS, robust_backbone

from autolora_hf.files import write_json


SEEDS = (0, 1, 2)


def wanted(task: str, only: list[str] | None) -> list[str]:
    """Names of the systems of a task that contain one of the words; a word that is a whole name is that one alone."""
    names = [*ELSEWHERE, *(name for name in SYSTEMS if name not in ELSEWHERE and task == "digits")]
    if not only:
        return names
    return [
        name
        for name in names
        if any(word == name if word in SYSTEMS else word.lower() in name.lower() for word in only)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="digits")
    parser.add_argument("--only", nargs="+", metavar="SYSTEM", help="systems whose names contain one of these words")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--attacked", type=int, help="test images for AutoAttack, if not as many as the task has")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--again", action="store_true", help="measure what is there once more")
    parser.add_argument("--render", action="store_true", help="only write the page of what is there")
    parser.add_argument("--cards", action="store_true", help="only train AutoLoRa's adapter and write its model card")
    args = parser.parse_args()
    content = load_results()
    failed: list[str] = []
    try:
        if args.cards:
            write_card(args.task)
        elif not args.render:
            failed = fill(content, args)
    except MissingDataError as error:
        raise SystemExit(str(error)) from error
    write_page(content)
    if failed:
        raise SystemExit("Failed:\n" + "\n".join(failed))


def fill(content: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """Measures what is missing, into `content` and the file; returns what failed."""
    task, rows = TASKS[args.task], content["rows"]
    # Fails here, once, if images or weights are missing.
    task.train(0), task.test()
    if task.recipe is not None:
        robust_backbone(task.recipe)
        content["backbones"][args.task] = task.recipe.provenance()
    # Older rows have no verdicts, without which methods cannot be compared image by image.
    there = {
        (row["system"], row["seed"])
        for row in rows
        if row["task"] == args.task and not row.keys().isdisjoint(("verdicts", "refused", "stopped"))
    }
    # Seed by seed, so that a run that is stopped early has something of every system.
    todo = [
        (args.task, SYSTEMS[name], seed, args.attacked)
        for seed in args.seeds
        for name in wanted(args.task, args.only)
        if args.again or (name, seed) not in there
    ]

    def keep(row: dict[str, Any]) -> None:
        key = ("task", "system", "seed")
        rows[:] = [other for other in rows if any(other[name] != row[name] for name in key)] + [row]
        tasks, systems = list(TASKS), list(SYSTEMS)
        rows.sort(key=lambda one: (tasks.index(one["task"]), systems.index(one["system"]), one["seed"]))
        write_json(content, RESULTS)

    return run_all(todo, keep, args.workers)


if __name__ == "__main__":
    main()
