"""AutoAttack for any number of classes, checked on linear models, whose robustness is known exactly."""

import logging
import random
import sys

import numpy as np
import pyautoattack
import pytest
import torch
from tiny_models import MODELS
from tiny_models import pixels as random_pixels
from torch import nn

from autolora_hf.config import ThreatModel
from autolora_hf.evaluation import AttackView, evaluate_robustness
from autolora_hf.evaluation.autoattack import AutoAttackComponent, autoattack_components


NAMES = {
    2: ["APGD-CE", "FAB-T", "Square"],
    3: ["APGD-CE", "APGD-DLR", "FAB-T", "Square"],
    4: ["APGD-CE", "APGD-T", "FAB-T", "Square"],
}
THREATS = {"linf": ThreatModel("linf", 0.006), "l2": ThreatModel("l2", 0.1), "l1": ThreatModel("l1", 0.25)}


@pytest.fixture
def shortened(monkeypatch):
    """Fewer iterations and queries, in our adapter and in the library's own evaluation."""
    original = pyautoattack.AutoAttack.__init__

    def initialise(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.apgd.n_iter = self.apgd_targeted.n_iter = self.fab.n_iter = 20
        self.square.n_queries = 40

    monkeypatch.setattr(pyautoattack.AutoAttack, "__init__", initialise)


def linear_case(num_classes, images=24, size=8):
    """A linear classifier with images it classifies correctly, but for two, all away from 0 and 1."""
    generator = torch.Generator().manual_seed(num_classes)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, num_classes))
    with torch.no_grad():
        weight = torch.randn(model[1].weight.shape, generator=generator) / 10
        # Without a mean no class is favoured by the brightness of an image.
        model[1].weight.copy_(weight - weight.mean(1, keepdim=True))
        model[1].bias.zero_()
    pixels = 0.3 + 0.4 * torch.rand(images, 3, size, size, generator=generator)
    labels = model(pixels).argmax(1)
    labels[:2] = (labels[:2] + 1) % num_classes
    return model, pixels, labels


def exactly_robust(model, pixels, labels, threat_model):
    """For a linear model and a ball inside [0, 1]: the margin to each class against the dual norm."""
    weight, logits = model[1].weight.detach(), model(pixels).detach()
    robust = logits.argmax(1) == labels
    for other in range(len(weight)):
        rows = labels != other
        normal = (weight[labels] - weight[other])[rows]
        length = normal.norm(p={"linf": 1, "l2": 2, "l1": torch.inf}[threat_model.norm], dim=1)
        margin = logits.gather(1, labels[:, None])[:, 0] - logits[:, other]
        robust[rows] &= margin[rows] > threat_model.eps * length
    return robust


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("num_classes", [2, 3, 4, 5, 9, 10, 12])
def test_exact_on_linear_models(num_classes, norm, shortened):
    model, pixels, labels = linear_case(num_classes)
    threat_model = THREATS[norm]
    truth = exactly_robust(model, pixels, labels, threat_model)
    assert 0 < truth.sum() < (model(pixels).argmax(1) == labels).sum(), "the case must not be trivial"

    report = evaluate_robustness(model, (pixels, labels), threat_model, progress=False)

    assert report.robust_correct == truth.tolist()
    assert report.natural.correct == len(labels) - 2
    assert [row.name for row in report.attacks if row.left_out is None] == NAMES.get(num_classes, NAMES[4])
    assert report.protocol == ("autoattack" if num_classes >= 4 else "autoattack-reduced")
    assert ("APGD-T" in report.left_out) == (num_classes < 4)
    assert report.publishable and report.num_classes == num_classes


@pytest.mark.parametrize("num_classes", [2, 3, 4, 10])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_every_component_alone(num_classes, norm, shortened):
    """Each attack finds something, stays in the ball, is deterministic and leaves unbroken images unchanged."""
    model, pixels, labels = linear_case(num_classes)
    threat_model = ThreatModel(norm, THREATS[norm].eps * 2.5)
    pixels, labels = pixels[2:], labels[2:]
    components, _ = autoattack_components(threat_model, num_classes, (8, 8))
    for component in components:
        adversarial = component(AttackView(model), pixels, labels)
        broken = model(adversarial).argmax(1) != labels
        assert broken.any(), component
        assert torch.equal(adversarial[~broken], pixels[~broken]), component
        change = (adversarial.double() - pixels.double()).flatten(1)
        distance = torch.linalg.vector_norm(change, {"linf": torch.inf, "l2": 2, "l1": 1}[norm], dim=1)
        assert distance.max() <= threat_model.eps + (1e-5 if norm == "l1" else 1e-6), component
        assert adversarial.min() >= 0 and adversarial.max() <= 1
        assert torch.equal(adversarial, component(AttackView(model), pixels, labels)), component


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_agrees_with_the_library(norm, shortened):
    """Image by image with `version="standard"` of the library itself, at its minimum of ten classes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 24), nn.ReLU(), nn.Linear(24, 10)).eval()
    pixels = torch.rand(18, 3, 8, 8)
    labels = model(pixels).argmax(1)
    labels[::6] = (labels[::6] + 1) % 10
    threat_model = ThreatModel(norm, {"linf": 0.004, "l2": 0.04, "l1": 0.4}[norm])

    report = evaluate_robustness(model, (pixels, labels), threat_model, batch_size=9, seed=3, progress=False)

    name = {"linf": "Linf", "l2": "L2", "l1": "L1"}[norm]
    reference = pyautoattack.AutoAttack(model, norm=name, eps=threat_model.eps, seed=3, version="standard")
    adversarial, _ = reference.run_standard_evaluation(pixels, labels, batch_size=9)
    expected = model(adversarial).argmax(1) == labels
    assert 0 < expected.sum() < 15
    assert report.robust_correct == expected.tolist()


def test_standard_settings():
    """Square with its full 5000 queries, once."""
    model, pixels, labels = linear_case(4, images=4, size=5)
    report = evaluate_robustness(model, (pixels, labels), ThreatModel("linf", 0.002), progress=False)
    assert report.attack == (
        "AutoAttack (standard): APGD-CE, APGD-T (3 target classes), FAB-T (3 target classes), Square (5000 queries)"
    )
    assert report.robust.correct > 0


def test_broken_model_has_no_robust_image(shortened):
    model, pixels, labels = linear_case(5)
    report = evaluate_robustness(model, (pixels, labels), ThreatModel("linf", 0.3), progress=False)
    assert report.robust_accuracy == 0
    assert [(row.attacked, row.broken) for row in report.attacks] == [(22, 22), (0, 0), (0, 0), (0, 0)]


class Constant(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.logits = nn.Parameter(torch.arange(num_classes).float())

    def forward(self, pixels):
        return self.logits.expand(len(pixels), -1)


@pytest.mark.parametrize("num_classes", [2, 3, 10])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_constant_classifier_cannot_be_broken(num_classes, norm, shortened):
    model = Constant(num_classes)
    pixels = torch.rand(8, 3, 8, 8)
    labels = torch.tensor([num_classes - 1] * 6 + [0, 0])
    report = evaluate_robustness(model, (pixels, labels), ThreatModel(norm, 0.1), progress=False)
    assert report.robust.correct == report.natural.correct == 6
    assert any("gives every image the same logits" in text for text in report.warnings)
    assert torch.equal(model.logits, torch.arange(num_classes).float())


def test_seed_and_global_state(shortened):
    model, pixels, labels = linear_case(4)
    logger = logging.getLogger("auto-attack")
    component = AutoAttackComponent("Square", ThreatModel("linf", 0.05), 4, seed=1)
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first = component(model, pixels, labels)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]
    assert not logger.disabled
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert model.training
    other_seed = AutoAttackComponent("Square", ThreatModel("linf", 0.05), 4, seed=2)
    assert not torch.equal(first, other_seed(model, pixels, labels))


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_square_runs_exactly_where_the_library_can(norm):
    class First(nn.Module):
        def forward(self, pixels):
            return pixels.flatten(1)[:, :4].clone()

    sizes = [(n, n) for n in range(3, 33)] + [(8, 12), (12, 8), (30, 20), (224, 288), (10, 40)]
    left_out = []
    for size in sizes:
        square = pyautoattack.square.SquareAttack(First(), norm=norm.upper(), n_queries=1, eps=1e-4, seed=0)
        pixels = torch.rand(2, 1, *size)
        labels = First()(pixels).argmax(1)
        try:
            square.perturb(pixels, labels)
            runs = True
        except (RuntimeError, ZeroDivisionError):
            runs = False
        components, reasons = autoattack_components(ThreatModel(norm, 1), 4, size)
        assert runs == (components[-1].name == "Square") == ("Square" not in reasons), size
        assert autoattack_components(ThreatModel("linf", 0.1), 4, size)[1] == {}
        left_out += [] if runs else [size]
    assert (12, 12) in left_out and (32, 32) not in left_out and (28, 28) not in left_out


def test_refusals(monkeypatch):
    with pytest.raises(ValueError, match="at least 2 classes"):
        autoattack_components(THREATS["linf"], 1, (8, 8))
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pyautoattack"):
        autoattack_components(THREATS["linf"], 10, (8, 8))


@pytest.mark.parametrize("name", MODELS)
def test_no_images_have_no_logits(name):
    """Square asks for them when its first stripes have broken every image."""
    view = AttackView(MODELS[name].adapted(num_classes=4))
    assert view(random_pixels()[:0]).shape == (0, 4)
