"""What a trainer does before training and between epochs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy


if TYPE_CHECKING:
    from .trainer import AutoLoraTrainer


class EpochCallback(TrainerCallback):
    """The first measurement of SA, and reloading the best weights."""

    def __init__(self, trainer: AutoLoraTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        scheduler = self.trainer.lr_scheduler
        if self.trainer.measures_scalars and scheduler.training_accuracy is None:
            scheduler.training_accuracy = self.trainer.natural_training_accuracy()
            accuracy = scheduler.training_accuracy
            self.trainer.log({"train_natural_route_accuracy": accuracy, **self.trainer.shown_scalars()})
        elif self.trainer.objective.uses_scalars and state.global_step == 0:
            self.trainer.log(self.trainer.shown_scalars())

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Only now is the checkpoint of the last epoch, which may be the best one, complete.
        scheduler = self.trainer.lr_scheduler
        if scheduler.reload_due and state.best_model_checkpoint is not None:
            self.trainer._load_best_model()
        scheduler.reload_due = False
        # Accelerate's data loaders do so too, but not where the batches are shared out or skipped.
        self.trainer.train_dataset.set_epoch(int(state.epoch + 1e-6))

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A checkpoint does not hold what has been summed up since the last log, so nothing is carried over.
        control.should_log |= args.logging_strategy != IntervalStrategy.NO
