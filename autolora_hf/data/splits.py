"""Labels: checks before training, and class-wise proportional splits and subsets."""

from __future__ import annotations

import numbers
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Subset
from torchvision.datasets import DatasetFolder, VisionDataset


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


def stratified_split(
    labels: Sequence[int], fraction: float, seed: int, groups: np.ndarray | None = None
) -> tuple[list[int], list[int]]:
    """Splits sample indices into those to keep and those to hold out, proportionally in every class.

    Shares are rounded by largest remainder, ties fall to chance, and no class loses its last kept sample.

    Args:
        labels (`Sequence[int]`): One class index a sample.
        fraction (`float`): Share to hold out, in (0, 1).
        seed (`int`): Equal seeds give equal splits.
        groups (`np.ndarray`, *optional*): Samples to keep together, N: for every one the index of the first of its
            group, see [`duplicate_groups`]. All follow the first one; shares are then met on average.

    Returns:
        `tuple[list[int], list[int]]`: Kept and held-out indices, each sorted, disjoint and together complete.

    Raises:
        ValueError: If `fraction` is outside (0, 1), or no class has a sample to spare.
    """
    generator = np.random.default_rng(seed)
    classes, seats = held_out_seats(labels, fraction, generator)
    held_out = _draw(labels, classes, seats, generator)
    if groups is not None:
        held_out = _follow_first(labels, held_out, groups)
    kept = np.setdiff1d(np.arange(len(labels)), held_out)
    return kept.tolist(), held_out.tolist()


def held_out_seats(
    labels: Sequence[int] | np.ndarray, fraction: float, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The classes, sorted, and how many samples of each [`stratified_split`] holds out."""
    if isinstance(fraction, bool) or not isinstance(fraction, numbers.Real) or not 0 < fraction < 1:
        raise ValueError(f"`fraction` must be between 0 and 1, both excluded, got {fraction!r}.")
    classes, counts = np.unique(np.asarray(labels), return_counts=True)
    room = counts - 1
    if room.sum() == 0:
        raise ValueError(
            f"Cannot hold out samples: {len(labels)} samples of {len(classes)} classes leave no class one to spare. "
            "Give a validation set of its own."
        )
    total = min(max(1, round(len(labels) * fraction)), int(room.sum()))
    return classes, _apportion(counts, room, total, generator)


def _follow_first(labels: Sequence[int], held_out: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The held-out samples when every group goes where its first sample was put."""
    known, aside = np.asarray(labels), np.zeros(len(labels), dtype=bool)
    aside[held_out] = True
    aside = aside[groups]
    for label in np.unique(known[aside]):
        if aside[known == label].all():
            aside[np.isin(groups, groups[known == label])] = False
    if not aside.any():
        raise ValueError(
            f"Cannot hold out samples: the {len(labels)} samples are copies of {len(np.unique(groups))} images, and "
            "none can be spared. Give a validation set of its own."
        )
    return np.flatnonzero(aside)


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
    generator = np.random.default_rng(seed)
    return _draw(labels, *subset_seats(labels, int(size), generator), generator).tolist()


def subset_seats(
    labels: Sequence[int] | np.ndarray, size: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The classes, sorted, and how many samples of each [`stratified_subset`] takes."""
    classes, counts = np.unique(np.asarray(labels), return_counts=True)
    return classes, _apportion(counts, counts, size, generator)


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
    known = np.asarray(labels)
    drawn = [
        generator.permutation(np.flatnonzero(known == label))[:seat]
        for label, seat in zip(classes, seats, strict=True)
    ]
    return np.sort(np.concatenate(drawn))


def _listing(counts: dict[int, int], limit: int = 10) -> str:
    shown = [f"{label} ({count} x)" for label, count in list(counts.items())[:limit]]
    return ", ".join(shown) + (f", and {len(counts) - limit} more" if len(counts) > limit else "")


def is_test_split(split: Any) -> bool:
    """Whether `split`, as a `datasets.Dataset` or a folder names it, is the test split or has a part of it.

    `None` is not.
    """
    return any(part.split("[")[0].strip().lower() in ("test", "testing") for part in str(split or "").split("+"))


def named_test_set(dataset: Any) -> str | None:
    """What tells that a data set is a test set, or has a part of one: for messages; `None` if nothing does.

    Looked at are the split of a `datasets.Dataset`, the name of a folder, and the `split` and `train` of data sets of
    torchvision, through `Subset`, `ConcatDataset` and whatever else keeps its data set in `source`.
    """
    if isinstance(dataset, Subset):
        return named_test_set(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        return next((name for part in dataset.datasets if (name := named_test_set(part)) is not None), None)
    if isinstance(dataset, (str, Path)) or isinstance(dataset, DatasetFolder):
        name = Path(dataset.root if isinstance(dataset, DatasetFolder) else dataset).expanduser().resolve().name
        return f"the folder {name!r}" if is_test_split(name) else None
    split = getattr(dataset, "split", None)
    if split is not None and is_test_split(split):
        return f"the {str(split)!r} split"
    if isinstance(dataset, VisionDataset) and getattr(dataset, "train", None) is False:
        return f"the test split (`train=False`) of {type(dataset).__name__}"
    return named_test_set(dataset.source) if hasattr(dataset, "source") else None
