"""Other libraries on the same network, images, radius, step size and number of steps, for `benchmark_speed.py`.

None of them is needed for anything else, and some ask for old versions of packages, so they go into an environment of
their own, without what they ask for:

    python -m venv peers && . peers/bin/activate
    pip install -e . foolbox==3.3.4 six
    pip install --no-deps torchattacks==3.5.1 adversarial-robustness-toolbox==1.20.1 cleverhans==4.0.0
    pip install --no-deps git+https://github.com/Harry24k/MAIR.git@fcf0aba

A library that cannot be imported is left out, and the table says so.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from released_step import EPS, STEP_SIZE, STEPS
from torch import Tensor, nn


Attack = Callable[[Tensor, Tensor], Tensor]
# What is called with a batch to take one optimizer step, and the optimizer.
Training = tuple[Callable[[Tensor, Tensor], Any], torch.optim.Optimizer]

# Distribution of every peer; their releases are recorded.
DISTRIBUTIONS = {
    "torchattacks": "torchattacks",
    "foolbox": "foolbox",
    "ART": "adversarial-robustness-toolbox",
    "cleverhans": "cleverhans",
    "MAIR": "mair",
}


def versions() -> dict[str, str]:
    """Installed releases by name."""
    found = {}
    for name, distribution in DISTRIBUTIONS.items():
        try:
            found[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            # MAIR may lie on the path without being installed.
            with contextlib.suppress(ImportError, AttributeError):
                found[name] = importlib.import_module(distribution).__version__
    return found


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of every training."""
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)


# ---- attacks ----


def torchattacks_pgd(model: nn.Module, size: int, classes: int) -> Attack:
    import torchattacks

    return torchattacks.PGD(model, eps=EPS, alpha=STEP_SIZE, steps=STEPS)


def mair_pgd(model: nn.Module, size: int, classes: int) -> Attack:
    from mair import RobModel
    from mair.attacks import PGD

    return PGD(RobModel(model, n_classes=classes), eps=EPS, alpha=STEP_SIZE, steps=STEPS)


def foolbox_pgd(model: nn.Module, size: int, classes: int) -> Attack:
    import foolbox

    wrapped = foolbox.PyTorchModel(model.eval(), bounds=(0, 1), device=next(model.parameters()).device)
    attack = foolbox.attacks.LinfPGD(abs_stepsize=STEP_SIZE, steps=STEPS, random_start=True)

    def run(pixels: Tensor, labels: Tensor) -> Tensor:
        # `run` instead of a call, which would also judge the images.
        return attack.run(wrapped, pixels, foolbox.criteria.Misclassification(labels), epsilon=EPS)

    return run


def cleverhans_pgd(model: nn.Module, size: int, classes: int) -> Attack:
    from cleverhans.torch.attacks.projected_gradient_descent import projected_gradient_descent

    model.eval()

    def run(pixels: Tensor, labels: Tensor) -> Tensor:
        options = {"clip_min": 0.0, "clip_max": 1.0, "y": labels}
        return projected_gradient_descent(model, pixels, EPS, STEP_SIZE, STEPS, np.inf, **options).detach()

    return run


def art_pgd(model: nn.Module, size: int, classes: int) -> Attack:
    from art.attacks.evasion import ProjectedGradientDescentPyTorch

    classifier = _art_classifier(model, sgd(model), size, classes)

    def run(pixels: Tensor, labels: Tensor) -> Tensor:
        options = {"num_random_init": 1, "batch_size": len(pixels), "verbose": False}
        attack = ProjectedGradientDescentPyTorch(classifier, np.inf, EPS, STEP_SIZE, max_iter=STEPS, **options)
        # ART is called with arrays.
        found = attack.generate(pixels.cpu().numpy(), labels.cpu().numpy())
        return torch.from_numpy(found).to(pixels)

    return run


def _art_classifier(model: nn.Module, optimizer: torch.optim.Optimizer, size: int, classes: int) -> Any:
    from art.estimators.classification import PyTorchClassifier

    device = "cpu" if next(model.parameters()).device.type == "cpu" else "gpu"
    options = {"clip_values": (0.0, 1.0), "optimizer": optimizer, "device_type": device}
    return PyTorchClassifier(model, nn.CrossEntropyLoss(), (3, size, size), classes, **options)


# ---- training steps ----


def mair_at(model: nn.Module, size: int, classes: int) -> Training:
    from mair import AT, RobModel

    trainer = AT(RobModel(model, n_classes=classes), eps=EPS, alpha=STEP_SIZE, steps=STEPS)
    trainer.setup(optimizer=sgd(model))

    def step(pixels: Tensor, labels: Tensor) -> None:
        trainer.fit([(pixels, labels)], n_epochs=1, record_type=None, save_type=None)

    return step, trainer.optimizer


def art_at(model: nn.Module, size: int, classes: int) -> Training:
    from art.defences.trainer import AdversarialTrainerMadryPGD

    optimizer = sgd(model)
    classifier = _art_classifier(model, optimizer, size, classes)

    def step(pixels: Tensor, labels: Tensor) -> None:
        count = len(pixels)
        trainer = AdversarialTrainerMadryPGD(
            classifier, nb_epochs=1, batch_size=count, eps=EPS, eps_step=STEP_SIZE, max_iter=STEPS, num_random_init=1
        )
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars
            trainer.fit(pixels.cpu().numpy(), labels.cpu().numpy())

    return step, optimizer


ATTACKS: dict[str, Callable[[nn.Module, int, int], Attack]] = {
    "torchattacks PGD": torchattacks_pgd,
    "MAIR PGD": mair_pgd,
    "foolbox LinfPGD": foolbox_pgd,
    "ART ProjectedGradientDescentPyTorch": art_pgd,
    "cleverhans projected_gradient_descent": cleverhans_pgd,
}
TRAININGS: dict[str, Callable[[nn.Module, int, int], Training]] = {
    "MAIR AT": mair_at,
    "ART AdversarialTrainerMadryPGD": art_at,
}
