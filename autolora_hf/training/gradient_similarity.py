"""How the natural and the adversarial gradient of the feature extractor agree: what AutoLoRa's branch is there for.

Where both objectives train one feature extractor (FE), their gradients point into "significantly divergent" directions
(AutoLoRa, Xu et al., ICLR 2024, abstract); the paper sends the natural one through a branch instead. Two cosines are
measured, of the same weights, on the same images:

- **without the branch**: clean images run through the FE alone, as in vanilla robust fine-tuning. What conflict the
  FE would see if there were no branch.
- **with the branch**: clean images run through FE and branch, **without the stop-gradient**. What conflict the branch
  leaves.

Both are of whole gradients, so that the path of the clean images is all that differs; while the branch is zero, as at
the start, they are equal. With the stop-gradient, as AutoLoRa trains, nothing of the second one arrives: the natural
gradient of the FE is exactly zero, and there is no conflict whatever the cosine would have been.

What the adversarial term is decides about the cosine: that of AutoLoRa and TRADES has a KL term whose target is not
detached, so part of its gradient draws the predictions of *clean* images to those of the adversarial ones, against the
natural term. `docs/gradient_similarity.md` has the parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback

from ..attacks.pgd import forget_cached
from ..data import collate
from ..modeling import AutoLoraModel
from ..objectives import Objective
from ..routes import NATURAL, ROBUST
from ..schedules import LossScalars
from .distributed import synchronize
from .evaluating import DIAGNOSIS
from .streams import some_items


if TYPE_CHECKING:
    from .trainer import AutoLoraTrainer


# Logged without and with the branch.
COSINE, COSINE_BRANCH = "gradient_cosine", "gradient_cosine_branch"


def feature_parameters(model: AutoLoraModel) -> list[nn.Parameter]:
    """The parameters of the feature extractor: what the deployed route trains, except for the head.

    In mode `full` the backbone, norms included; in mode `adapter` the `robust` adapter and the norms that it carries.
    """
    heads = {parameter for head in model.heads for parameter in head.parameters()}
    return [parameter for parameter in model.robust_parameters() if parameter not in heads]


def feature_gradients(
    model: AutoLoraModel,
    objective: Objective,
    pixels: Tensor,
    adversarial: Tensor,
    labels: Tensor,
    scalars: LossScalars,
    clean_route: str = ROBUST,
    stop_gradient: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the natural and of the adversarial term of a loss for [`feature_parameters`].

    The natural term is `CE(f(x), y)`, the adversarial one [`Objective.adversarial_term`] of `robust(x~)` and `f(x)`,
    for AutoLoRa `(1 - l1) CE(robust(x~), y) + l2 KL(f(x) || robust(x~))`, where `f` is the route of the clean images.
    Both as in a training step: in train mode, so with batch statistics; in the model's own precision. Random layers
    draw the same in every pass. The model, its buffers, its gradients and the random state are left alone.

    Args:
        model (`AutoLoraModel`): The model; not inside a DDP wrapper.
        objective (`Objective`): Whose adversarial term is meant.
        pixels (`Tensor`): Clean images in [0, 1], N x 3 x H x W.
        adversarial (`Tensor`): Their adversarial versions, of the same shape.
        labels (`Tensor`): Class indices, N.
        scalars (`LossScalars`): The loss scalars in force. (0, 0) leaves of AutoLoRa's term the cross-entropy, (1, 1)
            the KL term.
        clean_route (`str`): Route of the clean images: the robust one is the feature extractor alone, the natural one
            has its branch.
        stop_gradient (`bool`): Keep the stop-gradient that the model has in its natural route. With it the natural
            gradient is what the feature extractor gets in training: exactly zero.

    Returns:
        The natural and the adversarial gradients, each one tensor a parameter, of its shape; zeros where a term does
        not reach a parameter.

    Raises:
        ValueError: If the model has no such route, or its feature extractor does not train.
    """
    features = feature_parameters(model)
    if not features:
        raise ValueError("The feature extractor of this model does not train, so it has no gradients.")
    robust_view, clean_view = model.pixel_space(ROBUST), model.pixel_space(clean_route)
    blocking = nullcontext() if stop_gradient else model._switch.without_stop_gradient()
    with _no_trace(model), blocking, torch.enable_grad():
        # The natural pass first, as in training. Each starts from the random state there is.
        with _forked_random_state(pixels.device):
            clean = clean_view(pixels)
        with _forked_random_state(pixels.device):
            robust = robust_view(adversarial)
        natural_term = F.cross_entropy(clean, labels)
        adversarial_term = objective.adversarial_term(clean, robust, labels, scalars)
        # Not `backward`: `.grad` and the hooks of DDP are left alone.
        grad = partial(torch.autograd.grad, allow_unused=True, materialize_grads=True)
        natural_gradient = grad(natural_term, features, retain_graph=True)
        adversarial_gradient = grad(adversarial_term, features)
    return list(natural_gradient), list(adversarial_gradient)


def gradient_cosine(
    model: AutoLoraModel,
    objective: Objective,
    pixels: Tensor,
    adversarial: Tensor,
    labels: Tensor,
    scalars: LossScalars,
    clean_route: str = ROBUST,
) -> float:
    """Cosine between the natural and the adversarial gradient of the feature extractor, all parameters as one vector.

    Args:
        model, objective, pixels, adversarial, labels, scalars, clean_route: See [`feature_gradients`]; no
            stop-gradient.

    Returns:
        In [-1, 1]; NaN if one of them is zero.
    """
    return cosine(*feature_gradients(model, objective, pixels, adversarial, labels, scalars, clean_route))


def cosine(first: list[Tensor], second: list[Tensor]) -> float:
    """Cosine between two vectors that are given in parts; NaN if one is zero. Summed up in float64 (on the CPU)."""

    def product(left: list[Tensor], right: list[Tensor]) -> float:
        pairs = zip(left, right, strict=True)
        return sum((a.cpu().double() * b.cpu().double()).sum().item() for a, b in pairs)

    length = math.sqrt(product(first, first) * product(second, second))
    # Rounding can lead beyond 1.
    return max(-1.0, min(1.0, product(first, second) / length)) if length > 0 else math.nan


class GradientSimilarityCallback(TrainerCallback):
    """Logs both cosines before the first epoch and at the end of each, on one batch of training images.

    The batch is drawn once and as large as one of a device; its images are not augmented. The attack is that of a
    training step, with the same random starts every time. The weights are the optimizer's, also where their average
    is validated. The run is the same to the bit as without this. Nothing is logged while one of the gradients is zero,
    as the adversarial one is before an attack has a radius.

    Every process measures the same batch, since layers such as `SyncBatchNorm` need them all; what the main one found
    counts.

    Args:
        trainer (`AutoLoraTrainer`): Its model is measured, its log is written.
    """

    def __init__(self, trainer: AutoLoraTrainer) -> None:
        self.trainer = trainer
        self._batch: dict[str, Tensor] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._measure()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        due = control.should_log
        self._measure()
        # A log takes back that one is due; that of the epoch's losses still is.
        control.should_log = due

    def _measure(self) -> None:
        trainer, model, objective = self.trainer, self.trainer.model, self.trainer.objective
        args, scheduler = trainer.args, trainer.lr_scheduler
        share = scheduler.epsilon.share(trainer.state.global_step / trainer.plan["steps_per_epoch"])
        if share == 0:
            return  # there are no adversarial images yet
        if self._batch is None:
            self._batch = collate(some_items(trainer.train_dataset, args.seed, args.per_device_train_batch_size))
        pixels, labels = (self._batch[name].to(args.device) for name in ("pixel_values", "labels"))
        attack = args.training_attack(objective.attack_loss, share)
        reference = objective.reference(pixels)
        adversarial = trainer._attacker(attack, pixels, labels, args.seed, DIAGNOSIS, first=0, reference=reference)
        names = {COSINE: ROBUST}
        if NATURAL in model.adapters and NATURAL in objective.routes:
            names[COSINE_BRANCH] = NATURAL
        batch = (pixels, adversarial, labels, scheduler.scalars)
        cosines = [gradient_cosine(model, objective, *batch, clean_route=route) for route in names.values()]
        found = torch.tensor(cosines, device=args.device)
        synchronize([found])
        logs = {name: value for name, value in zip(names, found.tolist(), strict=True) if not math.isnan(value)}
        if logs:
            trainer.log(logs)


@contextmanager
def _no_trace(model: AutoLoraModel) -> Iterator[None]:
    """Train mode on copies of the buffers; on exit modes and buffers are as before."""
    modes = [(module, module.training) for module in model.modules()]
    kept = [(module, module._buffers) for module in model.modules() if module._buffers]
    try:
        for module, buffers in kept:
            module._buffers = {name: None if b is None else b.clone() for name, b in buffers.items()}
        model.train()
        yield
    finally:
        for module, buffers in kept:
            module._buffers = buffers
        for module, training in modes:
            module.training = training
        forget_cached(model)


@contextmanager
def _forked_random_state(device: torch.device) -> Iterator[None]:
    """Context after which the random state of the CPU and of `device` is as before."""
    # Not `fork_rng`, which does not know every kind of device.
    sources = [torch] if device.type == "cpu" else [torch, torch.get_device_module(device)]
    states = [source.get_rng_state() for source in sources]
    try:
        yield
    finally:
        for source, state in zip(sources, states, strict=True):
            source.set_rng_state(state)
