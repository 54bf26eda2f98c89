"""One image of any common kind to a float pixel tensor of the size a model was built for."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from ..pixels import Preprocessing, check_pixels


Augmentation = Literal["none", "crop", "crop-flip"]

# Above this size images are photos that were resized to fit; up to it they usually have their native size, and the
# recipes of CIFAR-like data apply.
_LARGEST_PADDED_SIZE = 64

# Share of the image's area that the random crop of a photo keeps. Milder than the 0.08 of natural training: robust
# fine-tuning is short, and the evaluation crop of 0.875 x 0.875 lies in the middle of this range.
_CROP_SCALE = (0.7, 1.0)


class PixelTransform:
    """Turns a PIL image, an array or a tensor into float32 pixels 3 x H x W in [0, 1].

    PIL images and uint8 arrays are converted to RGB (see [`to_rgb`]) and resized and cropped as the checkpoint's own
    evaluation transform does. Float tensors and arrays must have the right size already.

    Args:
        preprocessing (`Preprocessing`): Size, filter and crop.
        augmentation (`str`): `"none"` is the evaluation transform, which is deterministic. `"crop"` shifts the image
            by up to an eighth of its size (4 pixels of 32) and repeats its border, which suits digits and text, where
            a mirror image means something else. `"crop-flip"` adds a horizontal flip; up to 64 pixels it shifts over
            a black border (the CIFAR recipe), above it crops 70 to 100 % of the original image's area. Randomness
            comes from torch's global generator.

    Raises:
        ValueError: If `augmentation` is unknown.
    """

    def __init__(self, preprocessing: Preprocessing, augmentation: Augmentation = "none") -> None:
        if augmentation not in get_args(Augmentation):
            options = ", ".join(repr(option) for option in get_args(Augmentation))
            raise ValueError(f"`augmentation` must be one of {options}, got {augmentation!r}.")
        self.preprocessing = preprocessing
        self.augmentation = augmentation
        self._evaluation = preprocessing.evaluation_transform()
        self._shift: nn.Module | None = None
        self._resized_crop: nn.Module | None = None
        size = preprocessing.image_size
        if augmentation == "crop-flip" and max(size) > _LARGEST_PADDED_SIZE:
            # The other filters of PIL do not exist for tensors.
            name = preprocessing.interpolation
            mode = InterpolationMode(name if name in ("nearest", "bilinear") else "bicubic")
            self._resized_crop = v2.RandomResizedCrop(size, scale=_CROP_SCALE, interpolation=mode)
        elif augmentation != "none":
            padding = [max(1, round(size[1] / 8)), max(1, round(size[0] / 8))]
            border = "constant" if augmentation == "crop-flip" else "edge"
            self._shift = v2.RandomCrop(size, padding=padding, padding_mode=border)
        self._flip = v2.RandomHorizontalFlip() if augmentation == "crop-flip" else None

    def __call__(self, image: Any, name: str = "image") -> Tensor:
        """Returns float32 pixels 3 x H x W in [0, 1].

        Args:
            image: A PIL image, a uint8 array H x W or H x W x C, or a float tensor or array C x H x W in [0, 1] with
                1 or 3 channels.
            name (`str`): What to call it in messages.

        Raises:
            TypeError: If it is something else, for instance a uint8 tensor.
            ValueError: If its shape, size or value range is wrong.
        """
        if isinstance(image, np.ndarray):
            image = _from_array(image, name)
        if isinstance(image, Image.Image):
            image = to_rgb(image, name)
            if self._resized_crop is not None:
                pixels = v2.functional.pil_to_tensor(self._resized_crop(image))
            else:
                pixels = self._evaluation(image)
            pixels = pixels.float() / 255
        else:
            pixels = self._checked_tensor(image, name)
            if self._resized_crop is not None:
                pixels = self._resized_crop(pixels).clamp(0, 1)  # bicubic overshoots
        for augment in (self._shift, self._flip):
            if augment is not None:
                pixels = augment(pixels)
        return pixels

    def _checked_tensor(self, image: Any, name: str) -> Tensor:
        if not isinstance(image, Tensor):
            raise TypeError(
                f"`{name}` must be a PIL image, a uint8 array H x W x C or a float tensor 3 x H x W in [0, 1], "
                f"got {type(image).__name__}."
            )
        if image.ndim != 3 or image.shape[0] not in (1, 3):
            alpha = image.ndim == 3 and image.shape[0] == 4
            raise ValueError(
                f"`{name}` must be a tensor 3 x H x W (or 1 x H x W, grey), got shape {tuple(image.shape)}."
                + (" Drop or blend its fourth channel, or give a PIL image, whose alpha is known." if alpha else "")
            )
        check_pixels(image.detach()[None], name, self.preprocessing.image_size)
        return image.detach().float().clamp(0, 1).expand(3, -1, -1)


def to_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """Converts a PIL image of any mode to RGB, upright.

    Grey, palette, bilevel and CMYK images are converted as PIL does. Transparent images are blended onto white: the
    colour that a file stores under transparent pixels is arbitrary. 16-bit grey images are scaled to 8 bits, where
    PIL alone would clip them. An EXIF orientation is applied.

    Raises:
        ValueError: For PIL's mode `F`, whose value range is unknown.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        low, high = image.getextrema()
        raise ValueError(
            f"`{name}` is a float image (PIL mode 'F') with values from {low:.4g} to {high:.4g}, whose range means "
            "nothing by itself. Give a float tensor in [0, 1] or an 8-bit image."
        )
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float32) / 257  # 65535 / 255
        image = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_array(array: np.ndarray, name: str) -> Image.Image | Tensor:
    if array.dtype != np.uint8:
        if not np.issubdtype(array.dtype, np.floating):
            raise TypeError(f"`{name}` must be an array of uint8 or of floats in [0, 1], got {array.dtype}.")
        return torch.tensor(np.ascontiguousarray(array))
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))) or array.size == 0:
        raise ValueError(f"`{name}` must be a uint8 array H x W, H x W x 3 or H x W x 4, got shape {array.shape}.")
    return Image.fromarray(array)
