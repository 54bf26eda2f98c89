"""Natural and robust accuracy of a model on a data set."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from tqdm.auto import tqdm

from ..attacks import PGD, attack_mode
from ..attacks.pgd import logits_of
from ..config import ThreatModel
from ..pixels import check_pixels
from .autoattack import autoattack_components, isolated_random_state
from .report import Accuracy, AttackResult, Protocol, RobustnessReport, standard_warnings


Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]

_PACKAGES = ("torch", "timm", "transformers", "peft", "pyautoattack", "numpy")


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

    Attacks run one after the other, each on the images that are still classified correctly, and an image is robust if
    it withstands all of them. Nothing an attack says about itself is believed: every image it returns must lie in the
    ball and in [0, 1], and is classified again. The model is evaluated in eval mode and left as it was; so are the
    global random states.

    Args:
        model (`nn.Module`): An [`AutoLoraModel`], or any module that maps pixels in [0, 1], N x C x H x W, to logits.
        dataset: What [`as_pixel_dataset`] accepts (a `datasets.Dataset`, a folder of images, a torch `Dataset`), or
            a tuple or `TensorDataset` of float pixels N x C x H x W in [0, 1] and integer labels N. For a plain module,
            which states no preprocessing, tensors or the result of [`as_pixel_dataset`].
        threat_model (`ThreatModel`, *optional*): Norm and radius of the ball. `None`: the one of the AutoLoRa model.
        attack (`str`, `PGD`, callable, or a list of these): `"autoattack"`; `"pgd"` for PGD with 10 steps; or anything
            called as `attack(model, pixels, labels) -> pixels`.
        route (`str`): Route of the AutoLoRa model.
        max_samples (`int`, *optional*): Use a random subset of this size with the class shares of the whole set.
        sample_indices (`Sequence[int]`, *optional*): Use exactly these images, for instance those of an earlier report.
        batch_size (`int`): Images in a forward pass. Does not change what is measured, except for random starts.
        seed (`int`): Seed of the attacks and of the subset. A [`PGD`] instance keeps its own.
        device (*optional*): Run there and move the model back afterwards. `None`: where the model is.
        progress (`bool`): Show a progress bar an attack.

    Raises:
        ValueError: If the data set is empty, labels or pixels are out of range, the threat model is missing, an attack
            is unknown or leaves the ball, or the model does not return N x K finite logits. All but what an attack
            returns is checked before the first attack starts.
    """
    started = time.perf_counter()
    is_autolora = hasattr(model, "pixel_space")
    threat_model = _resolve_threat_model(model, threat_model)
    specs = list(attack) if isinstance(attack, (list, tuple)) else [attack]
    _check_specs(specs, threat_model)
    samples = _Samples(dataset, getattr(model, "preprocessing", None), max_samples, sample_indices, seed)
    if isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")

    with attack_mode(model), _on_device(model, device) as place, torch.enable_grad():
        view = AttackView(model, route)
        first = samples.pixels([0], place)
        num_classes = _count_classes(view(first))
        _check_labels(samples.labels, num_classes)
        attacks, left_out, protocol = _resolve_attacks(specs, threat_model, num_classes, first.shape[-2:], seed)
        correct = _natural_correct(view, samples, batch_size, place)
        notes = _diagnose(view, samples, correct, batch_size, place)
        alive = correct.clone()
        rows = []
        for current in attacks:
            rows.append(_run(current, view, samples, alive, threat_model, batch_size, seed, place, progress))

    described = " + ".join(str(entry) if not callable(entry) else _name(entry) for entry in attacks)
    versions = {"autolora_hf": _autolora_version(), "python": platform.python_version()}
    report = RobustnessReport(
        threat_model=threat_model,
        natural=Accuracy.from_counts(int(correct.sum()), len(samples)),
        robust=Accuracy.from_counts(int(alive.sum()), len(samples)),
        attacks=[*rows, *(AttackResult(name, left_out=reason) for name, reason in left_out.items())],
        protocol=protocol,
        attack=described if protocol == "custom" else f"AutoAttack: {described}",
        sample_indices=samples.indices,
        natural_correct=correct.tolist(),
        robust_correct=alive.tolist(),
        dataset_size=samples.dataset_size,
        num_classes=num_classes,
        seed=seed,
        route=route if is_autolora else None,
        device=f"{place} ({torch.cuda.get_device_name(place)})" if place.type == "cuda" else str(place),
        seconds=round(time.perf_counter() - started, 3),
        versions={**versions, **{name: version for name in _PACKAGES if (version := _version(name))}},
    )
    report.warnings = [*standard_warnings(report), *notes]
    return report
