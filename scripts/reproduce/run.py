"""Trains and measures cells of the paper's tables: a data set, a backbone, a method and a seed each.

    python scripts/reproduce/run.py --data-set cub --data DATA --backbone resnet50 \\
        --checkpoint resnet50_linf_eps4.0.ckpt --method autolora --seed 0 --output runs
    python scripts/reproduce/run.py --all --data DATA --checkpoint FOLDER --output runs
    python scripts/reproduce/run.py --all --data DATA --output runs --dry-run

What is finished is skipped, and what was interrupted goes on to the same result. Options that are not listed here are
training arguments of `autolora train`, such as `--bf16`; those that change what is computed are written down, and the
table tells such runs from the paper's. See README.md in this folder.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from paper_cells import BACKBONES, METHODS, RESULT, SEEDS, Backbone, Cell, cells, counts
from paper_data import DATA_SETS, DataSet, Splits
from torch import nn
from transformers import HfArgumentParser, set_seed

from autolora_hf import (
    PGD,
    AutoLoraTrainer,
    AutoLoraTrainingArguments,
    Preprocessing,
    config_for,
    evaluate_robustness,
    get_autolora_model,
    load_autolora_model,
)
from autolora_hf.backbones import load_backbone
from autolora_hf.config import PixelRadius
from autolora_hf.data import as_pixel_dataset, check_unseen
from autolora_hf.files import read_json, write_json
from autolora_hf.initializers.conversion import convert_checkpoint
from autolora_hf.training.checkpoints import checkpoints, delete


# In the folder of a run, in the order in which they appear.
SETUP, TRAINER, MODEL, TRAINED = "setup.json", "trainer", "model", "trained.json"

# Training arguments that say where and how fast something is computed, not what.
_NEUTRAL = {
    *("use_cpu", "torch_compile", "attack_compile", "channels_last", "attack_fold_norms", "disable_tqdm"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "report_to", "run_name"),
    *("activation_checkpointing", "activation_checkpointing_kwargs", "save_total_limit", "log_level"),
    *("per_device_eval_batch_size", "gradient_similarity"),
}
# The command line's own, or fixed.
_OWN = {"seed", "output_dir", "objective", "resume_from_checkpoint", "push_to_hub"}
# Forward-equivalents of an attack on an image that withstands it, a gradient being one more: 10 steps of PGD; 100 of
# APGD-CE, nine targets of APGD-T and of FAB-T with 100 each, 5,000 queries of Square.
_PGD_PASSES, _AUTOATTACK_PASSES = 20, 200 + 1_800 + 1_800 + 5_000


def run_cell(
    cell: Cell,
    data_set: DataSet,
    splits: Splits,
    backbone: Backbone,
    checkpoint: Path,
    runs: Path,
    changes: Mapping[str, Any],
    attacked: int | None,
) -> Path:
    """Trains and measures one cell, or what is left of it; returns the file of its result.

    Args:
        changes (`dict`): Training arguments besides the paper's.
        attacked (`int`, *optional*): Test images to attack. `None`: all.

    Raises:
        ValueError: If the folder of the run holds one of other settings, data or weights.
    """
    folder = cell.folder(runs)
    result = folder / RESULT
    setup = {
        "data_set": cell.data_set,
        "backbone": cell.backbone,
        "method": cell.method,
        "seed": cell.seed,
        "counts": counts(data_set),
        "model_args": dict(backbone.model_args),
        "checkpoint": {"file": checkpoint.name, "sha256": _digest(checkpoint)},
        "settings": cell.settings(),
        "changed": _changed(cell, changes),
    }
    args = _arguments(cell, folder, changes)
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs would share a batch, each with its own statistics of BatchNorm. Choose one with "
            "CUDA_VISIBLE_DEVICES, and give the others cells of their own."
        )
    _check_setup(folder, setup)
    if result.is_file() and read_json(result)["attacked"] == attacked:
        print(f"{cell}: finished")
        return result
    if not (folder / TRAINED).is_file():
        print(f"{cell}: training", flush=True)
        _train(cell, data_set, splits, backbone, checkpoint, folder, changes)
    trained = read_json(folder / TRAINED)

    # What is measured is what was saved.
    model = load_autolora_model(folder / MODEL)
    threat_model = args.threat_model
    # From the image itself, as the paper's code measures it.
    pgd = PGD(threat_model, args.eval_attack_steps, args.attack_step_size, random_start=False)
    reports = {}
    for name, attack in (("pgd10", pgd), ("autoattack", "autoattack")):
        print(f"{cell}: {name}", flush=True)
        reports[name] = evaluate_robustness(
            model,
            splits.test,
            threat_model,
            attack,
            max_samples=None if attacked is None else min(attacked, len(splits.test)),
            batch_size=args.per_device_eval_batch_size,
            device=args.device,
            progress=not args.disable_tqdm,
            checkpoint_dir=folder / f"{name}-{'all' if attacked is None else attacked}",
            # Once is enough, with the attack that is published.
            diagnostics=name == "autoattack",
        )
        reports[name].warnings += trained["test_notes"]
        print(reports[name], flush=True)
    content = {
        **setup,
        "attacked": attacked,
        "training": trained,
        "reports": {name: report.to_dict() for name, report in reports.items()},
        "versions": {name: importlib.metadata.version(name) for name in ("autolora-hf", "torch", "timm", "peft")},
        "device": torch.cuda.get_device_name() if args.device.type == "cuda" else args.device.type,
        "date": datetime.date.today().isoformat(),
    }
    write_json(content, result)
    return result


def _train(
    cell: Cell,
    data_set: DataSet,
    splits: Splits,
    backbone: Backbone,
    checkpoint: Path,
    folder: Path,
    changes: Mapping[str, Any],
) -> None:
    started = time.time()
    # Head and branches are drawn at random.
    set_seed(cell.seed)
    args = _arguments(cell, folder, changes)
    network = load_network(checkpoint, backbone, data_set.classes)
    cfg, size = network.pretrained_cfg, data_set.image_size
    preprocessing = Preprocessing(
        (size, size),
        mean=cfg["mean"],
        std=cfg["std"],
        interpolation="bilinear",
        # CIFAR as it is; photos are resized to 256 and cropped to 224.
        crop_pct=1.0 if size <= 64 else 0.875,
    )
    names = as_pixel_dataset(splits.train, preprocessing).class_names
    model = get_autolora_model(
        network, config_for(cell.method, network), preprocessing=preprocessing, label_names=names
    )
    # No validation set: the trainer holds out a part of the training images, and never sees a test image.
    trainer = AutoLoraTrainer(model, args, train_dataset=splits.train)
    # Raises if more than single copies of the test images are among those.
    test = as_pixel_dataset(splits.test, preprocessing, name="the test set")
    notes = check_unseen(test, {"training": trainer.train_dataset, "validation": trainer.eval_dataset})
    trainer.train(resume_from_checkpoint=bool(checkpoints(args.output_dir)))
    trainer.model.save_pretrained(folder / MODEL)
    content = {
        "plan": trainer.plan,
        "epochs": trainer.state.epoch,
        "steps": trainer.state.global_step,
        "best_validation": trainer.state.best_metric,
        "training_images": len(trainer.train_dataset),
        "validation_images": len(trainer.eval_dataset),
        "test_notes": notes,
        "log": trainer.state.log_history,
        # Of the last start alone, if it was interrupted.
        "seconds": time.time() - started,
    }
    write_json(content, folder / TRAINED)
    # Several times the size of the model each, and of no more use.
    for saved in checkpoints(args.output_dir):
        delete(saved)
    del trainer, model, network
    gc.collect()


def load_network(checkpoint: Path, backbone: Backbone, classes: int) -> nn.Module:
    """The robust backbone with a new head that is drawn at random, as in the paper's code.

    Args:
        checkpoint (`Path`): The file of robust-models-transfer, or a folder made by `autolora convert`.

    Raises:
        ValueError: If it is of another network, or damaged.
    """
    if checkpoint.is_dir():
        network = load_backbone(str(checkpoint), classes)
        architecture = getattr(network, "pretrained_cfg", {}).get("architecture")
        if architecture != backbone.key:
            raise ValueError(f"{checkpoint} holds a {architecture or type(network).__name__}, not a {backbone.key}.")
    else:
        options = {"model_args": backbone.model_args} if backbone.model_args else {}
        network = convert_checkpoint(checkpoint, backbone.key, num_classes=classes, head="new", **options).model
    network.get_classifier().reset_parameters()
    return network


def _arguments(cell: Cell, folder: Path, changes: Mapping[str, Any]) -> AutoLoraTrainingArguments:
    return AutoLoraTrainingArguments(
        **{"report_to": "none", **cell.settings(), **changes, "output_dir": str(folder / TRAINER)}
    )


def _changed(cell: Cell, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The training arguments that make it another experiment than the paper's."""
    papers = cell.settings()
    for name in ("eps", "attack_step_size"):
        papers[name] = PixelRadius(papers[name])  # 8/255, as a number
    return {
        name: value
        for name, value in changes.items()
        if name not in _NEUTRAL and not (name in papers and papers[name] == value)
    }


def _check_setup(folder: Path, setup: dict[str, Any]) -> None:
    """Writes down what a run is, or raises if its folder holds another one."""
    file = folder / SETUP
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(setup, file)
        return
    # Tuples are lists in the file.
    before, setup = read_json(file), json.loads(json.dumps(setup))
    other = [name for name in setup if before.get(name) != setup[name]]
    if other:
        was = "; ".join(f"{name} was {before.get(name)} and is {setup[name]}" for name in other)
        raise ValueError(f"{folder} holds another run ({was}). Choose another --output, or delete that folder.")


def _digest(checkpoint: Path) -> str:
    path = checkpoint / "model.safetensors" if checkpoint.is_dir() else checkpoint
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_checkpoint(path: Path | None, backbone: Backbone) -> Path:
    """The checkpoint of a backbone: `path` itself, or its file or its converted folder in there.

    Raises:
        FileNotFoundError: If there is none.
    """
    if path is not None:
        for candidate in (path / backbone.file, path / backbone.key, path):
            if candidate.is_file() or (candidate / "model.safetensors").is_file():
                return candidate
    raise FileNotFoundError(
        f"There is no checkpoint of {backbone.title} at {path}: --checkpoint names {backbone.file} of "
        "robust-models-transfer, a folder made of it by `autolora convert`, or the folder in which either lies "
        f"(that of `autolora convert` as {backbone.key}/). scripts/reproduce/README.md says where to get it."
    )


# ---- dry run ----


def describe(
    cell: Cell, data_set: DataSet, splits: Splits | None, runs: Path, changes: Mapping[str, Any], attacked: int | None
) -> str:
    """What a cell takes, in words; numbers of images are the official ones where the data are not there."""
    folder, settings = cell.folder(runs), {**cell.settings(), **changes}
    state = "finished" if (folder / RESULT).is_file() else "to be measured"
    if state != "finished" and not (folder / TRAINED).is_file():
        state = "started" if (folder / SETUP).is_file() else "not started"
    if splits is not None:
        train, test, about = len(splits.train), len(splits.test), ""
    elif data_set.train is not None:
        train, test, about = data_set.train, data_set.test, " (official numbers; the data are not there)"
    else:
        return f"{cell}: {state}; how many images train is known when the data are there"
    held_out = round(train * settings["validation_fraction"])
    if settings["max_validation_images"] is not None:
        held_out = min(held_out, settings["max_validation_images"])
    steps = math.ceil((train - held_out) / settings["per_device_train_batch_size"])
    epochs = settings["num_train_epochs"]
    attacked = test if attacked is None else min(attacked, test)
    # After every epoch: the natural route's accuracy on the training images, and PGD on the validation images.
    per_epoch = (train - held_out) * (METHODS[cell.method].passes + (cell.method == "autolora"))
    per_epoch += held_out * (2 + 2 * settings["eval_attack_steps"])
    attacks = attacked * (2 + _PGD_PASSES + _AUTOATTACK_PASSES)
    # A convolution's work goes with the area of the image.
    unit = 2e9 * BACKBONES[cell.backbone].macs * (data_set.image_size / 224) ** 2
    return (
        f"{cell}: {state}{about}\n"
        f"    training   {train:,} images, {held_out:,} of them held out; {epochs:g} epochs of {steps:,} steps, "
        f"{math.ceil(steps * epochs):,} steps; {_work(epochs * per_epoch, unit)}\n"
        f"    attacks    {attacked:,} of {test:,} test images; at most {_work(attacks, unit)}"
    )


def _work(passes: float, unit: float) -> str:
    return f"{passes:.2e} passes, {passes * unit:.1e} FLOP"


# ---- command line ----


def parse(
    argv: Sequence[str] | None, data_sets: Mapping[str, DataSet], backbones: Mapping[str, Backbone]
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The options of this script, and the training arguments that were given beside them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    axes = {
        "data_set": (list(data_sets), str),
        "backbone": (list(backbones), str),
        "method": (list(METHODS), str),
        "seed": (None, int),
    }
    for name, (choices, kind) in axes.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            nargs="+",
            type=kind,
            choices=choices,
            help="one or more; with --all, every one if left out" + (" (0, 1, 2)" if name == "seed" else ""),
        )
    parser.add_argument("--all", action="store_true", help="the whole table, or the part that the options above name")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data set, or of all of them")
    parser.add_argument("--checkpoint", type=Path, help="file or converted folder of the backbone, or folder of both")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--attacked", type=int, help="test images to attack, chosen by class; all if left out")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and what it takes")
    options, rest = parser.parse_known_args(argv)
    everything = {**{name: choices for name, (choices, _) in axes.items()}, "seed": list(SEEDS)}
    for name, values in everything.items():
        if getattr(options, name) is None:
            if not options.all:
                parser.error(f"--{name.replace('_', '-')} is missing; with --all it may be left out")
            setattr(options, name, values)
    if options.attacked is not None and options.attacked < 1:
        parser.error("--attacked must be at least 1")

    training = HfArgumentParser(AutoLoraTrainingArguments, prog="run.py", add_help=False, allow_abbrev=False)
    for action in training._actions:
        action.default = argparse.SUPPRESS  # only what was given
    changes = vars(training.parse_args(rest))
    own = sorted(_OWN & changes.keys())
    if own:
        parser.error(f"--{own[0]} is not to be chosen here")
    return options, changes


def main(
    argv: Sequence[str] | None = None,
    data_sets: Mapping[str, DataSet] = DATA_SETS,
    backbones: Mapping[str, Backbone] = BACKBONES,
) -> None:
    options, changes = parse(argv, data_sets, backbones)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SystemExit("A cell runs in one process, on one device. Give each device cells of its own.")
    chosen = list(cells(options.data_set, options.backbone, options.method, options.seed))
    # All that can be wrong with files is found before the first training step.
    splits: dict[str, Splits] = {}
    for name in options.data_set:
        try:
            splits[name] = data_sets[name].load(options.data)
        except FileNotFoundError as error:
            if not options.dry_run:
                raise SystemExit(str(error)) from error
            print(error)
        except ValueError as error:
            raise SystemExit(str(error)) from error
    if options.dry_run:
        for cell in chosen:
            found = splits.get(cell.data_set)
            print(describe(cell, data_sets[cell.data_set], found, options.output, changes, options.attacked))
        return
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        files = {name: find_checkpoint(options.checkpoint, backbones[name]) for name in options.backbone}
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from error
    for cell in chosen:
        backbone = backbones[cell.backbone]
        result = run_cell(
            cell,
            data_sets[cell.data_set],
            splits[cell.data_set],
            backbone,
            files[cell.backbone],
            options.output,
            changes,
            options.attacked,
        )
        print(f"{cell}: {result}", flush=True)


if __name__ == "__main__":
    main()
