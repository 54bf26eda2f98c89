"""Where images and labels come from: `datasets.Dataset`, folders of images by class, torch data sets."""

from __future__ import annotations

import logging
import math
import struct
import zlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any, cast

import datasets
import numpy as np
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from .folders import ClassFolder
from .identity import Identity, arrow_identity, map_identity
from .images import BrokenImageError, as_broken, check_readable, decode_file, decode_image
from .splits import is_integer
from .stored import item_image


logger = logging.getLogger(__name__)

IMAGE_NAMES = ("image", "img", "pixel_values")
LABEL_NAMES = ("label", "labels")

# What the decoders of images raise for damaged files; a data set's own errors are none of these.
_DECODING_ERRORS = (OSError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class ArrowSource:
    """Images and labels of a `datasets.Dataset`.

    Args:
        dataset (`datasets.Dataset`): Its format is ignored: images come as PIL images, whatever it says.
        image_column (`str`, *optional*): `None`: the one column of feature `Image`, else one named image, img or
            pixel_values.
        label_column (`str`, *optional*): `None`: the one column of feature `ClassLabel`, else one named label or
            labels.
        labelled (`bool`): Whether labels are read; if not, there may be none, and every label is 0.

    Raises:
        ValueError: If a column is missing or ambiguous.
    """

    def __init__(
        self, dataset: datasets.Dataset, image_column: str | None, label_column: str | None, labelled: bool = True
    ) -> None:
        self.dataset = dataset
        self.labelled = labelled
        self.label_column = label_column
        if labelled:
            self.image_column, self.label_column = typed_columns(dataset.features, image_column, label_column)
        else:
            self.image_column = typed_image_column(dataset.features, image_column)
        columns = [self.image_column, self.label_column] if labelled else [self.image_column]
        self.class_names = class_names_of(dataset, self.label_column) if labelled else None
        self._rows = dataset.select_columns(columns).with_format("arrow")
        feature = dataset.features[self.image_column]
        self._feature = feature if isinstance(feature, datasets.Image) else None
        if self._feature is None:
            # Without a format arrays come as nested lists, and NumPy's own default makes every integer an int64.
            arguments = {"columns": [self.image_column], "dtype": value_type(feature)}
            self._rows = self._rows.with_format("numpy", output_all_columns=True, **arguments)

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Any, Any]:
        """Image and label of a row.

        Raises:
            BrokenImageError: If there is no image, or it cannot be decoded.
        """
        row = self._rows[index]
        if self._feature is None:
            return row[self.image_column], row[self.label_column] if self.labelled else 0
        image = row.column(self.image_column)[0].as_py()
        label = row.column(self.label_column)[0].as_py() if self.labelled else 0
        return decode_stored(image, self._feature), label

    @cached_property
    def labels(self) -> list[int]:
        if not self.labelled:
            return [0] * len(self)
        values = _column(self.dataset, cast(str, self.label_column))
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
        labelled (`bool`): Whether labels are read; if not, items may also be images alone, and every label is 0.

    Raises:
        ValueError: If a key is missing or ambiguous.
        TypeError: If items are neither pairs nor dictionaries.
    """

    def __init__(
        self, dataset: Any, image_column: str | None, label_column: str | None, labelled: bool = True
    ) -> None:
        self.dataset = dataset
        self.labelled = labelled
        item = (None, 0) if isinstance(dataset, ClassFolder) else _first_readable(dataset)
        self._by_key = isinstance(item, Mapping)
        self.label_column = label_column
        if labelled:
            self.image_column, self.label_column = item_columns(item, image_column, label_column, "data set")
        elif self._by_key:
            self.image_column = typed_image_column(dict.fromkeys(cast(Mapping, item)), image_column)
        else:
            self.image_column = "image"
        self.class_names = class_names_of(dataset, self.label_column) if labelled else None

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Any, Any]:
        """Image and label of an item.

        Raises:
            BrokenImageError: If there is no image, or it cannot be decoded.
        """
        try:
            item = self.dataset[index]
        except (BrokenImageError, *_DECODING_ERRORS) as error:
            raise as_broken(error) from error
        if not self.labelled:
            image, label = item_image(item, self.image_column), 0
        else:
            image, label = (item[self.image_column], item[self.label_column]) if self._by_key else tuple(item)
        check_readable(image)
        return image, label

    @cached_property
    def labels(self) -> list[int]:
        if not self.labelled:
            return [0] * len(self)
        stored = _stored_labels(self.dataset, cast(str, self.label_column))
        # A wrapper may change the labels on their way; then only the items are right.
        if stored is not None and all(self._label(i, stored[i]) == stored[i] for i in (0, len(stored) - 1)):
            return stored
        logger.info("Reading every sample to collect the labels; a `targets` attribute would spare it.")
        return [self._label(i) for i in range(len(self))]

    def _label(self, index: int, default: int | None = None) -> int:
        """The label of an item; `default`, if there is one, where the image is broken."""
        try:
            label = self.read(index)[1]
        except BrokenImageError as error:
            if default is None:
                raise BrokenImageError(
                    f"`{self.image_column}[{index}]` cannot be read, and the data set has no `targets` attribute with "
                    f"its label: {error}. Leave the sample out, or give the data set `targets`."
                ) from error
            return default
        return as_label(label, f"{self.label_column}[{index}]")

    @cached_property
    def identity(self) -> Identity:
        return map_identity(self.dataset)


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


def _first_readable(dataset: Any) -> Any:
    """The first item whose image is not broken, to see what items look like."""
    for index in range(len(dataset)):
        try:
            return dataset[index]
        except (BrokenImageError, *_DECODING_ERRORS) as error:
            last = as_broken(error)
            if not isinstance(last, BrokenImageError):
                raise
    raise BrokenImageError(f"None of the {len(dataset)} images can be read. The last one: {last}")


def decode_stored(value: Mapping | None, feature: datasets.Image) -> Image.Image:
    """The image of a row as Arrow holds it: the bytes of a file, or where it is."""
    stored: Mapping[str, Any] = value or {}
    data, path = stored.get("bytes"), stored.get("path")
    if data is None and path is None:
        raise BrokenImageError("there is no image (null)")
    if data is not None:
        image = decode_image(data)
    elif "://" not in str(path):
        image = decode_file(cast(str, path))
    else:
        try:
            image = datasets.Image().decode_example({"bytes": None, "path": path})
        except (UnidentifiedImageError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            raise BrokenImageError(f"{path}: {error}") from error
    return image if feature.mode in (None, image.mode) else image.convert(feature.mode)


def _stored_labels(dataset: Any, label_column: str) -> list[int] | None:
    """Labels that can be had without reading images, else `None`."""
    if isinstance(dataset, Subset):
        parent = _stored_labels(dataset.dataset, label_column)
        return None if parent is None else [parent[i] for i in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [_stored_labels(part, label_column) for part in dataset.datasets]
        known = [part for part in parts if part is not None]
        return [label for part in known for label in part] if len(known) == len(parts) else None
    if isinstance(dataset, datasets.Dataset):
        if label_column not in dataset.column_names:
            return None
        values: Any = _column(dataset, label_column)
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


def class_names_of(dataset: Any, label_column: str | None) -> list[str] | None:
    """The names that a data set gives its classes, in the order of their indices."""
    if isinstance(dataset, Subset):
        return class_names_of(dataset.dataset, label_column)
    if isinstance(dataset, ConcatDataset):
        parts = [class_names_of(part, label_column) for part in dataset.datasets]
        return parts[0] if all(other == parts[0] for other in parts) else None
    if isinstance(dataset, datasets.Dataset):
        return getattr(dataset.features.get(label_column), "names", None)
    names: Any = getattr(dataset, "classes", getattr(dataset, "class_names", None))
    is_list = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    return list(names) if is_list else None


def _column(dataset: datasets.Dataset, name: str) -> list[Any]:
    return dataset.with_format("arrow").select_columns([name])[:].column(0).to_pylist()


def typed_columns(
    features: Mapping[str, Any],
    image_column: str | None,
    label_column: str | None,
    label_names: tuple[str, ...] = LABEL_NAMES,
) -> tuple[str, str]:
    """Image and label column of data with named columns; features that are not known are `None`."""
    listing = ", ".join(f"{name} ({_feature_name(kind)})" if kind else name for name, kind in features.items())
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    return (
        _find_column("image_column", image_column, images, IMAGE_NAMES, list(features), listing),
        _find_column("label_column", label_column, classes, label_names, list(features), listing),
    )


def typed_image_column(features: Mapping[str, Any], image_column: str | None) -> str:
    """The image column of data with named columns that need no labels."""
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    return _find_column("image_column", image_column, images, IMAGE_NAMES, list(features), ", ".join(features))


def item_columns(
    item: Any,
    image_column: str | None,
    label_column: str | None,
    what: str,
    label_names: tuple[str, ...] = LABEL_NAMES,
) -> tuple[str, str]:
    """Keys of image and label in items of a torch data set like `item`; what pairs have in their place for messages.

    Raises:
        TypeError: If items are neither pairs nor dictionaries; `what` is what the data is called.
    """
    if isinstance(item, Mapping):
        keys, listing = list(item), ", ".join(map(str, item))
        return (
            _find_column("image_column", image_column, [], IMAGE_NAMES, keys, listing),
            _find_column("label_column", label_column, [], label_names, keys, listing),
        )
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        size = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
        raise TypeError(
            f"Items of the {what} must be pairs (image, label) or dictionaries with an image and a label, got "
            f"{type(item).__name__}{size}."
        )
    return "image", "label"


def _find_column(
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


def value_type(feature: Any) -> str | None:
    """Type of the numbers in a column of nested lists."""
    while isinstance(feature, datasets.List):
        feature = feature.feature
    return getattr(feature, "dtype", None)


def _feature_name(feature: Any) -> str:
    """What messages call the type of a column."""
    return feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__
