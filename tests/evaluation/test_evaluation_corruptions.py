"""Common corruptions: every kind, severity, size and colour; seeds; the summary; and what they do to a real model."""

import functools
import json
import random
import subprocess
import sys
import types
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import MODELS, save_colours

from autolora_hf.backbones import load_backbone
from autolora_hf.cli import main
from autolora_hf.evaluation.corruptions import (
    CORRUPTIONS,
    MIN_SIZE,
    SEVERITIES,
    VALIDATION_CORRUPTIONS,
    corrupted,
    load_library,
    summarised,
)
from autolora_hf.quickstart import load_digits


pytest.importorskip("imagecorruptions", reason='needs `pip install "autolora-hf[corruptions]"`')

ALL = (*CORRUPTIONS, *VALIDATION_CORRUPTIONS)


def images(size=32, channels=3, count=2):
    """Smooth 8-bit pictures with an edge, so that blur, noise and JPEG all have something to destroy."""
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, channels, 6, 6, generator=generator)
    pixels = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=True)
    pixels[..., height // 3 : height // 2, width // 4 :] = 0.9
    return (pixels * 255).round() / 255


@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "colour"])
@pytest.mark.parametrize("size", [MIN_SIZE, 28, 32, 64, 224, (40, 28)], ids=str)
def test_every_corruption_and_severity(size, channels):
    # One image of 224 pixels takes more time than all the others.
    pixels = images(size, channels, count=1 if size == 224 else 2)
    for name in ALL:
        changes = []
        for severity in SEVERITIES:
            found = corrupted(pixels, name, severity, 0, range(len(pixels)))
            assert found.shape == pixels.shape and found.dtype == pixels.dtype and found.is_contiguous()
            assert 0 <= found.min() and found.max() <= 1, (name, severity)
            assert torch.equal((found * 255).round() / 255, found), "images are 8-bit"
            changes.append(not torch.equal(found, pixels))
        # Now and then no drop of spatter hits a small image, and grey has no colours to fade.
        assert all(changes) or name == "spatter" or (name == "saturate" and channels == 1), (name, changes)


def test_names_are_those_of_the_library():
    from imagecorruptions import get_corruption_names

    assert list(CORRUPTIONS) == get_corruption_names("common")
    assert list(VALIDATION_CORRUPTIONS) == get_corruption_names("validation")
    assert len(CORRUPTIONS) == 15 and len(VALIDATION_CORRUPTIONS) == 4


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_images_are_those_of_the_library(name, monkeypatch):
    """Nothing of the benchmark is changed on the way: the library's own `corrupt` gives the same 8-bit image."""
    from imagecorruptions import corrupt

    seeds, library = [], load_library()
    original = library[name]

    @functools.wraps(original)
    def spy(image, severity, **options):
        seeds.append((np.random.get_state(), options))
        return original(image, severity, **options)

    monkeypatch.setitem(library, name, spy)
    pixels = images(48, count=1)
    found = corrupted(pixels, name, 3, 0, [5])
    monkeypatch.undo()
    before = np.random.get_state()
    state, options = seeds[0]
    np.random.set_state(state)
    picture = (pixels[0] * 255).round().byte().permute(1, 2, 0).numpy()
    expected = corrupt(picture, severity=3, corruption_name=name, **options)
    np.random.set_state(before)
    assert np.array_equal((found[0] * 255).round().byte().permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("name", ALL)
def test_images_depend_on_the_key_and_not_on_the_batch(name):
    pixels = images(count=4)
    whole = corrupted(pixels, name, 3, 7, [10, 11, 12, 13])
    assert torch.equal(whole, corrupted(pixels, name, 3, 7, [10, 11, 12, 13]))
    order = [2, 0, 3]
    assert torch.equal(whole[order], corrupted(pixels[order], name, 3, 7, [12, 10, 13]))
    assert torch.equal(whole[1:2], corrupted(pixels[1:2], name, 3, 7, [11]))


@pytest.mark.parametrize("name", ["gaussian_noise", "impulse_noise", "glass_blur", "motion_blur", "fog"])
def test_other_seeds_keys_and_severities_draw_other_numbers(name):
    pixels = images(count=1)
    base = corrupted(pixels, name, 2, 0, [0])
    assert not torch.equal(base, corrupted(pixels, name, 2, 1, [0]))
    assert not torch.equal(base, corrupted(pixels, name, 2, 0, [1]))
    assert not torch.equal(base, corrupted(pixels, name, 3, 0, [0]))
    # The same picture twice in a batch does not get the same noise.
    twice = corrupted(pixels.repeat(2, 1, 1, 1), name, 2, 0, [0, 1])
    assert not torch.equal(twice[0], twice[1])


def test_severities_and_kinds_do_not_share_their_noise():
    grey = torch.full((1, 3, 64, 64), 0.5)
    changes = [
        (corrupted(grey, name, severity, 0, [0]) - grey).flatten()
        for name, severity in (("gaussian_noise", 1), ("gaussian_noise", 2), ("speckle_noise", 1))
    ]
    assert torch.corrcoef(torch.stack(changes)).triu(1).abs().max() < 0.05


def test_seeds_may_be_negative_and_large():
    pixels = images(count=1)
    found = [corrupted(pixels, "shot_noise", 1, seed, [2**40]) for seed in (-1, 0, 2**40)]
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


@pytest.mark.slow
def test_another_process_makes_the_same_images():
    """Also of the two kinds with random numbers of their own, one of them in compiled code."""
    program = (
        "import sys, torch\n"
        "from autolora_hf.evaluation.corruptions import corrupted\n"
        # Heavy, and missing where the extra is not installed.
        "assert not {'imagecorruptions', 'numba', 'cv2'} & set(sys.modules)\n"
        "pixels = torch.linspace(0, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)\n"
        "for name in ('glass_blur', 'impulse_noise', 'frost'):\n"
        "    print(corrupted(pixels, name, 4, 3, [9]).double().sum().item())\n"
    )
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    pixels = torch.linspace(0, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    for name, text in zip(("glass_blur", "impulse_noise", "frost"), there, strict=True):
        assert corrupted(pixels, name, 4, 3, [9]).double().sum().item() == float(text), name


def test_global_random_states_are_left_alone():
    pixels = images(count=1)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    for name in ALL:
        corrupted(pixels, name, 1, 0, [0])
    after = random.getstate(), np.random.get_state(), torch.get_rng_state()
    assert before[0] == after[0] and torch.equal(before[2], after[2])
    assert all(np.array_equal(here, there) for here, there in zip(before[1], after[1], strict=True))


@pytest.mark.parametrize(
    "name",
    [
        "gaussian_noise",
        "shot_noise",
        "impulse_noise",
        "speckle_noise",
        "defocus_blur",
        "motion_blur",
        "zoom_blur",
        "gaussian_blur",
    ],
)
@pytest.mark.parametrize("size", [28, 64])
def test_severity_grows(name, size):
    """All of noise and blur but glass blur, whose fourth severity has fewer iterations than its third."""
    pixels = images(size, count=8)
    distances = [(corrupted(pixels, name, s, 0, range(8)) - pixels).abs().mean().item() for s in SEVERITIES]
    assert distances == sorted(distances) and distances[-1] > 1.2 * distances[0]


def test_noise_of_grey_images_is_as_strong_as_asked_for():
    """One draw a pixel, with the benchmark's 0.18 of severity 3; blur treats both directions alike."""
    grey = torch.full((1, 1, 128, 128), 0.5)
    change = corrupted(grey, "gaussian_noise", 3, 0, [0]) - grey
    assert change.std().item() == pytest.approx(0.18, rel=0.05)
    dot = torch.zeros(1, 1, 33, 33)
    dot[..., 16, 16] = 1
    for name in ("gaussian_blur", "defocus_blur"):
        spread = corrupted(dot, name, 1, 0, [0])
        assert (spread - spread.mT).abs().max() <= 1 / 255 and (spread > 0).sum() > 5, name


@pytest.mark.filterwarnings("error")
def test_spatter_without_drops_leaves_the_image():
    """The library divides by the size of its largest drop, which on small images may be zero."""
    pixels = images(MIN_SIZE, count=1).repeat(60, 1, 1, 1)
    found = corrupted(pixels, "spatter", 1, 0, range(60))
    unchanged = [torch.equal(here, pixels[0]) for here in found]
    assert any(unchanged) and not all(unchanged)
    assert found.mean() > pixels.mean() - 0.02, "no image is black"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_keeps_the_dtype(dtype):
    pixels = images(count=1)
    found = corrupted(pixels.to(dtype), "contrast", 2, 0, [0])
    assert found.dtype == dtype
    assert (found.float() - corrupted(pixels, "contrast", 2, 0, [0])).abs().max() < 0.01


def test_images_are_rounded_to_eight_bits():
    pixels = torch.arange(3, 252).repeat(8).reshape(1, 1, 24, 83) / 255
    expected = corrupted(pixels, "impulse_noise", 1, 0, [0])
    for offset in (-0.4, 0.4):
        assert torch.equal(corrupted(pixels + offset / 255, "impulse_noise", 1, 0, [0]), expected)
    assert (expected == pixels).float().mean() > 0.9, "the other pixels are what they were"


def test_input_is_left_alone():
    pixels = images(count=1).requires_grad_()
    before = pixels.detach().clone()
    found = corrupted(pixels, "fog", 5, 0, [0])
    assert torch.equal(pixels, before) and not found.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "gausian_noise"}, "Did you mean 'gaussian_noise'"),
        ({"name": "qqq"}, "There are gaussian_noise, shot_noise"),
        ({"severity": 0}, "from 1 to 5, got 0"),
        ({"severity": 6}, "from 1 to 5, got 6"),
        ({"severity": True}, "from 1 to 5, got True"),
        ({"keys": [0]}, "`keys` must be 2 integers"),
        ({"keys": [0, -1]}, "of at least 0"),
        ({"pixels": torch.zeros(2, 3, 15, 32)}, "at least 16 x 16 pixels, got 15 x 32"),
        ({"pixels": torch.zeros(2, 4, 32, 32)}, "3 channels, or 1 if grey, got 4"),
        ({"pixels": torch.zeros(3, 32, 32)}, "N x C x H x W"),
        ({"pixels": 255 * torch.ones(2, 3, 32, 32)}, "divide by 255"),
        ({"pixels": torch.full((2, 3, 32, 32), float("nan"))}, "NaN"),
    ],
)
def test_wrong_input(changes, message):
    arguments = {"pixels": images(), "name": "fog", "severity": 1, "seed": 0, "keys": [0, 1], **changes}
    with pytest.raises(ValueError, match=message):
        corrupted(**arguments)


def test_integer_images_are_refused():
    with pytest.raises(TypeError, match="float pixels"):
        corrupted(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "fog", 1, 0, [0])


def test_missing_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install \"autolora-hf\[corruptions\]\""):
        corrupted(images(), "fog", 1, 0, [0, 1])
    # A wrong name is reported without the library.
    with pytest.raises(ValueError, match="frost"):
        corrupted(images(), "frots", 1, 0, [0, 1])


def test_the_command_says_what_is_missing_in_one_message(monkeypatch, tmp_path, capsys):
    """Before anything is measured, and without a traceback."""
    model = MODELS["timm_resnet"].adapted(num_classes=3, mode="full")
    model.save_pretrained(tmp_path / "model")
    save_colours(tmp_path / "images", test=1)
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    options = ["--data", str(tmp_path / "images" / "test"), "--corruptions", "--attack", "pgd"]
    assert main(["evaluate", str(tmp_path / "model"), *options]) == 1
    assert "autolora evaluate: error: Corruptions need the package" in capsys.readouterr().err


def test_the_package_of_2020_is_refused(monkeypatch):
    old = types.ModuleType("imagecorruptions")
    old.corruption_dict = {"glass_blur": lambda x, severity=1: x}
    monkeypatch.setitem(sys.modules, "imagecorruptions", old)
    with pytest.raises(ModuleNotFoundError, match="pip uninstall imagecorruptions"):
        corrupted(images(), "fog", 1, 0, [0, 1])


def test_summary():
    accuracies = {("fog", 1): 0.8, ("fog", 5): 0.4, ("frost", 5): 0.2, ("frost", 1): 0.6}
    found = summarised(accuracies, clean_accuracy=0.8)
    assert found.by_corruption == {"fog": pytest.approx(0.6), "frost": pytest.approx(0.4)}
    assert found.mean_accuracy == pytest.approx(0.5) and found.relative_accuracy == pytest.approx(0.625)
    assert found.severities == [1, 5] and found.clean_accuracy == 0.8
    assert json.loads(json.dumps(asdict(found))) == asdict(found)
    assert summarised({("fog", 1): 0.0}, 0.0).relative_accuracy is None


def test_mean_of_equal_accuracies_is_that_accuracy():
    found = summarised({(name, severity): 0.1 for name in CORRUPTIONS for severity in SEVERITIES}, 0.1)
    assert found.mean_accuracy == 0.1 and found.relative_accuracy == 1
    assert list(found.by_corruption) == list(CORRUPTIONS)


@pytest.mark.parametrize(
    ("accuracies", "clean", "message"),
    [
        ({}, 0.5, "empty"),
        ({("fog", 1): 1.5}, 0.5, "under fog, severity 1, must be in"),
        ({("fog", 1): float("nan")}, 0.5, "must be in"),
        ({("fog", 1): 0.5}, 2.0, "`clean_accuracy` must be in"),
        ({("fogg", 1): 0.5}, 0.5, "Did you mean 'fog'"),
        ({("fog", 1): 0.5, ("snow", 2): 0.5}, 0.5, "missing: fog 2, snow 1"),
    ],
)
def test_wrong_summary(accuracies, clean, message):
    with pytest.raises(ValueError, match=message):
        summarised(accuracies, clean)


@pytest.fixture(scope="module")
def digits_model():
    """The quickstart backbone, fine-tuned on digits for some seconds; test pixels N x 3 x 28 x 28 and labels."""
    digits = load_digits()

    def tensors(split, step):
        part = digits[split].select(range(0, len(digits[split]), step))
        pixels = torch.stack([torch.from_numpy(np.array(image)) for image in part["image"]])
        return (pixels.float() / 255)[:, None].repeat(1, 3, 1, 1), torch.tensor(part["label"])

    torch.manual_seed(0)
    model = load_backbone("quickstart", num_classes=10)
    pixels, labels = tensors("train", 5)
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    model.train()
    for _ in range(3):
        for batch in torch.randperm(len(labels)).split(50):
            optimiser.zero_grad()
            F.cross_entropy(model(pixels[batch]), labels[batch]).backward()
            optimiser.step()
    return (model.eval(), *tensors("test", 5))


@torch.no_grad()
def accuracy(model, pixels, labels):
    return (model(pixels).argmax(1) == labels).float().mean().item()


def test_accuracy_of_a_trained_model_falls(digits_model):
    model, pixels, labels = digits_model
    clean = accuracy(model, pixels, labels)
    assert clean > 0.85
    keys = range(len(labels))
    found = {
        (name, severity): accuracy(model, corrupted(pixels, name, severity, 0, keys), labels)
        for name in ("gaussian_noise", "impulse_noise", "defocus_blur", "contrast")
        for severity in (1, 5)
    }
    for name in ("gaussian_noise", "impulse_noise", "defocus_blur"):
        assert found[name, 5] < clean - 0.1, (name, found, clean)
        assert found[name, 5] < found[name, 1], (name, found)
    summary = summarised(found, clean)
    assert summary.mean_accuracy < clean and 0 < summary.relative_accuracy < 1
