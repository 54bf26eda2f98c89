"""Gradient-masking diagnostics: bad defences around trained models are caught, honest models not suspected."""

import json
import random
import sys

import numpy as np
import pytest
import torch
from torch import nn

from autolora_hf.config import ThreatModel
from autolora_hf.data import as_pixel_dataset, stratified_subset
from autolora_hf.evaluation import AttackView
from autolora_hf.evaluation.gradient_masking import CHECKS, gradient_masking_findings
from autolora_hf.frozen import FrozenRoute
from autolora_hf.quickstart import QuickstartSettings, load_digits, train_on_digits
from tests import script_modules, tiny_models


planted = script_modules.load("gradient_masking")
Defence, StoppedGradient, BatchStatistics = planted.Defence, planted.StoppedGradient, planted.BatchStatistics


LINF = ThreatModel("linf", 0.1)
IMAGES = 32


@pytest.fixture(scope="module")
def digits():
    """Pixels and labels of some test digits for a model."""
    test = load_digits()["test"]
    chosen = stratified_subset(test["label"], IMAGES, 0)

    def read(model):
        items = [as_pixel_dataset(test, model.preprocessing)[index] for index in chosen]
        pixels = torch.stack([item["pixel_values"] for item in items])
        return pixels, torch.tensor([item["labels"] for item in items])

    return read


def trained(objective, folder, **settings):
    settings = QuickstartSettings(epochs=3, train_images=500, **settings)
    return train_on_digits(objective, settings, folder, quiet=True).model.eval()


@pytest.fixture(scope="module")
def robust(tmp_path_factory):
    """The shipped backbone, adversarially fine-tuned with adapters: BatchNorm, about 60 % robust accuracy."""
    return trained("autolora", tmp_path_factory.mktemp("robust"))


@pytest.fixture(scope="module")
def natural(tmp_path_factory):
    """The same backbone after natural fine-tuning in full: no robustness."""
    return trained("natural", tmp_path_factory.mktemp("natural"), mode="full")


def diagnose(model, data, threat_model=LINF, target=None, num_classes=10, **options):
    view = AttackView(model)
    target = view if target is None else AttackView(target)
    return gradient_masking_findings(view, target, *data, threat_model, num_classes, **options)


def failed(findings):
    return {found.name for found in findings if found.outcome == "failed"}


def assert_all_passed(findings):
    assert [found.name for found in findings] == list(CHECKS)
    assert [found for found in findings if found.outcome != "passed"] == []


@pytest.mark.parametrize("threat_model", [LINF, ThreatModel("l2", 1.0)], ids=str)
def test_honest_robust_model(robust, digits, threat_model):
    # One of them on the live model in adapter mode, whose passes take longer.
    copy = FrozenRoute(robust)
    findings = diagnose(robust if threat_model == LINF else copy, digits(robust), threat_model, copy)
    assert_all_passed(findings)
    accuracies = next(found for found in findings if found.name == "more steps").figures["accuracies"]
    assert accuracies[-1] > 0.3, "a model of no robustness would say nothing about false alarms"


def test_honest_natural_model(natural, digits):
    assert_all_passed(diagnose(natural, digits(natural), LINF, FrozenRoute(natural)))


@pytest.mark.parametrize("name", tiny_models.MODELS)
@pytest.mark.parametrize(("num_classes", "one_class"), [(2, True), (200, False)])
def test_untrained_models_with_few_and_many_classes(name, num_classes, one_class):
    """ResNets and ViTs of both libraries; whatever they predict is right."""
    model, pixels = tiny_models.MODELS[name].adapted(num_classes, mode="adapter"), tiny_models.pixels(24)
    with torch.no_grad():
        labels = AttackView(model)(pixels).argmax(1)
    labels = labels.mode()[0].expand(len(pixels)) if one_class else labels
    findings = diagnose(model, (pixels, labels), LINF, FrozenRoute(model), num_classes)
    assert_all_passed(findings)


def test_half_precision_is_no_gradient_masking():
    model, pixels = tiny_models.MODELS["timm_vit"].fresh().bfloat16(), tiny_models.pixels(16)
    with torch.no_grad():
        labels = AttackView(model)(pixels).argmax(1)
    findings = diagnose(model, (pixels, labels), num_classes=4)
    assert {found.name for found in findings if found.outcome != "passed"} == {"finite differences"}
    assert failed(findings) == set()


@pytest.mark.parametrize("defence", planted.TRIPPED, ids=lambda defence: defence.__name__)
def test_known_bad_defences_are_caught(robust, digits, defence):
    findings = diagnose(defence(FrozenRoute(robust)), digits(robust))
    assert [found.name for found in findings] == list(CHECKS)
    assert failed(findings) >= planted.TRIPPED[defence]


class Kinks(nn.Module):
    """Maxima of flat areas, where equal values meet."""

    def __init__(self, pool):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.Sequential(pool, nn.Flatten(), nn.LazyLinear(10))
            self.layers(torch.zeros(1, 3, 28, 28))

    def forward(self, pixels):
        return self.layers(pixels)


class Brightest(nn.Module):
    def forward(self, pixels):
        return pixels.amax(1, keepdim=True)


@pytest.mark.parametrize("pool", [nn.MaxPool2d(4), nn.MaxPool2d(3, 1, 1), Brightest()], ids=["4", "3", "channels"])
def test_kinks_are_no_false_gradients(natural, digits, pool):
    pixels, _ = digits(natural)
    model = Kinks(pool)
    with torch.no_grad():
        labels = model(pixels).argmax(1)
    findings = {found.name: found for found in diagnose(model, (pixels, labels))}
    assert findings["finite differences"].outcome == "passed", findings["finite differences"].sentence


class Overshooting(nn.Module):
    """Fooled by images that are a little brighter, while its gradient always says: brighter still."""

    def forward(self, pixels):
        brighter = pixels.flatten(1).mean(1) - 0.5
        margin = ((brighter - 0.05).abs() - 0.03).detach() - brighter + brighter.detach()
        return torch.stack([margin, -margin], 1)


def test_more_steps_that_help_the_model_are_noticed():
    data = torch.full((20, 3, 8, 8), 0.5), torch.zeros(20, dtype=torch.long)
    findings = {found.name: found for found in diagnose(Overshooting(), data, num_classes=2)}
    assert findings["more steps"].outcome == "failed"
    first, *later = findings["more steps"].figures["accuracies"]
    assert first < 0.5 and later == [1, 1, 1]


class FirstPixel(nn.Module):
    """The class is the colour of the first pixel, with a bias in favour of the first."""

    def __init__(self, bias=0.0):
        super().__init__()
        self.register_buffer("bias", torch.tensor([bias, 0, 0]))

    def forward(self, pixels):
        return 10 * pixels[:, :, 0, 0] + self.bias


def test_results_that_depend_on_the_start_are_noticed():
    data = torch.full((30, 3, 8, 8), 0.5), torch.zeros(30, dtype=torch.long)
    findings = {found.name: found for found in diagnose(Defence(FirstPixel(0.7)), data, num_classes=3)}
    assert findings["restarts"].outcome == "passed"
    findings = {found.name: found for found in diagnose(StoppedGradient(FirstPixel(0.7)), data, num_classes=3)}
    assert findings["restarts"].outcome == "failed"


def test_attack_on_another_route_is_noticed(robust, digits):
    findings = diagnose(FrozenRoute(robust), digits(robust), target=FrozenRoute(robust, "natural"))
    assert "attacked route" in failed(findings)


def test_attack_in_another_norm_mode_is_noticed():
    model = tiny_models.MODELS["hf_resnet"].adapted(4)
    pixels, deployed = tiny_models.pixels(16), FrozenRoute(model)
    with torch.no_grad():
        labels = deployed(pixels).argmax(1)
    findings = diagnose(deployed, (pixels, labels), target=BatchStatistics(deployed), num_classes=4)
    assert "attacked route" in failed(findings)


class NotAlone(Defence):
    def forward(self, pixels):
        if len(pixels) == 1:
            raise ValueError("Expected more than 1 value per channel")
        return self.model(pixels)


def test_a_model_that_takes_no_single_image_is_noticed(natural, digits):
    findings = diagnose(NotAlone(FrozenRoute(natural)), digits(natural))
    assert failed(findings) == {"single image"}
    assert "more than 1 value per channel" in findings[list(CHECKS).index("single image")].sentence


def test_what_no_image_can_do_is_not_asked_of_an_attack():
    pixels, labels = torch.rand(20, 3, 8, 8), torch.zeros(20, dtype=torch.long)
    findings = {found.name: found for found in diagnose(FirstPixel(11.0), (pixels, labels), num_classes=3)}
    assert failed(findings.values()) == set()
    for name in ("large epsilon", "unbounded attack"):
        assert findings[name].outcome == "not run"
        assert "no image is known that the model classifies otherwise" in findings[name].sentence


def test_nothing_to_diagnose():
    pixels, labels = torch.full((4, 3, 8, 8), 0.5), torch.zeros(4, dtype=torch.long)
    pixels[:, 1] = 0.9
    for data in ((pixels, labels), (pixels[:0], labels[:0])):
        findings = diagnose(FirstPixel(), data, num_classes=3)
        assert [found.name for found in findings] == list(CHECKS)
        assert {found.outcome for found in findings} == {"not run"}
        assert "None of the given images is classified correctly" in findings[0].sentence
    head_of_zeros = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    nn.init.zeros_(head_of_zeros[1].weight), nn.init.zeros_(head_of_zeros[1].bias)
    findings = diagnose(head_of_zeros, (pixels, labels), num_classes=3)
    assert {found.outcome for found in findings} == {"not run"} and "same logits" in findings[0].sentence


def test_one_image():
    findings = diagnose(FirstPixel(), (torch.full((1, 3, 8, 8), 0.5), torch.zeros(1, dtype=torch.long)), num_classes=3)
    assert {found.name for found in findings if found.outcome == "not run"} == {"single image"}
    assert failed(findings) == set()


def test_without_the_library_square_is_not_run(monkeypatch):
    pixels, labels = torch.full((4, 3, 8, 8), 0.5), torch.zeros(4, dtype=torch.long)
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    findings = {found.name: found for found in diagnose(FirstPixel(), (pixels, labels), num_classes=3)}
    assert findings["black box"].outcome == "not run" and "pip install" in findings["black box"].sentence
    monkeypatch.undo()
    l2 = diagnose(FirstPixel(), (pixels[..., :4, :4], labels), ThreatModel("l2", 0.1), num_classes=3)
    assert "cannot tile images of 4 x 4" in l2[list(CHECKS).index("black box")].sentence


def test_sentences_and_figures():
    data = torch.full((8, 3, 8, 8), 0.5), torch.zeros(8, dtype=torch.long)
    for found in [
        *diagnose(StoppedGradient(FirstPixel()), data, num_classes=3),
        *diagnose(FirstPixel(), data, num_classes=3),
    ]:
        assert found.sentence[0].isupper() and found.sentence.endswith(".") and "\n" not in found.sentence
        json.dumps(found.figures, allow_nan=False)
        for value in found.figures.values():
            assert type(value) in (int, float) or all(type(entry) in (int, float) for entry in value)


class Net(nn.Module):
    """BatchNorm and dropout, and a norm that updates its running statistics in every pass."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten())
        self.head = nn.Linear(144, 4)

    def forward(self, pixels):
        return self.head(self.body(pixels))


def test_leaves_no_trace():
    model = BatchStatistics(Net()).train()
    model.model.body[1].eval()
    model.model.body[0].weight.requires_grad_(False)
    model.model.head.weight.grad = torch.ones_like(model.model.head.weight)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    data = torch.rand(16, 3, 8, 8), torch.randint(0, 4, (16,))
    given = [tensor.clone() for tensor in data]
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with torch.no_grad():
        runs = [diagnose(model, data, num_classes=4, seed=seed) for seed in (3, 3)]

    assert runs[0] == runs[1] and any(found.outcome == "passed" for found in runs[0])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1]) and random.getstate() == before[2]
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(data, given, strict=True))
    assert not model.model.body[0].weight.requires_grad and model.model.head.weight.requires_grad
    assert torch.equal(model.model.head.weight.grad, torch.ones_like(model.model.head.weight))
    assert model.model.head.bias.grad is None and not data[0].requires_grad
