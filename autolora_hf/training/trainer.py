"""`AutoLoraTrainer`: a `Trainer` that runs the disentangled robust objective."""

from __future__ import annotations

import logging
import math
import os
import textwrap
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_utils import TrainOutput
from transformers.training_args import OptimizerNames

from .. import checkpointing
from ..config import ThreatModel
from ..data import PixelDataset, collate, describe_data, is_stream
from ..factory import get_autolora_model
from ..files import write_atomically, write_json
from ..modeling import AutoLoraModel
from ..objectives import OBJECTIVES, Batch, config_for
from ..pixels import Normalize
from ..progress import hidden_progress
from ..schedules import Curve, LossScalars, PlateauHalving, constant, cosine, default_epochs, milestones
from ..schedules.learning_rate import HalvingRule
from .arguments import AutoLoraTrainingArguments
from .attacking import RouteAttacker
from .averaging import WeightAverage
from .data import BrokenImagesCallback, prepare_data, warn_of_few
from .diagnosis import DiagnosisCallback
from .distributed import (
    Share,
    check_parallelism,
    check_shared_folder,
    step_shares,
    synchronize,
)
from .epochs import EpochCallback
from .evaluating import TRAINING, EvaluatingTrainer, accuracies, losses
from .forward import TrainingForward
from .gradient_similarity import GradientSimilarityCallback
from .logged import ATTACK_END, ATTACK_START, EPS, IMAGES_PER_SECOND, SKIPPED_STEPS, missing_trackers_named
from .numerics import StepGuard
from .progress import EpochTableCallback
from .redirect import call_inside
from .resuming import run_environment
from .schedule import AutoLoraScheduler
from .stages import run_finisher, run_initializer
from .throughput import Throughput


logger = logging.getLogger(__name__)

PLAN = "training_plan.json"


class AutoLoraTrainer(EvaluatingTrainer):
    """Robust fine-tuning with an automatic learning rate and automatic loss scalars (AutoLoRa, ICLR 2024).

    Args:
        model (`AutoLoraModel`, `nn.Module` or `str`): What [`get_autolora_model`] returns, or what it takes.
        args (`AutoLoraTrainingArguments`, *optional*): Defaults follow the paper.
        train_dataset: A `datasets.Dataset` with an image and a label column, a folder of images by class, a torch
            `Dataset` of (image, label), or a stream: a `datasets.IterableDataset` or a torch `IterableDataset`. Where
            the objective has no labels (FARE), neither need the data; those that there are play no part.
        eval_dataset (*optional*): Validation data of the same kinds, for the schedule and the choice of the best
            weights. `None`: a stratified 5 % of the training set is held out. Never the test set.
        callbacks (`list[TrainerCallback]`, *optional*), optimizers (*optional*): As in `Trainer`.
    """

    # `compute_loss` returns the mean over the batch, so Trainer has to divide by the accumulation steps itself.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: AutoLoraModel | nn.Module | str,
        args: AutoLoraTrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
    ) -> None:
        args = args or AutoLoraTrainingArguments("autolora-output")
        if not isinstance(args, AutoLoraTrainingArguments):
            raise TypeError(f"`args` must be AutoLoraTrainingArguments, got {type(args).__name__}.")
        check_parallelism(args)
        if args.finish != "none" and args.world_size > 1:
            raise ValueError(f"`finish={args.finish!r}` works in one process only: leave it out.")
        if train_dataset is None:
            raise ValueError("AutoLoraTrainer needs a `train_dataset`.")
        if optimizers[1] is not None:
            raise ValueError(
                "AutoLoraTrainer has its own learning-rate schedule: pass `optimizers=(optimizer, None)`."
            )
        if not isinstance(model, AutoLoraModel):
            model = _model_for(args.objective, model)
        if model.threat_model not in (ThreatModel(), args.threat_model):
            logger.warning(
                "The model's threat model (%s) gives way to that of the training arguments (%s).",
                model.threat_model,
                args.threat_model,
            )
        model.threat_model = args.threat_model
        args.resolve_optimizer(model.autolora_config.mode)
        self.objective = args.new_objective()
        self.objective.prepare(model, args.seed)
        model.limit_training(self.objective.routes, heads_only=self.objective.heads_only)
        args.new_finisher().prepare(model)
        args.create_output_dir()
        with hidden_progress(bool(args.disable_tqdm)):
            train, validation = self._prepare_data(model, args, train_dataset, eval_dataset)
        self.plan = self._make_plan(args, train, validation, eval_dataset is None) | self.objective.describe()
        model.training_plan = self.plan
        with missing_trackers_named():
            super().__init__(
                model=model,
                args=args,
                data_collator=collate,
                train_dataset=train,
                eval_dataset=validation,
                compute_metrics=accuracies if self.objective.classifies else losses,
                callbacks=callbacks,
                optimizers=optimizers,
            )
        self.plan["environment"] = run_environment(self)
        self._attacker = RouteAttacker(model, args, self.accelerator.mixed_precision)
        self.plan["attack_precision"] = str(self._attacker.dtype).removeprefix("torch.")
        self.add_callback(EpochCallback(self))
        self._average = WeightAverage(model, args.average_weights, args.ema_decay)
        self.add_callback(self._average)
        self._guard = StepGuard(self)
        self.add_callback(self._guard)
        self._diagnosis = DiagnosisCallback(self, Path(args.output_dir) / PLAN)
        self.add_callback(self._diagnosis)
        if args.gradient_similarity:
            self.add_callback(GradientSimilarityCallback(self))
        if isinstance(train, PixelDataset):  # a stream reports broken images itself
            self.add_callback(BrokenImagesCallback(train))
        # The last one: what others do when an epoch begins, such as loading weights, is no training.
        self._throughput = Throughput()
        self.add_callback(self._throughput)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(EpochTableCallback(accuracies=self.objective.classifies))
        # Weights that were drawn at random may differ.
        synchronize(self.model.parameters())
        self._normalize = Normalize(model.preprocessing).to(args.device)
        loss = self.objective.attack_loss
        self._train_attack = args.training_attack(loss)
        # Validation judges answers, whatever training attacks, where there are answers.
        self._eval_attack = args.validation_attack("ce" if self.objective.classifies else loss)
        mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}
        # In which the update computes attention.
        self._precision = mixed.get(self.accelerator.mixed_precision, next(model.parameters()).dtype)
        self._channels_last = args.channels_last and any(isinstance(module, nn.Conv2d) for module in model.modules())
        if args.process_index == 0:
            warn_of_few(len(validation), self.objective.classifies)
        if args.should_save:
            write_json(self.plan, Path(args.output_dir) / PLAN)
        check_shared_folder(args, Path(args.output_dir) / PLAN)
        shown = {**self.plan, "training_data": self.plan["training_data"]["name"] or "in memory"}
        del shown["environment"]
        plan = f"Training plan: {', '.join(f'{key} {value}' for key, value in shown.items())}"
        logger.info(textwrap.fill(plan, 100, subsequent_indent="    ", break_long_words=False))

    # ---- data and plan ----

    def _prepare_data(self, model: AutoLoraModel, args: AutoLoraTrainingArguments, train: Any, validation: Any) -> Any:
        args.resolve_workers(streams=is_stream(train) or is_stream(validation))
        classes = model.num_classes if self.objective.classifies else None
        train, validation = prepare_data(train, validation, args, model.preprocessing, classes)
        if train.class_names and len(train.class_names) == classes:
            # The checkpoint may bring the names of another task.
            model.label_names = list(train.class_names)
        return train, validation

    @staticmethod
    def _make_plan(
        args: AutoLoraTrainingArguments, train: PixelDataset, validation: PixelDataset, held_out: bool
    ) -> dict[str, Any]:
        """Resolves what depends on the size of the training set, and writes it down."""
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        steps = math.ceil(len(train) / batch)
        objective = OBJECTIVES[args.objective]
        if args.num_train_epochs is None:
            args.num_train_epochs = default_epochs(steps, objective.steps)
        epochs = math.ceil(args.num_train_epochs)
        return {
            "objective": args.objective,
            "threat_model": str(args.threat_model),
            "training_data": describe_data(train),
            "training_images": len(train),
            "validation_images": len(validation),
            "validation_held_out_of_training": held_out,
            "validation_fraction": args.validation_fraction if held_out else None,
            "seed": args.seed,
            "batch_size": batch,
            "steps_per_epoch": steps,
            "epochs": epochs,
            "optimizer": OptimizerNames(args.optim).value,
            "learning_rate": args.learning_rate,
            "weight_decay": args.weight_decay,
            "attack_steps": args.attack_steps,
            **args.method_plan(epochs),
        }

    # ---- optimisation ----

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Every parameter, as in the paper."""
        return [name for name, _ in model.named_parameters()]

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> AutoLoraScheduler:
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            self.lr_scheduler = AutoLoraScheduler(
                # Accelerate's wrapper is no `torch.optim.Optimizer`, which LRScheduler insists on.
                cast(torch.optim.Optimizer, getattr(optimizer, "optimizer", optimizer)),
                self._halving() if self.plan["schedule"] == "plateau" else None,
                self._curve(num_training_steps),
                num_training_steps,
                alpha=self.args.scalar_alpha,
                lambda2_max=self.args.scalar_lambda2_max,
                fixed_scalars=None if self.args.loss_scalars is None else LossScalars(*self.args.loss_scalars),
                epsilon=self.args.new_epsilon_schedule(self.plan["epochs"]),
                min_learning_rate=self.args.min_learning_rate,
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _halving(self) -> PlateauHalving:
        return PlateauHalving(
            self.plan["halving_checkpoints"],
            rule=cast(HalvingRule, self.args.halving_rule),
            chance=1 / self.model.num_classes if self.args.greater_is_better else -math.inf,
        )

    def _curve(self, num_training_steps: int) -> Curve:
        kind = self.plan["schedule"]
        if kind == "milestones":
            return milestones(self.args.milestones or self.objective.milestones)
        if kind == "cosine":
            # In a run of a few steps the rise may not be all of them.
            rise = min(self.args.get_warmup_steps(num_training_steps), num_training_steps - 1)
            return cosine(rise / num_training_steps or self.objective.warmup)
        return constant()

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The batches of one optimizer step, each with what this process computes of it under `"share"`."""
        batches, number = super().get_batch_samples(epoch_iterator, num_batches, device)
        ending = self.train_dataset if self.accelerator.gradient_state.end_of_dataloader else None
        shares = step_shares([len(batch["labels"]) for batch in batches], self.args, ending)
        return [{**batch, "share": share} for batch, share in zip(batches, shares, strict=True)], number

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        unwrapped = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        pixels, labels = inputs["pixel_values"], inputs["labels"]
        share = inputs.get("share", Share.whole(len(labels)))
        return call_inside(model, unwrapped, self._objective_loss, pixels, labels, share)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if not self.is_in_train:
            return loss
        # The mean of the losses since the last log for one that is not finite: `logging_nan_inf_filter`, which would
        # wait for the device twice in every step.
        mean = self._tr_loss / (1 + self.state.global_step - self._globalstep_last_logged)
        return torch.where(loss.isfinite(), loss, mean)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self._guard.gradient_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self._guard.gradient_norm

    def _objective_loss(self, pixels: Tensor, labels: Tensor, share: Share) -> Tensor:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        # A process without samples of its own still takes part, with weight 0.
        own = max(share.count, 1)

        # A model that recomputes its blocks in the backward pass would do so with the other attention.
        precision = torch.float32 if checkpointing.is_enabled(model) else self._precision

        forward = TrainingForward(model, partial(self._images, model), precision, own)
        reference = self.objective.reference(pixels)
        losses: list[Tensor] = []
        adversarial = self._adversarial(pixels, labels, share.first, reference, losses)
        given = None if reference is None else reference[:own]
        batch = Batch(pixels, cast(Tensor, adversarial), labels[:own], given)  # None where the objective wants none
        output = self.objective(forward, batch, self.lr_scheduler.scalars)
        terms = {name: value * share.weight for name, value in output.terms.items()}
        ends = {ATTACK_START: losses[0], ATTACK_END: losses[-1]} if losses else {}
        noted = {name: found[:own].float().mean() * share.weight for name, found in ends.items()}
        self._throughput.count(share.count)
        return self._guard.checked(output.loss * share.weight, terms, pixels, adversarial, noted)

    def _adversarial(
        self, pixels: Tensor, labels: Tensor, first: int, reference: Tensor | None, losses: list[Tensor] | None = None
    ) -> Tensor | None:
        """The images of a training step under attack; `None` if the objective wants none.

        Args:
            losses (`list[Tensor]`, *optional*): Gets what the attack maximised, see [`PGD.search`].
        """
        if not self.objective.needs_adversarial:
            return None
        step, attack = self.state.global_step, self._train_attack
        share = self._eps_share(step)
        if share == 0:
            return pixels
        if share < 1:
            attack = self.args.training_attack(self.objective.attack_loss, share)
        key = (self.args.seed, TRAINING, step)
        return self._attacker(attack, pixels, labels, *key, first=first, reference=reference, losses=losses)

    def _eps_share(self, step: int) -> float:
        return self.lr_scheduler.epsilon.share(step / self.plan["steps_per_epoch"])

    def _images(self, model: AutoLoraModel, pixels: Tensor) -> Tensor:
        """Pixels as the model takes them: normalised, in its precision."""
        images = self._normalize(pixels).to(next(model.parameters()).dtype)
        # Convolutions hand the memory format on, so that the whole network follows its input.
        return images.contiguous(memory_format=torch.channels_last) if self._channels_last else images

    # ---- before, between and after ----

    def train(
        self, resume_from_checkpoint: str | os.PathLike | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Trains, from the start or from a checkpoint; see [`ResumableTrainer.train`].

        What `init` names runs first, unless there is a checkpoint of the training itself, and what `finish` names
        last. With `resume_from_checkpoint=True` a stage of the initialiser goes on from its own checkpoints.
        """
        checkpoint = self._find_checkpoint(resume_from_checkpoint)
        if checkpoint is None:
            run_initializer(self, resume=resume_from_checkpoint is True)
        output = super().train(checkpoint, *args, **kwargs)
        self._average.settle()
        run_finisher(self)
        return output

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self._average.begins_after(self.state.best_global_step, self.state.max_steps):
            # The best weights until now are no average.
            self.state.best_metric = None
        # What is validated, selected and saved is what would be deployed.
        with self._average.in_place():
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._average.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._average.load_auxiliary(Path(cast(str, self.state.best_model_checkpoint)))
        self._average.restart()

    def _save_further(self, folder: Path) -> None:
        self._average.save(folder)

    # ---- logging ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            means = self._guard.pop_means()
            logs |= {name: self.accelerator.reduce(mean, "mean").item() for name, mean in means.items()}
            if self.objective.needs_adversarial:
                logs[EPS] = float(self.args.eps) * self._eps_share(max(0, self.state.global_step - 1))
            logs[IMAGES_PER_SECOND] = self._throughput.images_per_second(self.accelerator)
            logs[SKIPPED_STEPS] = self.lr_scheduler.skipped_steps
        super().log(logs, start_time)
        if "loss" in logs:
            self._throughput.restart()

    # ---- checkpoints ----

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # `Trainer` would also pickle the arguments; they are written as JSON.
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            self.model.save_pretrained(folder)
            write_atomically(folder / "training_args.json", (self.args.to_json_string() + "\n").encode())


def _model_for(objective: str, model: nn.Module | str) -> AutoLoraModel:
    """A model of a backbone, or of its name, with the routes that an objective trains."""
    return get_autolora_model(model, config_for(objective, model), tower=not OBJECTIVES[objective].classifies)
