"""Pixel checks, and that images are prepared as timm and transformers prepare them."""

import json
import math

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image, ImageFilter, ImageOps
from torch import nn

from autolora_hf.data import PixelTransform
from autolora_hf.pixels import Normalize, Preprocessing, _share, check_pixels


def photo(width=420, height=300, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return ImageOps.autocontrast(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(3)))


def prepared(preprocessing, image):
    """What the model receives: 3 x H x W, normalised."""
    return Normalize(preprocessing)(PixelTransform(preprocessing)(image)[None])[0]


# --- check_pixels ----------------------------------------------------------------------------------------------------


def nan_batch():
    pixels = torch.rand(2, 3, 4, 4)
    pixels[0, 0, 0, 0], pixels[1, 0, 0, 0] = float("nan"), float("inf")
    return pixels


@pytest.mark.parametrize(
    ("pixels", "error", "messages"),
    [
        (np.zeros((1, 3, 4, 4)), TypeError, ["`img`", "torch.Tensor", "ndarray"]),
        (torch.arange(48, dtype=torch.uint8).view(1, 3, 4, 4), TypeError, ["uint8", "from 0 to 47", ".float() / 255"]),
        (torch.zeros(1, 3, 4, 4, dtype=torch.bool), TypeError, ["torch.bool"]),
        (torch.rand(3, 4, 4), ValueError, ["N x C x H x W", "(3, 4, 4)"]),
        (torch.rand(1, 3, 4, 5), ValueError, ["4 x 4", "4 x 5", "PIL"]),
        (torch.rand(0, 3, 4, 4), ValueError, ["empty"]),
        (nan_batch(), ValueError, ["NaN or infinite", "2 of 96"]),
        (torch.linspace(-2.1, 2.6, 48).view(1, 3, 4, 4), ValueError, ["from -2.1 to 2.6", "normalised"]),
        (torch.linspace(0, 255, 48).view(1, 3, 4, 4), ValueError, ["from 0 to 255", "divide by 255"]),
        (torch.full((1, 3, 4, 4), 1.001), ValueError, ["from 1.001 to 1.001"]),
        (torch.full((1, 3, 4, 4), -0.001), ValueError, ["from -0.001 to -0.001"]),
    ],
)
def test_wrong_pixels_are_refused(pixels, error, messages):
    with pytest.raises(error) as raised:
        check_pixels(pixels, "img", (4, 4))
    for message in ["`img`", *messages]:
        assert message in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_right_pixels_pass(dtype):
    pixels = torch.linspace(0, 1, 48).view(1, 3, 4, 4).to(dtype)
    check_pixels(pixels)
    check_pixels(pixels.requires_grad_(True), "img", (4, 4))
    check_pixels(torch.rand(2, 1, 4, 4))


# --- Preprocessing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": (224,)}, "`image_size` must be (height, width)"),
        ({"image_size": (0, 4)}, "`image_size`"),
        ({"mean": (0.5,), "std": (0.5,)}, "3 channels"),
        ({"std": (0.5, 0.5, 0)}, "`std` must be positive"),
        ({"interpolation": "cubic"}, "`interpolation` must be one of"),
        ({"crop_pct": 0}, "`crop_pct`"),
        ({"crop_pct": 87.5}, "`crop_pct`"),
        ({"crop_mode": "pad"}, "`crop_mode` must be"),
        ({"channel_order": "grb"}, "`channel_order` must be"),
    ],
)
def test_invalid_preprocessing(changes, message):
    with pytest.raises(ValueError) as error:
        Preprocessing(**changes)
    assert message in str(error.value)


def test_preprocessing_survives_json():
    preprocessing = Preprocessing((96, 128), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "lanczos", 0.9, "squash", "bgr")
    assert Preprocessing(**json.loads(json.dumps(preprocessing.to_dict()))) == preprocessing


def test_normalize_moves_with_the_model_and_is_not_saved():
    normalize = Normalize(Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)))
    pixels = torch.rand(2, 3, 4, 4)
    expected = torch.stack(
        [(pixels[:, c] - m) / s for c, (m, s) in enumerate([(0.1, 0.4), (0.2, 0.5), (0.3, 0.6)])], 1
    )
    torch.testing.assert_close(normalize(pixels), expected)
    assert not normalize.state_dict()
    assert normalize.double()(pixels.double()).dtype == torch.float64


# --- timm ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(420, 300), (300, 420), (97, 64), (224, 224)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"crop_pct": 0.95, "interpolation": "bilinear", "mean": (0.5,) * 3, "std": (0.5,) * 3},
        {"crop_pct": 1.0, "crop_mode": "squash"},
        {"crop_pct": 0.9, "crop_mode": "squash", "interpolation": "lanczos"},
        {"crop_pct": 1.0, "crop_mode": "border"},
        {"crop_pct": 1.15},
        {"input_size": (3, 96, 128)},
        {"input_size": (3, 32, 32), "interpolation": "nearest"},
    ],
)
def test_same_pixels_as_timm(changes, size):
    model = timm.create_model("test_resnet", pretrained_cfg_overlay=changes)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    image = photo(*size)
    torch.testing.assert_close(prepared(Preprocessing.from_timm(model), image), transform(image), rtol=0, atol=1e-5)


def test_image_size_of_the_patch_embedding_wins():
    model = timm.create_model("test_vit", img_size=96)
    assert model.pretrained_cfg["input_size"][-1] != 96
    assert Preprocessing.from_timm(model).image_size == (96, 96)


def test_every_timm_configuration_is_understood():
    class Holder(nn.Module):
        patch_embed = None

    for name in {*timm.list_models(), *timm.list_pretrained()}:
        config = timm.models.get_pretrained_cfg(name)
        if config is not None and config.input_size[0] == 3:
            holder = Holder()
            holder.pretrained_cfg = config.to_dict()
            Preprocessing.from_timm(holder)


# --- transformers ----------------------------------------------------------------------------------------------------

PROCESSORS = {
    "vit": ("ViTImageProcessor", {}),
    "vit-bicubic-48": ("ViTImageProcessor", {"size": {"height": 48, "width": 48}, "resample": 3}),
    "vit-not-square": ("ViTImageProcessor", {"size": {"height": 96, "width": 128}}),
    "vit-not-normalised": ("ViTImageProcessor", {"do_normalize": False}),
    "vit-8-bit": ("ViTImageProcessor", {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [64.0] * 3}),
    "vit-to-minus-one": ("ViTImageProcessor", {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3}),
    "convnext-384": ("ConvNextImageProcessor", {}),
    "convnext-224": ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}}),
    "convnext-odd-crop": ("ConvNextImageProcessor", {"size": {"shortest_edge": 93}, "crop_pct": 0.95}),
    "clip": ("CLIPImageProcessor", {}),
    "bit-odd-crop": ("BitImageProcessor", {"size": {"shortest_edge": 186}, "crop_size": {"height": 32, "width": 32}}),
    "beit": ("BeitImageProcessor", {}),
    "deit": ("DeiTImageProcessor", {}),
    "efficientnet": ("EfficientNetImageProcessor", {}),
    "efficientnet-offset": ("EfficientNetImageProcessor", {"rescale_offset": True, "rescale_factor": 1 / 127.5}),
    "levit": ("LevitImageProcessor", {}),
    "mobilenet": ("MobileNetV2ImageProcessor", {}),
    "mobilevit": ("MobileViTImageProcessor", {}),
    "poolformer": ("PoolFormerImageProcessor", {}),
    "pp_lcnet": ("PPLCNetImageProcessor", {}),
    "pvt": ("PvtImageProcessor", {}),
    "siglip": ("SiglipImageProcessor", {}),
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_same_pixels_as_transformers(case):
    name, arguments = PROCESSORS[case]
    # The PIL backend resizes as we do; the default one, on uint8 tensors, rounds otherwise.
    for class_name, tolerated in ((f"{name}Pil", 0.01), (name, 2.05)):
        if not hasattr(transformers, class_name):
            continue
        processor = getattr(transformers, class_name)(**arguments)
        preprocessing = Preprocessing.from_image_processor(processor)
        # With these sizes no margin of a crop is odd, which libraries halve differently.
        for image in (photo(400, 320), photo(320, 400)):
            theirs = processor(images=image, return_tensors="pt")["pixel_values"][0].float()
            ours = prepared(preprocessing, image)
            assert ours.shape == theirs.shape
            std = torch.tensor(preprocessing.std).view(-1, 1, 1)
            difference = ((ours - theirs).abs() * std).max() * 255
            assert difference < tolerated, f"{class_name}: off by up to {difference:.3f}/255"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("TextNetImageProcessorPil", {"size": {"shortest_edge": 64}}, "for a wide and a tall image"),
        ("Siglip2ImageProcessorPil", {}, "for a wide and a tall image"),
        ("ViTImageProcessorPil", {"do_resize": False}, "for a wide and a tall image"),
        ("ImageGPTImageProcessorPil", {}, "cannot process a colour image"),
        (
            "DonutImageProcessorPil",
            {"size": {"height": 64, "width": 48}},
            "in a way that no `Preprocessing` describes",
        ),
    ],
)
def test_other_processors_are_refused(name, arguments, message):
    with pytest.raises(ValueError) as error:
        Preprocessing.from_image_processor(getattr(transformers, name)(**arguments))
    assert message in str(error.value)
    assert name in str(error.value)


def loaded(config, folder, **options):
    """What `AutoImageProcessor` makes of a `preprocessor_config.json`."""
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return transformers.AutoImageProcessor.from_pretrained(folder, **options)


BLUE_FIRST = {"mean": (0,) * 3, "std": (1,) * 3, "channel_order": "bgr"}
AS_PROCESSORS = {
    "default": {},
    "odd-size": {"crop_pct": 0.9, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear"},
    "no-crop": {"image_size": (64, 64), "crop_pct": 1.0},
    "no-normalisation": {"image_size": (64, 64), "crop_pct": 1.0, "mean": (0,) * 3, "std": (1,) * 3},
    "lanczos": {"image_size": (64, 64), "crop_pct": 0.8, "interpolation": "lanczos"},
    "squash": {"image_size": (48, 64), "crop_pct": 1.0, "crop_mode": "squash"},
    "squash-and-crop": {"image_size": (64, 96), "crop_pct": 0.8, "crop_mode": "squash", "interpolation": "bilinear"},
    "bgr": {"image_size": (64, 64), **BLUE_FIRST},
    "bgr-squash": {"image_size": (48, 64), "crop_pct": 1.0, "crop_mode": "squash", **BLUE_FIRST},
}


@pytest.mark.parametrize("case", AS_PROCESSORS)
def test_transformers_prepares_images_as_we_do(case, tmp_path):
    preprocessing = Preprocessing(**AS_PROCESSORS[case])
    config = preprocessing.to_image_processor()
    std = torch.tensor(preprocessing.std).view(-1, 1, 1)
    # PIL resizes as we do; torchvision, the default, rounds otherwise.
    for options, most, on_average in (({"backend": "pil"}, 0.01, 0.01), ({}, 2.05, 0.25)):
        processor = loaded(config, tmp_path, **options)
        assert Preprocessing.from_image_processor(processor) == preprocessing
        compared = 0
        for size in [(420, 300), (300, 420), (97, 65), (40, 50), (131, 200), (421, 300), (64, 64), (500, 224)]:
            if preprocessing.crop_mode == "center" and longer_side_is_cut_differently(preprocessing, size):
                continue
            theirs = processor(images=photo(*size), return_tensors="pt")["pixel_values"][0]
            ours = prepared(preprocessing, photo(*size))
            assert theirs.shape == ours.shape
            difference = (ours - theirs).abs() * std * 255
            assert difference.max() < most, f"{type(processor).__name__}, {size}: off by {difference.max():.3f}/255"
            assert difference.mean() < on_average
            compared += 1
        assert compared >= 5


def longer_side_is_cut_differently(preprocessing, size):
    """Whether torchvision and transformers halve the margin to different sides."""
    short = int(preprocessing.image_size[0] / preprocessing.crop_pct)
    return (int(short * max(size) / min(size)) - preprocessing.image_size[0]) % 4 == 3


@pytest.mark.parametrize("backend", ["pil", "torchvision"])
def test_a_crop_that_transformers_halves_differently_is_one_pixel_off(tmp_path, backend):
    """As `to_image_processor` says."""
    preprocessing, image = Preprocessing((64, 64), crop_pct=1.0), photo(67, 64)
    processor = loaded(preprocessing.to_image_processor(), tmp_path, backend=backend)
    theirs = processor(images=image, return_tensors="pt")["pixel_values"][0]
    moved = prepared(preprocessing, image.crop((1, 0, 65, 64)))
    torch.testing.assert_close(theirs, moved, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"crop_mode": "border"},
        {"image_size": (48, 64)},
        {"crop_pct": 1.15},
        {"crop_pct": 0.95},  # 235 pixels, of which 11 go: half of it is rounded to 6 or to 5
        {"image_size": (224, 64), "crop_pct": 0.9, "crop_mode": "squash"},
        {"interpolation": "nearest"},
        {"interpolation": "box"},
        {"interpolation": "hamming"},
        {"channel_order": "bgr"},
    ],
)
def test_what_no_processor_does(changes):
    assert Preprocessing(**changes).to_image_processor() is None


def test_every_share_that_a_crop_keeps_is_found():
    """The size before the crop is the same, and the usual shares of images that are not tiny come back."""
    for side in (32, 48, 64, 96, 128, 160, 192, 224, 240, 256, 288, 299, 384, 448, 518):
        for percent in range(50, 150):
            edge = math.floor(side / (percent / 100))
            assert math.floor(side / _share(side, edge)) == edge
        for share in (0.875, 0.9, 0.95, 0.96, 1.0):
            assert side < 160 or _share(side, math.floor(side / share)) == share
