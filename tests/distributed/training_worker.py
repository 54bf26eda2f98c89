"""Trains as a scenario says and writes down what happened, in one process or in each of several.

As a script: `training_worker.py FOLDER SCENARIO...`; results are in `FOLDER/SCENARIO/rank-R.pt`. One
scenario, `faults`, is none of [`SCENARIOS`].
"""

import logging
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from test_numerics import poisoned
from test_trainer import NAMES, arguments, fake_robust_accuracy, new_trainer, pictures
from tiny_models import MODELS
from transformers import TrainerCallback

from autolora_hf import AutoLoraTrainer


@dataclass(frozen=True)
class Scenario:
    """A training.

    Args:
        images, validation: Sizes of the training and the validation set.
        batch: Images of an optimizer step, over all processes.
        accuracies: Robust accuracy to be reported in each epoch, whatever the model does.
        similarity: Whether the similarity of gradients is measured.
    """

    model: str = "hf_vit"
    mode: str = "full"
    images: int = 40
    validation: int = 13
    batch: int = 16
    accumulation: int = 1
    epochs: int = 1
    accuracies: tuple[float, ...] | None = None
    similarity: bool = False


SCENARIOS = {
    # 16 + 16 + 8 images: the last batch leaves the second of two processes with none of its own.
    "full": Scenario(epochs=2, similarity=True),
    "adapter": Scenario(mode="adapter", images=43, epochs=2),
    # The first step is the last one too: the second process has two images of its own, or none.
    "short": Scenario(images=10),
    "shorter": Scenario(mode="adapter", images=5),
    "accumulation": Scenario(images=43, accumulation=2, validation=16),
    "halving": Scenario(epochs=5, images=20, accuracies=(0.8, 0.9, 0.6, 0.55, 0.5)),
    "batch_norm": Scenario("timm_resnet", images=43, epochs=2, similarity=True),
    "batch_norm_adapter": Scenario("hf_resnet", "adapter", images=43, epochs=2),
}


# What is spoilt in one process alone, by step: (process, what). Steps 8 to 12 are five in a row.
FAULTS = {
    1: (1, "image"),
    2: (0, "gradient"),
    4: (1, "gradient"),
    5: (0, "statistics"),
    6: (1, "activations"),
    8: (0, "activations"),
    9: (1, "statistics"),
    10: (1, "image"),
    11: (0, "gradient"),
    12: (1, "gradient"),
}


class Recorder(TrainerCallback):
    """Gradients of the first step, weights at the ends of epochs and when they are evaluated."""

    def __init__(self):
        self.gradients, self.ends, self.evaluated = {}, [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        self.ends.append({key: value.clone() for key, value in model.state_dict().items()})

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.evaluated.append({key: value.clone() for key, value in model.state_dict().items()})


def train(scenario, folder, processes=1, accumulation=None, **changes):
    """Returns what happened in this process, of `processes` that train together."""
    accumulation = accumulation or scenario.accumulation
    recorder = Recorder()
    data, seen = pictures(scenario.images + scenario.validation), scenario.images
    options = {
        "num_train_epochs": scenario.epochs,
        "per_device_train_batch_size": scenario.batch // processes // accumulation,
        "per_device_eval_batch_size": 8 // processes,
        "gradient_accumulation_steps": accumulation,
        "augmentation": "none",
        "halving_interval": 2,
        "gradient_similarity": scenario.similarity,
    }
    trainer = AutoLoraTrainer(
        MODELS[scenario.model].adapted(num_classes=len(NAMES), mode=scenario.mode),
        arguments(folder, **{**options, **changes}),
        train_dataset=data.select(range(seen)),
        eval_dataset=data.select(range(seen, len(data))),
        callbacks=[recorder],
    )
    if scenario.accuracies:
        fake_robust_accuracy(trainer, scenario.accuracies)
    start = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train()
    timings = ("runtime", "per_second", "preparation_time")
    return {
        "scenario": asdict(scenario),
        "plan": {key: trainer.plan[key] for key in ("batch_size", "steps_per_epoch")},
        "start": start,
        "gradients": recorder.gradients,
        "ends": recorder.ends,
        "evaluated": recorder.evaluated,
        "final": {key: value.clone() for key, value in trainer.model.state_dict().items()},
        "best": trainer.state.best_model_checkpoint,
        "log": [
            {key: value for key, value in entry.items() if not key.endswith(timings)}
            for entry in trainer.state.log_history
        ],
    }


def train_with_faults(folder, rank):
    """Two processes, of which one at a time has numbers that are not finite."""
    bad = {(step, 0): what for step, (at, what) in FAULTS.items() if at == rank}
    logger, said = logging.getLogger("autolora_hf.training.numerics"), []
    logger.addFilter(lambda record: said.append(record.getMessage()) or True)
    trainer = new_trainer(
        folder,
        "timm_resnet",
        kind=poisoned(bad),
        per_device_train_batch_size=2,
        eval_attack_steps=1,
    )
    try:
        trainer.train()
    except FloatingPointError as error:
        verdict = str(error)
    # The step that stops the training has no end.
    trainer.states.append(trainer.everything())
    counts = trainer.lr_scheduler.skipped_steps, trainer.lr_scheduler.skipped_in_a_row
    return {"states": trainer.states, "counts": counts, "said": said, "verdict": verdict}


def main(folder, *names):
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for name in names:
        place = Path(folder) / name
        result = train_with_faults(place, rank) if name == "faults" else train(SCENARIOS[name], place, processes)
        torch.save(result, place / f"rank-{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
