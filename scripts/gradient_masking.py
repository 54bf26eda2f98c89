"""Which diagnostics of gradient masking known bad defences trip, and that honest models trip none.

The backbone that ships is fine-tuned on digits as in the quickstart, robustly and naturally; each planted defence is
put around both, and the diagnostics that `evaluate_robustness` runs by default look at 64 test digits. Writes
docs/gradient_masking.md. Ends with status 1 if a defence around the robust model is not caught or an honest model is
suspected.

    python scripts/gradient_masking.py        # three minutes on one core
"""

from __future__ import annotations

import datetime
import platform
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from autolora_hf.config import ThreatModel
from autolora_hf.data import as_pixel_dataset, stratified_subset
from autolora_hf.evaluation import AttackView
from autolora_hf.evaluation.findings import Finding
from autolora_hf.evaluation.gradient_masking import CHECKS, MAX_IMAGES, gradient_masking_findings
from autolora_hf.files import write_atomically
from autolora_hf.frozen import FrozenRoute
from autolora_hf.quickstart import QuickstartSettings, load_digits, train_on_digits


PAGE = Path(__file__).parents[1] / "docs" / "gradient_masking.md"
EPS = 0.1


class Defence(nn.Module):
    """A wrapper around an honest model that is hard to attack without being robust."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixels)


class QuantisedInput(Defence):
    """Three bits a pixel."""

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model((pixels * 7).round() / 7)


class SaturatedLogits(Defence):
    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixels) * 1e4


class RandomisedLayer(Defence):
    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixels + 0.02 * torch.randn_like(pixels))


class StoppedGradient(Defence):
    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixels).detach()


class FalseGradient(Defence):
    """The gradient of a small random linear map in place of the model's own."""

    def forward(self, pixels: Tensor) -> Tensor:
        logits = self.model(pixels).detach()
        weights = torch.randn(pixels[0].numel(), logits.shape[1], generator=torch.Generator().manual_seed(0))
        lie = 1e-3 * pixels.flatten(1) @ weights
        return logits + lie - lie.detach()


class ReversedGradient(Defence):
    def forward(self, pixels: Tensor) -> Tensor:
        logits = self.model(pixels)
        return 2 * logits.detach() - logits


class StraightThroughQuantisation(Defence):
    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixels + ((pixels * 7).round() / 7 - pixels).detach())


class ShatteredGradient(Defence):
    """True gradients that change their sign every thousandth."""

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixels + 0.02 * torch.sin(2000 * pixels))


class VanishingGradient(Defence):
    """A sigmoid so steep that hardly a pixel has a gradient left."""

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(torch.sigmoid(200 * (pixels - 0.5)))


class BatchStatistics(Defence):
    """A norm that was left on the statistics of the batch, and goes on updating its running ones."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_var", torch.ones(3))

    def forward(self, pixels: Tensor) -> Tensor:
        normed = nn.functional.batch_norm(pixels, self.running_mean, self.running_var, training=True)
        return self.model(0.3 * normed + 0.13)


# What each defence must trip; it may trip more.
TRIPPED = {
    QuantisedInput: {"zero gradients", "finite differences", "random noise", "black box", "unbounded attack"},
    SaturatedLogits: {"zero gradients", "random noise", "large epsilon", "unbounded attack", "loss landscape"},
    RandomisedLayer: {"repeatability"},
    StoppedGradient: {"zero gradients", "finite differences", "random noise", "black box", "loss landscape"},
    FalseGradient: {"finite differences", "black box", "unbounded attack"},
    ReversedGradient: {"finite differences", "random noise", "large epsilon", "loss landscape"},
    StraightThroughQuantisation: {"finite differences"},
    ShatteredGradient: {"black box", "large epsilon"},
    VanishingGradient: {"large epsilon", "unbounded attack"},
    BatchStatistics: {"single image"},
}


HONEST = {
    "robust": ("autolora", {}),
    "natural": ("natural", {"mode": "full"}),
}


def diagnose(model: nn.Module, threat_model: ThreatModel, data: tuple[Tensor, Tensor]) -> list[Finding]:
    view = AttackView(model)
    return gradient_masking_findings(view, view, *data, threat_model, 10)


def digits(model: nn.Module) -> tuple[Tensor, Tensor]:
    test = load_digits()["test"]
    # A few more, since those that a model gets wrong are not looked at.
    chosen = stratified_subset(test["label"], MAX_IMAGES + MAX_IMAGES // 4, 0)
    items = [as_pixel_dataset(test, model.preprocessing)[index] for index in chosen]
    return torch.stack([item["pixel_values"] for item in items]), torch.tensor([item["labels"] for item in items])


def main() -> None:
    torch.set_num_threads(1)
    rows: dict[str, dict[str, list[Finding]]] = {}
    seconds = []
    for base, (objective, settings) in HONEST.items():
        with tempfile.TemporaryDirectory() as folder:
            model = train_on_digits(objective, QuickstartSettings(**settings), Path(folder), quiet=True).model.eval()
        data = digits(model)
        networks = {"none": model, **{defence.__name__: defence(FrozenRoute(model)) for defence in TRIPPED}}
        for name, network in networks.items():
            started = time.process_time()
            rows.setdefault(name, {})[base] = diagnose(network, ThreatModel("linf", EPS), data)
            seconds.append(time.process_time() - started)
            failed = [found.name for found in rows[name][base] if found.outcome == "failed"]
            print(f"{base}, {name}: {', '.join(failed) or 'all passed'}", flush=True)
        for threat_model in (ThreatModel("l2", 1.0), ThreatModel("l1", 8.0)):
            rows.setdefault(f"none ({threat_model})", {})[base] = diagnose(FrozenRoute(model), threat_model, data)
    write_atomically(PAGE, render(rows, seconds).encode())
    caught = all(_failed(found["robust"]) for name, found in rows.items() if not name.startswith("none"))
    suspected = any(
        _failed(each) for name, found in rows.items() if name.startswith("none") for each in found.values()
    )
    sys.exit(0 if caught and not suspected else 1)


def _failed(findings: list[Finding]) -> list[str]:
    return [found.name for found in findings if found.outcome == "failed"]


def render(rows: dict[str, dict[str, list[Finding]]], seconds: list[float]) -> str:
    head = (
        f"`python scripts/gradient_masking.py`, {datetime.date.today()}, {platform.machine()} CPU, 1 thread, torch "
        f"{torch.__version__}. The shipped backbone, fine-tuned on digits as in the quickstart, robustly and "
        f"naturally; each planted defence around both; Linf eps = {EPS}, at most {MAX_IMAGES} test digits that the "
        f"model gets right. One diagnosis takes {sorted(seconds)[len(seconds) // 2]:.1f} s of CPU time (median). Of "
        f"{len(CHECKS)} checks, these failed:"
    )
    table = ["| defence | around the robust model | around the natural model |", "|---|---|---|"]
    for name, found in rows.items():
        cells = [", ".join(_failed(found[base])) or "none" for base in HONEST]
        table.append(f"| {name} | {cells[0]} | {cells[1]} |")
    end = (
        "Around the natural model, whose robust accuracy is 0, a defence that attacks still break is no false claim "
        "of robustness: then nothing has to fail. What each check measures and why it failed stands in its sentence "
        "in the report. A model that passes is not proven robust: the checks say that attacks work as they must."
    )
    blocks = ["# Diagnostics of gradient masking", textwrap.fill(head, 119), "\n".join(table), textwrap.fill(end, 119)]
    return "\n\n".join(blocks) + "\n"


if __name__ == "__main__":
    main()
