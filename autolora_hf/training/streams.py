"""Training on streams: what differs from data of which every image can be had by its position."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from ..data import (
    PixelDataset,
    PixelStream,
    as_pixel_dataset,
    as_pixel_stream,
    check_class_names,
    check_labels,
    is_stream,
    without_absent,
    without_broken,
)
from ..data.overlap import TOLERATED_SHARE
from ..data.stored import file_digests
from ..pixels import Preprocessing
from .arguments import AutoLoraTrainingArguments
from .publishing import PublishingTrainer


logger = logging.getLogger(__name__)


class StreamingTrainer(PublishingTrainer):
    """The part of [`AutoLoraTrainer`] that feeds streams to the processes."""

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> DataLoader:
        if not isinstance(dataset, PixelStream):
            return super()._get_dataloader(dataset, *args, **kwargs)
        # A stream has worker processes of its own.
        with _without_workers(self.args):
            loader = super()._get_dataloader(dataset, *args, **kwargs)
        if isinstance(loader.dataset, IterableDatasetShard):
            # What the last batch is filled up with must not be counted, so accelerate has to know of it.
            loader.dataset.total_dataset_length = len(dataset)
            cast(Any, loader.batch_sampler).num_processes = self.args.world_size
        return loader

    def prepare_test_data(self, dataset: Any) -> PixelDataset:
        test = super().prepare_test_data(dataset)
        for seen in (self.train_dataset, self.eval_dataset):
            if isinstance(seen, PixelStream):
                _check_disjoint(seen, test, "Pass test data that was not used in training.")
        return test


def prepare_streams(
    args: AutoLoraTrainingArguments, preprocessing: Preprocessing, num_classes: int | None, train: Any, validation: Any
) -> tuple[PixelDataset | PixelStream, PixelDataset | PixelStream]:
    """Training and validation data, of which one at least is a stream, checked against each other and the model.

    Without validation data a stratified part of the training set is held out.

    Raises:
        TypeError, ValueError, FileNotFoundError: If they do not fit, as [`as_pixel_stream`] and [`as_pixel_dataset`].
    """
    # Every process goes through the whole stream and takes its part of each batch, as with other data: equal parts,
    # the last ones filled up. With `dispatch_batches` the parts of the last batch would be of another size.
    cast(AcceleratorConfig, args.accelerator_config).dispatch_batches = False
    options = {"labelled": num_classes is not None}
    train = _open(args, train, preprocessing, "train_dataset", augmentation=args.augmentation, shuffle=True, **options)
    if num_classes is not None:
        check_labels(train.labels, num_classes, "train_dataset")
    if validation is None:
        args.limit_held_out(len(train))
        kept, held_out = train.hold_out(args.validation_fraction)
        return kept, held_out.without_broken()
    validation = _open(args, validation, preprocessing, "eval_dataset", **options)
    if num_classes is not None:
        check_labels(validation.labels, num_classes, "eval_dataset")
        check_class_names(train.class_names, validation.class_names, "eval_dataset")
    _check_disjoint(
        train,
        validation,
        "The schedule would see accuracy on memorised images and never halve the learning rate. Leave `eval_dataset` "
        "out, and a part of the training set is held out by itself; or split a stream of the datasets library with "
        "`dataset.take(n)` and `dataset.skip(n)`.",
    )
    validation = limited(validation, args)
    return train, without_broken(validation) if isinstance(validation, PixelDataset) else validation.without_broken()


def limited(validation: PixelDataset | PixelStream, args: AutoLoraTrainingArguments) -> PixelDataset | PixelStream:
    """The part of a given validation set that is used: at most `max_validation_images`, the same in every epoch."""
    limit, given = args.max_validation_images, len(validation)
    if limit is None or given <= limit:
        return validation
    seed = () if isinstance(validation, PixelStream) else (args.seed,)  # a stream has its own
    chosen = validation.bounded(limit, *seed)
    logger.info("%d of %d validation images are used (`max_validation_images`).", len(chosen), given)
    return chosen


def unaugmented(data: PixelDataset | PixelStream) -> PixelDataset | PixelStream:
    """The same samples without augmentation, in the order they are stored."""
    return data.plain() if isinstance(data, PixelStream) else data.select(range(len(data)), augmentation="none")


def some_items(data: PixelDataset | PixelStream, seed: int, count: int) -> list[dict[str, Any]]:
    """Up to `count` samples without augmentation, the same in every process: drawn, or a stream's first."""
    if isinstance(data, PixelStream):
        return data.first(count)
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:count]
    plain = data.select(chosen.tolist(), augmentation="none")
    return [plain[index] for index in range(len(plain))]


def _open(
    args: AutoLoraTrainingArguments, source: Any, preprocessing: Preprocessing, name: str, **options: Any
) -> PixelDataset | PixelStream:
    options |= {"image_column": args.image_column, "label_column": args.label_column}
    options["broken_images"] = args.broken_images
    if not is_stream(source):
        options.pop("shuffle", None)
        return without_absent(as_pixel_dataset(source, preprocessing, name=name, seed=args.seed, **options))
    seed = args.seed if args.data_seed is None else args.data_seed
    workers = args.dataloader_num_workers or 0
    return as_pixel_stream(source, preprocessing, name=name, seed=seed, num_workers=workers, **options)


def _shared_images(first: PixelDataset | PixelStream, second: PixelDataset | PixelStream) -> int:
    """How many images of `second` are in `first` too, where one of them is a stream.

    Image files are compared by their bytes, which of a `PixelDataset` are read for it, and what a stream gives decoded
    by its pixels.
    """
    contents = [data.contents if isinstance(data, PixelStream) else _contents(data) for data in (first, second)]
    return int(np.isin(contents[1], contents[0]).sum())


def _check_disjoint(first: PixelDataset | PixelStream, second: PixelDataset | PixelStream, advice: str) -> None:
    """Raises `ValueError`, with `advice`, if two data sets have more images in common than chance explains."""
    count = _shared_images(first, second)
    if count > TOLERATED_SHARE * len(second):
        raise ValueError(f"{second.name} shares {count} of its {len(second)} images with {first.name}. {advice}")
    if count:
        logger.warning("%s shares %d of its %d images with %s.", second.name, count, len(second), first.name)


def _contents(data: PixelDataset) -> np.ndarray:
    stored = data.stored
    return file_digests(stored, np.flatnonzero(stored.sizes > 0), whole=True)


@contextmanager
def _without_workers(args: TrainingArguments) -> Iterator[None]:
    none = {"dataloader_num_workers": 0, "dataloader_persistent_workers": False, "dataloader_prefetch_factor": None}
    none["dataloader_multiprocessing_context"] = None
    kept = {name: getattr(args, name) for name in none}
    vars(args).update(none)
    try:
        yield
    finally:
        vars(args).update(kept)
