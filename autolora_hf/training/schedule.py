"""Everything that is scheduled, as a learning-rate scheduler, so that `Trainer` saves and restores it with its
checkpoints."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..schedules import Curve, EpsilonSchedule, LossScalars, PlateauHalving, constant, loss_scalars


class AutoLoraScheduler(LRScheduler):
    """Holds the learning rate, the loss scalars, the radius of the training attack and whether the best weights are
    due to be loaded again.

    `Trainer` calls `step()` after every optimizer step, which moves along `curve`; all else is decided once an epoch,
    by [`end_epoch`].

    Args:
        optimizer (`Optimizer`): Its learning rates are set in place.
        halving (`PlateauHalving`, *optional*): AutoLoRa's rule. `None`: the learning rate follows `curve` alone.
        curve (`Curve`, *optional*): Factor of the learning rate by the progress of the run. `None`: 1.
        total_steps (`int`): Optimizer steps of the run.
        alpha (`float`), lambda2_max (`float`): Of the automatic loss scalars.
        fixed_scalars (`LossScalars`, *optional*): Instead of automatic ones.
        epsilon (`EpsilonSchedule`, *optional*): Of the training attack.
        min_learning_rate (`float`): Below this the rule ends the training.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        halving: PlateauHalving | None,
        curve: Curve | None = None,
        total_steps: int = 1,
        alpha: float = 1.0,
        lambda2_max: float = 6.0,
        fixed_scalars: LossScalars | None = None,
        epsilon: EpsilonSchedule | None = None,
        min_learning_rate: float = 1e-5,
    ) -> None:
        self.halving = halving
        self._curve = curve or constant()
        self._total_steps = total_steps
        self.alpha = alpha
        self.lambda2_max = lambda2_max
        self.fixed_scalars = fixed_scalars
        self.epsilon = epsilon or EpsilonSchedule(1)
        self.min_learning_rate = min_learning_rate
        self.factor = 1.0
        self.epochs = 0
        self.training_accuracy: float | None = None
        self.reload_due = False
        # Optimizer steps that `StepGuard` skipped, here because this state is saved with a checkpoint.
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        factor = self.factor * self._curve(min(1.0, self.last_epoch / self._total_steps))
        return [base * factor for base in self.base_lrs]

    @property
    def scalars(self) -> LossScalars:
        """Current loss scalars; before the first measurement those of accuracy 0, which is purely natural training."""
        if self.fixed_scalars is not None:
            return self.fixed_scalars
        return loss_scalars(self.training_accuracy or 0.0, self.alpha, self.lambda2_max)

    @property
    def finished(self) -> bool:
        return self.halving is not None and bool(self.base_lrs[0] * self.factor < self.min_learning_rate)

    def end_epoch(
        self, selection_metric: float, training_accuracy: float | None, natural_accuracy: float | None = None
    ) -> bool:
        """Takes what was measured after an epoch; returns whether the learning rate was halved.

        The weights are to be reloaded at the start of the next epoch, when the checkpoint of this one is complete:
        `reload_due` stays set until then, also across a resume.

        Args:
            selection_metric (`float`): More is better.
            training_accuracy (`float`, *optional*): Behind the loss scalars.
            natural_accuracy (`float`, *optional*): Of the deployed route on the validation set, for the radius.
        """
        self.training_accuracy = training_accuracy
        # While the radius rises, robust accuracy says nothing about a plateau.
        rising = self.epsilon.share(self.epochs) < 1
        self.epochs += 1
        if natural_accuracy is not None:
            self.epsilon.end_epoch(natural_accuracy)
        self.reload_due = self.halving is not None and self.halving.update(selection_metric, hold=rising) > 0
        if self.reload_due:
            self.factor /= 2
            for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
                group["lr"] = rate
            self._last_lr = self.get_lr()
        return self.reload_due

    def state_dict(self) -> dict[str, Any]:
        # Plain values only: `Trainer` reads the file back with `weights_only=True`.
        state = {key: value for key, value in super().state_dict().items() if key not in _FROM_ARGUMENTS}
        halving = None if self.halving is None else self.halving.state_dict()
        return {**state, "halving": halving, "epsilon": self.epsilon.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = dict(state_dict)
        halving = state.pop("halving")
        if halving is not None and self.halving is not None:
            self.halving.load_state_dict(halving)
        self.epsilon.load_state_dict(state.pop("epsilon", {}))
        super().load_state_dict({key: value for key, value in state.items() if key not in _FROM_ARGUMENTS})


# What the arguments of the run decide anew.
_FROM_ARGUMENTS = ("_curve", "_total_steps", "fixed_scalars")
