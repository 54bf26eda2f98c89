"""A report as text, and what follows from its figures alone."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..checks import printable
from .accuracy import Accuracy
from .breakdown import class_name


if TYPE_CHECKING:
    from .report import RobustnessReport


# Below this many images the 95 % interval is wider than ten points around the accuracies that occur in practice.
MIN_SAMPLES = 200

# With a larger share of one class among the images, a good model may answer with it alone.
ONE_CLASS_SHARE = 0.9


def report_text(report: RobustnessReport) -> str:
    """Tables of what was measured, with the warnings."""
    used = len(report.sample_indices)
    samples = f"{used:,} of {report.dataset_size:,}" if used < report.dataset_size else f"all {used:,}"
    head = {
        "threat model": str(report.threat_model),
        "attack": report.attack,
        "images": f"{samples}, {report.num_classes} classes, seed {report.seed}",
        "route": report.route,
        "ran": f"{report.seconds:.1f} s on {report.device}",
        "versions": ", ".join(f"{name} {version}" for name, version in report.versions.items()),
    }
    blocks = ["\n".join(item_line(name, text) for name, text in head.items() if text)]
    accuracies: dict[str, Accuracy | None] = {"natural": report.natural, "robust": report.robust}
    accuracies |= {"natural, top-5": report.natural_top5, "under attack, top-5": report.robust_top5}
    if report.other_route is not None:
        route = report.other_route
        accuracies |= {f"route {route.route}, natural": route.natural, f"route {route.route}, robust": route.robust}
    blocks.append(_accuracies({name: accuracy for name, accuracy in accuracies.items() if accuracy is not None}))
    rows = [["after", "accuracy", "broken", "seconds"]]
    for row in report.attacks:
        if row.left_out is None and row.accuracy is not None:
            rows.append([row.name, percent(row.accuracy), f"{row.broken} of {row.attacked}", f"{row.seconds:.1f}"])
    blocks.append(aligned_table(rows))
    if report.left_out:
        blocks.append("\n".join(item_line("not run", f"{name}: {why}") for name, why in report.left_out.items()))
    if report.curve is not None:
        points = {f"eps = {point.eps:.4g}": point.accuracy for point in report.curve.points}
        blocks.append(_accuracies(points, f"under {report.curve.attack}"))
    details = _details(report)
    if details:
        blocks.append("\n".join(item_line(name, text) for name, text in details.items()))
    if report.warnings:
        blocks.append("\n".join(item_line("warning", text) for text in report.warnings))
    return "\n\n".join(blocks)


def _accuracies(accuracies: Mapping[str, Accuracy], title: str = "") -> str:
    rows = [[title, "accuracy", "95 % interval", "correct"]]
    for name, accuracy in accuracies.items():
        interval = f"[{percent(accuracy.low)}, {percent(accuracy.high)}]"
        rows.append([name, percent(accuracy.value), interval, f"{accuracy.correct} / {accuracy.total}"])
    return aligned_table(rows)


def _details(report: RobustnessReport) -> dict[str, str]:
    """Further results in a line each, by name."""
    details = {}
    worst, calibration, corruptions = report.worst_class, report.calibration(), report.corruption_summary
    if worst is not None:
        accuracies = f"robust {percent(worst.robust.value)}, natural {percent(worst.natural.value)}"
        details["worst class"] = f"{printable(worst.name)}: {accuracies}, of {worst.robust.total} images"
    if report.curve is not None:
        largest = report.curve.points[-1].eps
        details["expected"] = f"{percent(report.curve.expected_robustness)} robust, over radii from 0 to {largest:.4g}"
    if calibration is not None:
        details["calibration"] = f"expected calibration error {calibration.ece:.3f} on clean images"
    if corruptions is not None:
        severities = ", ".join(map(str, corruptions.severities))
        kinds = f"{len(corruptions.by_corruption)} corruptions, severities {severities}"
        details["corruptions"] = f"{percent(corruptions.mean_accuracy)} in the mean of {kinds}"
    if report.findings:
        passed = sum(finding.outcome == "passed" for finding in report.findings)
        failed = [finding.name for finding in report.findings if finding.outcome == "failed"]
        what = f"; failed: {', '.join(failed)}" if failed else ""
        details["diagnostics"] = f"{passed} of {len(report.findings)} checks of gradient masking passed{what}"
    return details


def standard_warnings(report: RobustnessReport) -> list[str]:
    """What follows from the figures of a report alone."""
    robust, found = report.robust, contradictions(report)
    for curve, point in [(report.curve, point) for point in report.curve.points] if report.curve else ():
        if point.eps <= report.threat_model.eps * (1 + 1e-9) and point.accuracy.value < robust.value:
            found.append(
                f"{curve.attack} leaves {point.accuracy.value:.2%} within eps = {point.eps:.4g}, less than the "
                f"attacks of this report do within the larger ball ({robust.value:.2%}): they are too weak."
            )
            break
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
    answers = set(report.natural_predicted)
    # A good model may do so too where nearly all images are of one class.
    if len(answers) == 1 and max(Counter(report.labels).values()) <= ONE_CLASS_SHARE * len(report.labels):
        name = printable(class_name(answers.pop(), report.class_names))
        found.append(
            f"All clean images are taken for one class, {name}: the model tells no classes apart, and its robust "
            "accuracy is no more than the share of that class."
        )
    square = next((row for row in report.attacks if row.name == "Square"), None)
    # The rule of the AutoAttack authors (0.2 points), but one image of a small sample is chance.
    if square is not None and square.broken > max(1, math.floor(0.002 * robust.total)):
        found.append(
            f"Square, which uses no gradients, broke {square.broken} images that the gradient-based attacks had not: "
            "gradient masking suspected, the true robust accuracy may be lower."
        )
    return found


def contradictions(report: RobustnessReport) -> list[str]:
    """What cannot be true of one measurement; the file of a stranger may say anything."""
    found = []
    natural, robust = report.natural, report.robust
    if robust.value > natural.value:
        found.append(
            f"Robust accuracy ({robust.value:.2%}) is above natural accuracy ({natural.value:.2%}), which is "
            "impossible on the same images: the two do not belong together."
        )
    counted = (sum(report.natural_correct), sum(report.robust_correct))
    if counted != (natural.correct, robust.correct):
        found.append(
            f"The verdicts on single images give {counted[0]} and {counted[1]} right answers, the accuracies say "
            f"{natural.correct} and {robust.correct}."
        )
    if any(held and not right for held, right in zip(report.robust_correct, report.natural_correct, strict=True)):
        found.append("Images that are wrong when clean are called robust.")
    kinds = [settings["kind"] for settings in report.attack_settings]
    if report.publishable and kinds and "autoattack" not in kinds:
        found.append("It is called a measurement with AutoAttack, but AutoAttack is not among its attacks.")
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
