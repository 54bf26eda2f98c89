"""What the benchmark compares with does the same as the package, and the benchmark runs."""

import copy
import json
import os
import subprocess
import sys

import pytest
import timm
import torch
from script_modules import SCRIPTS, load
from torch import nn

from autolora_hf import PGD, Preprocessing, ThreatModel, get_autolora_model
from autolora_hf.frozen import FrozenRoute
from autolora_hf.layers import branch_parameters
from autolora_hf.objectives import AutoLora, Batch
from autolora_hf.schedules import LossScalars


released = load("released_step")

SIZE = 32
NETWORKS = {
    "convolutions": lambda: timm.create_model("test_resnet", num_classes=5),
    "attention": lambda: timm.create_model("test_vit", num_classes=5, img_size=SIZE, depth=2),
}


def moved(network):
    """No weight or statistic at its initial value."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean += 0.1 * torch.randn_like(module.running_mean)
                module.running_var *= 0.5 + torch.rand_like(module.running_var)
    return network


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_the_released_step_is_the_same_mathematics(build):
    network = moved(build()).double()
    plain = released.ReleasedModel(copy.deepcopy(network))
    model = get_autolora_model(network, preprocessing=Preprocessing((SIZE, SIZE)))
    layers = model.lora_layers()
    names = {name for name, module in plain.network.named_modules() if isinstance(module, released.LoraLayer)}
    assert names == set(layers)
    with torch.no_grad():
        for name, layer in layers.items():
            for side in ("lora_A", "lora_B"):
                live = branch_parameters(layer, "natural")[side]
                value = 0.05 * torch.randn_like(live)
                for target in (live, getattr(plain.network.get_submodule(name), side)):
                    target.copy_(value)

    pixels, labels = torch.rand(6, 3, SIZE, SIZE, dtype=torch.float64), torch.randint(5, (6,))
    start = pixels + 0.001 * torch.randn_like(pixels)
    theirs = released.released_attack(plain, pixels, labels, start)
    assert plain.training
    attack = PGD(ThreatModel("linf", released.EPS), steps=released.STEPS, step_size=released.STEP_SIZE)
    ours = attack(FrozenRoute(model), pixels, labels, start=start)
    assert (ours - theirs).abs().max() < 1e-12

    model.train()
    loss = released.released_loss(plain, pixels, theirs, labels, 0.3, 2.0)
    batch = Batch(pixels, ours, labels)
    own = AutoLora()(lambda route, images: model.pixel_space(route)(images), batch, LossScalars(0.3, 2.0)).loss
    assert abs(own - loss) < 1e-12
    loss.backward()
    own.backward()
    expected = {name.replace(".layer.", "."): p.grad for name, p in plain.network.named_parameters()}
    found = {
        name.replace(".base_layer.", ".").replace(".natural", ""): parameter.grad
        for name, parameter in model.get_base_model().named_parameters()
    }
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert (gradient - expected[name]).abs().max() <= 1e-10 * expected[name].abs().max() + 1e-14, name
    statistics = dict(model.get_base_model().named_buffers())
    for name, buffer in plain.network.named_buffers():
        torch.testing.assert_close(statistics[name], buffer, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_the_whole_benchmark_runs(tmp_path):
    """On a tiny network; a section that is measured again replaces its own entry only."""
    output = tmp_path / "speed.json"
    command = [
        sys.executable,
        str(SCRIPTS / "benchmark_speed.py"),
        "--smoke",
        "--rounds",
        "1",
        "--output",
        str(output),
    ]

    def run(*options):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(output.read_text())["entries"]

    entries = run("--device", "cpu")
    sections = {"attack", "step", "scaling", "memory", "loading", "autoattack"}
    assert {entry["section"] for entry in entries.values()} == sections
    for entry in entries.values():
        assert not [row for row in entry["rows"].values() if row.get("missing", "").startswith("failed")]
    page = output.with_suffix(".md").read_text()
    for title in ("The attack alone", "A training step", "How a step grows", "Memory", "AutoAttack", "An epoch"):
        assert f"## {title}" in page

    again = run("--device", "cpu", "--sections", "memory")
    (key,) = (key for key, entry in entries.items() if entry["section"] == "memory")
    assert {name: entry for name, entry in again.items() if name != key} == {
        name: entry for name, entry in entries.items() if name != key
    }
