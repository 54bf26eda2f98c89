"""Progress on the terminal: Trainer's bars, and one line an epoch instead of raw dictionaries."""

from __future__ import annotations

from typing import Any, cast

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

from ..progress import redraw_seconds


COLUMNS = (
    # title, logged key, format
    ("loss", "loss", "{:.3f}"),
    ("robust %", "eval_robust_accuracy", "{:.1%}"),
    ("95% from", "eval_robust_accuracy_low", "{:.1%}"),
    ("to", "eval_robust_accuracy_high", "{:.1%}"),
    ("natural %", "eval_natural_accuracy", "{:.1%}"),
    ("natural route %", "eval_natural_route_accuracy", "{:.1%}"),
    ("lambda1", "lambda1", "{:.2f}"),
    ("lambda2", "lambda2", "{:.2f}"),
    ("next lr", "next_learning_rate", "{:.2g}"),
)
# Where there are no accuracies.
LOSS_COLUMNS = (
    ("loss", "loss", "{:.4g}"),
    ("val. loss", "eval_loss", "{:.4g}"),
    ("without attack", "eval_clean_loss", "{:.4g}"),
    ("similarity", "eval_image_similarity", "{:.3f}"),
    ("next lr", "next_learning_rate", "{:.2g}"),
)


class EpochTableCallback(ProgressCallback):
    """Prints validation accuracies, loss scalars and learning rate as a table row when an epoch is complete.

    Robust accuracy is under the validation PGD, with its 95 % interval; "natural" is the deployed route on clean
    validation images.

    Args:
        accuracies (`bool`): Whether there are any; else the validation loss is shown, under attack and without one,
            and the mean cosine between the embeddings of different images.
    """

    def __init__(self, accuracies: bool = True) -> None:
        super().__init__()
        self.columns = COLUMNS if accuracies else LOSS_COLUMNS
        self.row: dict[str, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if state.is_world_process_zero:
            _calm(self.training_bar)
            titles = "  ".join(f"{title:>{max(8, len(title))}}" for title, _, _ in self.columns)
            cast(Any, self.training_bar).write(f"{'epoch':>7}  {titles}")

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        is_new = self.prediction_bar is None
        super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)
        if is_new and self.prediction_bar is not None:
            _calm(self.prediction_bar)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.row.update(logs or {})
        # The learning-rate decision is the last thing logged in an epoch.
        if not state.is_world_process_zero or self.training_bar is None or "next_learning_rate" not in (logs or {}):
            return
        cells = []
        for title, key, form in self.columns:
            text = form.format(self.row[key]).rstrip("%") if key in self.row else "-"
            cells.append(f"{text:>{max(8, len(title))}}")
        note = "  halved, back to the best weights" if self.row.get("reload") else ""
        self.training_bar.write(f"{state.epoch:>4.0f}/{state.num_train_epochs:<2}  {'  '.join(cells)}{note}")
        self.row = {}


def _calm(bar: tqdm) -> None:
    """Draws a bar of `Trainer`'s no more often than is of use."""
    bar.mininterval = redraw_seconds()
    bar.maxinterval = max(10.0, bar.mininterval)
