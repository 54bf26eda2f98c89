"""What comes before and after a training: initialisers and finishers."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, set_seed

from ..files import write_json
from ..postprocessing.base import Batches, Finished
from ..progress import hidden_progress
from .checkpoints import last_whole_checkpoint
from .method_arguments import MethodArguments
from .progress import EpochTableCallback


if TYPE_CHECKING:
    from .trainer import AutoLoraTrainer


logger = logging.getLogger(__name__)

FOLDER = "initialization"


def run_initializer(trainer: AutoLoraTrainer, resume: bool = False) -> None:
    """Runs what `args.init` names, before a training that starts at its beginning.

    A stage of training is a training of its own, in a folder inside the output folder, with the same data and seed.

    Args:
        trainer (`AutoLoraTrainer`): The training that it is for.
        resume (`bool`): A stage goes on from its own last checkpoint, if there is one.
    """
    args = trainer.args
    if args.init == "none":
        return
    initializer = args.new_initializer()
    initializer(trainer.model)
    changes = initializer.stage(trainer.plan["epochs"])
    if changes is not None:
        folder = Path(args.output_dir) / FOLDER
        logger.info("Initialisation: %s, in %s.", args.init, folder)
        _train_stage(trainer, folder, changes, resume)
    # The training draws the same numbers whether a stage has gone before, went on or was done.
    set_seed(args.seed)


def _train_stage(trainer: AutoLoraTrainer, folder: Path, changes: dict, resume: bool) -> None:
    args = trainer.args
    # It is a method of its own.
    defaults = {entry.name: entry.default for entry in dataclasses.fields(MethodArguments)}
    chosen_by_method = {"metric_for_best_model": None, "greater_is_better": None, "optim_args": None}
    changes = {**defaults, **chosen_by_method, "push_to_hub": False, "report_to": "none", **changes}
    # It has nothing to do with what is measured of the training.
    changes["gradient_similarity"] = False
    # Data that were held out stay where they are, as they were found fit.
    stage_args = dataclasses.replace(args, output_dir=str(folder), **changes)
    quiet = not any(isinstance(callback, ProgressCallback) for callback in trainer.callback_handler.callbacks)
    stage = type(trainer)(trainer.model, stage_args, trainer.train_dataset, trainer.eval_dataset)
    if quiet:
        for callback in (EpochTableCallback, PrinterCallback):
            stage.remove_callback(callback)
    stage.train(resume_from_checkpoint=resume and last_whole_checkpoint(folder) is not None)
    stage.accelerator.free_memory()
    # Both belong to the training again.
    trainer.model.training_plan = trainer.plan
    trainer.model.limit_training(trainer.objective.routes, heads_only=trainer.objective.heads_only)


def run_finisher(trainer: AutoLoraTrainer) -> None:
    """Runs what `args.finish` names on the model that training ended with, and writes down what it did."""
    args = trainer.args
    if args.finish == "none":
        return
    finished = Finished(
        model=trainer.model,
        train=_batches(trainer, trainer.get_train_dataloader),
        validation=_batches(trainer, trainer.get_eval_dataloader),
        attack=args.validation_attack(),
        epochs=trainer.plan["epochs"],
    )
    with trainer.model.own_precision(), hidden_progress(bool(args.disable_tqdm)):
        trainer.plan["finished"] = {"finish": args.finish, **args.new_finisher()(finished)}
    if args.should_save:
        write_json(trainer.plan, Path(args.output_dir) / "training_plan.json")


def _batches(trainer: AutoLoraTrainer, loader: Callable[[], DataLoader]) -> Batches:
    made: list[DataLoader] = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        if not made:
            # Once, since accelerate keeps every loader.
            made.append(loader())
        for inputs in made[0]:
            inputs = trainer._prepare_inputs(inputs)
            yield inputs["pixel_values"], inputs["labels"]

    return batches
