"""How far an evaluation is, and how long it still takes."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..attacks import PGD
from ..progress import progress_bar, redraw_seconds
from .autoattack import AutoAttackComponent


class StageBar:
    """The progress bar of one stage.

    One batch of AutoAttack takes thousands of passes, so the bar moves within batches too.

    Args:
        name (`str`): What is running.
        sizes (`list[int]`): Images of each batch.
        passes (`int`, *optional*): Forward passes that a batch takes at most. `None`: not known.
        correct (`Tensor`, *optional*): Which images are still classified correctly, N; read whenever the bar is drawn.
        is_shown (`bool`): Draw it.
        leave (`bool`): Leave it there when the stage is over.
    """

    def __init__(
        self, name: str, sizes: list[int], passes: int | None, correct: Tensor | None, is_shown: bool, leave: bool
    ) -> None:
        self.sizes, self.passes, self.correct = sizes, passes, correct
        self._finished: set[Any] = set()
        self._passes, self._shown = 0, time.monotonic()
        form = "{l_bar}{bar}| {n:.0f}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        self._bar = progress_bar(
            total=sum(sizes), title=name, unit="image", is_shown=is_shown, delay=0, bar_format=form, leave=leave
        )

    def __enter__(self) -> StageBar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def finish(self, batches: Iterable[int]) -> None:
        """Some batches are done."""
        self._finished.update(batches)
        self._passes = 0
        self._move(0.0)

    def on_pass(self) -> None:
        """The model was run on a batch that is under way."""
        self._passes += 1
        if time.monotonic() - self._shown > max(1.0, redraw_seconds()):
            if self.correct is not None:
                self._bar.set_postfix_str(f"robust {self.correct.double().mean():.1%}", refresh=False)
            self._move(0.0 if self.passes is None else min(1.0, self._passes / self.passes))

    def _move(self, share: float) -> None:
        left = next((size for index, size in enumerate(self.sizes) if index not in self._finished), 0)
        self._bar.n = sum(self.sizes[index] for index in self._finished) + share * left
        # Where states of the bar stay, few of them are enough; the last one is drawn when it is closed.
        if time.monotonic() - self._shown > redraw_seconds():
            self._shown = time.monotonic()
            self._bar.refresh()


def passes_of(attack: Any) -> int | None:
    """Forward passes that one batch takes at most, or `None` of an attack that is not known."""
    if isinstance(attack, PGD):
        return attack.restarts * (attack.steps + 1)
    return attack.passes if isinstance(attack, AutoAttackComponent) else None
