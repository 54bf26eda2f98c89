"""What a command hands back: its exit status, and what `--json` prints."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ..evaluation import Accuracy, RobustnessReport


# Exit statuses. Whatever a command is about: 0 says that it did so, and of a check that it holds.
DONE, FAILED, WRONG_USAGE, NOT_MEASURED, INTERRUPTED = 0, 1, 2, 3, 130


class NotMeasuredError(ValueError):
    """A check could not be made, so nothing is known: neither that it holds nor that it does not."""


@dataclass(frozen=True)
class CommandResult:
    """What came of a command.

    Args:
        values (`dict`): JSON types, with the keys that `docs/guides/command-line.md` lists.
        status (`int`): Exit status.
    """

    values: dict[str, Any] = field(default_factory=dict)
    status: int = DONE

    def document(self, command: str) -> str:
        """The JSON document of `--json`. What is not a finite number is `null`."""
        content = {"command": command, "status": self.status, **self.values}
        return json.dumps(_finite(content), indent=2, allow_nan=False)


def report_values(report: RobustnessReport) -> dict[str, Any]:
    """A robustness report as `--json` shows it: what was measured, without the answers to single images."""
    worst, curve, corrupted = report.worst_class, report.curve, report.corruption_summary
    other = report.other_route
    calibrations = {"natural": report.calibration(), "under_attack": report.calibration(under_attack=True)}
    reason = None
    if not report.publishable:
        reason = f"{report.attack} overstates robustness: only AutoAttack gives a figure to publish."
    return {
        "natural_accuracy": accuracy_values(report.natural),
        "robust_accuracy": accuracy_values(report.robust),
        "attack": report.attack,
        "protocol": report.protocol,
        "publishable": report.publishable,
        "not_publishable_because": reason,
        "threat_model": dataclasses.asdict(report.threat_model),
        "route": report.route,
        "other_route": other
        and {
            "route": other.route,
            "natural_accuracy": accuracy_values(other.natural),
            "robust_accuracy": accuracy_values(other.robust),
        },
        "images": len(report.sample_indices),
        "dataset_images": report.dataset_size,
        "seed": report.seed,
        "worst_class": None
        if worst is None
        else {
            "label": worst.label,
            "name": worst.name,
            "natural_accuracy": accuracy_values(worst.natural),
            "robust_accuracy": accuracy_values(worst.robust),
        },
        "calibration_error": {name: found and found.ece for name, found in calibrations.items()},
        "expected_robustness": curve and curve.expected_robustness,
        "curve": curve
        and [{"eps": point.eps, "robust_accuracy": accuracy_values(point.accuracy)} for point in curve.points],
        "corruptions": corrupted and dataclasses.asdict(corrupted),
        "failed_diagnostics": [finding.name for finding in report.findings if finding.outcome == "failed"],
        "warnings": list(report.warnings),
        "seconds": report.seconds,
    }


def accuracy_values(accuracy: Accuracy) -> dict[str, Any]:
    """An accuracy with its 95 % interval, in [0, 1]."""
    return {"value": accuracy.value, **dataclasses.asdict(accuracy)}


@contextmanager
def standard_output_aside() -> Iterator[None]:
    """Sends to standard error what anything writes to standard output meanwhile: Python, C code, child processes."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
        os.dup2(2, 1)
    except OSError:  # one of them is closed
        kept = None
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if kept is not None:
            os.dup2(kept, 1)
            os.close(kept)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
