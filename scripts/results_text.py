"""Figures as they stand on the page of results."""

from __future__ import annotations

import statistics
import textwrap

from autolora_hf.evaluation.comparison import Difference


# With two seeds the paired test says "different" too often, see `crossed_difference`.
FEWEST_SEEDS = 3


def wrap(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 119, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def spread(values: list[float]) -> str:
    """Mean [lowest, highest] in per cent."""
    mean = 100 * statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.1f}"
    return f"{mean:.1f} [{100 * min(values):.1f}, {100 * max(values):.1f}]"


def points(difference: Difference) -> str:
    """A difference and its interval in percentage points."""
    return f"{100 * difference.value:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"


def probability(p_value: float) -> str:
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"
