"""Images that cannot be read: finding them, and saying so."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ..progress import progress_bar
from .dataset import PixelDataset
from .folders import shorten
from .images import BrokenImageError
from .stored import ABSENT


logger = logging.getLogger(__name__)


def without_absent(data: PixelDataset) -> PixelDataset:
    """`data` without the images that are missing or empty, which costs no reading of files.

    Raises:
        BrokenImageError: If none is left, or if there are any and `data.broken_images` is `"raise"`.
    """
    return _left_out(data, np.flatnonzero(data.stored.sizes == ABSENT).tolist(), "are missing or empty")


def without_broken(data: PixelDataset) -> PixelDataset:
    """`data` without the images that cannot be read. Reads every image once.

    Raises:
        BrokenImageError: If none is left, or if there are any and `data.broken_images` is `"raise"`.
    """
    return _left_out(data, find_broken(data), "cannot be read")


def find_broken(data: PixelDataset, positions: Sequence[int] | None = None) -> list[int]:
    """Positions (all of `data` by default) whose images cannot be read. Reads every one of them once.

    Raises:
        ValueError, TypeError: For an image that can be read but is not what a model takes, as reading it does.
    """
    positions = range(len(data)) if positions is None else positions
    plain = data.select(positions, augmentation="none", broken_images="raise")

    def is_broken(index: int) -> bool:
        try:
            # Files are decoded as they are, without the resizing, which takes most of the time.
            plain.stored.image(index) if not opaque[index] else plain[index]
        except BrokenImageError:
            return True
        return False

    opaque = plain.stored.opaque
    # Decoding releases the interpreter. Data sets of others may not be made for threads.
    with ThreadPoolExecutor(1 if opaque.any() else min(8, os.cpu_count() or 1)) as threads:
        checked = threads.map(is_broken, range(len(plain)))
        found = list(progress_bar(checked, total=len(plain), title="reading images", unit="image"))
    return [position for position, broken in zip(positions, found, strict=True) if broken]


def listing(data: PixelDataset, positions: Sequence[int], limit: int = 5) -> str:
    """Names of some images of `data`, for a message."""
    return shorten([data.image_name(position) for position in positions], limit)


def _left_out(data: PixelDataset, positions: list[int], problem: str) -> PixelDataset:
    if not positions:
        return data
    found = f"{len(positions)} of {len(data)} images of {data.name} {problem}: {listing(data, positions)}."
    if len(positions) == len(data):
        raise BrokenImageError(f"{found} Nothing is left.")
    if data.broken_images == "raise":
        raise BrokenImageError(f"{found} Mend or remove them, or leave them out with `broken_images='skip'`.")
    logger.warning("%s They are left out.", found)
    return data.select(np.setdiff1d(np.arange(len(data)), positions))
