"""`PixelDataset`: any source of labelled images as pixels in [0, 1]."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ..pixels import Preprocessing, check_pixels
from .folders import ClassFolder
from .identity import Identity
from .images import Augmentation, BrokenImageError, PixelTransform, seeded
from .sources import ArrowSource, MapSource, as_label
from .splits import stratified_subset
from .stored import StoredImages, StoredRows, stored_images


BrokenImages = Literal["skip", "raise"]


class PixelDataset(Dataset):
    """Labelled images as float pixels. Made by [`as_pixel_dataset`].

    Items are `{"pixel_values": float32 tensor 3 x H x W in [0, 1], "labels": int}`. What is random about an item (the
    augmentation, and transforms of the source that draw from torch's global generator) depends on seed, epoch and row
    alone: not on the number of worker processes or ranks, nor on what was read before.

    Attributes:
        name (`str`): What messages call the data.
        preprocessing (`Preprocessing`): Size, filter and crop of the images.
        augmentation (`str`): See [`PixelTransform`].
        seed (`int`): Of the augmentation.
        broken_images (`str`): `"raise"`: reading a broken image is an error. `"skip"`: the next image of the same
            class, in the order of the rows, takes its place; which ones were broken is known to `broken`.
    """

    def __init__(
        self,
        source: ArrowSource | MapSource,
        preprocessing: Preprocessing,
        augmentation: Augmentation,
        name: str,
        indices: np.ndarray | None = None,
        *,
        seed: int = 0,
        broken_images: BrokenImages = "raise",
        broken: Tensor | None = None,
    ) -> None:
        if broken_images not in get_args(BrokenImages):
            raise ValueError(f"`broken_images` must be 'skip' or 'raise', got {broken_images!r}.")
        self.name = name
        self.preprocessing = preprocessing
        self.augmentation = augmentation
        self.seed = seed
        self.broken_images = broken_images
        self._source = source
        self._indices = np.arange(len(source)) if indices is None else indices
        self._transform = PixelTransform(preprocessing, augmentation)
        # In shared memory: worker processes hold copies of this object for as long as they live.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._broken = torch.zeros(len(source), dtype=torch.bool).share_memory_() if broken is None else broken

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = int(self._indices[index])
        key = (self.seed, int(self._epoch), row)
        try:
            return self._read(row, key)
        except BrokenImageError:
            if self.broken_images == "raise":
                raise
            self._broken[row] = True
            return self._substitute(index, key)

    def _read(self, row: int, key: tuple[int, ...]) -> dict[str, Tensor | int]:
        image_name = f"{self._source.image_column}[{row}] of {self.name}"
        with seeded(*key):
            try:
                image, label = self._source.read(row)
            except BrokenImageError as error:
                raise BrokenImageError(f"`{image_name}` cannot be read: {error}") from error
            except OSError as error:
                raise OSError(error.errno, f"`{image_name}` cannot be read: {error}") from error
            pixels = self._transform(image, image_name)
        return {
            "pixel_values": pixels,
            "labels": as_label(label, f"{self._source.label_column}[{row}] of {self.name}"),
        }

    def _substitute(self, index: int, key: tuple[int, ...]) -> dict[str, Tensor | int]:
        """The next readable image of the same class: the same one in every process and every run."""
        labels, count = self._source.labels, len(self)
        label = labels[self._indices[index]]
        for step in range(1, count):
            row = int(self._indices[(index + step) % count])
            if labels[row] != label or self._broken[row]:
                continue
            try:
                return self._read(row, key)
            except BrokenImageError:
                self._broken[row] = True
        raise BrokenImageError(
            f"None of the images of class {label} of {self.name} can be read, for instance "
            f"{self.image_name(index)}. Mend or remove them, or leave the class out."
        )

    def set_epoch(self, epoch: int) -> None:
        """Chooses the augmentation of an epoch, in this process and in worker processes that are already running."""
        self._epoch[0] = epoch

    @property
    def broken(self) -> list[int]:
        """Positions of the images found to be broken so far, by this process or its workers."""
        return np.flatnonzero(self._broken.numpy()[self._indices]).tolist()

    @cached_property
    def stored(self) -> StoredImages:
        """The images as they are stored, by position."""
        source = self._source
        everything = stored_images(source.dataset, source.image_column, lambda row: source.read(row)[0])
        return StoredRows([everything], [self._indices])

    def image_name(self, index: int) -> str:
        """Column and row of an image, with its file if it has one."""
        path = self.stored.path(index)
        name = f"{self._source.image_column}[{int(self._indices[index])}]"
        return name if path is None else f"{name} ({path})"

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
        """Which rows of which storage the samples are; see [`find_overlap`]."""
        return {key: rows[self._indices] for key, rows in self._source.identity.items()}

    def select(
        self,
        indices: Iterable[int],
        augmentation: Augmentation | None = None,
        broken_images: BrokenImages | None = None,
    ) -> PixelDataset:
        """A view of some samples, optionally with another augmentation or another way with broken images.

        Raises:
            IndexError: If an index is not in 0 .. `len(self)` - 1.
        """
        chosen = np.asarray(list(indices), dtype=np.int64)
        if len(chosen) and not 0 <= chosen.min() <= chosen.max() < len(self):
            raise IndexError(
                f"Indices of {self.name} must be in 0 .. {len(self) - 1}, got {chosen.min()} .. {chosen.max()}."
            )
        return PixelDataset(
            self._source,
            self.preprocessing,
            self.augmentation if augmentation is None else augmentation,
            self.name,
            self._indices[chosen],
            seed=self.seed,
            broken_images=self.broken_images if broken_images is None else broken_images,
            broken=self._broken,
        )

    def bounded(self, size: int, seed: int = 0) -> PixelDataset:
        """`size` samples in proportion to the classes; all of them if there are no more."""
        return self if len(self) <= size else self.select(stratified_subset(self.labels, size, seed))


def as_pixel_dataset(
    source: Any,
    preprocessing: Preprocessing,
    *,
    augmentation: Augmentation = "none",
    image_column: str | None = None,
    label_column: str | None = None,
    name: str = "dataset",
    seed: int = 0,
    broken_images: BrokenImages = "raise",
    labelled: bool = True,
) -> PixelDataset:
    """Makes a [`PixelDataset`] of any source of labelled images.

    Args:
        source: A `datasets.Dataset`; the path of a folder with one sub-folder of images a class; a map-style torch
            data set with items `(image, label)` or dictionaries; or a `PixelDataset`, which is returned as it is.
            Images: see [`PixelTransform`].
        preprocessing (`Preprocessing`): What the model wants; see `AutoLoraModel.preprocessing`.
        augmentation (`str`): `"none"`, `"crop"`, `"crop-flip"` or `"wide-crop-flip"`; see [`PixelTransform`].
        image_column (`str`, *optional*): Column of the image; found by type, then by name when left out.
        label_column (`str`, *optional*): Column of the label, likewise.
        name (`str`): What to call the data in messages, for instance "train".
        seed (`int`): Of the augmentation.
        broken_images (`str`): `"raise"` or `"skip"`; see [`PixelDataset`].
        labelled (`bool`): Whether labels are read. If not, there may be none (a folder of images without sub-folders,
            a data set of images alone), those that there are play no part, and every label is 0.

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
        # Tar shards have no other way of loading.
        is_tar = "__url__" in (getattr(source, "features", None) or {})
        instead = (
            "unpack the tar shards into a folder of images by class" if is_tar else "load it without `streaming=True`"
        )
        raise TypeError(
            f"Got a stream ({type(source).__name__}) where every image must be had by its position: test data cannot "
            "be a stream. `AutoLoraTrainer` takes streams as training and validation data, and `as_pixel_stream` "
            f"opens one. To measure on it, {instead}, or in Python keep its first n samples in memory: "
            "`datasets.Dataset.from_list(list(stream.take(n)), features=stream.features)`; of a torch "
            "`IterableDataset`: `list(itertools.islice(stream, n))`."
        )
    if isinstance(source, (str, Path)):
        source = ClassFolder(source, labelled)
    if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        raise TypeError(
            "`source` must be a `datasets.Dataset`, a folder of images by class or a torch data set with `__len__` "
            f"and `__getitem__`, got {type(source).__name__}."
        )
    if len(source) == 0:
        raise ValueError(f"{name} is empty.")
    # Rows of a data set with `set_transform` are whatever the transform returns.
    is_plain = isinstance(source, datasets.Dataset) and source.format["type"] != "custom"
    reader = (ArrowSource if is_plain else MapSource)(source, image_column, label_column, labelled)
    return PixelDataset(reader, preprocessing, augmentation, name, seed=seed, broken_images=broken_images)


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
