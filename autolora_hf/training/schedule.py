"""AutoLoRa's controller as a learning-rate scheduler, so that `Trainer` saves and restores it with its checkpoints."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..schedules import LossScalars, PlateauHalving, loss_scalars


class AutoLoraScheduler(LRScheduler):
    """Holds the learning rate, the loss scalars and whether the best weights are due to be loaded again.

    `step()`, which `Trainer` calls after every optimizer step, changes nothing: decisions are made once an epoch, by
    [`end_epoch`].

    Args:
        optimizer (`Optimizer`): Its learning rates are halved in place.
        halving (`PlateauHalving`): The rule.
        alpha (`float`), lambda2_max (`float`): Of the loss scalars.
        min_learning_rate (`float`): Below this, training is over.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        halving: PlateauHalving,
        alpha: float = 1.0,
        lambda2_max: float = 6.0,
        min_learning_rate: float = 1e-5,
    ) -> None:
        self.halving = halving
        self.alpha = alpha
        self.lambda2_max = lambda2_max
        self.min_learning_rate = min_learning_rate
        self.factor = 1.0
        self.training_accuracy: float | None = None
        self.reload_due = False
        # Optimizer steps that `StepGuard` skipped, here because this state is saved with a checkpoint.
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return [base * self.factor for base in self.base_lrs]

    @property
    def scalars(self) -> LossScalars:
        """Current loss scalars; before the first measurement those of accuracy 0, which is purely natural training."""
        return loss_scalars(self.training_accuracy or 0.0, self.alpha, self.lambda2_max)

    @property
    def finished(self) -> bool:
        return self.base_lrs[0] * self.factor < self.min_learning_rate

    def end_epoch(self, selection_metric: float, training_accuracy: float | None) -> bool:
        """Takes what was measured after an epoch; returns whether the learning rate was halved.

        The weights are to be reloaded at the start of the next epoch, when the checkpoint of this one is complete:
        `reload_due` stays set until then, also across a resume.
        """
        self.training_accuracy = training_accuracy
        self.reload_due = self.halving.update(selection_metric) > 0
        if self.reload_due:
            self.factor /= 2
            for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
                group["lr"] = rate
            self._last_lr = self.get_lr()
        return self.reload_due

    def state_dict(self) -> dict[str, Any]:
        # Plain values only: `Trainer` reads the file back with `weights_only=True`.
        return {**super().state_dict(), "halving": self.halving.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = dict(state_dict)
        self.halving.load_state_dict(state.pop("halving"))
        super().load_state_dict(state)
