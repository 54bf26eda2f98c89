"""What a training logs: the name of every quantity, and what it means.

The names are an interface: trackers, training plans and figures go by them. A name that is here stays.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


ATTACK_START, ATTACK_END = "attack_loss_start", "attack_loss_end"
EPS = "eps"
IMAGES_PER_SECOND = "images_per_second"
SKIPPED_STEPS = "skipped_steps"

# When a quantity is logged.
START, STEPS, EPOCH, END = "once, before training", "every log", "every epoch", "once, after training"


@dataclass(frozen=True)
class LoggedQuantity:
    """A quantity in the log of a training.

    Args:
        name (`str`): Its key in `trainer.state.log_history`.
        when (`str`): How often it is logged; "every log" is once an epoch unless `logging_strategy` says otherwise.
        meaning (`str`): What it is, in a sentence.
    """

    name: str
    when: str
    meaning: str

    @property
    def shown_as(self) -> str:
        """Its name in TensorBoard, Trackio and the other trackers of transformers."""
        prefix, _, rest = self.name.partition("_")
        return f"eval/{rest}" if prefix == "eval" else f"train/{self.name}"


LOGGED = (
    LoggedQuantity("eval_robust_accuracy", EPOCH, "Accuracy of the deployed route on validation images under PGD."),
    LoggedQuantity("eval_robust_accuracy_low", EPOCH, "Lower end of its 95 % interval."),
    LoggedQuantity("eval_robust_accuracy_high", EPOCH, "Upper end of its 95 % interval."),
    LoggedQuantity("eval_natural_accuracy", EPOCH, "Accuracy of the deployed route on the clean validation images."),
    LoggedQuantity(
        "eval_natural_route_accuracy", EPOCH, "Accuracy of the natural route on the same images, if there is one."
    ),
    LoggedQuantity("eval_loss", EPOCH, "Loss of the deployed route on the validation images under attack."),
    LoggedQuantity("eval_largest_share", EPOCH, "Share of the clean validation images that get the commonest answer."),
    LoggedQuantity("eval_only_robust", EPOCH, "Share of the validation images that are right under attack alone."),
    LoggedQuantity("loss", STEPS, "The training loss, all terms together, as a mean since the last log."),
    LoggedQuantity(
        "natural_loss", STEPS, "Its term of clean images: cross-entropy, for AutoLoRa of the natural route."
    ),
    LoggedQuantity(
        "robust_loss", STEPS, "Its term of adversarial images, after the attack: cross-entropy, or what MART has."
    ),
    LoggedQuantity("kl", STEPS, "Its divergence between the answers to clean and to adversarial images, unweighted."),
    LoggedQuantity(
        ATTACK_START, STEPS, "What the training attack maximises, at its random start; of the network in eval mode."
    ),
    LoggedQuantity(
        ATTACK_END, STEPS, "The same at the last gradient of the attack, one step before the adversarial images."
    ),
    LoggedQuantity(EPS, STEPS, "Radius of the training attack, in [0, 1] pixels."),
    LoggedQuantity("train_natural_accuracy", STEPS, "Accuracy on the clean images of the training batches."),
    LoggedQuantity("train_robust_accuracy", STEPS, "Accuracy on their adversarial versions."),
    LoggedQuantity("feature_distance", STEPS, "AR-AT: distance between the features of clean and adversarial images."),
    LoggedQuantity("frozen_loss", STEPS, "TWINS: loss of the half of the batch with frozen statistics."),
    LoggedQuantity("adaptive_loss", STEPS, "TWINS: loss of the half of the batch with statistics of its own."),
    LoggedQuantity(
        "embedding_distance", STEPS, "FARE, Sim-CLIP: distance of the embeddings from those they are drawn to."
    ),
    LoggedQuantity("learning_rate", STEPS, "Learning rate of the last step."),
    LoggedQuantity("grad_norm", STEPS, "Length of the gradient of the last step."),
    LoggedQuantity(
        IMAGES_PER_SECOND,
        STEPS,
        "Training images a second, of all processes, since the last log; validation and saving do not count.",
    ),
    LoggedQuantity(SKIPPED_STEPS, STEPS, "Steps that were undone because something in them was not finite, so far."),
    LoggedQuantity(
        "train_natural_route_accuracy",
        EPOCH,
        "Accuracy of the natural route on clean training images, which the loss scalars go by; before training too.",
    ),
    LoggedQuantity("lambda1", EPOCH, "Weight of the natural loss in the epoch that follows; before training too."),
    LoggedQuantity("lambda2", EPOCH, "Weight of the divergence in the epoch that follows; before training too."),
    LoggedQuantity("next_learning_rate", EPOCH, "Learning rate that the next epoch starts with."),
    LoggedQuantity(
        "reload", EPOCH, "1 if the learning rate was halved, so that the next epoch goes on from the best weights."
    ),
    LoggedQuantity(
        "eps_share", EPOCH, "Share of the radius that the next epoch starts with, where `eps_schedule` moves it."
    ),
    LoggedQuantity(
        "gradient_cosine",
        EPOCH,
        "Cosine between natural and adversarial gradient without the branch, with `gradient_similarity`.",
    ),
    LoggedQuantity("gradient_cosine_branch", EPOCH, "The same with the branch."),
    LoggedQuantity("eval_clean_loss", EPOCH, "Image towers: the validation loss without attack."),
    LoggedQuantity(
        "eval_image_similarity", EPOCH, "Image towers: mean cosine between the embeddings of different images."
    ),
    LoggedQuantity("image_similarity", START, "Image towers: the same before training."),
    LoggedQuantity(
        "feature_displacement",
        START,
        "How far a short attack moves the features of the backbone; below 0.5 if it is robust.",
    ),
    LoggedQuantity("epoch", STEPS, "Epochs so far; in every entry."),
    LoggedQuantity("eval_runtime", EPOCH, "Seconds that validation took."),
    LoggedQuantity("eval_samples_per_second", EPOCH, "Validation images a second, attack included."),
    LoggedQuantity("eval_steps_per_second", EPOCH, "Validation batches a second."),
    LoggedQuantity("train_runtime", END, "Seconds that the training took, validation included."),
    LoggedQuantity("train_samples_per_second", END, "Training images a second of that time."),
    LoggedQuantity("train_steps_per_second", END, "Steps a second of that time."),
    LoggedQuantity("train_loss", END, "Mean training loss of the whole run."),
    LoggedQuantity("total_flos", END, "What `Trainer` counts as operations; 0 for models of images."),
)


def logged_table(quantities: Iterable[LoggedQuantity] = LOGGED) -> str:
    """The quantities as a table in Markdown, for `docs/guides/tracking.md`."""
    rows = [f"| `{entry.name}` | `{entry.shown_as}` | {entry.when} | {entry.meaning} |" for entry in quantities]
    return "\n".join(["| name | in trackers | when | what it is |", "|---|---|---|---|", *rows])


@contextlib.contextmanager
def missing_trackers_named() -> Iterator[None]:
    """What transformers raises for a tracker of `report_to` that is not installed, as the error of a missing package.

    It is a `RuntimeError` of most trackers, which the command line takes for a defect and shows with a traceback.
    """
    try:
        yield
    except (RuntimeError, ImportError) as error:
        if "to be installed" not in str(error):
            raise
        raise ModuleNotFoundError(f"`report_to` (`--report-to`) names a tracker that is not there. {error}") from error
