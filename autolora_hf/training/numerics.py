"""Steps whose numbers went wrong: undone, counted, reported, and fatal when they come in a row."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..config import ThreatModel
from .checkpoints import checkpoints


if TYPE_CHECKING:
    from .trainer import AutoLoraTrainer


logger = logging.getLogger(__name__)

# One broken batch comes once an epoch; steps that fail one after the other do so because of the weights, which a
# skipped step leaves as they are.
MOST_IN_A_ROW = 5

Buffers = list[tuple[nn.Module, str, Tensor]]


class StepGuard(TrainerCallback):
    """Skips optimizer steps with a loss, gradient, statistic or adversarial image that is not finite.

    After a skipped step weights, optimizer state and all buffers are bit for bit as before it. What one process finds
    in its forward pass becomes a NaN gradient, which the all-reduce carries to the others: all of them decide alike,
    without a message of their own and without leaving out a backward pass. The counts are kept in
    `AutoLoraScheduler`, whose state is part of a checkpoint.

    With a gradient scaler (fp16), steps are skipped by the scaler, and looking for its scale in this way is normal:
    they count as failures only once the scale is below 1, when it is not the scale that is too large.
    """

    def __init__(self, trainer: AutoLoraTrainer) -> None:
        self.trainer = trainer
        self.gradient_norm: Tensor | float | None = None
        # Names of the buffers that were finite when training began: some models mask with -inf.
        self._finite_names: set[str] | None = None
        self._buffers: Buffers = []
        self._before: list[Tensor] = []
        self._watched: list[Tensor] = []
        self._findings: list[dict[str, Tensor]] = []
        self._terms: list[dict[str, Tensor]] = []
        self._step_terms: list[dict[str, Tensor]] = []
        # Sums over the steps of the epoch, whenever something is logged, and their number.
        self._epoch_sums: dict[str, Tensor] = {}
        self._epoch_steps = 0

    # ---- inside the forward pass ----

    def checked(
        self,
        loss: Tensor,
        terms: dict[str, Tensor],
        pixels: Tensor | None = None,
        adversarial: Tensor | None = None,
        noted: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """`loss` of a micro batch as it is, or NaN with NaN gradients if something is not finite; never waits for the
        device.

        Args:
            loss (`Tensor`), terms (`dict[str, Tensor]`): What the objective returned; the terms are kept for the log.
            pixels (`Tensor`, *optional*), adversarial (`Tensor`, *optional*): N x 3 x H x W; the second must lie in
                the ball around the first.
            noted (`dict[str, Tensor]`, *optional*): Further scalars for the log, which need not be finite.
        """
        findings = {name: value.isfinite() for name, value in terms.items()} | {"loss": loss.detach().isfinite()}
        if adversarial is not None and pixels is not None:
            inside = in_ball(adversarial, pixels, self.trainer.args.threat_model)
            findings["adversarial images"] = inside
        if self._watched:
            findings["running statistics"] = get_total_norm(self._watched, math.inf).isfinite()
        self._findings.append(findings)
        self._step_terms.append({**terms, **(noted or {})})
        sound = torch.stack([finding.all() for finding in findings.values()]).all()
        # A loss can be infinite with finite gradients: multiplied by NaN, all of them are NaN.
        return loss * torch.where(sound, 1.0, math.nan).to(loss)

    def pop_means(self) -> dict[str, Tensor]:
        """Mean of every term over the steps since the last call, without the skipped ones."""
        # Not all of them in every step: while the radius is 0, there is no attack.
        names = dict.fromkeys(name for terms in self._terms for name in terms)
        means = {name: torch.stack([terms[name] for terms in self._terms if name in terms]).mean() for name in names}
        self._terms = []
        return means

    def epoch_mean(self, name: str) -> Tensor | None:
        """Mean of one term over the steps of this epoch, without the skipped ones; `None` if there were none."""
        return self._epoch_sums[name] / self._epoch_steps if self._epoch_steps else None

    # ---- around the optimizer step ----

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        buffers = self.trainer.model.named_buffers()
        self._finite_names = {name for name, buffer in buffers if _finite(buffer)}

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._epoch_sums, self._epoch_steps = {}, 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        named = list(_buffers(self.trainer.model))
        self._buffers = [entry for _, entry in named]
        self._before = [tensor.clone() for _, _, tensor in self._buffers]
        self._watched = [tensor for name, (_, _, tensor) in named if name in (self._finite_names or ())]
        self._findings, self._step_terms = [], []

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.accelerator.scaler is not None:
            return
        if self.gradient_norm is not None and not math.isfinite(self.gradient_norm):
            # Optimizers pass over parameters without a gradient, also with their momentum, weight decay and counts.
            for parameter in self.trainer.model.parameters():
                parameter.grad = None
            self._undo()
            self._count(state)
        else:
            self._accept()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        accelerator = self.trainer.accelerator
        if accelerator.scaler is None:
            return
        if not accelerator.optimizer_step_was_skipped:
            self._accept()
            return
        self._undo()
        if accelerator.scaler.get_scale() < 1:
            self._count(state)
        else:
            logger.info("Step %d was skipped: the gradients overflow, so the loss is scaled down.", state.global_step)

    def _accept(self) -> None:
        # The mean of the step, whatever its number of micro steps: as `Trainer` does with the loss.
        names = self._step_terms[0] if self._step_terms else ()
        means = {name: torch.stack([terms[name] for terms in self._step_terms]).mean() for name in names}
        self._terms.append(means)
        self._epoch_sums = {name: mean + self._epoch_sums.get(name, 0) for name, mean in means.items()}
        self._epoch_steps += 1
        self.trainer.lr_scheduler.skipped_in_a_row = 0

    def _undo(self) -> None:
        for (module, name, tensor), before in zip(self._buffers, self._before, strict=True):
            module._buffers[name] = tensor.copy_(before)

    def _count(self, state: TrainerState) -> None:
        scheduler = self.trainer.lr_scheduler
        scheduler.skipped_steps += 1
        scheduler.skipped_in_a_row += 1
        wrong = self._wrong()
        # Other processes only know what the gradients tell them.
        if wrong or self.trainer.is_world_process_zero():
            logger.warning(
                "Step %d was skipped, because not everything in it is finite: %s. Weights, optimizer state and "
                "running statistics are as before it. Skipped so far: %d, in a row: %d; training stops at %d in a "
                "row.",
                state.global_step,
                ", ".join(wrong) or "gradients",
                scheduler.skipped_steps,
                scheduler.skipped_in_a_row,
                MOST_IN_A_ROW,
            )
        if scheduler.skipped_in_a_row >= MOST_IN_A_ROW:
            raise FloatingPointError(self._verdict(state, wrong))

    def _wrong(self) -> list[str]:
        """What was not finite in the forward passes of this step, in this process."""
        names = dict.fromkeys(name for findings in self._findings for name in findings)
        return [name for name in names if not all(findings[name].all() for findings in self._findings)]

    def _verdict(self, state: TrainerState, wrong: list[str]) -> str:
        sealed = checkpoints(self.trainer.args.output_dir)
        if self.trainer.lr_scheduler.skipped_steps > state.global_step:
            advice = "No step has succeeded: check that the weights are finite, and try a lower `learning_rate`"
        elif sealed:
            advice = f"The last checkpoint is {sealed[-1]}: resume from it with a lower `learning_rate`"
        else:
            advice = "There is no checkpoint yet: start again with a lower `learning_rate`"
        if self.trainer.accelerator.mixed_precision != "no":
            advice += f", or in float32 instead of {self.trainer.accelerator.mixed_precision}"
        return (
            f"Training stopped at step {state.global_step}: {MOST_IN_A_ROW} steps in a row were skipped, because not "
            f"everything in them is finite (in the last one: {', '.join(wrong) or 'gradients'}). {advice}."
        )


def in_ball(adversarial: Tensor, pixels: Tensor, threat_model: ThreatModel) -> Tensor:
    """Whether all of `adversarial` lies in the ball around `pixels` and in [0, 1], up to rounding: a boolean scalar on
    the device, false if anything is NaN."""
    change = (adversarial - pixels).flatten(1)
    tolerance = 2 * torch.finfo(change.dtype).eps
    if threat_model.norm == "linf":
        size = change.abs().amax()
    elif threat_model.norm == "l2":
        size, tolerance = change.norm(dim=1).amax(), tolerance * math.sqrt(change.shape[1])
    else:
        size, tolerance = change.norm(p=1, dim=1).amax(), tolerance * change.shape[1]
    low, high = adversarial.aminmax()
    return (size <= threat_model.eps + tolerance) & (low >= 0) & (high <= 1)


def _buffers(model: nn.Module) -> Any:
    """`(name, (module, key, tensor))` of every buffer, each tensor once."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for key, tensor in module._buffers.items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{prefix}.{key}" if prefix else key, (module, key, tensor)


def _finite(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.isfinite().all())
