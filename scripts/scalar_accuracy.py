"""What the running accuracy changes that `scalar_accuracy="running"` takes for the loss scalars.

Trains the quickstart's task (950 digits, mode `adapter`, 8 epochs) with the exact and with the running accuracy, ten
seeds each, and attacks all 1,000 test digits with PGD-20. Writes docs/scalar_accuracy.json and
docs/scalar_accuracy.md.

    python scripts/scalar_accuracy.py
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from autolora_hf import PGD
from autolora_hf.files import read_json, write_atomically, write_json
from autolora_hf.quickstart import QuickstartSettings, load_digits, train_on_digits


EPS = QuickstartSettings.eps
DOCS = Path(__file__).parents[1] / "docs"


def run(how: str, seed: int, epochs: int, images: int) -> dict[str, Any]:
    settings = QuickstartSettings(epochs=epochs, train_images=images, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        trainer = train_on_digits("autolora", settings, Path(folder), quiet=True, scalar_accuracy=how)
        seconds = time.process_time() - started
        attack = PGD(trainer.args.threat_model, steps=20)
        report = trainer.evaluate_robustness(load_digits()["test"], attack, progress=False, diagnostics=False)
    log = trainer.state.log_history
    return {
        "how": how,
        "seed": seed,
        "accuracies": [row["train_natural_route_accuracy"] for row in log if "train_natural_route_accuracy" in row],
        "natural": report.natural_accuracy,
        "robust": report.robust_accuracy,
        "seconds": seconds,
    }


def render(report: dict[str, Any]) -> str:
    lines = [
        "# Loss scalars from a running accuracy",
        "",
        f"`python scripts/scalar_accuracy.py`, {report['date']}, torch {report['torch']}, CPU, 1 thread. The "
        f"quickstart's task, mode `adapter`, Linf {EPS}; natural accuracy and PGD-20 on 1,000 test digits, per cent. "
        "SA is the accuracy behind the loss scalars before training and after each epoch: measured on the training "
        'images with `scalar_accuracy="exact"`, the mean over the batches of the epoch with "running".',
        "",
        *(_mean(report["rows"], how) for how in ("exact", "running")),
        "",
        "| scalar_accuracy | seed | natural | PGD-20 | SA before training and after each epoch |",
        "|---|---:|---:|---:|---|",
    ]
    for row in report["rows"]:
        course = " ".join(f"{100 * accuracy:.0f}" for accuracy in row["accuracies"])
        figures = f"{100 * row['natural']:.1f} | {100 * row['robust']:.1f}"
        lines.append(f"| {row['how']} | {row['seed']} | {figures} | {course} |")
    return "\n".join(lines) + "\n"


def _mean(rows: list[dict[str, Any]], how: str) -> str:
    chosen = [row for row in rows if row["how"] == how]
    shown = []
    for name, key in (("natural", "natural"), ("PGD-20", "robust")):
        values = [100 * row[key] for row in chosen]
        shown.append(f"{name} {statistics.mean(values):.1f} [{min(values):.1f}..{max(values):.1f}]")
    return f"- {how}, {len(chosen)} seeds, mean [smallest..largest]: {', '.join(shown)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--images", type=int, default=1000, help="Training digits, of which 5 per cent are held out.")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--render", action="store_true", help="Only write the page anew, from the figures.")
    parser.add_argument("--output", type=Path, default=DOCS, help="Folder of the page and its figures.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    file = args.output / "scalar_accuracy.json"
    if not args.render:
        rows = []
        for seed in range(args.seeds):
            for how in ("exact", "running"):
                rows.append(run(how, seed, args.epochs, args.images))
                print(rows[-1], flush=True)
        write_json({"date": datetime.date.today().isoformat(), "torch": torch.__version__, "rows": rows}, file)
    write_atomically(args.output / "scalar_accuracy.md", render(read_json(file)).encode())


if __name__ == "__main__":
    main()
