"""Where images and labels come from: `datasets.Dataset`, folders of images by class, torch data sets."""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from .splits import is_integer


logger = logging.getLogger(__name__)

IMAGE_NAMES = ("image", "img", "pixel_values")
LABEL_NAMES = ("label", "labels")
_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}

# For each storage that a data set shows samples of, the row of every sample, or -1 if it lies elsewhere. Two data sets
# share samples if they show a common row of one storage.
Identity = dict[Hashable, np.ndarray]


class ArrowSource:
    """Images and labels of a `datasets.Dataset`.

    Args:
        dataset (`datasets.Dataset`): Its format is ignored: images come as PIL images, whatever it says.
        image_column (`str`, *optional*): `None`: the one column of feature `Image`, else one named image, img or
            pixel_values.
        label_column (`str`, *optional*): `None`: the one column of feature `ClassLabel`, else one named label or
            labels.

    Raises:
        ValueError: If a column is missing or ambiguous.
    """

    def __init__(self, dataset: datasets.Dataset, image_column: str | None, label_column: str | None) -> None:
        self.dataset = dataset
        features = dataset.features
        listing = ", ".join(f"{name} ({_feature_name(feature)})" for name, feature in features.items())
        images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        self.image_column = _pick("image_column", image_column, images, IMAGE_NAMES, list(features), listing)
        self.label_column = _pick("label_column", label_column, classes, LABEL_NAMES, list(features), listing)
        self.class_names = _class_names(dataset, self.label_column)
        self._rows = dataset.select_columns([self.image_column, self.label_column]).with_format(None)
        if self.image_column not in images:
            # Without a format arrays come as nested lists, and NumPy's own default makes every integer an int64.
            arguments = {"columns": [self.image_column], "dtype": _value_type(features[self.image_column])}
            self._rows = self._rows.with_format("numpy", output_all_columns=True, **arguments)

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Any, Any]:
        row = self._rows[index]
        image = row[self.image_column]
        if isinstance(image, Mapping):  # Image(decode=False)
            image = datasets.Image().decode_example(image)
        return image, row[self.label_column]

    @cached_property
    def labels(self) -> list[int]:
        values = _column(self.dataset, self.label_column)
        return [as_label(value, f"{self.label_column}[{i}]") for i, value in enumerate(values)]

    @cached_property
    def identity(self) -> Identity:
        return arrow_identity(self.dataset)


class MapSource:
    """Images and labels of a map-style torch data set whose items are `(image, label)` or dictionaries.

    Args:
        dataset: Anything with `__len__` and `__getitem__`; at least one item.
        image_column (`str`, *optional*): Key of the image in dictionary items. `None`: image, img or pixel_values.
        label_column (`str`, *optional*): Key of the label in dictionary items. `None`: label or labels.

    Raises:
        ValueError: If a key is missing or ambiguous.
        TypeError: If items are neither pairs nor dictionaries.
    """

    def __init__(self, dataset: Any, image_column: str | None, label_column: str | None) -> None:
        self.dataset = dataset
        item = dataset[0]
        self._by_key = isinstance(item, Mapping)
        self.image_column, self.label_column = "image", "label"
        if self._by_key:
            keys, listing = list(item), ", ".join(map(str, item))
            self.image_column = _pick("image_column", image_column, [], IMAGE_NAMES, keys, listing)
            self.label_column = _pick("label_column", label_column, [], LABEL_NAMES, keys, listing)
        elif not isinstance(item, (tuple, list)) or len(item) != 2:
            size = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
            raise TypeError(
                "Items of the data set must be pairs (image, label) or dictionaries with an image and a label, got "
                f"{type(item).__name__}{size}."
            )
        self.class_names = _class_names(dataset, self.label_column)

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Any, Any]:
        item = self.dataset[index]
        return (item[self.image_column], item[self.label_column]) if self._by_key else tuple(item)

    @cached_property
    def labels(self) -> list[int]:
        stored = _stored_labels(self.dataset, self.label_column)
        # A wrapper may change the labels on their way; then only the items are right.
        if stored is not None and all(stored[i] == self._label(i) for i in (0, len(stored) - 1)):
            return stored
        logger.info("Reading every sample to collect the labels; a `targets` attribute would spare it.")
        return [self._label(i) for i in range(len(self))]

    def _label(self, index: int) -> int:
        return as_label(self.read(index)[1], f"{self.label_column}[{index}]")

    @cached_property
    def identity(self) -> Identity:
        return _map_identity(self.dataset)


class ClassFolder(ImageFolder):
    """A folder with one sub-folder of images a class; class indices follow the sorted names.

    Hidden files and folders are ignored. Items are `(PIL image, class index)`.

    Raises:
        FileNotFoundError: If the folder, its sub-folders or their images are missing.
        ValueError: If the sub-folders are splits (train, test) and not classes.
    """

    def __init__(self, root: str | Path) -> None:
        root = Path(root).expanduser()
        if not root.is_dir():
            raise FileNotFoundError(
                f"There is no folder {str(root)!r}. A data set of the Hub is loaded with `datasets.load_dataset(...)`."
            )
        super().__init__(root, is_valid_file=lambda path: _is_visible_image(Path(path), root), allow_empty=True)
        filled = set(self.targets)
        empty = [name for name, index in self.class_to_idx.items() if index not in filled]
        if not filled:
            raise FileNotFoundError(
                f"The sub-folders of {str(root)!r} ({_shorten(self.classes)}) contain no images. Extensions read: "
                f"{', '.join(IMG_EXTENSIONS)}."
            )
        if empty:
            logger.warning("No images for %s of %s: %s.", "class" if len(empty) == 1 else "classes", root, empty)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        classes = sorted(x.name for x in Path(directory).iterdir() if x.is_dir() and not x.name.startswith("."))
        if not classes:
            raise FileNotFoundError(f"The folder {str(directory)!r} has no sub-folders: it needs one for each class.")
        if {name.lower() for name in classes} <= _SPLIT_NAMES:
            raise ValueError(
                f"The sub-folders of {str(directory)!r} are splits and not classes: {', '.join(classes)}. "
                f"Choose one, for instance {str(Path(directory) / classes[-1])!r}."
            )
        return classes, {name: index for index, name in enumerate(classes)}

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        try:
            image = Image.open(path)
            image.load()  # which closes the file
            return image, label
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise OSError(f"{path}: {error}") from error


def load_source(
    path_or_name: str | Path, split: str | None = None, *, config: str | None = None, revision: str | None = None
) -> datasets.Dataset | Path:
    """Finds data by name, for the command line.

    Args:
        path_or_name (`str` or `Path`): A folder of images by class (or of splits of such folders), a folder written
            by `save_to_disk`, or the name of a data set on the Hub.
        split (`str`, *optional*): Split to take; needed where there is more than one.
        config (`str`, *optional*): For a data set on the Hub: which of its configurations.
        revision (`str`, *optional*): For a data set on the Hub: branch, tag or commit.

    Returns:
        `datasets.Dataset` or `Path`: What [`as_pixel_dataset`] takes.

    Raises:
        FileNotFoundError: If there is no such folder, and no such data set on the Hub or no connection to it.
        ValueError: If the split does not exist, or is needed and missing; the message lists the splits. If a folder is
            given with `config` or `revision`, or a data set on the Hub has no such configuration or cannot be read.
    """
    path = Path(path_or_name).expanduser()
    options = {"name": config, "revision": revision}
    options = {key: value for key, value in options.items() if value is not None}
    if path.is_dir():
        if options:
            raise ValueError(
                f"{str(path_or_name)!r} is a folder: `config` and `revision` are for data sets on the Hub."
            )
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _one_split(datasets.load_from_disk(str(path)), split, path_or_name)
        if split is None:
            return path
        if not (path / split).is_dir():
            found = sorted(x.name for x in path.iterdir() if x.is_dir() and not x.name.startswith("."))
            raise ValueError(f"{str(path)!r} has no split {split!r}. Its sub-folders: {_shorten(found)}.")
        return path / split
    name = str(path_or_name)
    if path.exists():
        raise ValueError(f"{name!r} is a file; data must be a folder or the name of a data set on the Hub.")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise FileNotFoundError(f"There is no folder {name!r}.")
    try:
        if split is not None:  # which may also be a slice such as "train[:10%]"
            return datasets.load_dataset(name, split=split, **options)
        return _one_split(datasets.load_dataset(name, **options), split, name)
    except FileNotFoundError as error:  # includes DatasetNotFoundError
        raise FileNotFoundError(
            f"There is no folder {name!r}, and no data set of that name that you may read on the Hub: {error}"
        ) from error
    except ConnectionError as error:
        raise FileNotFoundError(
            f"There is no folder {name!r}, and the Hub, where a data set of that name may be, cannot be reached: "
            f"{error}"
        ) from error
    except datasets.exceptions.DatasetsError as error:  # damaged files and the like; no error of Python's own
        raise ValueError(f"The data set {name!r} cannot be read: {error}") from error


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


def as_label(value: Any, name: str) -> int:
    """`value` as an int: an integer, or an integer tensor or array of one element.

    Raises:
        TypeError: If it is none.
    """
    if isinstance(value, (Tensor, np.ndarray)) and math.prod(value.shape) == 1:
        value = value.item()
    if not is_integer(value):
        hint = " `dataset.class_encode_column(...)` of the datasets library makes indices of names."
        raise TypeError(
            f"`{name}` must be an integer class index, got {value!r}.{hint if isinstance(value, str) else ''}"
        )
    return int(value)


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


def _map_identity(dataset: Any) -> Identity:
    if isinstance(dataset, Subset):
        rows = np.asarray(dataset.indices, dtype=np.int64)
        return {key: known[rows] for key, known in _map_identity(dataset.dataset).items()}
    if isinstance(dataset, ConcatDataset):
        merged: Identity = {}
        start = 0
        for part in dataset.datasets:
            for key, rows in _map_identity(part).items():
                merged.setdefault(key, np.full(len(dataset), -1))[start : start + len(part)] = rows
            start += len(part)
        return merged
    if isinstance(dataset, datasets.Dataset):
        return arrow_identity(dataset)
    if hasattr(dataset, "source_identity"):  # a PixelDataset
        return dataset.source_identity
    key = str(Path(dataset.root).resolve()) if isinstance(dataset, ClassFolder) else id(dataset)
    return {key: np.arange(len(dataset))}


def _stored_labels(dataset: Any, label_column: str) -> list[int] | None:
    """Labels that can be had without reading images, else `None`."""
    if isinstance(dataset, Subset):
        parent = _stored_labels(dataset.dataset, label_column)
        return None if parent is None else [parent[i] for i in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [_stored_labels(part, label_column) for part in dataset.datasets]
        return None if any(part is None for part in parts) else [label for part in parts for label in part]
    if isinstance(dataset, datasets.Dataset):
        if label_column not in dataset.column_names:
            return None
        values = _column(dataset, label_column)
    elif isinstance(dataset, TensorDataset):
        values = dataset.tensors[-1]
    elif getattr(dataset, "target_transform", None) is not None:
        return None
    else:
        values = getattr(dataset, "targets", getattr(dataset, "labels", None))
    try:
        labels = [as_label(value, label_column) for value in values]
    except TypeError:
        return None
    return labels if len(labels) == len(dataset) else None


def _class_names(dataset: Any, label_column: str) -> list[str] | None:
    if isinstance(dataset, Subset):
        return _class_names(dataset.dataset, label_column)
    if isinstance(dataset, ConcatDataset):
        names = [_class_names(part, label_column) for part in dataset.datasets]
        return names[0] if all(other == names[0] for other in names) else None
    if isinstance(dataset, datasets.Dataset):
        return getattr(dataset.features.get(label_column), "names", None)
    names = getattr(dataset, "classes", getattr(dataset, "class_names", None))
    is_list = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    return list(names) if is_list else None


def _column(dataset: datasets.Dataset, name: str) -> list[Any]:
    return dataset.with_format("arrow").select_columns([name])[:].column(0).to_pylist()


def _pick(
    argument: str, given: str | None, typed: list[str], names: tuple[str, ...], available: list[Any], listing: str
) -> str:
    """The column that was asked for, else the only one of the right type, else the only one of a usual name."""
    if given is not None:
        if given not in available:
            raise ValueError(f"`{argument}={given!r}` is not a column of the data set. Its columns: {listing}.")
        return given
    found = typed or [name for name in names if name in available]
    if len(found) == 1:
        return found[0]
    kind = argument.removesuffix("_column")
    problem = f"several columns that may be the {kind}: {', '.join(found)}" if found else f"no {kind} column"
    raise ValueError(f"The data set has {problem}. Its columns: {listing}. Pass `{argument}=` to name the right one.")


def _one_split(
    found: datasets.Dataset | datasets.DatasetDict, split: str | None, name: str | Path
) -> datasets.Dataset:
    if isinstance(found, datasets.Dataset):
        if split is not None:
            raise ValueError(f"{str(name)!r} is a single data set without splits; leave out the split {split!r}.")
        return found
    if split is None and len(found) == 1:
        return next(iter(found.values()))
    if split not in found:
        asked = "is needed" if split is None else f"{split!r} does not exist"
        raise ValueError(f"{str(name)!r} has the splits {', '.join(found)}: the split {asked}.")
    return found[split]


def _is_visible_image(path: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return not hidden and path.suffix.lower() in IMG_EXTENSIONS


def _value_type(feature: Any) -> str | None:
    while isinstance(feature, datasets.List):
        feature = feature.feature
    return getattr(feature, "dtype", None)


def _feature_name(feature: Any) -> str:
    return feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__


def _shorten(names: list[str], limit: int = 10) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
