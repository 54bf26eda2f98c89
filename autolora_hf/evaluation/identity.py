"""What the verdicts of an evaluation depend on: by it one knows whether two runs are the same evaluation."""

from __future__ import annotations

import hashlib
import re
from contextlib import nullcontext
from typing import Any

from torch import nn

from ..digests import weights_digest
from ..modeling import AutoLoraModel
from .checkpoint import differing
from .samples import Samples
from .view import AttackView


# As in the `repr` of functions and other objects that state nothing about themselves.
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def describe_evaluation(
    model: nn.Module, views: list[AttackView], routes: list[str], samples: Samples, conditions: dict[str, Any]
) -> dict[str, Any]:
    """All that the verdicts depend on but for the pixels, which are compared when they are read; as JSON types.

    Args:
        model (`nn.Module`): The model.
        views (`list[AttackView]`): What the attacks see of it, for each route.
        routes (`list[str]`): Routes of an AutoLoRa model.
        samples (`Samples`): The images.
        conditions (`dict`): Threat model, attacks, seed, versions.
    """
    weights = []
    for view, route in zip(views, routes, strict=True):
        # Under the other route a model may have other norm statistics.
        with model.route(route) if isinstance(model, AutoLoraModel) else nullcontext():
            # With buffers that are not saved, such as those of the normalisation.
            weights.append(weights_digest({**dict(view.named_parameters()), **dict(view.named_buffers())}))
    network = hashlib.sha256(_ADDRESS.sub("", repr(views)).encode()).hexdigest()
    return {
        "weights_sha256": " ".join(weights),
        "network_sha256": network,
        **conditions,
        "batch_size": samples.batch_size,
        "dataset_size": samples.dataset_size,
        "sample_indices": samples.indices,
    }


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
