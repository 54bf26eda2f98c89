"""Natural and robust accuracy of a model on a data set."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..attacks import PGD, attack_mode
from ..config import ThreatModel
from ..data import describe_data
from ..digests import weights_digest
from ..frozen import FrozenRoute
from ..modeling import AutoLoraModel
from .accuracy import Accuracy
from .attack_list import (
    FIRST_PASS,
    FirstPass,
    attack_name,
    attack_settings,
    attacks_in_words,
    check_attacks,
    check_transfers,
    resolve_attacks,
)
from .autoattack import isolated_random_state
from .checkpoint import Checkpoint
from .corruptions import CORRUPTIONS, SEVERITIES, check_corruptible, check_corruption, corrupted, load_library
from .curve import CURVE_STEPS, CurvePoint, RobustnessCurve, curve_radii
from .findings import Finding
from .gradient_masking import MAX_IMAGES, gradient_masking_findings
from .identity import check_same, describe_evaluation, probe, settings_in_words
from .report import AttackResult, CorruptionResult, Protocol, RobustnessReport, RouteResult
from .report_text import standard_warnings
from .samples import Samples
from .sharding import all_processes
from .stages import Answers, Attack, Stages
from .view import AttackView
from .zero_shot import refuse_tower


_VERSIONS = ("torch", "timm", "transformers", "peft", "pyautoattack", "imagecorruptions-imaug", "numpy")


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
    diagnostics: bool = True,
    curve: bool | Sequence[float] = False,
    corruptions: bool | Sequence[str] = False,
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
            Those that are left share other batches then, so their random starts differ. `["autoattack",
            TransferAttack(other)]` adds what fools another model, which no gradient of this one is needed for.
        route (`str`): Route of the AutoLoRa model. `"both"`: the deployed one, and as `report.other_route` the other.
        max_samples (`int`, *optional*): Use a random subset of this size with the class shares of the whole set.
        sample_indices (`Sequence[int]`, *optional*): Use exactly these images, for instance those of another report.
        batch_size (`int`): Images in a forward pass.
        seed (`int`): Seed of the attacks and of the subset. A [`PGD`] instance keeps its own.
        device (*optional*): Run there and move the model back afterwards. `None`: where the model is.
        progress (`bool`): Show a progress bar an attack, in the main process.
        checkpoint_dir (`str`, *optional*): Folder in which the verdicts on every finished batch are kept. An
            evaluation that was killed goes on from there when it is started again in the same way, with any number of
            processes, and ends with the same report but for the times, which count those of the earlier runs. One that
            is finished can be asked for `curve`, `corruptions` or `route="both"` afterwards. A custom attack is
            recognised by its `repr`, which must state its settings, as that of a dataclass does.
        diagnostics (`bool`): Look for gradient masking on a few images, see [`gradient_masking_findings`]. What is
            found stands in `report.findings`, and what failed among the warnings too.
        curve (`bool` or `Sequence[float]`): Measure robust accuracy at these radii too, in [0, 1] pixels, under PGD
            with 20 steps. `True`: from a quarter to four times the radius of `threat_model`.
        corruptions (`bool` or `Sequence[str]`): Measure accuracy under these common corruptions, at every severity;
            `True`: all fifteen. Needs `pip install "autolora-hf[corruptions]"`. See [`corrupted`].

    Raises:
        ValueError: If the data set is empty, labels or pixels are out of range, the threat model is missing, an attack
            is unknown or leaves the ball, a radius or a corruption is unknown, there is no second route, the model
            does not return N x K logits (an image tower does not; see [`ZeroShotClassifier`]), `checkpoint_dir` holds
            another evaluation, or the processes were given different models or arguments. All but what an attack
            returns is checked before the first attack starts.
        ModuleNotFoundError: If a package is missing that an attack or corruptions need.
        RuntimeError: If another process was killed, or never called this function.
    """
    started = time.perf_counter()
    processes = all_processes()
    with ExitStack() as stack:
        with processes.together():
            refuse_tower(model)
            threat_model = _resolve_threat_model(model, threat_model)
            requested = list(attack) if isinstance(attack, (list, tuple)) else [attack]
            check_attacks(requested, threat_model, model)
            radii, corrupted_by = curve_radii(threat_model, curve), _corruptions(corruptions)
            routes = _routes(model, route)
            samples = Samples(dataset, model, max_samples, sample_indices, seed, batch_size)
            for context in (attack_mode(model), _on_device(model, device), torch.enable_grad()):
                stack.enter_context(context)
            subjects = [_Subject(model, name) for name in routes]
            view, target = subjects[0].view, subjects[0].target
            first, _ = samples.read(torch.tensor([0]), view.device)
            num_classes = _count_classes(view, first)
            samples.check_labels(num_classes)
            check_transfers(requested, model, first, num_classes)
            if corrupted_by:
                check_corruptible(first)
            height, width = first.shape[-2:]
            attacks, left_out = resolve_attacks(requested, threat_model, num_classes, (height, width), seed)
            settings = [attack_settings(entry, threat_model, seed) for entry in requested]
            evaluation: dict[str, Any] = {}
            if processes.size > 1 or checkpoint_dir is not None:
                conditions = {"threat_model": asdict(threat_model), "attacks": settings, "seed": seed}
                conditions = {**conditions, "route": routes[0], "versions": _versions()}
                evaluation = describe_evaluation(model, view, samples, conditions)
            if checkpoint_dir is not None:
                custom = [entry for entry, row in zip(requested, settings, strict=True) if row["kind"] == "custom"]
                evaluation["custom_attacks"] = [settings_in_words(entry) for entry in custom]
        # What is measured besides may be asked for later, of an evaluation that is finished: it is no part of what the
        # verdicts of a checkpoint depend on.
        further = {"curve": [one.eps for one in radii], "corruptions": corrupted_by, "routes": routes}
        check_same(processes.gather({**evaluation, **further, "checkpoint_dir is given": checkpoint_dir is not None}))
        with processes.together():
            checkpoint = None
            if checkpoint_dir is not None:
                checkpoint = Checkpoint(checkpoint_dir, evaluation)
                with isolated_random_state(seed):
                    checkpoint.check_model(*probe(view, target, samples, threat_model, seed))
        stages = Stages(view, target, samples, processes, checkpoint, seed, progress)
        clean = stages.clean()
        findings, notes = [], []
        with processes.together(), isolated_random_state(seed):
            if processes.is_main:
                notes = _note_probabilities(view, samples)
            if processes.is_main and diagnostics:
                findings = _diagnose(stages, clean.correct, threat_model, num_classes)
        answers = clean.copy()
        rows = subjects[0].attacked(stages, requested, attacks, threat_model, seed, answers)

        other_route = None
        for subject in subjects[1:]:
            stages.view, stages.target = subject.view, subject.target
            stages.begin("other-route")
            other = stages.clean()
            natural = accuracy_of(other.correct)
            subject.attacked(stages, requested, attacks, threat_model, seed, other)
            other_route = RouteResult(subject.route, natural, accuracy_of(other.correct))
            stages.view, stages.target = view, target
        stages.begin("curve")
        found_curve = _measure_curve(stages, clean, radii, seed)
        stages.begin("corruption")
        found_corruptions = _measure_corruptions(stages, corrupted_by, seed)

        protocol: Protocol = "custom"
        if "autoattack" in requested:
            protocol = "autoattack-reduced" if left_out else "autoattack"
        report = RobustnessReport(
            threat_model=threat_model,
            natural=accuracy_of(clean.correct),
            robust=accuracy_of(answers.correct),
            attacks=[*rows, *(AttackResult(name, left_out=reason) for name, reason in left_out.items())],
            protocol=protocol,
            attack=attacks_in_words(attacks, protocol),
            sample_indices=samples.indices,
            natural_correct=clean.correct.tolist(),
            robust_correct=answers.correct.tolist(),
            dataset_size=samples.dataset_size,
            num_classes=num_classes,
            seed=seed,
            route=routes[0] if hasattr(model, "pixel_space") else None,
            device=", ".join(stages.devices),
            seconds=round(time.perf_counter() - started + stages.earlier_seconds, 3),
            dataset=describe_data(dataset),
            sample_digests=[stages.digests[row] for row in samples.indices],
            attack_settings=settings,
            batch_size=batch_size,
            versions=_versions(),
            network_sha256=weights_digest({**dict(target.named_parameters()), **dict(target.named_buffers())}),
            labels=samples.labels.tolist(),
            natural_predicted=clean.predicted.tolist(),
            robust_predicted=answers.predicted.tolist(),
            natural_confidence=clean.confidence.tolist(),
            robust_confidence=answers.confidence.tolist(),
            natural_top5=accuracy_of(clean.top5) if num_classes > 5 else None,
            robust_top5=accuracy_of(answers.top5) if num_classes > 5 else None,
            class_names=_class_names(model, samples, num_classes),
            findings=findings,
            curve=found_curve,
            corruptions=found_corruptions,
            other_route=other_route,
        )
        report.warnings = [*standard_warnings(report), *samples.notes, *notes, *_doubts(findings)]
        # Its times, notes and findings are those of the main process.
        return processes.gather(report)[0]


class _Subject:
    """One route of a model: what judges, and what attacks search on."""

    def __init__(self, model: nn.Module, route: str) -> None:
        self.model, self.route = model, route
        self.view = self.target = AttackView(model, route).eval()
        if isinstance(model, AutoLoraModel):
            # Attacks search on a copy that is quicker and the same up to rounding; the model itself judges what they
            # find.
            self.target = AttackView(FrozenRoute(model, route)).eval()

    def attacked(
        self,
        stages: Stages,
        requested: list[Any],
        attacks: list[Attack],
        threat_model: ThreatModel,
        seed: int,
        answers: Answers,
    ) -> list[AttackResult]:
        """Runs the attacks one after the other; `answers` become those under all of them."""
        if FIRST_PASS in requested:
            quick = AttackView(FrozenRoute(cast(AutoLoraModel, self.model), self.route, dtype=torch.bfloat16)).eval()
            attacks = [FirstPass(PGD(threat_model, seed=seed), quick), *attacks[1:]]
        return [stages.attack(attack_name(entry), entry, threat_model, answers) for entry in attacks]


def _measure_curve(stages: Stages, clean: Answers, radii: list[ThreatModel], seed: int) -> RobustnessCurve | None:
    if not radii:
        return None
    answers, points = clean.copy(), [CurvePoint(0.0, accuracy_of(clean.correct))]
    for threat_model in radii:
        attack = PGD(threat_model, steps=CURVE_STEPS, seed=seed)
        stages.attack(f"{attack} at {threat_model}", attack, threat_model, answers)
        points.append(CurvePoint(threat_model.eps, accuracy_of(answers.correct)))
    return RobustnessCurve(str(attack), points)


def _measure_corruptions(stages: Stages, names: list[str], seed: int) -> list[CorruptionResult]:
    found = []
    for name in names:
        for severity in SEVERITIES:

            def change(pixels: Tensor, rows: list[int], name: str = name, severity: int = severity) -> Tensor:
                return corrupted(pixels, name, severity, seed, rows)

            answers = stages.change(f"{name}, severity {severity}", change)
            found.append(CorruptionResult(name, severity, accuracy_of(answers.correct)))
    return found


def accuracy_of(correct: Tensor) -> Accuracy:
    """The share of images, N, that are right."""
    return Accuracy.from_counts(int(correct.sum()), len(correct))


def _routes(model: nn.Module, route: str) -> list[str]:
    """The routes to measure, the one that the report is about first."""
    if route != "both":
        return [route]
    routes = getattr(model, "routes", ())
    if len(routes) < 2:
        what = f"has {', '.join(routes)} alone" if routes else "is no AutoLoraModel"
        raise ValueError(f"`route='both'` needs a model with two routes, but this one {what}. Leave `route` out.")
    return list(routes[:2])


def _corruptions(corruptions: bool | Sequence[str]) -> list[str]:
    """Their names; all that is needed for them is checked."""
    if corruptions is False:
        return []
    if isinstance(corruptions, str) or not (corruptions is True or corruptions):
        raise ValueError(f"`corruptions` must be True, False or a list of names, got {corruptions!r}.")
    names = list(CORRUPTIONS if corruptions is True else dict.fromkeys(corruptions))
    for name in names:
        check_corruption(name, SEVERITIES[0])
    load_library()
    return names


def _class_names(model: nn.Module, samples: Samples, num_classes: int) -> list[str] | None:
    names = getattr(model, "label_names", None) or getattr(samples.source, "class_names", None)
    return list(names) if names and len(names) == num_classes else None


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


@torch.no_grad()
def _count_classes(view: AttackView, pixels: Tensor) -> int:
    logits = view(pixels)
    if logits.ndim != 2 or len(logits) != len(pixels) or logits.shape[1] < 2:
        raise ValueError(
            f"The model must return logits N x K with K >= 2, got {tuple(logits.shape)} for {len(pixels)} image(s)."
        )
    return logits.shape[1]


def _diagnose(stages: Stages, correct: Tensor, threat_model: ThreatModel, num_classes: int) -> list[Finding]:
    """Diagnostics of gradient masking, on a few clean images that are classified correctly, spread over the data."""
    view, samples, rows = stages.view, stages.samples, correct.nonzero().squeeze(1)
    most = min(MAX_IMAGES, samples.batch_size)
    spread = torch.linspace(0, len(rows) - 1, min(len(rows), most)).round().long()
    chosen = rows[spread] if len(rows) else torch.tensor([0])
    pixels, labels = samples.read(chosen, view.device)
    if not len(rows):
        pixels, labels = pixels[:0], labels[:0]
    options: dict[str, Any] = {"seed": stages.seed, "max_images": most, "progress": stages.progress}
    return gradient_masking_findings(view, stages.target, pixels, labels, threat_model, num_classes, **options)


def _doubts(findings: list[Finding]) -> list[str]:
    """What a reader has to know of the diagnostics before using the figures."""
    if findings and all(finding.outcome == "not run" for finding in findings):
        return [f"Nothing is known about gradient masking. {findings[0].sentence}"]
    return [f"{finding.name}: {finding.sentence}" for finding in findings if finding.outcome == "failed"]


@torch.no_grad()
def _note_probabilities(view: AttackView, samples: Samples) -> list[str]:
    pixels, _ = samples.read(torch.arange(min(len(samples), samples.batch_size)), view.device)
    logits = view(pixels)
    sums = logits.sum(1)
    if logits.min() >= 0 and logits.max() <= 1 and torch.allclose(sums, torch.ones_like(sums), atol=1e-5):
        return ["The outputs look like probabilities. Attacks need logits: leave out the softmax."]
    return []


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
    for package in _VERSIONS:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
