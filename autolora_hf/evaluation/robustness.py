"""Natural and robust accuracy of a model on a data set."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks import PGD, attack_mode
from ..config import ThreatModel
from ..data import describe_data
from ..frozen import FrozenRoute
from ..modeling import AutoLoraModel
from .autoattack import AutoAttackComponent, autoattack_components, isolated_random_state
from .checkpoint import Checkpoint
from .identity import check_same, describe_evaluation, settings_in_words
from .report import Accuracy, AttackResult, Protocol, RobustnessReport, standard_warnings
from .samples import Samples
from .sharding import all_processes
from .stages import Attack, Stages
from .view import AttackView
from .zero_shot import refuse_tower


FIRST_PASS = "pgd-bf16"


def evaluate_robustness(
    model: nn.Module,
    dataset: Any,
    threat_model: ThreatModel | None = None,
    attack: str | Attack | Sequence[str | Attack] = "autoattack",
    *,
    route: str = "robust",
    max_samples: int | None = None,
    sample_indices: Sequence[int] | None = None,
    batch_size: int = 128,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
    checkpoint_dir: str | os.PathLike[str] | None = None,
) -> RobustnessReport:
    """Measures accuracy on clean images and under attack.

    Attacks run one after the other, each on the images that are still classified correctly; an image is robust if it
    withstands all of them. Nothing an attack says about itself is believed: every image it returns must lie in the
    ball and in [0, 1], and is classified again. The model runs in eval mode and is left as it was; so are the global
    random states.

    Under `torchrun` or `accelerate launch`, once `torch.distributed` is initialised, the work is shared out to the
    processes: call it in every one of them, with the same arguments. They attack whole batches, the same ones as a
    single process, so every image gets the same verdict, and all return the same report. An error in one process ends
    it in all of them.

    Args:
        model (`nn.Module`): An [`AutoLoraModel`], or any module that maps pixels in [0, 1], N x C x H x W, to logits.
        dataset: What [`as_pixel_dataset`] accepts (a `datasets.Dataset`, a folder of images, a torch `Dataset`), or
            a tuple or `TensorDataset` of float pixels N x C x H x W in [0, 1] and integer labels N. A plain module
            states no preprocessing, so it takes tensors or the result of [`as_pixel_dataset`]. Images that cannot be
            read are left out, and the report says which.
        threat_model (`ThreatModel`, *optional*): Norm and radius of the ball. `None`: the one of the AutoLoRa model.
        attack (`str`, `PGD`, callable, or a list of these): `"autoattack"`; `"pgd"` for PGD with 10 steps; or anything
            called as `attack(model, pixels, labels) -> pixels`. `["pgd-bf16", "autoattack"]` finds the images that are
            easily broken by PGD-10 in bfloat16 first; the model itself judges what it finds, and the others get the
            whole of AutoAttack as usual. This saves time on models of little robustness. For an [`AutoLoraModel`].
            Those that are left share other batches then, so their random starts differ.
        route (`str`): Route of the AutoLoRa model.
        max_samples (`int`, *optional*): Use a random subset of this size with the class shares of the whole set.
        sample_indices (`Sequence[int]`, *optional*): Use exactly these images, for instance those of another report.
        batch_size (`int`): Images in a forward pass.
        seed (`int`): Seed of the attacks and of the subset. A [`PGD`] instance keeps its own.
        device (*optional*): Run there and move the model back afterwards. `None`: where the model is.
        progress (`bool`): Show a progress bar an attack, in the main process.
        checkpoint_dir (`str`, *optional*): Folder in which the verdicts on every finished batch are kept. An
            evaluation that was killed goes on from there when it is started again in the same way, with any number of
            processes, and ends with the same report but for the times, which count those of the earlier runs. A
            custom attack is recognised by its `repr`, which must state its settings, as that of a dataclass does.

    Raises:
        ValueError: If the data set is empty, labels or pixels are out of range, the threat model is missing, an attack
            is unknown or leaves the ball, the model does not return N x K logits (an image tower does not; see
            [`ZeroShotClassifier`]), `checkpoint_dir` holds another evaluation, or the processes were given different
            models or arguments. All but what an attack returns is checked before the first attack starts.
        ImportError: If AutoAttack is asked for and `pyautoattack` is not installed.
        RuntimeError: If another process was killed, or never called this function.
    """
    started = time.perf_counter()
    processes = all_processes()
    with ExitStack() as stack:
        with processes.together():
            refuse_tower(model)
            threat_model = _resolve_threat_model(model, threat_model)
            requested = list(attack) if isinstance(attack, (list, tuple)) else [attack]
            _check_attacks(requested, threat_model, model)
            samples = Samples(dataset, model, max_samples, sample_indices, seed, batch_size)
            for context in (attack_mode(model), _on_device(model, device), torch.enable_grad()):
                stack.enter_context(context)
            view = target = AttackView(model, route).eval()
            if isinstance(model, AutoLoraModel):
                # Attacks search on a copy that is quicker and the same up to rounding; the model itself judges what
                # they find.
                target = AttackView(FrozenRoute(model, route)).eval()
            first, _ = samples.read(torch.tensor([0]), view.device)
            num_classes = _count_classes(view, first)
            samples.check_labels(num_classes)
            attacks, left_out = _resolve_attacks(requested, threat_model, num_classes, tuple(first.shape[-2:]), seed)
            if FIRST_PASS in requested:
                quick = AttackView(FrozenRoute(model, route, dtype=torch.bfloat16)).eval()
                attacks[requested.index(FIRST_PASS)] = _FirstPass(PGD(threat_model, seed=seed), quick)
            settings = [_settings(entry, threat_model, seed) for entry in requested]
            evaluation: dict[str, Any] = {}
            if processes.size > 1 or checkpoint_dir is not None:
                conditions = {"threat_model": asdict(threat_model), "attacks": settings, "seed": seed}
                evaluation = describe_evaluation(model, view, route, samples, {**conditions, "versions": _versions()})
            if checkpoint_dir is not None:
                custom = [entry for entry, row in zip(requested, settings, strict=True) if row["kind"] == "custom"]
                evaluation["custom_attacks"] = [settings_in_words(entry) for entry in custom]
        check_same(processes.gather({**evaluation, "checkpoint_dir is given": checkpoint_dir is not None}))
        with processes.together():
            checkpoint = None if checkpoint_dir is None else Checkpoint(checkpoint_dir, evaluation)
        stages = Stages(view, target, samples, processes, checkpoint, threat_model, seed, progress)
        correct = stages.clean()
        with processes.together(), isolated_random_state(seed):
            notes = _diagnose(view, samples, correct) if processes.is_main else []
        robust = correct.clone()
        rows = [stages.attack(n, _name(entry), entry, robust) for n, entry in enumerate(attacks, 1)]

        protocol: Protocol = "custom"
        if "autoattack" in requested:
            protocol = "autoattack-reduced" if left_out else "autoattack"
        report = RobustnessReport(
            threat_model=threat_model,
            natural=Accuracy.from_counts(int(correct.sum()), len(correct)),
            robust=Accuracy.from_counts(int(robust.sum()), len(correct)),
            attacks=[*rows, *(AttackResult(name, left_out=reason) for name, reason in left_out.items())],
            protocol=protocol,
            attack=_describe(attacks, protocol),
            sample_indices=samples.indices,
            natural_correct=correct.tolist(),
            robust_correct=robust.tolist(),
            dataset_size=samples.dataset_size,
            num_classes=num_classes,
            seed=seed,
            route=route if hasattr(model, "pixel_space") else None,
            device=", ".join(stages.devices),
            seconds=round(time.perf_counter() - started + stages.earlier_seconds, 3),
            dataset=describe_data(dataset),
            sample_digests=[stages.digests[row] for row in samples.indices],
            attack_settings=settings,
            batch_size=batch_size,
            versions=_versions(),
        )
        report.warnings = [*standard_warnings(report), *samples.notes, *notes]
        # Its times and notes are those of the main process.
        return processes.gather(report)[0]


def _resolve_threat_model(model: nn.Module, threat_model: ThreatModel | None) -> ThreatModel:
    if threat_model is None:
        threat_model = getattr(model, "threat_model", None)
    if threat_model is None:
        raise ValueError(
            "`threat_model` is required: this model states none. For instance ThreatModel('linf', 8/255)."
        )
    if not isinstance(threat_model, ThreatModel):
        raise TypeError(f"`threat_model` must be a ThreatModel, got {type(threat_model).__name__}.")
    return threat_model


@dataclass(frozen=True)
class _FirstPass:
    """PGD on a copy of the model in bfloat16."""

    attack: PGD
    copy: AttackView

    def __str__(self) -> str:
        return f"{self.attack} in bfloat16"

    def __call__(self, model: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
        return self.attack(self.copy, pixels, labels)


def _check_attacks(requested: list[Any], threat_model: ThreatModel, model: nn.Module) -> None:
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
        if isinstance(entry, PGD):
            if entry.threat_model != threat_model:
                raise ValueError(f"{entry} attacks under {entry.threat_model}, the evaluation under {threat_model}.")
            if entry.loss == "targeted":
                raise ValueError("PGD with `loss='targeted'` takes classes to reach, not labels; use 'ce' or 'kl'.")
        elif not callable(entry) and entry not in ("autoattack", "pgd", FIRST_PASS):
            raise ValueError(
                f"`attack` must be 'autoattack', 'pgd', a PGD, a callable or a list of these, got {entry!r}."
            )


def _resolve_attacks(
    requested: list[Any], threat_model: ThreatModel, num_classes: int, image_size: tuple[int, int], seed: int
) -> tuple[list[Attack], dict[str, str]]:
    attacks, left_out = [], {}
    for entry in requested:
        if entry == "autoattack":
            components, left_out = autoattack_components(threat_model, num_classes, image_size, seed)
            attacks.extend(components)
        else:
            attacks.append(PGD(threat_model, seed=seed) if entry == "pgd" else entry)
    return attacks, left_out


def _name(attack: Attack) -> str:
    if isinstance(attack, AutoAttackComponent):
        return attack.name
    return str(attack) if isinstance(attack, (PGD, _FirstPass)) else getattr(attack, "__name__", type(attack).__name__)


def _describe(attacks: list[Attack], protocol: Protocol) -> str:
    parts = [_name(entry) for entry in attacks if not isinstance(entry, AutoAttackComponent)]
    components = ", ".join(str(entry) for entry in attacks if isinstance(entry, AutoAttackComponent))
    if components:
        parts.append(f"AutoAttack ({'standard' if protocol == 'autoattack' else 'reduced'}): {components}")
    return " + ".join(parts)


def _settings(requested: str | Attack, threat_model: ThreatModel, seed: int) -> dict[str, Any]:
    """One attack as [`RobustnessReport.attack_settings`] records it."""
    if requested in ("autoattack", FIRST_PASS):
        return {"kind": requested}
    attack = PGD(threat_model, seed=seed) if requested == "pgd" else requested
    if type(attack) is not PGD:
        return {"kind": "custom", "name": _name(attack)}
    # The threat model and the whole evaluation have one field of their own.
    return {"kind": "pgd", **{name: value for name, value in asdict(attack).items() if name != "threat_model"}}


@torch.no_grad()
def _count_classes(view: AttackView, pixels: Tensor) -> int:
    logits = view(pixels)
    if logits.ndim != 2 or len(logits) != len(pixels) or logits.shape[1] < 2:
        raise ValueError(
            f"The model must return logits N x K with K >= 2, got {tuple(logits.shape)} for {len(pixels)} image(s)."
        )
    return logits.shape[1]


def _diagnose(view: AttackView, samples: Samples, correct: Tensor) -> list[str]:
    """Reasons to doubt gradient-based attacks, from one batch of clean images that are classified correctly."""
    batches = samples.split(correct.nonzero().squeeze(1))
    if not batches:
        return []
    pixels, labels = samples.read(batches[0], view.device)
    notes = []
    logits = view(pixels.requires_grad_(True))
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), pixels)
    flat = int((gradient.flatten(1).abs().amax(1) == 0).sum())
    if flat:
        notes.append(
            f"The input gradient is exactly zero for {flat} of {len(pixels)} clean images: gradient masking "
            "suspected, gradient-based attacks cannot be trusted here."
        )
    with torch.no_grad():
        again = view(pixels)
        if (F.normalize(again) - F.normalize(logits)).norm(dim=1).max() > 1e-4:
            notes.append(
                "The logits change from pass to pass in eval mode: attacks on a randomised model need to average over "
                "its randomness, so robust accuracy is overstated."
            )
        sums = logits.sum(1)
        if logits.min() >= 0 and logits.max() <= 1 and torch.allclose(sums, torch.ones_like(sums), atol=1e-5):
            notes.append("The outputs look like probabilities. Attacks need logits: leave out the softmax.")
    return notes


@contextmanager
def _on_device(model: nn.Module, device: torch.device | str | None) -> Iterator[None]:
    if device is None:
        yield
        return
    before = next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0)).device
    model.to(device)
    try:
        yield
    finally:
        model.to(before)


def _versions() -> dict[str, str]:
    # The package imports this module before it is complete.
    from .. import __version__

    found = {"autolora_hf": __version__, "python": platform.python_version()}
    for package in ("torch", "timm", "transformers", "peft", "pyautoattack", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
