"""One training step of AutoLoRa, written plainly: what the other measurements of `benchmark_speed.py` compare with.

It does what the released code does and what is usually copied: low-rank layers around convolutions and linear layers
with a flag for the route, an attack by PGD in eval mode while the parameters still ask for gradients, two clamps a
step, one backward pass, SGD, and losses that are read back every step. It works on any timm model of repeated blocks.
`tests/test_benchmark_speed.py` shows that it computes the same images, loss and gradients as the package does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


EPS, STEP_SIZE, STEPS = 8 / 255, 2 / 255, 10


class LoraLayer(nn.Module):
    """A convolution or linear layer whose weight the natural route changes by `reshape(B A) * alpha / rank`."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.layer = layer
        self.natural = False
        self.scaling = alpha / rank
        width = layer.weight.shape[-1] if isinstance(layer, nn.Conv2d) else 1
        rows = layer.weight.shape[0] * width
        self.lora_A = nn.Parameter(layer.weight.new_empty(rank * width, layer.weight.numel() // rows).normal_())
        self.lora_B = nn.Parameter(layer.weight.new_zeros(rows, rank * width))

    def forward(self, x: Tensor) -> Tensor:
        if not self.natural:
            return self.layer(x)
        weight = self.layer.weight + (self.lora_B @ self.lora_A).view(self.layer.weight.shape) * self.scaling
        if isinstance(self.layer, nn.Conv2d):
            return self.layer._conv_forward(x, weight, self.layer.bias)
        return F.linear(x, weight, self.layer.bias)


class ReleasedModel(nn.Module):
    """Pixels in [0, 1] to logits, by either route.

    Args:
        network (`nn.Module`): A timm model; changed in place.
        mean (`Sequence[float]`), std (`Sequence[float]`): Of the normalisation, which is part of the model.
        rank (`int`), alpha (`float`): Of the branch.
    """

    def __init__(
        self,
        network: nn.Module,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        rank: int = 8,
        alpha: float = 1.0,
    ) -> None:
        super().__init__()
        reference = next(network.parameters())
        self.register_buffer("mean", reference.new_tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", reference.new_tensor(std).view(1, -1, 1, 1))
        self.network = network
        for name, layer in list(network.named_modules()):
            stage, *inner = name.split(".")
            # Blocks are numbered; neither the stem (`conv1`, which may be several) nor the head is inside one.
            if isinstance(layer, (nn.Conv2d, nn.Linear)) and stage != "conv1" and any(map(str.isdigit, inner)):
                network.set_submodule(name, LoraLayer(layer, rank, alpha))
        head = set(network.get_classifier().parameters())
        self.branches = [module for module in network.modules() if isinstance(module, LoraLayer)]
        branch = {parameter for layer in self.branches for parameter in (layer.lora_A, layer.lora_B)}
        self.extractor = [parameter for parameter in network.parameters() if parameter not in head | branch]

    def forward(self, pixels: Tensor, natural: bool = False) -> Tensor:
        # The natural route trains the branch and the head: the feature extractor is only read.
        for parameter in self.extractor:
            parameter.requires_grad_(not natural)
        for layer in self.branches:
            layer.natural = natural
        try:
            return self.network((pixels - self.mean) / self.std)
        finally:
            for parameter in self.extractor:
                parameter.requires_grad_(True)


def released_attack(
    model: nn.Module, pixels: Tensor, labels: Tensor, start: Tensor | None = None, steps: int = STEPS
) -> Tensor:
    """PGD through the robust route, in eval mode; the model is in train mode afterwards."""
    model.eval()
    adversarial = pixels + 0.001 * torch.randn_like(pixels) if start is None else start.clone()
    for _ in range(steps):
        adversarial.requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(model(adversarial), labels)
        gradient = torch.autograd.grad(loss, [adversarial])[0]
        adversarial = adversarial.detach() + STEP_SIZE * torch.sign(gradient.detach())
        adversarial = torch.min(torch.max(adversarial, pixels - EPS), pixels + EPS)
        adversarial = torch.clamp(adversarial, 0.0, 1.0)
    model.train()
    return adversarial


def released_loss(
    model: ReleasedModel, pixels: Tensor, adversarial: Tensor, labels: Tensor, lambda1: float, lambda2: float
) -> Tensor:
    natural = model(pixels, natural=True)
    robust = model(adversarial)
    kl = F.kl_div(F.log_softmax(robust, dim=1), F.softmax(natural, dim=1), reduction="sum") / len(pixels)
    natural_loss, robust_loss = F.cross_entropy(natural, labels), F.cross_entropy(robust, labels)
    return lambda1 * natural_loss + (1 - lambda1) * robust_loss + lambda2 * kl


class ReleasedTraining:
    """Training by [`released_loss`] with SGD; calling an instance takes one step and returns its loss.

    Args:
        model (`ReleasedModel`): In any mode.
        lambda1 (`float`), lambda2 (`float`): Loss scalars; those of an accuracy of one half.
        attack_steps (`int`): Of the attack.
    """

    def __init__(
        self, model: ReleasedModel, lambda1: float = 0.5, lambda2: float = 3.0, attack_steps: int = STEPS
    ) -> None:
        self.model, self.lambda1, self.lambda2, self.attack_steps = model.train(), lambda1, lambda2, attack_steps
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
        self.losses: list[float] = []

    def __call__(self, pixels: Tensor, labels: Tensor) -> float:
        adversarial = released_attack(self.model, pixels, labels, steps=self.attack_steps)
        loss = released_loss(self.model, pixels, adversarial, labels, self.lambda1, self.lambda2)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())
        return self.losses[-1]
