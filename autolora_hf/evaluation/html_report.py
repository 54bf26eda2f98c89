"""A report as one HTML file: no scripts, nothing from elsewhere, to be read in two minutes."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from PIL import Image

from .breakdown import class_name, frequent_confusions
from .drawing import png
from .figures import training_curves_figure
from .report_figures import (
    MOST_NAMED_CLASSES,
    class_accuracy_figure,
    confusion_figure,
    corruptions_figure,
    reliability_figure,
    robustness_curve_figure,
)
from .report_text import MIN_SAMPLES, contradictions, standard_warnings


if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .report import RobustnessReport


TEMPLATE = Path(__file__).with_name("report.html.jinja")
# Rows of the table of classes.
_MOST_ROWS = 200
# A lossless picture of photographs and noise may be far larger than anybody can see in it.
_MOST_LOSSLESS = 300_000
_KINDS = {"PNG": "png", "JPEG": "jpeg", "GIF": "gif", "WEBP": "webp"}
# CSS pixels, above which a picture gets the whole width of the page.
_WIDE = 580
# CSS pixels an inch.
_CSS_DPI = 96


@dataclass(frozen=True)
class Picture:
    """A picture inside the page.

    Args:
        source (`str`): A `data:` address with the whole file.
        width (`int`), height (`int`): In CSS pixels.
        alt (`str`): What it shows, in words.
        caption (`str`, *optional*): A line below it.
    """

    source: str
    width: int
    height: int
    alt: str
    caption: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What the robust accuracy is good for.

    Args:
        level (`str`): `"good"`, `"fair"` or `"poor"`.
        title (`str`): In a few words.
        sentence (`str`): In one sentence.
    """

    level: str
    title: str
    sentence: str


def html_report(
    report: RobustnessReport,
    *,
    title: str | None = None,
    examples: bytes | str | os.PathLike[str] | Figure | None = None,
    log_history: Sequence[dict[str, Any]] | None = None,
) -> str:
    """The report as one HTML page with its figures, which loads nothing from elsewhere and needs no scripts.

    What was not measured is left out and named at the end. All texts of the report are escaped: it may come from a
    stranger, see [`RobustnessReport.load`].

    Args:
        report (`RobustnessReport`): What was measured.
        title (`str`, *optional*): Heading, for instance with the name of the model. `None`: it names the data.
        examples (*optional*): A picture of adversarial examples: a matplotlib `Figure` such as [`examples_figure`]
            draws, or a PNG, JPEG, GIF or WebP picture as bytes or as path of a file.
        log_history (`Sequence[dict]`, *optional*): `trainer.state.log_history`, for the curves of the training.

    Returns:
        The whole page. Equal arguments give equal pages.

    Raises:
        ValueError: If `examples` is no such picture, or the corruptions of the report do not belong together.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_visible
    )
    outcomes = {name: [one for one in report.findings if one.outcome == name] for name in ("passed", "failed")}
    told = {finding.sentence for finding in outcomes["failed"]}
    data = _data(report)
    # First, since a wrong file is an error.
    shown = None if examples is None else _examples(examples, report)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        report=report,
        title=title or (f"Robustness on {data}" if data else "Robustness report"),
        data=data,
        images=_images(report),
        verdict=_verdict(report),
        summary=_summary(report),
        # A stranger may have left out those that follow from the figures.
        warnings=[text for text in dict.fromkeys([*standard_warnings(report), *report.warnings]) if text not in told],
        **outcomes,
        not_run=[finding for finding in report.findings if finding.outcome == "not run"],
        curve=_curve(report),
        classes=_classes(report),
        worst=report.worst_class,
        confusion=_confusion(report),
        calibration=_calibration(report),
        corruptions=_corruptions(report),
        further=_further(report),
        examples=shown,
        training=_training(log_history),
        conditions=_conditions(report),
        settings=_settings(report),
        missing=_missing(report, examples is not None, bool(log_history)),
    )


def _visible(value: Any) -> Any:
    """Texts without control characters and without marks that turn the direction of writing."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return "".join(char if char.isprintable() or char == "\n" else " " for char in value)


# ---- words ----


def _data(report: RobustnessReport) -> str:
    """Name of the data, with configuration and split."""
    words: list[Any] = [report.dataset.get(key) for key in ("name", "config", "split")]
    name, *details = (word for word in words if word) if report.dataset.get("name") else ("",)
    return f"{name} ({', '.join(details)})" if details else name


def _images(report: RobustnessReport) -> str:
    used = len(report.sample_indices)
    if used == report.dataset_size:
        return f"all {used:,} images"
    return f"{used:,} of {report.dataset_size:,} images"


def _verdict(report: RobustnessReport) -> Verdict:
    failed = sum(finding.outcome == "failed" for finding in report.findings)
    impossible = contradictions(report)
    if impossible:
        return Verdict("poor", "Impossible figures", impossible[0])
    if report.protocol == "custom":
        sentence = "The attacks were not AutoAttack. Such figures guide development and overstate robustness."
        return Verdict("poor", "Not a figure to publish", sentence)
    if failed:
        checks = "a diagnostic" if failed == 1 else f"{failed} diagnostics"
        return Verdict(
            "fair", "AutoAttack, with doubts", f"AutoAttack was run, but {checks} of gradient masking failed."
        )
    if report.protocol == "autoattack-reduced":
        sentence = "Attacks that are not defined for this model are left out: name those that ran."
        return Verdict("fair", "Publishable: reduced AutoAttack", sentence)
    if not report.findings:
        sentence = "The standard ensemble, complete; nobody looked for gradient masking."
        return Verdict("fair", "AutoAttack, without diagnostics", sentence)
    if report.robust.total < MIN_SAMPLES:
        sentence = f"The standard ensemble, complete, on {report.robust.total} images: give the interval with it."
        return Verdict("fair", "AutoAttack, on few images", sentence)
    return Verdict("good", "Publishable: AutoAttack", "The standard ensemble, complete.")


def _summary(report: RobustnessReport) -> str:
    """What was measured, in a sentence that can be quoted."""
    ran = sum(row.left_out is None for row in report.attacks)
    attacks = "the attack" if ran == 1 else f"the strongest of {ran} attacks, image by image,"
    return (
        f"The model is right for {_percent(report.natural.value)} of {report.natural.total:,} images as they are, and "
        f"for {_percent(report.robust.value)} if {attacks} may change each within the threat model "
        f"({report.threat_model})."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _further(report: RobustnessReport) -> list[tuple[str, Any]]:
    rows = []
    if report.natural_top5 is not None:
        rows.append(("natural, top-5", report.natural_top5))
    if report.robust_top5 is not None:
        rows.append(("under attack, top-5", report.robust_top5))
    if report.other_route is not None:
        route = report.other_route
        rows += [(f"route “{route.route}”, natural", route.natural), (f"route “{route.route}”, robust", route.robust)]
    return rows


def _conditions(report: RobustnessReport) -> list[tuple[str, str | None]]:
    rows = [
        ("threat model", str(report.threat_model)),
        ("attack", report.attack),
        (
            "images",
            f"{_images(report)}; the JSON report has their positions" + " and digests" * bool(report.sample_digests),
        ),
        ("seed", str(report.seed)),
        ("batch size", "" if report.batch_size is None else str(report.batch_size)),
        ("route", report.route or ""),
        ("weights", report.network_sha256 and f"SHA-256 {report.network_sha256}"),
        ("time", f"{report.seconds:,.1f} s on {report.device}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())),
    ]
    return [(name, value) for name, value in rows if value]


def _settings(report: RobustnessReport) -> str:
    settings = {
        "threat_model": report.threat_model.to_dict(),
        "protocol": report.protocol,
        "attack_settings": report.attack_settings,
        "seed": report.seed,
        "batch_size": report.batch_size,
        "route": report.route,
        "dataset": report.dataset,
        "dataset_size": report.dataset_size,
        "samples": len(report.sample_indices),
        "device": report.device,
        "versions": report.versions,
    }
    return json.dumps(settings, indent=2, ensure_ascii=False, default=str)


def _missing(report: RobustnessReport, has_examples: bool, has_log: bool) -> list[str]:
    """What the report is without, and how to get it."""
    options = [
        (bool(report.findings), "diagnostics of gradient masking (diagnostics=True; leave out --no-diagnostics)"),
        (report.has_answers, "classes, confusions and calibration (older reports lack them: measure again)"),
        (report.curve is not None, "accuracy at other radii (curve=True, --curve)"),
        (bool(report.corruptions), "common corruptions (corruptions=True, --corruptions)"),
        (report.other_route is not None or report.route is None, "the other route (route='both', --route both)"),
        (has_examples, "adversarial examples (examples=, --examples)"),
        (has_log, "curves of the training (log_history=, --training-log)"),
    ]
    return [text for there, text in options if not there]


# ---- figures ----


def _curve(report: RobustnessReport) -> dict[str, Any] | None:
    if report.curve is None:
        return None
    points = report.curve.points
    values = ", ".join(f"{_percent(point.accuracy.value)} at {point.eps:.4g}" for point in points)
    picture = _drawn(
        robustness_curve_figure(report.curve, report.threat_model, report.robust),
        f"Curve of robust accuracy against the radius: {values}.",
        f"{report.curve.attack} at each radius, an upper bound, with 95 % intervals. Dashed: the radius of this "
        "report, with what all of its attacks found.",
    )
    rows = [(f"radius {point.eps:.4g}", point.accuracy) for point in points]
    return {"picture": picture, "rows": rows, "largest": f"{points[-1].eps:.4g}"}


def _classes(report: RobustnessReport) -> dict[str, Any] | None:
    classes = report.classes
    if not classes:
        return None
    ordered = sorted(classes, key=lambda row: (row.robust.value, row.natural.value))
    values = ", ".join(f"{row.name} {_percent(row.robust.value)}" for row in ordered[:5])
    shown = ordered[:_MOST_ROWS]
    return {
        "count": len(classes),
        "rows": shown,
        "summary": f"All {len(classes)} classes" if len(shown) == len(classes) else f"The {len(shown)} lowest classes",
        "picture": _drawn(
            class_accuracy_figure(classes),
            f"Natural and robust accuracy of {len(classes)} classes. The lowest robust ones: {values}.",
        ),
    }


def _confusion(report: RobustnessReport) -> dict[str, Any] | None:
    if not report.has_answers:
        return None
    rows = [
        (class_name(label, report.class_names), class_name(answer, report.class_names), count, size)
        for label, answer, count, size in frequent_confusions(report.labels, report.robust_predicted)
    ]
    picture = None
    if report.num_classes <= MOST_NAMED_CLASSES:
        worst = "; ".join(f"{label} for {answer} {count} times" for label, answer, count, _ in rows[:5])
        picture = _drawn(
            confusion_figure(report.confusions(), report.class_names, "taken for, under attack"),
            f"Heat map of true classes and of what they are taken for under attack. Commonest mistakes: "
            f"{worst or 'none'}.",
            "Numbers of images; of each, the answer to the attack that broke it, or the clean one if none did.",
        )
    return {"picture": picture, "rows": rows, "is_wide": picture is not None and picture.width > _WIDE}


def _calibration(report: RobustnessReport) -> dict[str, Any] | None:
    if not report.has_answers:
        return None
    both = {"clean": report.calibration(), "under attack": report.calibration(under_attack=True)}
    found = {name: one for name, one in both.items() if one is not None}
    values = "; ".join(
        f"{name}: mean confidence {_percent(one.confidence)}, accuracy {_percent(one.accuracy)}, ECE {one.ece:.3f}"
        for name, one in found.items()
    )
    picture = _drawn(
        reliability_figure(found),
        f"Reliability diagrams, accuracy against confidence. {values}.",
        "Bars below the dashed diagonal: the model is surer than it is right. Dots: mean confidence of each bin.",
    )
    return {"picture": picture, "rows": list(found.items())}


def _corruptions(report: RobustnessReport) -> dict[str, Any] | None:
    summary = report.corruption_summary
    if summary is None:
        return None
    accuracies = {(row.name, row.severity): row.accuracy.value for row in report.corruptions}
    means = ", ".join(
        f"{name.replace('_', ' ')} {_percent(value)}"
        for name, value in sorted(summary.by_corruption.items(), key=lambda item: item[1])
    )
    picture = _drawn(
        corruptions_figure(accuracies, summary),
        f"Heat map of accuracy by corruption and severity. Means, lowest first: {means}.",
        "Accuracy in per cent. Red line in the scale: clean images.",
    )
    return {"picture": picture, "summary": summary}


def _training(log_history: Sequence[dict[str, Any]] | None) -> Picture | None:
    if not log_history:
        return None
    return _drawn(
        training_curves_figure(log_history),
        "Curves of the training by epoch: accuracies or validation losses, training loss and its scalars, and "
        "learning rate.",
    )


def _examples(examples: bytes | str | os.PathLike[str] | Figure, report: RobustnessReport) -> Picture:
    alt = "Rows of a clean image, the amplified perturbation and the adversarial image, each with the model's answer."
    caption = (
        f"Perturbations within {report.threat_model}; a tick marks a right answer, a cross a wrong one. They were "
        "made for these pictures: a report keeps no adversarial images."
    )
    if isinstance(examples, (str, os.PathLike)):
        examples = Path(examples).read_bytes()
    if not isinstance(examples, bytes):
        return _drawn(examples, alt, caption)
    try:
        # Pillow refuses pictures of absurd size with an error of its own kind.
        with Image.open(io.BytesIO(examples), formats=list(_KINDS)) as opened:
            kind, (width, height) = _KINDS[opened.format or ""], opened.size
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"`examples` is no PNG, JPEG, GIF or WebP picture: {error}") from error
    factor = min(1.0, 660 / width)
    return Picture(_address(examples, kind), round(factor * width), round(factor * height), alt, caption)


def _drawn(figure: Figure, alt: str, caption: str | None = None) -> Picture:
    width, height = (round(_CSS_DPI * inches) for inches in figure.get_size_inches())
    content, kind = png(figure), "png"
    if len(content) > _MOST_LOSSLESS:
        buffer = io.BytesIO()
        with Image.open(io.BytesIO(content)) as lossless:
            lossless.convert("RGB").save(buffer, "JPEG", quality=85, subsampling=0)
        content, kind = buffer.getvalue(), "jpeg"
    return Picture(_address(content, kind), width, height, alt, caption)


def _address(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
