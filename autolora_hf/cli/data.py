"""Where the commands get their images from."""

from __future__ import annotations

from pathlib import Path

import datasets

from ..data import load_shards, load_source
from ..quickstart import load_digits


def open_data(name: str, split: str | None) -> datasets.Dataset | datasets.IterableDataset | Path:
    """`"digits"` (the quickstart's, splits `train` and `test`), tar shards, or anything [`load_source`] takes."""
    if name.endswith(".tar"):
        if split is not None:
            raise ValueError(f"Tar shards have no splits: name those that you want instead of the split {split!r}.")
        return load_shards(name)
    if name != "digits":
        return load_source(name, split)
    if split not in ("train", "test"):
        raise ValueError(f"The digits have the splits 'train' and 'test': say which one, got {split!r}.")
    return load_digits()[split]
