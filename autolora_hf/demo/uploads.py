"""Files of visitors: read within bounds, or refused with a reason that they understand."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..data.images import BrokenImageError, PixelTransform, decode_image
from ..pixels import Preprocessing


MOST_BYTES = 20 << 20
# 120 MB as RGB. Photos of phones have up to 50 million in files that are larger than MOST_BYTES.
MOST_PIXELS = 40_000_000
# Others that PIL knows are rare, and some run programs: EPS is drawn by Ghostscript.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")


@dataclass(frozen=True, eq=False)
class Upload:
    """An image of a visitor as the models see it.

    Args:
        pixels (`Tensor`): 3 x H x W in [0, 1].
        notes (`list[str]`): What was done to it that one may not expect, in sentences.
    """

    pixels: Tensor
    notes: list[str]


def read_upload(path: str | Path, preprocessing: Preprocessing) -> Upload:
    """Reads an image file of a stranger.

    Its header is read first: what is too large, or of a format that is not among the common ones, is never decoded.

    Args:
        path (`str`): The file.
        preprocessing (`Preprocessing`): Of the models.

    Raises:
        ValueError: If it is no image, damaged, too large or of an uncommon kind; the message is for the visitor.
    """
    data = Path(path).read_bytes()
    if len(data) > MOST_BYTES:
        raise ValueError(f"The file has {len(data) / 2**20:.0f} MB; at most {MOST_BYTES >> 20} MB are read.")
    try:
        with warnings.catch_warnings():
            # About numbers of pixels that are allowed here.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            notes = _checked_header(data)
            image = decode_image(data)
        pixels = PixelTransform(preprocessing)(image, "The file")
    except (BrokenImageError, ValueError, MemoryError) as error:
        raise ValueError(_sentence(error)) from error
    height, width = preprocessing.image_size
    if image.width < width or image.height < height:
        notes.append(f"It has only {image.width} x {image.height} pixels and was enlarged to {width} x {height}.")
    if preprocessing.crop_mode == "center" and max(image.size) > 2 * min(image.size):
        notes.append("It is more than twice as long as wide: the models see its middle part alone.")
    return Upload(pixels, notes)


def read_example(image: Image.Image, preprocessing: Preprocessing, name: str | None = None) -> Upload:
    """An image that the page offers; `name` is that of its class, if it is known."""
    notes = [] if name is None else [f"This example is labelled {name}."]
    return Upload(PixelTransform(preprocessing)(image), notes)


def _checked_header(data: bytes) -> list[str]:
    """Notes on an image file whose header says that it may be decoded."""
    try:
        header = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        decode_image(data)  # says what is wrong
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(f"it has too many pixels; at most {MOST_PIXELS:,} are read") from error
    except Exception as error:  # readers of headers stumble with errors of every kind
        raise BrokenImageError(f"it is damaged ({type(error).__name__}: {error})") from error
    with header:
        if header.format not in FORMATS:
            known = "PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF"
            raise ValueError(f"its format {header.format} is not read here; save it as {known}")
        if header.width * header.height > MOST_PIXELS:
            raise ValueError(
                f"it has {header.width:,} x {header.height:,} pixels, more than the {MOST_PIXELS:,} that are read"
            )
        if header.mode == "F":
            raise ValueError("its pixels are numbers of unknown range; save it as an 8-bit image")
        # Stereo cameras and phones keep further views in a photo, which nobody takes for an animation.
        is_animation = getattr(header, "is_animated", False) and header.format != "MPO"
        notes = ["It has several frames or pages: the first one is used."] if is_animation else []
        if header.has_transparency_data:
            notes.append("Transparent parts are shown to the models as white.")
        if header.mode == "CMYK":
            notes.append("It was converted from CMYK to RGB, without its colour profile.")
        if header.mode.startswith("I"):
            notes.append("Its 16-bit grey values were scaled to 8 bits.")
    return notes


def _sentence(error: Exception) -> str:
    text = str(error).replace("`The file`", "The file").strip() or "it could not be decoded"
    if text.startswith("The file"):
        return text
    return f"The file cannot be used: {text.rstrip('.')}."
