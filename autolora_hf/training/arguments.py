"""Arguments of [`AutoLoraTrainer`]."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import torch
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import OptimizerNames

from .. import checkpointing
from ..attacks import PGD
from ..attacks.pgd import AttackLoss
from ..config import Norm, PixelRadius, ThreatModel
from ..data import Augmentation
from ..objectives import OBJECTIVES
from .label_free import selectable_metrics
from .method_arguments import MethodArguments


# `PixelRadius` is what reads a command line. Python code gives, and finds, numbers.
if TYPE_CHECKING:
    Radius = float
else:
    Radius = PixelRadius


@dataclass
class AutoLoraTrainingArguments(MethodArguments, TrainingArguments):
    """`TrainingArguments` with AutoLoRa's defaults: nothing has to be chosen.

    Everything `TrainingArguments` offers still applies. What differs by default follows the paper: SGD with momentum
    0.9, no gradient clipping, 60 epochs (in proportion for short training sets), evaluation and a checkpoint after
    every epoch, and the weights of the best robust validation accuracy at the end.
    """

    if TYPE_CHECKING:
        # `TrainingArguments` allows `None` and replaces it.
        output_dir: str = ""

    threat_norm: str = field(default="linf", metadata={"help": "Norm of the threat model: 'linf', 'l2' or 'l1'."})
    eps: Radius = field(
        default=PixelRadius("8/255"),
        metadata={"help": "Radius of the threat model in [0, 1] pixels; '8/255' is understood."},
    )
    attack_steps: int = field(default=10, metadata={"help": "PGD steps of the training attack."})
    attack_step_size: Radius | None = field(
        default=None, metadata={"help": "PGD step in [0, 1] pixels. Default: eps / 4 (the paper's 2/255 at 8/255)."}
    )
    eval_attack_steps: int = field(default=10, metadata={"help": "PGD steps on the validation set, each epoch."})
    attack_bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Let attacks search in bfloat16; what they find is judged by the model as it is. Default: with "
            "`bf16=True`, if the threat model allows changes of 2/255 or more; below that it may make attacks weaker."
        },
    )
    attack_compile: bool = field(
        default=False,
        metadata={"help": "Run training attacks through torch.compile: it takes minutes first, for runs of hours."},
    )
    attack_fold_norms: bool = field(
        default=True, metadata={"help": "Attack a copy whose BatchNorm layers are folded into convolutions (exact)."}
    )
    attack_linear_patches: bool = field(
        default=True, metadata={"help": "Attack a copy whose patch embeddings are matrix products, on a CPU (exact)."}
    )
    channels_last: bool = field(
        default=True, metadata={"help": "Compute convolutions in the channels-last memory format (exact)."}
    )
    validation_fraction: float = field(
        default=0.05, metadata={"help": "Share of the training set held out when no validation set is given."}
    )
    max_validation_images: int | None = field(
        default=2000,
        metadata={
            "help": "About this many validation images at most, the same in every epoch and in proportion to the "
            "classes: each costs as much as a training image. Without a validation set no more are held out."
        },
    )
    augmentation: str = field(
        default="crop-flip",
        metadata={
            "help": "Training augmentation: 'crop-flip', 'wide-crop-flip' (photos are cropped as in the paper's code, "
            "to 8 to 100 per cent instead of 70 to 100), 'crop' (digits, text) or 'none'."
        },
    )
    broken_images: str = field(
        default="skip",
        metadata={
            "help": "Images that cannot be read: 'skip' trains with another of their class and leaves them out of the "
            "validation data, with a warning; 'raise' stops."
        },
    )
    gradient_similarity: bool = field(
        default=False,
        metadata={
            "help": "Log and plot the cosine between the natural and the adversarial gradient of the feature "
            "extractor, without and with the branch, on one batch of training images: about two more steps an epoch."
        },
    )
    image_column: str | None = field(default=None, metadata={"help": "Image column; found by its type by default."})
    label_column: str | None = field(default=None, metadata={"help": "Label column; found by its type by default."})

    # Defaults of `TrainingArguments` that AutoLoRa changes.
    num_train_epochs: float | None = field(  # type: ignore[assignment]  # filled in by the trainer
        default=None,
        metadata={"help": "Number of epochs. Default: the paper's 60, more if an epoch has under 15 steps."},
    )
    learning_rate: float | None = field(  # type: ignore[assignment]  # filled in by `resolve_optimizer`
        default=None,
        metadata={
            "help": "Learning rate at the start; --schedule moves it. Default: 0.01, for adapters 0.005; another one "
            "in mode 'full' if the objective has one."
        },
    )
    weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay, on every parameter."})
    optim: str | None = field(  # type: ignore[assignment]  # filled in by `resolve_optimizer`
        default=None,
        metadata={"help": "Optimizer. Default: SGD with momentum 0.9; AdamW for adapters, fare and sim-clip."},
    )
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Training batch size of each device."})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Evaluation batch size of each device."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradient clipping; 0 is none, as in the paper."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate; the schedule needs 'epoch'."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save; the schedule needs 'epoch'."})
    logging_strategy: str = field(default="epoch", metadata={"help": "When to log."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep, besides the best one."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best validated weights."})
    metric_for_best_model: str | None = field(
        default=None, metadata={"help": "Validation metric to select by. Default: the objective's own."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "'True' goes on from the latest whole checkpoint in the output folder, to the same bits as "
            "without the interruption; or the folder of a checkpoint. In Python an argument of `train`."
        },
    )
    dataloader_num_workers: int | None = field(  # type: ignore[assignment]  # filled in by `resolve_workers`
        default=None,
        metadata={
            "help": "Processes that read images. Default: with a GPU up to 8, as the CPU cores allow, which stay from "
            "epoch to epoch; without one, and for streams, none."
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Not needed: such losses are left out of the log without waiting for the device."},
    )
    # Our collator takes columns by name, and every trainable parameter gets a gradient once a step.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Not used: columns are chosen by name."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Not needed: every trainable parameter is used in every step."}
    )

    def __post_init__(self) -> None:
        self._check_method()
        if self.augmentation not in get_args(Augmentation):
            options = ", ".join(map(repr, get_args(Augmentation)))
            raise ValueError(f"`augmentation` must be one of {options}, got {self.augmentation!r}.")
        if self.broken_images not in ("skip", "raise"):
            raise ValueError(f"`broken_images` must be 'skip' or 'raise', got {self.broken_images!r}.")
        for name in ("learning_rate", "max_validation_images"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.num_train_epochs is not None and self.num_train_epochs < 1:
            raise ValueError(f"`num_train_epochs` must be at least 1, got {self.num_train_epochs}.")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"`validation_fraction` must be between 0 and 1, got {self.validation_fraction}.")
        objective = OBJECTIVES[self.objective]
        has_both = objective.needs_adversarial and objective.classifies and not objective.heads_only
        if self.gradient_similarity and not has_both:
            raise ValueError(
                "`gradient_similarity` compares the natural with the adversarial gradient of the feature extractor, "
                f"and `objective={self.objective!r}` has no such pair. Leave it out."
            )
        if self.warmup_steps and self.learning_rate_schedule != "cosine":
            raise ValueError(
                f"`warmup_steps={self.warmup_steps:g}` would have no effect: the schedule is "
                f"{self.learning_rate_schedule!r}. Leave it out, or use `schedule='cosine'` (`--schedule cosine`)."
            )
        strategies = [getattr(value, "value", value) for value in (self.eval_strategy, self.save_strategy)]
        if strategies != ["epoch", "epoch"]:
            raise ValueError(
                "The automatic learning rate looks at the robust validation accuracy of every epoch and goes back to "
                "the best checkpoint, so it needs `eval_strategy='epoch'` and `save_strategy='epoch'`, got "
                f"{strategies[0]!r} and {strategies[1]!r}."
            )
        # `TrainingArguments` wants a name; `resolve_optimizer` replaces it once the mode is known.
        self._choose_optimizer = self.optim is None
        self.optim = self.optim or "sgd"
        # Both raise with advice when the numbers make no sense, before anything is loaded or trained.
        self.eps = PixelRadius(self.eps)
        if self.attack_step_size is not None:
            self.attack_step_size = PixelRadius(self.attack_step_size)
        self.training_attack()
        metrics = selectable_metrics(self)
        if self.metric_for_best_model not in (None, *metrics, *(f"eval_{metric}" for metric in metrics)):
            raise ValueError(
                f"`metric_for_best_model` of {self.objective!r} must be one of {', '.join(metrics)}, got "
                f"{self.metric_for_best_model!r}."
            )
        if self.metric_for_best_model is None:
            metric = OBJECTIVES[self.objective].selection_metric
            self.metric_for_best_model = f"eval_{metric}"
            self.greater_is_better = metric != "loss"
        self._choose_workers = self.dataloader_num_workers is None
        self.dataloader_num_workers = self.dataloader_num_workers or 0
        if self.label_names is None:
            self.label_names = ["labels"]
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # there is nothing to pin for, and torch would warn
        super().__post_init__()
        self._check_checkpointing()

    def _check_checkpointing(self) -> None:
        options: dict[str, Any] = dict(cast(Any, self.activation_checkpointing_kwargs) or {})
        every_n_layers = options.pop("every_n_layers", 1)
        options.pop("offload", None)
        checkpointing.check_options(options, every_n_layers)
        if self.activation_checkpointing and self.torch_compile:
            raise ValueError(
                "`activation_checkpointing` and `torch_compile` do not go together: compiled code cannot go back to "
                "the route of the layers it recomputes. Leave one of them out."
            )
        fsdp = self.fsdp_config if isinstance(self.fsdp_config, dict) else {}
        if str(fsdp.get("activation_checkpointing", False)).lower() in ("true", "1"):
            raise ValueError(
                "`fsdp_config={'activation_checkpointing': ...}` is not possible: layers that FSDP recomputes would "
                "not know their route. Use `activation_checkpointing=True` instead."
            )

    def create_output_dir(self) -> None:
        """Creates the output folder, where this process saves; an `OSError` tells what is in the way."""
        if not self.should_save:
            return
        try:
            Path(self.output_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise type(error)(
                f"`output_dir` {self.output_dir!r} cannot be created: {error.strerror}. Choose a folder that you may "
                "write to."
            ) from error

    def resolve_optimizer(self, mode: str) -> None:
        """Fills in optimizer and learning rate where they were left open.

        Mode `full` has the paper's SGD, or what the objective has. The two factors of an adapter have gradients of
        very different size, so SGD hardly moves it: mode `adapter` has AdamW.
        """
        if self._choose_optimizer:
            published = OBJECTIVES[self.objective].optimizer or OptimizerNames.SGD
            self.optim = OptimizerNames(published if mode == "full" else OptimizerNames.ADAMW_TORCH)
        if self.optim == OptimizerNames.SGD and self.optim_args is None:
            self.optim_args = "momentum=0.9"
        if self.learning_rate is None:
            self.learning_rate = (OBJECTIVES[self.objective].learning_rate or 0.01) if mode == "full" else 0.005

    def resolve_workers(self, streams: bool) -> None:
        """Fills in the number of processes that read images, where it was left open.

        One image takes 0.1 to 3 ms of a CPU core (`docs/speed.md`): nothing beside a step on a CPU, but more than a
        GPU waits for. Streams may not know how to share themselves out.
        """
        if not self._choose_workers or streams or self.device.type == "cpu":
            return
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # One core is left to the process itself.
        self.dataloader_num_workers = max(0, min(8, cores // self.world_size - 1))
        self.dataloader_persistent_workers = self.dataloader_num_workers > 0
        # Copies from pinned memory go on while the device computes.
        cast(AcceleratorConfig, self.accelerator_config).non_blocking = self.dataloader_pin_memory

    def limit_held_out(self, images: int) -> None:
        """Makes `validation_fraction` of `images` training images no more than `max_validation_images`."""
        if self.max_validation_images is not None:
            self.validation_fraction = min(self.validation_fraction, self.max_validation_images / images)

    @property
    def threat_model(self) -> ThreatModel:
        return ThreatModel(cast(Norm, self.threat_norm), float(self.eps))

    def training_attack(self, loss: AttackLoss = "ce", share: float = 1.0) -> PGD:
        """The attack of the training steps: PGD from a uniform random start.

        Args:
            loss (`str`): What it maximises, see [`PGD`].
            share (`float`): Share of the radius, and of the step size.
        """
        threat_model = self.threat_model
        if share < 1:
            threat_model = ThreatModel(threat_model.norm, threat_model.eps * share)
        step_size = None if self.attack_step_size is None else self.attack_step_size * share
        return PGD(threat_model, steps=self.attack_steps, step_size=step_size, loss=loss)

    def validation_attack(self, loss: AttackLoss = "ce") -> PGD:
        """The attack that the schedule and the choice of the best weights go by."""
        return PGD(self.threat_model, steps=self.eval_attack_steps, step_size=self.attack_step_size, loss=loss)
