"""What all figures share: colours, a canvas of their own, names as plain text, and files."""

from __future__ import annotations

import io
import os
import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import write_atomically


if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Okabe and Ito's palette, which readers with any colour vision can tell apart.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#00795A", "#C43C00", "#8A8A8A"


def new_figure(width: float, height: float) -> Figure:
    """A figure, in inches, with its own Agg canvas, so that no display and no global state of pyplot is needed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def plain_name(name: str, fallback: str, most: int = 24) -> str:
    """A name as matplotlib draws it letter by letter: no formula, of at most `most` characters.

    Args:
        name (`str`): It may come from a stranger's data.
        fallback (`str`): What stands for a name with letters that the font of the figures lacks.
        most (`int`): Where longer ones are cut off.
    """
    words = " ".join("".join(char if char.isprintable() else " " for char in name).split())
    if not words or any(ord(char) not in _drawn() for char in words):
        return fallback
    words = words if len(words) <= most else words[: most - 1] + "…"
    # Two dollars make a formula, a backslash before one is taken for an escape.
    return words.replace("\\$", "$").replace("$", r"\$")


@cache
def _drawn() -> frozenset[int]:
    """The characters of the font that comes with matplotlib."""
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


def png(figure: Figure, dpi: float | None = None) -> bytes:
    """The figure as a PNG file; equal figures give equal bytes."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Letters of titles that the font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="png", dpi=dpi or figure.dpi, metadata={"Software": None})
    return buffer.getvalue()


def write_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a figure; the suffix (.png, .pdf, .svg) decides the format."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=Path(path).suffix.lstrip(".") or "png")
    write_atomically(path, buffer.getvalue())
