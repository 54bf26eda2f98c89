"""Labels: checks before training, and class-wise proportional splits and subsets."""

from __future__ import annotations

import numbers
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np


def check_labels(labels: Sequence[int], num_classes: int, name: str = "dataset") -> None:
    """Raises unless `labels` are class indices in 0 .. `num_classes` - 1 of at least two classes.

    Args:
        labels (`Sequence[int]`): One class index a sample.
        num_classes (`int`): Number of outputs of the model.
        name (`str`): What to call the data in the message.

    Raises:
        ValueError: With the counts of what is wrong and what to do about it.
    """
    if len(labels) == 0:
        raise ValueError(f"{name} has no samples.")
    wrong_type = [label for label in labels if not is_integer(label)]
    if wrong_type:
        raise ValueError(
            f"{len(wrong_type)} of {len(labels)} labels of {name} are not integers, for instance {wrong_type[0]!r}. "
            "Labels must be class indices; for names, `dataset.class_encode_column(...)` of the datasets library "
            "makes them."
        )
    counts = Counter(int(label) for label in labels)
    outside = {label: count for label, count in sorted(counts.items()) if not 0 <= label < num_classes}
    if outside:
        hints = []
        if min(outside) < 0:
            hints.append("Negative labels usually mark samples whose label is hidden: leave them out.")
        if max(outside) >= num_classes:
            hints.append(f"Create the model with `num_classes={max(outside) + 1}`, or renumber the labels from 0.")
        raise ValueError(
            f"{sum(outside.values())} of {len(labels)} labels of {name} are outside 0 .. {num_classes - 1}, the "
            f"classes of the model: {_listing(outside)}. {' '.join(hints)}"
        )
    if len(counts) == 1:
        (label,) = counts
        raise ValueError(
            f"All {len(labels)} samples of {name} have label {label}: there is nothing to tell apart. "
            "Check the label column, or that the data is not sorted by class and cut off."
        )


def check_class_names(expected: Sequence[str] | None, found: Sequence[str] | None, name: str = "dataset") -> None:
    """Raises `ValueError` if two data sets name their classes differently, so that equal labels mean other things.

    Folders of images are the usual case: a missing class shifts the indices of all that follow it.
    """
    if expected and found and list(expected) != list(found):
        first = next((i for i, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]), None)
        at = len(min(expected, found, key=len)) if first is None else first
        mine, other = (str(names[at]) if at < len(names) else "nothing" for names in (expected, found))
        raise ValueError(
            f"{name} has other classes than the model was trained on ({len(found)} against {len(expected)}): label "
            f"{at} is {other!r} there and {mine!r} here. Both need the same classes in the same order."
        )


def stratified_split(labels: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Splits sample indices into those to keep and those to hold out, proportionally in every class.

    Shares are rounded by largest remainder, ties fall to chance, and no class loses its last kept sample.

    Args:
        labels (`Sequence[int]`): One class index a sample.
        fraction (`float`): Share to hold out, in (0, 1).
        seed (`int`): Equal seeds give equal splits.

    Returns:
        `tuple[list[int], list[int]]`: Kept and held-out indices, each sorted, disjoint and together complete.

    Raises:
        ValueError: If `fraction` is outside (0, 1), or no class has a sample to spare.
    """
    if isinstance(fraction, bool) or not isinstance(fraction, numbers.Real) or not 0 < fraction < 1:
        raise ValueError(f"`fraction` must be between 0 and 1, both excluded, got {fraction!r}.")
    classes, counts = np.unique(np.asarray(labels), return_counts=True)
    room = counts - 1
    if room.sum() == 0:
        raise ValueError(
            f"Cannot hold out samples: {len(labels)} samples of {len(classes)} classes leave no class one to spare. "
            "Give a validation set of its own."
        )
    generator = np.random.default_rng(seed)
    total = min(max(1, round(len(labels) * fraction)), int(room.sum()))
    held_out = _draw(labels, classes, _apportion(counts, room, total, generator), generator)
    kept = np.setdiff1d(np.arange(len(labels)), held_out)
    return kept.tolist(), held_out.tolist()


def stratified_subset(labels: Sequence[int], size: int, seed: int) -> list[int]:
    """Sorted indices of `size` samples with the class proportions of the whole; all of them if there are no more.

    Args:
        labels (`Sequence[int]`): One class index a sample.
        size (`int`): Number of samples, at least 1.
        seed (`int`): Equal seeds give equal subsets.

    Raises:
        ValueError: If `size` is not a positive integer.
    """
    if not is_integer(size) or size < 1:
        raise ValueError(f"`size` must be a positive integer, got {size!r}.")
    if size >= len(labels):
        return list(range(len(labels)))
    classes, counts = np.unique(np.asarray(labels), return_counts=True)
    generator = np.random.default_rng(seed)
    return _draw(labels, classes, _apportion(counts, counts, int(size), generator), generator).tolist()


def is_integer(value: Any) -> bool:
    """Whether `value` is an integer of Python or NumPy; booleans are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _apportion(counts: np.ndarray, room: np.ndarray, total: int, generator: np.random.Generator) -> np.ndarray:
    """Seats of each class in proportion to `counts`, by largest remainder, at most `room` each, `total` together."""
    quotas = counts * (total / counts.sum())
    # The small addend undoes rounding errors such as 2.9999999999999996.
    seats = np.minimum(np.floor(quotas + 1e-9).astype(np.int64), room)
    while (missing := total - int(seats.sum())) > 0:
        open_classes = generator.permutation(np.flatnonzero(seats < room))
        remainders = quotas[open_classes] - seats[open_classes]
        first = np.argsort(-remainders.round(9), kind="stable")[:missing]
        seats[open_classes[first]] += 1
    return seats


def _draw(labels: Sequence[int], classes: np.ndarray, seats: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    labels = np.asarray(labels)
    drawn = [
        generator.permutation(np.flatnonzero(labels == label))[:seat]
        for label, seat in zip(classes, seats, strict=True)
    ]
    return np.sort(np.concatenate(drawn))


def _listing(counts: dict[int, int], limit: int = 10) -> str:
    shown = [f"{label} ({count} x)" for label, count in list(counts.items())[:limit]]
    return ", ".join(shown) + (f", and {len(counts) - limit} more" if len(counts) > limit else "")


def is_test_split(split: Any) -> bool:
    """Whether `split`, as a `datasets.Dataset` names it, is the test split or a part of it; `None` is not."""
    return str(split or "").split("[")[0].split("+")[0] == "test"
