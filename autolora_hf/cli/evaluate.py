"""`autolora evaluate`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any, get_args

import torch
from accelerate import PartialState

from ..attacks import PGD
from ..config import Norm, ThreatModel, radius_argument
from ..data import as_pixel_dataset, check_class_names
from ..evaluation import RobustnessReport, TransferAttack, evaluate_robustness, examples_figure
from ..evaluation.attack_list import FIRST_PASS
from ..evaluation.sharding import all_processes
from ..evaluation.training_log import read_training_log
from ..evaluation.transfer import TRANSFER_STEPS
from ..factory import load_autolora_model
from ..files import check_writable
from ..modeling import AutoLoraModel
from .data import open_data
from .display import show_progress
from .model import add_model_arguments, check_device, open_model
from .parser import CommandParser
from .result import CommandResult, report_values


def build_parser() -> CommandParser:
    parser = CommandParser(
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
    parser.add_argument(
        "--transfer-from",
        metavar="MODEL",
        help=f"folder or Hub repository of another saved model of the same classes: after --attack, images made with "
        f"PGD-{TRANSFER_STEPS} to fool it are tried too",
    )
    parser.add_argument("--norm", choices=get_args(Norm), help="norm of the threat model; as trained when left out")
    parser.add_argument("--eps", type=radius_argument, help="radius, e.g. 8/255; as trained when left out")
    parser.add_argument(
        "--route", choices=["robust", "natural", "both"], default="robust", help="route to measure, or both of them"
    )
    parser.add_argument(
        "--curve",
        nargs="*",
        type=radius_argument,
        metavar="RADIUS",
        help="measure robust accuracy at these radii too, under PGD-20, e.g. 2/255 4/255; without any, from a quarter "
        "to four times --eps",
    )
    parser.add_argument(
        "--corruptions",
        nargs="*",
        metavar="NAME",
        help="measure accuracy under these common corruptions, e.g. fog frost; without any, under all fifteen. Needs "
        'pip install "autolora-hf[corruptions]"',
    )
    parser.add_argument("--no-diagnostics", action="store_true", help="do not look for gradient masking")
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
    parser.add_argument("--output", metavar="FILE", help="file to write the report to, as JSON")
    parser.add_argument("--html", metavar="FILE", help="file to write the report to, as one HTML page with figures")
    parser.add_argument("--examples", type=int, default=6, help="adversarial examples to show in --html; 0 for none")
    parser.add_argument(
        "--training-log",
        metavar="FILE",
        help="trainer_state.json of a checkpoint of the training, whose curves are shown in --html",
    )
    return parser


def run(argv: list[str]) -> CommandResult:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.examples < 0:
        parser.error(f"--examples must not be negative, got {args.examples}")
    check_device(parser, args.device)
    if args.training_log and not args.html:
        parser.error("--training-log is for the page that --html names")
    for path in filter(None, (args.output, args.html)):
        check_writable(path)
    log_history = read_training_log(args.training_log) if args.training_log else None

    # Joins the other processes, if there are any; without GPUs it has to be told to look for them.
    state = PartialState(cpu=args.device == "cpu" or not torch.cuda.is_available())
    try:
        report, model, dataset = _measure(args, state)
    finally:
        state.destroy_process_group()
    if not state.is_main_process:
        return CommandResult()
    print(report)
    if args.output:
        report.save(args.output)
    if args.html:
        examples = None
        if args.examples:
            model.to(state.device if args.device is None else args.device)
            examples = examples_figure(model, dataset, report, args.examples)
        # Of a folder its name alone: the page may be passed on.
        name = Path(args.model).resolve().name if Path(args.model).is_dir() else args.model
        title = f"Robustness of {name}"
        report.save_html(args.html, title=title, examples=examples, log_history=log_history)
    files = {"report": args.output, "html": args.html, "checkpoints": args.checkpoint_dir}
    return CommandResult({"model": args.model, **report_values(report), "files": files})


def _measure(args: argparse.Namespace, state: PartialState) -> tuple[RobustnessReport, AutoLoraModel, Any]:
    """The report, and the model and the images that it is about."""
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
    attacks = [FIRST_PASS, attack] if args.first_pass else [attack]
    device = args.device
    if device is None and state.num_processes > 1:
        device = state.device
    if args.transfer_from:
        with all_processes().together():
            source = load_autolora_model(args.transfer_from, token=args.token)
            search = PGD(threat_model, steps=TRANSFER_STEPS, seed=args.seed)
            name = Path(args.transfer_from).name
            attacks.append(TransferAttack(source if device is None else source.to(device), search, name))
    report = evaluate_robustness(
        model,
        dataset,
        threat_model,
        attacks,
        route=args.route,
        max_samples=min(args.samples, len(dataset)),
        batch_size=args.batch_size,
        seed=args.seed,
        device=device,
        checkpoint_dir=args.checkpoint_dir,
        diagnostics=not args.no_diagnostics,
        curve=args.curve is not None and ([float(radius) for radius in args.curve] or True),
        corruptions=args.corruptions is not None and (args.corruptions or True),
    )
    return report, model, dataset
