"""The cells of the paper's tables: backbones, methods, settings, and the figures that were published."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from paper_data import DataSet


SEEDS = (0, 1, 2)
RESULT = "result.json"


class Figures(NamedTuple):
    """Per cent: standard accuracy, under PGD-10, under AutoAttack."""

    natural: float
    pgd10: float
    autoattack: float


@dataclass(frozen=True)
class Backbone:
    """A robust ImageNet checkpoint of robust-models-transfer (Salman et al., NeurIPS 2020), Linf 4/255.

    Args:
        key (`str`), title (`str`): Name on the command line, and in the paper.
        file (`str`): Its file there.
        macs (`float`): Multiply-accumulates of a forward pass of one image of 224 x 224, in 10^9.
        model_args (`dict`): Arguments of timm's architecture `key`.
    """

    key: str
    title: str
    file: str
    macs: float
    model_args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A method of the table.

    Args:
        objective (`str`): Of `autolora_hf.objectives`, and name on the command line.
        title (`str`): In the paper.
        passes (`int`): Forward-equivalents of a training image, with ten steps of attack.
    """

    objective: str
    title: str
    passes: int


BACKBONES = {
    backbone.key: backbone
    for backbone in (
        Backbone("resnet18", "ResNet-18", "resnet18_linf_eps4.0.ckpt", 1.8),
        Backbone("resnet50", "ResNet-50", "resnet50_linf_eps4.0.ckpt", 4.1),
    )
}
METHODS = {
    method.objective: method
    for method in (
        Method("trades", "vanilla RFT (TRADES)", 26),
        Method("twins-trades", "TWINS-TRADES", 26),
        Method("autolora", "AutoLoRa", 26),
    )
}

# ResNet-50: table 2 of the paper. Its table of ResNet-18 was not at hand, and nothing stands in for it.
PUBLISHED: dict[str, dict[str, dict[str, Figures]]] = {
    "resnet50": {
        data_set: dict(zip(METHODS, (Figures(*row) for row in rows), strict=True))
        for data_set, rows in {
            "cifar10": ((86.33, 56.51, 51.67), (86.50, 56.77, 51.73), (86.93, 57.16, 52.00)),
            "cifar100": ((63.25, 33.25, 28.26), (65.52, 33.79, 28.37), (66.20, 35.25, 29.50)),
            "dtd": ((52.99, 27.36, 23.35), (54.22, 28.94, 23.88), (53.35, 30.21, 25.59)),
            "dogs": ((62.68, 24.87, 12.73), (63.64, 24.98, 14.41), (62.33, 25.32, 17.44)),
            "cub": ((57.27, 28.37, 23.09), (63.58, 29.60, 23.71), (62.78, 31.07, 24.40)),
            "caltech256": ((66.78, 47.76, 42.17), (69.41, 47.79, 42.27), (69.85, 47.82, 42.63)),
        }.items()
    }
}

# The paper's settings for ImageNet backbones. Batch size and validation share are those of one device.
SETTINGS: dict[str, Any] = {
    "num_train_epochs": 60,
    "per_device_train_batch_size": 128,
    "weight_decay": 1e-4,
    "eps": "8/255",
    "attack_steps": 10,
    "attack_step_size": "2/255",
    "eval_attack_steps": 10,
    "validation_fraction": 0.05,
    # The default bounds it to save time.
    "max_validation_images": None,
    # Of 32 pixels: shifted by up to 4 over black and mirrored.
    "augmentation": "wide-crop-flip",
    # A figure with images left out would not be the paper's.
    "broken_images": "raise",
}
# What TWINS' code says for single tasks: weight of the Frozen net and weight decay. The others have its defaults.
_TWINS = {"cifar10": (1.0, 1e-5), "cifar100": (1.0, 1e-5), "caltech256": (0.4, 1e-3)}


@dataclass(frozen=True)
class Cell:
    """One training and its measurement."""

    data_set: str
    backbone: str
    method: str
    seed: int

    def folder(self, runs: Path) -> Path:
        return runs / self.data_set / self.backbone / self.method / f"seed-{self.seed}"

    def settings(self) -> dict[str, Any]:
        """Training arguments of the paper."""
        chosen = {**SETTINGS, "objective": self.method, "seed": self.seed}
        if self.method == "twins-trades" and self.data_set in _TWINS:
            weight, chosen["weight_decay"] = _TWINS[self.data_set]
            chosen["objective_kwargs"] = {"weight": weight}
        return chosen

    def __str__(self) -> str:
        return f"{self.data_set}, {self.backbone}, {self.method}, seed {self.seed}"


def cells(
    data_sets: Sequence[str], backbones: Sequence[str], methods: Sequence[str], seeds: Sequence[int]
) -> Iterator[Cell]:
    for backbone in backbones:
        for data_set in data_sets:
            for method in methods:
                for seed in seeds:
                    yield Cell(data_set, backbone, method, seed)


def counts(data_set: DataSet) -> dict[str, Any]:
    """The numbers by which two descriptions are of the same data."""
    fields = ("classes", "images", "train", "test", "image_size", "train_per_class")
    return {name: value for name, value in dataclasses.asdict(data_set).items() if name in fields}


def deviations(result: Mapping[str, Any], official: DataSet) -> list[str]:
    """In which way a run is not the paper's, besides what holds for all of them; empty if in none."""
    changed = ((name, f"{x:g}" if isinstance(x, float) else x) for name, x in sorted(result["changed"].items()))
    notes = [f"`{name} = {value}`" for name, value in changed]
    expected = counts(official)
    other = [f"{name} {value}" for name, value in result["counts"].items() if expected.get(name) != value]
    if other:
        notes.append(f"other data: {', '.join(other)}")
    if result["model_args"]:
        notes.append(f"other network: {result['model_args']}")
    return notes
