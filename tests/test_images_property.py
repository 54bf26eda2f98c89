"""Image files of every kind, whole and damaged: converted to the right pixels, or refused by name.

More inputs than by default: `AUTOLORA_PROPERTY_EXAMPLES=5000 pytest tests/test_images_property.py
--hypothesis-show-statistics`.
"""

import io
import os
import warnings

import datasets
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from autolora_hf.data import BrokenImageError, PixelTransform, as_pixel_dataset, find_broken, to_rgb
from autolora_hf.data.images import decode_image
from autolora_hf.pixels import Preprocessing


EXAMPLES = int(os.environ.get("AUTOLORA_PROPERTY_EXAMPLES", "60"))
many = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES <= 100,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
)

# How far the rounding of PIL's blending and of CMYK may be from exact arithmetic, in 1/255.
ROUNDING = 1
FORMATS = {
    "L": ("PNG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000"),
    "1": ("PNG", "TIFF", "BMP"),
    "LA": ("PNG", "TIFF"),
    "RGB": ("PNG", "TIFF", "BMP", "WEBP", "PPM", "JPEG2000", "TGA"),
    "RGBA": ("PNG", "TIFF", "WEBP", "TGA"),
    "P": ("PNG", "GIF", "BMP", "TIFF"),
    "I;16": ("PNG", "TIFF"),
    "CMYK": ("TIFF",),
}
WITH_EXIF = ("PNG", "TIFF", "WEBP")
TURNED = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}

sides = st.integers(1, 24)
seeds = st.integers(0, 2**32 - 1)


def on_white(colour, alpha):
    alpha = alpha[..., None] / 255
    return colour * alpha + 255 * (1 - alpha)


def grey(values):
    return np.repeat(values[..., None], 3, axis=2).astype(float)


def make(mode, height, width, seed, transparency=None):
    """A random image of a mode, and its pixels in RGB by arithmetic of our own, H x W x 3 in 0 .. 255."""
    draw = np.random.default_rng(seed)
    values = draw.integers(0, 256, (height, width, 4), dtype=np.uint8)
    if mode == "L":
        return Image.fromarray(values[..., 0]), grey(values[..., 0])
    if mode == "1":
        bits = values[..., 0] > 127
        return Image.fromarray(bits), grey(bits * 255)
    if mode == "LA":
        return Image.fromarray(values[..., :2].copy(), "LA"), on_white(grey(values[..., 0]), values[..., 1])
    if mode == "RGB":
        return Image.fromarray(values[..., :3].copy()), values[..., :3].astype(float)
    if mode == "RGBA":
        return Image.fromarray(values), on_white(values[..., :3], values[..., 3])
    if mode == "I;16":
        wide = draw.integers(0, 65536, (height, width), dtype=np.uint16)
        return Image.fromarray(wide), grey(np.round(wide / 257))
    if mode == "CMYK":
        ink = 255.0 - values
        return Image.fromarray(values, "CMYK"), ink[..., :3] * ink[..., 3:] / 255
    palette = draw.integers(0, 256, (256, 3), dtype=np.uint8)
    image = Image.fromarray(values[..., 0], "P")
    image.putpalette(palette.tobytes())
    alpha = np.full(256, 255, np.uint8)
    if transparency == "one":
        index = int(values[0, 0, 0])
        alpha[index] = 0
        image.info["transparency"] = index
    elif transparency == "each":
        alpha = draw.integers(0, 256, 256, dtype=np.uint8)
        image.info["transparency"] = alpha.tobytes()
    return image, on_white(palette[values[..., 0]], alpha[values[..., 0]])


def encode(image, kind, **options):
    buffer = io.BytesIO()
    if kind == "WEBP":
        options |= {"lossless": True, "exact": True}
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def stored_in_arrow(data, label=0):
    """A data set of encoded images, however broken."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = [{"bytes": item, "path": None} for item in data]
    return datasets.Dataset.from_dict({"image": rows, "label": [label] * len(rows)}, features=features)


def assert_pixels(image, expected, tolerance=ROUNDING):
    made = np.asarray(to_rgb(image))
    assert made.shape == expected.shape
    assert np.abs(made - expected).max() <= tolerance


@st.composite
def encoded_images(draw):
    mode = draw(st.sampled_from(sorted(FORMATS)))
    kind = draw(st.sampled_from(FORMATS[mode]))
    transparency = draw(st.sampled_from([None, "one", "each"])) if kind == "PNG" else None
    image, expected = make(mode, draw(sides), draw(sides), draw(seeds), transparency)
    orientation = draw(st.sampled_from(sorted(TURNED))) if kind in WITH_EXIF else 1
    options = {}
    if orientation != 1:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    return encode(image, kind, **options), TURNED[orientation](expected), kind


@many
@given(encoded_images())
def test_every_kind_of_file_gives_the_right_pixels(example):
    data, expected, kind = example
    if kind == "JPEG2000":
        assume(min(expected.shape[:2]) > 1)  # which its encoder refuses
    assert_pixels(decode_image(data), expected)
    transform = PixelTransform(Preprocessing((8, 8), crop_pct=1.0))
    item = as_pixel_dataset(stored_in_arrow([data]), transform.preprocessing)[0]["pixel_values"]
    assert item.shape == (3, 8, 8)
    assert item.dtype == torch.float32
    assert 0 <= item.min() <= item.max() <= 1
    assert torch.equal(item, transform(decode_image(data)))


@many
@given(st.sampled_from(["GIF", "WEBP", "PNG"]), st.integers(1, 3), sides, sides, seeds)
def test_the_first_frame_of_an_animation_is_taken(kind, frames, height, width, seed):
    images, expected = zip(*(make("L", height, width, seed + i) for i in range(frames)), strict=True)
    data = encode(images[0], kind, save_all=True, append_images=images[1:], duration=40)
    assert_pixels(decode_image(data), expected[0], tolerance=0)


@many
@given(sides, sides, seeds, st.booleans())
def test_tensors_and_arrays_give_their_own_values(height, width, seed, channels_last):
    image, expected = make("RGB", height, width, seed)
    transform = PixelTransform(Preprocessing((height, width), crop_pct=1.0))
    values = np.asarray(image)
    source = values if channels_last else torch.from_numpy(values.copy()).permute(2, 0, 1) / 255
    made = transform(source)
    assert torch.equal((made * 255).round(), torch.from_numpy(expected).permute(2, 0, 1).float())


@st.composite
def damaged_files(draw):
    data, _, _ = draw(encoded_images())
    for _ in range(draw(st.integers(1, 3))):
        how = draw(st.sampled_from(["cut", "flip", "zeros", "insert", "noise"]))
        at = draw(st.integers(0, max(0, len(data) - 1)))
        if how == "cut":
            data = data[:at]
        elif how == "flip" and data:
            data = data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :]
        elif how == "zeros":
            data = data[:at] + bytes(len(data) - at)
        elif how == "insert":
            data = data[:at] + draw(st.binary(min_size=1, max_size=8)) + data[at:]
        else:
            data = draw(st.binary(max_size=64))
    return data


# Headers that promise terabytes would only make the test slow; Pillow's own limit is 179 million pixels.
@many
@given(damaged_files())
def test_a_damaged_file_is_read_or_refused_by_name(data):
    source = as_pixel_dataset(stored_in_arrow([data]), Preprocessing((8, 8), crop_pct=1.0), name="train")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of truncated or over-large TIFF files and the like
        try:
            item = source[0]
        except BrokenImageError as error:
            assert "`image[0] of train` cannot be" in str(error)
            assert find_broken(source) == [0]
            return
        except ValueError as error:
            # A flipped bit can make a 32-bit or float image of an 8-bit one.
            assert "whose range means nothing" in str(error)
            return
    assert item["pixel_values"].shape == (3, 8, 8)
    assert torch.isfinite(item["pixel_values"]).all()
    assert find_broken(source) == []


@many
@given(st.integers(1, 40), seeds, st.sampled_from(["none", "crop", "crop-flip"]), st.sampled_from([8, 96]))
def test_very_long_images(short, seed, augmentation, size):
    """Up to 20,000 pixels long and down to 1 pixel wide, without the memory that the whole would take when scaled."""
    draw = np.random.default_rng(seed)
    long = int(draw.integers(1000, 20_001))
    values = draw.integers(0, 256, (short, long, 3), dtype=np.uint8)
    image = Image.fromarray(values if seed % 2 else values.swapaxes(0, 1).copy())
    made = PixelTransform(Preprocessing((size, size)), augmentation)(image)
    assert made.shape == (3, size, size)


# ---- single cases ----


def test_the_middle_of_a_long_image_is_what_the_whole_would_give():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 700, 3), dtype=np.uint8))
    preprocessing = Preprocessing((32, 32))
    whole = preprocessing.evaluation_transform()(image).float() / 255
    made = PixelTransform(preprocessing)(image)
    assert (made - whole).abs().max() <= 2 / 255


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it is empty (0 bytes)"),
        (b"a text file named .jpg", "no image of a known format (it starts with b'a text file ')"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIF, brand 'heic'"),
        (encode(make("RGB", 9, 9, 0)[0], "PNG")[:-40], "it is damaged"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no image of a known format"),
        # A GIF of 65,535 x 65,535 pixels.
        (b"GIF89a\xff\xff\xff\xff\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\xff\xff\xff\xff\0\x02\x02D\x01\0;", "too large"),
    ],
    ids=["empty", "text", "heic", "truncated", "svg", "bomb"],
)
def test_what_is_said_about_files_that_cannot_be_read(tmp_path, data, reason):
    (tmp_path / "cat").mkdir()
    path = tmp_path / "cat" / "0.jpg"
    path.write_bytes(data)
    for source in (stored_in_arrow([data]), tmp_path):
        with pytest.raises(BrokenImageError) as error:
            _ = as_pixel_dataset(source, Preprocessing((8, 8)), name="train")[0]
        assert "`image[0] of train` cannot be read" in str(error.value)
        assert reason in str(error.value)
        assert "object at 0x" not in str(error.value)
    assert str(path) in str(error.value)


def test_damaged_exif_data_do_not_matter():
    image, expected = make("RGB", 5, 7, 0)
    for exif in (b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x09", b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff"):
        assert_pixels(decode_image(encode(image, "PNG", exif=exif)), expected, tolerance=0)


def test_an_orientation_is_applied_once():
    image, expected = make("RGB", 5, 7, 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = to_rgb(decode_image(encode(image, "PNG", exif=exif)))
    assert_pixels(turned, TURNED[6](expected), tolerance=0)


def test_transparency_of_grey_images():
    image = Image.fromarray(np.array([[0, 1000, 65535]], np.uint16))
    data = encode(image, "PNG", transparency=1000)
    assert_pixels(decode_image(data), grey(np.array([[0, 255, 255]])), tolerance=0)


def test_integers_of_more_than_16_bits_are_refused():
    with pytest.raises(ValueError, match=r"more than 16 bits .* from 0 to 70000"):
        to_rgb(Image.fromarray(np.array([[0, 70000]], np.int32)))


def test_modes_without_a_way_to_rgb():
    with pytest.raises(BrokenImageError, match="`scan` cannot be converted from PIL mode 'La'"):
        to_rgb(Image.new("La", (2, 2)), "scan")
