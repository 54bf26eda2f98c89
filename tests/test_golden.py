"""The same numbers as the released code of AutoLoRa, in float64 and from weights that a formula gives."""

import json
import math
import re
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from autolora_hf import PGD, AutoLoraConfig, Preprocessing, ThreatModel, get_autolora_model
from autolora_hf.objectives import AutoLora, Batch
from autolora_hf.schedules import LossScalars, PlateauHalving, loss_scalars
from autolora_hf.training.schedule import AutoLoraScheduler


GOLDEN = Path(__file__).parent / "golden"
STEPS = json.loads((GOLDEN / "autolora_step.json").read_text())
TRACES = json.loads((GOLDEN / "lr_schedule.json").read_text())
NORM_SETS = {"single_bn": "shared", "dual_bn": "dual"}


def fill(name, shape, scale):
    h = sum(map(ord, name)) % 97
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return scale * torch.sin(0.37 * i + 0.11 * torch.sqrt(i) * (h % 7) + h).reshape(shape)


def golden_value(name, shape):
    plain = name.split("@")[0]
    norm = re.search(r"(^|\.)(bn\d|downsample\.1)\.", plain)
    if plain.endswith("lora_A"):
        return fill(name, shape, 1.0)
    if plain.endswith("lora_B"):
        return fill(name, shape, 0.02)
    if plain.endswith("running_mean"):
        return fill(name, shape, 0.05)
    if plain.endswith("running_var"):
        return 1 + fill(name, shape, 0.2)
    if plain.startswith("fc."):
        return fill(name, shape, 0.05)
    if norm:
        return fill(name, shape, 0.1) + (1 if plain.endswith("weight") else 0)
    return fill(name, shape, math.sqrt(2 / math.prod(shape[1:])))


def golden_tensors(model, dual):
    """Every parameter and running statistic by the name it has in the golden files."""
    tensors = {}
    for name, tensor in model.get_base_model().state_dict(keep_vars=True).items():
        name = re.sub(r"(lora_[AB])\.natural", r"\1", name.replace(".base_layer", ""))
        norm = re.search(r"(^|\.)(bn\d|downsample\.1)\.", name)
        tensors[f"{name}@robust" if dual and norm else name] = tensor
    for name, tensor in model.natural_norms.state_dict(keep_vars=True).items():
        tensors[f"{name.replace('/', '.')}@natural"] = tensor
    return {name: tensor for name, tensor in tensors.items() if "num_batches_tracked" not in name}


def golden_model(norm):
    network = timm.create_model("resnet18", layers=(1, 1, 1, 1), num_classes=10)
    network.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    network.maxpool = nn.Identity()
    config = AutoLoraConfig(layout="released", norm=norm)
    model = get_autolora_model(network.double(), config, preprocessing=Preprocessing((32, 32)))
    tensors = golden_tensors(model, norm == "dual")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(golden_value(name, tuple(tensor.shape)))
    return model, tensors


def share_first_shortcut(model):
    """A defect of the released code with two BatchNorm sets: all images get the first one's shortcut."""
    base = model.get_base_model()
    for stage in (base.layer2, base.layer3, base.layer4):
        stage[0].downsample.register_forward_hook(lambda _module, _input, output: output[:1].expand_as(output))


def close(expected):
    # The head's gradients sum to zero up to rounding errors.
    return pytest.approx(expected, rel=1e-6, abs=1e-12)


IMAGES = 0.5 + 0.5 * fill("x", (4, 3, 32, 32), 1.0)
START = IMAGES + 0.001 * fill("xnoise", (4, 3, 32, 32), 1.0)


@pytest.mark.parametrize("norm_sets", NORM_SETS)
def test_one_training_step(norm_sets):
    golden = STEPS[norm_sets]
    model, tensors = golden_model(NORM_SETS[norm_sets])
    if norm_sets == "dual_bn":
        share_first_shortcut(model)
    routes = {name: model.pixel_space(name) for name in ("robust", "natural")}
    labels = torch.tensor(golden["labels"])

    model.eval()
    with torch.no_grad():
        for name, route in routes.items():
            for logits, expected in zip(route(IMAGES).tolist(), golden[f"eval_logits_{name}"], strict=True):
                assert logits == close(expected)

    attack = PGD(ThreatModel("linf", 8 / 255), steps=10, step_size=2 / 255)
    adversarial = attack(model.pixel_space(), IMAGES, labels, start=START)
    assert all(tensor.grad is None for tensor in tensors.values())

    model.train()
    scalars = LossScalars(golden["lambda1"], golden["lambda2"])
    batch = Batch(IMAGES, adversarial, labels)
    loss = AutoLora()(lambda route, images: routes[route](images), batch, scalars).loss
    assert loss.item() == close(golden["loss"])

    loss.backward()
    gradients = {name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}
    assert gradients.keys() == golden["grad_norm_sum"].keys()
    assert sum(parameter.grad is not None for parameter in model.parameters()) == len(gradients)
    for name, gradient in gradients.items():
        assert [gradient.norm().item(), gradient.sum().item()] == close(golden["grad_norm_sum"][name]), name
    for name, expected in golden["bn_norm_sum"].items():
        assert [tensors[name].norm().item(), tensors[name].sum().item()] == close(expected), name


def test_dual_norm_without_the_defect_agrees_on_the_first_image():
    """The first image's own shortcut is the one that all images get in the released code."""
    model, _ = golden_model("dual")
    model.eval()
    for name in ("robust", "natural"):
        expected = torch.tensor(STEPS["dual_bn"][f"eval_logits_{name}"], dtype=torch.float64)
        with torch.no_grad():
            logits = model.pixel_space(name)(IMAGES)
        assert logits[0].tolist() == close(expected[0].tolist())
        # With the defect, images 1 to 3 are nearly the same as image 0.
        assert (logits - expected)[1:].abs().max() > 1e-3


# ---- learning rate ----


@pytest.mark.parametrize("case", TRACES, ids=range(len(TRACES)))
def test_released_rule(case):
    halving = PlateauHalving(case["W"], rho=case["rho"], rule="released")
    rate, rates, halvings = case["eta0"], [], []
    for epoch, accuracy in enumerate(case["trace"], start=1):
        rates.append(rate)
        condition = halving.update(accuracy)
        if condition:
            rate /= 2
            halvings.append([epoch, condition])
        if rate < case["stop"]:
            break
    assert rates == case["lr_per_epoch"]
    assert halvings == case["halvings"]


@pytest.mark.parametrize("case", TRACES, ids=range(len(TRACES)))
def test_released_rule_through_an_optimizer(case):
    """Two parameter groups; optimiser steps between the epochs; the state is saved and loaded on the way."""

    def new_run():
        groups = [{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(2)]
        optimizer = torch.optim.SGD(groups, lr=case["eta0"], momentum=0.9)
        halving = PlateauHalving(case["W"], rho=case["rho"], rule="released")
        return optimizer, AutoLoraScheduler(optimizer, halving, min_learning_rate=case["stop"])

    (optimizer, scheduler), rates, halved_after = new_run(), [], []
    for epoch, accuracy in enumerate(case["trace"], start=1):
        rates.append(optimizer.param_groups[0]["lr"])
        for _ in range(3):
            optimizer.step()
            scheduler.step()
        assert [group["lr"] for group in optimizer.param_groups] == rates[-1:] * 2
        if scheduler.end_epoch(accuracy, training_accuracy=accuracy):
            assert scheduler.reload_due
            halved_after.append(epoch)
        assert scheduler.scalars == loss_scalars(accuracy)
        assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
        if epoch % 7 == 0:
            states = json.loads(json.dumps([optimizer.state_dict(), scheduler.state_dict()]))  # plain values only
            optimizer, scheduler = new_run()
            optimizer.load_state_dict(states[0])
            scheduler.load_state_dict(states[1])
        if scheduler.finished:
            break
    assert rates == case["lr_per_epoch"]
    assert halved_after == [epoch for epoch, _ in case["halvings"]]


def conditions(trace, checkpoints, rule, **kwargs):
    halving = PlateauHalving(checkpoints, rule=rule, **kwargs)
    return [halving.update(accuracy) for accuracy in trace]


# At epoch 4 by condition 1; then three of four epochs of each window rise, but never to a new best.
BELOW_BEST = [0.9, 0.5, 0.4, 0.3, 0.2, 0.3, 0.4, 0.5, 0.2, 0.3, 0.4, 0.5, 0.2, 0.3, 0.4, 0.5, 0.2]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        # Condition 2 asks that the rate was not halved at the checkpoint before, so every second one is spared.
        ("paper", {4: 1, 8: 0, 12: 2, 16: 0}),
        ("released", {4: 1, 8: 2, 12: 2, 16: 2}),
    ],
)
def test_rules_differ_after_a_halving(rule, expected):
    found = conditions(BELOW_BEST, [0, 4, 8, 12, 16], rule)
    assert found == [expected.get(epoch, 0) for epoch in range(17)]


def test_rules_agree_where_nothing_was_halved_before():
    trace = [0.1, 0.2, 0.3, 0.4, 0.5, 0.2, 0.3, 0.4, 0.45]
    assert conditions(trace, [0, 4, 8], "paper") == conditions(trace, [0, 4, 8], "released") == [0] * 8 + [2]


@pytest.mark.parametrize("rule", ["paper", "released"])
def test_rho_is_the_least_share_of_improving_epochs(rule):
    three_of_four = [0.1, 0.2, 0.3, 0.2, 0.4]
    two_of_four = [0.1, 0.2, 0.2, 0.2, 0.4]
    assert conditions(three_of_four, [0, 4], rule)[-1] == 0
    assert conditions(two_of_four, [0, 4], rule)[-1] == 1
    assert conditions(two_of_four, [0, 4], rule, rho=0.5)[-1] == 0


def test_nan_counts_as_no_improvement():
    assert conditions([0.1, 0.2, float("nan"), float("nan"), float("nan")], [0, 4], "paper")[-1] == 1


@pytest.mark.parametrize(
    ("accuracy", "expected"), [(0, (1, 0)), (0.1, (0.9, 0.6)), (0.5, (0.5, 3.0)), (0.8, (0.2, 4.8)), (1, (0, 6))]
)
def test_loss_scalars(accuracy, expected):
    assert loss_scalars(accuracy) == pytest.approx(expected)
    assert loss_scalars(accuracy, alpha=2, lambda2_max=3) == pytest.approx((1 - accuracy**2, 3 * accuracy**2))


def test_bad_schedules_are_refused():
    with pytest.raises(ValueError, match=r"rise from 0, got \[4, 8\]"):
        PlateauHalving([4, 8])
    with pytest.raises(ValueError, match="'paper' or 'released', got 'apgd'"):
        PlateauHalving([0, 4], rule="apgd")
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], got 37"):
        loss_scalars(37)
