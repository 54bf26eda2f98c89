"""Images as they are stored, before decoding and augmentation: what tells whether two of them are the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence, Sized
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset
from torchvision.datasets import DatasetFolder

from ..progress import progress_bar
from .images import BrokenImageError, decode_file, decode_image, to_rgb


# Sizes of images that are no bytes of a file, and of those that are missing or empty.
NOT_ENCODED, ABSENT = 0, -1

# The last bytes of compressed files differ where the files do, so that only true copies are read as a whole.
_TAIL = 4096


class StoredImages:
    """Images by row. The base class is for those that only the data set itself can make.

    Args:
        read: Gives the decoded image of a row.
        count (`int`): Number of rows.
    """

    _is_opaque = True

    def __init__(self, read: Any, count: int) -> None:
        self._read, self._count = read, count

    @cached_property
    def sizes(self) -> np.ndarray:
        """Bytes of every image file, `NOT_ENCODED` or `ABSENT`."""
        return np.full(self._count, NOT_ENCODED)

    @property
    def opaque(self) -> np.ndarray:
        """Which images can only be had by reading an item of the data set, with whatever it does to its images."""
        return np.full(len(self.sizes), self._is_opaque)

    def encoded(self, row: int, last: int | None = None) -> Any:
        """The bytes of an image file, or the last ones of them."""
        raise NotImplementedError

    def image(self, row: int) -> Any:
        """The decoded image: PIL, array or tensor. Raises `BrokenImageError` if it is broken."""
        return self._read(row)

    def shape(self, row: int) -> tuple[int, int]:
        """Short and long side in pixels, of encoded images from the header alone. (0, 0) if it cannot be read."""
        try:
            image = self._opened(row)
            height, width = image.size if isinstance(image, Image.Image) else _image_axes(image.shape)
        except Exception:  # broken images, and items that are no images at all
            return (0, 0)
        return (min(height, width), max(height, width))

    def path(self, row: int) -> str | None:
        """The file of an image, if it has one."""
        return None

    def _opened(self, row: int) -> Any:
        return self.image(row)


class _Files(StoredImages):
    _is_opaque = False

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths

    @cached_property
    def sizes(self) -> np.ndarray:
        return np.array([_file_size(path) for path in self._paths], dtype=np.int64)

    def encoded(self, row: int, last: int | None = None) -> bytes:
        with open(self._paths[row], "rb") as file:
            if last is not None:
                file.seek(max(0, self.sizes[row] - last))
            return file.read()

    def image(self, row: int) -> Image.Image:
        return decode_file(self._paths[row])

    def path(self, row: int) -> str:
        return self._paths[row]

    def _opened(self, row: int) -> Image.Image:
        with open(self._paths[row], "rb") as file:
            return Image.open(file)


class _ArrowFiles(StoredImages):
    """A column of feature `Image`: bytes of image files, or their paths."""

    _is_opaque = False

    def __init__(self, dataset: datasets.Dataset, column: str) -> None:
        self._rows = None if dataset._indices is None else dataset._indices.column(0).to_numpy()
        self._chunks = [_bytes_and_paths(chunk) for chunk in dataset.data.column(column).chunks]
        self._starts = np.cumsum([0, *(len(chunk[0]) for chunk in self._chunks)])

    @cached_property
    def sizes(self) -> np.ndarray:
        parts = []
        for data, paths in self._chunks:
            lengths = pc.fill_null(pc.binary_length(data), 0).to_numpy(zero_copy_only=False).astype(np.int64)
            lengths = np.where(lengths == 0, ABSENT, lengths)
            for row in np.flatnonzero(data.is_null().to_numpy(zero_copy_only=False)):
                path = paths[row].as_py()
                lengths[row] = ABSENT if path is None else NOT_ENCODED if "://" in path else _file_size(path)
            parts.append(lengths)
        sizes = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        return sizes if self._rows is None else sizes[self._rows]

    def encoded(self, row: int, last: int | None = None) -> Any:
        data, path = self._at(row)
        if data.is_valid:
            view = memoryview(data.as_buffer())
            return view if last is None else view[-last:]
        return _Files([cast(str, path)]).encoded(0, last)

    def image(self, row: int) -> Image.Image:
        data, path = self._at(row)
        if data.is_valid:
            return decode_image(data.as_py())
        if path is None:
            raise BrokenImageError("there is no image (null)")
        return decode_file(path)

    def path(self, row: int) -> str | None:
        data, path = self._at(row)
        return None if data.is_valid else path

    def _opened(self, row: int) -> Image.Image:
        data, path = self._at(row)
        return Image.open(pa.BufferReader(data.as_buffer())) if data.is_valid else _Files([cast(str, path)])._opened(0)

    def _at(self, row: int) -> tuple[pa.Scalar, str | None]:
        row = row if self._rows is None else self._rows[row]
        chunk = int(np.searchsorted(self._starts, row, side="right")) - 1
        data, paths = (column[int(row - self._starts[chunk])] for column in self._chunks[chunk])
        return data, paths.as_py()


class _Arrays(StoredImages):
    """One array or tensor of all images, as data sets of torchvision keep it in `data`, before their transforms."""

    _is_opaque = False

    def __init__(self, images: np.ndarray | Tensor) -> None:
        self._images = images

    @cached_property
    def sizes(self) -> np.ndarray:
        return np.full(len(self._images), NOT_ENCODED)

    def image(self, row: int) -> np.ndarray | Tensor:
        return self._images[row]


class StoredRows(StoredImages):
    """Rows of one or of several parts, in any order."""

    def __init__(self, parts: list[StoredImages], rows: list[np.ndarray]) -> None:
        self._parts = parts
        self._part = np.repeat(np.arange(len(parts)), [len(chosen) for chosen in rows])
        self._row = np.concatenate(rows) if rows else np.zeros(0, np.int64)

    @cached_property
    def sizes(self) -> np.ndarray:
        return self._gathered("sizes", np.int64)

    @property
    def opaque(self) -> np.ndarray:
        return self._gathered("opaque", bool)

    def encoded(self, row: int, last: int | None = None) -> Any:
        return self._parts[self._part[row]].encoded(int(self._row[row]), last)

    def image(self, row: int) -> Any:
        return self._parts[self._part[row]].image(int(self._row[row]))

    def path(self, row: int) -> str | None:
        return self._parts[self._part[row]].path(int(self._row[row]))

    def _opened(self, row: int) -> Any:
        return self._parts[self._part[row]]._opened(int(self._row[row]))

    def _gathered(self, name: str, dtype: Any) -> np.ndarray:
        found = np.zeros(len(self._row), dtype)
        for number, part in enumerate(self._parts):
            mine = self._part == number
            found[mine] = getattr(part, name)[self._row[mine]]
        return found


def stored_images(dataset: Any, image_column: str, read: Any) -> StoredImages:
    """The images of a data set as they are stored, through `Subset` and `ConcatDataset`.

    Args:
        dataset: A `datasets.Dataset` or a map-style data set.
        image_column (`str`): Where the images are, if it has columns.
        read: Gives the image of a row of `dataset`, for data sets that do not say how they store images.
    """
    if isinstance(dataset, Subset):
        rows = np.asarray(dataset.indices, dtype=np.int64)
        parent = dataset.dataset
        return StoredRows(
            [stored_images(parent, image_column, lambda row: item_image(parent[row], image_column))], [rows]
        )
    if isinstance(dataset, ConcatDataset):
        parts = [
            stored_images(part, image_column, lambda row, part=part: item_image(part[row], image_column))
            for part in dataset.datasets
        ]
        return StoredRows(parts, [np.arange(len(cast(Sized, part))) for part in dataset.datasets])
    if isinstance(dataset, datasets.Dataset):
        if isinstance(dataset.features.get(image_column), datasets.Image):
            files = _ArrowFiles(dataset, image_column)
            if not (files.sizes == NOT_ENCODED).any():  # some are somewhere on the network
                return files
    elif hasattr(dataset, "stored"):  # a PixelDataset
        return dataset.stored
    elif isinstance(dataset, DatasetFolder):
        return _Files([path for path, _ in dataset.samples])
    else:
        images: Any = dataset.tensors[0] if isinstance(dataset, TensorDataset) else getattr(dataset, "data", None)
        known = isinstance(images, (np.ndarray, Tensor)) and images.ndim in (3, 4) and len(images) == len(dataset)
        if known and (isinstance(dataset, TensorDataset) or str(images.dtype).endswith("uint8")):
            return _Arrays(images)
    return StoredImages(read, len(dataset))


def file_digests(stored: StoredImages, rows: np.ndarray, whole: bool) -> np.ndarray:
    """64 bits of a hash of the image files of `rows`: of all their bytes, or of their size and last bytes."""
    found = np.zeros(len(rows), np.uint64)
    for i, row in enumerate(progress_bar(rows, title="comparing image files", unit="image")):
        content = stored.encoded(int(row), None if whole else _TAIL)
        found[i] = digest(content, int(stored.sizes[row]))
    return found


def pixel_digest(image: Any) -> int:
    """64 bits of a hash of an image in 8-bit RGB, whatever it is stored as.

    Raises:
        Exception: If it cannot be converted.
    """
    if isinstance(image, Tensor):
        image = image.detach().cpu().numpy()
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            if not np.isfinite(image).all():
                raise ValueError("not finite")
            image = (image.astype(np.float32) * 255).round().clip(0, 255).astype(np.uint8)
        if image.ndim == 3 and image.shape[0] in (1, 3) and image.shape[-1] not in (1, 3, 4):
            image = np.moveaxis(image, 0, -1)
        if image.ndim == 3 and image.shape[-1] == 1:
            image = image[..., 0]
        image = Image.fromarray(np.ascontiguousarray(image))
    image = to_rgb(image)
    return digest(image.tobytes(), *image.size)


def digest(content: Any, *numbers: int) -> int:
    """A hash of 64 bits of some bytes and numbers."""
    found = hashlib.blake2b(content, digest_size=8)
    found.update(repr(numbers).encode())
    return int.from_bytes(found.digest(), "little")


def item_image(item: Any, image_column: str) -> Any:
    """The image of an item of a data set: a dictionary, a tuple whose first entry it is, or the image itself."""
    if isinstance(item, Mapping):
        return item[image_column]
    return item[0] if isinstance(item, (tuple, list)) else item


def _file_size(path: str) -> int:
    try:
        return Path(path).stat().st_size or ABSENT
    except OSError:
        return ABSENT


def _bytes_and_paths(chunk: pa.Array) -> tuple[pa.Array, pa.Array]:
    if isinstance(chunk, pa.ExtensionArray):
        chunk = chunk.storage
    fields = dict(zip([field.name for field in chunk.type], chunk.flatten(), strict=True))
    return fields["bytes"], fields["path"]


def _image_axes(shape: Sequence[int]) -> Sequence[int]:
    if len(shape) == 3:
        return shape[:2] if shape[-1] in (1, 3, 4) else shape[1:]
    return shape
