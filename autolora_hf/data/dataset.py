"""`PixelDataset`: any source of labelled images as pixels in [0, 1]."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ..pixels import Preprocessing, check_pixels
from .images import Augmentation, PixelTransform
from .sources import ArrowSource, ClassFolder, Identity, MapSource, as_label


class PixelDataset(Dataset):
    """Labelled images as float pixels. Made by [`as_pixel_dataset`].

    Items are `{"pixel_values": float32 tensor 3 x H x W in [0, 1], "labels": int}`.

    Attributes:
        name (`str`): What messages call the data.
        preprocessing (`Preprocessing`): Size, filter and crop of the images.
        augmentation (`str`): See [`PixelTransform`].
    """

    def __init__(
        self,
        source: ArrowSource | MapSource,
        preprocessing: Preprocessing,
        augmentation: Augmentation,
        name: str,
        indices: np.ndarray | None = None,
    ) -> None:
        self.name = name
        self.preprocessing = preprocessing
        self.augmentation = augmentation
        self._source = source
        self._indices = np.arange(len(source)) if indices is None else indices
        self._transform = PixelTransform(preprocessing, augmentation)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        row = int(self._indices[index])
        image_name = f"{self._source.image_column}[{row}] of {self.name}"
        try:
            image, label = self._source.read(row)
            pixels = self._transform(image, image_name)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # what PIL raises for broken files
            raise ValueError(f"`{image_name}` cannot be read: {error}") from error
        return {
            "pixel_values": pixels,
            "labels": as_label(label, f"{self._source.label_column}[{row}] of {self.name}"),
        }

    @property
    def labels(self) -> list[int]:
        """The class index of every sample, read without decoding images where the source allows it."""
        known = self._source.labels
        return [known[row] for row in self._indices]

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes in the order of their indices, if the source has them."""
        return self._source.class_names

    @property
    def source(self) -> Any:
        """The data set it was made of."""
        return self._source.dataset

    @property
    def num_classes(self) -> int:
        """Number of class names, else one more than the largest label of the whole source."""
        return len(self.class_names) if self.class_names else max(self._source.labels) + 1

    @property
    def source_identity(self) -> Identity:
        """Which rows of which storage the samples are; see [`same_data`]."""
        return {key: rows[self._indices] for key, rows in self._source.identity.items()}

    def select(self, indices: Iterable[int], augmentation: Augmentation | None = None) -> PixelDataset:
        """A view of some samples, optionally with another augmentation.

        Raises:
            IndexError: If an index is not in 0 .. `len(self)` - 1.
        """
        chosen = np.asarray(list(indices), dtype=np.int64)
        if len(chosen) and not 0 <= chosen.min() <= chosen.max() < len(self):
            raise IndexError(
                f"Indices of {self.name} must be in 0 .. {len(self) - 1}, got {chosen.min()} .. {chosen.max()}."
            )
        augmentation = self.augmentation if augmentation is None else augmentation
        return PixelDataset(self._source, self.preprocessing, augmentation, self.name, self._indices[chosen])


def as_pixel_dataset(
    source: Any,
    preprocessing: Preprocessing,
    *,
    augmentation: Augmentation = "none",
    image_column: str | None = None,
    label_column: str | None = None,
    name: str = "dataset",
) -> PixelDataset:
    """Makes a [`PixelDataset`] of any source of labelled images.

    Args:
        source: A `datasets.Dataset`; the path of a folder with one sub-folder of images a class; a map-style torch
            data set with items `(image, label)` or dictionaries; or a `PixelDataset`, which is returned as it is.
            Images: see [`PixelTransform`].
        preprocessing (`Preprocessing`): What the model wants; see `AutoLoraModel.preprocessing`.
        augmentation (`str`): `"none"`, `"crop"` or `"crop-flip"`; see [`PixelTransform`].
        image_column (`str`, *optional*): Column of the image; found by type, then by name when left out.
        label_column (`str`, *optional*): Column of the label, likewise.
        name (`str`): What to call the data in messages, for instance "train".

    Raises:
        TypeError: For streams, sources of another kind, and items that are no pairs or dictionaries.
        ValueError: For a `DatasetDict`, empty data, missing or ambiguous columns, and a `PixelDataset` made for
            another image size or crop.
        FileNotFoundError: For a folder that does not exist or holds no images.
    """
    if isinstance(source, PixelDataset):
        if _geometry(source.preprocessing) != _geometry(preprocessing):
            raise ValueError(
                f"{source.name} was made for {source.preprocessing}, but {preprocessing} is needed. Make it anew "
                "with the model's `preprocessing`, or pass the data it was made of."
            )
        return source
    if isinstance(source, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        raise ValueError(
            f"Got a {type(source).__name__} with the splits {', '.join(map(str, source))}: pick one, for instance "
            f"`dataset[{next(iter(source), 'train')!r}]`."
        )
    if isinstance(source, (datasets.IterableDataset, IterableDataset)):
        raise TypeError(
            f"Got a stream ({type(source).__name__}); streams are not supported: holding out a validation split and "
            "checking the labels need random access. Load the data without `streaming=True`, or give a data set with "
            "`__len__` and `__getitem__`."
        )
    if isinstance(source, (str, Path)):
        source = ClassFolder(source)
    if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        raise TypeError(
            "`source` must be a `datasets.Dataset`, a folder of images by class or a torch data set with `__len__` "
            f"and `__getitem__`, got {type(source).__name__}."
        )
    if len(source) == 0:
        raise ValueError(f"{name} is empty.")
    # Rows of a data set with `set_transform` are whatever the transform returns.
    is_plain = isinstance(source, datasets.Dataset) and source.format["type"] != "custom"
    reader = (ArrowSource if is_plain else MapSource)(source, image_column, label_column)
    return PixelDataset(reader, preprocessing, augmentation, name)


def same_data(first: PixelDataset, second: PixelDataset) -> bool:
    """Whether two data sets have samples in common.

    Samples are compared by where they come from, not by content: the fingerprint and row of a `datasets.Dataset` and
    the memory it shares with its selections and shuffles; the path and row of a folder; the object and row of a torch
    data set, through `Subset` and `ConcatDataset`.
    """
    if first is second:
        return True
    one, other = first.source_identity, second.source_identity
    return any(np.intersect1d(one[key][one[key] >= 0], other[key]).size > 0 for key in one.keys() & other.keys())


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Stacks items of a [`PixelDataset`] to `{"pixel_values": N x 3 x H x W, "labels": int64 N}`.

    Raises:
        TypeError: If the pixels are no float tensors.
        ValueError: If the pixels leave [0, 1] or are not finite.
    """
    pixels = torch.stack([item["pixel_values"] for item in items])
    check_pixels(pixels, "pixel_values")
    return {"pixel_values": pixels, "labels": torch.tensor([item["labels"] for item in items], dtype=torch.long)}


def _geometry(preprocessing: Preprocessing) -> tuple[Any, ...]:
    return tuple(getattr(preprocessing, field) for field in ("image_size", "interpolation", "crop_pct", "crop_mode"))
