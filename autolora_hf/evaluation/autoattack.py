"""AutoAttack (Croce and Hein, ICML 2020) for any number of classes, on top of the authors' code in `pyautoattack`."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..attacks import attack_mode
from ..config import ThreatModel


STANDARD = ("APGD-CE", "APGD-T", "FAB-T", "Square")


@dataclass(frozen=True)
class AutoAttackComponent:
    """One attack of AutoAttack, with the settings of its standard version.

    Calling an instance runs the attack: `component(model, pixels, labels) -> pixels`. Images that it could not break
    come back unchanged. The model and the global random states are left as they were; equal calls give equal images.

    Args:
        name (`str`): `"APGD-CE"`, `"APGD-DLR"`, `"APGD-T"`, `"FAB-T"` or `"Square"`.
        threat_model (`ThreatModel`): Norm and radius of the ball, in [0, 1] pixels.
        num_classes (`int`): Number of logits of the model.
        seed (`int`): Seed of the random starts and of the random search.
    """

    name: str
    threat_model: ThreatModel
    num_classes: int
    seed: int = 0

    @property
    def target_classes(self) -> int:
        """Number of classes that APGD-T or FAB-T aims at, one after the other."""
        # In L1 the standard version gives APGD-T its budget as a longer search for each of fewer classes.
        most = 5 if self.threat_model.norm == "l1" and self.name == "APGD-T" else 9
        return min(most, self.num_classes - 1)

    @property
    def passes(self) -> int:
        """Forward passes of a batch in which no image is broken."""
        if self.name == "Square":
            return 5003
        if self.name == "FAB-T":
            return 1 + 203 * self.target_classes
        runs, each = (self.target_classes, 102) if self.name == "APGD-T" else (1, 101)
        if self.threat_model.norm == "l1":
            # Each run goes through three radii, and APGD-CE has restarts.
            runs, each = (runs, 104) if self.name == "APGD-T" else (5, 103)
        return 1 + runs * each

    def __str__(self) -> str:
        if self.name.endswith("-T"):
            return f"{self.name} ({self.target_classes} target classes)"
        return f"{self.name} (5000 queries)" if self.name == "Square" else self.name

    def __call__(self, model: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
        """Returns float32 adversarial images of the same shape and device.

        Args:
            model (`nn.Module`): Maps pixels in [0, 1], N x C x H x W, to a fresh float tensor of logits N x K. Square
                writes into it.
            pixels (`Tensor`): Images, float, in [0, 1].
            labels (`Tensor`): Class indices, N, which the model must predict for the clean images.
        """
        # The library asks for contiguous images: it flattens with `view`.
        pixels = pixels.detach().float().contiguous()
        with attack_mode(model), isolated_random_state(self.seed), _silenced(), torch.no_grad():
            suite = load_library().AutoAttack(
                model,
                norm=self.threat_model.norm_name,
                eps=self.threat_model.eps,
                seed=self.seed,
                version="standard",
                device=pixels.device,
            )
            suite.apgd.loss = "dlr" if self.name == "APGD-DLR" else "ce"
            suite.apgd_targeted.n_target_classes = suite.fab.n_target_classes = self.target_classes
            suite.fab.targeted = True
            attack = {"APGD-T": suite.apgd_targeted, "FAB-T": suite.fab, "Square": suite.square}.get(
                self.name, suite.apgd
            )
            return attack.perturb(pixels, labels).detach()


def autoattack_components(
    threat_model: ThreatModel, num_classes: int, image_size: tuple[int, int], seed: int = 0
) -> tuple[list[AutoAttackComponent], dict[str, str]]:
    """The attacks of AutoAttack's standard version that are defined for a model, in their order.

    | classes | attacks |
    |---|---|
    | 10 or more | APGD-CE, APGD-T and FAB-T with 9 target classes, Square: the standard version |
    | 4 to 9 | the same with every other class as target |
    | 3 | APGD-DLR in place of APGD-T, whose loss divides by a gap that involves the fourth-largest logit |
    | 2 | APGD-CE, FAB-T, Square: both DLR losses need a third logit |

    FAB-T and Square use the difference of two logits, which two classes have. In L1 (Croce and Hein, ICML 2021)
    APGD-CE has five restarts, and APGD-T five target classes.

    Args:
        threat_model (`ThreatModel`): Norm and radius of the ball.
        num_classes (`int`): Number of logits of the model, at least 2.
        image_size (`tuple[int, int]`): Height and width in pixels.
        seed (`int`): Seed of all attacks.

    Returns:
        The attacks to run, and for each one left out the reason.

    Raises:
        ModuleNotFoundError: If `pyautoattack` is not installed.
        ValueError: If there are fewer than 2 classes.
    """
    load_library()
    if num_classes < 2:
        raise ValueError(f"AutoAttack needs a model with at least 2 classes, got {num_classes}.")
    left_out = {}
    names = list(STANDARD)
    if num_classes < 4:
        reason = f"its loss, the targeted DLR, needs at least 4 classes, this model has {num_classes}"
        if num_classes == 3:
            names[names.index("APGD-T")] = "APGD-DLR"
            reason += "; untargeted APGD-DLR ran in its place"
        else:
            names.remove("APGD-T")
        left_out["APGD-T"] = reason
    if threat_model.norm != "linf" and not _square_tiles(image_size):
        names.remove("Square")
        left_out["Square"] = (
            f"pyautoattack's {threat_model.norm_name} version cannot tile images of "
            f"{image_size[0]} x {image_size[1]} pixels"
        )
    return [AutoAttackComponent(name, threat_model, num_classes, seed) for name in names], left_out


def load_library() -> Any:
    """The module `pyautoattack`. Raises `ModuleNotFoundError` with the command that installs it."""
    try:
        import pyautoattack
    except ImportError as error:
        raise ModuleNotFoundError("AutoAttack needs the package pyautoattack: `pip install pyautoattack`.") from error
    return pyautoattack


@contextmanager
def isolated_random_state(seed: int) -> Iterator[None]:
    """Seeds Python, NumPy and PyTorch for the body and restores all of their global states afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def _silenced() -> Iterator[None]:
    logger = logging.getLogger("auto-attack")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


def _square_tiles(image_size: tuple[int, int]) -> bool:
    """Whether the tiles with which Square starts in L2 and L1 fit into the image; the library fails where not."""
    tile = image_size[0] // 5
    if tile < 2:
        return tile == 1
    margin = (image_size[0] - 5 * tile) // 2
    return all(margin + length // tile * tile <= length for length in image_size)
