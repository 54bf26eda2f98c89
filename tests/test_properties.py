"""Attacks and schedules under generated settings.

More of them: `AUTOLORA_PROPERTY_EXAMPLES=2000 pytest tests/test_properties.py`.
"""

import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autolora_hf import PGD, ThreatModel
from autolora_hf.attacks import attack_mode
from autolora_hf.schedules import PlateauHalving, default_checkpoints, default_epochs, loss_scalars
from autolora_hf.training.schedule import AutoLoraScheduler


EXAMPLES = int(os.environ.get("AUTOLORA_PROPERTY_EXAMPLES", "60"))
many = settings(max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES <= 100)

accuracies = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.just(float("nan")))


class Small(nn.Module):
    """BatchNorm, dropout and four classes: what an attack could leave a trace in."""

    def __init__(self, channels, seed):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Conv2d(channels, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 4, 1)
            )

    def forward(self, pixels):
        return self.layers(pixels).mean((2, 3))


# ---- attacks ----


@many
@given(
    norm=st.sampled_from(["linf", "l2", "l1"]),
    eps=st.floats(1e-4, 1.0),
    step=st.one_of(st.none(), st.floats(1e-5, 0.9)),
    steps=st.integers(1, 3),
    loss=st.sampled_from(["ce", "kl", "targeted"]),
    restarts=st.integers(1, 2),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    shape=st.tuples(st.integers(1, 4), st.sampled_from([1, 3]), st.integers(1, 5), st.integers(1, 5)),
    seed=st.integers(0, 10_000),
)
def test_attacks(norm, eps, step, steps, loss, restarts, dtype, shape, seed):
    """In the ball and in [0, 1], shape and dtype as given, repeatable, and no trace in model or randomness."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(shape, generator=generator, dtype=dtype)
    pixels = torch.where(torch.rand(shape, generator=generator) < 0.3, pixels.round(), pixels)
    labels = torch.arange(seed, seed + shape[0]) % 4
    model = Small(shape[1], seed).to(dtype).train()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given_pixels, state = pixels.clone(), torch.get_rng_state()
    attack = PGD(ThreatModel(norm, eps), steps, step, loss, restarts=restarts, seed=seed)
    adversarial = attack(model, pixels, labels)

    assert adversarial.shape == shape and adversarial.dtype == dtype and adversarial.device == pixels.device
    assert not adversarial.requires_grad and adversarial.isfinite().all()
    assert 0 <= adversarial.min() and adversarial.max() <= 1
    change = (adversarial.double() - pixels.double()).flatten(1)
    length = torch.linalg.vector_norm(change, {"linf": torch.inf, "l2": 2, "l1": 1}[norm], dim=1)
    assert (length <= eps * (1 + 1e-5) + 1e-7).all()

    assert torch.equal(attack(model, pixels, labels), adversarial)
    assert torch.equal(pixels, given_pixels) and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all((parameter.grad == 1).all() and parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())


@many
@given(seed=st.integers(0, 10_000), count=st.integers(2, 5), steps=st.integers(1, 4))
def test_an_image_is_attacked_for_itself(seed, count, steps):
    """A batch of one gives what the image gets in a batch of many, for each class, from the same start."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(count, 3, 4, 4, generator=generator, dtype=torch.float64)
    labels = torch.arange(count) % 4
    model = Small(3, seed).double()
    attack = PGD(ThreatModel("linf", 0.1), steps)
    start = (pixels + 0.05).clamp(0, 1)
    together = attack(model, pixels, labels, start=start)
    for i in range(count):
        alone = attack(model, pixels[i : i + 1], labels[i : i + 1], start=start[i : i + 1])
        assert torch.allclose(alone, together[i : i + 1], atol=1e-12)


@many
@given(seed=st.integers(0, 10_000), steps=st.integers(1, 5), size=st.floats(0.01, 0.5))
def test_an_attack_on_a_linear_model_reaches_the_worst_case(seed, steps, size):
    """There the worst image is known: a corner of the cube of the ball and [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(2, 12, generator=generator, dtype=torch.float64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2, bias=False, dtype=torch.float64))
    model[1].weight.data = weight
    pixels = torch.rand(2, 3, 2, 2, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1])
    eps = 0.1
    attack = PGD(ThreatModel("linf", eps), steps, size, random_start=False)
    away = torch.stack([weight[1] - weight[0], weight[0] - weight[1]]).sign().view_as(pixels)
    reached = (pixels + min(steps * size, eps) * away).clamp(0, 1)
    assert torch.allclose(attack(model, pixels, labels), reached, atol=1e-9)


def test_attack_mode_is_left_after_an_error():
    model = Small(3, 0).train()
    with pytest.raises(RuntimeError), attack_mode(model):
        raise RuntimeError
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


# ---- schedules ----


@many
@given(epochs=st.integers(1, 400), interval=st.one_of(st.none(), st.integers(1, 50)), steps=st.integers(0, 10_000))
def test_checkpoints_rise_within_the_training(epochs, interval, steps):
    checkpoints = default_checkpoints(epochs, interval)
    assert checkpoints[0] == 0 and checkpoints == sorted(set(checkpoints)) and checkpoints[-1] < epochs
    assert 60 <= default_epochs(steps) <= 240
    assert default_epochs(steps + 1) <= default_epochs(steps)


@many
@given(first=st.floats(0, 1), second=st.floats(0, 1), alpha=st.floats(0.1, 5), most=st.floats(0, 20))
def test_scalars_move_from_natural_to_robust(first, second, alpha, most):
    low, high = (loss_scalars(accuracy, alpha, most) for accuracy in sorted((first, second)))
    assert 0 <= high.lambda1 <= low.lambda1 <= 1
    assert 0 <= low.lambda2 <= high.lambda2 <= most


@many
@given(
    history=st.lists(st.tuples(accuracies, st.floats(0, 1)), min_size=1, max_size=30),
    interval=st.integers(1, 5),
    rule=st.sampled_from(["paper", "released"]),
    chance=st.sampled_from([0.0, 0.1, 0.5]),
    cut=st.integers(0, 29),
)
def test_a_schedule_that_is_saved_and_loaded_goes_on_as_it_would_have(history, interval, rule, chance, cut):
    """Through JSON, at any epoch; and a rate is only ever halved, at checkpoints, once the model beats chance."""

    def fresh():
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
        halving = PlateauHalving(default_checkpoints(len(history), interval), rule=rule, chance=chance)
        return AutoLoraScheduler(optimizer, halving, min_learning_rate=0.01)

    def state_of(scheduler):
        return scheduler.get_last_lr(), scheduler.scalars, scheduler.reload_due, scheduler.finished

    whole, resumed, rate = fresh(), fresh(), 0.4
    for epoch, (robust, training) in enumerate(history):
        if epoch == cut:
            saved = json.loads(json.dumps(whole.state_dict()))
            resumed = fresh()
            resumed.load_state_dict(saved)
        halved = whole.end_epoch(robust, training)
        assert resumed.end_epoch(robust, training) == halved
        assert state_of(resumed) == state_of(whole)
        (now,) = whole.get_last_lr()
        assert now == (rate / 2 if halved else rate)
        seen = [value for value, _ in history[: epoch + 1] if value == value]
        assert not halved or (epoch % interval == 0 and epoch > 0 and max(seen) > chance)
        rate = now
