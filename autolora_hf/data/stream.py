"""`PixelStream`: labelled images that are read one after the other, as pixels in [0, 1]."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

import datasets
import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..pixels import Preprocessing
from ..progress import progress_bar
from .dataset import BrokenImages
from .images import Augmentation, BrokenImageError, PixelTransform, seeded
from .sources import as_label
from .splits import held_out_seats, subset_seats
from .stored import StoredRows
from .stream_sources import ArrowStream, Row, Scan, TorchStream, content_hash, scan_stream


logger = logging.getLogger(__name__)

# Encoded images of this many samples are in memory at once while they are shuffled.
BUFFER_SIZE = 1000
_ABOVE_ALL = np.uint64(2**64 - 1)

Item = dict[str, Tensor | int]


class Read(NamedTuple):
    """A sample that was read: the hash of its image, and what is broken about it if another took its place."""

    content: int
    item: Item
    broken: str | None = None


class PixelStream(IterableDataset):
    """Labelled images of a stream as float pixels, decoded as they are needed. Made by [`as_pixel_stream`].

    Items are as in [`PixelDataset`]. Every pass gives every sample once, and raises `ValueError` if it does not
    because the stream changed.

    Attributes:
        name (`str`): What messages call the data.
        preprocessing (`Preprocessing`): Size, filter and crop of the images.
        augmentation (`str`): See [`PixelTransform`].
        labels (`np.ndarray`): int64, the class index of every sample, in the order of an unshuffled pass.
        num_workers (`int`): Processes that read and decode; 0: this one. Each reads shards of its own.
        broken_images (`str`): `"raise"`: reading a broken image is an error. `"skip"`: the next image of the same
            class takes its place, with a warning.
    """

    def __init__(
        self,
        source: ArrowStream | TorchStream,
        scan: Scan,
        preprocessing: Preprocessing,
        augmentation: Augmentation,
        name: str,
        *,
        seed: int,
        shuffle: bool,
        buffer_size: int,
        num_workers: int,
        broken_images: BrokenImages,
    ) -> None:
        if broken_images not in get_args(BrokenImages):
            raise ValueError(f"`broken_images` must be 'skip' or 'raise', got {broken_images!r}.")
        self.name = name
        self.preprocessing = preprocessing
        self.augmentation = augmentation
        self.num_workers = num_workers
        self.broken_images = broken_images
        self.labels = scan.labels
        self._source = source
        self._scan = scan
        self._seed = seed
        self._shuffle = shuffle
        self._buffer_size = buffer_size
        self._epoch = 0
        self._transform = PixelTransform(preprocessing, augmentation)
        # Of each class, images whose hash with other bits flipped (`_mask`) is below a limit are held out; `None`:
        # there is no such split.
        self._limits: np.ndarray | None = None
        self._mask = 0
        self._held_out = False
        self._left_out: frozenset[int] = frozenset()
        self._reported: set[str] = set()

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[Item]:
        if get_worker_info() is not None:
            # A worker process of a `DataLoader` around it has a share of the samples: they cannot be counted here.
            yield from (read.item for read in self._items())
            return
        count = 0
        for read in self._from_workers() if self.num_workers else self._items():
            count += 1
            if count > len(self):
                self._refuse_pass(f"more than the {len(self)}")
            if read.broken is not None and read.broken not in self._reported:
                self._reported.add(read.broken)
                logger.warning("%s Another image of its class takes its place.", read.broken)
            yield read.item
        if count < len(self):
            self._refuse_pass(f"{count} instead of the {len(self)}")

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next pass, where it is shuffled."""
        self._epoch = epoch

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes in the order of their indices, if the source has them."""
        return self._source.class_names

    @property
    def source(self) -> Any:
        """The stream it was made of."""
        return self._source.dataset

    @property
    def num_classes(self) -> int:
        """Number of class names, else one more than the largest label."""
        return len(self.class_names) if self.class_names else int(self._scan.labels.max()) + 1

    @property
    def contents(self) -> np.ndarray:
        """uint64, the hash of the content of every image, in the order of `labels`."""
        return self._scan.contents[self._chosen()]

    @property
    def source_identity(self) -> dict[Any, np.ndarray]:
        """Empty: the samples of a stream have no place. Compare `contents` instead."""
        return {}

    @property
    def stored(self) -> StoredRows:
        """Empty: no image can be had by its position. Compare `contents` instead."""
        return StoredRows([], [])

    def plain(self) -> PixelStream:
        """The same samples in the order they are stored, without augmentation."""
        return self._view(augmentation="none", _shuffle=False)

    def first(self, count: int) -> list[Item]:
        """The first `count` samples as they are stored, without augmentation. Later passes are not affected."""
        with seeded(self._seed):
            return list(itertools.islice(self._view(augmentation="none", _shuffle=False, num_workers=0), count))

    def without_broken(self) -> PixelStream:
        """The same samples without the images that cannot be read. Reads and decodes all once."""
        if self.broken_images == "raise":
            return self
        broken: dict[int, str] = {}
        for row in progress_bar(self._source.rows(), title="reading images", unit="image"):
            content = content_hash(row.image)
            if self._is_mine(content, row.label):
                try:
                    self._pixels(row, content)
                except BrokenImageError as error:
                    broken[content] = str(error)
        if not broken:
            return self
        view = self._view(_left_out=self._left_out | broken.keys())
        examples = " ".join(list(broken.values())[:3])
        logger.warning("%d images of %s are left out. %s", len(self) - len(view), self.name, examples)
        if not len(view):
            raise BrokenImageError(f"None of the {len(self)} images of {self.name} can be read. {examples}")
        return view

    def hold_out(self, fraction: float) -> tuple[PixelStream, PixelStream]:
        """Splits into a part to keep and a part to hold out, proportionally in every class.

        A hash of the image decides, so the parts are disjoint in every pass whatever the order, and equal images are
        in the same one. The part held out is neither shuffled nor augmented; each pass over it reads the whole stream.

        Args:
            fraction (`float`): Share to hold out, in (0, 1).

        Raises:
            ValueError: If the images differ from one pass to the next, or no class has a sample to spare.
        """
        if not self._scan.repeats:
            raise ValueError(
                f"{self.name} gives other images in another pass, so none can be held out for validation. Pass an "
                "`eval_dataset`, or leave random augmentation to the trainer (`augmentation`)."
            )
        if self._limits is not None:
            raise ValueError(f"{self.name} is a part of a split: pass the other part as `eval_dataset`.")
        kept, held_out = self._split(*held_out_seats(self.labels, fraction, np.random.default_rng(self._seed)))
        if len(held_out) == 0:
            raise ValueError(
                f"Cannot hold out images of {self.name}: those of a class are all the same. Pass an `eval_dataset`."
            )
        return kept, held_out.plain()

    def bounded(self, size: int) -> PixelStream:
        """About `size` samples, in proportion to the classes and the same ones in every pass, as in [`hold_out`].

        All of them if there are no more, if they differ from pass to pass, and of what already is a part.
        """
        if len(self) <= size or not self._scan.repeats or self._limits is not None:
            return self
        return self._split(*subset_seats(self.labels, size, np.random.default_rng(self._seed)))[1].plain()

    def _split(self, classes: np.ndarray, seats: np.ndarray) -> tuple[PixelStream, PixelStream]:
        """The rest, and `seats` samples of each class, chosen by a hash of the image."""
        # Another seed is to choose other images.
        mask = int(np.random.default_rng(self._seed).integers(2**64, dtype=np.uint64))
        limits = np.zeros(int(self.labels.max()) + 1, dtype=np.uint64)
        for label, count in zip(classes, seats, strict=True):
            flipped = np.sort(self._scan.contents[self.labels == label] ^ np.uint64(mask))
            limits[label] = flipped[count] if count < len(flipped) else _ABOVE_ALL
        split = {"_limits": limits, "_mask": mask}
        rest, chosen = (self._view(**split, _held_out=held_out) for held_out in (False, True))
        return rest, chosen

    def reopen(
        self, preprocessing: Preprocessing, augmentation: Augmentation, name: str, **options: Any
    ) -> PixelStream:
        """The same samples for another model, without another scan."""
        public = ("num_workers", "broken_images")
        changes = {key if key in public else f"_{key}": value for key, value in options.items()}
        return self._view(preprocessing=preprocessing, augmentation=augmentation, name=name, **changes)

    def _view(self, **changes: Any) -> PixelStream:
        view = copy.copy(self)
        view.__dict__.update(changes)
        view._transform = PixelTransform(view.preprocessing, view.augmentation)
        view.labels = view._scan.labels[view._chosen()]
        return view

    def _chosen(self) -> np.ndarray:
        """Which of the scanned samples are in this part of a split and were not left out."""
        chosen = ~np.isin(self._scan.contents, np.fromiter(self._left_out, np.uint64))
        if self._limits is not None:
            flipped = self._scan.contents ^ np.uint64(self._mask)
            chosen &= (flipped < self._limits[self._scan.labels]) == self._held_out
        return chosen

    def _is_mine(self, content: int, label: int) -> bool:
        """[`_chosen`] for one sample."""
        if content in self._left_out:
            return False
        if self._limits is None:
            return True
        is_below = 0 <= label < len(self._limits) and content ^ self._mask < int(self._limits[label])
        return is_below == self._held_out

    def _items(self) -> Iterator[Read]:
        """Samples that this process reads.

        With `broken_images="skip"` the next readable image of its class takes the place of a broken one, if need be
        from the start of the stream.
        """
        seed = self._seed if self._shuffle else None
        owed: dict[int, list[tuple[int, str]]] = {}
        for is_first_pass in (True, False):
            if not (is_first_pass or owed):
                return
            for row in self._source.rows(self._epoch, seed, self._buffer_size):
                if not (is_first_pass or owed):
                    return
                label = as_label(row.label, f"{self._source.label_column} of sample {row.key} of {self.name}")
                content = content_hash(row.image)
                if not self._is_mine(content, label) or not (is_first_pass or label in owed):
                    continue
                try:
                    pixels = self._pixels(row, content)
                except BrokenImageError as error:
                    if self.broken_images == "raise":
                        raise
                    if is_first_pass:
                        owed.setdefault(label, []).append((content, str(error)))
                    continue
                if is_first_pass:
                    yield Read(content, {"pixel_values": pixels, "labels": label})
                for other, problem in owed.pop(label, ()):
                    yield Read(other, {"pixel_values": self._pixels(row, other), "labels": label}, problem)
        if owed:
            label, problems = next(iter(owed.items()))
            where = " that one worker process reads" if self.num_workers else ""
            raise BrokenImageError(
                f"None of the images of class {label}{where} can be read, for instance {problems[0][1]}"
            )

    def _pixels(self, row: Row, content: int) -> Tensor:
        shard = f" ({row.shard})" if row.shard else ""
        name = f"{self._source.image_column} of sample {row.key} of {self.name}{shard}"
        try:
            # The augmentation of an image depends on nothing but seed, epoch and the image.
            with seeded(self._seed, self._epoch, content):
                return self._transform(self._source.decode(row.image), name)
        except BrokenImageError as error:
            raise BrokenImageError(f"`{name}` cannot be read: {error}") from error

    def _from_workers(self) -> Iterator[Read]:
        """Samples of worker processes, in turn.

        The processes belong to the stream and not to the `DataLoader` around it: that one would build batches in each
        of them, and the incomplete last ones would make an epoch longer than its samples say.
        """
        loader = DataLoader(_Reads(self), batch_size=None, num_workers=self.num_workers, collate_fn=_as_it_is)
        items = iter(loader)
        first = list(itertools.islice(items, 4 * self.num_workers))
        contents = {read.content for read in first}
        if isinstance(self._source, TorchStream) and len(first) < len(self):
            if self.num_workers > 1 and len(contents) * self.num_workers <= len(first):
                raise ValueError(
                    f"{self.name} gives the same samples in each of {self.num_workers} worker processes. Use "
                    "`dataloader_num_workers=0`, or let its `__iter__` give each worker a part of its own (see "
                    "`torch.utils.data.get_worker_info`)."
                )
        yield from first
        yield from items

    def _refuse_pass(self, found: str) -> None:
        workers = " in its worker processes" if self.num_workers else ""
        raise ValueError(
            f"{self.name} gave {found} samples that it had at first{workers}. A stream must give the same samples in "
            "every pass, whatever their order."
        )


def as_pixel_stream(
    source: Any,
    preprocessing: Preprocessing,
    *,
    augmentation: Augmentation = "none",
    image_column: str | None = None,
    label_column: str | None = None,
    name: str = "dataset",
    seed: int = 0,
    shuffle: bool = False,
    buffer_size: int = BUFFER_SIZE,
    num_workers: int = 0,
    broken_images: BrokenImages = "raise",
    labelled: bool = True,
) -> PixelStream:
    """Makes a [`PixelStream`] of a stream of labelled images. Reads it once, without decoding images.

    Args:
        source: A `datasets.IterableDataset`, a torch `IterableDataset` with items `(image, label)` or dictionaries,
            or a `PixelStream`, which is taken over without reading it again. Images: see [`PixelTransform`].
        preprocessing (`Preprocessing`), augmentation (`str`), name (`str`): As in [`as_pixel_dataset`].
        image_column (`str`, *optional*), label_column (`str`, *optional*): As in [`as_pixel_dataset`].
        seed (`int`): Of the order, and of the choice of what is held out.
        shuffle (`bool`): Whether passes are shuffled, by shards and with a buffer; equal seeds and epochs give equal
            orders. A stream that was shuffled already is not shuffled again; it changes its order with the epoch.
        buffer_size (`int`): Samples in the shuffle buffer, whose encoded images every worker process has in memory.
        num_workers (`int`): Processes that read and decode; see [`PixelStream`].
        broken_images (`str`), labelled (`bool`): See [`PixelStream`] and [`as_pixel_dataset`].

    Raises:
        TypeError: For sources of another kind, items that are no pairs or dictionaries, labels that are no integers.
        ValueError: For an `IterableDatasetDict`, streams that are empty, never end, can be read once or were split by
            node, and missing or ambiguous columns.
    """
    options: dict[str, Any] = {
        "seed": seed,
        "shuffle": shuffle,
        "buffer_size": buffer_size,
        "num_workers": num_workers,
    }
    options["broken_images"] = broken_images
    if isinstance(source, PixelStream):
        return source.reopen(preprocessing, augmentation, name, **options)
    if not is_stream(source):
        raise TypeError(
            f"`source` must be a `datasets.IterableDataset` or a torch `IterableDataset`, got {type(source).__name__}."
        )
    kind = ArrowStream if isinstance(source, datasets.IterableDataset) else TorchStream
    try:
        reader = kind(source, image_column, label_column, labelled)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    scan = scan_stream(reader, name)
    return PixelStream(reader, scan, preprocessing, augmentation, name, **options)


def is_stream(source: Any) -> bool:
    """Whether `source` is read one sample after the other."""
    return isinstance(source, (datasets.IterableDataset, IterableDataset))


class _Reads(IterableDataset):
    """The samples of a stream in a worker process, with what the main process is to know of them."""

    def __init__(self, stream: PixelStream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[Read]:
        return self.stream._items()


def _as_it_is(item: Any) -> Any:
    return item
