"""What an objective without labels cannot have: whatever needs classes or accuracies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..objectives import OBJECTIVES


if TYPE_CHECKING:
    from .arguments import AutoLoraTrainingArguments


METRICS = ("robust_accuracy", "natural_accuracy", "natural_route_accuracy", "loss")
# Argument, values that need no labels, what the others do.
_WITHOUT_LABELS = (
    ("init", ("none",), "prepares a classification layer"),
    ("finish", ("none",), "measures accuracies"),
    ("eps_schedule", ("constant", "two-hinge"), "goes by natural accuracy"),
)


def selectable_metrics(args: AutoLoraTrainingArguments) -> tuple[str, ...]:
    """The validation metrics that the best weights can be chosen by.

    Raises:
        ValueError: If another argument needs labels, and the objective has none.
    """
    if OBJECTIVES[args.objective].classifies:
        return METRICS
    for name, possible, what in _WITHOUT_LABELS:
        if getattr(args, name) not in possible:
            raise ValueError(
                f"`{name}={getattr(args, name)!r}` {what}, and {args.objective!r} trains embeddings without labels: "
                "leave it out."
            )
    return ("loss",)
