"""What an evaluation of robustness measured, how sure it is, and what to keep in mind when reading it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..config import ThreatModel
from ..data.description import DataDescription
from ..files import read_json, write_atomically
from .accuracy import Accuracy
from .breakdown import ClassResult, class_results, confusions
from .calibration import Calibration, calibration
from .corruptions import CorruptionSummary, summarised
from .curve import CurvePoint, RobustnessCurve
from .findings import Finding
from .report_schema import check_report
from .report_text import report_text, standard_warnings


Protocol = Literal["autoattack", "autoattack-reduced", "custom"]


# Fields with one entry an image.
_PER_IMAGE = (
    "sample_indices",
    "natural_correct",
    "robust_correct",
    "sample_digests",
    "labels",
    "natural_predicted",
    "robust_predicted",
    "natural_confidence",
    "robust_confidence",
)


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


@dataclass(frozen=True)
class CorruptionResult:
    """Accuracy on the images with one common corruption.

    Args:
        name (`str`): One of [`CORRUPTIONS`].
        severity (`int`): 1 to 5.
        accuracy (`Accuracy`): On all images.
    """

    name: str
    severity: int
    accuracy: Accuracy


@dataclass(frozen=True)
class RouteResult:
    """The route of an AutoLoRa model that is not deployed, measured in the same way on the same images.

    Args:
        route (`str`): Its name.
        natural (`Accuracy`): On the clean images.
        robust (`Accuracy`): Under the same attacks, made against this route.
    """

    route: str
    natural: Accuracy
    robust: Accuracy


@dataclass
class RobustnessReport:
    """Natural and robust accuracy of one model on one set of images, with all that is needed to repeat it.

    `print(report)` shows a table, `report.save_html(path)` writes a page with figures, `report.save(path)` and
    [`RobustnessReport.load`] keep it as JSON.

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
        network_sha256 (`str`, *optional*): Of the network that was measured: names, shapes and values of its weights
            and buffers; of an AutoLoRa model those of the route, with its branches merged.
        labels (`list[int]`): For each image its class.
        natural_predicted (`list[int]`): For each image the class that the clean one is taken for.
        robust_predicted (`list[int]`): For each image the class that it is taken for under attack: of the attack that
            broke it, else as clean.
        natural_confidence (`list[float]`), robust_confidence (`list[float]`): The probability that the model gives to
            these classes, in [0, 1].
        natural_top5 (`Accuracy`, *optional*): Share of clean images with their class among the five most probable;
            `None` for five classes or fewer.
        robust_top5 (`Accuracy`, *optional*): The same for the images that the attacks made. They went for the most
            probable class, not for five, so this is no bound against others.
        class_names (`list[str]`, *optional*): Names of the classes.
        findings (`list[Finding]`): Diagnostics of gradient masking, see [`gradient_masking_findings`].
        curve (`RobustnessCurve`, *optional*): Robust accuracy at other radii.
        corruptions (`list[CorruptionResult]`): Common corruptions, at each severity.
        other_route (`RouteResult`, *optional*): The same measurement of the route that is not deployed.
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
    network_sha256: str | None = None
    labels: list[int] = field(default_factory=list)
    natural_predicted: list[int] = field(default_factory=list)
    robust_predicted: list[int] = field(default_factory=list)
    natural_confidence: list[float] = field(default_factory=list)
    robust_confidence: list[float] = field(default_factory=list)
    natural_top5: Accuracy | None = None
    robust_top5: Accuracy | None = None
    class_names: list[str] | None = None
    findings: list[Finding] = field(default_factory=list)
    curve: RobustnessCurve | None = None
    corruptions: list[CorruptionResult] = field(default_factory=list)
    other_route: RouteResult | None = None

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

    @property
    def has_answers(self) -> bool:
        """Whether the answers to single images are recorded; in older reports they are not."""
        return bool(self.labels)

    @property
    def classes(self) -> list[ClassResult]:
        """Natural and robust accuracy of every class that has images; empty without the answers."""
        if not self.has_answers:
            return []
        return class_results(self.labels, self.natural_correct, self.robust_correct, self.class_names)

    @property
    def worst_class(self) -> ClassResult | None:
        """The class of the lowest robust accuracy, and among equals of the lowest natural one.

        The lowest of several measured shares lies by chance below the lowest true one.
        """
        return min(self.classes, key=lambda row: (row.robust.value, row.natural.value), default=None)

    def confusions(self, under_attack: bool = True) -> list[list[int]]:
        """How many images of each class (row) are taken for each class (column)."""
        predicted = self.robust_predicted if under_attack else self.natural_predicted
        return confusions(self.labels, predicted, self.num_classes)

    def calibration(self, under_attack: bool = False) -> Calibration | None:
        """How well the model's confidence fits its accuracy; `None` without the answers.

        Under attack an image counts with the confidence in the answer that the attack that broke it brought about, or
        in the clean one if none did.
        """
        if not self.has_answers:
            return None
        if under_attack:
            return calibration(self.robust_confidence, self.robust_correct)
        return calibration(self.natural_confidence, self.natural_correct)

    @property
    def corruption_summary(self) -> CorruptionSummary | None:
        """Mean accuracies over corruptions and severities; `None` where none were measured."""
        if not self.corruptions:
            return None
        accuracies = {(row.name, row.severity): row.accuracy.value for row in self.corruptions}
        return summarised(accuracies, self.natural.value)

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
        values = {**content, "threat_model": threat_model}
        values["attacks"] = [AttackResult(**row) for row in content["attacks"]]
        values["findings"] = [Finding(**row) for row in content.get("findings", [])]
        for name in ("natural", "robust", "natural_top5", "robust_top5"):
            values[name] = content.get(name) and Accuracy(**content[name])
        values["corruptions"] = [
            CorruptionResult(row["name"], row["severity"], Accuracy(**row["accuracy"]))
            for row in content.get("corruptions", [])
        ]
        if content.get("curve"):
            points = [CurvePoint(row["eps"], Accuracy(**row["accuracy"])) for row in content["curve"]["points"]]
            values["curve"] = RobustnessCurve(content["curve"]["attack"], points)
        if content.get("other_route"):
            row = content["other_route"]
            values["other_route"] = RouteResult(row["route"], Accuracy(**row["natural"]), Accuracy(**row["robust"]))
        return cls(**values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the report as JSON, one field a line; the file is complete or not there."""
        lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in self.to_dict().items()]
        write_atomically(path, ("{\n  " + ",\n  ".join(lines) + "\n}\n").encode())

    def save_html(self, path: str | os.PathLike[str], **content: Any) -> None:
        """Writes the report as one HTML page; the file is complete or not there. `content` as of [`html_report`]."""
        from .html_report import html_report

        write_atomically(path, html_report(self, **content).encode())

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
            ValueError: If there are none, they share images, differ in threat model, attacks, seed, route, weights or
                data, or have a curve, corruptions or another route.
        """
        if not parts:
            raise ValueError("There are no reports to merge.")
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
            "network_sha256",
        )
        for name in same:
            values = [getattr(part, name) for part in parts]
            if any(value != values[0] for value in values):
                raise ValueError(f"Reports that differ in `{name}` cannot be merged: {values}.")
        if any(part.curve or part.corruptions or part.other_route for part in parts):
            raise ValueError(
                "Reports with a curve, corruptions or another route cannot be merged. Measure with several processes "
                "instead, see `evaluate_robustness`."
            )
        columns = [name for name in _PER_IMAGE if all(getattr(part, name) for part in parts)]
        rows = [row for part in parts for row in zip(*(getattr(part, name) for name in columns), strict=True)]
        merged = dict(zip(columns, map(list, zip(*sorted(rows), strict=True)), strict=True))
        indices, natural, robust = (merged[name] for name in _PER_IMAGE[:3])
        if len(set(indices)) < len(indices):
            raise ValueError("Reports that share images cannot be merged.")
        attacks = []
        for results in zip(*(part.attacks for part in parts), strict=True):
            if results[0].left_out is not None:
                attacks.append(results[0])
                continue
            kept = sum(
                round(one.accuracy * len(part.sample_indices)) for one, part in zip(results, parts, strict=True)
            )
            attacks.append(
                AttackResult(
                    results[0].name,
                    attacked=sum(one.attacked for one in results),
                    broken=sum(one.broken for one in results),
                    accuracy=kept / len(indices),
                    seconds=max(one.seconds for one in results),
                )
            )
        per_image: dict[str, Any] = {name: merged.get(name, []) for name in _PER_IMAGE}
        report = replace(
            first,
            natural=Accuracy.from_counts(sum(natural), len(indices)),
            robust=Accuracy.from_counts(sum(robust), len(indices)),
            attacks=attacks,
            **per_image,
            natural_top5=_sum_of([part.natural_top5 for part in parts]),
            robust_top5=_sum_of([part.robust_top5 for part in parts]),
            # Of the first part that was diagnosed: what they found is a property of the model.
            findings=next((part.findings for part in parts if part.findings), []),
            seconds=max(part.seconds for part in parts),
            # Processes may have had room for batches of different sizes.
            batch_size=first.batch_size if len({part.batch_size for part in parts}) == 1 else None,
        )
        # What follows from the figures is derived anew; what was seen in a part's model passes or images is kept.
        seen = [text for part in parts for text in part.warnings if text not in standard_warnings(part)]
        report.warnings = [*standard_warnings(report), *dict.fromkeys(seen)]
        return report

    def __str__(self) -> str:
        return report_text(self)


def _sum_of(accuracies: Sequence[Accuracy | None]) -> Accuracy | None:
    known = [one for one in accuracies if one is not None]
    if len(known) < len(accuracies):
        return None
    return Accuracy.from_counts(sum(one.correct for one in known), sum(one.total for one in known))
