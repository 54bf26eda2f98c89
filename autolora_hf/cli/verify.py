"""`autolora verify`."""

from __future__ import annotations

import argparse

from ..hub.remeasure import MissingDataError
from ..hub.verification import NothingPublishedError, verify_release
from .data import open_data
from .display import show_progress
from .model import add_model_arguments
from .parser import CommandParser
from .result import DONE, FAILED, NOT_MEASURED, CommandResult, NotMeasuredError


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="autolora verify",
        description="Measures the natural and robust accuracy that a saved model publishes of itself again, with the "
        "recorded attack on the recorded images, and compares. Exit status: 0 every figure holds; 1 one does not, or "
        "the release contradicts itself; 2 wrong usage; 3 a figure could not be measured again, or on too few images "
        "to tell.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--data",
        help="folder of images by class, Hub data set name, or 'digits'; the recorded data when left out, if public",
    )
    parser.add_argument("--split", help="split of --data, e.g. test")
    parser.add_argument("--samples", type=int, help="quick check on so many images, chosen at random by class")
    parser.add_argument("--subset-seed", type=int, help="seed of the choice of images; drawn afresh when left out")
    parser.add_argument("--batch-size", type=int, help="images at a time; as recorded when left out")
    parser.add_argument("--device", help="where to measure, e.g. cuda; the CPU when left out")
    parser.add_argument("--image-column", help="image column of the data set")
    parser.add_argument("--label-column", help="label column of the data set")
    parser.add_argument("--output", help="file to write the result to, as JSON")
    return parser


def run(argv: list[str]) -> CommandResult:
    """The status is 0 if every published figure holds, 1 if one does not, and 3 if that is not known."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.split and not args.data:
        parser.error("--split is about --data; the recorded split is used without it")

    show_progress()
    dataset = None if args.data is None else open_data(args.data, args.split)
    try:
        result = verify_release(
            args.model,
            dataset,
            base_model=args.base_model,
            revision=args.revision,
            token=args.token,
            max_samples=args.samples,
            subset_seed=args.subset_seed,
            batch_size=args.batch_size,
            device=args.device,
            image_column=args.image_column,
            label_column=args.label_column,
        )
    except MissingDataError as error:
        raise NotMeasuredError(f"{error} Options: `--data` and `--split`.") from error
    except NothingPublishedError as error:
        raise NotMeasuredError(str(error)) from error
    print(result)
    if args.output:
        result.save(args.output)
    status = DONE if result.holds else FAILED if result.refuted else NOT_MEASURED
    return CommandResult({**result.to_dict(), "files": {"verification": args.output}}, status)
