"""Speed of attack, training step and AutoAttack: this package, the released step and other libraries, in one run.

    python scripts/benchmark_speed.py --output docs/speed.json
    python scripts/benchmark_speed.py --sections step --cases vit-tiny-64 --rounds 5
    python scripts/benchmark_speed.py --render

Rows of a section take turns in every round, so that a change of the machine's speed meets all of them; a ratio
compares two times of one round. On a CPU one thread works and its CPU time counts, on a GPU wall time between two
synchronisations. Every row runs once before the first round, which also compiles.

- attack: PGD-10 on one network with one start, the frozen copy brought up to date each time; other libraries
  (`benchmark_peers.py`) draw their own start. The float32 network judges the images of all rows.
- step: one optimizer step. The rows of this package run `AutoLoraTrainer`: what `Trainer` does between two steps is
  repeated here call by call (fetching the batch, callbacks with the check of every number, gradient norm, optimizer,
  scheduler), since `train()` cannot take turns with others. The other rows are handed their batch.
- scaling: the float32 step of this package, one setting at a time.
- memory: peak of two steps above what is there before the first, each row in a process of its own. The attack has two
  steps, as its memory does not grow with them.
- loading: image files to a batch of pixels, in one process.
- autoattack: `evaluate_robustness` against the plain library on the live model, wall and CPU time.

A run replaces the entries that it measures and leaves the others in the file; each has its date and versions.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import benchmark_peers as peers
import torch
import transformers
from benchmark_cases import CASES, SECTIONS, SMOKE, Bench, Case, cpu_name
from benchmark_sections import MEASURES, memory_of
from benchmark_table import render

from autolora_hf.files import read_json, write_json


def environment(device: torch.device) -> dict[str, Any]:
    names = ("autolora-hf", "torch", "timm", "transformers", "peft", "pyautoattack")
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "kind": device.type,
        "threads": torch.get_num_threads(),
        "versions": {**{name: importlib.metadata.version(name) for name in names}, **peers.versions()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--cases", nargs="+", choices=[*CASES, "smoke"], help="default: all that the device can run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("docs/speed.json"), help="The page lies next to it.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="A tiny network instead of the real ones, in a minute.")
    parser.add_argument("--render", action="store_true", help="Only write the page anew.")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    # Few validation images, a backbone that is not robust: true, and no matter here.
    for name in ("autolora_hf", "auto-attack", "pyautoattack"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        # What an earlier run compiled would make the first call look cheap.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder) / "compiled")
        bench = Bench(device, args.rounds, Path(folder), args.smoke)
        if args.memory_of:
            name, case = json.loads(args.memory_of)
            print(json.dumps(memory_of(name, Case(**case), bench)))
            return
        if not args.render:
            measure(args, bench)
    render(read_json(args.output), args.output.with_suffix(".md"))


def measure(args: argparse.Namespace, bench: Bench) -> None:
    cases = SMOKE if args.smoke else CASES
    for section, (name, case) in itertools.product(args.sections, cases.items()):
        if section not in case.sections or (args.cases and name not in args.cases):
            continue
        if case.gpu and bench.device.type != "cuda":
            continue
        print(f"{section}, {name}", flush=True)
        entry = MEASURES[section](case, bench)
        entry = {"section": section, "case": name, "images": case.batch, **environment(bench.device), **entry}
        # Read again each time: another run may have added its own.
        content = read_json(args.output) if args.output.is_file() else {"entries": {}}
        content["entries"][f"{section}/{name}/{bench.device.type}"] = entry
        write_json(content, args.output)


if __name__ == "__main__":
    main()
