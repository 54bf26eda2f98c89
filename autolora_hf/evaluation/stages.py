"""The stages of an evaluation: the clean images, then attacks on those still robust, or changes of all of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks.pgd import hits
from ..checks import listed
from ..config import ThreatModel
from ..pixels import check_pixels
from .autoattack import isolated_random_state
from .checkpoint import BatchVerdicts, Checkpoint
from .progress import StageBar, passes_of
from .report import AttackResult
from .samples import Samples, sample_digest
from .sharding import Processes
from .view import AttackView


logger = logging.getLogger(__name__)

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]

# Takes pixels of a batch and the positions of its images in the data set, and returns other pixels.
Change = Callable[[Tensor, list[int]], Tensor]

CLEAN = "clean images"


@dataclass
class Answers:
    """What the model says of every image, N.

    Args:
        correct (`Tensor`): Whether it is right, bool.
        predicted (`Tensor`): The class it takes the image for, long.
        confidence (`Tensor`): The probability it gives to that class, float64 in [0, 1].
        top5 (`Tensor`): Whether the label is among the five most probable classes, bool.
    """

    correct: Tensor
    predicted: Tensor
    confidence: Tensor
    top5: Tensor

    @classmethod
    def none_yet(cls, images: int) -> Answers:
        """All wrong."""
        return cls(
            torch.zeros(images, dtype=torch.bool),
            torch.zeros(images, dtype=torch.long),
            torch.zeros(images, dtype=torch.float64),
            torch.zeros(images, dtype=torch.bool),
        )

    def copy(self) -> Answers:
        """A copy that does not change along."""
        return Answers(*(value.clone() for value in vars(self).values()))

    def accept(self, verdicts: BatchVerdicts, batch: Tensor, only_wrong: bool = False) -> None:
        """Enters the answers of one batch; only the wrong ones where an attack is weaker than the one before."""
        chosen = torch.tensor([not (only_wrong and right) for right in verdicts.correct])
        for name, values in vars(self).items():
            values[batch[chosen]] = torch.tensor(getattr(verdicts, name), dtype=values.dtype)[chosen]


@dataclass
class Stages:
    """Runs the stages of an evaluation of one route, in whole batches that are shared out to the processes.

    Random numbers are seeded anew for every batch, and batches never depend on the number of processes: each image
    gets the verdict that one process would give it.

    Args:
        view (`AttackView`): The model, which judges.
        target (`AttackView`): What the attacks search on: the same function.
        samples (`Samples`): The images.
        processes (`Processes`): Those that take part.
        checkpoint (`Checkpoint`, *optional*): Where finished batches are kept and found again.
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
    seed: int
    progress: bool
    digests: dict[int, str] = field(default_factory=dict)
    devices: dict[str, None] = field(default_factory=dict)
    earlier_seconds: float = 0.0
    _series: str = field(default="stage", init=False)
    _count: int = field(default=0, init=False)

    def begin(self, series: str) -> None:
        """Numbers the stages that follow by themselves, so that a checkpoint finds them whatever was run before."""
        self._series, self._count = series, 0

    @property
    def _folder(self) -> Path | None:
        return None if self.checkpoint is None else self.checkpoint.folder

    def clean(self) -> Answers:
        """What the model says of the clean images.

        They are read and classified in every run, so that a checkpoint of other images is noticed. What it says
        counts: rounding may differ, and later stages were run on these verdicts.

        Raises:
            ValueError: If the model returns NaN, or an image is not the one that the checkpoint is about.
        """
        batches = self.samples.split(torch.arange(len(self.samples)))
        key = self._next()
        known = self._known(key, CLEAN, batches, any_digests=True)

        def classify(index: int) -> tuple[BatchVerdicts, int]:
            batch = batches[index]
            found = self._measured(key, CLEAN, index, batch, self._classify_clean, keep=index not in known)
            earlier = known.get(index, found)
            rows = zip(found.sample_indices, found.sample_digests, earlier.sample_digests, strict=True)
            changed = [str(image) for image, here, there in rows if here != there]
            if changed:
                raise ValueError(
                    f"{self._folder} holds the verdicts of an evaluation of other images: the ones at "
                    f"{listed(changed)} of the data set have changed. Use another folder."
                )
            return earlier, sum(here != there for here, there in zip(found.correct, earlier.correct, strict=True))

        answers, deviating = Answers.none_yet(len(self.samples)), 0
        is_shown = self.progress and self.processes.is_main
        with StageBar(CLEAN, [len(batch) for batch in batches], 1, None, is_shown, leave=False) as bar:
            for index, (verdicts, deviations) in self.processes.share(classify, range(len(batches))):
                self._note(verdicts)
                answers.accept(verdicts, batches[index])
                self.digests.update(zip(verdicts.sample_indices, verdicts.sample_digests, strict=True))
                deviating += deviations
                bar.finish([index])
        if deviating and self.processes.is_main:
            logger.warning(
                "The model classifies %d of %d clean images otherwise than when %s was begun. If that is not "
                "rounding, the model is another one: start in another folder.",
                deviating,
                len(answers.correct),
                self._folder,
            )
        return answers

    def attack(self, name: str, attack: Attack, threat_model: ThreatModel, answers: Answers) -> AttackResult:
        """Runs one attack on the images that are still classified correctly, and enters the answers that it changed.

        Args:
            name (`str`): What the attack is called.
            attack (`Attack`): Called with a model, pixels and labels of a batch; returns pixels.
            threat_model (`ThreatModel`): What the attack may do.
            answers (`Answers`): Changed in place, the same in all processes.

        Raises:
            ValueError: If the attack returns something else than images in the ball and in [0, 1].
        """
        started, before = time.perf_counter(), int(answers.correct.sum())

        def classify(batch: Tensor) -> tuple[Tensor, Tensor, list[str]]:
            return self._classify_attacked(batch, name, attack, threat_model)

        batches = self.samples.split(answers.correct.nonzero().squeeze(1))
        passes = passes_of(attack)
        earlier_seconds = self._run(name, batches, classify, answers, passes, only_wrong=True)
        after, seconds = int(answers.correct.sum()), time.perf_counter() - started + earlier_seconds
        return AttackResult(name, before, before - after, after / len(self.samples), round(seconds, 3))

    def change(self, name: str, change: Change) -> Answers:
        """What the model says of all images after a change that knows nothing of the model.

        Raises:
            ValueError: If it returns something else than images in [0, 1].
        """
        answers = Answers.none_yet(len(self.samples))

        def classify(batch: Tensor) -> tuple[Tensor, Tensor, list[str]]:
            pixels, labels = self.samples.read(batch, self.view.device)
            changed = change(pixels, self.samples.rows(batch))
            if changed.shape != pixels.shape:
                raise ValueError(f"{name} must return images of shape {tuple(pixels.shape)}, got {changed.shape}.")
            check_pixels(changed, name=f"images returned by {name}")
            with torch.no_grad():
                return self.view(changed), labels, self._digests_of(batch)

        self._run(name, self.samples.split(torch.arange(len(self.samples))), classify, answers)
        return answers

    def _run(
        self,
        name: str,
        batches: list[Tensor],
        classify: Callable[[Tensor], tuple[Tensor, Tensor, list[str]]],
        answers: Answers,
        passes: int | None = None,
        only_wrong: bool = False,
    ) -> float:
        """One stage after the clean images. Returns the wall time of the batches that were known from a checkpoint."""
        key = self._next()
        known = self._known(key, name, batches)
        if known and self.processes.is_main:
            logger.info("%s: %d of %d batches are known from %s.", name, len(known), len(batches), self._folder)
        for index, verdicts in known.items():
            self._note(verdicts)
            answers.accept(verdicts, batches[index], only_wrong)
        earlier_seconds = sum(verdicts.seconds for verdicts in known.values())
        self.earlier_seconds += earlier_seconds

        def measure(index: int) -> BatchVerdicts:
            return self._measured(key, name, index, batches[index], classify)

        todo = [index for index in range(len(batches)) if index not in known]
        is_shown = self.progress and self.processes.is_main
        still = answers.correct if only_wrong else None
        with StageBar(name, [len(batch) for batch in batches], passes, still, is_shown, leave=only_wrong) as bar:
            bar.finish(known)
            self.target.on_pass = bar.on_pass if is_shown else None
            try:
                for index, verdicts in self.processes.share(measure, todo):
                    self._note(verdicts)
                    answers.accept(verdicts, batches[index], only_wrong)
                    bar.finish([index])
            finally:
                self.target.on_pass = None
        return earlier_seconds

    def _next(self) -> str:
        """What the next stage is found by in a checkpoint."""
        self._count += 1
        return f"{self._series}-{self._count - 1:02}"

    def _known(
        self, key: str, name: str, batches: list[Tensor], any_digests: bool = False
    ) -> dict[int, BatchVerdicts]:
        """The verdicts of a stage that any process finds: a folder need not be shared between machines."""
        if self.checkpoint is None:
            return {}
        with self.processes.together():
            images = [self.samples.rows(batch) for batch in batches]
            own = self.checkpoint.read(key, name, images, None if any_digests else self.digests)
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
        key: str,
        name: str,
        index: int,
        batch: Tensor,
        classify: Callable[[Tensor], tuple[Tensor, Tensor, list[str]]],
        keep: bool = True,
    ) -> BatchVerdicts:
        started = time.perf_counter()
        with isolated_random_state(self.seed):
            logits, labels, digests = classify(batch)
        # The other processes work at the same time.
        seconds = round((time.perf_counter() - started) / self.processes.size, 3)
        images = self.samples.rows(batch)
        verdicts = BatchVerdicts(
            name,
            images,
            digests,
            **_answers(logits, labels),
            seconds=seconds,
            device=describe_device(self.view.device),
        )
        if keep and self.checkpoint is not None:
            self.checkpoint.write(key, index, verdicts)
        return verdicts

    def _note(self, verdicts: BatchVerdicts) -> None:
        self.devices[verdicts.device] = None

    def _digests_of(self, batch: Tensor) -> list[str]:
        return [self.digests[row] for row in self.samples.rows(batch)]

    @torch.no_grad()
    def _classify_clean(self, batch: Tensor) -> tuple[Tensor, Tensor, list[str]]:
        pixels, labels = self.samples.read(batch, self.view.device)
        logits = self.view(pixels)
        if logits.isnan().any():
            raise ValueError(
                f"The model returns NaN for {logits.isnan().any(1).sum()} of {len(logits)} clean images. Check that "
                "its weights and running statistics are finite; half precision may overflow, so try float32."
            )
        digests = [sample_digest(image, label) for image, label in zip(pixels.cpu(), labels.tolist(), strict=True)]
        return logits, labels, digests

    def _classify_attacked(
        self, batch: Tensor, name: str, attack: Attack, threat_model: ThreatModel
    ) -> tuple[Tensor, Tensor, list[str]]:
        pixels, labels = self.samples.read(batch, self.view.device)
        adversarial = attack(self.target, pixels.clone(), labels.clone())
        adversarial = verified(adversarial, pixels, threat_model, name)
        # Some attack libraries leave the model in training mode.
        self.target.eval()
        with torch.no_grad():
            return self.view(adversarial), labels, self._digests_of(batch)


def _answers(logits: Tensor, labels: Tensor) -> dict[str, list[Any]]:
    """Logits, N x K, and labels, N, as [`BatchVerdicts`] keeps them. Where a logit is NaN the model is wrong."""
    confidence, predicted = logits.double().softmax(1).nan_to_num(0).max(1)
    # Among equals the label comes last, so that a constant answer is not right for every label.
    rank = (logits >= logits.gather(1, labels[:, None])).sum(1)
    return {
        "correct": hits(logits, labels).tolist(),
        "predicted": predicted.tolist(),
        "confidence": [round(value, 6) for value in confidence.tolist()],
        "top5": ((rank <= 5) & ~logits.isnan().any(1)).tolist(),
    }


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
            f"threat model allows {threat_model.eps:.6g}. The attack needs the same norm, a radius in [0, 1] pixels, "
            "and no normalisation of its own: the model normalises inside."
        )
    return adversarial
