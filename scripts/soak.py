"""Trains for a long time and watches memory, open files and threads of the process.

    python scripts/soak.py --minutes 30 --output docs/soak.json

Every epoch has training steps with their attack, an evaluation, a measurement of SA, a checkpoint and the deletion of
an older one; the learning rate is halved and the best weights are loaded again many times.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import timm
import torch
import transformers
from PIL import Image
from transformers import TrainerCallback

from autolora_hf import AutoLoraConfig, AutoLoraTrainer, AutoLoraTrainingArguments, get_autolora_model


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Watch(TrainerCallback):
    """Notes the state of the process after every epoch, and ends the training when the time is up."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.began, self.rows = seconds, time.monotonic(), []

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gc.collect()
        self.rows.append(
            {
                "seconds": round(time.monotonic() - self.began, 1),
                "step": state.global_step,
                "resident_mib": round(resident_mib(), 2),
                "objects": len(gc.get_objects()),
                "open_files": len(os.listdir("/proc/self/fd")),
                "threads": threading.active_count(),
            }
        )
        control.should_training_stop |= self.rows[-1]["seconds"] >= self.seconds


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """First and last values after a tenth of the time, and the slope over that time."""
    settled = [row for row in rows if row["seconds"] >= rows[-1]["seconds"] / 10]
    hours = np.array([row["seconds"] for row in settled]) / 3600
    result: dict[str, Any] = {"minutes": rows[-1]["seconds"] / 60, "epochs": len(rows), "steps": rows[-1]["step"]}
    for key in ("resident_mib", "objects", "open_files", "threads"):
        values = np.array([row[key] for row in settled], dtype=float)
        slope = float(np.polyfit(hours, values, 1)[0])
        result[key] = {"first": values[0], "last": values[-1], "largest": values.max(), "per_hour": round(slope, 3)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--mode", default="full", choices=("full", "adapter"))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    generator = np.random.default_rng(0)

    def images(count: int) -> datasets.Dataset:
        pixels = generator.integers(0, 256, (count, 40, 40, 3), dtype=np.uint8)
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(4)})
        columns = {"image": list(map(Image.fromarray, pixels)), "label": [i % 4 for i in range(count)]}
        return datasets.Dataset.from_dict(columns, features)

    model = get_autolora_model(timm.create_model("test_resnet", num_classes=4), AutoLoraConfig(mode=args.mode))
    watch = Watch(args.minutes * 60)
    with tempfile.TemporaryDirectory() as folder:
        options = AutoLoraTrainingArguments(
            folder,
            num_train_epochs=20_000,
            halving_interval=20,
            min_learning_rate=1e-300,
            attack_steps=2,
            eval_attack_steps=2,
            per_device_train_batch_size=16,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        )
        trainer = AutoLoraTrainer(model, options, images(96), images(32), callbacks=[watch])
        # The history is meant to grow; printing it is not what is watched.
        trainer.pop_callback(transformers.PrinterCallback)
        trainer.train()
        halvings = sum(entry.get("reload", 0) for entry in trainer.state.log_history)
        left = sorted(path.name for path in Path(folder).iterdir())
    result = {"mode": args.mode, "summary": {**summary(watch.rows), "halvings": halvings, "left": left}}
    print(json.dumps(result, indent=2))
    if args.output is not None:
        step = max(1, len(watch.rows) // 60)
        result["rows"] = watch.rows[::step]
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
