"""Images that two data sets have in common, by where they come from and by what they show."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..progress import progress_bar
from .dataset import PixelDataset
from .images import BrokenImageError, seeded
from .stored import NOT_ENCODED, StoredImages, file_digests, pixel_digest


logger = logging.getLogger(__name__)

# Public data sets have a few exact duplicates across their own official splits, which their users cannot help.
TOLERATED_SHARE = 0.01

# Bounds of the comparison of decoded images: one to two minutes on one core. Files are compared without decoding,
# whatever their number.
_MOST_DECODED_IMAGES = 200_000
_MOST_DECODED_PIXELS = 4_000_000_000


@dataclass(frozen=True)
class Overlap:
    """Images of `second` that are in `first` too.

    Args:
        first (`PixelDataset`): What was used before, for instance for training.
        second (`PixelDataset`): What should be new.
        positions (`list[int]`): Of the common images, in `second`.
        partners (`list[int]`): Where each of them is in `first`.
        same_rows (`bool`): They are the same rows of the same data set, and not only equal images.
    """

    first: PixelDataset
    second: PixelDataset
    positions: list[int]
    partners: list[int]
    same_rows: bool

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def tolerable(self) -> bool:
        """Whether it may be chance: equal images that are at most 1 % of `second`."""
        return not self.positions or (not self.same_rows and len(self) <= TOLERATED_SHARE * len(self.second))

    def __str__(self) -> str:
        pairs = [
            f"{self.second.image_name(position)} = {self.first.image_name(partner)}"
            for position, partner in list(zip(self.positions, self.partners, strict=True))[:3]
        ]
        kind = "" if self.same_rows else ", compared by content"
        return f"{len(self)} of {len(self.second)} images{kind}; for instance {', '.join(pairs)}"


def find_overlap(first: PixelDataset, second: PixelDataset) -> Overlap:
    """Finds the images of `second` that are in `first` too: the same rows of one data set, or else exact copies.

    Files are compared byte for byte: only those that agree in size and in their last 4 kB are read as a whole. The
    rest is compared by its decoded pixels in 8-bit RGB, which finds copies in another lossless format and arrays; that
    is limited to 200,000 images and 4 billion pixels, and sizes of images that are rare come first. Equal files that
    cannot be decoded, such as the same error page saved twice, are no common images.
    """
    rows = _same_rows(first, second)
    if rows:
        return Overlap(first, second, list(rows), list(rows.values()), same_rows=True)
    pairs = _same_files(first.stored, second.stored)
    readable = set(_readable(first.stored, np.unique([*pairs.values()])).tolist())
    pairs = {position: partner for position, partner in pairs.items() if partner in readable}
    with seeded(0):  # an item of a data set may be random
        pairs |= _same_pixels(first.stored, second.stored, np.setdiff1d(np.arange(len(second)), list(pairs)))
    positions = sorted(pairs)
    return Overlap(first, second, positions, [pairs[position] for position in positions], same_rows=False)


def same_data(first: PixelDataset, second: PixelDataset) -> bool:
    """Whether two data sets share images: rows of one storage, or more exact copies than chance explains.

    See [`find_overlap`] for which images are compared, and how.
    """
    return first is second or not find_overlap(first, second).tolerable


def duplicate_groups(data: PixelDataset) -> np.ndarray:
    """For every image the position of the first one that is an exact copy of it, N; its own for most.

    Files are compared byte for byte, arrays by their values. Only one file of each group is decoded: files that cannot
    be are copies of nothing. Images that only the data set itself can make count as different.
    """
    stored = data.stored
    encoded = np.flatnonzero(stored.sizes > 0)
    encoded = _repeated(encoded, stored.sizes[encoded])
    encoded = _repeated(encoded, file_digests(stored, encoded, whole=False))
    arrays, array_keys = _pixel_keys(stored, np.flatnonzero((stored.sizes == NOT_ENCODED) & ~stored.opaque))
    groups = np.arange(len(data))
    for rows, keys in ((encoded, file_digests(stored, encoded, whole=True)), (arrays, array_keys)):
        # `rows` ascend, so the first of equal keys is the first position.
        _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        groups[rows] = rows[first[inverse]]
    representatives = np.unique(groups[groups != np.arange(len(groups))])
    encoded = representatives[stored.sizes[representatives] > 0]
    broken = np.isin(groups, np.setdiff1d(encoded, _readable(stored, encoded)))
    groups[broken] = np.flatnonzero(broken)
    return groups


def check_unseen(test: PixelDataset, seen: Mapping[str, PixelDataset | None], name: str = "The dataset") -> list[str]:
    """Makes sure that test data are none of those that a model was trained or selected with.

    Args:
        test (`PixelDataset`): The data to measure on.
        seen (`Mapping[str, PixelDataset]`): The `"training"` and the `"validation"` data, as far as they are known.
        name (`str`): What to call the test data in messages.

    Returns:
        `list[str]`: What a report on these data should mention: single duplicates that are too few to refuse them.

    Raises:
        ValueError: If they have images in common, with the number and examples.
    """
    notes = []
    for kind, data in seen.items():
        overlap = None if data is None else find_overlap(data, test)
        if not overlap:
            continue
        if not overlap.tolerable:
            raise ValueError(
                f"{name} shares images with the {kind} data ({overlap}), which the weights were "
                f"{'fitted to' if kind == 'training' else 'selected with'}: robust accuracy on it says nothing about "
                "new images. Pass test data that was not used in training."
            )
        notes.append(
            f"{len(overlap)} of {len(test)} test images are exact copies of {kind} images. They stay in the test "
            "data; accuracies may be too high by their share."
        )
        logger.warning("%s Which ones: %s.", notes[-1], overlap)
    return notes


def _same_rows(first: PixelDataset, second: PixelDataset) -> dict[int, int]:
    one, other = first.source_identity, second.source_identity
    pairs: dict[int, int] = {}
    for key in one.keys() & other.keys():
        rows = [np.flatnonzero(identity[key] >= 0) for identity in (one, other)]
        pairs |= _pairs(rows[0], one[key][rows[0]], rows[1], other[key][rows[1]])
    return dict(sorted(pairs.items()))


def _same_files(first: StoredImages, second: StoredImages) -> dict[int, int]:
    sizes = np.intersect1d(first.sizes[first.sizes > 0], second.sizes[second.sizes > 0])
    rows = [np.flatnonzero(np.isin(stored.sizes, sizes)) for stored in (first, second)]
    for whole in (False, True):
        keys = [file_digests(stored, chosen, whole) for stored, chosen in zip((first, second), rows, strict=True)]
        common = np.intersect1d(keys[0], keys[1])
        rows = [chosen[np.isin(found, common)] for chosen, found in zip(rows, keys, strict=True)]
        keys = [found[np.isin(found, common)] for found in keys]
    return _pairs(rows[0], keys[0], rows[1], keys[1])


def _readable(stored: StoredImages, rows: np.ndarray) -> np.ndarray:
    """Those of `rows` whose files can be decoded."""
    found = []
    for row in rows.tolist():
        try:
            stored.image(int(row))
        except BrokenImageError:
            continue
        found.append(int(row))
    return np.array(found, np.int64)


def _same_pixels(first: StoredImages, second: StoredImages, positions: np.ndarray) -> dict[int, int]:
    """Compares decoded images, as far as the bounds allow; `positions` are those of `second` that matter."""
    count = len(first.sizes)
    if not len(positions):
        return {}
    if count + len(positions) > _MOST_DECODED_IMAGES:
        logger.info("%d images are too many to compare them by their pixels: files only.", count + len(positions))
        return {}
    for stored, number in ((first, count), (second, len(positions))):
        # Their size is not known before they were read.
        if stored.opaque.any() and number * np.prod(stored.shape(0)) > _MOST_DECODED_PIXELS:
            logger.info("The images have too many pixels to compare them: files only.")
            return {}
    shapes = [[first.shape(row) for row in range(count)], [second.shape(int(row)) for row in positions]]
    numbers = [Counter(found) for found in shapes]
    common = [shape for shape in numbers[0].keys() & numbers[1].keys() if shape != (0, 0)]
    costs = {shape: shape[0] * shape[1] * (numbers[0][shape] + numbers[1][shape]) for shape in common}
    pairs: dict[int, int] = {}
    spent = 0
    for shape in sorted(costs, key=lambda shape: (costs[shape], shape)):
        spent += costs[shape]
        if spent > _MOST_DECODED_PIXELS:
            logger.info("Images of %d x %d pixels and more common sizes are not compared by their pixels.", *shape)
            break
        mine = np.array([row for row, found in enumerate(shapes[0]) if found == shape])
        other = positions[[i for i, found in enumerate(shapes[1]) if found == shape]]
        pairs |= _pairs(*_pixel_keys(first, mine), *_pixel_keys(second, other))
    return pairs


def _pixel_keys(stored: StoredImages, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Those of `rows` that can be read, and digests of their pixels."""
    readable, keys = [], []
    for row in progress_bar(rows.tolist(), title="comparing images", unit="image"):
        try:
            keys.append(pixel_digest(stored.image(row)))
        except Exception:  # broken images, arrays of other kinds: checked elsewhere, equal to nothing here
            continue
        readable.append(row)
    return np.array(readable, np.int64), np.array(keys, np.uint64)


def _pairs(
    first_rows: np.ndarray, first_keys: np.ndarray, second_rows: np.ndarray, second_keys: np.ndarray
) -> dict[int, int]:
    """For every second row whose key is among the first keys, the first row of that key."""
    known, where = np.unique(first_keys, return_index=True)
    if not len(known):
        return {}
    at = np.searchsorted(known, second_keys).clip(max=len(known) - 1)
    found = known[at] == second_keys
    return dict(zip(second_rows[found].tolist(), first_rows[where[at[found]]].tolist(), strict=True))


def _repeated(rows: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Those of `rows` whose key occurs more than once."""
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    return rows[counts[inverse] > 1]
