"""What a data set is called, so that others can find it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypedDict

import datasets
from torch.utils.data import Subset

from .dataset import PixelDataset
from .sources import ClassFolder
from .stream import PixelStream


class DataDescription(TypedDict):
    """Where data came from; `None` for what is not known.

    Keys: `name` (a data set on the Hub, the name of a folder, or `"digits"` of the quickstart), `kind` (`"hub"`,
    `"folder"`, `"quickstart"` or `"memory"`), `config`, `split` and `revision` of a data set on the Hub.
    """

    name: str | None
    kind: str
    config: str | None
    split: str | None
    revision: str | None


def describe_data(dataset: Any) -> DataDescription:
    """Describes what [`as_pixel_dataset`] takes or gives. Never a path of this machine, only a folder's name."""
    found: DataDescription = {"name": None, "kind": "memory", "config": None, "split": None, "revision": None}
    if isinstance(dataset, (PixelDataset, PixelStream)):
        dataset = dataset.source
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    if isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        info = dataset.info
        found["split"] = None if dataset.split is None else str(dataset.split)
        # Where its files came from tells the repository and the commit.
        urls = [str(url) for url in info.download_checksums or ()]
        sources = [match for match in (re.match(r"hf://datasets/([^@]+)@([^/]+)/", url) for url in urls) if match]
        if sources:
            found.update(name=sources[0][1], revision=sources[0][2], config=info.config_name, kind="hub")
        elif info.dataset_name:
            quickstart = info.dataset_name == "digits" and info.builder_name == "autolora_hf"
            found.update(name=info.dataset_name, kind="quickstart" if quickstart else "folder")
    elif isinstance(dataset, (ClassFolder, str, Path)):
        root = Path(dataset.root if isinstance(dataset, ClassFolder) else dataset).resolve()
        is_split = root.name in ("train", "training", "val", "validation", "test", "testing")
        found.update(name=root.parent.name if is_split else root.name, kind="folder")
        found["split"] = root.name if is_split else None
    return found
