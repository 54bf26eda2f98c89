"""What a trainer makes of the data it is given: checked, without broken images, nothing on both sides."""

from __future__ import annotations

import logging
from typing import Any, cast

import numpy as np
from transformers import TrainerCallback

from ..data import (
    Augmentation,
    PixelDataset,
    PixelStream,
    as_pixel_dataset,
    check_class_names,
    check_labels,
    duplicate_groups,
    find_overlap,
    is_stream,
    listing,
    named_test_set,
    stratified_split,
    without_absent,
    without_broken,
)
from ..pixels import Preprocessing
from .arguments import AutoLoraTrainingArguments
from .streams import limited, prepare_streams


logger = logging.getLogger(__name__)


def prepare_data(
    train: Any,
    validation: Any,
    args: AutoLoraTrainingArguments,
    preprocessing: Preprocessing,
    num_classes: int | None,
) -> tuple[PixelDataset | PixelStream, PixelDataset | PixelStream]:
    """Training and validation data as pixels.

    Images that are missing or empty are left out of both, and validation images that cannot be read too: a substitute
    would count twice. Damaged training images are only found when they are read; see [`PixelDataset`].

    Args:
        train, validation: What [`as_pixel_dataset`] takes; `None` for `validation` holds out a part of `train`.
        args (`AutoLoraTrainingArguments`): Columns, augmentation, seed, fraction to hold out, broken images.
        preprocessing (`Preprocessing`): Of the model.
        num_classes (`int`, *optional*): Of the model. `None`: the objective has no labels, so none are read.

    Raises:
        ValueError: For labels that do not fit, class names of another order, no image that can be read, and validation
            data that are the test set or share images with the training data.
    """
    options: dict[str, Any] = {
        "image_column": args.image_column,
        "label_column": args.label_column,
        "broken_images": args.broken_images,
        "labelled": num_classes is not None,
    }
    if validation is not None:
        refuse_test_set(validation)
    if is_stream(train) or is_stream(validation):
        return prepare_streams(args, preprocessing, num_classes, train, validation)
    train = as_pixel_dataset(
        train,
        preprocessing,
        augmentation=cast(Augmentation, args.augmentation),
        name="train_dataset",
        seed=args.seed,
        **options,
    )
    if num_classes is not None:
        check_labels(train.labels, num_classes, "train_dataset")
    train = without_absent(_reading_as(args.broken_images, train))
    if validation is None:
        args.limit_held_out(len(train))
        return hold_out(train, args.validation_fraction, args.seed)
    validation = as_pixel_dataset(validation, preprocessing, name="eval_dataset", **options)
    if num_classes is not None:
        check_labels(validation.labels, num_classes, "eval_dataset")
        check_class_names(train.class_names, validation.class_names, "eval_dataset")
    validation = limited(without_absent(_reading_as(args.broken_images, validation)), args)
    # Broken images first: the same error page in both sets is no image that they share.
    return train, _new_images(train, without_broken(validation))


def hold_out(train: PixelDataset, fraction: float, seed: int) -> tuple[PixelDataset, PixelDataset]:
    """Splits training data into those to train with and those to validate on, without augmentation.

    Proportional in every class; exact copies of one image stay together, and held-out images that cannot be read are
    left out.
    """
    groups = duplicate_groups(train)
    kept, held_out = stratified_split(train.labels, fraction, seed, groups)
    copies = int((groups != np.arange(len(groups))).sum())
    if copies:
        logger.warning(
            "%d of %d images of %s are exact copies of others, which the split into training and validation images "
            "keeps together.",
            copies,
            len(train),
            train.name,
        )
    validation = train.select(held_out, augmentation="none")
    return train.select(kept), without_broken(validation)


def refuse_test_set(validation: Any) -> None:
    """Raises `ValueError` if something about the validation data says that they are a test set."""
    name = named_test_set(validation)
    if name is not None:
        raise ValueError(
            f"`eval_dataset` is {name}. Its accuracy would choose the learning rate and the best weights, so "
            "the reported test accuracy would be too good. Leave `eval_dataset` out (a part of the training set is "
            "held out by itself) or pass a validation split, and give the test split to `evaluate_robustness`."
        )


def warn_of_few(images: int, accuracies: bool) -> None:
    """Warns of a validation set whose accuracies, or whose loss, would be mostly chance."""
    if images < 50:
        steps = f"robust accuracy moves in steps of {100 / images:.0f} points"
        logger.warning(
            "Only %d validation images: %s, and it decides about the learning rate and the best weights. Pass an "
            "`eval_dataset` or raise `validation_fraction`.",
            images,
            steps if accuracies else "their mean loss is mostly chance",
        )


class BrokenImagesCallback(TrainerCallback):
    """Warns of training images that could not be read: after the first pass and after every epoch, of each once.

    With several processes, each warns of those it found.
    """

    def __init__(self, train: PixelDataset) -> None:
        self.train = train
        self._reported: set[int] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The accuracy that the loss scalars start from was measured on every training image.
        self._report()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._report()

    def _report(self) -> None:
        broken = self.train.broken
        new = [position for position in broken if position not in self._reported]
        if new:
            self._reported.update(new)
            logger.warning(
                "%d of %d images of %s cannot be read (%d so far): %s. Others of their class replace them.",
                len(new),
                len(self.train),
                self.train.name,
                len(broken),
                listing(self.train, new, limit=20),
            )


def _reading_as(broken_images: str, data: PixelDataset) -> PixelDataset:
    """A `PixelDataset` that was given as such may have been made with another setting."""
    return (
        data
        if data.broken_images == broken_images
        else data.select(range(len(data)), broken_images=cast(Any, broken_images))
    )


def _new_images(train: PixelDataset, validation: PixelDataset) -> PixelDataset:
    """The validation images that are not in the training data. Raises `ValueError` if more than a few are."""
    overlap = find_overlap(train, validation)
    if not overlap.tolerable:
        raise ValueError(
            f"`eval_dataset` shares images with `train_dataset` ({overlap}). The schedule would see accuracy on "
            "memorised images and never halve the learning rate. Leave `eval_dataset` out, and a part of the training "
            "set is held out by itself."
        )
    if not overlap:
        return validation
    logger.warning("Some validation images are exact copies of training images (%s) and are left out.", overlap)
    return validation.select(np.setdiff1d(np.arange(len(validation)), overlap.positions))
