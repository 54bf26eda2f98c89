"""What `benchmark_speed.py` measures: networks, batches and rows, and how it takes times."""

from __future__ import annotations

import copy
import gc
import itertools
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import benchmark_peers as peers
import timm
import torch
import torch.nn.functional as F
import transformers
from released_step import STEPS
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from autolora_hf import (
    AutoLoraConfig,
    AutoLoraModel,
    Preprocessing,
    get_autolora_model,
)
from autolora_hf.data import as_pixel_dataset
from autolora_hf.pixels import Normalize


SECTIONS = ("attack", "step", "scaling", "memory", "loading", "autoattack")
# Options of `FrozenRoute`, and of the training arguments, by row.
ATTACKS: dict[str, dict[str, Any]] = {
    "exact": {},
    "exact, norms not folded": {"fold_norms": False},
    "exact, not channels_last": {"channels_last": False},
    "exact, patches not linear": {"linear_patches": False},
    "exact, compiled": {"compiled_batch": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "bfloat16, compiled": {"dtype": torch.bfloat16, "compiled_batch": True},
}
STEPS_OF_TRAINER: dict[str, dict[str, Any]] = {
    "exact": {"attack_bf16": False},
    "bfloat16 attack": {"attack_bf16": True},
    "bfloat16 attack, compiled": {"attack_bf16": True, "attack_compile": True},
    "all bfloat16": {"attack_bf16": True, "bf16": True},
    "all bfloat16, attack compiled": {"attack_bf16": True, "attack_compile": True, "bf16": True},
}
# The package's plain adversarial training, for the rows of the libraries that have no more than that.
PLAIN_TRAINING = {"plain adversarial training, " + name: name for name in ("exact", "all bfloat16")}
NATURAL_MODEL = ", natural model"  # ends the names of rows about a model that was not trained to be robust
SCALING = {
    "attack steps": (5, 20),
    "batch size": (8, 128),
    "classes": (100, 1000),
    "image size": (64, 96),
    "rank": (2, 32),
}


@dataclass(frozen=True)
class Case:
    """A network and a batch; fields can be replaced to vary one of them.

    Args:
        network (`str`): Name of the timm model.
        size (`int`), batch (`int`), classes (`int`): Side of the images, images, classes.
        cifar_stem (`bool`): A 3 x 3 convolution of stride 1 and no pooling in front of a ResNet.
        sections (`tuple[str, ...]`): Those that the case is part of.
        complete (`bool`): With the other libraries and one change at a time.
        compiled (`bool`): With the rows that compile, which takes minutes for deep networks.
        gpu (`bool`): Only on a GPU.
        rank (`int`), attack_steps (`int`): Of the package's step.
    """

    network: str
    size: int
    batch: int
    classes: int = 10
    cifar_stem: bool = False
    sections: tuple[str, ...] = ("attack", "step", "memory")
    complete: bool = False
    compiled: bool = True
    gpu: bool = False
    rank: int = 8
    attack_steps: int = STEPS

    def build(self) -> nn.Module:
        fixed = {"img_size": self.size} if "vit" in self.network else {}
        torch.manual_seed(0)
        network = timm.create_model(self.network, num_classes=self.classes, **fixed)
        if self.cifar_stem:
            network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
        return network

    def shows(self, row: str) -> bool:
        """Whether a row of `ATTACKS` is about this case: not all of them change something everywhere."""
        if "patches" in row:
            return "vit" in self.network
        return self.complete or "not " not in row

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing((self.size, self.size), crop_pct=1.0)

    def images(self, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Noisy copies of one smooth pattern a class: something to learn, so that attacks have something to undo."""
        generator = torch.Generator().manual_seed(seed)
        patterns = torch.rand(self.classes, 3, 4, 4, generator=torch.Generator().manual_seed(1))
        labels = torch.randint(self.classes, (count,), generator=generator)
        smooth = F.interpolate(patterns[labels], (self.size, self.size), mode="bilinear")
        noise = torch.randn(smooth.shape, generator=generator)
        return (0.25 + 0.5 * smooth + 0.1 * noise).clamp(0, 1), labels


CASES = {
    "resnet18-32": Case("resnet18", 32, 32, cifar_stem=True, complete=True, sections=SECTIONS[:4]),
    "resnet18-32-batch128": Case("resnet18", 32, 128, cifar_stem=True, sections=("step", "memory"), compiled=False),
    "resnet50-64": Case("resnet50", 64, 32),
    "vit-tiny-64": Case("vit_tiny_patch16_224", 64, 32),
    "resnet50-224": Case("resnet50", 224, 64, gpu=True),
    "vit-base-224": Case("vit_base_patch16_224", 224, 64, gpu=True),
    "files": Case("", 224, 128, sections=("loading",)),
    "quickstart": Case("quickstart", 28, 64, sections=("autoattack",)),
}
SMOKE = {
    "smoke": Case("test_resnet", 32, 4, complete=True, sections=SECTIONS[:4], compiled=False),
    "files": Case("", 64, 4, sections=("loading",)),
    "quickstart": Case("quickstart", 28, 10, sections=("autoattack",)),
}


# ---- measuring ----


class Bench:
    """What all measurements share: device, number of rounds, a folder for trainers."""

    def __init__(self, device: torch.device, rounds: int, folder: Path, smoke: bool = False) -> None:
        self.device, self.rounds, self.folder, self.smoke = device, rounds, folder, smoke
        self._folders = itertools.count()

    def new_folder(self) -> Path:
        return self.folder / str(next(self._folders))

    def seconds(self, call: Callable[[], Any]) -> tuple[float, Any]:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            started, result = time.perf_counter(), call()
            torch.cuda.synchronize(self.device)
            return time.perf_counter() - started, result
        started, result = time.process_time(), call()
        return time.process_time() - started, result

    def take_turns(self, rows: dict[str, Callable[[], Any]]) -> dict[str, dict[str, Any]]:
        """Times of every row by round; another library or a compiler that fails leaves its row with the error."""
        times: dict[str, dict[str, Any]] = {}
        for name, call in rows.items():
            transformers.set_seed(0)
            started = time.perf_counter()
            try:
                call()
            except Exception as error:
                if name not in peers.ATTACKS and name not in peers.TRAININGS and "compiled" not in name:
                    raise
                times[name] = {"missing": f"failed: {type(error).__name__}: {str(error).splitlines()[0]:.100}"}
            else:
                times[name] = {"first_call": round(time.perf_counter() - started, 2), "seconds": []}
            print(f"  {name}: {times[name]}", flush=True)
        running = [name for name in rows if "seconds" in times[name]]
        for number in range(self.rounds):
            # Nobody is always the first one after the released step.
            for name in running[number % len(running) :] + running[: number % len(running)]:
                transformers.set_seed(number + 1)
                times[name]["seconds"].append(round(self.seconds(rows[name])[0], 4))
            print(f"  round {number + 1}:", {name: times[name]["seconds"][-1] for name in running}, flush=True)
        return times

    def peaks(self) -> dict[str, float]:
        """Most operations a second of one matrix product and one convolution, in 1e9."""
        found = {}
        size, batch = (256, 2) if self.smoke else ((8192, 512) if self.device.type == "cuda" else (1536, 16))
        for dtype in (torch.float32, torch.bfloat16):
            a = torch.randn(size, size, device=self.device, dtype=dtype)
            shapes = (batch, 128, 32, 32), (128, 128, 3, 3)
            x, weight = (torch.randn(shape, device=self.device, dtype=dtype) for shape in shapes)
            x, weight = (tensor.to(memory_format=torch.channels_last) for tensor in (x, weight))
            name = str(dtype).removeprefix("torch.")
            with torch.no_grad():
                for kind, call, work in (
                    ("matmul", lambda a=a: a @ a, 2 * size**3),
                    ("convolution", lambda x=x, w=weight: F.conv2d(x, w, padding=1), 2 * batch * 32**2 * 9 * 128**2),
                ):
                    best = min(self.seconds(call)[0] for _ in range(3 if self.smoke else 8))
                    found[f"{kind}, {name}"] = round(work / max(best, 1e-9) / 1e9, 1)
        return found


class _NoModules:
    """In place of the counter's tracker of modules, which cannot follow gradients of inputs alone."""

    parents = ("Global",)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...


def flops(call: Callable[[], Any]) -> int:
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()
    with counter:
        call()
    return counter.get_total_flops()


@cache
def learned(case: Case, device: torch.device) -> dict[str, Tensor]:
    """Weights after a few natural steps: before them the last norm of a block is zero, and attacks mean little."""
    network = case.build()
    model = nn.Sequential(Normalize(case.preprocessing), network).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    for step in range(15):
        pixels, labels = (tensor.to(device) for tensor in case.images(16, seed=100 + step))
        optimizer.zero_grad()
        F.cross_entropy(model(pixels), labels).backward()
        optimizer.step()
    return copy.deepcopy(network.state_dict())


def network_of(case: Case, bench: Bench) -> nn.Module:
    network = case.build()
    # The same for cases that differ in nothing but how they are measured.
    plain = Case(case.network, case.size, 0, case.classes, case.cifar_stem)
    network.load_state_dict(learned(plain, bench.device))
    return network.to(bench.device).eval()


def adapted(case: Case, network: nn.Module) -> AutoLoraModel:
    torch.manual_seed(0)
    return get_autolora_model(network, AutoLoraConfig(r=case.rank), preprocessing=case.preprocessing)


def digits(split: Any, model: AutoLoraModel, count: int) -> tuple[Tensor, Tensor]:
    data = as_pixel_dataset(split, model.preprocessing)
    items = [data[index] for index in range(0, len(data), len(data) // count)][:count]
    return torch.stack([item["pixel_values"] for item in items]), torch.tensor([item["labels"] for item in items])


def cpu_name() -> str:
    """Name of the processor, and which wide instructions for bfloat16 it has."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine()
    lines = dict(line.split(":", 1) for line in info.replace("\t", "").splitlines() if ":" in line)
    flags = [name for name in ("avx512_bf16", "amx_bf16") if name in lines.get("flags", "").split()]
    return f"{lines.get('model name', platform.machine()).strip()} ({', '.join(flags) or 'no bfloat16 arithmetic'})"
