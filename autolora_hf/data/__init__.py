"""Data sets: `datasets.Dataset`, folders of images and torch data sets to pixels in [0, 1] and labels."""

from .dataset import PixelDataset, as_pixel_dataset, collate, same_data
from .description import DataDescription, describe_data
from .images import Augmentation, PixelTransform, to_rgb
from .sources import load_source
from .splits import check_class_names, check_labels, is_test_split, stratified_split, stratified_subset


__all__ = [
    "Augmentation",
    "DataDescription",
    "PixelDataset",
    "PixelTransform",
    "as_pixel_dataset",
    "check_class_names",
    "check_labels",
    "collate",
    "describe_data",
    "is_test_split",
    "load_source",
    "same_data",
    "stratified_split",
    "stratified_subset",
    "to_rgb",
]
