"""Kills training runs at random moments and compares what they end with, bit by bit, with runs that were not killed.

    python scripts/kill_matrix.py --kills 48 --output docs/kill_matrix.json

A run is killed (SIGKILL) several times and started again with `resume_from_checkpoint=True` after each. Three kinds of
moments: `time`, drawn uniformly over the run; `file`, at a random operation on the files of the run, so in the middle
of writing, sealing, renaming or deleting checkpoints; `call`, inside an evaluation or while the best weights are being
loaded again. With two processes one of them is killed, and the other one right after it, as a launcher does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import timm
import torch
import transformers
from PIL import Image

from autolora_hf import AutoLoraConfig, AutoLoraTrainer, AutoLoraTrainingArguments, get_autolora_model
from autolora_hf.digests import weights_digest


EPOCHS = 5
# Validation accuracies that halve the learning rate after epoch 4 and bring the weights of epoch 2 back.
ROBUST = [0.5, 0.9, 0.6, 0.7, 0.8]


@dataclass(frozen=True)
class Setup:
    """One way of training.

    Args:
        name (`str`): What the table calls it.
        model (`str`), model_options (`dict`): Of timm.
        config (`dict`): Of `AutoLoraConfig`.
        arguments (`dict`): Of `AutoLoraTrainingArguments`.
        processes (`int`): Number of processes.
    """

    name: str
    model: str
    model_options: dict[str, Any]
    config: dict[str, Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    processes: int = 1


RESNET, VIT = ("test_resnet", {}), ("test_vit", {"img_size": 32, "drop_rate": 0.1, "proj_drop_rate": 0.1})
WORKERS = {"dataloader_num_workers": 2, "augmentation": "crop-flip"}
SETUPS = [
    Setup("full, BatchNorm, 2 workers", *RESNET, {"mode": "full"}, WORKERS),
    Setup(
        "full, dropout, bf16, accumulation", *VIT, {"mode": "full"}, {"bf16": True, "gradient_accumulation_steps": 2}
    ),
    Setup(
        "adapter, dual BatchNorm, persistent workers",
        *RESNET,
        {"mode": "adapter", "target_modules": "all", "norm": "dual"},
        WORKERS | {"dataloader_persistent_workers": True},
    ),
    Setup(
        "adapter, dropout, bf16, accumulation",
        *VIT,
        {"mode": "adapter", "lora_dropout": 0.1},
        {"bf16": True, "gradient_accumulation_steps": 2, "save_total_limit": 1, "logging_strategy": "steps"},
    ),
    Setup("2 processes, full, BatchNorm, workers", *RESNET, {"mode": "full"}, WORKERS, processes=2),
    Setup(
        "2 processes, adapter, dropout, accumulation",
        *VIT,
        {"mode": "adapter", "lora_dropout": 0.1},
        {"gradient_accumulation_steps": 2, "augmentation": "crop-flip"},
        processes=2,
    ),
]


@dataclass(frozen=True)
class Kill:
    """When to kill: `time` (seconds after training began), `file` (number of a file operation) or `call`."""

    kind: str
    at: float
    what: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.what} {self.at:.3g}".replace("  ", " ")


# ---- in the processes that are killed ----


def make_trainer(setup: Setup, folder: Path) -> Any:
    torch.manual_seed(0)
    model = timm.create_model(setup.model, num_classes=4, **setup.model_options)
    model = get_autolora_model(model, AutoLoraConfig(**setup.config), image_size=32)
    generator = np.random.default_rng(0)

    def images(count: int) -> Any:
        labels = [i % 4 for i in range(count)]
        pixels = [generator.integers(0, 200, (40, 40, 3), dtype=np.uint8) + np.uint8(10 * label) for label in labels]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(4)})
        return datasets.Dataset.from_dict({"image": list(map(Image.fromarray, pixels)), "label": labels}, features)

    arguments = {
        "num_train_epochs": EPOCHS,
        "halving_interval": 2,
        "attack_steps": 1,
        "eval_attack_steps": 1,
        "per_device_train_batch_size": 8 // setup.processes,
        "per_device_eval_batch_size": 8,
        "logging_steps": 3,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    args = AutoLoraTrainingArguments(str(folder), **arguments | setup.arguments)
    trainer = AutoLoraTrainer(model, args, images(36), images(14))
    genuine = trainer.compute_metrics

    def compute_metrics(prediction: Any) -> dict[str, float]:
        return genuine(prediction) | {"robust_accuracy": ROBUST[round(trainer.state.epoch) - 1]}

    trainer.compute_metrics = compute_metrics
    return trainer


def suicide() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arrange(kill: Kill | None, trainer: Any, folder: Path) -> None:
    """Makes this process kill itself at a file operation or in a call."""
    if kill is None or kill.kind == "time":
        return
    count = 0
    if kill.kind == "file":
        watched = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "shutil.rmtree"}

        def hook(event: str, arguments: tuple) -> None:
            nonlocal count
            if event in watched and arguments and str(folder) in str(arguments[0]):
                count += 1
                if count == kill.at:
                    suicide()

        sys.addaudithook(hook)
        return
    owner = trainer if kill.what == "prediction_step" else trainer.model
    genuine = getattr(owner, kill.what)

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == kill.at:
            suicide()
        return genuine(*args, **kwargs)

    setattr(owner, kill.what, deadly)


def attempt(setup: Setup, folder: Path, kill: Kill | None, rank: int, port: int, victim: int) -> None:
    """One process of one attempt to train; writes `result-{rank}.json` if it comes to the end."""
    if setup.processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(setup.processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with open(folder.parent / f"log-{rank}.txt", "a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    trainer = make_trainer(setup, folder)
    (folder.parent / f"started-{rank}").touch()
    arrange(kill if rank == victim else None, trainer, folder)
    trainer.train(resume_from_checkpoint=True)
    (folder.parent / f"result-{rank}.json").write_text(json.dumps(outcome(trainer, folder)))


def outcome(trainer: Any, folder: Path) -> dict[str, Any]:
    """All that has to be the same: final weights, schedule, history, and every checkpoint that is left."""
    timed = ("runtime", "_per_second", "flos")
    history = [{k: v for k, v in entry.items() if not k.endswith(timed)} for entry in trainer.state.log_history]
    result = {
        "weights": weights_digest(trainer.model.state_dict()),
        "history": history,
        "scheduler": repr(trainer.lr_scheduler.state_dict()),
        "best": Path(trainer.state.best_model_checkpoint).name,
        "best_metric": trainer.state.best_metric,
        "steps": trainer.state.global_step,
    }
    if trainer.is_world_process_zero():
        checkpoints = {}
        for checkpoint in sorted(folder.glob("checkpoint-*")):
            for file in sorted(checkpoint.rglob("*")):
                name = f"{checkpoint.name}/{file.relative_to(checkpoint)}"
                if file.suffix == ".safetensors":
                    checkpoints[name] = hashlib.sha256(file.read_bytes()).hexdigest()
                elif file.name == "optimizer.pt":
                    states = torch.load(file, weights_only=True)["state"]
                    tensors = {f"{i}.{k}": torch.as_tensor(v) for i, s in states.items() for k, v in s.items()}
                    checkpoints[name] = weights_digest({k: v for k, v in tensors.items() if v.ndim or v.numel()})
        result["checkpoints"] = checkpoints
        result["left"] = sorted(path.name for path in folder.iterdir())
    return result


# ---- in the process that kills ----


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start(context: Any, setup: Setup, folder: Path, kill: Kill | None, victim: int) -> float | None:
    """Runs one attempt to its end or its death; returns how long it trained, `None` if it was killed."""
    home = folder.parent
    for marker in home.glob("started-*"):
        marker.unlink()
    port = free_port()
    ranks = range(setup.processes)
    processes = [context.Process(target=attempt, args=(setup, folder, kill, r, port, victim)) for r in ranks]
    for process in processes:
        process.start()
    while any(p.is_alive() for p in processes) and not all((home / f"started-{r}").exists() for r in ranks):
        time.sleep(0.005)
    began = time.monotonic()
    while all(process.is_alive() for process in processes):
        if kill is not None and kill.kind == "time" and time.monotonic() - began >= kill.at:
            processes[victim].kill()
            break
        time.sleep(0.002)
    if kill is not None:
        # A launcher ends the others when one is gone; one that has finished is gone, too, but not dead.
        processes[victim].join()
        if processes[victim].exitcode == -signal.SIGKILL:
            for process in processes:
                process.kill()
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes]
    if codes == [0] * len(codes):
        return time.monotonic() - began
    if kill is not None and codes[victim] == -signal.SIGKILL:
        return None
    logs = "\n".join((home / f"log-{rank}.txt").read_text()[-3000:] for rank in ranks)
    raise RuntimeError(f"{setup.name}: exit codes {codes} with kill {kill}\n{logs}")


def results(folder: Path, setup: Setup) -> list[dict[str, Any]]:
    return [json.loads((folder.parent / f"result-{rank}.json").read_text()) for rank in range(setup.processes)]


def draw_kill(generator: random.Random, number: int, duration: float) -> Kill:
    """The moment of the next kill; kinds take turns, so that every kind occurs."""
    kind = ("time", "file", "time", "file", "call")[number % 5]
    if kind == "time":
        return Kill("time", generator.uniform(0, duration))
    if kind == "file":
        return Kill("file", generator.randint(1, 150))
    what, most = generator.choice((("prediction_step", 6), ("load_weights", 2)))
    return Kill("call", generator.randint(1, most), what)


def differences(first: Any, second: Any, name: str = "") -> list[str]:
    """Where two results are not equal."""
    if isinstance(first, dict) and isinstance(second, dict):
        keys = sorted(first.keys() | second.keys())
        return [d for key in keys for d in differences(first.get(key), second.get(key), f"{name}/{key}")]
    if isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        return [d for i, pair in enumerate(zip(first, second, strict=True)) for d in differences(*pair, f"{name}/{i}")]
    return [] if first == second else [f"{name}: {first!r} is not {second!r}"]


def run_setup(setup: Setup, kills: int, seed: int, per_run: int = 4) -> dict[str, Any]:
    """Kills runs of one setup `kills` times in all and compares each finished run with one that was not killed."""
    # Children start with everything imported. Nothing in this process has used a thread, which would not survive.
    context = multiprocessing.get_context("fork")
    generator = random.Random(f"{seed} {setup.name}")
    with tempfile.TemporaryDirectory() as home:
        whole = Path(home) / "whole" / "run"
        whole.parent.mkdir()
        duration = start(context, setup, whole, None, 0)
        expected = results(whole, setup)
        done, runs, kinds, problems = 0, 0, Counter(), []
        while done < kills:
            folder = Path(home) / f"run-{runs}" / "run"
            folder.parent.mkdir()
            aim, moments = min(kills, done + per_run), []
            while done < aim:
                kill = draw_kill(generator, len(moments) + runs, duration)
                if start(context, setup, folder, kill, generator.randrange(setup.processes)) is None:
                    done += 1
                    kinds[kill.kind] += 1
                    moments.append(str(kill))
                else:
                    # It came to its end before the moment did: killed less often, compared all the same.
                    break
            else:
                start(context, setup, folder, None, 0)
            runs += 1
            different = differences(expected, results(folder, setup))
            if different:
                problems.append({"killed": moments, "different": different[:20]})
            shutil.rmtree(folder.parent)
    return {
        "setup": setup.name,
        "processes": setup.processes,
        "seconds_of_a_run": round(duration, 1),
        "kills": done,
        "kinds": dict(kinds),
        "runs": runs,
        "runs_equal": runs - len(problems),
        "problems": problems,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=48, help="in all, shared among the setups")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="setups whose name contains this")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    setups = [setup for setup in SETUPS if args.only is None or args.only in setup.name]
    rows = []
    for i, setup in enumerate(setups):
        kills = args.kills // len(setups) + (i < args.kills % len(setups))
        began = time.monotonic()
        rows.append(run_setup(setup, kills, args.seed))
        row = rows[-1]
        print(
            f"{row['setup']:45} {row['kills']:3} kills {row['kinds']}, {row['runs_equal']} of {row['runs']} runs "
            f"equal, {time.monotonic() - began:.0f} s",
            flush=True,
        )
        for problem in row["problems"]:
            print(json.dumps(problem, indent=2))
    if args.output is not None:
        report = {"seed": args.seed, "kills": sum(row["kills"] for row in rows), "rows": rows}
        args.output.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(any(row["problems"] for row in rows))


if __name__ == "__main__":
    main()
