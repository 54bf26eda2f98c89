"""`autolora train`."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from transformers import HfArgumentParser, TrainingArguments, set_seed

from ..config import AutoLoraConfig, PixelRadius, radius_argument
from ..data import PixelDataset, PixelStream, as_pixel_dataset, as_pixel_stream, is_stream
from ..factory import get_autolora_model
from ..hub.model_card import CARD
from ..layers import BRANCHES
from ..objectives import OBJECTIVES, config_for
from ..options import json_object
from ..pixels import Preprocessing
from ..training import AutoLoraTrainer, AutoLoraTrainingArguments
from ..training.method_arguments import MethodArguments
from ..training.publishing import CURVES
from .data import open_data
from .display import show_progress
from .parser import CommandParser
from .result import CommandResult, report_values


@dataclass
class ModelArguments:
    model: str = field(
        metadata={
            "help": "Checkpoint: a timm name ('resnet50'), 'hf-hub:org/name', 'org/name', a folder, 'quickstart'."
        }
    )
    mode: str = field(
        default="full",
        metadata={"help": "'full' trains the backbone, 'adapter' an adapter (--branch) on a frozen one."},
    )
    branch: str = field(
        default="lora", metadata={"help": f"Kind of the branches: {', '.join(BRANCHES)}; see docs/methods.md."}
    )
    branch_args: str | None = field(
        default=None, metadata={"help": 'Further fields of that kind, in JSON: \'{"gate": "hard"}\' for foura.'}
    )
    natural_route: str | None = field(
        default=None,
        metadata={
            "help": "What the natural route adds to the robust one: 'branch', 'plain' (only its norms) or 'none' (no "
            "such route). Default: what the objective needs."
        },
    )
    stop_gradient: bool | None = field(
        default=None,
        metadata={
            "help": "Whether the natural route's gradient stops at the backbone. Default: as the objective has it."
        },
    )
    layout: str | None = field(default=None, metadata={"help": "Factorisation of the branch: 'released' or 'peft'."})
    norm: str | None = field(
        default=None,
        metadata={
            "help": "BatchNorm of the two routes: 'shared', 'robust_stats', 'dual', 'split' or 'frozen'. Default: as "
            "the objective has it."
        },
    )
    r: int = field(default=8, metadata={"help": "Rank of the branches."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Scale of a branch is lora_alpha / r."})
    image_size: list[int] | None = field(
        default=None,
        metadata={"help": "Size of the images in pixels: one number, or height and width. Default: the checkpoint's."},
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout in the branches, with --layout peft only."})
    target_modules: str | None = field(
        default=None,
        metadata={
            "help": "Layers that get a branch: 'all', 'all-linear' or a regular expression. Default: 'all', in mode "
            "adapter without those that PEFT alone could not load."
        },
    )


@dataclass
class DataArguments:
    train_data: str = field(
        metadata={
            "help": "Folder of images by class (of images for fare and sim-clip), folder saved by `datasets`, Hub "
            "data set name, tar shards (a file or a pattern such as 'train-*.tar', which are streamed), or 'digits'."
        }
    )
    train_split: str | None = field(default=None, metadata={"help": "Split of --train-data, e.g. 'train'."})
    validation_data: str | None = field(
        default=None, metadata={"help": "Validation data. Default: a stratified 5 per cent of the training data."}
    )
    validation_split: str | None = field(default=None, metadata={"help": "Split of --validation-data."})
    test_data: str | None = field(
        default=None, metadata={"help": "Test data, attacked with AutoAttack after training; never used before."}
    )
    test_split: str | None = field(default=None, metadata={"help": "Split of --test-data, e.g. 'test'."})
    test_samples: int = field(default=1000, metadata={"help": "Test images to attack, chosen by seed and class."})


# Options of `TrainingArguments` that `--help` lists next to our own; `--help-all` lists every one.
COMMON = (
    "output_dir",
    "resume_from_checkpoint",
    "seed",
    "bf16",
    "gradient_accumulation_steps",
    "dataloader_num_workers",
    "report_to",
    "use_cpu",
    "push_to_hub",
    "hub_model_id",
    "hub_strategy",
    "hub_private_repo",
)
# Options the schedule and the collator rely on: there is no other sensible value.
FIXED = ("eval_strategy", "save_strategy", "remove_unused_columns", "ddp_find_unused_parameters")


class TrainParser(CommandParser, HfArgumentParser):
    """Options from dataclasses."""


def build_parser(show_all: bool = False) -> TrainParser:
    """Parser of the model, data and training options; `show_all`: help for the rarely needed ones too."""
    parser = TrainParser(
        cast(Any, (ModelArguments, DataArguments, AutoLoraTrainingArguments)),
        prog="autolora train",
        usage="autolora train --model MODEL --train-data DATA [options]",
        description=(
            "Robust fine-tuning with AutoLoRa, or with another method (--objective). Nothing but --model and "
            "--train-data has to be chosen. Every option of transformers' TrainingArguments works too; --help-all "
            "lists them."
        ),
    )
    parser.add_argument("--help-all", action="store_true", help="list every option and exit")
    for action in parser._actions:
        if action.type is PixelRadius:
            action.type = radius_argument
        # A list too, which the parser does not see.
        if action.dest == "report_to":
            action.nargs = "+"
    if not show_all:
        own = {*MethodArguments.__annotations__, *AutoLoraTrainingArguments.__annotations__}
        shown = {*own, *COMMON} - set(FIXED)
        inherited = {entry.name for entry in fields(TrainingArguments)} - shown
        for action in parser._actions:
            if action.dest in inherited or any(option.startswith("--no_") for option in action.option_strings):
                action.help = argparse.SUPPRESS
    return parser


def run(argv: list[str]) -> CommandResult:
    if "--help-all" in argv:
        build_parser(show_all=True).print_help()
        return CommandResult()
    parser = build_parser()
    model_args, data, args, _, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    main = args.process_index == 0
    show_progress(main)
    # Everything that can be wrong is read and checked before the first training step.
    train = open_data(data.train_data, data.train_split)
    validation = open_data(data.validation_data, data.validation_split) if data.validation_data else None
    test = open_data(data.test_data, data.test_split) if data.test_data else None
    columns = {"image_column": args.image_column, "label_column": args.label_column}
    # Opened once: the number of classes does not depend on the preprocessing, which is only known with the model.
    labelled = OBJECTIVES[args.objective].classifies
    if is_stream(train):
        opened: PixelDataset | PixelStream = as_pixel_stream(
            train, Preprocessing(), name="train_dataset", labelled=labelled, **columns
        )
        train = opened
    else:
        opened = as_pixel_dataset(train, Preprocessing(), name="training data", labelled=labelled, **columns)
        train = opened.source

    # Head and branches are drawn at random.
    set_seed(args.seed)
    model = get_autolora_model(
        model_args.model,
        _config(model_args, args.objective),
        num_classes=opened.num_classes if labelled else None,
        tower=not labelled,
        image_size=_image_size(model_args.image_size),
    )
    trainer = AutoLoraTrainer(model, args, train_dataset=train, eval_dataset=validation)
    if test is not None:
        test = trainer.prepare_test_data(test)
    trainer.train(resume_from_checkpoint=_checkpoint(args.resume_from_checkpoint))

    folder, report, pushed = Path(args.output_dir), None, None
    if test is not None:
        report = trainer.evaluate_robustness(test, max_samples=min(data.test_samples, len(test)))
        if main:
            print(f"\n{report}")
    dataset, command = _data_name(data.train_data), f"autolora train {shlex.join(argv)}"
    if args.push_to_hub:
        pushed = trainer.push_to_hub(dataset=dataset, command=command)
        if main:
            print(f"\nPublished as {trainer.hub_model_id}: {pushed.commit_url}")
    else:
        trainer.save_model()
        trainer.create_model_card(dataset=dataset, command=command)
    if main:
        print(f"\nSaved in {folder}/: the model, its card (README.md) and {CURVES}.")
    trainer.accelerator.end_training()
    if not main:
        return CommandResult()
    return CommandResult(
        {
            "training_plan": trainer.plan,
            "steps": trainer.state.global_step,
            "skipped_steps": trainer.lr_scheduler.skipped_steps,
            "validation": _validation(trainer),
            "test": report and report_values(report),
            "published": pushed
            and {"repository": trainer.hub_model_id, "commit": pushed.oid, "url": pushed.commit_url},
            "files": {
                "model": str(folder),
                "card": str(folder / CARD),
                "training_curves": str(folder / CURVES) if (folder / CURVES).is_file() else None,
            },
        }
    )


def _validation(trainer: AutoLoraTrainer) -> dict[str, float] | None:
    """What was measured on the validation images with the weights that were kept."""
    state = trainer.state
    entries = [entry for entry in state.log_history if "eval_loss" in entry]
    kept = [entry for entry in entries if entry["step"] == state.best_global_step] or entries
    if not kept:
        return None
    timings = ("_runtime", "_per_second")
    return {key.removeprefix("eval_"): value for key, value in kept[-1].items() if not key.endswith(timings)}


def _config(model_args: ModelArguments, objective: str) -> AutoLoraConfig:
    """What the objective needs of the model, and on top of it what was asked for."""
    asked = {name: getattr(model_args, name) for name in ("natural_route", "stop_gradient", "norm")}
    asked = {name: value for name, value in asked.items() if value is not None}
    return config_for(
        objective,
        model_args.model,
        mode=model_args.mode,
        branch=model_args.branch,
        branch_args=json_object(model_args.branch_args, "branch_args"),
        layout=model_args.layout,
        r=model_args.r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=model_args.target_modules,
        **asked,
    )


def _checkpoint(words: str | None) -> str | bool | None:
    return {"true": True, "false": None}.get(words.lower(), words) if words is not None else None


def _image_size(numbers: list[int] | None) -> Any:
    return numbers[0] if numbers is not None and len(numbers) == 1 else numbers


def _data_name(source: str) -> str:
    """What the card calls the data: the folder's name, or its parent's if it is named like a split."""
    path = Path(source)
    return path.resolve().parent.name if path.name in ("train", "training") and path.is_dir() else path.name
