"""What `docs/guides/troubleshooting.md` quotes is what the package says: every message there is triggered here.

On the page `...` stands for what depends on the machine or on chance, such as folders and measured values.
"""

import contextlib
import inspect
import logging
import re
import shutil
import tempfile
from functools import cache
from pathlib import Path

import datasets
import httpx
import numpy as np
import pytest
import timm
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from PIL import Image
from test_conversion import norm
from test_data import folder as image_folder
from test_diagnosis import RISING, VALIDATION, history
from test_input_errors import labelled
from test_trainer import NAMES, StopAfter, arguments, new_trainer, pictures
from tiny_models import IMAGE_SIZE, MODELS, pixels
from torch.utils.data import TensorDataset

from autolora_hf import (
    PGD,
    AutoLoraTrainer,
    AutoLoraTrainingArguments,
    ThreatModel,
    evaluate_robustness,
    get_autolora_model,
    load_autolora_model,
)
from autolora_hf import download as download_module
from autolora_hf.cli import main
from autolora_hf.data import as_pixel_dataset
from autolora_hf.initializers.conversion import convert_checkpoint
from autolora_hf.training.checkpoints import last_whole_checkpoint
from autolora_hf.training.diagnosis import findings
from autolora_hf.training.distributed import check_parallelism


PAGE = Path(__file__).parents[1] / "docs" / "guides" / "troubleshooting.md"
SHAPE = (3, IMAGE_SIZE, IMAGE_SIZE)


def raised(call, *args, **options):
    """The message of the error that a call ends with, as Python prints it without the name of its module."""
    with pytest.raises(Exception) as error:
        call(*args, **options)
    return f"{error.type.__name__}: {error.value}"


@contextlib.contextmanager
def warned():
    """Collects what the package warns of meanwhile."""
    found, handler = [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger("autolora_hf")
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


def classifier(classes=3, name="hf_vit", **config):
    return MODELS[name].adapted(num_classes=classes, **config).eval()


def images(count=12, classes=3):
    """Tensors as a test set."""
    return TensorDataset(pixels(count), torch.arange(count) % classes)


def measured(model=None, data=None, attack=None, **options):
    model, attack = model or classifier(), attack or PGD(ThreatModel(), steps=1)
    options = {"progress": False, "diagnostics": False, **options}
    return evaluate_robustness(model, data or images(), ThreatModel(), attack, **options)


# ---- what triggers each message: a function of a folder that it may use, by how the message begins on the page ----

CASES = {}


def case(start):
    def register(trigger):
        CASES[start] = trigger
        return trigger

    return register


@case("autolora train: error")
def _(folder, capsys):
    image_folder(folder / "birds")
    options = ["--model", "test_resnet", "--train-data", str(folder / "birds"), "--output-dir", str(folder / "run")]
    assert main(["train", *options, "--eps", "8"]) == 1
    return capsys.readouterr().err.strip().splitlines()[-1]


@case("ValueError: `eps` is 8")
def _(folder):
    return raised(ThreatModel, "linf", 8)


@case("ValueError: `eps` is 0")
def _(folder):
    return raised(ThreatModel, "linf", 0)


@case("ValueError: `step_size` is 2")
def _(folder):
    return raised(PGD, ThreatModel("linf", 8 / 255), step_size=2)


@case("ValueError: `image[0] of dataset` must be in [0, 1], got values from -2")
def _(folder):
    normalised = torch.linspace(-2, 2, 3 * IMAGE_SIZE**2).view(SHAPE)
    return raised(measured, data=[(normalised, 0), (normalised, 1)])


@case("ValueError: `pixels` must be in [0, 1], got values from 0 to 255")
def _(folder):
    eight_bit = torch.linspace(0, 255, 3 * IMAGE_SIZE**2).view(1, *SHAPE)
    return raised(measured, data=(eight_bit, torch.tensor([0])))


@case("ValueError: `pixels` must be images of")
def _(folder):
    return raised(measured, data=(torch.rand(2, 3, 24, 24), torch.tensor([0, 1])))


@case("ValueError: `image[0] of dataset` is a float image")
def _(folder):
    depth = Image.fromarray(np.linspace(0, 80, 64, dtype=np.float32).reshape(8, 8))
    return raised(measured, data=[(depth, 0), (depth, 1)])


@case("ValueError: `image[0] of dataset` must be a tensor 3 x H x W")
def _(folder):
    transparent = torch.rand(4, IMAGE_SIZE, IMAGE_SIZE)
    return raised(measured, data=[(transparent, 0), (transparent, 1)])


@case("TypeError: A plain module states no preprocessing")
def _(folder):
    return raised(measured, MODELS["hf_vit"].fresh(3), pictures(12))


@case("ValueError: This ResNet has no classifier")
def _(folder):
    return raised(get_autolora_model, timm.create_model("test_resnet", num_classes=0))


@case("ValueError: 3 of 12 labels of")
def _(folder):
    data = labelled([0, 1, 2, 7] * 3)
    return raised(AutoLoraTrainer, classifier(), arguments(folder), data)


@case("ValueError: dataset has other classes")
def _(folder):
    trainer = AutoLoraTrainer(classifier(), arguments(folder), pictures())
    other = pictures(9, seed=5).cast_column("label", datasets.ClassLabel(names=NAMES[::-1]))
    return raised(trainer.evaluate_robustness, other, attack="pgd")


@case("ValueError: The sub-folders of")
def _(folder):
    image_folder(folder / "birds" / "train")
    image_folder(folder / "birds" / "test", seed=100)
    return raised(as_pixel_dataset, folder / "birds", classifier().preprocessing)


@case("FileNotFoundError: The folder")
def _(folder):
    (folder / "birds").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "birds" / "robin.jpg")
    return raised(as_pixel_dataset, folder / "birds", classifier().preprocessing)


@case("1 of 6 images of")
def _(folder):
    root = image_folder(folder / "birds")
    broken = root / "cat" / "0.png"
    broken.write_bytes(broken.read_bytes()[:40])
    with warned() as found:
        args = arguments(folder / "run", validation_fraction=0.34, num_train_epochs=1)
        trainer = AutoLoraTrainer(classifier(), args, root)
        trainer.train()
    return next(text for text in found if "cannot be read" in text)


@case("ValueError: `eval_dataset` is")
def _(folder):
    return raised(AutoLoraTrainer, classifier(), arguments(folder), pictures(), pictures(12, seed=3, split="test"))


@case("ValueError: `eval_dataset` shares images")
def _(folder):
    return raised(AutoLoraTrainer, classifier(), arguments(folder), pictures(), pictures(24))


@case("ValueError: The dataset shares images")
def _(folder):
    trainer = AutoLoraTrainer(classifier(), arguments(folder), pictures())
    return raised(trainer.evaluate_robustness, pictures(24), attack="pgd", progress=False)


@case("Only 12 validation images")
def _(folder):
    with warned() as found:
        AutoLoraTrainer(classifier(), arguments(folder), pictures())
    return next(text for text in found if "validation images" in text)


@case("ValueError: The automatic learning rate")
def _(folder):
    return raised(AutoLoraTrainingArguments, str(folder), eval_strategy="steps", save_strategy="steps")


@case("ValueError: `warmup_steps=100` would have no effect")
def _(folder):
    return raised(AutoLoraTrainingArguments, str(folder), warmup_steps=100)


# ---- trainings that go wrong ----


def finding(log, kind, **options):
    (found,) = [one for one in findings(log, VALIDATION, 12, **options) if one.kind == kind]
    return f"Epoch {found.epoch:g}: {found.message}"


@case("Epoch 0: This backbone does not look")
def _(folder):
    return finding([{"feature_displacement": 2.1, "epoch": 0}, *history(RISING)], "natural_backbone")


@case("Epoch 3: Robust validation accuracy has not been above guessing")
def _(folder):
    return finding(history([0.1] * 6), "robust_accuracy_at_chance")


@case("Epoch 4: The model gives")
def _(folder):
    return finding(history(RISING, share=[0.3, 1.0, 0.96, 0.98, 1.0, 1.0]), "one_class")


@case("Epoch 4: Robust validation accuracy has fallen")
def _(folder):
    log = history([0.2, 0.4, 0.45, 0.01, 0.0], train=[0.3, 0.5, 0.6, 0.7, 0.9])
    return finding(log, "catastrophic_overfitting")


@case("Epoch 1: The model is right on more attacked images")
def _(folder):
    return finding(history([0.5] * 3, natural=0.3, only=0.2), "attack_helps")


@case("Epoch 2: The embeddings")
def _(folder):
    log = [{"image_similarity": 0.71, "epoch": 0}]
    log += [{"eval_image_similarity": value, "epoch": epoch} for epoch, value in ((1, 0.75), (2, 0.93))]
    return finding(log, "collapse")


@cache
def of_infinite_weights():
    """What a training says whose weights overflow, and how it ends."""
    with tempfile.TemporaryDirectory() as folder, warned() as found:
        trainer = new_trainer(folder, num_train_epochs=2)
        with torch.no_grad():
            trainer.model.heads[0].weight.fill_(1e30)
        end = raised(trainer.train)
    return found, end


@case("Step 0 was skipped")
def _(folder):
    return next(text for text in of_infinite_weights()[0] if "was skipped" in text)


@case("FloatingPointError: Training stopped")
def _(folder):
    return of_infinite_weights()[1]


def resumed(folder, **changes):
    """What is said when a training goes on."""
    with warned() as found:
        new_trainer(folder, train=pictures(15), **changes).train(resume_from_checkpoint=True)
    return found


@case("There is no whole checkpoint in")
def _(folder):
    return next(text for text in resumed(folder, num_train_epochs=1) if "whole checkpoint" in text)


@cache
def interrupted():
    """The folder of a training that stopped after the first of two epochs."""
    folder = tempfile.TemporaryDirectory()
    new_trainer(folder.name, train=pictures(15), num_train_epochs=2, callbacks=[StopAfter(1)]).train()
    return folder


@case("... is damaged and passed over")
def _(folder):
    shutil.copytree(interrupted().name, folder, dirs_exist_ok=True)
    with (folder / "checkpoint-1" / "optimizer.pt").open("r+b") as file:
        file.truncate(100)
    with warned() as found:
        # What `train(resume_from_checkpoint=True)` looks for.
        assert last_whole_checkpoint(folder) is None
    return found[0]


@case("The run goes on under other conditions")
def _(folder):
    shutil.copytree(interrupted().name, folder, dirs_exist_ok=True)
    return next(text for text in resumed(folder, num_train_epochs=2, seed=1) if "other conditions" in text)


@case("ValueError: FSDP is not supported")
def _(folder):
    args = arguments(folder)
    args.fsdp = True
    return raised(check_parallelism, args)


@case("Using one of 8 GPUs")
def _(folder):
    args = arguments(folder)
    args._n_gpu = 8
    with warned() as found:
        check_parallelism(args)
    return found[0]


# ---- evaluations ----


@case("PGD-1: a training signal")
def _(folder):
    return next(text for text in measured().warnings if "training signal" in text)


@case("All clean images are taken for one class")
def _(folder):
    model = classifier()
    with torch.no_grad():
        model.heads[0].bias[1] = 100
    return next(text for text in measured(model).warnings if "one class" in text)


@case("Only 12 images")
def _(folder):
    return next(text for text in measured().warnings if text.startswith("Only"))


@cache
def of_three_classes():
    return measured(attack="autoattack")


@case("AutoAttack without APGD-T")
def _(folder):
    return next(text for text in of_three_classes().warnings if "AutoAttack without" in text)


@case("APGD-T: its loss")
def _(folder):
    return f"APGD-T: {of_three_classes().left_out['APGD-T']}"


class Brightest(torch.nn.Module):
    """Which channel is the brightest, without a gradient."""

    def forward(self, x):
        return x.detach().mean((2, 3))


@case("Square, which uses no gradients")
def _(folder):
    model, clean = Brightest(), pixels(3)
    report = measured(model, (clean, model(clean).argmax(1)), "autoattack")
    return next(text for text in report.warnings if text.startswith("Square"))


@case("`attack_bf16` makes attacks weaker")
def _(folder):
    with warned() as found:
        new_trainer(folder, attack_bf16=True, eps=1 / 255)
    return next(text for text in found if "attack_bf16" in text)


@case("ValueError: ... holds the verdicts of another evaluation")
def _(folder):
    measured(checkpoint_dir=folder)
    return raised(measured, checkpoint_dir=folder, seed=1)


def outside(model, images, labels):
    return (images + 0.2).clamp(0, 1)


@case("ValueError: outside left the ball")
def _(folder):
    return raised(measured, attack=outside)


# ---- saving, loading, the Hub ----


@case("ValueError: The saved model has 3 classes")
def _(folder):
    classifier(mode="adapter").save_pretrained(folder)
    return raised(load_autolora_model, folder, base_model=MODELS["hf_vit"].fresh(4))


@case("ValueError: ... is an adapter of a ViTForImageClassification that was created in memory")
def _(folder):
    classifier(mode="adapter").save_pretrained(folder)
    return raised(load_autolora_model, folder)


@case("The adapter ... was trained on other weights")
def _(folder):
    classifier(mode="adapter").save_pretrained(folder)
    with warned() as found:
        load_autolora_model(folder, base_model=MODELS["hf_vit"].fresh(3, seed=7))
    return next(text for text in found if "other weights" in text)


def refused_by_the_hub(error):
    """What a load says when the Hub answers so."""
    response = httpx.Response(401, request=httpx.Request("GET", "https://huggingface.co/org/birds-robust"))
    original = download_module.snapshot_download

    def refuse(*args, **options):
        raise error("refused", response=response)

    download_module.snapshot_download = refuse
    try:
        return raised(load_autolora_model, "org/birds-robust")
    finally:
        download_module.snapshot_download = original


@case("FileNotFoundError: There is no repository")
def _(folder):
    return refused_by_the_hub(RepositoryNotFoundError)


@case("PermissionError: org/birds-robust is gated")
def _(folder):
    return refused_by_the_hub(GatedRepoError)


@case("OSError: org/birds-robust is not in the cache")
def _(folder):
    return raised(load_autolora_model, "org/birds-robust", cache_dir=folder, local_files_only=True)


@case("ValueError: ... has no safetensors weights")
def _(folder):
    network = MODELS["hf_vit"].fresh(3)
    network.config.save_pretrained(folder)
    torch.save(network.state_dict(), folder / "pytorch_model.bin")
    return raised(get_autolora_model, str(folder))


class Code:
    def __reduce__(self):
        return print, ("code ran",)


@case("ValueError: ... was not loaded: to open it")
def _(folder):
    torch.save({"model": norm("bn", 4), "opt": Code()}, folder / "robust.pt")
    return raised(convert_checkpoint, folder / "robust.pt", num_classes=10)


@case("OSError: The pretrained weights of timm's 'resnet18'")
def _(folder):
    return raised(get_autolora_model, "resnet18")


@case("ValueError: Unknown checkpoint 'resnet-50'")
def _(folder):
    return raised(get_autolora_model, "resnet-50")


# ---- the page ----


def quotes():
    """The messages of the page, each in one line."""
    return [" ".join(block.split()) for block in re.findall(r"^```text\n(.*?)^```$", PAGE.read_text(), re.M | re.S)]


def says(quote, message):
    """Whether a message is the quoted one, in which `...` may be anything."""
    pattern = ".*".join(map(re.escape, quote.split("...")))
    return re.fullmatch(pattern, " ".join(message.split()), re.S) is not None


@pytest.mark.parametrize("start", CASES)
def test_a_message_is_what_the_page_quotes(start, tmp_path, request):
    trigger, needed = CASES[start], ()
    if "capsys" in inspect.signature(trigger).parameters:
        needed = (request.getfixturevalue("capsys"),)
    (quote,) = [text for text in quotes() if text.startswith(start)]
    message = trigger(tmp_path, *needed)
    assert says(quote, message), f"The page quotes\n{quote}\nand the package says\n{' '.join(message.split())}"


def test_every_quote_is_triggered():
    starts = [[start for start in CASES if quote.startswith(start)] for quote in quotes()]
    assert all(len(found) == 1 for found in starts), [q for q, s in zip(quotes(), starts, strict=True) if len(s) != 1]
    assert len(starts) == len(CASES)


def test_a_quote_that_is_not_said_is_noticed():
    quote = "ValueError: ... has no safetensors weights."
    assert says(quote, "ValueError: /tmp/model has no\nsafetensors weights.")
    assert not says(quote, "ValueError: /tmp/model has no weights.")
    assert not says(quote, "ValueError: /tmp/model has no safetensors weights. Convert them.")
