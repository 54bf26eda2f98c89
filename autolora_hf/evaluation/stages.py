"""The stages of an evaluation: the clean images, then one attack after the other on the images still robust."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..attacks.pgd import hits
from ..checks import listed
from ..config import ThreatModel
from ..pixels import check_pixels
from .autoattack import isolated_random_state
from .checkpoint import BatchVerdicts, Checkpoint
from .report import AttackResult
from .samples import Samples, sample_digest
from .sharding import Processes
from .view import AttackView


logger = logging.getLogger(__name__)

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]

CLEAN = "clean images"


@dataclass
class Stages:
    """Runs the stages of an evaluation, in whole batches that are shared out to the processes.

    Random numbers are seeded anew for every batch, and batches never depend on the number of processes: each image
    gets the verdict that one process would give it.

    Args:
        view (`AttackView`): The model, which judges.
        target (`AttackView`): What the attacks search on: the same function.
        samples (`Samples`): The images.
        processes (`Processes`): Those that take part.
        checkpoint (`Checkpoint`, *optional*): Where finished batches are kept and found again.
        threat_model (`ThreatModel`): What an attack may do.
        seed (`int`): Seed of each batch.
        progress (`bool`): Show a progress bar an attack, in the main process.

    Attributes:
        digests (`dict[int, str]`): What identifies each image, by its position in the data set.
        devices (`dict[str, None]`): Where verdicts were measured.
        earlier_seconds (`float`): Wall time of the batches that were found in the checkpoint.
    """

    view: AttackView
    target: AttackView
    samples: Samples
    processes: Processes
    checkpoint: Checkpoint | None
    threat_model: ThreatModel
    seed: int
    progress: bool
    digests: dict[int, str] = field(default_factory=dict)
    devices: dict[str, None] = field(default_factory=dict)
    earlier_seconds: float = 0.0

    def clean(self) -> Tensor:
        """Which of the clean images are classified correctly, N.

        They are read and classified in every run, so that a checkpoint of other images is noticed. What it says
        counts: rounding may differ, and later stages were run on these verdicts.

        Raises:
            ValueError: If the model returns NaN, or an image is not the one that the checkpoint is about.
        """
        batches = self.samples.split(torch.arange(len(self.samples)))
        known = self._known(0, CLEAN, batches)

        def classify(index: int) -> tuple[BatchVerdicts, int]:
            found = self._measured(0, CLEAN, index, batches[index], self._classify_clean, keep=index not in known)
            earlier = known.get(index, found)
            rows = zip(found.sample_indices, found.sample_digests, earlier.sample_digests, strict=True)
            changed = [str(image) for image, here, there in rows if here != there]
            if changed:
                raise ValueError(
                    f"{self.checkpoint.folder} holds the verdicts of an evaluation of other images: the ones at "
                    f"{listed(changed)} of the data set have changed. Use another folder."
                )
            return earlier, sum(here != there for here, there in zip(found.correct, earlier.correct, strict=True))

        correct, deviating = torch.zeros(len(self.samples), dtype=torch.bool), 0
        for index, (verdicts, deviations) in self.processes.share(classify, range(len(batches))):
            self._accept(verdicts, batches[index], correct)
            self.digests.update(zip(verdicts.sample_indices, verdicts.sample_digests, strict=True))
            deviating += deviations
        if deviating and self.processes.is_main:
            logger.warning(
                "The model classifies %d of %d clean images otherwise than when %s was begun. If that is not "
                "rounding, the model is another one: start in another folder.",
                deviating,
                len(correct),
                self.checkpoint.folder,
            )
        return correct

    def attack(self, number: int, name: str, attack: Attack, robust: Tensor) -> AttackResult:
        """Runs one attack on the images that are still `robust`, N, and clears those that it broke.

        Args:
            number (`int`): 1 for the first attack.
            name (`str`): What the attack is called.
            attack (`Attack`): Called with a model, pixels and labels of a batch; returns pixels.
            robust (`Tensor`): Changed in place, the same in all processes.

        Raises:
            ValueError: If the attack returns something else than images in the ball and in [0, 1].
        """
        started, before = time.perf_counter(), int(robust.sum())
        batches = self.samples.split(robust.nonzero().squeeze(1))
        known = self._known(number, name, batches)
        if known and self.processes.is_main:
            logger.info(
                "%s: %d of %d batches are known from %s.", name, len(known), len(batches), self.checkpoint.folder
            )
        for index, verdicts in known.items():
            self._accept(verdicts, batches[index], robust)
        earlier_seconds = sum(verdicts.seconds for verdicts in known.values())
        self.earlier_seconds += earlier_seconds

        def classify(batch: Tensor) -> tuple[list[bool], list[str]]:
            return self._classify_attacked(batch, name, attack)

        def measure(index: int) -> BatchVerdicts:
            return self._measured(number, name, index, batches[index], classify)

        todo = [index for index in range(len(batches)) if index not in known]
        is_shown = self.progress and self.processes.is_main
        with tqdm(total=before, desc=name, unit="image", disable=not is_shown) as bar:
            bar.update(sum(len(batches[index]) for index in known))
            self.target.on_pass = _Heartbeat(bar, robust) if is_shown else None
            try:
                for index, verdicts in self.processes.share(measure, todo):
                    self._accept(verdicts, batches[index], robust)
                    bar.update(len(batches[index]))
            finally:
                self.target.on_pass = None
        after, seconds = int(robust.sum()), time.perf_counter() - started + earlier_seconds
        return AttackResult(name, before, before - after, after / len(robust), round(seconds, 3))

    def _known(self, number: int, name: str, batches: list[Tensor]) -> dict[int, BatchVerdicts]:
        """The verdicts of a stage that any process finds: a folder need not be shared between machines."""
        if self.checkpoint is None:
            return {}
        with self.processes.together():
            images = [self.samples.rows(batch) for batch in batches]
            own = self.checkpoint.read(number, name, images, self.digests if number else None)
        known: dict[int, BatchVerdicts] = {}
        problems: dict[str, None] = {}
        for found, wrong in self.processes.gather(own):
            known = {**found, **known}
            problems.update(dict.fromkeys(wrong))
        if self.processes.is_main:
            for problem in problems:
                logger.warning(problem)
        return dict(sorted(known.items()))

    def _measured(
        self,
        number: int,
        name: str,
        index: int,
        batch: Tensor,
        classify: Callable[[Tensor], tuple[list[bool], list[str]]],
        keep: bool = True,
    ) -> BatchVerdicts:
        started = time.perf_counter()
        with isolated_random_state(self.seed):
            correct, digests = classify(batch)
        # The other processes work at the same time.
        seconds = round((time.perf_counter() - started) / self.processes.size, 3)
        images = self.samples.rows(batch)
        verdicts = BatchVerdicts(name, images, digests, correct, seconds, describe_device(self.view.device))
        if keep and self.checkpoint is not None:
            self.checkpoint.write(number, index, verdicts)
        return verdicts

    def _accept(self, verdicts: BatchVerdicts, batch: Tensor, correct: Tensor) -> None:
        correct[batch] = torch.tensor(verdicts.correct)
        self.devices[verdicts.device] = None

    @torch.no_grad()
    def _classify_clean(self, batch: Tensor) -> tuple[list[bool], list[str]]:
        pixels, labels = self.samples.read(batch, self.view.device)
        logits = self.view(pixels)
        if logits.isnan().any():
            raise ValueError(f"The model returns NaN for {logits.isnan().any(1).sum()} of {len(logits)} clean images.")
        digests = [sample_digest(image, label) for image, label in zip(pixels.cpu(), labels.tolist(), strict=True)]
        return (logits.argmax(1) == labels).tolist(), digests

    def _classify_attacked(self, batch: Tensor, name: str, attack: Attack) -> tuple[list[bool], list[str]]:
        pixels, labels = self.samples.read(batch, self.view.device)
        adversarial = attack(self.target, pixels.clone(), labels.clone())
        adversarial = verified(adversarial, pixels, self.threat_model, name)
        # Some attack libraries leave the model in training mode.
        self.target.eval()
        with torch.no_grad():
            logits = self.view(adversarial)
        return hits(logits, labels).tolist(), [self.digests[row] for row in self.samples.rows(batch)]


def describe_device(device: torch.device) -> str:
    """Its kind and, of a GPU, the model; not its number, which tells nothing about the figures."""
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def verified(adversarial: Any, pixels: Tensor, threat_model: ThreatModel, name: str) -> Tensor:
    """The images an attack returned, detached. Raises unless they are inside the ball and inside [0, 1]."""
    if not isinstance(adversarial, Tensor) or adversarial.shape != pixels.shape:
        shape = tuple(adversarial.shape) if isinstance(adversarial, Tensor) else type(adversarial).__name__
        raise ValueError(f"{name} must return images of shape {tuple(pixels.shape)}, got {shape}.")
    adversarial = adversarial.detach().to(pixels)
    check_pixels(adversarial, name=f"images returned by {name}")
    change = (adversarial.double() - pixels.double()).flatten(1)
    order = {"linf": torch.inf, "l2": 2, "l1": 1}[threat_model.norm]
    distance = torch.linalg.vector_norm(change, ord=order, dim=1).max().item()
    # Room for the rounding errors of float32 arithmetic, no more; in L1 those of all pixels add up.
    rounding = 1e-6 if threat_model.norm != "l1" else max(1e-6, change.shape[1] * 2**-24)
    if distance > threat_model.eps * (1 + 1e-5) + rounding:
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
