"""Measures how much memory training on a stream takes, on shards many times larger than it may use.

Writes tar shards of noise, which does not compress, trains a tiny model on them for an epoch in a process of its own,
and compares the process's peak with what it held before its first batch. A control that loads everything into memory
must exceed the allowance, so that the measurement is known to see it.

    python scripts/streaming_memory.py --allowance 100 --factor 10
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image


MIB = 2**20
EXCEEDED = 3
CLASSES = 4
# Of the images as the model sees them.
MODEL_SIZE = 32


def write_shards(folder: Path, mebibytes: int, size: int, shards: int) -> int:
    """Tar shards of uncompressed images of `size` x `size` pixels, `mebibytes` together. Returns their number."""
    generator = np.random.default_rng(0)
    count = -(-mebibytes * MIB // (3 * size * size * shards)) * shards
    for shard in range(shards):
        with tarfile.open(folder / f"train-{shard:04d}.tar", "w") as tar:
            for number in range(shard, count, shards):
                file = io.BytesIO()
                pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(file, "BMP")
                for name, data in (
                    (f"{number:07d}.bmp", file.getvalue()),
                    (f"{number:07d}.cls", b"%d" % (number % 4)),
                ):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return count


class Watch(threading.Thread):
    """Ends the process when its resident memory exceeds that at the start by more than the allowance."""

    def __init__(self, allowance: int) -> None:
        super().__init__(daemon=True)
        self.allowance = allowance
        self.start_rss = self.peak = resident()
        self.start()

    def run(self) -> None:
        while True:
            self.peak = max(self.peak, resident())
            if self.peak - self.start_rss > self.allowance * MIB:
                report(self, "exceeded")
                os._exit(EXCEEDED)
            time.sleep(0.01)


def resident() -> int:
    """Bytes of this process in memory, those of files that it has mapped left out: the system can drop them."""
    pages = [int(number) for number in Path("/proc/self/statm").read_text().split()]
    return (pages[1] - pages[2]) * os.sysconf("SC_PAGE_SIZE")


def report(watch: Watch, outcome: str) -> None:
    figures = {"outcome": outcome, "before": watch.start_rss / MIB, "above": (watch.peak - watch.start_rss) / MIB}
    print(json.dumps(figures), flush=True)


def train(folder: Path, allowance: int, everything: bool) -> None:
    """Trains for an epoch; `everything`: the control, which holds all encoded images in memory."""
    import datasets
    import timm
    import torch

    from autolora_hf import AutoLoraTrainer, AutoLoraTrainingArguments, get_autolora_model
    from autolora_hf.data import load_shards

    torch.set_num_threads(1)
    logging.basicConfig(level=logging.ERROR)
    datasets.disable_progress_bars()
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=CLASSES, img_size=MODEL_SIZE, depth=1)
    args = AutoLoraTrainingArguments(
        str(folder / ("control" if everything else "streamed")),
        num_train_epochs=1,
        attack_steps=1,
        eval_attack_steps=1,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=64,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )

    # Forward and backward once, so that what the libraries allocate for themselves is in the figure to compare with.
    model = get_autolora_model(network, image_size=MODEL_SIZE)
    loss = model.pixel_space()(torch.rand(64, 3, MODEL_SIZE, MODEL_SIZE)).square().mean()
    loss.backward()
    model.zero_grad()
    del loss

    watch = Watch(allowance)
    data = load_shards(str(folder / "train-*.tar"))
    if everything:
        data = datasets.Dataset.from_list(list(data.decode(False)), features=data.features)
    trainer = AutoLoraTrainer(model, args, train_dataset=data)
    trainer.train()
    assert trainer.state.global_step == trainer.plan["steps_per_epoch"]
    report(watch, "within")


def run(folder: Path, options: argparse.Namespace, everything: bool) -> dict[str, float | str]:
    command = [sys.executable, __file__, "--shards", str(folder), "--allowance", str(options.allowance)]
    command += ["--everything"] * everything
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    environment["HF_DATASETS_CACHE"] = str(folder / "cache")
    begin = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"outcome"')]
    if done.returncode not in (0, EXCEEDED) or not lines:
        sys.exit(f"The training failed:\n{done.stdout}\n{done.stderr}")
    return {**json.loads(lines[-1]), "seconds": time.monotonic() - begin}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--allowance", type=int, default=100, help="MiB above the memory before training")
    parser.add_argument("--factor", type=float, default=10, help="size of the data, in allowances")
    parser.add_argument("--size", type=int, default=128, help="height and width of the images in pixels")
    parser.add_argument("--number", type=int, default=16, help="number of shards")
    parser.add_argument("--shards", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--everything", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.shards:
        train(options.shards, options.allowance, options.everything)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = write_shards(folder, round(options.allowance * options.factor), options.size, options.number)
        total = sum(path.stat().st_size for path in folder.glob("*.tar")) / MIB
        print(f"{count} images of {options.size} x {options.size} pixels in {options.number} shards: {total:.0f} MiB.")
        outcomes = []
        for kind, everything in (("streamed", False), ("everything in memory", True)):
            found = run(folder, options, everything)
            outcomes.append(found["outcome"])
            print(
                f"{kind}: {found['outcome']} the allowance of {options.allowance} MiB; at most {found['above']:.1f} "
                f"MiB above the {found['before']:.0f} MiB before, in {found['seconds']:.0f} s."
            )
    if outcomes != ["within", "exceeded"]:
        sys.exit("The stream must stay within the allowance, and the control must exceed it.")


if __name__ == "__main__":
    main()
