"""`autolora verify`."""

from __future__ import annotations

import argparse

from ..hub.remeasure import MissingDataError
from ..hub.verification import verify_release
from .data import open_data
from .display import show_progress
from .model import add_model_arguments


def run(argv: list[str]) -> int:
    """Returns 0 if every published figure holds, else 1."""
    parser = argparse.ArgumentParser(
        prog="autolora verify",
        description="Measures the natural and robust accuracy that a saved model publishes of itself again, with the "
        "recorded attack on the recorded images, and compares. Exit status: 0 every figure holds; 1 one does not, or "
        "could not be measured; 2 wrong usage.",
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
        raise ValueError(f"{error} Options: `--data` and `--split`.") from error
    print(result)
    if args.output:
        result.save(args.output)
    return 0 if result.holds else 1
