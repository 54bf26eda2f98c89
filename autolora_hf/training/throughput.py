"""How many images a training takes in a second."""

from __future__ import annotations

import time
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Throughput(TrainerCallback):
    """Counts training images and the time they took, from one log to the next.

    The time is that of the steps and of reading the images: validation, saving and what other callbacks do when an
    epoch begins are left out. No clock is read between the operations of a step, so nothing waits for the device.
    """

    def __init__(self) -> None:
        self.restart()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.restart()

    def restart(self) -> None:
        """Begins to count anew."""
        self._images, self._since = 0, time.perf_counter()

    def count(self, images: int) -> None:
        """Images of a micro batch that this process has been given."""
        self._images += images

    def images_per_second(self, accelerator: Accelerator) -> float:
        """Of all processes together, since it was restarted."""
        images = torch.tensor(float(self._images), device=accelerator.device)
        images = accelerator.reduce(images, "sum").item()
        return images / (time.perf_counter() - self._since)
