"""One image of any common kind to a float pixel tensor of the size a model was built for."""

from __future__ import annotations

import errno
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from ..pixels import Preprocessing, check_pixels


Augmentation = Literal["none", "crop", "crop-flip", "wide-crop-flip"]

# Above this size images are photos that were resized to fit; up to it they usually have their native size, and the
# recipes of CIFAR-like data apply.
_LARGEST_PADDED_SIZE = 64

# Share of the image's area that the random crop of a photo keeps. Milder than the 0.08 of natural training: robust
# fine-tuning is short, and the evaluation crop of 0.875 x 0.875 lies in the middle of this range.
_CROP_SCALE = (0.7, 1.0)
_WIDE_CROP_SCALE = (0.08, 1.0)

# Times the aspect of the result. A centre crop of a longer image makes the same pixels from its middle part, without
# scaling up the rest: a strip of 20,000 x 1 pixels would take 3 GB on its way to 224 x 224.
_LONGEST_ASPECT = 16

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_FIELDS = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")

# Files of these errors will not come back by themselves; any other error of the storage may pass.
_ABSENT = (errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ENOTDIR)


class BrokenImageError(ValueError):
    """An image that is missing, empty, damaged or of a format that nothing here reads."""


class PixelTransform:
    """Turns a PIL image, an array or a tensor into float32 pixels 3 x H x W in [0, 1].

    PIL images and uint8 arrays are converted to RGB (see [`to_rgb`]) and resized and cropped as the checkpoint's own
    evaluation transform does. Float tensors and arrays must have the right size already.

    Args:
        preprocessing (`Preprocessing`): Size, filter and crop.
        augmentation (`str`): `"none"` is the evaluation transform, which is deterministic. `"crop"` shifts the image
            by up to an eighth of its size (4 pixels of 32) and repeats its border, which suits digits and text, where
            a mirror image means something else. `"crop-flip"` adds a horizontal flip; up to 64 pixels it shifts over
            a black border (the CIFAR recipe), above it crops 70 to 100 % of the original image's area.
            `"wide-crop-flip"` crops 8 to 100 % there, as natural training and AutoLoRa's released code do. Randomness
            comes from torch's global generator, which [`PixelDataset`] seeds for every image.

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
        flips = augmentation in ("crop-flip", "wide-crop-flip")
        if flips and max(size) > _LARGEST_PADDED_SIZE:
            # The other filters of PIL do not exist for tensors.
            name = preprocessing.interpolation
            mode = InterpolationMode(name if name in ("nearest", "bilinear") else "bicubic")
            scale = _WIDE_CROP_SCALE if augmentation == "wide-crop-flip" else _CROP_SCALE
            self._resized_crop = v2.RandomResizedCrop(size, scale=scale, interpolation=mode)
        elif augmentation != "none":
            padding = [max(1, round(size[1] / 8)), max(1, round(size[0] / 8))]
            border = "constant" if flips else "edge"
            self._shift = v2.RandomCrop(size, padding=padding, padding_mode=border)
        self._flip = v2.RandomHorizontalFlip() if flips else None

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
            image = self._middle(to_rgb(image, name))
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

    def _middle(self, image: Image.Image) -> Image.Image:
        """The part of a very long image that the crop can show, with room to spare."""
        size = self.preprocessing.image_size
        longest = _LONGEST_ASPECT * min(image.size) * max(size) // min(size)
        if self.preprocessing.crop_mode != "center" or max(image.size) <= longest:
            return image
        margin = (max(image.size) - longest) // 2
        horizontal = image.width > image.height
        left, top = (margin, 0) if horizontal else (0, margin)
        return image.crop((left, top, image.width - left, image.height - top))

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
    PIL alone would clip them. An EXIF orientation is applied; damaged EXIF data are ignored. Of an animation, the
    current frame is taken, which is the first after opening.

    Raises:
        ValueError: For PIL's mode `F`, whose value range is unknown, and integers of more than 16 bits.
        BrokenImageError: For a mode that PIL cannot convert, such as `La`.
    """
    image = _upright(image)
    if image.mode == "F" or image.mode.startswith("I"):
        low, high = cast(tuple[float, float], image.getextrema())  # it has one channel
        if image.mode == "F" or low < 0 or high > 65535:
            kind = "a float image" if image.mode == "F" else "an integer image of more than 16 bits"
            raise ValueError(
                f"`{name}` is {kind} (PIL mode {image.mode!r}) with values from {low:.6g} to {high:.6g}, whose range "
                "means nothing by itself. Give a float tensor in [0, 1] or an 8-bit image."
            )
        image = _from_16_bits(image)
    try:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:
        raise BrokenImageError(f"`{name}` cannot be converted from PIL mode {image.mode!r} to RGB: {error}") from error


def decode_image(data: bytes) -> Image.Image:
    """Reads all of an image file that is in memory; of an animation, the first frame.

    Raises:
        BrokenImageError: If it is empty, damaged, too large or of an unknown format, with the reason.
    """
    if not data:
        raise BrokenImageError("it is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        return image
    except UnidentifiedImageError as error:
        raise BrokenImageError(_unknown_format(data)) from error
    except Exception as error:  # decoders stumble over damaged files with errors of every kind
        raise BrokenImageError(f"it is damaged or too large ({type(error).__name__}: {error})") from error


def decode_file(path: str | Path) -> Image.Image:
    """[`decode_image`] of a file; messages name it.

    Raises:
        BrokenImageError: As [`decode_image`], and if there is no such file or it may not be read.
        OSError: If the storage fails in another way, which says nothing about the image.
    """
    try:
        return decode_image(Path(path).read_bytes())
    except BrokenImageError as error:
        raise BrokenImageError(f"{path}: {error}") from error.__cause__
    except OSError as error:
        raise as_broken(error) from error


def as_broken(error: Exception) -> Exception:
    """What an error of reading one image means: a [`BrokenImageError`], or itself for a failure of the storage."""
    number = getattr(error, "errno", None)
    if isinstance(error, BrokenImageError) or (number is not None and number not in _ABSENT):
        return error
    return BrokenImageError(str(error) or type(error).__name__)


def check_readable(image: Any) -> None:
    """Decodes a PIL image that may only have been opened. Raises `BrokenImageError` if it cannot, and for `None`."""
    if image is None:
        raise BrokenImageError("there is no image (None)")
    if isinstance(image, Image.Image):
        try:
            image.load()
        except Exception as error:
            raise as_broken(error) from error


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Inside, torch's global CPU generator starts from `key` (not negative); afterwards it is as it was before."""
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))
    try:
        yield
    finally:
        generator.set_state(state)


def _upright(image: Image.Image) -> Image.Image:
    try:
        method = _UPRIGHT.get(cast(int, image.getexif().get(ExifTags.Base.Orientation)))
    except Exception:  # the reader of EXIF data raises errors of every kind; the pixels are what matters
        return image
    if method is None:
        return image
    image = image.transpose(method)
    for field in _EXIF_FIELDS:  # or it would be turned again
        image.info.pop(field, None)
    return image


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    grey = (values.astype(np.float32) / 257).round().astype(np.uint8)  # 65535 / 255
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def _unknown_format(data: bytes) -> str:
    if data[4:8] == b"ftyp":
        brand = data[8:12].decode("latin-1")
        return (
            f"its format (HEIF, brand {brand!r}) needs a decoder: install pillow-heif and call "
            "`pillow_heif.register_heif_opener()`, or convert the images"
        )
    start = data[:12]
    return f"it is no image of a known format (it starts with {start!r})"


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
