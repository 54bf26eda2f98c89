"""What a diagnostic found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


Outcome = Literal["passed", "failed", "not run"]


@dataclass(frozen=True)
class Finding:
    """What one diagnostic found.

    Args:
        name (`str`): The check, such as `"zero gradients"`.
        outcome (`str`): `"passed"`, `"failed"` (gradient-based attacks may overstate robustness) or `"not run"`.
        sentence (`str`): One sentence: what was measured and, where it failed, what to do.
        figures (`dict`): The numbers behind the sentence, as JSON types.
    """

    name: str
    outcome: Outcome
    sentence: str
    figures: dict[str, float | int | list[float]] = field(default_factory=dict)
