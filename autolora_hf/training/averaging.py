"""Averages of the weights, and what else a run needs to go on besides the model it would deploy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..files import load_tensors, save_tensors


if TYPE_CHECKING:
    from ..modeling import AutoLoraModel


AVERAGES = ("none", "ema", "swa")
# SWA begins with the last quarter of the run, as in AR-AT's (76 of 100 epochs).
SWA_START = 3 / 4
TRAINING_STATE = "training_state.safetensors"


class WeightAverage(TrainerCallback):
    """Keeps an average of everything that trains and of the running statistics beside the model.

    `"ema"`: `average = d average + (1 - d) weights` after every step, with a smaller d at first, `(1 + n) / (10 + n)`.
    `"swa"` (Izmailov et al., UAI 2018): the mean of the weights after every step of the last quarter of the run.
    Running statistics are averaged like weights, instead of being measured again. When the best weights are loaded
    again, the average starts from them. The best weights of a run with `"swa"` are those of an average: what was
    better before there was one does not count.

    Args:
        model (`AutoLoraModel`): The model in training.
        kind (`str`): `"none"`, `"ema"` or `"swa"`.
        decay (`float`): Of `"ema"`.
    """

    def __init__(self, model: AutoLoraModel, kind: str, decay: float) -> None:
        self.model, self.kind, self.decay = model, kind, decay
        self.count = 0
        self._average: dict[str, Tensor] = {}

    def _live(self) -> dict[str, Tensor]:
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return trained | {name: b for name, b in self.model.named_buffers() if b.is_floating_point()}

    @torch.no_grad()
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self.kind == "none" or (self.kind == "swa" and state.global_step <= SWA_START * state.max_steps):
            return
        live = self._live()
        if not self._average:
            self._average = {name: tensor.detach().clone() for name, tensor in live.items()}
        weight = 1 / (1 + self.count)
        if self.kind == "ema":
            weight = 1 - min(self.decay, (1 + self.count) / (10 + self.count))
        for name, tensor in live.items():
            self._average[name].lerp_(tensor, weight)
        self.count += 1

    def settle(self) -> None:
        """At the end of a training whose best weights were not loaded: the model has the average from now on."""
        if self._average:
            self._swap()
            self.restart()

    def begins_after(self, step: int | None, max_steps: int) -> bool:
        """Whether there is an average now, and `step` was before there was one."""
        return bool(self._average and self.kind == "swa" and step and step <= SWA_START * max_steps)

    def restart(self) -> None:
        """Forgets the average: the next step begins a new one."""
        self.count, self._average = 0, {}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has the averaged weights."""
        if not self._average:
            yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, tensor in self._live().items():
            average = self._average[name]
            kept = tensor.detach().clone()
            tensor.copy_(average)
            average.copy_(kept)

    # ---- checkpoints ----

    def save(self, folder: Path) -> None:
        """Writes, inside [`in_place`], what the model's own files do not hold; no file if there is nothing."""
        tensors = {f"auxiliary.{name}": tensor for name, tensor in self.model.auxiliary.state_dict().items()}
        if self._average:
            # The model has the average now, and its own files hold that.
            tensors |= {f"live.{name}": tensor for name, tensor in self._average.items()}
            tensors["average.count"] = torch.tensor(self.count)
        if tensors:
            save_tensors(tensors, folder / TRAINING_STATE)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Takes up what [`save`] wrote, when the model has loaded its own files of the same checkpoint."""
        path = folder / TRAINING_STATE
        if not path.is_file():
            self.restart()
            return
        tensors = load_tensors(path, None)
        self.load_auxiliary(folder)
        live = self._live()
        if "average.count" in tensors:
            self.count = int(tensors["average.count"])
            self._average = {name: tensor.detach().clone() for name, tensor in live.items()}
            for name, tensor in live.items():
                tensor.copy_(tensors[f"live.{name}"])

    def load_auxiliary(self, folder: Path) -> None:
        """Takes up the modules that train along, as they were in a checkpoint."""
        if len(self.model.auxiliary):
            tensors = load_tensors(folder / TRAINING_STATE, None)
            prefix = "auxiliary."
            own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            self.model.auxiliary.load_state_dict(own)
