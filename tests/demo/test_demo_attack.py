"""What the demo's page shows, without the page: models, attacks, radii, and files of visitors."""

import copy
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import IMAGENET, MODELS, change_everything, pixels

from autolora_hf import Preprocessing, ThreatModel, load_autolora_model
from autolora_hf.data import as_pixel_dataset
from autolora_hf.demo import answers_by_radius, attack_image, open_demo, read_upload
from autolora_hf.demo.models import NATURAL_NAME, ROBUST_NAME, ROUTE_NAME
from autolora_hf.demo.radii import Scale, radius_text
from autolora_hf.quickstart import load_digits


DIGITS = Path(__file__).parents[2] / "model_cards" / "quickstart-digits"
# The norm of a perturbation, and by how much float32 may miss a bound.
NORMS = {"linf": (float("inf"), 1e-6), "l2": (2, 1e-4), "l1": (1, 1e-3)}


@pytest.fixture(scope="module")
def digits(digits_folder):
    return open_demo(digits_folder)


@pytest.fixture(scope="module")
def seven():
    return as_pixel_dataset(load_digits()["test"], Preprocessing((28, 28), crop_pct=1.0))[700]["pixel_values"]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("share", [0.5, 3])
def test_perturbations_stay_within_the_radius(digits, seven, norm, share):
    eps = share * Scale.of(norm, digits.threat_model, (28, 28)).usual
    order, slack = NORMS[norm]
    outcome = attack_image(digits.shown(NATURAL_NAME), seven, norm, eps, steps=5)
    assert list(outcome.attacked) == [NATURAL_NAME, ROBUST_NAME]
    for attacked in outcome.attacked.values():
        change = (attacked.adversarial - seven).flatten()
        assert 0.5 * eps < change.norm(order).item() <= eps * (1 + slack)
        assert 0 <= attacked.adversarial.min() and attacked.adversarial.max() <= 1


def test_radius_0_is_the_clean_image_and_its_answers(digits, seven):
    models = digits.shown(ROUTE_NAME)
    outcome = attack_image(models, seven, "linf", 0)
    for name, attacked in outcome.attacked.items():
        assert torch.equal(attacked.adversarial, seven)
        assert torch.equal(attacked.answer.probabilities, attacked.clean.probabilities)
        assert not attacked.is_fooled
        assert not any(outcome.is_fooled_by(name, source) for source in models if source != name)
    attacked = attack_image(models, seven, "linf", 0.1).attacked
    for name in models:
        assert torch.equal(attacked[name].clean.probabilities, outcome.attacked[name].answer.probabilities)


def test_natural_fine_tuning_is_fooled_where_the_robust_model_is_not(digits, seven):
    outcome = attack_image(digits.shown(NATURAL_NAME), seven, "linf", 0.1)
    natural, robust = outcome.attacked[NATURAL_NAME], outcome.attacked[ROBUST_NAME]
    assert robust.clean.label == 7
    assert natural.is_fooled and not robust.is_fooled
    # The answers to the other model's image are those of the models themselves.
    view = digits.shown(NATURAL_NAME)[ROBUST_NAME]
    with torch.no_grad():
        expected = view(natural.adversarial[None])[0].softmax(0)
    torch.testing.assert_close(natural.others[ROBUST_NAME].probabilities, expected)
    assert outcome.is_fooled_by(ROBUST_NAME, NATURAL_NAME) == (expected.argmax().item() != 7)


def test_views_answer_as_the_routes_of_the_saved_model(digits, seven):
    model = load_autolora_model(DIGITS)
    outcome = attack_image(digits.shown(ROUTE_NAME), seven, "linf", 0)
    for name, route in ((ROBUST_NAME, "robust"), (ROUTE_NAME, "natural")):
        with torch.no_grad():
            expected = model.pixel_space(route)(seven[None])[0].softmax(0)
        torch.testing.assert_close(outcome.attacked[name].clean.probabilities, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(*(attacked.clean.probabilities for attacked in outcome.attacked.values()), atol=1e-3)


def test_equal_seeds_give_equal_results_and_others_do_not(digits, seven):
    def found(seed):
        outcome = attack_image(digits.shown(ROUTE_NAME), seven, "linf", 0.1, steps=3, seed=seed)
        return outcome.attacked[ROBUST_NAME].adversarial

    first = found(0)
    torch.rand(7)  # moves the global generator
    assert torch.equal(found(0), first)
    assert not torch.equal(found(1), first)


def test_attacks_leave_models_as_they_were():
    model = MODELS["timm_resnet"].adapted(mode="full")
    change_everything(model)
    model.train()
    before = copy.deepcopy(model.state_dict())
    flags = [(module.training, [p.requires_grad for p in module.parameters()]) for module in model.modules()]
    state = torch.get_rng_state()
    models = {route: model.pixel_space(route) for route in ("robust", "natural")}
    list(answers_by_radius(models, pixels(1)[0], "l2", [0, 0.5], steps=2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert flags == [(module.training, [p.requires_grad for p in module.parameters()]) for module in model.modules()]
    assert torch.equal(torch.get_rng_state(), state)
    assert model.current_route == "robust" and all(p.grad is None for p in model.parameters())


def test_curve_has_every_radius_and_the_known_outcome(digits, seven):
    models = digits.shown(NATURAL_NAME)
    scale = Scale.of("linf", digits.threat_model, (28, 28))
    radii = scale.curve(scale.radius(5))
    assert radii[0] == 0 and radii[-1] == scale.largest and scale.radius(5) in radii
    known = attack_image(models, seven, "linf", scale.radius(5))
    points = list(answers_by_radius(models, seven, "linf", radii, known=known))
    assert [point[ROBUST_NAME].eps for point in points] == radii
    clean, last = points[0], points[-1]
    for name in models:
        assert not clean[name].is_fooled and clean[name].clean_probability == clean[name].confidence
        assert last[name].is_fooled and last[name].clean_probability < 0.5
        at_known = points[radii.index(known.eps)][name]
        assert at_known.confidence == known.attacked[name].answer.confidence
    alone = attack_image(models, seven, "linf", scale.largest).attacked
    assert last[ROBUST_NAME].confidence == alone[ROBUST_NAME].answer.confidence


@pytest.mark.parametrize(
    ("norm", "eps", "message"),
    [("linf", 8, "Did you mean 8/255"), ("l3", 0.1, "must be 'linf', 'l2' or 'l1'"), ("linf", -0.1, "positive")],
)
def test_wrong_threat_models(digits, seven, norm, eps, message):
    with pytest.raises(ValueError, match=message):
        attack_image(digits.shown(None), seven, norm, eps)


def test_scale_reaches_the_trained_radius_exactly_from_a_rounded_one():
    scale = Scale.of("linf", ThreatModel("linf", 8 / 255), (224, 224))
    assert scale.nearest(0.0313725) == 8 / 255 and scale.nearest(1) == scale.largest == 24 / 255
    assert radius_text("linf", 8 / 255) == "0.03137 = 8/255"
    # A norm's largest radius is not passed.
    assert Scale.of("linf", ThreatModel("linf", 0.5), (28, 28)).largest == 1
    assert Scale.of("l2", ThreatModel("linf", 8 / 255), (224, 224)).usual == 3
    assert radius_text("l1", 12) == "12"


# ---- what is opened ----


def test_demo_finds_the_twin_the_route_and_the_digits(digits):
    assert [classifier.name for classifier in digits.classifiers] == [ROBUST_NAME, NATURAL_NAME, ROUTE_NAME]
    assert digits.robust.reports[0].publishable and digits.robust.reports[0].robust.total == 150
    assert [name for name, _ in digits.examples] == [str(digit) for digit in range(10)]
    assert digits.title == "model"


def test_examples_of_a_folder(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for index in range(20):
            Image.new("RGB", (40, 40), (10 * index, 0, 0)).save(tmp_path / name / f"{index}.png")
    (tmp_path / "notes.txt").write_text("no image")
    names = [name for name, _ in open_demo(DIGITS, examples=tmp_path).examples]
    assert names == ["cat"] * 6 + ["dog"] * 6


def test_natural_models_must_have_the_same_task(tmp_path):
    with pytest.raises(ValueError, match="Class 0 is 'T-shirt/top' of quickstart and '0' of the robust model"):
        open_demo(DIGITS, natural="quickstart")
    other = MODELS["timm_resnet"].adapted(num_classes=10)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="takes images of 32 x 32 pixels, the robust model of 28 x 28"):
        open_demo(DIGITS, natural=tmp_path / "other")
    with pytest.raises(ValueError, match="resnet51"):
        open_demo(DIGITS, natural="resnet51")


def test_model_without_a_natural_route_stands_alone(tmp_path):
    model = MODELS["timm_resnet"].adapted(natural_route="none")
    model.save_pretrained(tmp_path / "model")
    demo = open_demo(tmp_path / "model")
    assert [classifier.name for classifier in demo.classifiers] == [ROBUST_NAME]
    outcome = attack_image(demo.shown(None), pixels(1)[0], "linf", 8 / 255, steps=2)
    assert outcome.attacked[ROBUST_NAME].others == {} and demo.robust.reports == []
    assert demo.class_name(2) == "class 2"


# ---- files of visitors ----


def _png_header(width, height):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", zlib.compress(bytes(100_000))) + chunk(b"IEND", b"")


def _encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _noise(mode="RGB", size=(64, 48)):
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}[mode]
    array = np.random.default_rng(0).integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8)
    return Image.fromarray(array, mode) if mode == "CMYK" else Image.fromarray(array)


BAD = {
    "text": (b"hello, I am no image at all", "no image of a known format"),
    "empty": (b"", "empty"),
    "truncated": (_encoded(_noise(), "JPEG")[:1500], "damaged"),
    "cut header": (_encoded(_noise(), "PNG")[:20], "The file cannot be used"),
    "bomb": (_png_header(60_000, 60_000), "too many pixels"),
    "large": (_png_header(9_000, 9_000), "9,000 x 9,000 pixels, more than the 40,000,000"),
    "huge": (bytes(21 << 20), "21 MB; at most 20 MB"),
    "program": (_encoded(_noise(), "EPS"), "format EPS is not read here"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no image of a known format"),
    "float": (_encoded(Image.new("F", (30, 30), 0.5), "TIFF"), "unknown range"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_refused_with_a_reason(tmp_path, kind):
    content, message = BAD[kind]
    (tmp_path / "upload").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_upload(tmp_path / "upload", IMAGENET)
    assert str(caught.value).startswith("The file ") and "`" not in str(caught.value)


_FRAMES = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
ODD = {
    "animated": (_encoded(_FRAMES[0], "GIF", save_all=True, append_images=_FRAMES[1:]), "the first one is used"),
    "16 bits": (_encoded(Image.fromarray(np.full((40, 40), 32896, np.uint16)), "PNG"), "scaled to 8 bits"),
    "cmyk": (_encoded(_noise("CMYK"), "JPEG"), "converted from CMYK"),
    "transparent": (_encoded(Image.new("RGBA", (40, 40), (0, 0, 0, 0)), "PNG"), "as white"),
    "tiny": (_encoded(Image.new("RGB", (1, 1), (0, 128, 255)), "PNG"), "only 1 x 1 pixels"),
    "long": (_encoded(_noise(size=(300, 40)), "PNG"), "middle part alone"),
}
MEANS = {"animated": (1, 0, 0), "16 bits": (128 / 255,) * 3, "transparent": (1, 1, 1), "tiny": (0, 128 / 255, 1)}


@pytest.mark.parametrize("kind", ODD)
def test_odd_files_are_converted_and_it_is_said(tmp_path, kind):
    content, note = ODD[kind]
    (tmp_path / "upload").write_bytes(content)
    upload = read_upload(tmp_path / "upload", IMAGENET)
    assert upload.pixels.shape == (3, 32, 32) and 0 <= upload.pixels.min() and upload.pixels.max() <= 1
    assert any(note in line for line in upload.notes)
    if kind in MEANS:
        torch.testing.assert_close(upload.pixels.mean((1, 2)), torch.tensor(MEANS[kind]).float(), rtol=0, atol=0.01)


def test_plain_files_need_no_note(tmp_path):
    _noise().save(tmp_path / "upload.png")
    assert read_upload(tmp_path / "upload.png", IMAGENET).notes == []
