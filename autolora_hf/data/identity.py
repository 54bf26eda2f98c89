"""Where the samples of a data set come from: which rows of which storage."""

from __future__ import annotations

from collections.abc import Hashable, Sized
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pyarrow as pa
from torch.utils.data import ConcatDataset, Subset
from torchvision.datasets import DatasetFolder


# For each storage that a data set shows samples of, the row of every sample, or -1 if it lies elsewhere. Two data sets
# share samples if they show a common row of one storage.
Identity = dict[Hashable, np.ndarray]


def arrow_identity(dataset: datasets.Dataset) -> Identity:
    """The rows that `dataset` shows: of the data set with its fingerprint, and of the memory its images lie in.

    Selections, shuffles, renamed and added columns share memory with the data set they were made of.
    """
    identity: Identity = {("fingerprint", dataset._fingerprint): np.arange(len(dataset))}
    features = dataset.features
    column = next((name for name in features if isinstance(features[name], datasets.Image)), next(iter(features)))
    addresses = [_addresses(chunk) for chunk in dataset.data.column(column).chunks]
    if addresses:
        rows = np.concatenate(addresses)
        identity["memory"] = rows if dataset._indices is None else rows[dataset._indices.column(0).to_numpy()]
    return identity


def map_identity(dataset: Any) -> Identity:
    """The rows that a map-style data set shows, through `Subset` and `ConcatDataset`."""
    if isinstance(dataset, Subset):
        rows = np.asarray(dataset.indices, dtype=np.int64)
        return {key: known[rows] for key, known in map_identity(dataset.dataset).items()}
    if isinstance(dataset, ConcatDataset):
        merged: Identity = {}
        start = 0
        for part in dataset.datasets:
            for key, rows in map_identity(part).items():
                merged.setdefault(key, np.full(len(dataset), -1))[start : start + len(cast(Sized, part))] = rows
            start += len(cast(Sized, part))
        return merged
    if isinstance(dataset, datasets.Dataset):
        return arrow_identity(dataset)
    if hasattr(dataset, "source_identity"):  # a PixelDataset
        return dataset.source_identity
    key = str(Path(dataset.root).resolve()) if isinstance(dataset, DatasetFolder) else id(dataset)
    return {key: np.arange(len(dataset))}


def _addresses(chunk: pa.Array) -> np.ndarray:
    """An integer a row that is equal for two arrays only where they are views of the same memory."""
    while isinstance(chunk, pa.ExtensionArray) or pa.types.is_struct(chunk.type):
        if isinstance(chunk, pa.ExtensionArray):
            chunk = chunk.storage
        else:
            fields = [chunk.field(i) for i in range(chunk.type.num_fields)]
            chunk = next((field for field in fields if field.null_count < len(field)), fields[0])
    # The first buffer tells which values are missing; the next holds a byte or more a row.
    buffer = next((buffer for buffer in chunk.buffers()[1:] if buffer is not None), None)
    if buffer is None:
        return np.full(len(chunk), -1)
    return buffer.address + chunk.offset + np.arange(len(chunk))
