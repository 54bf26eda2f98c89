"""What the verdicts of an evaluation depend on: by it one knows whether two runs are the same evaluation."""

from __future__ import annotations

import hashlib
import math
import re
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..attacks.pgd import random_perturbation
from ..config import ThreatModel
from ..digests import weights_digest
from ..modeling import AutoLoraModel
from .checkpoint import differing
from .samples import Samples, sample_digest
from .view import AttackView


# Images that a model is recognised by, and directions that its gradients are compared along.
_PROBES = 4
# As in the `repr` of functions and other objects that state nothing about themselves.
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def describe_evaluation(
    model: nn.Module, view: AttackView, samples: Samples, conditions: dict[str, Any]
) -> dict[str, Any]:
    """All that the verdicts depend on but for the pixels, which are compared when they are read; as JSON types.

    Args:
        model (`nn.Module`): The model.
        view (`AttackView`): What the attacks see of it.
        samples (`Samples`): The images.
        conditions (`dict`): Threat model, attacks, seed, route, versions.
    """
    weights = []
    each_route: list[AbstractContextManager] = [nullcontext()]
    if isinstance(model, AutoLoraModel):
        # Another route may be measured later, and have other norm statistics.
        each_route = [model.route(name) for name in model.routes]
    for route in each_route:
        with route:
            # With buffers that are not saved, such as those of the normalisation.
            weights.append(weights_digest({**dict(view.named_parameters()), **dict(view.named_buffers())}))
    network = hashlib.sha256(_ADDRESS.sub("", repr(view)).encode()).hexdigest()
    return {
        "weights_sha256": " ".join(weights),
        "network_sha256": network,
        **conditions,
        "batch_size": samples.batch_size,
        "dataset_size": samples.dataset_size,
        "sample_indices": samples.indices,
    }


def probe(
    view: AttackView, target: AttackView, samples: Samples, threat_model: ThreatModel, seed: int
) -> tuple[list[str], list[float]]:
    """What a few images, clean and with noise, get from the model, and where its gradients point.

    Weights and layers do not tell everything of a model: what `forward` does, or a plain attribute, may be another.

    Returns:
        What identifies the images, and numbers of about 1, which differ by little more than rounding between two runs
        of one model.
    """
    pixels, labels = samples.read(torch.arange(min(len(samples), _PROBES)), view.device)
    generator = torch.Generator(device=pixels.device).manual_seed(seed % 2**63)
    noisy = (pixels + random_perturbation(pixels, threat_model, generator)).clamp(0, 1)
    with torch.no_grad():
        logits = torch.cat([view(pixels), view(noisy)]).double()
    logits = F.normalize(logits - logits.mean(1, keepdim=True)) * math.sqrt(logits.shape[1])
    noisy.requires_grad_(True)
    (gradient,) = torch.autograd.grad(F.cross_entropy(target(noisy), labels, reduction="sum"), noisy)
    # On the CPU, where the directions are the same whatever the device.
    directions = torch.randn(_PROBES, gradient[0].numel(), generator=torch.Generator().manual_seed(0))
    along = F.normalize(gradient.detach().flatten(1).cpu().double()) @ directions.double().T
    answers = torch.cat([logits.flatten().cpu(), along.flatten()]).nan_to_num().tolist()
    digests = [sample_digest(image, label) for image, label in zip(pixels.cpu(), labels.tolist(), strict=True)]
    return digests, [round(value, 4) for value in answers]


def settings_in_words(attack: Any) -> str:
    """The `repr` of a custom attack. Raises `ValueError` if it cannot tell the attack from another one."""
    text = repr(attack)
    if _ADDRESS.search(text):
        raise ValueError(
            f"`checkpoint_dir` needs attacks that state their settings, so that an earlier run with others is "
            f"noticed, but {text} states none. Make it a dataclass, give it a `__repr__`, or leave out "
            "`checkpoint_dir`."
        )
    return text


def check_same(evaluations: list[dict[str, Any]]) -> None:
    """Raises `ValueError` if the processes, one an entry, are about to evaluate different things."""
    for rank, evaluation in enumerate(evaluations):
        differences = differing(evaluations[0], evaluation, ("in process 0", f"in process {rank}"))
        if differences:
            raise ValueError(
                f"Processes 0 and {rank} evaluate different things. They differ in {'; '.join(differences)}. Load the "
                "same model and pass the same arguments in every process."
            )
