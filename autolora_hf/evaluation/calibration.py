"""Calibration of a classifier's confidence (Guo et al., ICML 2017): does it say 80 % where it is right in 80 %?

Plain NumPy: scikit-learn's `calibration_curve` gives no counts and drops empty bins, and torchmetrics, with which the
tests compare, would be a dependency for a dozen lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class CalibrationBin:
    """The images whose confidence lies in (`low`, `high`]; a confidence of 0 belongs to the first bin.

    Attributes:
        low (`float`): Lower edge.
        high (`float`): Upper edge.
        count (`int`): Number of images.
        confidence (`float`, *optional*): Their mean confidence; `None` of an empty bin.
        accuracy (`float`, *optional*): The share of them that is right; `None` of an empty bin.
    """

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Calibration:
    """How well confidences fit the facts. `dataclasses.asdict` gives JSON types.

    Attributes:
        ece (`float`): Expected calibration error: the mean over images of |accuracy - confidence| of their bin, in
            [0, 1], 0 is best. It depends on the bins, and of few images it is above 0 by chance even if the model is
            perfectly calibrated: compare it between models on the same images alone.
        confidence (`float`): Mean confidence, in [0, 1].
        accuracy (`float`): Share of right predictions, in [0, 1].
        overconfidence (`float`): `confidence` - `accuracy`, in [-1, 1]; below 0 the model is underconfident. Its
            absolute value never exceeds `ece`.
        brier (`float`): Brier score (Monthly Weather Review 78, 1950) of the confidence as a forecast of being right:
            the mean of (confidence - right)^2, in [0, 1], 0 is best. A proper score, without bins. It is not the
            multi-class score, which needs the probabilities of all classes, as the log-likelihood needs that of the
            true one.
        bins (`list[CalibrationBin]`): Of equal width, from 0 to 1, for a reliability diagram.
    """

    ece: float
    confidence: float
    accuracy: float
    overconfidence: float
    brier: float
    bins: list[CalibrationBin]


def calibration(confidences: Sequence[float], correct: Sequence[bool], bins: int = 15) -> Calibration:
    """Expected calibration error with bins of equal width, and what a reliability diagram shows.

    Args:
        confidences (`Sequence[float]`): Probability of the predicted class, one an image, N, in [0, 1].
        correct (`Sequence[bool]`): Whether that prediction is right, N.
        bins (`int`): Number of bins. 15 are usual.

    Raises:
        ValueError: If there are no images, the lengths differ, a confidence is not in [0, 1], `correct` has other
            values than booleans, or `bins` is not a positive integer.
    """
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise ValueError(f"`bins` must be a positive integer, got {bins!r}.")
    values, right = np.asarray(confidences, dtype=np.float64), np.asarray(correct)
    if values.size == 0:
        raise ValueError("`confidences` is empty.")
    if values.ndim != 1 or right.shape != values.shape:
        raise ValueError(
            f"`confidences` and `correct` must have one value an image, got shapes {values.shape} and {right.shape}."
        )
    if right.dtype != np.bool_:
        raise ValueError(f"`correct` must be booleans, got {right.dtype}.")
    outside = values[~((values >= 0) & (values <= 1))]
    if len(outside):
        raise ValueError(
            f"`confidences` must be probabilities in [0, 1], got {outside[0]:g}"
            f"{f' and {len(outside) - 1} more outside' if len(outside) > 1 else ''}."
        )
    # `linspace` rounds twice: ten bins would have an edge at 0.30000000000000004.
    edges = np.arange(bins + 1) / bins
    places = np.searchsorted(edges[1:-1], values, side="left")
    counts = np.bincount(places, minlength=bins)
    said = np.bincount(places, weights=values, minlength=bins)
    hits = np.bincount(places, weights=right, minlength=bins)
    confidence, accuracy = float(values.mean()), float(right.mean())
    return Calibration(
        ece=float(np.abs(hits - said).sum() / len(values)),
        confidence=confidence,
        accuracy=accuracy,
        overconfidence=confidence - accuracy,
        brier=float(((values - right) ** 2).mean()),
        bins=[
            CalibrationBin(
                low=float(edges[index]),
                high=float(edges[index + 1]),
                count=int(count),
                confidence=float(said[index] / count) if count else None,
                accuracy=float(hits[index] / count) if count else None,
            )
            for index, count in enumerate(counts)
        ],
    )
