"""What the answers to single images tell: accuracy by class, and what is taken for what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .accuracy import Accuracy


@dataclass(frozen=True)
class ClassResult:
    """Natural and robust accuracy on the images of one class.

    Args:
        label (`int`): Index of the class.
        name (`str`): What it is called.
        natural (`Accuracy`): On the clean images.
        robust (`Accuracy`): Under attack.
    """

    label: int
    name: str
    natural: Accuracy
    robust: Accuracy


def class_results(
    labels: Sequence[int],
    natural_correct: Sequence[bool],
    robust_correct: Sequence[bool],
    class_names: Sequence[str] | None = None,
) -> list[ClassResult]:
    """One row a class that has images, in the order of their indices.

    Args:
        labels (`Sequence[int]`): Class of each image, N.
        natural_correct (`Sequence[bool]`), robust_correct (`Sequence[bool]`): The verdicts on it, N.
        class_names (`Sequence[str]`, *optional*): In class order. `None`: "class 3".
    """
    rows: dict[int, list[tuple[bool, bool]]] = {}
    for label, natural, robust in zip(labels, natural_correct, robust_correct, strict=True):
        rows.setdefault(label, []).append((natural, robust))
    return [
        ClassResult(
            label,
            class_name(label, class_names),
            *(Accuracy.from_counts(sum(column), len(rows[label])) for column in zip(*rows[label], strict=True)),
        )
        for label in sorted(rows)
    ]


def class_name(label: int, class_names: Sequence[str] | None) -> str:
    """What a class is called; a record may have too few names."""
    return class_names[label] if class_names is not None and label < len(class_names) else f"class {label}"


def confusions(labels: Sequence[int], predicted: Sequence[int], num_classes: int) -> list[list[int]]:
    """How many images of each class (row) are taken for each class (column)."""
    counts = [[0] * num_classes for _ in range(num_classes)]
    for label, answer in zip(labels, predicted, strict=True):
        counts[label][answer] += 1
    return counts


def frequent_confusions(
    labels: Sequence[int], predicted: Sequence[int], most: int = 15
) -> list[tuple[int, int, int, int]]:
    """The commonest mistakes: true class, class it is taken for, how often, and how many images the true class has.

    Args:
        labels (`Sequence[int]`), predicted (`Sequence[int]`): Classes of each image, N.
        most (`int`): Number of entries.
    """
    sizes = Counter(labels)
    found = Counter(pair for pair in zip(labels, predicted, strict=True) if pair[0] != pair[1])
    ordered = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    return [(label, answer, count, sizes[label]) for (label, answer), count in ordered[:most]]
