"""Data sets: `datasets.Dataset`, folders of images and torch data sets to pixels in [0, 1] and labels."""

from .broken import find_broken, listing, without_absent, without_broken
from .dataset import PixelDataset, as_pixel_dataset, collate
from .description import DataDescription, describe_data
from .images import Augmentation, BrokenImageError, PixelTransform, to_rgb
from .loading import load_source
from .overlap import Overlap, check_unseen, duplicate_groups, find_overlap, same_data
from .splits import (
    check_class_names,
    check_labels,
    is_test_split,
    named_test_set,
    stratified_split,
    stratified_subset,
)
from .stream import PixelStream, as_pixel_stream, is_stream
from .stream_sources import load_shards


__all__ = [
    "Augmentation",
    "BrokenImageError",
    "DataDescription",
    "Overlap",
    "PixelDataset",
    "PixelStream",
    "PixelTransform",
    "as_pixel_dataset",
    "as_pixel_stream",
    "check_class_names",
    "check_labels",
    "check_unseen",
    "collate",
    "describe_data",
    "duplicate_groups",
    "find_broken",
    "find_overlap",
    "is_stream",
    "is_test_split",
    "listing",
    "load_shards",
    "load_source",
    "named_test_set",
    "same_data",
    "stratified_split",
    "stratified_subset",
    "to_rgb",
    "without_absent",
    "without_broken",
]
