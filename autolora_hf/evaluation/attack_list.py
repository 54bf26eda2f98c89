"""The attacks that a caller asked for: checked, resolved to what runs, and described."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from ..attacks import PGD
from ..config import ThreatModel
from ..modeling import AutoLoraModel
from .autoattack import AutoAttackComponent, autoattack_components
from .report import Protocol
from .stages import Attack
from .transfer import TransferAttack
from .view import AttackView


FIRST_PASS, FIRST_PASS_NAME = "pgd-bf16", "PGD-10 in bfloat16"


@dataclass(frozen=True)
class FirstPass:
    """PGD on a copy of the model in bfloat16."""

    attack: PGD
    copy: AttackView

    def __str__(self) -> str:
        return f"{self.attack} in bfloat16"

    def __call__(self, model: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
        return self.attack(self.copy, pixels, labels)


def check_attacks(requested: list[Any], threat_model: ThreatModel, model: nn.Module) -> None:
    if not requested:
        raise ValueError("`attack` is an empty list.")
    if FIRST_PASS in requested:
        if not isinstance(model, AutoLoraModel):
            raise ValueError(
                f"`attack={FIRST_PASS!r}` makes a copy of the model in bfloat16, which it knows how to do for an "
                f"AutoLoraModel only, got {type(model).__name__}. Leave it out."
            )
        if requested[0] != FIRST_PASS or requested.count(FIRST_PASS) > 1 or len(requested) == 1:
            raise ValueError(
                f"{FIRST_PASS!r} is a first pass before other attacks: put it first and once, for instance "
                f"`attack=[{FIRST_PASS!r}, 'autoattack']`."
            )
    for entry in requested:
        searched = entry.attack if isinstance(entry, TransferAttack) else entry
        if isinstance(searched, PGD):
            if searched.threat_model != threat_model:
                attacked = searched.threat_model
                raise ValueError(f"{entry} attacks under {attacked}, the evaluation under {threat_model}.")
            if searched.loss == "targeted":
                raise ValueError("PGD with `loss='targeted'` takes classes to reach, not labels; use 'ce' or 'kl'.")
            if searched.loss not in ("ce", "kl"):
                raise ValueError(f"PGD with `loss={searched.loss!r}` is for models without classes; use 'ce' or 'kl'.")
        elif not callable(entry) and entry not in ("autoattack", "pgd", FIRST_PASS):
            raise ValueError(
                f"`attack` must be 'autoattack', 'pgd', a PGD, a callable or a list of these, got {entry!r}."
            )


def check_transfers(requested: list[Any], model: nn.Module, pixels: Tensor, num_classes: int) -> None:
    """Raises `ValueError` if the source of a transfer attack takes other images, as `pixels`, or has other classes."""
    for entry in requested:
        if isinstance(entry, TransferAttack):
            entry.check(model, pixels, num_classes)


def resolve_attacks(
    requested: list[Any], threat_model: ThreatModel, num_classes: int, image_size: tuple[int, int], seed: int
) -> tuple[list[Attack], dict[str, str]]:
    attacks: list[Attack] = []
    left_out: dict[str, str] = {}
    for entry in requested:
        if entry == "autoattack":
            components, left_out = autoattack_components(threat_model, num_classes, image_size, seed)
            attacks.extend(components)
        else:
            attacks.append(PGD(threat_model, seed=seed) if entry == "pgd" else entry)
    return attacks, left_out


def attack_name(attack: Attack) -> str:
    if isinstance(attack, AutoAttackComponent):
        return attack.name
    if isinstance(attack, (PGD, FirstPass, TransferAttack)):
        return str(attack)
    return getattr(attack, "__name__", type(attack).__name__)


def attacks_in_words(attacks: list[Attack], protocol: Protocol) -> str:
    parts = []
    for is_ensemble, entries in itertools.groupby(attacks, lambda entry: isinstance(entry, AutoAttackComponent)):
        if is_ensemble:
            version = "standard" if protocol == "autoattack" else "reduced"
            parts.append(f"AutoAttack ({version}): {', '.join(map(str, entries))}")
        else:
            parts += (FIRST_PASS_NAME if entry == FIRST_PASS else attack_name(entry) for entry in entries)
    return " + ".join(parts)


def attack_settings(requested: Any, threat_model: ThreatModel, seed: int) -> dict[str, Any]:
    """One attack as [`RobustnessReport.attack_settings`] records it."""
    if requested in ("autoattack", FIRST_PASS):
        return {"kind": requested}
    attack = PGD(threat_model, seed=seed) if requested == "pgd" else requested
    if isinstance(attack, TransferAttack):
        return {"kind": "custom", "name": attack_name(attack), "source_sha256": attack.source_sha256}
    if type(attack) is not PGD:
        return {"kind": "custom", "name": attack_name(attack)}
    # The threat model and the whole evaluation have one field of their own.
    return {"kind": "pgd", **{name: value for name, value in asdict(attack).items() if name != "threat_model"}}
