"""Figures: they are drawn, say what they should, and touch no global state of matplotlib."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from torch import nn

from autolora_hf.evaluation import adversarial_examples_figure, training_curves_figure


class Channel(nn.Module):
    def forward(self, pixels):
        return pixels[:, :, 0, 0] * 10


def pair():
    pixels = torch.full((3, 3, 8, 8), 0.4)
    pixels[0, 0, 0, 0] = pixels[1, 1, 0, 0] = pixels[2, 2, 0, 0] = 0.8
    adversarial = pixels.clone()
    adversarial[1, 0] += 0.5
    return pixels, torch.tensor([0, 1, 1]), adversarial


def test_adversarial_examples(tmp_path):
    model = Channel().train()
    path = tmp_path / "sub" / "examples.png"
    figure = adversarial_examples_figure(model, *pair(), class_names=["red", "green", "blue"], path=path)
    assert isinstance(figure, Figure) and model.training
    axes = np.array(figure.axes).reshape(3, 3)
    assert [axis.get_title().split("\n")[0] for axis in axes[0]] == ["clean", "perturbation × 1", "adversarial"]  # noqa: RUF001
    answers = [[axis.get_xlabel().split(",")[0] for axis in row] for row in axes]
    assert answers == [["✓ red", "", "✓ red"], ["✓ green", "", "✗ red"], ["✗ blue", "", "✗ blue"]]
    confidence = (pair()[0][0, :, 0, 0] * 10).softmax(0)[0]
    assert axes[0, 0].get_xlabel().endswith(f", {confidence:.0%}")
    colours = {axis.xaxis.label.get_color() for axis in axes[:, [0, 2]].flat if axis.get_xlabel()[0] == "✓"}
    assert len(colours) == 1 and colours.isdisjoint({axes[1, 2].xaxis.label.get_color()})
    assert axes[2, 0].get_ylabel() == "true: green"
    image = imread(path)
    assert image.shape[0] > 800 and image.shape[1] > 600 and image[..., :3].std() > 0.1
    assert [entry.name for entry in path.parent.iterdir()] == ["examples.png"]


@pytest.mark.parametrize(("size", "factor"), [(8 / 255, 15), (1 / 255, 100), (0.1, 5), (0.6, 1), (0, 1)])
def test_amplification_is_stated(size, factor):
    pixels = torch.zeros(1, 1, 8, 8)
    figure = adversarial_examples_figure(nn.Flatten(), pixels, torch.tensor([0]), pixels + size)
    assert figure.axes[1].get_title().startswith(f"perturbation × {factor}\n")  # noqa: RUF001
    assert figure.axes[0].get_ylabel() == "true: class 0"


def test_tensors_that_do_not_belong_together():
    pixels, labels, adversarial = pair()
    with pytest.raises(ValueError, match="one label and one adversarial image"):
        adversarial_examples_figure(Channel(), pixels, labels, adversarial[:2])
    with pytest.raises(ValueError, match="one label and one adversarial image"):
        adversarial_examples_figure(Channel(), pixels, labels[:2], adversarial)
    with pytest.raises(ValueError, match=r"`adversarial` must be in \[0, 1\]"):
        adversarial_examples_figure(Channel(), pixels, labels, adversarial + 1)


def history(epochs=6):
    log = []
    for epoch in range(1, epochs + 1):
        log += [{"epoch": epoch - 0.5, "loss": 2 / epoch, "learning_rate": 0.01 / epoch, "grad_norm": 1.0}]
        log += [{"epoch": float(epoch), "lambda1": 0.5, "lambda2": epoch / 2, "reload": int(epoch in (3, 5))}]
        log += [{"epoch": float(epoch), "eval_natural_accuracy": 0.1 * epoch, "eval_robust_accuracy": 0.05 * epoch}]
        log += [{"epoch": float(epoch), "eval_natural_route_accuracy": 0.12, "train_natural_route_accuracy": 0.2}]
    return [*log, {"train_runtime": 3.0, "epoch": float(epochs)}]


def test_training_curves(tmp_path):
    figure = training_curves_figure(history(), tmp_path / "curves.png")
    accuracies, scalars, rates = figure.axes
    labels = [axis.get_legend_handles_labels()[1] for axis in figure.axes]
    assert len(labels[0]) == 4 and labels[1] == ["λ₁", "λ₂", "training loss"]
    assert labels[2] == ["learning rate", "best weights reloaded"]
    robust = next(line for line in accuracies.lines if line.get_label().startswith("robust"))
    assert np.allclose(robust.get_xydata(), [(epoch, 0.05 * epoch) for epoch in range(1, 7)])
    for axis in figure.axes:
        assert [line.get_xdata()[0] for line in axis.lines if len(set(line.get_xdata())) == 1] == [3.0, 5.0]
    assert rates.get_yscale() == "log" and scalars.get_yscale() == "linear"
    image = imread(tmp_path / "curves.png")
    assert image.shape[0] > 1000 and image.shape[1] > 1000 and image[..., :3].std() > 0.05


@pytest.mark.parametrize(
    "log",
    [
        [],
        [{"train_runtime": 1.0}],
        [{"epoch": 1.0, "loss": 1.0}],
        [{"epoch": 0.0, "learning_rate": 0.0}],
        [{"epoch": 1.0, "reload": 1}, {"epoch": None, "loss": 2.0}],
        [{"loss": 1.0, "learning_rate": 0.1}],
        history(1),
        history(100),
    ],
)
def test_incomplete_histories(log, tmp_path):
    training_curves_figure(log, tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").read_text().startswith("<?xml")


def test_matplotlib_is_imported_late_and_pyplot_never():
    code = (
        "import sys, autolora_hf.evaluation as e; assert 'matplotlib' not in sys.modules\n"
        "e.training_curves_figure([]); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
