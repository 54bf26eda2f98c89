"""Parts of the page as HTML. What comes from a model or a visitor is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image
from torch import Tensor

from ..config import ThreatModel
from ..evaluation import RobustnessReport
from ..evaluation.figures import amplified_change
from .attack import Answer, Attacked, CurvePoint, Outcome
from .chart import curve_chart, legend
from .models import ROUTE_NAME, Classifier, Demo
from .radii import Scale, radius_text


_NORMS = {
    "linf": "every colour value of every pixel may change by at most ε",
    "l2": "the Euclidean length of the whole change is at most ε",
    "l1": "all changes of colour values together are at most ε",
}


def results(demo: Demo, outcome: Outcome, notes: Sequence[str] = ()) -> str:
    """The models side by side: the pictures and their answers."""
    names = list(outcome.attacked)
    cards = "".join(_card(demo, outcome, name) for name in names)
    remarks = "".join(f"<li>{escape(note)}</li>" for note in notes)
    remarks = f'<ul class="al-notes">{remarks}</ul>' if remarks else ""
    return f'<div class="al-cards al-count-{len(names)}">{cards}</div>{remarks}'


def curve(demo: Demo, points: Sequence[dict[str, CurvePoint]], scale: Scale, chosen: float, total: int) -> str:
    """The chart and the table of the answers at each radius, as far as they are there."""
    names = list(points[0])
    chart = curve_chart({name: [point[name] for point in points] for name in names}, scale.largest, chosen)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    rows = []
    for point in points:
        eps = point[names[0]].eps
        mark = ' class="al-row-chosen" aria-current="true"' if eps == chosen else ""
        cells = "".join(
            f"<td>{_sign(point[name].is_fooled)}&nbsp;{escape(demo.class_name(point[name].label))}"
            f" <small>{point[name].confidence:.0%}</small></td>"
            for name in names
        )
        rows.append(f'<tr{mark}><th scope="row">{escape(radius_text(scale.norm, eps))}</th>{cells}</tr>')
    missing = total - len(points)
    waiting = f'<p class="al-wait">{missing} more radii are being attacked …</p>' if missing else ""
    return (
        '<section class="al-curve"><h3>As the radius grows</h3>'
        "<p>How much probability each model leaves to its answer for the clean image, under an attack of its own at "
        f"each radius.</p>{legend(names)}"
        f'<div class="al-columns">{chart}<div class="al-scroll"><table><thead><tr><th scope="col">ε</th>{head}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div></div>{waiting}</section>"
    )


def is_small(size: Sequence[int]) -> bool:
    """Whether images of this height and width are shown enlarged, with sharp pixels."""
    return max(size) <= 64


def message(text: str) -> str:
    """Something that went wrong, in the page and for screen readers."""
    return f'<p class="al-error" role="alert"><strong>✕</strong> {escape(text)}</p>'


def invitation() -> str:
    """What stands where the results will be."""
    return '<p class="al-empty">Choose an example or upload an image, then press <b>Attack</b>.</p>'


def radius_line(scale: Scale, eps: float) -> str:
    """The chosen radius in words."""
    usual = "the radius that the robust model was made for" if scale.is_trained else "a usual radius of this norm"
    where = f" ({usual})" if eps == scale.usual else ""
    what = "no attack" if eps == 0 else _NORMS[scale.norm]
    value = escape(radius_text(scale.norm, eps))
    return f'<p class="al-radius" aria-live="polite"><b>ε = {value}</b>{where}<br>{what}</p>'


def introduction(demo: Demo) -> str:
    """Title and what the page is about, in two sentences."""
    names = [classifier.name for classifier in demo.others]
    which = "on a model that was trained to withstand it"
    if names == [ROUTE_NAME]:
        # It shares the backbone with the robust route, so it is no example of a model that does not withstand.
        which += ", and on its other route, which learnt from clean images and may withstand much of it too"
    elif names:
        which += " and on one that was not"
    return (
        f"<h1>Attack {escape(demo.title)}</h1>"
        "<p>An attack looks for a small change of an image that changes the answer of a model. Here you can see it at "
        f"work, {which}.</p>"
    )


def about(demo: Demo) -> str:
    """What the page shows and what it does not."""
    parts = [
        f"<li><b>Threat model.</b> The robust model was made for {_threat(demo.threat_model)}. Other norms and "
        "larger radii can be chosen, but were not trained for.</li>",
        f"<li><b>Attack.</b> PGD with {demo.steps} steps of a quarter of ε from a random start (seed {demo.seed}), on "
        "each model on its own and with full knowledge of it. It tries to change the answer that the model gives to "
        "the clean image, be it right or wrong. Then each image is also shown to the other model.</li>",
        "<li><b>No measurement.</b> One image and one short attack say nothing about robust accuracy: stronger "
        "attacks may find what this one did not.</li>",
    ]
    for classifier in demo.classifiers:
        parts.append(f"<li><b>{escape(classifier.name)}.</b> {escape(classifier.note)} {_published(classifier)}</li>")
    parts.append(
        "<li><b>Your images</b> are kept on the machine that runs this page for at most two hours, and sent nowhere "
        "else.</li>"
    )
    return f'<section class="al-about"><h3>What you see here</h3><ul>{"".join(parts)}</ul></section>'


def _card(demo: Demo, outcome: Outcome, name: str) -> str:
    attacked = outcome.attacked[name]
    picture, factor = amplified_change(attacked.adversarial - outcome.pixels)
    change = f"<b>\N{MULTIPLICATION SIGN}{factor}</b> <small>grey: no change</small>" if outcome.eps else "none"
    clean, found = demo.class_name(attacked.clean.label), demo.class_name(attacked.answer.label)
    pictures = [
        _figure(outcome.pixels, "Clean", _answer(demo, attacked.clean, None), f"clean image, taken for {clean}"),
        _figure(picture, "Perturbation", change, f"perturbation, amplified {factor} times"),
        _figure(
            attacked.adversarial,
            "Adversarial",
            _answer(demo, attacked.answer, attacked.is_fooled),
            f"adversarial image, taken for {found}",
        ),
    ]
    series = "second" if name == demo.robust.name else "first"
    return (
        f'<article class="al-card al-{series}" data-model="{escape(name)}"><header><h3>{escape(name)}</h3>'
        f'{_verdict(outcome, attacked)}</header><div class="al-pictures">{"".join(pictures)}</div>'
        f"{_transfers(demo, outcome, name)}</article>"
    )


def _verdict(outcome: Outcome, attacked: Attacked) -> str:
    if outcome.eps == 0:
        return '<span class="al-verdict">no attack</span>'
    kind, text = ("al-fooled", "✕ fooled") if attacked.is_fooled else ("al-stands", "✓ answer stands")
    return f'<span class="al-verdict {kind}">{text}</span>'


def _transfers(demo: Demo, outcome: Outcome, name: str) -> str:
    lines = []
    for source in outcome.attacked:
        if source != name and outcome.eps:
            answer = outcome.attacked[source].others[name]
            fooled = outcome.is_fooled_by(name, source)
            lines.append(
                f'<p class="al-transfer">Shown the image made against <b>{escape(source)}</b>: '
                f"{_answer(demo, answer, fooled)}</p>"
            )
    return "".join(lines)


def _figure(pixels: Tensor, title: str, caption: str, alt: str) -> str:
    pixelated = ' class="al-small"' if is_small(pixels.shape[-2:]) else ""
    return (
        f'<figure><div class="al-title">{title}</div><img{pixelated} src="{_data_uri(pixels)}" alt="{escape(alt)}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _answer(demo: Demo, answer: Answer, fooled: bool | None) -> str:
    sign = "" if fooled is None else _sign(fooled) + "&nbsp;"
    kind = "" if fooled is None else (" al-fooled" if fooled else " al-stands")
    return (
        f'<span class="al-answer{kind}">{sign}<b>{escape(demo.class_name(answer.label))}</b> '
        f"<small>{answer.confidence:.0%}</small></span>"
    )


def _sign(fooled: bool) -> str:
    kind, sign, words = ("al-fooled", "✕", "changed") if fooled else ("al-stands", "✓", "stands")
    return f'<span class="{kind}" role="img" aria-label="{words}">{sign}</span>'


def _published(classifier: Classifier) -> str:
    if not classifier.reports:
        return "No robust accuracy is recorded for it."
    report: RobustnessReport = classifier.reports[0]
    attack = "AutoAttack" if report.publishable else escape(report.attack)
    caution = "" if report.publishable else " That is an upper bound by a weaker attack, not a figure to publish."
    return (
        f"Its record says: robust accuracy <b>{escape(str(report.robust))}</b> under {attack} with "
        f"{_threat(report.threat_model)}, natural accuracy {escape(str(report.natural))}, on "
        f"{report.robust.total:,} images.{caution}"
    )


def _threat(threat_model: ThreatModel) -> str:
    return (
        f"{threat_model.norm_name} perturbations up to ε = {escape(radius_text(threat_model.norm, threat_model.eps))}"
    )


def _data_uri(pixels: Tensor) -> str:
    array = (pixels.permute(1, 2, 0).clamp(0, 1) * 255).round().numpy().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
