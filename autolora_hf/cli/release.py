"""`autolora release`."""

from __future__ import annotations

import argparse
import logging
import shlex
import tempfile
from pathlib import Path
from typing import Any, cast

from ..data import PixelDataset, as_pixel_dataset, check_class_names, check_unseen, stratified_subset, without_absent
from ..evaluation import evaluate_robustness
from ..evaluation.examples import draw_examples
from ..hub.extraction import Extraction, extract_adapter, extract_for_accuracy
from ..hub.model_card import CARD, write_model_card
from ..modeling import AutoLoraModel
from ..training import AutoLoraTrainer, AutoLoraTrainingArguments
from ..training.data import hold_out
from .data import open_data
from .display import show_progress
from .model import add_model_arguments, open_model
from .parser import CommandParser
from .result import CommandResult, report_values


logger = logging.getLogger(__name__)

EXAMPLES = "adversarial_examples.png"
# More would not change what is decided with them, and take long.
_VALIDATION_IMAGES, _CALIBRATION_IMAGES = 500, 1000


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="autolora release",
        description=(
            "Makes a release of a trained model: measured with AutoAttack on test data, with its card and a picture. "
            "With --adapter-size or --keep, of a low-rank robust adapter extracted from a model of mode 'full'."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_model_arguments(parser)
    parser.add_argument("output", help="folder to write the release to")
    parser.add_argument("--data", help="test data: folder of images by class, Hub data set name, or 'digits'")
    parser.add_argument("--split", help="split of --data, e.g. test")
    parser.add_argument("--samples", type=int, default=1000, help="test images to attack, chosen by seed and class")
    parser.add_argument("--batch-size", type=int, default=128, help="images at a time")
    parser.add_argument("--seed", type=int, default=0, help="seed of the attacks and of the choice of images")
    parser.add_argument("--image-column", help="image column of the data sets")
    parser.add_argument("--label-column", help="label column of the data sets")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--adapter-size", type=float, help="extract an adapter of this share of the full model's values, e.g. 0.1"
    )
    size.add_argument(
        "--keep",
        type=float,
        help="extract the smallest adapter that keeps this share of the robust accuracy gained by training, under PGD "
        "on validation images, e.g. 0.9",
    )
    parser.add_argument("--train-data", help="training data, for --keep and --repair-epochs; improves --adapter-size")
    parser.add_argument("--train-split", help="split of --train-data, e.g. train")
    parser.add_argument("--validation-data", help="images for --keep; those held out of --train-data when left out")
    parser.add_argument("--validation-split", help="split of --validation-data")
    parser.add_argument("--repair-epochs", type=int, default=0, help="epochs to train the extracted adapter for")
    parser.add_argument("--name", help="name the model will have on the Hub, 'org/name', for the card")
    parser.add_argument("--dataset-name", help="what the card calls the data")
    parser.add_argument("--license", help="licence of the release, for instance apache-2.0")
    return parser


def run(argv: list[str]) -> CommandResult:
    parser = build_parser()
    args = parser.parse_args(argv)
    extracting = args.adapter_size is not None or args.keep is not None
    if args.repair_epochs and not extracting:
        parser.error("--repair-epochs trains an extracted adapter: give --adapter-size or --keep too")
    if (args.keep is not None or args.repair_epochs) and not args.train_data:
        parser.error("--keep and --repair-epochs need --train-data")

    show_progress()
    # Everything that can be wrong is read and checked before the first measurement.
    columns = {"image_column": args.image_column, "label_column": args.label_column}
    test = open_data(args.data, args.split) if args.data else None
    train = open_data(args.train_data, args.train_split) if args.train_data else None
    validation = open_data(args.validation_data, args.validation_split) if args.validation_data else None
    model = open_model(args)
    if test is not None:
        test = as_pixel_dataset(test, model.preprocessing, name="data", **columns)
        check_class_names(model.label_names, test.class_names, "data")
    if train is not None:
        train = as_pixel_dataset(train, model.preprocessing, name="training data", broken_images="skip", **columns)
        check_class_names(model.label_names, train.class_names, "training data")
    if validation is not None:
        validation = as_pixel_dataset(validation, model.preprocessing, name="validation data", **columns)
        check_class_names(model.label_names, validation.class_names, "validation data")
    notes = [] if test is None else check_unseen(test, {"training": train, "validation": validation}, "--data")
    extraction = report = None
    if extracting:
        extraction = _extract(model, train, validation, args)
        print(extraction)
        model = extraction.model
    if args.repair_epochs:
        # The data as they are: the trainer augments them.
        test = _repair(model, cast(PixelDataset, train).source, test, args, columns)
    if test is not None:
        samples = {"max_samples": min(args.samples, len(test)), "batch_size": args.batch_size, "seed": args.seed}
        report = evaluate_robustness(model, test, **samples)
        report.warnings += notes
        print(f"\n{report}")
        model.add_result(report)

    folder = Path(args.output)
    model.save_pretrained(folder)
    figures = {}
    if report is not None:
        draw_examples(model, test, report, folder / EXAMPLES)
        figures["Clean image, perturbation, adversarial image, and what the model says"] = EXAMPLES
    write_model_card(
        folder,
        model,
        name=args.name,
        dataset=args.dataset_name,
        license=args.license,
        figures=figures,
        separate=train is not None,
        command=f"autolora release {shlex.join(argv)}",
    )
    print(f"\nReleased in {folder}/. Publish it with: autolora push {folder} {args.name or 'ORG/NAME'}")
    return CommandResult(
        {
            "mode": model.autolora_config.mode,
            "adapter": extraction
            and {
                "values": extraction.values,
                "full_values": extraction.full_values,
                "size": extraction.size,
                "explained": extraction.total_explained,
            },
            "test": report and report_values(report),
            "files": {
                "model": str(folder),
                "card": str(folder / CARD),
                "examples": str(folder / EXAMPLES) if figures else None,
            },
        }
    )


def _extract(model: AutoLoraModel, train: Any, validation: Any, args: argparse.Namespace) -> Extraction:
    if args.keep is None:
        calibration = None if train is None else _subset(train, _CALIBRATION_IMAGES, args.seed)
        return extract_adapter(model, args.base_model, size=args.adapter_size, calibration=calibration)
    if validation is None:
        train, validation = _split(model, train, args.seed)
    return extract_for_accuracy(
        model,
        args.base_model,
        _subset(validation, _VALIDATION_IMAGES, args.seed),
        keep=args.keep,
        calibration=_subset(train, _CALIBRATION_IMAGES, args.seed),
        progress=True,
    )


def _split(model: AutoLoraModel, train: PixelDataset, seed: int) -> tuple[PixelDataset, PixelDataset]:
    """Training images, and those that the training held out of them for validation, if its plan tells which."""
    plan = model.training_plan or {}
    total = [plan.get(key) for key in ("training_images", "validation_images")]
    fraction, used = plan.get("validation_fraction"), plan.get("seed")
    known = all(isinstance(number, int) for number in total)
    train = without_absent(train)
    if known and isinstance(used, int) and isinstance(fraction, float) and 0 < fraction < 1:
        kept, held_out = hold_out(train, fraction, used)
        if [len(kept), len(held_out)] == total:
            return kept, held_out
    logger.warning(
        "Nothing tells which of the training images the model was not fitted to, so --keep is judged on images "
        "that it may have seen. Give --validation-data with new ones (not the test data)."
    )
    return hold_out(train, 0.1, seed)


def _subset(data: PixelDataset, size: int, seed: int) -> PixelDataset:
    return data.select(stratified_subset(data.labels, min(size, len(data)), seed))


def _repair(model: AutoLoraModel, train: Any, test: Any, args: argparse.Namespace, columns: dict[str, Any]) -> Any:
    """Trains the adapter on; returns the test data, checked to be none of the training data."""
    plan = model.training_plan or {}
    with tempfile.TemporaryDirectory() as folder:
        arguments = AutoLoraTrainingArguments(
            output_dir=folder,
            threat_norm=model.threat_model.norm,
            eps=model.threat_model.eps,
            num_train_epochs=args.repair_epochs,
            # A fifth of what an adapter starts with when it is trained from nothing; see docs/extraction.md.
            learning_rate=1e-3,
            seed=args.seed,
            **columns,
        )
        trainer = AutoLoraTrainer(model, arguments, train_dataset=train)
        test = None if test is None else trainer.prepare_test_data(test)
        trainer.train()
    model.training_plan = {**plan, **{f"repair_{key}": value for key, value in trainer.plan.items()}}
    model.eval()
    return test
