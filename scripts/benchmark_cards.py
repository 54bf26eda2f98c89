"""Model cards of adapters that were really trained on the tasks of the benchmarks, in `model_cards/`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from benchmark_page import load_results
from benchmark_systems import SYSTEMS
from benchmark_tasks import TASKS
from torch.utils.data import TensorDataset

from autolora_hf import PGD
from autolora_hf.evaluation import training_curves_figure
from autolora_hf.hub.model_card import write_model_card
from autolora_hf.training.publishing import CURVES


CARDS = Path(__file__).parents[1] / "model_cards"
ATTACKED = 100
ADAPTER = SYSTEMS["AutoLoRa, mode adapter"]


def other_seeds(name: str) -> str:
    """What the same training came to with every seed of the benchmark: a card is of one, whatever that one is."""
    rows = [row for row in load_results()["rows"] if (row["task"], row["system"]) == (name, ADAPTER.name)]
    found = {row["seed"]: f"{100 * row['pgd20']:.1f}" for row in rows if "pgd20" in row}
    if len(found) < 2:
        return ""
    return (
        f" Seeds differ: with {', '.join(map(str, found))} the same training has {', '.join(found.values())} per cent "
        "under PGD-20 on all test images (docs/results.md), and this adapter is of seed 0."
    )


def write_card(name: str) -> Path:
    """Trains AutoLoRa's adapter on a task with seed 0, measures it, and writes model and card into a folder.

    AutoAttack is run in full on a part of the test images, PGD-20 on all of them.
    """
    task, folder = TASKS[name], CARDS / f"{name}-adapter"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as run:
        trainer = task.trainer(ADAPTER.objective, 0, run, ADAPTER.config, **ADAPTER.arguments)
        trainer.train()
        test = TensorDataset(*task.test())
        images = min(ATTACKED, len(test))
        trainer.evaluate_robustness(test, max_samples=images, seed=0, progress=False, diagnostics=False)
        attack = PGD(trainer.args.threat_model, steps=20)
        trainer.evaluate_robustness(test, attack, progress=False, diagnostics=False)
        trainer.model.save_pretrained(folder)
        training_curves_figure(trainer.state.log_history, folder / CURVES)
        write_model_card(
            folder,
            trainer.model,
            dataset=task.dataset,
            separate=True,
            training_note=(
                f"{task.what} The backbone is `TASKS[{name!r}].backbone()` of `scripts/benchmark_tasks.py`"
                + (", which trains a robust one where it is not in the cache" if task.recipe else "")
                + ". The adapter belongs to the very weights it was trained on: `load_autolora_model` warns if they "
                "are others."
            ),
            command=f"python scripts/benchmark_methods.py --task {name} --cards",
            figures={"The training: validation accuracies, loss scalars, learning rate": CURVES},
            license=task.license,
        )
    return folder
