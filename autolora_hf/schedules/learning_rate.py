"""Automatic learning rate of AutoLoRa (Xu et al., ICLR 2024): APGD's step-size rule applied to epochs.

At a checkpoint the learning rate is halved, and the best weights so far are loaded again, when robust validation
accuracy has stopped rising. Everything here is pure bookkeeping; the trainer acts on the decisions.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


HalvingRule = Literal["paper", "released"]

# The paper's setting for its main tables.
PAPER_EPOCHS, PAPER_INTERVAL = 60, 4
# Optimiser steps an epoch of the smallest training set in the paper has (DTD: 1,880 images in batches of 128).
PAPER_MIN_STEPS = 15


def default_epochs(steps_per_epoch: int, most_steps: int | None = None) -> int:
    """Number of epochs when none is given.

    The paper trains 60 epochs on sets of 15 steps an epoch and more. The schedule counts in epochs, so on a shorter
    set an epoch would be too little training to judge: the number of epochs then grows until the total number of
    optimiser steps is that of the paper's smallest set, up to four times as many.

    Args:
        steps_per_epoch (`int`): Optimiser steps.
        most_steps (`int`, *optional*): Where that would take more steps than these, the whole epochs that hold them.
    """
    epochs = round(PAPER_EPOCHS * min(4.0, max(1.0, PAPER_MIN_STEPS / max(1, steps_per_epoch))))
    return epochs if most_steps is None else min(epochs, math.ceil(most_steps / max(1, steps_per_epoch)))


def default_checkpoints(epochs: int, interval: int | None = None) -> list[int]:
    """Epochs at which the learning rate may be halved: every 4 of the paper's 60, in proportion for other lengths.

    Args:
        epochs (`int`): Length of the training.
        interval (`int`, *optional*): Epochs between checkpoints. `None`: `epochs / 15`, at least 2, since a window of
            a single epoch cannot tell noise from a plateau.
    """
    interval = interval or max(2, round(epochs * PAPER_INTERVAL / PAPER_EPOCHS))
    return list(range(0, epochs, interval))


@dataclass
class PlateauHalving:
    """Decides after every epoch whether to halve the learning rate and load the best weights again.

    With `RA(e)` the robust validation accuracy after epoch e, at checkpoint `w_j` the learning rate is halved if

    1. the number of epochs in the window since `w_(j-1)` with `RA(i+1) > RA(i)` is below `rho * (w_j - w_(j-1))`, or
    2. it was not halved at `w_(j-1)` and the best RA has not changed since then.

    While RA has never been above `chance`, nothing is halved and nothing reloaded: early in the natural-to-robust
    curriculum RA can stay at zero, which says nothing about a plateau, and "the best weights" would be the first ones.

    A checkpoint `w_j` is tested after epoch `w_j + 1`, so that the first window has a measured start (as in the
    released code).

    Args:
        checkpoints (`list[int]`): `[w_0 = 0, w_1, ...]`, in epochs.
        rho (`float`): Share of improving epochs below which the window counts as a plateau.
        rule (`str`): `"paper"` as above. `"released"`: condition 2 without its first half, which the released code
            never lets be false after the first checkpoint.
        chance (`float`): Robust accuracy of guessing, `1 / K`; 0 compares as the released code does.
    """

    checkpoints: list[int]
    rho: float = 0.75
    rule: HalvingRule = "paper"
    chance: float = 0.0
    history: list[float] = field(default_factory=list)
    best_at_checkpoint: float | None = None
    halved_at_checkpoint: bool = False

    def __post_init__(self) -> None:
        if self.rule not in ("paper", "released"):
            raise ValueError(f"`rule` must be 'paper' or 'released', got {self.rule!r}.")
        if not self.checkpoints or self.checkpoints[0] != 0 or sorted(set(self.checkpoints)) != self.checkpoints:
            raise ValueError(f"`checkpoints` must rise from 0, got {self.checkpoints}.")

    def update(self, robust_accuracy: float, hold: bool = False) -> int:
        """Takes RA of the epoch just finished; returns the condition (1 or 2) to halve by, or 0 to go on.

        Args:
            robust_accuracy (`float`): Robust accuracy on the validation set. NaN counts as no improvement.
            hold (`bool`): Only remember it, as if this epoch were no checkpoint.
        """
        self.history.append(-math.inf if math.isnan(robust_accuracy) else robust_accuracy)
        epoch = len(self.history) - 1
        if epoch not in self.checkpoints:
            return 0
        best, condition = max(self.history), 0
        if epoch > 0 and not hold and best > self.chance:
            start = self.checkpoints[self.checkpoints.index(epoch) - 1]
            pairs = zip(self.history[start:epoch], self.history[start + 1 : epoch + 1], strict=True)
            improved = sum(later > earlier for earlier, later in pairs)
            may_repeat = self.rule == "released" or not self.halved_at_checkpoint
            if improved < self.rho * (epoch - start):
                condition = 1
            elif may_repeat and best == self.best_at_checkpoint:
                condition = 2
        self.best_at_checkpoint, self.halved_at_checkpoint = best, condition > 0
        return condition

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
