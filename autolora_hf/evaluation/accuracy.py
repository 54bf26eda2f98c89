"""A share of correctly classified images, and how sure it is."""

from __future__ import annotations

from dataclasses import dataclass

from scipy.stats import binomtest


@dataclass(frozen=True)
class Accuracy:
    """A share of correctly classified images and its exact 95 % confidence interval (Clopper-Pearson).

    Args:
        correct (`int`): Correctly classified images.
        total (`int`): All images.
        low (`float`): Lower end of the interval, in [0, 1].
        high (`float`): Upper end of the interval, in [0, 1].
    """

    correct: int
    total: int
    low: float
    high: float

    @classmethod
    def from_counts(cls, correct: int, total: int) -> Accuracy:
        """Computes the interval. Raises `ValueError` unless `0 <= correct <= total` and `total >= 1`."""
        if total < 1 or not 0 <= correct <= total:
            raise ValueError(f"An accuracy needs 0 <= correct <= total and total >= 1, got {correct} of {total}.")
        interval = binomtest(correct, total).proportion_ci(0.95, method="exact")
        return cls(correct, total, float(interval.low), float(interval.high))

    @property
    def value(self) -> float:
        """The share itself, in [0, 1]."""
        return self.correct / self.total

    def __str__(self) -> str:
        return f"{self.value:.2%} [{self.low:.2%}, {self.high:.2%}]"
