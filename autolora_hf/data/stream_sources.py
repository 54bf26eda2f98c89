"""Where the samples of a stream come from, undecoded: `datasets.IterableDataset` and torch `IterableDataset`."""

from __future__ import annotations

import itertools
import logging
import tarfile
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import datasets
import numpy as np
from datasets.iterable_dataset import BufferShuffledExamplesIterable, RepeatExamplesIterable
from torch.utils.data import IterableDataset

from .images import check_readable
from .sources import (
    LABEL_NAMES,
    as_label,
    class_names_of,
    decode_stored,
    item_columns,
    typed_columns,
    typed_image_column,
    value_type,
)
from .stored import digest, item_image, pixel_digest


logger = logging.getLogger(__name__)

# Tar shards in the format of webdataset keep the class in files `<key>.cls`.
STREAM_LABEL_NAMES = (*LABEL_NAMES, "cls")

# A stream that gives more samples than this will never end.
MOST_SAMPLES = 100_000_000
_REPORT_EVERY = 100_000
# How many samples are read a second time, to see whether a stream can be.
_PROBE = 8
# What reading a tar file that was cut off or overwritten raises, compressed or not.
_DAMAGED = (tarfile.TarError, EOFError, zlib.error)


class Row(NamedTuple):
    """One sample as the stream gives it; `key` is what messages call it, `shard` the tar file it is in, if any."""

    image: Any
    label: Any
    key: str
    shard: str | None = None


@dataclass(frozen=True)
class Scan:
    """What one pass over a stream found.

    Args:
        labels (`np.ndarray`): int64, one class index a sample.
        contents (`np.ndarray`): uint64, the hash of each image; see [`content_hash`].
        repeats (`bool`): Whether another pass gives the same images, as far as a few of them show.
    """

    labels: np.ndarray
    contents: np.ndarray
    repeats: bool


class ArrowStream:
    """Images and labels of a `datasets.IterableDataset`. Images come as the bytes or path that are stored.

    Args:
        dataset (`datasets.IterableDataset`): Its format is ignored.
        image_column (`str`, *optional*), label_column (`str`, *optional*): As in `ArrowSource`; a label column may
            also be called cls.

    Raises:
        ValueError: If a column is missing or ambiguous, the stream is empty, has no end, or was split by node.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        image_column: str | None,
        label_column: str | None,
        labelled: bool = True,
    ) -> None:
        self.dataset = dataset
        self.label_column = label_column
        self._labelled = labelled
        if dataset._distributed is not None:
            raise ValueError(
                "The stream was split with `split_dataset_by_node`, so each process would see another part of it. "
                "Pass the whole stream: the trainer itself spreads every batch over the processes."
            )
        parts = list(stages(dataset._ex_iterable))
        if any(isinstance(part, RepeatExamplesIterable) and part.num_times is None for part in parts):
            raise ValueError(
                "The stream has no end: it was made with `repeat(None)`. Training counts epochs, so pass the stream "
                "without `repeat`; `num_train_epochs` says how often it is read."
            )
        self.is_shuffled = any(isinstance(part, BufferShuffledExamplesIterable) for part in parts)
        features = dataset.features
        known = features if features is not None else dict.fromkeys(_first_item(dataset))
        if labelled:
            self.image_column, self.label_column = typed_columns(known, image_column, label_column, STREAM_LABEL_NAMES)
        else:
            self.image_column = typed_image_column(known, image_column)
        self.class_names = getattr(known[self.label_column], "names", None) if labelled else None
        feature = known[self.image_column]
        is_image = isinstance(feature, datasets.Image)
        self._feature = feature if is_image else datasets.Image()
        self._value_type = None if is_image else value_type(feature)
        needed = (self.image_column, *([self.label_column] if labelled else []), "__key__", "__url__")
        columns = [name for name in needed if name in known]
        # Whatever may be shuffled in a buffer stays encoded.
        plain = dataset if features is None else dataset.decode(False)
        self._rows = plain.with_format(None).select_columns(columns)

    def rows(self, epoch: int = 0, seed: int | None = None, buffer_size: int = 1) -> Iterator[Row]:
        """One pass; with a `seed` shuffled, differently in each `epoch`, unless the stream shuffles by itself.

        Raises:
            ValueError: If a tar shard is damaged, with its path.
        """
        if seed is None:
            rows = self._rows
        elif self.is_shuffled:
            rows = self._rows.with_format(None)  # a copy, with an epoch of its own
            rows.set_epoch(epoch)
        else:
            rows = self._rows.shuffle(seed=seed, buffer_size=buffer_size)
            rows.set_epoch(epoch)
        try:
            for position, row in enumerate(rows):
                image = row[self.image_column]
                if isinstance(image, list):
                    image = np.asarray(image, dtype=self._value_type)
                label = row[self.label_column] if self._labelled else 0
                yield Row(image, label, row.get("__key__", str(position)), row.get("__url__"))
        except _DAMAGED as error:
            raise _damaged(", ".join(_damaged_shards(self.dataset)) or "a shard", error) from error

    def decode(self, image: Any) -> Any:
        """The image that the stored form stands for.

        Raises:
            BrokenImageError: If it is missing or broken.
        """
        return decode_stored(image, self._feature) if image is None or isinstance(image, Mapping) else image


class TorchStream:
    """Images and labels of a torch `IterableDataset` whose items are `(image, label)` or dictionaries.

    Args:
        dataset (`IterableDataset`): One that has a method `set_epoch` is taken to shuffle by itself.
        image_column (`str`, *optional*), label_column (`str`, *optional*): As in `MapSource`; the key of a label may
            also be cls.

    Raises:
        ValueError: If a key is missing or ambiguous, or the stream is empty.
        TypeError: If items are neither pairs nor dictionaries.
    """

    def __init__(
        self, dataset: IterableDataset, image_column: str | None, label_column: str | None, labelled: bool = True
    ) -> None:
        self.dataset = dataset
        self.label_column = label_column
        self._labelled = labelled
        self.is_shuffled = hasattr(dataset, "set_epoch")
        item = _first_item(dataset)
        self._by_key = isinstance(item, Mapping)
        if labelled:
            self.image_column, self.label_column = item_columns(
                item, image_column, label_column, "stream", STREAM_LABEL_NAMES
            )
        else:
            self.image_column = typed_image_column(dict.fromkeys(item), image_column) if self._by_key else "image"
        self.class_names = class_names_of(dataset, self.label_column) if labelled else None

    def rows(self, epoch: int = 0, seed: int | None = None, buffer_size: int = 1) -> Iterator[Row]:
        """See [`ArrowStream.rows`]."""
        if self.is_shuffled:
            cast(Any, self.dataset).set_epoch(epoch if seed is not None else 0)
        rows = (self._row(position, item) for position, item in enumerate(self.dataset))
        if seed is None or self.is_shuffled:
            return rows
        return _shuffled(rows, buffer_size, np.random.default_rng([seed, epoch]))

    def decode(self, image: Any) -> Any:
        """See [`ArrowStream.decode`]."""
        check_readable(image)
        return image

    def _row(self, position: int, item: Any) -> Row:
        if not self._labelled:
            image, label = item_image(item, self.image_column), 0
        else:
            image, label = (item[self.image_column], item[self.label_column]) if self._by_key else item
        key = item.get("__key__", position) if self._by_key else position
        return Row(image, label, str(key))


def scan_stream(source: ArrowStream | TorchStream, name: str) -> Scan:
    """Reads a stream once, without decoding images, for its labels and the hashes of its images.

    Raises:
        TypeError: For labels that are no integers.
        ValueError: If the stream is empty, does not end, or can be read only once.
    """
    logger.info("Reading %s once, without decoding images, to count its samples and check their labels.", name)
    labels, contents = array("q"), array("Q")
    for row in source.rows():
        labels.append(as_label(row.label, f"{source.label_column} of sample {row.key} of {name}"))
        contents.append(content_hash(row.image))
        count = len(labels)
        if count % _REPORT_EVERY == 0:
            logger.info("%s: %d samples so far.", name, count)
        # At every power of two: cheap, and no cycle is read many times.
        if count > MOST_SAMPLES or (count >= 4096 and count & (count - 1) == 0 and _is_cycle(contents)):
            raise ValueError(
                f"{name} seems to have no end: {count} samples were read, {np.unique(contents).size} of them "
                "different. Training counts epochs, so a stream must end when all samples were given once; for one "
                "of the datasets library, `dataset.take(n)` ends it."
            )
    if not labels:
        raise ValueError(f"{name} is empty.")
    again = list(itertools.islice(source.rows(), _PROBE))
    if not again:
        raise ValueError(
            f"{name} can be read only once: a second pass gives no samples. Training reads it in every epoch. Make "
            "the data set of something that starts anew at each `iter(...)`, for instance with "
            "`datasets.IterableDataset.from_generator(function)`, whose function returns a new generator."
        )
    found = np.frombuffer(contents, dtype=np.uint64)
    repeats = bool(np.isin([content_hash(row.image) for row in again], found).all())
    return Scan(np.frombuffer(labels, dtype=np.int64), found, repeats)


def content_hash(image: Any) -> int:
    """A hash of 64 bits of what an image holds: its encoded bytes, else its path or address, else its pixels.

    Equals that of a file in memory in [`file_digests`], and that of an image in [`pixel_digest`].
    """
    if isinstance(image, Mapping):
        data, path = image.get("bytes"), image.get("path")
        return digest(str(path).encode()) if data is None else digest(data, len(data))
    try:
        return pixel_digest(image)
    except Exception:  # nothing that the transform takes: it will say so
        return digest(repr(image).encode())


def load_shards(pattern: str | Path | list[str]) -> datasets.IterableDataset:
    """A stream of tar shards in the format of webdataset: `<key>.jpg` (or another image) and `<key>.cls`.

    Args:
        pattern (`str`, `Path` or `list[str]`): Files, wildcards or URLs, for instance `"train-*.tar"`.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If they are not in that format, or the first of them is damaged.
    """
    try:
        files = str(pattern) if isinstance(pattern, Path) else pattern
        return datasets.load_dataset("webdataset", data_files=files, split="train", streaming=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There are no shards {str(pattern)!r}: {error}") from error
    except IndexError as error:  # a pattern was resolved to an empty list of files
        raise FileNotFoundError(f"There are no shards: no file matches {str(pattern)!r}.") from error
    except _DAMAGED as error:  # the columns are those of the first one
        raise _damaged(f"{pattern} (the first file of it)", error) from error


def _damaged(shards: str, error: Exception) -> ValueError:
    return ValueError(
        f"Damaged tar file, perhaps cut off while it was copied: {shards} ({error}). Copy or download it again, or "
        "leave it out."
    )


def _damaged_shards(dataset: datasets.IterableDataset) -> list[str]:
    """Paths of the tar files that cannot be read to their end. Reads all of them."""
    found = []
    for part in stages(dataset._ex_iterable):
        files = getattr(part, "kwargs", {})
        for path, members in zip(files.get("tar_paths", ()), files.get("tar_iterators", ()), strict=False):
            try:
                for _, file in members:
                    file.read()
            except _DAMAGED:
                found.append(str(path))
    return found


def _shuffled(rows: Iterable[Row], buffer_size: int, generator: np.random.Generator) -> Iterator[Row]:
    """Gives a random row of a buffer that is kept full."""
    buffer: list[Row] = []
    for row in rows:
        if len(buffer) < buffer_size:
            buffer.append(row)
            continue
        at = int(generator.integers(buffer_size))
        buffer[at], row = row, buffer[at]
        yield row
    yield from (buffer[at] for at in generator.permutation(len(buffer)))


def _is_cycle(contents: array) -> bool:
    return np.unique(contents).size * 16 <= len(contents)


def stages(examples: Any) -> Iterator[Any]:
    """The stages of a stream, from the last to the sources."""
    yield examples
    inner = [examples.ex_iterable] if hasattr(examples, "ex_iterable") else getattr(examples, "ex_iterables", [])
    for part in inner:
        yield from stages(part)


def _first_item(dataset: Any) -> Any:
    for item in dataset:
        return item
    raise ValueError("The stream is empty: it gives not a single sample.")
