"""What a data set is called, so that others can find it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypedDict

import datasets
from torch.utils.data import Subset

from .dataset import PixelDataset
from .folders import ClassFolder
from .stream import PixelStream
from .stream_sources import stages


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
    if isinstance(dataset, datasets.IterableDataset):
        leaves = [stage for stage in stages(dataset._ex_iterable) if hasattr(stage, "kwargs")]
        shards = [shard for leaf in leaves for shard in leaf.kwargs.get("shards", ())]
        if shards and all(isinstance(shard, datasets.Dataset) for shard in shards):
            dataset = shards[0]  # made with `to_iterable_dataset`
        else:
            return _describe_stream(dataset, leaves, found)
    if isinstance(dataset, datasets.Dataset):
        info = dataset.info
        found["split"] = None if dataset.split is None else str(dataset.split)
        # Where its files came from tells the repository and the commit.
        if not _is_on_hub(map(str, info.download_checksums or ()), info, found) and info.dataset_name:
            quickstart = info.dataset_name == "digits" and info.builder_name == "autolora_hf"
            found.update({"name": info.dataset_name, "kind": "quickstart" if quickstart else "folder"})
    elif isinstance(dataset, (ClassFolder, str, Path)):
        folder = _describe_folder(Path(dataset.root if isinstance(dataset, ClassFolder) else dataset).resolve())
        found.update({"name": folder["name"], "kind": folder["kind"], "split": folder["split"]})
    return found


def _describe_stream(dataset: datasets.IterableDataset, leaves: list[Any], found: DataDescription) -> DataDescription:
    """A stream says nothing about its files but to those that read them: the first stages, `leaves`."""
    info = dataset.info
    # What a generator is given is no file.
    files = [] if info.builder_name in (None, "generator") else [f for leaf in leaves for f in _files(leaf.kwargs)]
    if not files:
        return found
    found["split"] = None if dataset.split is None else str(dataset.split)
    if _is_on_hub(files, info, found):
        return found
    if info.dataset_name != info.builder_name:
        found.update({"name": info.dataset_name, "kind": "folder"})
        return found
    # Loaded by a format ("webdataset"), with files that have no other name than their folder. The format's own name
    # for the split, "train", says nothing. With a root even addresses and paths have something in common.
    folder = _describe_folder(Path(os.path.commonpath(["/" + os.path.dirname(file) for file in files])))
    split = None if found["split"] == "train" else found["split"]
    found.update({"name": folder["name"] or None, "kind": "folder", "split": folder["split"] or split})
    return found


def _describe_folder(root: Path) -> dict[str, Any]:
    is_split = root.name in ("train", "training", "val", "validation", "test", "testing")
    return {
        "name": root.parent.name if is_split else root.name,
        "kind": "folder",
        "split": root.name if is_split else None,
    }


def _is_on_hub(files: Iterable[str], info: datasets.DatasetInfo, found: DataDescription) -> bool:
    """Whether one of the files is on the Hub, whose repository and commit are then in `found`."""
    matches = (re.match(r"hf://datasets/([^@]+)@([^/]+)/", file) for file in files)
    match = next((match for match in matches if match), None)
    if match:
        found.update({"name": match[1], "revision": match[2], "config": info.config_name, "kind": "hub"})
    return match is not None


def _files(value: Any) -> Iterator[str]:
    """Paths and addresses in what a stage of a stream is given: `files`, `tar_paths` and the like."""
    if isinstance(value, str):
        if "/" in value or os.sep in value:
            yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _files(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _files(inner)
