"""Tiny models of real architectures, one of each kind the package supports, for tests that run on all of them."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from autolora_hf import AutoLoraConfig, Preprocessing, get_autolora_model


IMAGE_SIZE = 32


@dataclass(frozen=True)
class TinyModel:
    """How to build a model, and what it expects of an image.

    Args:
        build: Takes the number of classes.
        preprocessing: Of IMAGE_SIZE pixels.
        head: Name of the classification layer.
        batch_norm: Whether it has BatchNorm; else it has LayerNorm.
    """

    build: Callable[[int], nn.Module]
    preprocessing: Preprocessing
    head: str
    batch_norm: bool

    def fresh(self, num_classes: int = 4, seed: int = 0) -> nn.Module:
        """A new instance in eval mode; equal seeds give equal weights and statistics, none of them at its default."""
        return copy.deepcopy(_fresh(self, num_classes, seed))

    def adapted(self, num_classes: int = 4, seed: int = 0, **config):
        """An `AutoLoraModel` of a fresh instance, deterministic too."""
        return copy.deepcopy(_adapted(self, num_classes, seed, json.dumps(config)))


# Cached, since building a model takes longer than most tests.
@cache
def _fresh(tiny, num_classes, seed):
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = tiny.build(num_classes)
        # Libraries start norms at one and zero, and some residual branches and heads at zero.
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer += 0.1 * torch.randn_like(buffer)
            elif name.endswith("running_var"):
                buffer *= 0.5 + torch.rand_like(buffer)
    return model.eval()


@cache
def _adapted(tiny, num_classes, seed, config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network, config = tiny.fresh(num_classes, seed), AutoLoraConfig(**json.loads(config))
        return get_autolora_model(network, config, preprocessing=tiny.preprocessing)


def _timm_resnet(num_classes):
    return timm.create_model("test_resnet", num_classes=num_classes)


def _timm_vit(num_classes):
    return timm.create_model("test_vit", num_classes=num_classes, img_size=IMAGE_SIZE, depth=2)


def _hf_resnet(num_classes):
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=num_classes)
    )


def _hf_vit(num_classes):
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=IMAGE_SIZE,
            patch_size=8,
            num_labels=num_classes,
        )
    )


IMAGENET = Preprocessing((IMAGE_SIZE, IMAGE_SIZE), crop_pct=1.0)
HALF = Preprocessing((IMAGE_SIZE, IMAGE_SIZE), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop_pct=1.0)

MODELS = {
    "timm_resnet": TinyModel(_timm_resnet, IMAGENET, "fc", batch_norm=True),
    "timm_vit": TinyModel(_timm_vit, HALF, "head", batch_norm=False),
    "hf_resnet": TinyModel(_hf_resnet, IMAGENET, "classifier.1", batch_norm=True),
    "hf_vit": TinyModel(_hf_vit, HALF, "classifier", batch_norm=False),
}
MODES = ("full", "adapter")
LAYOUTS = ("released", "peft")
NORMS = ("shared", "robust_stats", "dual")

# Every combination that exists: models without BatchNorm have only `norm="shared"`.
VARIANTS = [
    (name, mode, layout, norm)
    for name, tiny in MODELS.items()
    for mode in MODES
    for layout in LAYOUTS
    for norm in (NORMS if tiny.batch_norm else NORMS[:1])
]


def pixels(count: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random images in [0, 1]."""
    return torch.rand(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def save_colours(root: Path, **counts: int) -> None:
    """Noisy images of three colours by class, so many of each in a folder for every split."""
    random = np.random.default_rng(0)
    for split, count in counts.items():
        for channel, name in enumerate(("red", "green", "blue")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                array = random.integers(0, 80, (32, 32, 3), dtype=np.uint8)
                array[..., channel] += 150
                Image.fromarray(array).save(folder / f"{index}.png")


def change_everything(model, seed: int = 1) -> None:
    """Moves every trainable parameter, and BatchNorm statistics through a training pass of each route."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        model.train()
        for route in reversed(model.routes):
            model.pixel_space(route)(pixels(8, seed + 1, next(model.parameters()).dtype))
    model.eval()
