"""The sections of `benchmark_speed.py`: attack, step, scaling, memory and AutoAttack."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import gc
import io
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import benchmark_peers as peers
import datasets
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate.state import AcceleratorState
from benchmark_cases import (
    ATTACKS,
    NATURAL_MODEL,
    PLAIN_TRAINING,
    SCALING,
    SECTIONS,
    STEPS_OF_TRAINER,
    Bench,
    Case,
    adapted,
    digits,
    flops,
    network_of,
)
from PIL import Image
from released_step import EPS, STEP_SIZE, STEPS, ReleasedModel, ReleasedTraining, released_attack
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from autolora_hf import (
    PGD,
    AutoLoraConfig,
    AutoLoraModel,
    AutoLoraTrainer,
    AutoLoraTrainingArguments,
    Preprocessing,
    ThreatModel,
    evaluate_robustness,
    get_autolora_model,
)
from autolora_hf.data import as_pixel_dataset, collate
from autolora_hf.evaluation.robustness import FIRST_PASS
from autolora_hf.frozen import FrozenRoute
from autolora_hf.pixels import Normalize
from autolora_hf.quickstart import load_digits


DIGITS_EPS = 0.1


def own_attack(frozen: FrozenRoute, attack: PGD, pixels: Tensor, labels: Tensor, start: Tensor) -> Tensor:
    """As `AutoLoraTrainer` attacks."""
    found = attack.search(frozen.refresh(), pixels, labels, start=start)
    check_compiled(frozen)
    return found


def check_compiled(frozen: FrozenRoute) -> None:
    """An error where the package has given up compiling and works on without it."""
    if frozen.compiled_batch is not None and frozen._compiled == frozen._run:
        raise RuntimeError("torch.compile does not work here")


def measure_attack(case: Case, bench: Bench) -> dict[str, Any]:
    network = network_of(case, bench)
    plain = nn.Sequential(Normalize(case.preprocessing), copy.deepcopy(network)).to(bench.device).eval()
    pixels, labels = (tensor.to(bench.device) for tensor in case.images(case.batch))
    start = pixels + 0.001 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(2)).to(bench.device)
    released = ReleasedModel(copy.deepcopy(network)).to(bench.device).train()
    model, attack = adapted(case, network), PGD(ThreatModel("linf", EPS), steps=STEPS, step_size=STEP_SIZE)
    images: dict[str, Tensor] = {}
    rows: dict[str, Callable[[], Any]] = {}
    missing: dict[str, dict[str, str]] = {}

    def add(name: str, run: Callable[[], Tensor]) -> None:
        def call() -> None:
            images[name] = run()

        rows[name] = call

    add("released", lambda: released_attack(released, pixels, labels, start))
    for name, options in ATTACKS.items():
        if case.shows(name) and (case.compiled or "compiled_batch" not in options):
            options = {key: case.batch if key == "compiled_batch" else value for key, value in options.items()}
            add(name, partial(own_attack, FrozenRoute(model, **options), attack, pixels, labels, start))
    for name, build in peers.ATTACKS.items() if case.complete else ():
        try:
            run = build(copy.deepcopy(plain), case.size, case.classes)
            add(name, lambda run=run: run(pixels, labels))
        except ImportError:
            missing[name] = {"missing": "not installed"}

    def loss(found: Tensor) -> float:
        with torch.no_grad():
            return round(F.cross_entropy(plain(found.detach().float()), labels).item(), 5)

    work = flops(lambda: released_attack(released, pixels, labels, start))
    found = bench.take_turns(rows)
    for name in images:
        found[name]["loss"] = loss(images[name])
    return {"rows": {**found, **missing}, "flops": work, "clean_loss": loss(pixels), "peaks": bench.peaks()}


class TrainerSteps:
    """Optimizer steps of an `AutoLoraTrainer`, one a call, made of the calls with which `Trainer` makes them."""

    def __init__(
        self, case: Case, bench: Bench, objective: str = "autolora", fresh: bool = False, **options: Any
    ) -> None:
        network = case.build().to(bench.device) if fresh else network_of(case, bench)
        args = AutoLoraTrainingArguments(
            str(bench.new_folder()),
            objective=objective,
            num_train_epochs=1,
            per_device_train_batch_size=case.batch,
            attack_steps=case.attack_steps,
            attack_step_size=STEP_SIZE,
            augmentation="none",
            use_cpu=bench.device.type == "cpu",
            report_to="none",
            disable_tqdm=True,
            **options,
        )
        train, validation = (TensorDataset(*case.images(count, seed)) for count, seed in ((2 * case.batch, 0), (2, 9)))
        self.trainer = trainer = AutoLoraTrainer(adapted(case, network), args, train, validation)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer._init_training_state(1000, 1000, 1, None, None)
        self.model, self.loader = trainer._prepare_for_training(1000, trainer.get_train_dataloader(), None)
        self.optimizer = trainer.optimizer.optimizer
        # As in the other rows; SA then is not measured, as in most steps of a training.
        trainer.lr_scheduler.training_accuracy = 0.5
        trainer.current_gradient_accumulation_steps = 1
        self._event("on_train_begin")
        self.batches = iter(self.loader)
        # Accelerate has one precision a process, that of the latest trainer; this one works with its own.
        self.state = dict(AcceleratorState._shared_state)

    def _event(self, name: str) -> None:
        trainer = self.trainer
        trainer.control = getattr(trainer.callback_handler, name)(trainer.args, trainer.state, trainer.control)

    def __call__(self) -> float:
        trainer = self.trainer
        AcceleratorState._shared_state.clear()
        AcceleratorState._shared_state.update(self.state)
        batches, number = trainer.get_batch_samples(self.batches, 1, trainer.args.device)
        if not batches:
            self.batches = iter(self.loader)
            batches, number = trainer.get_batch_samples(self.batches, 1, trainer.args.device)
        trainer.accelerator.gradient_state._set_sync_gradients(True)
        self._event("on_step_begin")
        loss = trainer.training_step(self.model, batches[0], number)
        check_compiled(trainer._attacker.frozen)
        if not loss.isfinite():
            raise FloatingPointError("The loss of a measured step is not finite.")
        trainer._get_grad_norm(self.model)
        self._event("on_pre_optimizer_step")
        trainer.optimizer.step()
        self._event("on_optimizer_step")
        trainer.lr_scheduler.step()
        self.model.zero_grad()
        trainer.state.global_step += 1
        self._event("on_step_end")
        return loss.item()


def measure_step(case: Case, bench: Bench) -> dict[str, Any]:
    pixels, labels = (tensor.to(bench.device) for tensor in case.images(case.batch))
    rows: dict[str, Callable[[], Any]] = {}
    missing: dict[str, dict[str, str]] = {}
    updates: dict[str, int] = {}

    def add(name: str, call: Callable[[], Any], optimizer: torch.optim.Optimizer) -> None:
        rows[name], updates[name] = call, 0

        def count(*_: Any) -> None:
            updates[name] += 1

        optimizer.register_step_post_hook(count)

    released = ReleasedTraining(ReleasedModel(network_of(case, bench)).to(bench.device))
    add("released", lambda: released(pixels, labels), released.optimizer)
    plain = PLAIN_TRAINING if case.complete else {}
    for name, base in {**{name: name for name in STEPS_OF_TRAINER}, **plain}.items():
        options = STEPS_OF_TRAINER[base]
        if case.compiled or not options.get("attack_compile"):
            step = TrainerSteps(case, bench, "pgd-at" if name in plain else "autolora", **options)
            add(name, step, step.optimizer)
    for name, build in peers.TRAININGS.items() if case.complete else ():
        model = nn.Sequential(Normalize(case.preprocessing), network_of(case, bench)).to(bench.device)
        try:
            run, optimizer = build(model, case.size, case.classes)
            add(name, lambda run=run: run(pixels, labels), optimizer)
        except ImportError:
            missing[name] = {"missing": "not installed"}
    counted = ReleasedTraining(ReleasedModel(network_of(case, bench)).to(bench.device))
    work = flops(lambda: counted(pixels, labels))
    found = bench.take_turns(rows)
    for name, row in found.items():
        if "seconds" in row and updates[name] != bench.rounds + 1:
            raise RuntimeError(f"{name} made {updates[name]} updates in {bench.rounds + 1} steps.")
    return {"rows": {**found, **missing}, "flops": work, "peaks": bench.peaks()}


def measure_scaling(case: Case, bench: Bench) -> dict[str, Any]:
    fields = {"attack steps": "attack_steps", "batch size": "batch", "image size": "size"}
    variants = {"base": case}
    for what, values in SCALING.items():
        for value in values[:1] if bench.smoke else values:
            variants[f"{what} {value}"] = dataclasses.replace(case, **{fields.get(what, what): value})
    rows = {
        name: TrainerSteps(variant, bench, fresh=True, **STEPS_OF_TRAINER["exact"])
        for name, variant in variants.items()
    }
    base = {name: getattr(case, fields.get(name, name)) for name in SCALING}
    # Twice is enough for ratios between 0.3 and 10, and the largest of these take a minute.
    found = Bench(bench.device, min(bench.rounds, 2), bench.folder, bench.smoke).take_turns(rows)
    return {"rows": found, "base": base}


def measure_memory(case: Case, bench: Bench) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name, options in {"released": {}, **STEPS_OF_TRAINER}.items():
        if not options.get("attack_compile") and not (bench.smoke and "bfloat16" in name):
            spec = json.dumps([name, {**dataclasses.asdict(case), "attack_steps": 2}])
            command = [
                sys.executable,
                str(Path(__file__).with_name("benchmark_speed.py")),
                "--device",
                str(bench.device),
                "--memory-of",
                spec,
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr)
            rows[name] = json.loads(done.stdout.splitlines()[-1])
            print(f"  {name}: {rows[name]}", flush=True)
    return {"rows": rows}


def memory_of(name: str, case: Case, bench: Bench) -> dict[str, float]:
    """Runs two steps in this process; MiB that were in use before the first one, and the peak above it."""
    pixels, labels = (tensor.to(bench.device) for tensor in case.images(case.batch))
    if name == "released":
        released = ReleasedTraining(
            ReleasedModel(case.build().to(bench.device)).to(bench.device), attack_steps=case.attack_steps
        )
        model, call = released.model, lambda: released(pixels, labels)
    else:
        call = TrainerSteps(case, bench, fresh=True, **STEPS_OF_TRAINER[name])
        model = call.trainer.model.pixel_space()
        # The diagnosis at the start of a training has made the copy that attacks run on: it counts as part of a step.
        call.trainer._attacker.frozen = None
    with torch.no_grad():
        model.eval()(pixels[:1])
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)
        before = torch.cuda.memory_allocated(bench.device) / 2**20
    else:
        with contextlib.suppress(OSError):
            # What is free but still held would hide the first part of what a step takes.
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        # Not `ru_maxrss`, which begins with the size of the process that started this one, and cannot be set back.
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
    for _ in range(2):
        call()
    gpu = bench.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(bench.device) / 2**20 if gpu else _resident("VmHWM")
    return {"before": round(before, 1), "peak": round(peak - before, 1)}


def _resident(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def measure_loading(case: Case, bench: Bench) -> dict[str, Any]:
    """A batch of image files, decoded, augmented and collated by one process."""
    small = Preprocessing((32, 32), crop_pct=1.0)
    kinds = {
        "PNG 32 x 32": (_files(case.batch, (32, 32), "PNG"), small),
        "JPEG 500 x 375": (_files(case.batch, (500, 375), "JPEG"), case.preprocessing),
    }
    rows: dict[str, Callable[[], Any]] = {}
    for (name, (files, preprocessing)), augmentation in itertools.product(kinds.items(), ("none", "crop-flip")):
        data = as_pixel_dataset(files, preprocessing, augmentation=augmentation)
        size = preprocessing.image_size[0]
        rows[f"{name} to {size} x {size}, {augmentation}"] = lambda data=data: collate([*data])
    return {"rows": bench.take_turns(rows)}


def _files(count: int, size: tuple[int, int], kind: str) -> datasets.Dataset:
    """Smooth pictures with some noise, which a camera's files resemble more than noise alone."""
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(size)
        noisy = np.asarray(coarse).astype(int) + generator.integers(-8, 9, (size[1], size[0], 3))
        file = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, kind)
        rows.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=2)})
    return datasets.Dataset.from_dict({"image": rows, "label": [0, 1] * (count // 2)}, features=features)


def measure_autoattack(case: Case, bench: Bench) -> dict[str, Any]:
    """The shipped backbone after a short training on digits, by AutoLoRa and naturally, attacked as the quickstart
    does."""
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[int], list[bool]]] = {}
    for suffix, objective in (("", "autolora"), (NATURAL_MODEL, "natural")):
        model, test = _digits_model(objective, case, bench)
        calls["library" + suffix] = partial(_by_library, model, test, bench)
        calls["exact" + suffix] = partial(_by_package, model, test, "autoattack")
        calls["bfloat16 first pass" + suffix] = partial(_by_package, model, test, [FIRST_PASS, "autoattack"])
    for name, call in calls.items():
        call(1 if bench.smoke else 4)  # whatever is done once only
        rows[name] = {"seconds": [], "wall": []}
    names = list(calls)
    for number in range(1 if bench.smoke else min(3, bench.rounds)):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            started = time.perf_counter()
            seconds, verdicts = bench.seconds(partial(calls[name], case.batch))
            rows[name]["seconds"].append(round(seconds, 3))
            rows[name]["wall"].append(round(time.perf_counter() - started, 3))
            rows[name] |= {"robust": sum(verdicts), "verdicts": verdicts}
            print(f"  {name}: {seconds:.1f} s, {sum(verdicts)} of {len(verdicts)} robust", flush=True)
    for name, row in rows.items():
        theirs = rows["library" + (NATURAL_MODEL if NATURAL_MODEL in name else "")]["verdicts"]
        row["agree"] = sum(own == other for own, other in zip(row["verdicts"], theirs, strict=True))
    return {"rows": rows, "images": case.batch}


def _digits_model(objective: str, case: Case, bench: Bench) -> tuple[AutoLoraModel, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = get_autolora_model("quickstart", AutoLoraConfig(mode="adapter"))
    model.heads[0].reset_parameters()
    splits = load_digits()
    counts = (100, case.batch) if bench.smoke else (1000, case.batch)
    train, test = (digits(splits[split], model, n) for split, n in zip(("train", "test"), counts, strict=True))
    args = AutoLoraTrainingArguments(
        str(bench.new_folder()),
        objective=objective,
        eps=DIGITS_EPS,
        num_train_epochs=1 if bench.smoke else 4,
        per_device_train_batch_size=32,
        attack_steps=3,
        attack_step_size=0.04,
        augmentation="crop",
        use_cpu=bench.device.type == "cpu",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = AutoLoraTrainer(model, args, TensorDataset(*train))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    pixels, labels = (tensor.to(bench.device) for tensor in test)
    return model.eval(), (pixels, labels)


def _by_library(model: AutoLoraModel, test: tuple[Tensor, Tensor], bench: Bench, count: int) -> list[bool]:
    import pyautoattack

    live, (pixels, labels) = model.pixel_space(), (tensor[:count] for tensor in test)
    options = {"norm": "Linf", "eps": DIGITS_EPS, "seed": 0, "device": bench.device}
    suite = pyautoattack.AutoAttack(live, version="standard", **options)
    found, *_ = suite.run_standard_evaluation(pixels, labels, batch_size=count)
    with torch.no_grad():
        return (live(found).argmax(1) == labels).tolist()


def _by_package(model: AutoLoraModel, test: tuple[Tensor, Tensor], attack: Any, count: int) -> list[bool]:
    data = tuple(tensor[:count] for tensor in test)
    options = {"batch_size": count, "progress": False, "diagnostics": False}
    return evaluate_robustness(model, data, ThreatModel("linf", DIGITS_EPS), attack, **options).robust_correct


MEASURES = {name: globals()[f"measure_{name}"] for name in SECTIONS}
