"""Natural and robust accuracy of a model on a data set."""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..attacks import PGD, attack_mode
from ..attacks.pgd import logits_of
from ..config import ThreatModel
from ..data import describe_data
from ..frozen import FrozenRoute
from ..modeling import AutoLoraModel
from ..pixels import check_pixels
from .autoattack import AutoAttackComponent, autoattack_components, isolated_random_state
from .report import Accuracy, AttackResult, Protocol, RobustnessReport, standard_warnings
from .samples import Samples


Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]


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
) -> RobustnessReport:
    """Measures accuracy on clean images and under attack.

    Attacks run one after the other, each on the images that are still classified correctly; an image is robust if it
    withstands all of them. Nothing an attack says about itself is believed: every image it returns must lie in the
    ball and in [0, 1], and is classified again. The model runs in eval mode and is left as it was; so are the global
    random states.

    Args:
        model (`nn.Module`): An [`AutoLoraModel`], or any module that maps pixels in [0, 1], N x C x H x W, to logits.
        dataset: What [`as_pixel_dataset`] accepts (a `datasets.Dataset`, a folder of images, a torch `Dataset`), or
            a tuple or `TensorDataset` of float pixels N x C x H x W in [0, 1] and integer labels N. A plain module
            states no preprocessing, so it takes tensors or the result of [`as_pixel_dataset`].
        threat_model (`ThreatModel`, *optional*): Norm and radius of the ball. `None`: the one of the AutoLoRa model.
        attack (`str`, `PGD`, callable, or a list of these): `"autoattack"`; `"pgd"` for PGD with 10 steps; or anything
            called as `attack(model, pixels, labels) -> pixels`.
        route (`str`): Route of the AutoLoRa model.
        max_samples (`int`, *optional*): Use a random subset of this size with the class shares of the whole set.
        sample_indices (`Sequence[int]`, *optional*): Use exactly these images, for instance those of another report.
        batch_size (`int`): Images in a forward pass.
        seed (`int`): Seed of the attacks and of the subset. A [`PGD`] instance keeps its own.
        device (*optional*): Run there and move the model back afterwards. `None`: where the model is.
        progress (`bool`): Show a progress bar an attack.

    Raises:
        ValueError: If the data set is empty, labels or pixels are out of range, the threat model is missing, an attack
            is unknown or leaves the ball, or the model does not return N x K logits. All but what an attack returns is
            checked before the first attack starts.
        ImportError: If AutoAttack is asked for and `pyautoattack` is not installed.
    """
    started = time.perf_counter()
    threat_model = _resolve_threat_model(model, threat_model)
    requested = list(attack) if isinstance(attack, (list, tuple)) else [attack]
    _check_attacks(requested, threat_model)
    samples = Samples(dataset, model, max_samples, sample_indices, seed, batch_size)

    with attack_mode(model), _on_device(model, device), torch.enable_grad():
        view = AttackView(model, route).eval()
        # Attacks search on a copy that is quicker and the same up to rounding; the model itself judges what they find.
        target = AttackView(FrozenRoute(model, route)).eval() if isinstance(model, AutoLoraModel) else view
        _, first, _ = next(samples.batches(torch.tensor([0]), view.device))
        num_classes = _count_classes(view, first)
        samples.check_labels(num_classes)
        attacks, left_out = _resolve_attacks(requested, threat_model, num_classes, tuple(first.shape[-2:]), seed)
        correct, digests = _natural_correct(view, samples)
        notes = _diagnose(view, samples, correct)
        robust, rows = correct.clone(), []
        for current in attacks:
            rows.append(_run(current, target, view, samples, robust, threat_model, seed, progress))
        place = view.device

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
        device=f"{place} ({torch.cuda.get_device_name(place)})" if place.type == "cuda" else str(place),
        seconds=round(time.perf_counter() - started, 3),
        dataset=describe_data(dataset),
        sample_digests=digests,
        attack_settings=[_settings(entry, threat_model, seed) for entry in requested],
        batch_size=batch_size,
        versions=_versions(),
    )
    report.warnings = [*standard_warnings(report), *notes]
    return report


class AttackView(nn.Module):
    """What attacks see of a model: float32 pixels in [0, 1] to a fresh float32 tensor of logits N x K.

    Args:
        model (`nn.Module`): An [`AutoLoraModel`], or a module that maps pixels to logits or an output with `.logits`.
        route (`str`): Route of the AutoLoRa model.
    """

    def __init__(self, model: nn.Module, route: str = "robust") -> None:
        super().__init__()
        self.dtype = torch.float32
        if hasattr(model, "pixel_space"):
            self.model = model.pixel_space(route=route)
        else:
            self.model = model
            kinds = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
            # A model wholly in half or double precision takes only its own kind.
            if len(kinds) == 1:
                self.dtype = kinds.pop()
        self.on_pass: Callable[[], None] | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is; the CPU for one without parameters and buffers."""
        return next(itertools.chain(self.parameters(), self.buffers()), torch.empty(0)).device

    def forward(self, pixels: Tensor) -> Tensor:
        logits = logits_of(self.model(pixels.to(self.dtype))).float()
        if pixels.requires_grad and torch.is_grad_enabled() and not logits.requires_grad:
            # Attacks differentiate without asking. A model that is not differentiable has zero gradient here, and the
            # report says so.
            logits = logits + 0 * pixels.flatten(1)[:, :1]
        if self.on_pass is not None:
            self.on_pass()
        # AutoAttack's Square writes into the logits, which may be a view of the model's own memory.
        return logits.clone()


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


def _check_attacks(requested: list[Any], threat_model: ThreatModel) -> None:
    if not requested:
        raise ValueError("`attack` is an empty list.")
    for entry in requested:
        if isinstance(entry, PGD):
            if entry.threat_model != threat_model:
                raise ValueError(f"{entry} attacks under {entry.threat_model}, the evaluation under {threat_model}.")
            if entry.loss == "targeted":
                raise ValueError("PGD with `loss='targeted'` takes classes to reach, not labels; use 'ce' or 'kl'.")
        elif not callable(entry) and entry not in ("autoattack", "pgd"):
            raise ValueError(f"`attack` must be 'autoattack', 'pgd', a PGD or a callable, got {entry!r}.")


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
    return str(attack) if isinstance(attack, PGD) else getattr(attack, "__name__", type(attack).__name__)


def _describe(attacks: list[Attack], protocol: Protocol) -> str:
    parts = [_name(entry) for entry in attacks if not isinstance(entry, AutoAttackComponent)]
    components = ", ".join(str(entry) for entry in attacks if isinstance(entry, AutoAttackComponent))
    if components:
        parts.append(f"AutoAttack ({'standard' if protocol == 'autoattack' else 'reduced'}): {components}")
    return " + ".join(parts)


def _settings(requested: str | Attack, threat_model: ThreatModel, seed: int) -> dict[str, Any]:
    """One attack as [`RobustnessReport.attack_settings`] records it."""
    if requested == "autoattack":
        return {"kind": "autoattack"}
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


@torch.no_grad()
def _natural_correct(view: AttackView, samples: Samples) -> tuple[Tensor, list[str]]:
    """Which of the clean images are classified correctly, and what identifies each image."""
    correct, digests = torch.zeros(len(samples), dtype=torch.bool), []
    for batch, pixels, labels in samples.batches(torch.arange(len(samples)), view.device):
        logits = view(pixels)
        if logits.isnan().any():
            raise ValueError(f"The model returns NaN for {logits.isnan().any(1).sum()} of {len(logits)} clean images.")
        correct[batch] = (logits.argmax(1) == labels).cpu()
        digests += [sample_digest(image, label) for image, label in zip(pixels.cpu(), labels.tolist(), strict=True)]
    return correct, digests


def sample_digest(pixels: Tensor, label: int) -> str:
    """Twelve hexadecimal digits of the SHA-256 of an image (C x H x W, in [0, 1]) in 8 bits, and its label."""
    content = (pixels * 255).round().to(torch.uint8).contiguous().numpy().tobytes()
    return hashlib.sha256(content + str(label).encode()).hexdigest()[:12]


def _diagnose(view: AttackView, samples: Samples, correct: Tensor) -> list[str]:
    """Reasons to doubt gradient-based attacks, from one batch of clean images that are classified correctly."""
    batch = next(samples.batches(correct.nonzero().squeeze(1), view.device), None)
    if batch is None:
        return []
    _, pixels, labels = batch
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


def _run(
    attack: Attack,
    target: AttackView,
    view: AttackView,
    samples: Samples,
    robust: Tensor,
    threat_model: ThreatModel,
    seed: int,
    progress: bool,
) -> AttackResult:
    """Runs one attack on the images that are still `robust` and clears those that it broke."""
    name, started, before = _name(attack), time.perf_counter(), int(robust.sum())
    with tqdm(total=before, desc=name, unit="image", disable=not progress) as bar:
        target.on_pass = _Heartbeat(bar, robust)
        for batch, pixels, labels in samples.batches(robust.nonzero().squeeze(1), view.device):
            with isolated_random_state(seed):
                adversarial = attack(target, pixels.clone(), labels.clone())
            adversarial = _verified(adversarial, pixels, threat_model, name)
            # Some attack libraries leave the model in training mode.
            target.eval()
            with torch.no_grad():
                logits = view(adversarial)
            # An image for which the model answers NaN is not classified.
            robust[batch] = ((logits.argmax(1) == labels) & ~logits.isnan().any(1)).cpu()
            bar.update(len(batch))
        target.on_pass = None
    after, seconds = int(robust.sum()), round(time.perf_counter() - started, 3)
    return AttackResult(name, before, before - after, after / len(robust), seconds)


def _verified(adversarial: Any, pixels: Tensor, threat_model: ThreatModel, name: str) -> Tensor:
    """The images an attack returned, detached. Raises unless they are inside the ball and inside [0, 1]."""
    if not isinstance(adversarial, Tensor) or adversarial.shape != pixels.shape:
        shape = tuple(adversarial.shape) if isinstance(adversarial, Tensor) else type(adversarial).__name__
        raise ValueError(f"{name} must return images of shape {tuple(pixels.shape)}, got {shape}.")
    adversarial = adversarial.detach().to(pixels)
    check_pixels(adversarial, name=f"images returned by {name}")
    change = (adversarial.double() - pixels.double()).flatten(1)
    order = torch.inf if threat_model.norm == "linf" else 2
    distance = torch.linalg.vector_norm(change, ord=order, dim=1).max().item()
    # Room for the rounding errors of float32 arithmetic, no more.
    if distance > threat_model.eps * (1 + 1e-5) + 1e-6:
        raise ValueError(
            f"{name} left the ball: the {threat_model.norm} distance to the clean image is up to {distance:.6g}, the "
            f"threat model allows {threat_model.eps:.6g}."
        )
    return adversarial


class _Heartbeat:
    """Shows in a progress bar that an attack is at work: one batch of AutoAttack takes thousands of passes."""

    def __init__(self, bar: tqdm, robust: Tensor) -> None:
        self.bar, self.robust, self.passes, self.shown = bar, robust, 0, time.monotonic()

    def __call__(self) -> None:
        self.passes += 1
        if time.monotonic() - self.shown > 1:
            self.shown = time.monotonic()
            share = int(self.robust.sum()) / len(self.robust)
            self.bar.set_postfix_str(f"robust {share:.1%}, {self.passes} passes")


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
