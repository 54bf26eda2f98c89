"""What a release claims about itself, and whether its parts contradict each other. Nothing here is measured."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from ..attacks import PGD
from ..checks import printable, shown
from ..config import ThreatModel
from ..evaluation import Accuracy, RobustnessReport
from ..record import Record
from .model_card import rows_of_results


# Metadata round figures; more than that is another figure.
_ROUNDING = 5e-4
_MOST_METRICS = 1000


@dataclass(frozen=True)
class Claim:
    """One measurement that a release publishes of itself.

    Args:
        report (`RobustnessReport`): The measurement.
        weights_sha256 (`str`, *optional*): Digest of the weights it was made with, see [`deployed_digest`].
        problems (`list[str]`): In what it contradicts itself or the release.
    """

    report: RobustnessReport
    weights_sha256: str | None
    problems: list[str] = field(default_factory=list)


def read_claims(record: Record) -> tuple[list[Claim], list[str]]:
    """The measurements in a record, and a message for each that is none."""
    claims, malformed = [], []
    for number, result in enumerate(record.results, start=1):
        digest = result.get("weights_sha256")
        try:
            report = RobustnessReport.from_dict({k: v for k, v in result.items() if k != "weights_sha256"})
        except ValueError as error:
            malformed.append(f"Result {number} of the record is not readable. {error}")
            continue
        claims.append(Claim(report, digest if isinstance(digest, str) else None, contradictions(report, record)))
    return claims, malformed


def rebuild_attack(settings: dict[str, Any], threat_model: ThreatModel) -> str | PGD | None:
    """The attack that an entry of `attack_settings` describes, as [`evaluate_robustness`] takes it; `None` if unknown.

    Raises:
        ValueError: If there is no such PGD.
    """
    if settings["kind"] in ("autoattack", "pgd-bf16"):
        return settings["kind"]
    if settings["kind"] == "pgd":
        return PGD(threat_model, **{name: value for name, value in settings.items() if name != "kind"})
    return None


def contradictions(report: RobustnessReport, record: Record) -> list[str]:
    """In what a measurement contradicts itself or the record it is part of; empty if in nothing."""
    found = []
    for name in ("natural", "robust"):
        accuracy: Accuracy = getattr(report, name)
        verdicts = sum(getattr(report, f"{name}_correct"))
        if accuracy.correct != verdicts:
            found.append(
                f"{name} accuracy counts {accuracy.correct} correct images of {accuracy.total}, the verdicts image "
                f"by image are {verdicts}"
            )
        exact = Accuracy.from_counts(accuracy.correct, accuracy.total)
        if not math.isclose(exact.low, accuracy.low, abs_tol=1e-6) or not math.isclose(
            exact.high, accuracy.high, abs_tol=1e-6
        ):
            found.append(f"the interval of {name} accuracy is {accuracy}, for these counts it must be {exact}")
    impossible = sum(r and not n for n, r in zip(report.natural_correct, report.robust_correct, strict=True))
    if impossible:
        found.append(f"{impossible} images count as robust though they are misclassified when clean")
    broken = sum(row.broken for row in report.attacks if row.left_out is None)
    lost = report.natural.correct - report.robust.correct
    if broken != lost:
        found.append(f"its attacks broke {broken} images, but {lost} separate robust accuracy from natural accuracy")
    if not report.sample_digests:
        found.append("it has no digests of its images, so nobody could tell whether others are the same")
    if report.num_classes != record.num_classes:
        found.append(f"it is about {report.num_classes} classes, the model has {record.num_classes}")
    if report.route != "robust":
        found.append(f"it is about the route {report.route!r}, not about the deployed one")
    return found + _attack_contradictions(report)


def _attack_contradictions(report: RobustnessReport) -> list[str]:
    """In what the name of the attack contradicts its settings."""
    kinds = [settings["kind"] for settings in report.attack_settings]
    found = []
    if kinds and ("autoattack" in kinds) != report.publishable:
        found.append(f"its protocol is {report.protocol!r}, but its attacks are {', '.join(kinds)}")
    if report.publishable and (report.protocol == "autoattack-reduced") != bool(report.left_out):
        found.append(f"its protocol is {report.protocol!r}, but it lists {len(report.left_out)} attacks as left out")
    if set(kinds) == {"pgd"}:
        try:
            named = " + ".join(str(rebuild_attack(entry, report.threat_model)) for entry in report.attack_settings)
        except ValueError as error:
            found.append(f"its attack cannot exist: {error}")
        else:
            if named != report.attack:
                found.append(f"its attack is called {report.attack!r}, but its settings are those of {named!r}")
    return found


# ---- the card ----


def card_figures(text: str) -> list[dict[str, Any]]:
    """The metrics in the `model-index` of a model card's metadata; empty if it has none.

    Raises:
        ValueError: If the metadata are damaged or absurd.
    """
    header = re.match(r"\ufeff?\s*---[ \t]*\r?\n(.*?)\r?\n---", text, re.DOTALL)
    if header is None:
        return []
    try:
        content = yaml.safe_load(header[1])
    # Tags make PyYAML raise nearly anything.
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise ValueError(f"its metadata are not valid YAML ({type(error).__name__})") from error
    metrics = []
    for metric in _metrics(content):
        metrics.append(metric)
        # Aliases of YAML can make a short file endless.
        if len(metrics) > _MOST_METRICS:
            raise ValueError(f"its metadata list more than {_MOST_METRICS} metrics")
    return metrics


def _metrics(content: Any) -> Iterator[dict[str, Any]]:
    entries = content.get("model-index") if isinstance(content, dict) else None
    steps = 0
    for entry in entries or () if isinstance(entries, list) else ():
        for result in _listed(entry, "results"):
            steps += 1
            if steps > _MOST_METRICS:
                raise ValueError(f"its metadata list more than {_MOST_METRICS} results")
            for metric in _listed(result, "metrics"):
                if not isinstance(metric, dict):
                    raise ValueError("a metric in its metadata is not an object")
                yield metric


def _listed(entry: Any, name: str) -> list[Any]:
    found = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(found, list):
        raise ValueError(f"`model-index` in its metadata has an entry without a list of {name}")
    return found


def card_problems(text: str, reports: Sequence[RobustnessReport]) -> list[str]:
    """Which figures of a model card are not those of its record.

    Compared are the metrics in the metadata, the rows "this model" of the table of measurements, and the threat model.
    Prose, pictures, names of data sets and rows about other models are not.

    Args:
        text (`str`): The card.
        reports (`Sequence[RobustnessReport]`): What the record holds.
    """
    try:
        metrics = card_figures(text)
    except ValueError as error:
        return [str(error)]
    problems = [_metric_problem(metric, reports) for metric in metrics]
    named = re.findall(r"^- \*\*Threat model\*\*: (.+?)(?:, in units|$)", text, re.MULTILINE)
    known = {str(report.threat_model) for report in reports}
    problems += [f"it names the threat model {printable(name)}" for name in named if name not in known]
    return [problem for problem in (*problems, *_row_problems(text, reports)) if problem]


def _metric_problem(metric: dict[str, Any], reports: Sequence[RobustnessReport]) -> str | None:
    value, given = metric.get("value"), metric.get("args")
    kind, name = (text if isinstance(text := metric.get(key), str) else "" for key in ("type", "name"))
    name = "".join(char if char.isprintable() else " " for char in name or kind or "a metric without a name")[:200]
    given = given if isinstance(given, dict) else {}
    words = f"{name} {kind}".lower()
    robust = "robust" in words or "attack" in given or "eps" in given
    if not robust and "accuracy" not in words:
        return f"{name} is in its metadata, but nothing of the kind is in the record"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        return f"{name} is {_shown(value)} in its metadata, which is no share between 0 and 1"
    candidates = [report for report in reports if report.publishable or not robust]
    if not candidates:
        what = "robust accuracy measured with AutoAttack" if robust else "natural accuracy"
        return f"{name} is {value:.4g} in its metadata, but the record holds no {what}"
    differences = min((_differences(metric, name, given, robust, report) for report in candidates), key=len)
    return f"{name}: {', '.join(differences)}" if differences else None


def _differences(
    metric: dict[str, Any], name: str, given: dict[str, Any], robust: bool, report: RobustnessReport
) -> list[str]:
    """What a metric says otherwise than a report; at worst everything."""
    accuracy = report.robust if robust else report.natural
    expected: dict[str, Any] = {"n_examples": accuracy.total}
    if robust:
        threat_model = report.threat_model
        expected |= {"norm": threat_model.norm, "eps": threat_model.eps, "attack": report.attack, "seed": report.seed}
    found = [
        f"{key} is {_shown(given[key])} in its metadata and {known!r} in the record"
        for key, known in expected.items()
        if key in given and not _same(given[key], known)
    ]
    if not _same(metric["value"], accuracy.value, _ROUNDING):
        found = [f"the card says {metric['value']:.4g} and the record {accuracy.value:.4g}", *found]
    interval = given.get("confidence_interval_95", [accuracy.low, accuracy.high])
    if (
        not isinstance(interval, list)
        or len(interval) != 2
        or not all(_same(*pair, _ROUNDING) for pair in zip(interval, (accuracy.low, accuracy.high), strict=True))
    ):
        found.append("the interval is another one in the record")
    if robust and "eps" in name and str(report.threat_model) not in name:
        found.append(f"the record's threat model is {report.threat_model}")
    return found


def _shown(value: Any) -> str:
    try:
        return shown(value)
    except ValueError:  # Python refuses to write integers of thousands of digits, which YAML can read
        return "an enormous number"


def _same(value: Any, known: Any, tolerance: float = 1e-9) -> bool:
    if isinstance(value, bool) or not isinstance(known, (int, float)) or not isinstance(value, (int, float)):
        return type(value) is type(known) and value == known
    return known - tolerance <= value <= known + tolerance


def _bare(cell: str) -> str:
    """A cell without Markdown's emphasis, in small letters."""
    return re.sub(r"[\\*_`~]", "", cell).lower()


def _row_problems(text: str, reports: Sequence[RobustnessReport]) -> list[str]:
    """Rows about this model in the card's table that show other figures than any report."""
    rows = [
        line for line in text.splitlines() if re.match(r" *\|", line) and "this model" in _bare(line.split("|")[1])
    ]
    if "\n## What was measured\n" in text:  # a card of this package, whose rows are known
        expected = rows_of_results(reports)
        missing = [f"its table lacks the row {printable(row)}" for row in expected if row not in rows]
        return missing + [
            f"its table says {printable(row)}, which no result of the record has"
            for row in rows
            if row not in expected
        ]
    number = r"(\d{1,3}(?:\.\d{1,6})?) ?\[[\d., ]*\]"
    problems = []
    for line in rows:
        found = re.match(rf"\| this model[^|]*\| {number} \| {number} \|", line)
        if found is None:
            problems.append(f"its table has a row about this model that cannot be read: {printable(line)}")
            continue
        row = found.groups()
        matches = any(
            all(
                abs(float(shown) - 100 * accuracy.value) <= 0.5 * 10 ** -len(shown.partition(".")[2]) + 1e-9
                for shown, accuracy in zip(row, (report.natural, report.robust), strict=True)
            )
            for report in reports
        )
        if not matches:
            problems.append(
                f"its table says {row[0]} % natural and {row[1]} % robust accuracy of this model, which no result of "
                "the record has"
            )
    return problems
