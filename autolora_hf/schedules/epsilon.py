"""Schedules of the training attack's radius (Ngnawé et al., ICLR 2026, arXiv 2509.23325).

A backbone that was never robustly pre-trained often stays at chance when it is attacked at the full radius from the
first step on. These start without an attack and raise the radius linearly.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal


# The paper's two hinges: epochs 12 and 37 of 50.
FIRST_HINGE, SECOND_HINGE = 12 / 50, 37 / 50
# The paper's test of convergence: 5 of 50 epochs within 2 points.
PATIENCE, TOLERANCE = 5 / 50, 0.02
# The automatic schedule rises from here on at the latest: without it a run that never converges would never be robust.
LATEST = 1 / 2

EpsilonKind = Literal["constant", "two-hinge", "auto"]


@dataclass
class EpsilonSchedule:
    """Which share of the threat model's radius the training attack has.

    Args:
        epochs (`float`): Length of the run.
        kind (`str`): `"constant"`: all of it, always. `"two-hinge"`: none until `first`, linearly to all of it at
            `second`. `"auto"`: none until natural validation accuracy has converged (no more than 2 points better in
            a tenth of the run), then linearly to all of it at the end of the run.
        first (`float`), second (`float`): The hinges, as shares of the run.
    """

    epochs: float
    kind: EpsilonKind = "constant"
    first: float = FIRST_HINGE
    second: float = SECOND_HINGE
    history: list[float] = field(default_factory=list)
    started: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "two-hinge", "auto"):
            raise ValueError(f"`eps_schedule` must be 'constant', 'two-hinge' or 'auto', got {self.kind!r}.")
        if not 0 <= self.first < self.second <= 1:
            raise ValueError(f"`eps_hinges` must be two rising shares of the run, got {self.first} and {self.second}.")

    def share(self, epoch: float) -> float:
        """Share of the radius, in [0, 1], at a time in epochs (3.5: in the middle of the fourth)."""
        progress = epoch / self.epochs
        if self.kind == "constant":
            return 1.0
        if self.kind == "two-hinge":
            first, second = self.first, self.second
        elif self.started is None:
            first, second = LATEST, 1.0
        else:
            first, second = min(self.started / self.epochs, LATEST), 1.0
        return min(1.0, max(0.0, (progress - first) / (second - first)))

    def end_epoch(self, natural_accuracy: float) -> None:
        """Takes the natural validation accuracy after an epoch, in [0, 1]; only `"auto"` looks at it."""
        self.history.append(natural_accuracy)
        patience = max(1, round(PATIENCE * self.epochs))
        if self.kind == "auto" and self.started is None and len(self.history) > patience:
            if max(self.history[-patience:]) <= max(self.history[:-patience]) + TOLERANCE:
                self.started = float(len(self.history))

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key in ("history", "started")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
