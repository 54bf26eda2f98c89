"""Running statistics of norms, estimated anew on adversarial examples of training images."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from .. import targets
from ..attacks import PGD
from ..attacks.pgd import forget_cached
from ..data import PixelDataset, as_pixel_dataset, collate, describe_data, is_test_split, stratified_subset
from ..frozen import FrozenRoute
from ..modeling import AutoLoraModel
from ..progress import progress_bar
from ..routes import ROBUST


def recalibrate(model: AutoLoraModel, data: Any, *, attack: PGD | None = None) -> int:
    """Estimates running statistics of the robust route anew, in place, on adversarial examples of training images.

    A cut weight change shifts what the norms see. Nothing is trained: every norm gets the mean over batches of its
    own batch statistics, with the norms before it normalising by those of the batch. (On clean images the statistics
    would be those of another distribution than the one under attack, and robust accuracy falls.)

    Args:
        model (`AutoLoraModel`): Of either mode. A model without running statistics stays as it is.
        data: Labelled training images, as [`as_pixel_dataset`] takes them; of more than 1,000 a subset with equal
            shares of the classes is used.
        attack (`PGD`, *optional*): `None`: PGD with 10 steps under the model's threat model.

    Returns:
        Number of images used; 0 if there are no running statistics.
    """
    images = adversarial_examples(model, checked_training_data(data, model, "data"), attack)
    return set_statistics(model, images)


def adversarial_examples(
    model: AutoLoraModel, data: PixelDataset, attack: PGD | None = None, *, most: int = 1000, batch_size: int = 125
) -> Tensor:
    """Adversarial examples of the robust route, N x 3 x H x W, shuffled, of at most `most` images."""
    chosen = stratified_subset(data.labels, min(most, len(data)), seed=0)
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))
    device = next(model.parameters()).device
    attack, target = attack or PGD(model.threat_model), FrozenRoute(model, ROBUST)
    found = []
    parts = order.split(batch_size)
    for part in progress_bar(parts, title="adversarial examples for running statistics", unit="batch"):
        batch = collate([data[chosen[index]] for index in part.tolist()])
        found.append(attack(target, batch["pixel_values"].to(device), batch["labels"].to(device)))
    return torch.cat(found)


@torch.no_grad()
def set_statistics(model: AutoLoraModel, pixels: Tensor, batch_size: int = 125) -> int:
    """See [`recalibrate`]; `pixels` are its adversarial examples, N x 3 x H x W in [0, 1]."""
    norms = [
        module
        for name, module in targets.statistics_norms(model.get_base_model()).items()
        if not name.endswith(".original_module") and hasattr(module, "momentum")
    ]
    if not norms:
        return 0
    momenta = [norm.momentum for norm in norms]
    view = model.pixel_space(ROBUST)
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for norm in norms:
            norm.training = True
        # Equal parts, since each counts the same.
        for count, batch in enumerate(pixels.chunk(math.ceil(len(pixels) / batch_size)), start=1):
            for norm in norms:
                cast(Any, norm).momentum = 1 / count
            view(batch)
    finally:
        for module, training in modes:
            module.training = training
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    if model.autolora_config.mode == "adapter":
        follow_robust_norms(model)
    forget_cached(model)
    return len(pixels)


def follow_robust_norms(model: AutoLoraModel) -> None:
    """With `norm="dual"` the natural set starts as the robust one."""
    saved = model._saved_modules()
    for name, norm in model.natural_norms.items():
        norm.load_state_dict(saved[name.replace("/", ".")].state_dict())


def checked_training_data(data: Any, model: AutoLoraModel, name: str) -> PixelDataset:
    """`data` as the model sees them. Raises `ValueError` if they are the test split."""
    if is_test_split(describe_data(data)["split"]):
        raise ValueError(
            f"`{name}` is the 'test' split. It would shape the adapter, so the reported test accuracy would be too "
            "good. Pass images that were held out of the training set, and give the test split to `measure`."
        )
    return data if isinstance(data, PixelDataset) else as_pixel_dataset(data, model.preprocessing, name=name)
