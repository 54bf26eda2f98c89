"""Trainings that go wrong without an error: recognised from what was measured, and said.

Every judgement is a function of the training log alone, which a checkpoint holds: after a resume it is the same.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.stats import binom, hypergeom
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data import PixelDataset, PixelStream
from ..files import write_json
from ..progress import hidden_progress
from .robust_start import IMAGES, MOVABLE, embedding_similarity, feature_displacement
from .streams import some_items


if TYPE_CHECKING:
    from .trainer import AutoLoraTrainer


logger = logging.getLogger(__name__)

# A healthy run is judged up to a few hundred times: false alarms stay below a few per cent of all runs.
CERTAIN = 1e-4
# Epochs that a state has to last, for what a single evaluation may show by the way.
SHORTEST = 3
ONE_CLASS_SHARE = 0.95

DISPLACEMENT = "feature_displacement"
# Mean cosine between the embeddings of different images, and what is left of its distance from 1 when they collapse.
# On tiny towers, where the adversarial distance fell to a fifth: 0.7 with FARE, 0.3 with Sim-CLIP, which ends at 0.04.
SIMILARITY = "image_similarity"
COLLAPSED = 0.4
# As many as are cheap without an attack.
_COMPARED = 256
# Logged last in every epoch.
_EPOCH_ENDS = "next_learning_rate"

MESSAGES = {
    "natural_backbone": (
        "This backbone does not look robustly pre-trained for the threat model: an attack moves its features "
        "{displacement:.2g} times as far as the features of two images are apart (robust backbones: below "
        f"{MOVABLE}). Robust fine-tuning then often stays at chance level. Start from a robustly pre-trained "
        "backbone, or let the attack's radius grow, if it does not yet: `eps_schedule='two-hinge'` (`--eps-schedule "
        "two-hinge`)."
    ),
    "robust_accuracy_at_chance": (
        "Robust validation accuracy has not been above guessing for {patience} epochs ({robust:.1%}), though the "
        "robust loss has most of the weight. Start from a robustly pre-trained backbone, or let the attack's radius "
        "grow, if it does not yet: `eps_schedule='two-hinge'`."
    ),
    "collapse": (
        "The embeddings of different images have become alike: their mean cosine is {similarity:.3f}, and was "
        "{start:.3f} before training. A small loss means nothing then. Use `objective='fare'`, which keeps the "
        "embeddings where they were, or a lower `learning_rate`."
    ),
    "one_class": (
        "The model gives {share:.1%} of the validation images the same class: it has collapsed. Try a lower "
        "`learning_rate`, and check the labels."
    ),
    "attack_helps": (
        "The model is right on more attacked images ({robust:.1%}) than on clean ones ({natural:.1%}). An attack that "
        "works cannot do that: gradients are masked, or the attack is broken. Do not trust this robust accuracy; "
        "measure with `evaluate_robustness(..., attack='autoattack')`."
    ),
    "catastrophic_overfitting": (
        "Robust validation accuracy has fallen to {robust:.1%} from {best:.1%}, while {train_robust:.1%} of the "
        "training images withstand the training attack: the model has learned to mislead that attack (catastrophic "
        "overfitting). Use more `attack_steps` or a smaller `attack_step_size`; the best weights are from before."
    ),
}


@dataclass(frozen=True)
class Epoch:
    """What was measured in one epoch; accuracies and shares in [0, 1].

    Args:
        epoch (`float`): Its number.
        natural (`float`), robust (`float`): Validation accuracies of the deployed route.
        largest_share (`float`): Of the clean validation images, those given the class that is given most often.
        only_robust (`float`): Share of validation images that are right under attack alone.
        train_robust (`float`, *optional*): Accuracy under the training attack, in the mean over the epoch.
        natural_weight (`float`): Weight of the natural loss term during the epoch, `lambda1`.
        radius (`float`): Share of its final radius that the training attack had when the epoch began.
    """

    epoch: float
    natural: float
    robust: float
    largest_share: float
    only_robust: float
    train_robust: float | None = None
    natural_weight: float = 0.0
    radius: float = 1.0


@dataclass(frozen=True)
class Validation:
    """The validation images: how many there are, and the accuracy of always saying the most frequent class."""

    images: int
    guess: float

    @classmethod
    def of(cls, labels: Iterable[int], classes: int) -> Validation:
        counts = Counter(int(label) for label in labels)
        total = sum(counts.values())
        return cls(total, max(1 / classes, max(counts.values()) / total))


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, from when on."""

    kind: str
    epoch: float
    message: str


# ---- judgements about one epoch and those before it ----


def at_chance(epochs: Sequence[Epoch], validation: Validation, patience: int) -> bool:
    """Robust accuracy has not been above guessing for `patience` epochs of mainly robust training.

    No margin for noise: collapsed models stand at or below guessing in every epoch, while one that is truly better
    falls below by chance in fewer than half of them, the same for every one of `patience` epochs. Epochs in which the
    natural loss still has most of the weight, or the attack not yet its radius, are no sign: robust accuracy can be
    zero then.
    """
    last = epochs[-patience:]
    trained = [epoch.natural_weight <= 0.5 and epoch.radius == 1 for epoch in last]
    stuck = [epoch.robust <= validation.guess and so for epoch, so in zip(last, trained, strict=True)]
    return len(last) == patience and all(stuck)


def one_class(epochs: Sequence[Epoch], validation: Validation) -> bool:
    """Nearly all validation images are given one class, in several epochs, where the labels do not explain it."""
    last = epochs[-SHORTEST:]

    def collapsed(epoch: Epoch) -> bool:
        count = round(epoch.largest_share * validation.images)
        # As often as the most frequent class there really is: what a good model does when that is very frequent.
        expected = binom.sf(count - 1, validation.images, validation.guess)
        return epoch.largest_share >= ONE_CLASS_SHARE and expected < CERTAIN

    return len(last) == SHORTEST and all(map(collapsed, last))


def attack_helps(epochs: Sequence[Epoch], validation: Validation) -> bool:
    """Significantly more images are right under attack alone than without it alone (exact McNemar test, since both
    accuracies are of the same images)."""
    now = epochs[-1]
    helped = round(now.only_robust * validation.images)
    harmed = helped - round((now.robust - now.natural) * validation.images)
    return bool(binom.sf(helped - 1, helped + harmed, 0.5) < CERTAIN) if helped else False


def catastrophically_overfitted(epochs: Sequence[Epoch], validation: Validation) -> bool:
    """Robust validation accuracy fell from its best to no more than guessing, while accuracy under the training attack
    did not fall (Wong et al., 2020; Andriushchenko & Flammarion, 2020).

    Fisher's exact test of both counts. It takes them for independent; they are of the same images, which only makes it
    more careful.
    """
    now, best = epochs[-1], max(epochs, key=lambda epoch: epoch.robust)
    if now.robust > validation.guess or now.train_robust is None or best.train_robust is None:
        return False
    if now.train_robust <= validation.guess or now.train_robust < max(0.9 * best.train_robust, 2 * now.robust):
        return False
    images = validation.images
    before, after = round(best.robust * images), round(now.robust * images)
    return bool(hypergeom.cdf(after, 2 * images, before + after, images) < CERTAIN)


# ---- from the log ----


def epochs_of(history: Sequence[dict[str, Any]]) -> list[Epoch]:
    """The epochs that a training log, `state.log_history`, tells of."""
    epochs: list[Epoch] = []
    seen: dict[str, Any] = {}
    weight, radius = 0.0, 0.0 if any("eps_share" in entry for entry in history) else 1.0
    for entry in history:
        seen.update(entry)
        if _EPOCH_ENDS in entry and "eval_largest_share" in seen:
            epochs.append(
                Epoch(
                    entry["epoch"],
                    natural=seen["eval_natural_accuracy"],
                    robust=seen["eval_robust_accuracy"],
                    largest_share=seen["eval_largest_share"],
                    only_robust=seen["eval_only_robust"],
                    train_robust=seen.get("train_robust_accuracy"),
                    natural_weight=weight,
                    radius=radius,
                )
            )
        # What is logged at the end of an epoch is in force in the next one.
        weight, radius = entry.get("lambda1", weight), entry.get("eps_share", radius)
    return epochs


def findings(
    history: Sequence[dict[str, Any]], validation: Validation, total_epochs: float, adversarial: bool = True
) -> list[Finding]:
    """Everything that a training log shows to be wrong, in order; a state that lasts is one finding.

    Args:
        history (`Sequence[dict]`): `state.log_history`.
        validation (`Validation`): Of the validation set.
        total_epochs (`float`): Length of the training.
        adversarial (`bool`): Whether the objective trains robustness; without it robust accuracy is not expected.
    """
    patience = max(SHORTEST, math.ceil(total_epochs / 6))
    found: list[Finding] = []
    displacement = next((entry[DISPLACEMENT] for entry in history if DISPLACEMENT in entry), None)
    if displacement is not None and displacement > MOVABLE:
        text = MESSAGES["natural_backbone"].format(displacement=displacement)
        found.append(Finding("natural_backbone", 0, text))
    found += _collapse(history)
    epochs = epochs_of(history)
    present: set[str] = set()
    for index, now in enumerate(epochs):
        past = epochs[: index + 1]
        states = {
            "one_class": one_class(past, validation),
            "attack_helps": attack_helps(past, validation),
            "robust_accuracy_at_chance": adversarial and at_chance(past, validation, patience),
            "catastrophic_overfitting": adversarial and catastrophically_overfitted(past, validation),
        }
        values = {
            "patience": patience,
            "robust": now.robust,
            "natural": now.natural,
            "share": now.largest_share,
            "train_robust": now.train_robust or 0.0,
            "best": max(epoch.robust for epoch in past),
        }
        current = {kind for kind, is_so in states.items() if is_so}
        new = [kind for kind in states if kind in current - present]
        found += [Finding(kind, now.epoch, MESSAGES[kind].format(**values)) for kind in new]
        present = current
    return found


def _collapse(history: Sequence[dict[str, Any]]) -> list[Finding]:
    """Of towers: the first epoch in which most of what tells images apart is gone, if there is one."""
    start = next((entry[SIMILARITY] for entry in history if SIMILARITY in entry), None)
    if start is None:
        return []
    for entry in history:
        now = entry.get(f"eval_{SIMILARITY}")
        if now is not None and 1 - now < COLLAPSED * (1 - start):
            return [Finding("collapse", entry["epoch"], MESSAGES["collapse"].format(similarity=now, start=start))]
    return []


def prediction_shares(clean: np.ndarray, natural_hits: np.ndarray, robust_hits: np.ndarray) -> dict[str, float]:
    """Metrics for the judgements: from logits of clean images, N x K, and what is right without and with attack."""
    given = np.bincount(clean.argmax(-1), minlength=1)
    return {"largest_share": given.max() / len(clean), "only_robust": (robust_hits & ~natural_hits).mean()}


class DiagnosisCallback(TrainerCallback):
    """Says what goes wrong, once, and keeps it under `"warnings"` in the training plan, which is saved with the model.

    Args:
        trainer (`AutoLoraTrainer`): Its log is judged, by [`after_epoch`].
        plan_file (`Path`): Where the plan is written.
    """

    def __init__(self, trainer: AutoLoraTrainer, plan_file: Path) -> None:
        self.trainer = trainer
        self.plan_file = plan_file
        self._validation: Validation
        self._said = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        self._validation = Validation.of(trainer.eval_dataset.labels, trainer.model.num_classes)
        if state.global_step == 0 and trainer.objective.needs_adversarial:
            with hidden_progress(bool(args.disable_tqdm)):
                self._measure_start()
        # What a run that goes on has said before is not said again.
        self._said = 0 if state.global_step == 0 else len(self._findings())
        self.after_epoch()

    def after_epoch(self) -> None:
        """Judges the log as it is now."""
        found, plan = self._findings(), self.trainer.plan
        warnings = [asdict(finding) for finding in found]
        # Also when nothing is new: the plan of a run that goes on has been written afresh.
        changed = warnings != plan.get("warnings", [])
        if changed:
            plan["warnings"] = warnings
        if self.trainer.args.should_save:
            for finding in found[self._said :]:
                logger.warning("Epoch %g: %s", finding.epoch, finding.message)
            if changed:
                write_json(plan, self.plan_file)
        self._said = len(found)

    def _findings(self) -> list[Finding]:
        trainer = self.trainer
        adversarial = trainer.objective.needs_adversarial
        return findings(trainer.state.log_history, self._validation, trainer.plan["epochs"], adversarial)

    def _measure_start(self) -> None:
        trainer = self.trainer
        try:
            if not trainer.objective.classifies:
                # A tower need not be robust before: that is what it is trained for.
                pixels = _some_images(trainer.eval_dataset, trainer.args.seed, _COMPARED)
                trainer.log({SIMILARITY: embedding_similarity(trainer.model, pixels.to(trainer.args.device))})
                return
            pixels = _some_images(trainer.train_dataset, trainer.args.seed).to(trainer.args.device)
            moved = feature_displacement(trainer.model, pixels, trainer.args.threat_model, trainer.args.seed)
        # Images that cannot be read and models that cannot be attacked so: training goes on without this measurement.
        except (OSError, ValueError, RuntimeError) as error:
            logger.info("The backbone could not be measured before training: %r.", error)
            return
        if not math.isnan(moved):
            trainer.log({DISPLACEMENT: moved})


def _some_images(data: PixelDataset | PixelStream, seed: int, count: int = IMAGES) -> torch.Tensor:
    """Unaugmented pixels of a few images, N x 3 x H x W, the same in every process."""
    return torch.stack([item["pixel_values"] for item in some_items(data, seed, count)])
