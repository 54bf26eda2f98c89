"""RiFT: natural accuracy from the module that robustness depends on least (Zhu et al., ICCV 2023)."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks import PGD
from ..attacks.pgd import attack_mode, hits
from ..modeling import AutoLoraModel
from ..progress import progress_bar
from ..routes import ROBUST
from ..schedules import cosine
from .base import Finished, Finisher


logger = logging.getLogger(__name__)

Tensors = dict[str, Tensor]


@dataclass
class RiFT(Finisher):
    """Fine-tunes the least critical module on clean images, and keeps as much of the change as costs no robustness.

    1. *Module robust criticality*: how far the loss of adversarial images rises when one module's weights move by at
       most `radius` of their norm, in the worst direction (on `images` training images).
    2. The least critical module is fine-tuned on clean training images; everything else stays, in eval mode.
    3. Of the points between old and new weights the one with the best natural validation accuracy is kept whose
       robust validation accuracy is no lower than before. (The authors look at test data here.)

    A module is a layer with trainable weight matrices of the deployed route: in mode `full` any convolution or linear
    layer but the head, in mode `adapter` any branch.

    Args:
        radius (`float`): Size of the disturbance, as a share of the module's norm; 0.1 in the paper.
        steps (`int`): Ascent steps to find it.
        images (`int`): Training images that criticality is measured on, at most.
        epochs (`float`, *optional*): Of fine-tuning. `None`: a sixth of the training (10 of 60).
        learning_rate (`float`): At the start of a cosine, SGD with momentum 0.9.
        points (`int`): Points of the interpolation, besides the old weights.
    """

    radius: float = field(default=0.1, metadata={"help": "Size of the disturbance, as a share of a module's norm."})
    steps: int = field(default=10, metadata={"help": "Ascent steps to find it."})
    images: int = field(default=1000, metadata={"help": "Training images to measure criticality on, at most."})
    epochs: float | None = field(default=None, metadata={"help": "Epochs of fine-tuning; default: a sixth."})
    learning_rate: float = field(default=0.001, metadata={"help": "Learning rate of fine-tuning."})
    points: int = field(default=10, metadata={"help": "Points of the interpolation."})

    def __post_init__(self) -> None:
        counts = (self.steps, self.images, self.points, 1 if self.epochs is None else self.epochs)
        if not self.radius > 0 or not self.learning_rate > 0 or min(counts) < 1:
            raise ValueError(
                "RiFT needs a positive `radius` and `learning_rate`, and at least one step, image, point and epoch, "
                f"got {self}."
            )

    def prepare(self, model: AutoLoraModel) -> None:
        candidates(model)

    def __call__(self, finished: Finished) -> dict[str, Any]:
        model = finished.model
        modules = candidates(model)
        criticality = self.criticality(finished, modules)
        name = min(criticality, key=criticality.__getitem__)
        parameters = modules[name]
        before = _copied(parameters)
        robust, natural = accuracies(model, finished.validation, finished.attack)
        self._fine_tune(finished, parameters)
        after = _copied(parameters)
        best, best_natural = 0.0, natural
        for point in progress_bar(range(self.points, 0, -1), title="RiFT: interpolation", unit="point"):
            share = point / self.points
            _set_between(parameters, before, after, share)
            robust_there, natural_there = accuracies(model, finished.validation, finished.attack)
            # Of equal points the one nearest to the robust weights.
            if robust_there >= robust and natural_there >= best_natural and natural_there > natural:
                best, best_natural = share, natural_there
        _set_between(parameters, before, after, best)
        logger.info(
            "RiFT: %s is the least critical of %d modules. With %.0f %% of its fine-tuning natural validation "
            "accuracy is %.1f %% instead of %.1f %%.",
            name,
            len(modules),
            100 * best,
            100 * best_natural,
            100 * natural,
        )
        return {
            "summary": f"{name} fine-tuned on clean images, {best:.0%} of the way kept: natural validation accuracy "
            f"{best_natural:.1%} instead of {natural:.1%}",
            "module": name,
            "criticality": criticality[name],
            "highest_criticality": max(criticality.values()),
            "interpolation": best,
            "natural_validation_accuracy": [natural, best_natural],
        }

    # ---- criticality ----

    def criticality(self, finished: Finished, modules: dict[str, dict[str, nn.Parameter]]) -> dict[str, float]:
        """Rise of the adversarial loss for each module; the model is as before afterwards."""
        model = finished.model
        batches, count = [], 0
        for pixels, labels in finished.train():
            pixels, labels = pixels[: self.images - count], labels[: self.images - count]
            # One set of adversarial images, of the weights as they are.
            batches.append((finished.attack(model.pixel_space(ROBUST), pixels, labels), labels))
            count += len(labels)
            if count >= self.images:
                break
        base = self._loss(model, batches)
        found = {}
        for name, parameters in progress_bar(modules.items(), title="RiFT: criticality", unit="module"):
            before = _copied(parameters)
            size = _length(before.values())
            highest = base
            for _ in range(self.steps):
                gradients = self._gradients(model, batches, parameters)
                length = _length(gradients)
                if not 0 < length < math.inf:
                    break
                with torch.no_grad():
                    for parameter, gradient in zip(parameters.values(), gradients, strict=True):
                        parameter.add_(gradient * (self.radius * size / self.steps * 2 / length))
                    _project(parameters, before, self.radius * size)
                highest = max(highest, self._loss(model, batches))
            _set_between(parameters, before, before, 0.0)
            found[name] = highest - base
        return found

    @staticmethod
    @torch.no_grad()
    def _loss(model: AutoLoraModel, batches: list[tuple[Tensor, Tensor]]) -> float:
        with attack_mode(model):
            view = model.pixel_space(ROBUST)
            losses = [F.cross_entropy(view(pixels), labels, reduction="sum").item() for pixels, labels in batches]
        return sum(losses) / sum(len(labels) for _, labels in batches)

    @staticmethod
    def _gradients(
        model: AutoLoraModel, batches: list[tuple[Tensor, Tensor]], parameters: dict[str, nn.Parameter]
    ) -> list[Tensor]:
        total = [torch.zeros_like(parameter) for parameter in parameters.values()]
        with attack_mode(model), torch.enable_grad():
            view = model.pixel_space(ROBUST)
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            for pixels, labels in batches:
                loss = F.cross_entropy(view(pixels), labels, reduction="sum")
                for sum_, gradient in zip(total, torch.autograd.grad(loss, list(parameters.values())), strict=True):
                    sum_ += gradient
        return total

    # ---- fine-tuning ----

    def _fine_tune(self, finished: Finished, parameters: dict[str, nn.Parameter]) -> None:
        model = finished.model
        epochs = max(1, round(finished.epochs / 6 if self.epochs is None else self.epochs))
        curve = cosine()
        optimizer = torch.optim.SGD(parameters.values(), lr=self.learning_rate, momentum=0.9)
        for epoch in progress_bar(range(epochs), title="RiFT: fine-tuning", unit="epoch"):
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * curve(epoch / epochs)
            for pixels, labels in finished.train():
                with attack_mode(model), torch.enable_grad():
                    for parameter in parameters.values():
                        parameter.requires_grad_(True)
                    loss = F.cross_entropy(model.pixel_space(ROBUST)(pixels), labels)
                    gradients = torch.autograd.grad(loss, list(parameters.values()))
                for parameter, gradient in zip(parameters.values(), gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
                optimizer.zero_grad()


def candidates(model: AutoLoraModel) -> dict[str, dict[str, nn.Parameter]]:
    """Modules that RiFT may choose, by name: layers with their trainable matrices of the deployed route."""
    heads = {id(parameter) for head in model.heads for parameter in head.parameters()}
    robust = {id(parameter) for parameter in model.robust_parameters()}
    found: dict[str, dict[str, nn.Parameter]] = defaultdict(dict)
    for layer_name, layer in model.get_base_model().named_modules():
        for key, parameter in layer.named_parameters(recurse=False):
            if parameter.ndim > 1 and id(parameter) in robust and id(parameter) not in heads:
                # The two factors of a branch are one module.
                found[layer_name.partition(".lora_")[0]][f"{layer_name}.{key}"] = parameter
    if not found:
        raise ValueError(
            "RiFT fine-tunes a layer other than the head, and none trains here. Leave `finish='rift'` out, or choose "
            "an objective that trains the backbone or an adapter."
        )
    return dict(found)


def accuracies(model: AutoLoraModel, batches: Any, attack: PGD) -> tuple[float, float]:
    """Robust and natural accuracy of the deployed route."""
    robust, natural, total = 0, 0, 0
    view = model.pixel_space(ROBUST)
    for pixels, labels in batches():
        adversarial = attack(view, pixels, labels)
        with attack_mode(model), torch.no_grad():
            robust += hits(view(adversarial), labels).sum().item()
            natural += hits(view(pixels), labels).sum().item()
        total += len(labels)
    return robust / total, natural / total


def _copied(parameters: dict[str, nn.Parameter]) -> Tensors:
    return {key: parameter.detach().clone() for key, parameter in parameters.items()}


def _length(tensors: Iterable[Tensor]) -> float:
    """Euclidean length of all of them together."""
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))


@torch.no_grad()
def _set_between(parameters: dict[str, nn.Parameter], before: Tensors, after: Tensors, share: float) -> None:
    for key, parameter in parameters.items():
        parameter.copy_(before[key] + share * (after[key] - before[key]) if share else before[key])


@torch.no_grad()
def _project(parameters: dict[str, nn.Parameter], before: Tensors, radius: float) -> None:
    length = _length(parameter - before[key] for key, parameter in parameters.items())
    if length > radius:
        _set_between(parameters, before, _copied(parameters), radius / length)
