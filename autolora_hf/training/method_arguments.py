"""The training arguments that say what the method is: objective, initialiser, schedules, and what comes last."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, cast

from ..initializers import INITIALIZERS, Initializer
from ..objectives import OBJECTIVES, Objective
from ..options import json_object, with_options
from ..postprocessing import FINISHERS, Finisher
from ..schedules import SCHEDULES, EpsilonSchedule, default_checkpoints, milestones
from ..schedules.epsilon import EpsilonKind
from .averaging import AVERAGES


@dataclass
class MethodArguments:
    """What a method is a combination of, besides the routes of its model; see `docs/methods.md`."""

    objective: str = field(
        default="autolora",
        metadata={"help": f"Training objective: {', '.join(OBJECTIVES)}; see docs/methods.md."},
    )
    objective_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": "Options of the objective, in JSON on the command line: '{\"beta\": 6}' for trades."},
    )
    init: str = field(
        default="none",
        metadata={"help": f"What happens once before training: {', '.join(INITIALIZERS)}; see docs/methods.md."},
    )
    init_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": "Options of --init, in JSON on the command line: '{\"epochs\": 5}' for a linear probe."},
    )
    schedule: str | None = field(
        default=None,
        metadata={
            "help": f"Learning rate: {', '.join(SCHEDULES)}. Default: the objective's own, which is 'plateau' "
            "(AutoLoRa's automatic rule) for autolora and 'milestones' for most others."
        },
    )
    milestones: list[float] | None = field(
        default=None,
        metadata={"help": "Shares of the run after which 'milestones' divides by 10. Default: the objective's own."},
    )
    eps_schedule: str = field(
        default="constant",
        metadata={
            "help": "Radius of the training attack: 'constant', or from none to eps by 'two-hinge' or 'auto' (for "
            "backbones that were never robustly pre-trained). Validation always has eps."
        },
    )
    eps_hinges: list[float] | None = field(
        default=None, metadata={"help": "Shares of the run between which 'two-hinge' rises. Default: 0.24 0.74."}
    )
    average_weights: str = field(
        default="none",
        metadata={
            "help": "Weights that are validated, selected and saved: 'none': those of the optimizer; 'ema': their "
            "moving average; 'swa': their mean over the last quarter of the run."
        },
    )
    ema_decay: float = field(default=0.999, metadata={"help": "Decay a step of the moving average of 'ema'."})
    finish: str = field(
        default="none",
        metadata={"help": "What happens once after training: 'none', or 'rift' (natural accuracy for free; RiFT)."},
    )
    finish_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Options of --finish, in JSON on the command line."}
    )
    scalar_alpha: float = field(default=1.0, metadata={"help": "Sharpness alpha of the automatic loss scalars."})
    scalar_lambda2_max: float = field(default=6.0, metadata={"help": "Largest weight of the KL term."})
    scalar_accuracy: str = field(
        default="exact",
        metadata={
            "help": "Training accuracy behind the loss scalars: 'exact' measures it on the training images after "
            "every epoch (about 4 per cent of the time); 'running' is its mean over the epoch's batches, for nothing."
        },
    )
    scalar_images: int | None = field(
        default=None,
        metadata={"help": "Measure that accuracy on this many training images (drawn once, by class). Default: all."},
    )
    loss_scalars: list[float] | None = field(
        default=None,
        metadata={"help": "Two fixed loss scalars, lambda1 and lambda2, in the place of the automatic ones."},
    )
    halving_rule: str = field(
        default="paper", metadata={"help": "Rule of the automatic learning rate: 'paper' or 'released'."}
    )
    halving_interval: int | None = field(
        default=None,
        metadata={
            "help": "Epochs between two checkpoints of the learning-rate rule. Default: epochs / 15, at least 2."
        },
    )
    min_learning_rate: float = field(
        default=1e-5, metadata={"help": "Training stops when the learning rate has been halved below this."}
    )

    def _check_method(self) -> None:
        """Raises `ValueError`, before anything is loaded, for methods and options that there are not."""
        for name, known in (
            ("objective", OBJECTIVES),
            ("init", INITIALIZERS),
            ("schedule", (None, *SCHEDULES)),
            ("average_weights", AVERAGES),
            ("finish", FINISHERS),
        ):
            if getattr(self, name) not in known:
                options = ", ".join(option for option in known if option)
                raise ValueError(f"`{name}` must be one of {options}, got {getattr(self, name)!r}.")
        for name in ("objective_kwargs", "init_kwargs", "finish_kwargs"):
            setattr(self, name, json_object(getattr(self, name), name))
        for name in ("init", "finish"):
            if getattr(self, name) == "none" and getattr(self, f"{name}_kwargs"):
                raise ValueError(f"`{name}_kwargs` are given, but `{name}` is 'none'.")
        self.new_objective(), self.new_initializer(), self.new_finisher(), self.new_epsilon_schedule(1)
        self._refuse_without_effect()
        if self.milestones is not None:
            milestones(self.milestones)
        if self.loss_scalars is not None and (
            len(self.loss_scalars) != 2 or not 0 <= self.loss_scalars[0] <= 1 or self.loss_scalars[1] < 0
        ):
            raise ValueError(
                "`loss_scalars` must be two numbers, lambda1 in [0, 1] and lambda2 of at least 0, got "
                f"{self.loss_scalars}."
            )
        if self.scalar_accuracy not in ("exact", "running"):
            raise ValueError(f"`scalar_accuracy` must be 'exact' or 'running', got {self.scalar_accuracy!r}.")
        if self.halving_rule not in ("paper", "released"):
            raise ValueError(f"`halving_rule` must be 'paper' or 'released', got {self.halving_rule!r}.")
        if self.scalar_alpha <= 0 or self.scalar_lambda2_max < 0:
            raise ValueError(
                f"`scalar_alpha` must be positive and `scalar_lambda2_max` not negative, got {self.scalar_alpha} and "
                f"{self.scalar_lambda2_max}."
            )
        for name in ("halving_interval", "scalar_images"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if not 0 < self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be between 0 and 1, got {self.ema_decay}.")

    @property
    def learning_rate_schedule(self) -> str:
        """The schedule that runs: the one that was asked for, else the objective's own."""
        return self.schedule or OBJECTIVES[self.objective].schedule

    def _refuse_without_effect(self) -> None:
        """Raises `ValueError` for an option that the rest of the method does not look at: its user would think that it
        was tried."""
        objective, schedule = self.new_objective(), self.learning_rate_schedule
        conditions = {
            ("scalar_alpha", "scalar_lambda2_max", "scalar_accuracy", "scalar_images", "loss_scalars"): (
                objective.uses_scalars,
                f"`objective={self.objective!r}` has no such scalars",
            ),
            ("scalar_images",): (self.loss_scalars is None, "`loss_scalars` are fixed"),
            ("eps_schedule",): (objective.needs_adversarial, f"`objective={self.objective!r}` has no training attack"),
            ("milestones",): (schedule == "milestones", f"the schedule is {schedule!r}"),
            ("halving_rule", "halving_interval"): (schedule == "plateau", f"the schedule is {schedule!r}"),
            ("ema_decay",): (self.average_weights == "ema", f"`average_weights` is {self.average_weights!r}"),
        }
        defaults = {entry.name: entry.default for entry in fields(MethodArguments)}
        for names, (has_effect, why) in conditions.items():
            for name in names:
                if not has_effect and getattr(self, name) != defaults[name]:
                    raise ValueError(f"`{name}={getattr(self, name)!r}` would have no effect: {why}. Leave it out.")

    def method_plan(self, epochs: int) -> dict[str, Any]:
        """What was chosen or resolved of the method, for the training plan; `None` where there is no such thing."""
        objective, schedule = self.new_objective(), self.learning_rate_schedule
        automatic = objective.uses_scalars and self.loss_scalars is None
        plateau = schedule == "plateau"
        return {
            "objective_options": dict(self._options("objective_kwargs")),
            "init": self.init,
            "init_options": dict(self._options("init_kwargs")),
            "schedule": schedule,
            "milestones": list(self.milestones or objective.milestones) if schedule == "milestones" else None,
            "halving_rule": self.halving_rule if plateau else None,
            "halving_checkpoints": default_checkpoints(epochs, self.halving_interval) if plateau else None,
            "loss_scalars": self.loss_scalars,
            "scalar_accuracy": self.scalar_accuracy if automatic else None,
            "scalar_images": self.scalar_images,
            "scalar_alpha": self.scalar_alpha if automatic else None,
            "scalar_lambda2_max": self.scalar_lambda2_max if automatic else None,
            "eps_schedule": self.eps_schedule,
            "eps_hinges": self.eps_hinges,
            "average_weights": self.average_weights,
            "ema_decay": self.ema_decay if self.average_weights == "ema" else None,
            "finish": self.finish,
            "finish_options": dict(self._options("finish_kwargs")),
        }

    def _options(self, name: str) -> dict[str, Any]:
        return json_object(getattr(self, name), name) or {}

    def new_objective(self) -> Objective:
        """The objective with its options."""
        return with_options(OBJECTIVES[self.objective], self._options("objective_kwargs"), "objective_kwargs")

    def new_initializer(self) -> Initializer:
        """What runs before training, with its options."""
        return with_options(INITIALIZERS[self.init], self._options("init_kwargs"), "init_kwargs")

    def new_finisher(self) -> Finisher:
        """What runs after training, with its options."""
        return with_options(FINISHERS[self.finish], self._options("finish_kwargs"), "finish_kwargs")

    def new_epsilon_schedule(self, epochs: float) -> EpsilonSchedule:
        """The schedule of the training attack's radius, for a run of so many epochs."""
        hinges: dict[str, Any] = {}
        if self.eps_hinges is not None:
            if len(self.eps_hinges) != 2 or self.eps_schedule != "two-hinge":
                raise ValueError(
                    f"`eps_hinges` are two shares of the run for `eps_schedule='two-hinge'`, got {self.eps_hinges} "
                    f"with {self.eps_schedule!r}."
                )
            hinges = {"first": self.eps_hinges[0], "second": self.eps_hinges[1]}
        return EpsilonSchedule(epochs, cast(EpsilonKind, self.eps_schedule), **hinges)
