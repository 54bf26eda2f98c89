"""Exact resume: a run that was killed goes on to the same bits as one that was not."""

from __future__ import annotations

import logging
import os
import platform
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput

from ..data import PixelDataset
from ..data.stream import PixelStream
from ..files import read_json
from ..modeling import AutoLoraModel
from ..record import RECORD
from .arguments import AutoLoraTrainingArguments
from .checkpoints import (
    SEAL,
    checkpoint_folder,
    clean,
    complete,
    damage,
    delete_obsolete,
    incomplete,
    last_whole_checkpoint,
)
from .schedule import AutoLoraScheduler


logger = logging.getLogger(__name__)


class ResumableTrainer(Trainer):
    """The part of [`AutoLoraTrainer`] that writes checkpoints and goes on from them.

    Attributes:
        plan (`dict`): What was resolved of the arguments; see `AutoLoraTrainer.plan`.
    """

    # What `Trainer` declares for trainers of any kind.
    args: AutoLoraTrainingArguments
    model: AutoLoraModel
    lr_scheduler: AutoLoraScheduler  # type: ignore[assignment]  # `Trainer` says LambdaLR, and takes any
    train_dataset: PixelDataset | PixelStream
    eval_dataset: PixelDataset | PixelStream
    plan: dict[str, Any]

    def train(
        self,
        resume_from_checkpoint: str | os.PathLike | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Trains, from the start or from a checkpoint.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): `True` goes on from the latest checkpoint in
                `args.output_dir` that is whole; one that is damaged is passed over with a warning, and without any
                the run starts at its beginning. Or the folder of a checkpoint.
            trial, ignore_keys_for_eval (*optional*): As in `Trainer`.

        Raises:
            ValueError: If the given checkpoint is damaged or no checkpoint of this trainer.
        """
        checkpoint = self._find_checkpoint(resume_from_checkpoint)
        if checkpoint is not None:
            self._compare_with(checkpoint)
        path = None if checkpoint is None else str(checkpoint)
        output = super().train(path, trial=trial, ignore_keys_for_eval=ignore_keys_for_eval)
        if checkpoint is not None and self.args.should_save:
            # A run that was killed between its last checkpoint and this saves no other one, which would do it.
            delete_obsolete(self._get_output_dir(trial), self.args.save_total_limit)
        # The mean over the whole run, also when this call trained the last part of it.
        return output._replace(training_loss=output.metrics["train_loss"])

    # ---- reading ----

    def _find_checkpoint(self, wanted: str | os.PathLike | bool | None) -> Path | None:
        if wanted is None or wanted is False:
            return None
        # One process decides for all: the others may see a shared folder later.
        found: list[Any] = [None]
        if self.is_world_process_zero():
            if wanted is True:
                found[0] = last_whole_checkpoint(self.args.output_dir)
            else:
                problem = damage(Path(wanted))
                found[0] = ValueError(f"Cannot resume from {wanted}: {problem}.") if problem else Path(wanted)
        broadcast_object_list(found)
        if isinstance(found[0], ValueError):
            raise found[0]
        if found[0] is None and self.is_world_process_zero():
            logger.warning(
                "There is no whole checkpoint in %s: training starts at its beginning.", self.args.output_dir
            )
        return found[0]

    def _compare_with(self, checkpoint: Path) -> None:
        """Says what keeps the rest of the run from being what it would have been."""
        plan = read_json(checkpoint / RECORD).get("training") or {}
        seal = read_json(checkpoint / SEAL)
        changes = [
            f"{name} was {then[name]!r} and is {now[name]!r}"
            for then, now in ((plan, self.plan), (seal.get("environment") or {}, run_environment(self)))
            for name in sorted(then.keys() & now.keys())
            if name not in ("training_data", "environment", "warnings") and then[name] != now[name]
        ]
        if changes and self.is_world_process_zero():
            logger.warning(
                "The run goes on under other conditions than those of %s, so it will not end as it would have without "
                "the interruption: %s.",
                checkpoint,
                "; ".join(changes),
            )

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        progress = super()._init_training_state(*args, **kwargs)
        if self.state.best_global_step:
            # The whole folder may have moved since.
            best = checkpoint_folder(self.args.output_dir, self.state.best_global_step)
            if best.is_dir():
                self.state.best_model_checkpoint = str(best)
            else:
                logger.warning("The best weights until now, in %s, are gone: the best of what follows is taken.", best)
                self.state.best_metric = self.state.best_global_step = self.state.best_model_checkpoint = None
        return progress

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.lr_scheduler.finished:
            # The run was over; it was killed between its last checkpoint and its end.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.model.load_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = Path(cast(str, self.state.best_model_checkpoint))
        problem = damage(best)
        if problem is not None:
            raise ValueError(
                f"The best weights are in {best}, which is damaged: {problem}. Restore the folder, or delete it and "
                "go on with `resume_from_checkpoint=True`: the best of the remaining epochs is taken then."
            )
        logger.info("Loading the best weights, from %s.", best)
        self.model.load_weights(best)

    # ---- writing ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs:
            # What `Trainer` has is the mean since the last resume.
            logs["train_loss"] = mean_loss(self.state.log_history)
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in `Trainer`, but the checkpoint appears whole, and those that may be needed again stay."""
        self.store_flos()
        run, step = self._get_output_dir(trial=trial), self.state.global_step
        folder = checkpoint_folder(run, step)
        if self.args.should_save:
            clean(run)
        self.accelerator.wait_for_everyone()
        with incomplete(folder) as staging:
            self.save_model(str(staging), _internal_call=True)
            if self.args.should_save:
                self._save_further(staging)
            if self.state.best_global_step:
                best = checkpoint_folder(run, self.state.best_global_step)
                if best == folder or best.is_dir():
                    self.state.best_model_checkpoint = str(best)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(staging))
                self._save_scaler(str(staging))
                self._save_rng_state(str(staging))
            if self.args.should_save:
                self._save_trainer_state(staging)
            # Every process has written its random state.
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                complete(staging, folder, environment=run_environment(self))
        if self.args.should_save:
            delete_obsolete(run, self.args.save_total_limit)
        # Nobody looks for the best weights before they are in their place.
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def _save_further(self, folder: Path) -> None:
        """Writes what a run needs to go on besides model, optimizer, scheduler and random state."""

    def _save_trainer_state(self, folder: Path) -> None:
        states: dict[str, list[dict]] = {}
        for item in (*self.callback_handler.callbacks, self.control):
            if isinstance(item, ExportableState):
                states.setdefault(type(item).__name__, []).append(item.state())
        # As `Trainer` reads them: a list only where a callback is there twice.
        # `TrainerState` says that they are callbacks, which they are before the first checkpoint only.
        self.state.stateful_callbacks = cast(
            Any, {name: found[0] if len(found) == 1 else found for name, found in states.items()}
        )
        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))


# Arguments that make the same run quicker and change its last bits.
_SWITCHES = ("attack_compile", "attack_fold_norms", "attack_linear_patches", "channels_last")


def run_environment(trainer: Trainer) -> dict[str, Any]:
    """What decides about the last bits of a run besides plan and data.

    Equal seed, plan, data and environment give equal bits on one machine; see `docs/reliability.md`.
    """
    args = trainer.args
    device = args.device
    return {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} {platform.machine()}",
        "processes": args.world_size,
        "threads": torch.get_num_threads(),
        "precision": trainer.accelerator.mixed_precision,
        **{name: getattr(args, name) for name in _SWITCHES},
        "tf32": bool(args.tf32) and device.type == "cuda",
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "torch": torch.__version__,
    }


def mean_loss(history: list[dict[str, float]]) -> float:
    """Mean loss over all steps of a run, of what was logged."""
    total, done = 0.0, 0.0
    for entry in history:
        if "loss" in entry:
            total, done = total + entry["loss"] * (entry["step"] - done), entry["step"]
    return total / max(done, 1)
