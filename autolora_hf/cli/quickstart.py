"""`autolora quickstart`."""

from __future__ import annotations

import argparse
import time
from dataclasses import fields
from pathlib import Path

from ..config import radius_argument
from ..hub.model_card import CARD
from ..quickstart import CURVES, EXAMPLES, REPORT, QuickstartSettings, run_quickstart
from .display import show_progress, summary_table
from .parser import CommandParser
from .result import CommandResult, report_values


def build_parser() -> CommandParser:
    defaults = QuickstartSettings()
    parser = CommandParser(
        prog="autolora quickstart",
        description=(
            "Fine-tunes the shipped backbone robustly on MNIST digits, compares it with natural fine-tuning under "
            "AutoAttack, and saves the model with its card and pictures. Needs no network and no GPU."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output-dir", default="autolora-quickstart", help="folder for the model, card and pictures")
    parser.add_argument("--mode", choices=["adapter", "full"], default=defaults.mode, help="what trains and is saved")
    parser.add_argument("--epochs", type=int, default=defaults.epochs, help="epochs of both trainings")
    parser.add_argument("--train-images", type=int, default=defaults.train_images, help="training digits, up to 4000")
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size, help="batch size of both trainings")
    parser.add_argument("--attack-steps", type=int, default=defaults.attack_steps, help="PGD steps in training")
    parser.add_argument("--test-images", type=int, default=defaults.test_images, help="test digits, up to 1000")
    parser.add_argument("--eps", type=radius_argument, default=defaults.eps, help="Linf radius in [0, 1] pixels")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="seed of everything")
    return parser


def run(argv: list[str]) -> CommandResult:
    started = time.time()
    options = vars(build_parser().parse_args(argv))
    folder = Path(options.pop("output_dir"))
    settings = QuickstartSettings(**{field.name: options[field.name] for field in fields(QuickstartSettings)})

    show_progress()
    result = run_quickstart(folder, settings)
    own = next(iter(result["reports"].values()))
    print(f"\n{own}\n")
    print(summary_table(result["reports"]))
    parts = ", ".join(f"{name} {spent:.0f} s" for name, spent in result["seconds"].items())
    print(f"\nTook {time.time() - started:.0f} s: {parts}.")
    print(
        f"""
Saved in {folder}/: the model, its card (README.md), {EXAMPLES}, {CURVES},
the reports, and {REPORT} to open in a browser.

What to do next
  use it      python -c "from autolora_hf import load_autolora_model as load; print(load('{folder}').threat_model)"
  check it    autolora verify {folder}
  your data   autolora train --model resnet50 --train-data path/to/images-by-class --output-dir my-robust-model"""
    )
    reports = [{"model": title, **report_values(report)} for title, report in result["reports"].items()]
    files = {"model": folder, "card": folder / CARD, "examples": folder / EXAMPLES}
    files |= {"training_curves": folder / CURVES, "html": folder / REPORT}
    return CommandResult(
        {
            "reports": reports,
            "seconds": result["seconds"],
            "files": {name: str(path) for name, path in files.items()},
        }
    )
