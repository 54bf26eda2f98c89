"""`autolora evaluate`."""

from __future__ import annotations

import argparse
import dataclasses
from typing import get_args

import torch
from accelerate import PartialState

from ..attacks import PGD
from ..config import Norm, ThreatModel, radius_argument
from ..data import as_pixel_dataset, check_class_names
from ..evaluation import RobustnessReport, evaluate_robustness
from ..evaluation.attack_list import FIRST_PASS
from ..evaluation.sharding import all_processes
from .data import open_data
from .display import show_progress
from .model import add_model_arguments, open_model


def run(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="autolora evaluate",
        description="Measures natural and robust accuracy of a saved model, with 95 % confidence intervals. Under "
        "torchrun or accelerate launch the images are shared out to the processes, for instance one a GPU: "
        "`torchrun --nproc-per-node 8 -m autolora_hf evaluate ...`. Every image gets the same verdict as from one "
        "process.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_model_arguments(parser)
    parser.add_argument("--data", required=True, help="folder of images by class, Hub data set name, or 'digits'")
    parser.add_argument("--split", help="split of --data, e.g. test")
    parser.add_argument("--attack", choices=["autoattack", "pgd"], default="autoattack", help="what attacks the model")
    parser.add_argument("--steps", type=int, default=50, help="steps of --attack pgd")
    parser.add_argument("--restarts", type=int, default=1, help="restarts of --attack pgd")
    parser.add_argument(
        "--first-pass",
        action="store_true",
        help="find the images that are easily broken by PGD-10 in bfloat16 first: saves time on models that are not "
        "very robust; the others get the whole --attack, in float32",
    )
    parser.add_argument("--norm", choices=get_args(Norm), help="norm of the threat model; as trained when left out")
    parser.add_argument("--eps", type=radius_argument, help="radius, e.g. 8/255; as trained when left out")
    parser.add_argument("--route", choices=["robust", "natural"], default="robust", help="route to measure")
    parser.add_argument("--samples", type=int, default=1000, help="images to use, chosen by seed and class")
    parser.add_argument("--batch-size", type=int, default=128, help="images at a time")
    parser.add_argument("--seed", type=int, default=0, help="seed of the attacks and of the choice of images")
    parser.add_argument(
        "--device", help="where to measure, e.g. cuda; the CPU when left out, or the GPU of each of several processes"
    )
    parser.add_argument(
        "--checkpoint-dir",
        help="folder that keeps the verdicts on every finished batch: the same command, started again after it was "
        "killed, goes on from there, with any number of processes",
    )
    parser.add_argument("--image-column", help="image column of the data set")
    parser.add_argument("--label-column", help="label column of the data set")
    parser.add_argument("--output", help="file to write the report to, as JSON")
    args = parser.parse_args(argv)

    # Joins the other processes, if there are any; without GPUs it has to be told to look for them.
    state = PartialState(cpu=args.device == "cpu" or not torch.cuda.is_available())
    try:
        report = _measure(args, state)
    finally:
        state.destroy_process_group()
    if state.is_main_process:
        print(report)
        if args.output:
            report.save(args.output)


def _measure(args: argparse.Namespace, state: PartialState) -> RobustnessReport:
    show_progress(state.is_main_process)
    with all_processes().together():
        source = open_data(args.data, args.split)
        model = open_model(args)
        changes = {"norm": args.norm, "eps": None if args.eps is None else float(args.eps)}
        threat_model: ThreatModel = dataclasses.replace(
            model.threat_model, **{name: value for name, value in changes.items() if value is not None}
        )
        dataset = as_pixel_dataset(
            source, model.preprocessing, image_column=args.image_column, label_column=args.label_column, name="data"
        )
        check_class_names(model.label_names, dataset.class_names, "data")
    attack = args.attack
    if attack == "pgd":
        attack = PGD(threat_model, steps=args.steps, restarts=args.restarts, seed=args.seed)
    if args.first_pass:
        attack = [FIRST_PASS, attack]
    device = args.device
    if device is None and state.num_processes > 1:
        device = state.device
    return evaluate_robustness(
        model,
        dataset,
        threat_model,
        attack,
        route=args.route,
        max_samples=min(args.samples, len(dataset)),
        batch_size=args.batch_size,
        seed=args.seed,
        device=device,
        checkpoint_dir=args.checkpoint_dir,
    )
