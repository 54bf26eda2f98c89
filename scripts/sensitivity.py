"""Does AutoLoRa with its defaults match methods that were tuned? The quickstart's task, each over a grid of settings.

Trains every point of `GRIDS` (`sensitivity_page.py`): learning rates, and the loss weights where a method has them,
with AutoLoRa over the same learning rates; three seeds each. Points that the benchmark of methods has measured are
taken from there. Writes docs/sensitivity.json after every run, so that it can be stopped and started again,
docs/sensitivity.png, and the section of docs/results.md.

    python scripts/sensitivity.py                       # one process for each core
    python scripts/sensitivity.py --render              # section and figure of what is there
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from benchmark_page import load_results, write_page
from benchmark_run import run_all
from sensitivity_page import FIGURE, GRIDS, SAME, SENSITIVITY, draw

from autolora_hf.files import read_json, write_json


SEEDS = (0, 1, 2)


def measured_already(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the benchmark of methods that are points of the grids, and are not among `rows` yet."""
    there = {(row["system"], row["seed"]) for row in rows}
    points = {system: point for point, system in SAME.items()}
    found = [
        {**row, "system": points[row["system"]]}
        for row in load_results()["rows"]
        if row["task"] == "digits" and row["system"] in points and "verdicts" in row
    ]
    return [row for row in found if (row["system"], row["seed"]) not in there]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="METHOD", choices=GRIDS, default=list(GRIDS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--render", action="store_true", help="only write section and figure of what is there")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = read_json(SENSITIVITY)["rows"] if SENSITIVITY.is_file() else []
    rows += measured_already(rows)
    failed: list[str] = []
    if not args.render:
        there = {(row["system"], row["seed"]) for row in rows}
        # Seed by seed, and within a seed all methods, so that a run that is stopped early has something of each.
        todo = [
            ("digits", point.system, seed, None, point.rate)
            for seed in args.seeds
            for method in args.only
            for point in GRIDS[method]
            if (point.system.name, seed) not in there
        ]
        names = [point.system.name for grid in GRIDS.values() for point in grid]

        def keep(row: dict[str, Any]) -> None:
            rows.append(row)
            rows.sort(key=lambda one: (names.index(one["system"]), one["seed"]))
            write_json({"rows": rows}, SENSITIVITY)

        failed = run_all(todo, keep, args.workers)
    if rows:
        write_json({"rows": rows}, SENSITIVITY)
    draw(rows, FIGURE)
    write_page(load_results())
    if failed:
        raise SystemExit("Failed:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
