"""Common corruptions (Hendrycks and Dietterich, ICLR 2019): noise, blur, weather and digital faults of images.

The images are made by `imagecorruptions-imaug` (Apache-2.0), the maintained fork of the field's `imagecorruptions`, in
whose last release, of 2020, fog and two blurs fail with today's numpy and scikit-image. Of the others, corrupt-tta has
impulse noise that cannot be seeded; kornia, torchvision and albumentations (its successor is AGPL) have some of the
kinds on scales of their own, imgaug ended in 2020, and robustbench pins an old timm.

Every corruption is defined for every image of at least `MIN_SIZE` pixels a side, so none is left out of small ones.
Three things to know before comparing figures:

- The severities are those of ImageNet-C, made for 224 pixels. Blur kernels, motion, fog and frost do not shrink with
  the image, so that at 32 pixels the same severity is far stronger, and stronger than in CIFAR-10-C, which was made
  with settings of its own.
- ImageNet-C itself is a set of JPEG files, made with ImageMagick and another elastic transform. What is measured here
  is close to it, not equal.
- The benchmark's mCE divides each error by that of AlexNet on ImageNet-C. On other data there is no such divisor, so
  it is not computed: [`summarised`] gives mean accuracies and their ratio to the clean one.
"""

from __future__ import annotations

import difflib
import inspect
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..pixels import check_pixels
from .autoattack import isolated_random_state


# The benchmark, in its order: three of noise, four of blur, four of weather, four digital ones.
CORRUPTIONS: tuple[str, ...] = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
# Those its authors offer for choosing a method or its settings, so that the fifteen above stay unseen.
VALIDATION_CORRUPTIONS: tuple[str, ...] = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
SEVERITIES: tuple[int, ...] = (1, 2, 3, 4, 5)
# Far smaller ones leave glass blur no pixels to shuffle between its margins, and pixelate none at all.
MIN_SIZE = 16

INSTALL = 'pip install "autolora-hf[corruptions]"'
# These two have generators of their own, which a seed of NumPy does not reach.
_SEEDED = ("glass_blur", "impulse_noise")


def corrupted(pixels: Tensor, name: str, severity: int, seed: int, keys: Sequence[int]) -> Tensor:
    """Images with one corruption: N x C x H x W in [0, 1], of the shape, dtype and device of `pixels`.

    As in the benchmark, images are 8-bit before and after. What is random (the noise, the angle of a motion, the
    frost) depends on `seed`, `name`, `severity` and the image's key alone: equal calls give equal images, whatever
    else is in the batch. The global random states are left as they were.

    Grey images get noise of one channel, and the luminance of everything else.

    Args:
        pixels (`Tensor`): Images, float, in [0, 1], with 3 channels or 1, of at least `MIN_SIZE` pixels a side.
        name (`str`): One of `CORRUPTIONS` or `VALIDATION_CORRUPTIONS`.
        severity (`int`): 1 to 5.
        seed (`int`): Of the evaluation.
        keys (`Sequence[int]`): What identifies each image, N, not negative: its position in the data set.

    Raises:
        ModuleNotFoundError: If the library is missing, or the package that it replaces is installed.
        TypeError: If `pixels` is no float tensor.
        ValueError: If the images, the name, the severity or the keys are not as described.
    """
    check_corruption(name, severity)
    check_pixels(pixels)
    check_corruptible(pixels)
    if len(keys) != len(pixels) or min(keys) < 0:
        raise ValueError(f"`keys` must be {len(pixels)} integers of at least 0, one an image, got {list(keys)[:8]}.")
    corrupt = load_library()[name]
    images = (pixels.detach().float().cpu() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    with isolated_random_state(seed):
        results = [
            _corrupt(corrupt, image, name, severity, (seed % 2**64, zlib.crc32(name.encode()), severity, int(key)))
            for image, key in zip(images, keys, strict=True)
        ]
    return (torch.from_numpy(np.stack(results)).permute(0, 3, 1, 2).float() / 255).to(pixels).contiguous()


def check_corruptible(pixels: Tensor) -> None:
    """Raises `ValueError` unless corruptions are defined for images of this shape, N x C x H x W."""
    channels, height, width = pixels.shape[1:]
    if channels not in (1, 3):
        raise ValueError(f"Corruptions need images with 3 channels, or 1 if grey, got {channels}.")
    if min(height, width) < MIN_SIZE:
        raise ValueError(
            f"Corruptions need images of at least {MIN_SIZE} x {MIN_SIZE} pixels, got {height} x {width}."
        )


def check_corruption(name: str, severity: int) -> None:
    """Raises `ValueError` unless there is such a corruption and severity."""
    known = (*CORRUPTIONS, *VALIDATION_CORRUPTIONS)
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(known)}."
        raise ValueError(f"There is no corruption {name!r}. {hint}")
    if isinstance(severity, bool) or severity not in SEVERITIES:
        raise ValueError(f"`severity` must be an integer from 1 to 5, got {severity!r}.")


def load_library() -> dict[str, Callable[..., Any]]:
    """The library's functions by name. Raises `ModuleNotFoundError` with the command that installs it."""
    try:
        from imagecorruptions import corruption_dict
    except ImportError as error:
        # OpenCV is there and still cannot be imported where the machine lacks the libraries of a display.
        raise ModuleNotFoundError(
            f"Corruptions need the package imagecorruptions-imaug: `{INSTALL}` ({error}). If a shared library such as "
            "libGL is missing, replace opencv-python by opencv-python-headless."
        ) from error
    if "seed" not in inspect.signature(corruption_dict["glass_blur"]).parameters:
        raise ModuleNotFoundError(
            "The package imagecorruptions is installed, which does not run with numpy 2 and hides the one that "
            f"replaces it: `pip uninstall imagecorruptions`, then `{INSTALL}`."
        )
    return corruption_dict


@dataclass(frozen=True)
class CorruptionSummary:
    """Accuracies on corrupted images, all in [0, 1]; `dataclasses.asdict` gives JSON types.

    Attributes:
        clean_accuracy (`float`): On the same images without a corruption.
        mean_accuracy (`float`): Mean of `by_corruption`: over all corruptions and severities.
        relative_accuracy (`float`, *optional*): `mean_accuracy` / `clean_accuracy`; `None` if that is 0. May exceed 1.
        severities (`list[int]`): Which were measured, of every corruption.
        by_corruption (`dict[str, float]`): Mean over the severities.
    """

    clean_accuracy: float
    mean_accuracy: float
    relative_accuracy: float | None
    severities: list[int]
    by_corruption: dict[str, float]


def summarised(accuracies: Mapping[tuple[str, int], float], clean_accuracy: float) -> CorruptionSummary:
    """Mean accuracies over severities and over corruptions, each corruption with the same weight.

    There is no mCE: it divides by the errors of AlexNet, which are known for ImageNet-C alone.

    Args:
        accuracies (`Mapping[tuple[str, int], float]`): By corruption and severity, in [0, 1].
        clean_accuracy (`float`): On the same images, in [0, 1].

    Raises:
        ValueError: If there are no accuracies, one is not in [0, 1], a corruption or severity does not exist, or not
            all corruptions have the same severities, whose means would not be comparable.
    """
    if not accuracies:
        raise ValueError("`accuracies` is empty.")
    for (name, severity), accuracy in accuracies.items():
        check_corruption(name, severity)
        _check_accuracy(accuracy, f"The accuracy under {name}, severity {severity},")
    _check_accuracy(clean_accuracy, "`clean_accuracy`")
    names = list(dict.fromkeys(name for name, _ in accuracies))
    severities = sorted({severity for _, severity in accuracies})
    missing = [f"{name} {severity}" for name in names for severity in severities if (name, severity) not in accuracies]
    if missing:
        raise ValueError(f"Every corruption needs the same severities, {severities}; missing: {', '.join(missing)}.")
    by_corruption = {
        name: math.fsum(accuracies[name, severity] for severity in severities) / len(severities) for name in names
    }
    mean = math.fsum(by_corruption.values()) / len(by_corruption)
    relative = mean / clean_accuracy if clean_accuracy > 0 else None
    return CorruptionSummary(clean_accuracy, mean, relative, severities, by_corruption)


def _check_accuracy(value: float, what: str) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{what} must be in [0, 1], got {value!r}.")


def _corrupt(
    corrupt: Callable[..., Any], image: np.ndarray, name: str, severity: int, entropy: tuple[int, ...]
) -> np.ndarray:
    """One image, H x W x C in 8 bits, with a corruption whose random numbers follow from `entropy`."""
    numbers = np.random.SeedSequence(entropy).generate_state(5)
    # The library draws from NumPy's global generator.
    np.random.seed(numbers[:4])
    options = {"seed": int(numbers[4])} if name in _SEEDED else {}
    is_grey = image.shape[2] == 1
    # Of grey images, the library's blurs blur along one axis alone, so they are given three equal channels. The
    # luminance of three channels of noise would be weaker than the noise asked for.
    on_one_channel = is_grey and name.endswith("_noise")
    source = image[..., 0] if on_one_channel else np.repeat(image, 3, axis=2) if is_grey else image
    # In small images it happens that no drop of the spatter falls, and the library divides by the largest one.
    with np.errstate(invalid="ignore"):
        # Not through the library's `corrupt`, which refuses images below 32 pixels and makes grey ones coloured.
        found = np.asarray(corrupt(Image.fromarray(source), severity, **options))
    if found.dtype != np.uint8:
        # Other values are in [0, 255]; decimals are cut off, as in its own `corrupt`.
        found = np.where(np.isnan(found), source, found).astype(np.uint8)
    if is_grey and not on_one_channel:
        found = np.asarray(Image.fromarray(found).convert("L"))
    return found.reshape(image.shape)
