"""The chart of the page: what is left of each answer as the radius grows, as SVG in the colours of the page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .attack import CurvePoint


_WIDTH, _HEIGHT = 460, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 14, 18, 54
# Classes of the style sheet; the robust model is the last of the models and has the last of these.
SERIES = ("first", "second")


def curve_chart(curves: dict[str, Sequence[CurvePoint]], largest: float, chosen: float) -> str:
    """One line a model: the probability of its answer to the clean image, under its own attack.

    A filled dot is an answer that stands, a cross one that changed, so that the signs alone tell.

    Args:
        curves (`dict[str, Sequence[CurvePoint]]`): Points by growing radius, by the name of the model.
        largest (`float`): Right end of the axis.
        chosen (`float`): The radius to mark.
    """

    def across(eps: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * eps / largest

    def down(probability: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - probability)

    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = down(share)
        parts.append(f'<line class="al-grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4.5:.1f}" text-anchor="end">{share:.0%}</text>')
    for number in range(4):
        eps = largest * number / 3
        parts.append(f'<text x="{across(eps):.1f}" y="{down(0) + 19:.1f}" text-anchor="middle">{eps:.3g}</text>')
    parts.append(
        f'<text class="al-axis" x="{(_LEFT + _WIDTH - _RIGHT) / 2:.0f}" y="{_HEIGHT - 8}" text-anchor="middle">'
        "ε in [0, 1] pixels</text>"
    )
    x = across(chosen)
    parts.append(f'<line class="al-chosen" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 6}" y2="{down(0):.1f}"/>')
    for series, points in zip(_series(curves), curves.values(), strict=True):
        places = [(across(point.eps), down(point.clean_probability), point) for point in points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)
        parts.append(f'<g class="al-{series}"><polyline points="{line}"/>')
        for x, y, point in places:
            if point.is_fooled:
                parts.append(f'<path d="M{x - 4.5:.1f} {y - 4.5:.1f}l9 9m-9 0l9 -9"/>')
            else:
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>')
        parts.append("</g>")
    label = "Probability of the answer to the clean image against the radius of the attack. " + " ".join(
        f"{name}: " + ", ".join(f"{point.clean_probability:.0%} at {point.eps:.3g}" for point in points) + "."
        for name, points in curves.items()
    )
    return (
        f'<svg class="al-chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def legend(names: Sequence[str]) -> str:
    """The names of the models with their colours, and what the signs mean."""
    names_shown = "".join(
        f'<span class="al-key al-{series}"><i></i>{escape(name)}</span>'
        for series, name in zip(_series(names), names, strict=True)
    )
    return f'<p class="al-legend">{names_shown}<span>● answer stands</span><span>✕ answer changed</span></p>'


def _series(names: Sequence[str] | dict) -> tuple[str, ...]:
    return SERIES[-len(names) :]
