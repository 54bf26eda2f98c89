"""What an evaluation of robustness measured, how sure it is, and what to keep in mind when reading it."""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from scipy.stats import binomtest

from ..config import ThreatModel
from ..data.description import DataDescription
from ..files import read_json, write_atomically
from .report_schema import check_report


Protocol = Literal["autoattack", "autoattack-reduced", "custom"]

# Below this many images the 95 % interval is wider than ten points around the accuracies that occur in practice.
MIN_SAMPLES = 200


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


@dataclass(frozen=True)
class AttackResult:
    """One attack of an evaluation: what it achieved, or why it was left out.

    Args:
        name (`str`): Name of the attack.
        attacked (`int`): Images it was run on: those that no earlier attack had broken.
        broken (`int`): How many of them it broke.
        accuracy (`float`, *optional*): Share of all images still classified correctly after it, in [0, 1].
        seconds (`float`): Wall time, including the check of what it returned.
        left_out (`str`, *optional*): Why it was not run; the other fields are then empty.
    """

    name: str
    attacked: int = 0
    broken: int = 0
    accuracy: float | None = None
    seconds: float = 0.0
    left_out: str | None = None


@dataclass
class RobustnessReport:
    """Natural and robust accuracy of one model on one set of images, with all that is needed to repeat it.

    `print(report)` shows a table, `report.save(path)` and [`RobustnessReport.load`] keep it as JSON.

    Args:
        threat_model (`ThreatModel`): The perturbations that were allowed.
        natural (`Accuracy`): Accuracy on the clean images.
        robust (`Accuracy`): Accuracy under the strongest of all attacks, image by image. An image that is
            misclassified when clean counts as not robust.
        attacks (`list[AttackResult]`): One row an attack, in the order in which they ran; left-out ones last.
        protocol (`str`): `"autoattack"` (the standard ensemble, complete), `"autoattack-reduced"` (all of its attacks
            that are defined for this model) or `"custom"` (any other attack, such as PGD).
        attack (`str`): The attack in words.
        sample_indices (`list[int]`): Positions in the data set of the images used.
        natural_correct (`list[bool]`): For each of them, whether it is classified correctly when clean.
        robust_correct (`list[bool]`): For each of them, whether it withstood every attack.
        dataset_size (`int`): Number of images in the whole data set.
        num_classes (`int`): Number of classes of the model.
        seed (`int`): Seed of the attacks and of the choice of images.
        route (`str`, *optional*): Route of the AutoLoRa model; `None` for any other model.
        device (`str`): Where it ran.
        seconds (`float`): Wall time of everything; of a resumed evaluation with that of the earlier runs.
        dataset (`dict`): Where the images came from, see [`describe_data`].
        sample_digests (`list[str]`): For each image the start of the SHA-256 of its label and its 8-bit pixels, by
            which somebody who repeats the measurement knows whether these are the same images.
        attack_settings (`list[dict]`): The attack for programs, one entry an attack in the order in which they ran:
            `{"kind": "autoattack"}`, `{"kind": "pgd-bf16"}` (see [`evaluate_robustness`]), `{"kind": "pgd", ...}` with
            the other arguments of [`PGD`], or `{"kind": "custom", "name": ...}`, which cannot be repeated from the
            report alone.
        batch_size (`int`, *optional*): Images attacked at a time, on which the random starts depend.
        versions (`dict[str, str]`): Versions of the packages involved.
        warnings (`list[str]`): What to know before using the figures.
    """

    threat_model: ThreatModel
    natural: Accuracy
    robust: Accuracy
    attacks: list[AttackResult]
    protocol: Protocol
    attack: str
    sample_indices: list[int]
    natural_correct: list[bool]
    robust_correct: list[bool]
    dataset_size: int
    num_classes: int
    seed: int
    route: str | None
    device: str
    seconds: float
    dataset: DataDescription | dict[str, Any] = field(default_factory=dict)
    sample_digests: list[str] = field(default_factory=list)
    attack_settings: list[dict[str, Any]] = field(default_factory=list)
    batch_size: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def natural_accuracy(self) -> float:
        """Accuracy on clean images, in [0, 1]."""
        return self.natural.value

    @property
    def robust_accuracy(self) -> float:
        """Accuracy under attack, in [0, 1]."""
        return self.robust.value

    @property
    def publishable(self) -> bool:
        """Whether the attack was AutoAttack; anything else is a signal for development."""
        return self.protocol != "custom"

    @property
    def left_out(self) -> dict[str, str]:
        """Attacks of the protocol that were not run, and why."""
        return {row.name: row.left_out for row in self.attacks if row.left_out is not None}

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Any) -> RobustnessReport:
        """The inverse of `to_dict`, for files that may come from a stranger.

        Types, ranges and lengths are checked, not whether the figures are true: see [`verify_release`].

        Raises:
            ValueError: If a field is missing, unknown, of a wrong type, out of range or not of the length of the
                others; the message names it.
        """
        try:
            check_report(content)
            threat_model = ThreatModel(**content["threat_model"])
        except ValueError as error:
            raise ValueError(f"This is not a robustness report: {error}") from error
        return cls(
            **{
                **content,
                "threat_model": threat_model,
                "natural": Accuracy(**content["natural"]),
                "robust": Accuracy(**content["robust"]),
                "attacks": [AttackResult(**row) for row in content["attacks"]],
            }
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the report as JSON, one field a line; the file is complete or not there."""
        lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in self.to_dict().items()]
        write_atomically(path, ("{\n  " + ",\n  ".join(lines) + "\n}\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RobustnessReport:
        """Reads a report written by `save`. Raises `ValueError` if the file is not one."""
        path = Path(path)
        try:
            return cls.from_dict(read_json(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from error

    @classmethod
    def merged(cls, parts: Sequence[RobustnessReport]) -> RobustnessReport:
        """One report of several, made on different images of the same data under the same conditions.

        For instance by several processes. Each image's verdict is what its part found; seconds are those of the
        slowest part.

        Raises:
            ValueError: If the parts share images or differ in threat model, attacks, seed, route or data.
        """
        first = parts[0]
        same = (
            "threat_model",
            "protocol",
            "attack",
            "attack_settings",
            "dataset_size",
            "dataset",
            "num_classes",
            "seed",
            "route",
        )
        for name in same:
            values = [getattr(part, name) for part in parts]
            if any(value != values[0] for value in values):
                raise ValueError(f"Reports that differ in `{name}` cannot be merged: {values}.")
        verdicts = sorted(
            row
            for part in parts
            for row in zip(
                part.sample_indices, part.natural_correct, part.robust_correct, part.sample_digests, strict=True
            )
        )
        indices, natural, robust, digests = (list(column) for column in zip(*verdicts, strict=True))
        if len(set(indices)) < len(indices):
            raise ValueError("Reports that share images cannot be merged.")
        attacks = []
        for rows in zip(*(part.attacks for part in parts), strict=True):
            if rows[0].left_out is not None:
                attacks.append(rows[0])
                continue
            kept = sum(round(row.accuracy * len(part.sample_indices)) for row, part in zip(rows, parts, strict=True))
            attacks.append(
                AttackResult(
                    rows[0].name,
                    attacked=sum(row.attacked for row in rows),
                    broken=sum(row.broken for row in rows),
                    accuracy=kept / len(indices),
                    seconds=max(row.seconds for row in rows),
                )
            )
        report = replace(
            first,
            natural=Accuracy.from_counts(sum(natural), len(indices)),
            robust=Accuracy.from_counts(sum(robust), len(indices)),
            attacks=attacks,
            sample_indices=indices,
            natural_correct=natural,
            robust_correct=robust,
            sample_digests=digests,
            seconds=max(part.seconds for part in parts),
            # Processes may have had room for batches of different sizes.
            batch_size=first.batch_size if len({part.batch_size for part in parts}) == 1 else None,
        )
        # What follows from the figures is derived anew; what was seen in a part's model passes or images is kept.
        seen = [text for part in parts for text in part.warnings if text not in standard_warnings(part)]
        report.warnings = [*standard_warnings(report), *dict.fromkeys(seen)]
        return report

    def __str__(self) -> str:
        used = len(self.sample_indices)
        samples = f"{used:,} of {self.dataset_size:,}" if used < self.dataset_size else f"all {used:,}"
        head = {
            "threat model": str(self.threat_model),
            "attack": self.attack,
            "images": f"{samples}, {self.num_classes} classes, seed {self.seed}",
            "route": self.route,
            "ran": f"{self.seconds:.1f} s on {self.device}",
            "versions": ", ".join(f"{name} {version}" for name, version in self.versions.items()),
        }
        blocks = ["\n".join(item_line(name, text) for name, text in head.items() if text)]
        rows = [["", "accuracy", "95 % interval", "correct"]]
        for name, accuracy in (("natural", self.natural), ("robust", self.robust)):
            interval = f"[{percent(accuracy.low)}, {percent(accuracy.high)}]"
            rows.append([name, percent(accuracy.value), interval, f"{accuracy.correct} / {accuracy.total}"])
        blocks.append(aligned_table(rows))
        rows = [["after", "accuracy", "broken", "seconds"]]
        for row in self.attacks:
            if row.left_out is None:
                rows.append([row.name, percent(row.accuracy), f"{row.broken} of {row.attacked}", f"{row.seconds:.1f}"])
        blocks.append(aligned_table(rows))
        if self.left_out:
            blocks.append("\n".join(item_line("not run", f"{name}: {why}") for name, why in self.left_out.items()))
        if self.warnings:
            blocks.append("\n".join(item_line("warning", text) for text in self.warnings))
        return "\n\n".join(blocks)


def standard_warnings(report: RobustnessReport) -> list[str]:
    """What follows from the figures of a report alone."""
    found = []
    natural, robust = report.natural, report.robust
    if robust.value > natural.value:
        found.append(
            f"Robust accuracy ({robust.value:.2%}) is above natural accuracy ({natural.value:.2%}), which is "
            "impossible on the same images: the two do not belong together."
        )
    if report.protocol == "custom":
        found.append(
            f"{report.attack}: a training signal, not a figure to publish. Such attacks overstate robustness; run "
            "`attack='autoattack'`."
        )
    if report.protocol == "autoattack-reduced":
        found.append(
            f"AutoAttack without {', '.join(report.left_out)}: name the attacks that ran wherever the figure is used."
        )
    if robust.total < MIN_SAMPLES:
        found.append(
            f"Only {robust.total} images: the 95 % interval of robust accuracy is "
            f"{100 * (robust.high - robust.low):.0f} points wide."
        )
    square = next((row for row in report.attacks if row.name == "Square"), None)
    # The rule of the AutoAttack authors (0.2 points), but one image of a small sample is chance.
    if square is not None and square.broken > max(1, math.floor(0.002 * robust.total)):
        found.append(
            f"Square, which uses no gradients, broke {square.broken} images that the gradient-based attacks had not: "
            "gradient masking suspected, the true robust accuracy may be lower."
        )
    return found


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def item_line(name: str, text: str) -> str:
    return textwrap.fill(text, 100, initial_indent=f"{name:<14}", subsequent_indent=" " * 14)


def aligned_table(rows: list[list[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(12, *(len(row[column]) for row in rows)) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append("  ".join(cells))
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)
