"""Whether a re-measured accuracy is lower than a claimed one: exact tests, and what drop they could have noticed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.stats import beta, binomtest, hypergeom

from .accuracy import Accuracy


# Probability of failing an honest claim, and of noticing the drop that is called detectable.
LEVEL, POWER = 0.05, 0.8


def paired_p_value(lost: int, gained: int) -> float:
    """One-sided exact McNemar test (a sign test) of the same images, measured twice.

    McNemar, Psychometrika 12 (1947). Images on which both agree carry no information. If the claim is honest, an
    image on which they differ, for instance because an attack started elsewhere, is as likely lost as gained.

    Args:
        lost (`int`): Images claimed correct and found wrong.
        gained (`int`): Images claimed wrong and found correct.

    Returns:
        The probability, if the claim is honest, that as many of the differing images are lost; in (0, 1].
    """
    return 1.0 if lost + gained == 0 else float(binomtest(lost, lost + gained, 0.5, alternative="greater").pvalue)


def unpaired_p_value(claimed: Accuracy, measured: Accuracy) -> float:
    """One-sided exact test of Fisher that two independent samples of images have the same accuracy.

    Fisher, Statistical Methods for Research Workers, 5th ed. (1934), section 21.02.

    Returns:
        The probability, if both are equal, that `claimed` has so large a share of all correct images; in (0, 1].
    """
    total, correct = claimed.total + measured.total, claimed.correct + measured.correct
    return min(1.0, float(hypergeom.sf(claimed.correct - 1, total, correct, claimed.total)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment (Scandinavian Journal of Statistics 6, 1979), in the order of the input.

    Comparing the adjusted values with a level rejects any true hypothesis with at most that probability, however the
    tests depend on each other.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def paired_detectable_drop(claimed: Accuracy, level: float = LEVEL) -> float | None:
    """The smallest drop of accuracy that the paired test notices with probability `POWER`.

    For images that are lost by the drop while nothing else differs.

    Args:
        claimed (`Accuracy`): What is claimed of the images that are measured again.
        level (`float`): Largest p-value that fails the claim.

    Returns:
        A share in (0, 1], or `None` if even the loss of every image would be put down to chance.
    """
    fewest = math.ceil(-math.log2(level))
    if claimed.correct < fewest:
        return None
    drop = float(beta.ppf(POWER, fewest, claimed.total - fewest + 1))
    return min(drop, claimed.value)


def unpaired_detectable_drop(claimed: Accuracy, total: int, level: float = LEVEL) -> float | None:
    """The smallest drop from the claimed accuracy that Fisher's test notices with probability `POWER`.

    Args:
        claimed (`Accuracy`): The claim.
        total (`int`): Number of other images that are measured.
        level (`float`): Largest p-value that fails the claim.

    Returns:
        A share in (0, 1], or `None` if even an accuracy of zero would be put down to chance.
    """

    def fails(correct: int) -> bool:
        return unpaired_p_value(claimed, Accuracy(correct, total, 0, 1)) <= level

    if not fails(0):
        return None
    low, high = 0, total  # fails(low), not fails(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fails(middle) else (low, middle)
    # The largest accuracy under which so few correct images have probability `POWER`.
    return max(claimed.value - float(beta.ppf(1 - POWER, low + 1, total - low)), 0.0)
