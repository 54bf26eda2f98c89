"""The systems of the benchmark of methods: what combines objective, branch, initialiser and schedule."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class System:
    """One combination of the four concepts.

    Args:
        name (`str`): What the table calls it.
        objective (`str`): Of `OBJECTIVES`.
        config (`dict`): Fields of `AutoLoraConfig` besides those of the objective.
        arguments (`dict`): Training arguments that make the method.
    """

    name: str
    objective: str
    config: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """The options of `autolora train` that stand for it."""
        parts = [f"--objective {self.objective}"]
        for name, value in {**self.config, **self.arguments}.items():
            if isinstance(value, dict):
                value = f"'{json.dumps(value)}'"
            elif isinstance(value, list):
                value = " ".join(map(str, value))
            parts.append(f"--{name.replace('_', '-')} {value}")
        return " ".join(parts)


def adapter(branch: str, **options: Any) -> dict[str, Any]:
    return {"mode": "adapter", "branch": branch, **options}


PROBE = {"init": "adversarial-linear-probe"}
PARTS = "What AutoLoRa is without one of its parts"
GROUPS: dict[str, tuple[System, ...]] = {
    "The whole network trains": (
        System("AutoLoRa", "autolora"),
        System("natural fine-tuning", "natural"),
        System("SLF (head alone, clean)", "slf"),
        System("ALF (head alone, PGD-AT)", "alf"),
        System("PGD-AT", "pgd-at"),
        System("TRADES (vanilla RFT)", "trades"),
        System("MART", "mart"),
        System("TWINS-AT", "twins-at"),
        System("TWINS-TRADES", "twins-trades"),
        System("AR-AT", "ar-at"),
        System("RoLI, then PGD-AT", "pgd-at", arguments=PROBE),
        System("RoLI, then AutoLoRa", "autolora", arguments=PROBE),
    ),
    "Schedules and post-processing": (
        System("PGD-AT, radius by two hinges", "pgd-at", arguments={"eps_schedule": "two-hinge"}),
        System("PGD-AT, EMA of the weights", "pgd-at", arguments={"average_weights": "ema"}),
        System("PGD-AT, SWA", "pgd-at", arguments={"average_weights": "swa"}),
        System("PGD-AT, RiFT afterwards", "pgd-at", arguments={"finish": "rift"}),
    ),
    "An adapter trains (published: branch, head, norms)": (
        System("AutoLoRa, mode adapter", "autolora", adapter("lora")),
        System("LoRA-AT", "pgd-at", adapter("lora")),
        System("RoLI, then LoRA-AT", "pgd-at", adapter("lora"), PROBE),
        System("FullLoRA-AT (LNLoRA)", "pgd-at", adapter("lnlora")),
        System("FouRA, PGD-AT", "pgd-at", adapter("foura")),
        System("EFFT, PGD-AT", "pgd-at", adapter("efft")),
        System("AdaKron, PGD-AT", "pgd-at", adapter("adakron", target_modules=r".*\.conv2")),
        System("DoRA, PGD-AT", "pgd-at", adapter("dora")),
        System("LoHa, PGD-AT", "pgd-at", adapter("loha")),
        System("LoKr, PGD-AT", "pgd-at", adapter("lokr")),
        System("HRA, PGD-AT", "pgd-at", adapter("hra")),
        System("(IA)3, PGD-AT", "pgd-at", adapter("ia3")),
    ),
    PARTS: (
        System("no stop-gradient", "autolora", {"stop_gradient": False}),
        System("no KL term", "autolora", arguments={"scalar_lambda2_max": 0.0}),
        System("fixed scalars 0.5 and 3", "autolora", arguments={"loss_scalars": [0.5, 3.0]}),
        System("detached KL target", "autolora", arguments={"objective_kwargs": {"detach_target": True}}),
        System("dual norm", "autolora", {"norm": "dual"}),
        System("scalars from 100 images", "autolora", arguments={"scalar_images": 100}),
        System("scalars from a running average", "autolora", arguments={"scalar_accuracy": "running"}),
        System("TRADES with automatic scalars", "trades", arguments={"objective_kwargs": {"automatic": True}}),
        System("TRADES with the automatic learning rate", "trades", arguments={"schedule": "plateau"}),
    ),
}
SYSTEMS = {system.name: system for systems in GROUPS.values() for system in systems}
OWN = "AutoLoRa"
# What runs on the other tasks: every objective, and of the adapters AutoLoRa and its baseline.
WHOLE = "The whole network trains"
ADAPTERS = ("AutoLoRa, mode adapter", "LoRA-AT")
ELSEWHERE = (*(system.name for system in GROUPS[WHOLE]), *ADAPTERS)
