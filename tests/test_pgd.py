"""PGD: agreement with foolbox, the borders of the threat model, and that it leaves everything else alone."""

import copy
import itertools
import random
from types import SimpleNamespace

import eagerpy as ep
import foolbox
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pyautoattack.autopgd_base import L1_projection
from torch import nn

from autolora_hf.attacks import PGD, attack_mode
from autolora_hf.attacks.pgd import Ball, random_perturbation
from autolora_hf.config import ThreatModel


LINF, L2, L1 = ThreatModel("linf", 8 / 255), ThreatModel("l2", 0.5), ThreatModel("l1", 4)
ORDERS = {"linf": torch.inf, "l2": 2, "l1": 1}
FOOLBOX = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}


def make_model(seed=0, classes=5):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(128, classes),
    )
    with torch.no_grad():
        model[-1].weight.mul_(5)
        model[1].running_var.uniform_(0.5, 1.5)
    return model


def make_batch(n=6, size=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(n, 3, size, size, generator=generator)
    pixels[0] = pixels[0].round()  # corners of the pixel cube
    return pixels, torch.randint(0, 5, (n,), generator=generator)


def cross_entropies(model, pixels, labels):
    with torch.no_grad():
        return F.cross_entropy(model.eval()(pixels), labels, reduction="none")


# --- Agreement -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threat_model", [LINF, L2, ThreatModel("linf", 0.3), ThreatModel("l2", 3.0)], ids=str)
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("step", ["relative", "absolute"])
def test_agrees_with_foolbox(threat_model, targeted, random_start, step):
    model = make_model().double().eval()
    pixels, labels = make_batch()
    pixels, eps = pixels.double(), threat_model.eps
    start = None
    if random_start:
        noise = random_perturbation(pixels, threat_model, torch.Generator().manual_seed(3))
        start = (pixels + noise).clamp(0, 1)

    sizes = {"rel_stepsize": 0.25} if step == "relative" else {"abs_stepsize": eps / 7}
    theirs = FOOLBOX[threat_model.norm](steps=9, random_start=random_start, **sizes)
    if random_start:
        theirs.get_random_start = lambda x0, epsilon: ep.astensor(start)
    criterion = foolbox.criteria.TargetedMisclassification if targeted else foolbox.criteria.Misclassification
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
    expected = theirs.run(wrapped, pixels, criterion(labels), epsilon=eps)

    ours = PGD(
        threat_model,
        steps=9,
        step_size=None if step == "relative" else eps / 7,
        loss="targeted" if targeted else "ce",
        random_start=random_start,
    )
    torch.testing.assert_close(ours(model, pixels, labels, start=start), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("threat_model", [LINF, L2], ids=str)
def test_kl_agrees_with_a_plain_loop(threat_model):
    model = make_model().double().eval()
    pixels, labels = make_batch()
    pixels = pixels.double()
    noise = random_perturbation(pixels, threat_model, torch.Generator().manual_seed(0))
    x, natural = (pixels + noise).clamp(0, 1), F.softmax(model(pixels), -1).detach()
    for _ in range(5):
        x.requires_grad_(True)
        loss = F.kl_div(F.log_softmax(model(x), -1), natural, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x)
        step, eps = threat_model.eps / 4, threat_model.eps
        if threat_model.norm == "linf":
            x = torch.min(torch.max(x.detach() + step * gradient.sign(), pixels - eps), pixels + eps).clamp(0, 1)
        else:
            change = x.detach() + step * F.normalize(gradient.flatten(1)).view_as(x) - pixels
            x = (pixels + torch.renorm(change, 2, 0, eps)).clamp(0, 1)
    found = PGD(threat_model, steps=5, loss="kl")(model, pixels, labels)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-6)


# --- Losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threat_model", [LINF, L2], ids=str)
def test_ce_raises_the_loss_of_every_image(threat_model):
    model, (pixels, labels) = make_model(), make_batch()
    adversarial = PGD(threat_model)(model, pixels, labels)
    assert (cross_entropies(model, adversarial, labels) > cross_entropies(model, pixels, labels)).all()


def test_targeted_approaches_the_given_class():
    model, (pixels, labels) = make_model(), make_batch()
    targets = (labels + 1) % 5
    adversarial = PGD(ThreatModel("linf", 0.2), steps=30, loss="targeted")(model, pixels, targets)
    assert (cross_entropies(model, adversarial, targets) < cross_entropies(model, pixels, targets)).all()
    assert (model(adversarial).argmax(-1) == targets).float().mean() > 0.5


def test_kl_ignores_labels_and_moves_the_prediction():
    model, (pixels, labels) = make_model(), make_batch()
    attack = PGD(LINF, loss="kl")
    adversarial = attack(model, pixels, labels)
    assert torch.equal(adversarial, attack(model, pixels, (labels + 2) % 5))
    model.eval()
    natural, moved = F.log_softmax(model(pixels), -1), F.log_softmax(model(adversarial), -1)
    start = (pixels + random_perturbation(pixels, LINF, torch.Generator().manual_seed(0))).clamp(0, 1)
    started = F.log_softmax(model(start), -1)
    assert (natural.exp() * (natural - moved)).sum() > 2 * (natural.exp() * (natural - started)).sum()


def test_more_steps_are_stronger_on_average():
    model, (pixels, labels) = make_model(), make_batch(n=32)
    losses = [cross_entropies(model, PGD(LINF, steps=n)(model, pixels, labels), labels).mean() for n in (1, 3, 20)]
    assert losses[0] < losses[1] < losses[2]


def test_takes_model_outputs_with_logits():
    model, (pixels, labels) = make_model(), make_batch()

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return SimpleNamespace(logits=self.inner(x))

    assert torch.equal(PGD(steps=2)(Wrapped(), pixels, labels), PGD(steps=2)(model, pixels, labels))


@pytest.mark.parametrize("eps", [0.5, 4.0, 30.0, 500.0])
def test_l1_projection_agrees_with_autoattack(eps):
    pixels, _ = make_batch(n=20)
    images = pixels + torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    change = images - pixels
    expected = images + L1_projection(pixels, change, eps)
    torch.testing.assert_close(Ball(pixels, ThreatModel("l1", eps)).project(images), expected, rtol=0, atol=5e-5)


def test_l1_step_goes_to_the_largest_gradients_that_can_move():
    pixels = torch.full((1, 3, 20, 10), 0.5)
    pixels[0, 0, 0, :2] = 1
    gradient = torch.linspace(0.1, -0.2, 600).view(1, 3, 20, 10).clone()
    gradient[0, 0, 0, :4] = torch.tensor([9, -8, 7, 6])  # the first cannot grow
    moved = Ball(pixels, ThreatModel("l1", 4)).ascend(pixels, gradient, 0.3) - pixels
    assert moved.abs().sum().item() == pytest.approx(0.3)
    torch.testing.assert_close(moved[0, 0, 0, :4], torch.tensor([0, -0.1, 0.1, 0.1]))


def test_l1_attack_nears_the_optimum_of_a_linear_model():
    """The best change of a linear model spends all of eps on the largest weights that [0, 1] lets move."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1200, 2, bias=False))
    with torch.no_grad():
        model[1].weight[0] = torch.linspace(-1, 1, 1200)
        model[1].weight[1] = 0
    pixels = torch.full((1, 3, 20, 20), 0.5)
    adversarial = PGD(ThreatModel("l1", 4), steps=20)(model, pixels, torch.tensor([0]))
    gained = -((adversarial - pixels).flatten() * model[1].weight[0]).sum().item()
    best = 0.5 * model[1].weight[0].abs().topk(8).values.sum().item()
    assert 0.9 * best < gained <= best * (1 + 1e-5)


# --- Restarts and randomness -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["ce", "kl", "targeted"])
@pytest.mark.parametrize(
    "threat_model", [ThreatModel("linf", 0.05), ThreatModel("l2", 0.3), ThreatModel("l1", 3)], ids=str
)
def test_restarts_are_never_weaker(loss, threat_model):
    model, (pixels, labels) = make_model(), make_batch(n=64)
    attack = PGD(threat_model, steps=2, loss=loss)
    reached = []
    for restarts in (1, 2, 5):
        attack = PGD(threat_model, steps=2, loss=loss, restarts=restarts)
        adversarial = attack(model, pixels, labels)
        hit = model.eval()(adversarial).argmax(-1) == labels
        reached.append(hit if loss == "targeted" else ~hit)
    assert 0 < reached[0].sum() < 64
    for fewer, more in itertools.pairwise(reached):
        assert (more | ~fewer).all(), "an image that one run fooled was given back unfooled"


def test_restarts_keep_the_largest_loss_among_equal_outcomes():
    model = make_model()
    pixels, _ = make_batch(n=64)
    labels = model.eval()(pixels).argmax(-1)
    one, five = (PGD(ThreatModel("linf", 0.01), steps=2, restarts=n)(model, pixels, labels) for n in (1, 5))
    unfooled = model(five).argmax(-1) == labels
    assert unfooled.any()
    larger = cross_entropies(model, five, labels) >= cross_entropies(model, one, labels)
    assert larger[unfooled].all()


def test_equal_generators_give_equal_images():
    model, (pixels, labels) = make_model(), make_batch()
    attack = PGD(LINF, steps=2)
    runs = [attack(model, pixels, labels, generator=torch.Generator().manual_seed(seed)) for seed in (7, 7, 8)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert torch.equal(attack(model, pixels, labels), attack(model, pixels, labels))
    assert not torch.equal(attack(model, pixels, labels), PGD(LINF, steps=2, seed=1)(model, pixels, labels))
    generator = torch.Generator().manual_seed(7)
    first, second = (attack(model, pixels, labels, generator=generator) for _ in range(2))
    assert torch.equal(first, runs[0])
    assert not torch.equal(second, first)


@pytest.mark.parametrize("threat_model", [LINF, L2, L1], ids=str)
def test_random_start_is_uniform_in_the_ball(threat_model):
    pixels = torch.full((4000, 1, 1, 3), 0.5, dtype=torch.float64)
    noise = random_perturbation(pixels, threat_model, torch.Generator().manual_seed(0)).flatten(1) / threat_model.eps
    assert noise.mean(0).abs().max() < 0.05
    radii, dimension = torch.linalg.vector_norm(noise, ORDERS[threat_model.norm], dim=1), 3
    assert radii.max() <= 1
    # A share r^d of a d-dimensional ball lies within r of its centre.
    for radius in (0.3, 0.6, 0.9):
        assert abs((radii <= radius).double().mean().item() - radius**dimension) < 0.03


# --- Borders ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    norm=st.sampled_from(["linf", "l2", "l1"]),
    eps=st.floats(1e-3, 1.0),
    step=st.floats(1e-4, 0.9),
    steps=st.integers(1, 4),
    random_start=st.booleans(),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6)),
    seed=st.integers(0, 1000),
)
def test_never_leaves_the_ball_or_the_pixel_range(norm, eps, step, steps, random_start, shape, seed):
    torch.manual_seed(seed)
    pixels = torch.rand(shape)
    pixels = torch.where(torch.rand(shape) < 0.3, pixels.round(), pixels)
    labels = torch.randint(0, 4, shape[:1])
    model = nn.Sequential(nn.Flatten(), nn.Linear(pixels[0].numel(), 4))
    attack = PGD(ThreatModel(norm, eps), steps=steps, step_size=step, random_start=random_start)
    adversarial = attack(model, pixels, labels)
    assert adversarial.shape == pixels.shape
    assert adversarial.dtype == pixels.dtype
    assert not adversarial.requires_grad
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    change = (adversarial - pixels).flatten(1)
    length = torch.linalg.vector_norm(change, ORDERS[norm], dim=1)
    assert (length <= eps * (1 + 1e-5) + 1e-6).all()


@pytest.mark.parametrize("threat_model", [LINF, L2, L1], ids=str)
def test_a_start_outside_the_ball_is_projected(threat_model):
    model, (pixels, labels) = make_model(), make_batch()
    change = (PGD(threat_model, steps=1)(model, pixels, labels, start=1 - pixels) - pixels).flatten(1)
    length = torch.linalg.vector_norm(change, ORDERS[threat_model.norm], dim=1)
    assert (length <= threat_model.eps * (1 + 1e-5)).all()


@pytest.mark.parametrize("threat_model", [LINF, L2], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dead", [False, True])
def test_other_precisions_and_zero_gradients_stay_finite(threat_model, dtype, dead):
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5)).to(dtype)
    if dead:
        nn.init.zeros_(model[1].weight)
    pixels = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    for random_start in (True, False):
        attack = PGD(threat_model, steps=3, random_start=random_start)
        adversarial = attack(model, pixels, torch.arange(4))
        assert adversarial.dtype == dtype
        assert adversarial.isfinite().all()
        assert dead or not torch.equal(adversarial, pixels)


# --- Side effects ----------------------------------------------------------------------------------------------------


def state_of(model):
    return {
        "weights and buffers": copy.deepcopy(model.state_dict()),
        "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "training": {n: m.training for n, m in model.named_modules()},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
    }


def assert_same_state(before, after):
    for kind in ("weights and buffers", "gradients"):
        for name, value in before[kind].items():
            assert (value is None and after[kind][name] is None) or torch.equal(value, after[kind][name]), (kind, name)
    assert before["training"] == after["training"]
    assert before["requires_grad"] == after["requires_grad"]


def mixed_model():
    model = make_model().train()
    model[1].eval()  # frozen norm statistics inside a training model
    model[0].bias.requires_grad_(False)
    model(make_batch()[0]).sum().backward()
    model[6].bias.grad = None
    return model


@pytest.mark.parametrize("loss", ["ce", "kl", "targeted"])
@pytest.mark.parametrize("train_everything", [False, True])
def test_leaves_model_inputs_and_global_randomness_alone(loss, train_everything):
    model = mixed_model()
    if train_everything:
        model.train()
    pixels, labels = make_batch()
    before, originals = state_of(model), (pixels.clone(), labels.clone())
    randomness = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    PGD(LINF, steps=3, loss=loss, restarts=2)(model, pixels, labels)
    assert_same_state(before, state_of(model))
    assert torch.equal(pixels, originals[0])
    assert torch.equal(labels, originals[1])
    assert pixels.grad is None
    assert not pixels.requires_grad
    assert torch.equal(torch.get_rng_state(), randomness[0])
    assert random.getstate() == randomness[1]
    assert (np.random.get_state()[1] == randomness[2]).all()


def test_attacks_the_model_in_eval_mode():
    model, (pixels, labels) = make_model(), make_batch()
    in_eval = PGD(LINF)(model.eval(), pixels, labels)
    assert torch.equal(PGD(LINF)(model.train(), pixels, labels), in_eval)


def test_restores_the_model_when_the_attack_fails():
    model = mixed_model()
    before = state_of(model)
    with pytest.raises((RuntimeError, IndexError)):
        PGD()(model, make_batch()[0], torch.full((6,), 99))
    assert_same_state(before, state_of(model))


def test_works_inside_no_grad_and_leaves_it_on():
    model, (pixels, labels) = make_model(), make_batch()
    expected = PGD(steps=2)(model, pixels, labels)
    with torch.no_grad():
        assert torch.equal(PGD(steps=2)(model, pixels, labels), expected)
        assert not torch.is_grad_enabled()


def test_inputs_that_require_gradients_get_none():
    model, (pixels, labels) = make_model(), make_batch()
    pixels.requires_grad_(True)
    adversarial = PGD(steps=2)(model, pixels, labels)
    assert not adversarial.requires_grad
    assert pixels.grad is None
    assert pixels.requires_grad


def test_attack_mode_restores_on_errors():
    model = mixed_model()
    before = state_of(model)
    with pytest.raises(KeyError), attack_mode(model):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        raise KeyError
    assert_same_state(before, state_of(model))


# --- Arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "`steps` must be an integer of at least 1, got 0"),
        ({"steps": 2.5}, "`steps` must be an integer"),
        ({"restarts": 0}, "`restarts` must be an integer of at least 1, got 0"),
        ({"restarts": 2, "random_start": False}, "would repeat the same run"),
        ({"loss": "dlr"}, "`loss` must be one of ce, kl, targeted, l2, cosine, got 'dlr'"),
        ({"loss": "kl", "random_start": False}, "its gradient is exactly zero"),
        ({"step_size": 0}, "`step_size` must be positive"),
        ({"step_size": -0.1}, "`step_size` must be positive"),
        ({"step_size": float("nan")}, "`step_size` must be positive"),
        ({"step_size": 2}, "Did you mean 2/255 = 0.00784"),
        ({"step_size": 15, "threat_model": L2}, "Did you mean 15/255"),
    ],
)
def test_invalid_arguments(arguments, message):
    with pytest.raises(ValueError) as error:
        PGD(**arguments)
    assert message in str(error.value)


def test_threat_model_must_be_one():
    with pytest.raises(TypeError, match="must be a ThreatModel, got float"):
        PGD(8 / 255)


def test_start_and_restarts_exclude_each_other():
    model, (pixels, labels) = make_model(), make_batch()
    with pytest.raises(ValueError, match="cannot be combined with `restarts`"):
        PGD(restarts=2)(model, pixels, labels, start=pixels)


def test_pixels_are_checked():
    model, (pixels, labels) = make_model(), make_batch()
    with pytest.raises(ValueError, match="look normalised"):
        PGD()(model, (pixels - 0.5) / 0.25, labels)


def test_defaults_and_text():
    assert PGD().step_size == pytest.approx(2 / 255)
    assert str(PGD()) == "PGD-10"
    assert str(PGD(steps=20, loss="kl", restarts=5)) == "PGD-20 (kl), 5 restarts"
