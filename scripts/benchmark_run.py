"""Training and attacking one system of a benchmark, and doing so for many of them in processes of their own."""

from __future__ import annotations

import datetime
import gc
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from benchmark_systems import System
from benchmark_tasks import TASKS, device_in_words
from torch.utils.data import TensorDataset

from autolora_hf import PGD, AutoLoraTrainer
from autolora_hf.saving import deployed_tensors


AUTOATTACK = ("pgd-bf16", "autoattack")


def measure(task: str, system: System, seed: int, attacked: int | None = None, rate: float | None = None) -> dict:
    """Trains and attacks one system: a row of the results.

    Meant for a fresh process with one thread: the peak of its memory is that of the training.

    Args:
        task (`str`): Of `TASKS`.
        system (`System`): The method.
        seed (`int`): Of everything.
        attacked (`int`, *optional*): Test images for AutoAttack. `None`: as many as the task has.
        rate (`float`, *optional*): Learning rate at the start. `None`: the package's.
    """
    where, test = TASKS[task], TensorDataset(*TASKS[task].test())
    row: dict[str, Any] = {"task": task, "system": system.name, "seed": seed, "date": str(datetime.date.today())}
    row["device"] = device_in_words()
    with tempfile.TemporaryDirectory() as folder:
        try:
            trainer = where.trainer(
                system.objective, seed, folder, system.config, learning_rate=rate, **system.arguments
            )
        except ValueError as error:
            # Such as norms that the backbone does not have.
            return {**row, "refused": str(error)}
        before, started = _memory(), _clock()
        try:
            trainer.train()
        except FloatingPointError as error:
            # That it diverges is a result. What comes after the step is advice for users.
            return {**row, "stopped": str(error).partition(":")[0]}
        row["training_seconds"] = _clock() - started
        row["memory_mb"] = (_peak_memory() - before) / 2**20
        model = trainer.model
        row["trained"] = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        row["published"] = sum(tensor.numel() for tensor in deployed_tensors(model).values())
        row["validation"] = best_validation(trainer)
        quiet = {"progress": False, "diagnostics": False}
        pgd = trainer.evaluate_robustness(test, PGD(trainer.args.threat_model, steps=20), **quiet)
        # The same images for every system and seed.
        images = min(attacked or where.attacked, len(test))
        report = trainer.evaluate_robustness(test, AUTOATTACK, max_samples=images, seed=0, **quiet)
    row |= {"natural": pgd.natural_accuracy, "pgd20": pgd.robust_accuracy}
    row["autoattack"] = [report.robust.correct, report.robust.total]
    row["verdicts"] = {"pgd20": packed(pgd.robust_correct), "autoattack": packed(report.robust_correct)}
    return row


def best_validation(trainer: AutoLoraTrainer) -> float | None:
    """The robust validation accuracy of the weights that were chosen; `None` where another metric chooses."""
    chosen = trainer.args.metric_for_best_model == "eval_robust_accuracy"
    return float(trainer.state.best_metric) if chosen and trainer.state.best_metric is not None else None


def packed(verdicts: list[bool]) -> str:
    """A bit an image, in hexadecimal digits, after a 1 that keeps the zeros in front."""
    return f"{int('1' + ''.join(str(int(right)) for right in verdicts), 2):x}"


def unpacked(digits: str) -> list[bool]:
    """The inverse of `packed`."""
    return [bit == "1" for bit in f"{int(digits, 16):b}"[1:]]


def _clock() -> float:
    """Seconds: of the CPU, which others may share; of a GPU that is ours alone, of the wall."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def _memory() -> int:
    """Bytes that this process holds now, on the device that trains; from now on the peak is counted anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    gc.collect()
    # Linux' own way; reading the images took more than the training does.
    Path("/proc/self/clear_refs").write_text("5")
    return _peak_memory()


def _peak_memory() -> int:
    """The most bytes that this process held since then."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1])


def run_all(jobs: Iterable[tuple], keep: Callable[[dict[str, Any]], None], workers: int) -> list[str]:
    """Runs `measure` on the arguments of every job, each in a process of its own; returns what failed, in words.

    Args:
        jobs: Arguments of `measure`.
        keep: Called with every row, in this process, as soon as it is there.
        workers (`int`): Processes at a time, of one thread each.
    """
    jobs = list(jobs)
    # Before the processes import torch.
    os.environ["OMP_NUM_THREADS"] = "1"
    context = get_context("forkserver")
    context.set_forkserver_preload(["benchmark_run"])
    failed: list[str] = []
    with context.Pool(workers, torch.set_num_threads, (1,), maxtasksperchild=1) as pool:
        for number, (job, row) in enumerate(pool.imap_unordered(_measure, jobs, chunksize=1), start=1):
            if isinstance(row, str):
                failed.append(f"{_in_words(job)}: {row}")
                print(failed[-1], flush=True)
                continue
            keep(row)
            print(f"{number}/{len(jobs)} {_in_words(job)}: {result_in_words(row)}", flush=True)
    return failed


def _measure(job: tuple) -> tuple[tuple, dict[str, Any] | str]:
    try:
        return job, measure(*job)
    except (ValueError, RuntimeError, FloatingPointError, OSError) as error:
        return job, f"{type(error).__name__}: {error}"


def _in_words(job: tuple) -> str:
    task, system, seed = job[:3]
    return f"{task}, {system.name}, seed {seed}"


def result_in_words(row: dict[str, Any]) -> str:
    if "refused" in row:
        return f"refused: {row['refused']}"
    if "stopped" in row:
        return row["stopped"]
    right, total = row["autoattack"]
    return (
        f"natural {row['natural']:.3f}, PGD-20 {row['pgd20']:.3f}, AutoAttack {right}/{total}, "
        f"{row['training_seconds']:.0f} s, {row['memory_mb']:.0f} MB"
    )
