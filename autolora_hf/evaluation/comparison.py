"""Whether accuracies differ: a claimed one from a re-measured one, and one method of training from another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta, binomtest, hypergeom, t

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


@dataclass(frozen=True)
class Difference:
    """By how much one method is more accurate than another, and whether that may be chance.

    Args:
        value (`float`): Mean difference of the accuracies, in [-1, 1].
        low (`float`), high (`float`): Ends of its 95 % confidence interval.
        p_value (`float`): Two-sided, of both methods being equally accurate; in [0, 1].
    """

    value: float
    low: float
    high: float
    p_value: float


def crossed_difference(own: Sequence[Sequence[bool]], others: Sequence[Sequence[bool]]) -> Difference:
    """Compares two methods of training: several trainings of each, all measured on the same images.

    What is asked is whether one method is better on new images *and* when it is trained anew, so trainings and images
    are both samples. The verdicts of one training are not independent, and neither are those on one image: pooling
    them, as McNemar's test would, takes chance for a difference. Here the differences by training and image are a
    two-way layout with both factors at random (Dorfman, Berbaum & Metz, Investigative Radiology 27, 1992), with the
    degrees of freedom of Hillis (Statistics in Medicine 26, 2007). Where images differ little beside the trainings, it
    is the paired t-test of the trainings' accuracies. A few trainings may agree by chance, so that the layout sees no
    variation at all: the result is never surer than the paired t-test of the images, in which every image counts once.

    In simulations of equal methods 4 to 6 per cent of the p-values are below 0.05 where trainings vary by 10 points,
    1 to 5 where they vary by 3, and 1 to 2 where they do not (two, three and five trainings, 40 and 1,000 images).

    Args:
        own (`Sequence[Sequence[bool]]`): For each training of one method, whether each image is classified correctly.
        others (`Sequence[Sequence[bool]]`): The same of the other method. Trainings in the same place are paired, for
            instance by their seed; so are images.

    Raises:
        ValueError: If there are fewer than two trainings or images, or the two differ in their number.
    """
    first, second = (np.asarray(verdicts, dtype=float) for verdicts in (own, others))
    if first.shape != second.shape or first.ndim != 2 or min(first.shape) < 2:
        raise ValueError(
            "Both methods need the same trainings and images, two of each or more: got "
            f"{first.shape} and {second.shape} (trainings, images)."
        )
    table = first - second
    trainings, images = table.shape
    mean = float(table.mean())
    by_training, by_image = table.mean(1, keepdims=True), table.mean(0, keepdims=True)
    rest = table - by_training - by_image + mean
    of_training = images * float(by_training.var(ddof=1))
    of_image = trainings * float(by_image.var(ddof=1))
    of_rest = float((rest**2).sum()) / ((trainings - 1) * (images - 1))
    spread = of_training + max(of_image - of_rest, 0.0)
    # A few trainings may agree by chance, which is no certainty: what the images alone leave open is left open.
    alone = max(of_image, of_rest)
    if alone < 1e-12 > spread:
        # The same difference for every training and image.
        return Difference(mean, mean, mean, 1.0 if mean == 0 else 0.0)
    layouts = [(alone, images - 1.0)]
    if of_training > 0:
        layouts.append((spread, spread**2 / (of_training**2 / (trainings - 1))))
    margin = max(float(t.ppf(0.975, freedom)) * math.sqrt(found / table.size) for found, freedom in layouts)
    p_value = max(2 * float(t.sf(abs(mean) / math.sqrt(found / table.size), freedom)) for found, freedom in layouts)
    return Difference(mean, max(mean - margin, -1.0), min(mean + margin, 1.0), min(p_value, 1.0))


def sign_flip_p_value(own: Sequence[Sequence[bool]], others: Sequence[Sequence[bool]]) -> float:
    """Two-sided exact permutation test of *these* trained networks: would they differ on other images, too?

    Of each image the verdicts of all trainings are added up, so that an image counts once. If neither method is
    better, the difference of an image is as likely of the one sign as of the other (Fisher, The Design of Experiments,
    1935, section 21). With one training it is McNemar's exact test. Nothing is said about other trainings of the
    methods: see [`crossed_difference`].

    Args:
        own (`Sequence[Sequence[bool]]`), others (`Sequence[Sequence[bool]]`): As for [`crossed_difference`]; one
            training is enough.

    Returns:
        The probability, if no method is better, of a difference as large as this one; in (0, 1].
    """
    differences = np.asarray(own, dtype=int).sum(0) - np.asarray(others, dtype=int).sum(0)
    sizes = np.abs(differences[differences != 0])
    total = int(sizes.sum())
    # The exact distribution of the sum of all differences with random signs; position 0 is -total.
    chances = np.zeros(2 * total + 1)
    chances[total] = 1.0
    for size in sizes.tolist():
        chances = (np.roll(chances, size) + np.roll(chances, -size)) / 2
    distance = np.abs(np.arange(-total, total + 1))
    return min(1.0, float(chances[distance >= abs(int(differences.sum()))].sum()))
