"""Where the commands get their images from."""

from __future__ import annotations

from pathlib import Path

import datasets

from ..data import load_source
from ..quickstart import load_digits


def open_data(name: str, split: str | None) -> datasets.Dataset | Path:
    """`"digits"` (the quickstart's, splits `train` and `test`) or anything [`load_source`] takes."""
    if name != "digits":
        return load_source(name, split)
    if split not in ("train", "test"):
        raise ValueError(f"The digits have the splits 'train' and 'test': say which one, got {split!r}.")
    return load_digits()[split]
