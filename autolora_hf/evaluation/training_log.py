"""The log of a training run, read from a file."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from ..checks import wrong
from ..files import read_json


_MOST_ENTRIES = 1_000_000


def read_training_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The entries of a training log, for [`training_curves_figure`].

    Numbers that are not finite are left out: there is nothing to draw.

    Args:
        path (`str`): `trainer_state.json` of a checkpoint, or a JSON list like `trainer.state.log_history`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is neither of them; the message names the entry.
    """
    path = Path(path)
    content = read_json(path)
    where = "log_history" if isinstance(content, dict) else "the log"
    entries = content.get("log_history") if isinstance(content, dict) else content
    try:
        if not isinstance(entries, list) or not 1 <= len(entries) <= _MOST_ENTRIES:
            raise wrong(where, "a list of log entries", entries)
        for index, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise wrong(f"{where}[{index}]", "an object", entry)
            if not isinstance(entry.get("epoch", 0), (int, float, type(None))):
                raise wrong(f"{where}[{index}].epoch", "a number", entry["epoch"])
        if not any("epoch" in entry for entry in entries):
            raise ValueError("no entry has an epoch.")
    except ValueError as error:
        raise ValueError(
            f"{path} is not the log of a training run: {error} Give the trainer_state.json of a checkpoint, or a "
            "list like `trainer.state.log_history`."
        ) from error
    return [{name: value for name, value in entry.items() if _is_number(value)} for entry in entries]


def _is_number(value: Any) -> bool:
    # An integer that no float holds is no figure of a training run.
    return isinstance(value, (int, float)) and abs(value) < 1e300 and math.isfinite(value)
