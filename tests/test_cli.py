"""The `autolora` command, as a user calls it."""

import json
import subprocess
import sys

import numpy as np
import pytest
import timm
from huggingface_hub import ModelCard
from PIL import Image
from timm.models import save_for_hf

from autolora_hf.cli import main


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A backbone in timm's folder format, and training and test images of three colours by class."""
    root = tmp_path_factory.mktemp("cli")
    save_for_hf(timm.create_model("test_resnet", num_classes=7), str(root / "backbone"), safe_serialization=True)
    random = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 6)):
        for channel, name in enumerate(("red", "green", "blue")):
            folder = root / "images" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                array = random.integers(0, 80, (32, 32, 3), dtype=np.uint8)
                array[..., channel] += 150
                Image.fromarray(array).save(folder / f"{index}.png")
    return root


def test_help_is_quick_and_lists_the_commands():
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "autolora_hf", "--help"], capture_output=True)
    text = done.stdout.decode()
    assert done.returncode == 0
    assert all(command in text for command in ("quickstart", "train", "evaluate"))
    assert b"| torch\n" not in done.stderr  # importing torch takes seconds


@pytest.mark.parametrize("command", ["quickstart", "train", "evaluate"])
def test_command_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--eps" in text and "usage: autolora" in text


def test_unknown_command_is_wrong_usage(capsys):
    assert main(["quikstart"]) == 2
    assert "unknown command 'quikstart'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train-data", "no/such/folder"], "There is no folder"),
        (["--train-data", "images/train", "--eps", "8"], "Did you mean 8/255"),
        (["--train-data", "images/train", "--test-data", "images/train"], "shares images with the training data"),
        (["--train-data", "images/train", "--model", "resnet51"], "Did you mean"),
        (["--train-data", "images/train", "--target-modules", "nothing.*"], "'nothing.*'` matches no layer"),
        (["--train-data", "images/train", "--lora-dropout", "0.1"], "needs `layout='peft'`"),
    ],
)
def test_errors_come_before_any_training(workplace, monkeypatch, capsys, options, message):
    monkeypatch.chdir(workplace)
    options = [*options, "--output_dir", "failed", "--num_train_epochs", "1"]
    if "--model" not in options:
        options += ["--model", "backbone"]
    assert main(["train", *options]) == 1
    assert message in capsys.readouterr().err
    assert not list(workplace.glob("failed/checkpoint-*"))


@pytest.mark.parametrize("mode", ["full", "adapter"])
def test_train_then_evaluate(workplace, monkeypatch, capsys, mode):
    monkeypatch.chdir(workplace)
    options = "--model backbone --train-data images/train --eps 4/255 --num_train_epochs 2 --attack_steps 2"
    options += " --eval_attack_steps 2"
    assert main(["train", *options.split(), "--mode", mode, "--output_dir", mode, "--disable_tqdm", "true"]) == 0
    config = json.loads((workplace / mode / "autolora_config.json").read_text())
    assert config["label_names"] == ["blue", "green", "red"]
    assert config["threat_model"] == {"norm": "linf", "eps": pytest.approx(4 / 255)}
    card = ModelCard.load(workplace / mode / "README.md")
    assert "makes no claim about accuracy" in card.content
    assert card.data.library_name == ("timm" if mode == "full" else "peft")
    assert (workplace / mode / "training_curves.png").stat().st_size > 10_000

    capsys.readouterr()
    evaluate = [
        "evaluate",
        mode,
        "--data",
        "images/test",
        "--attack",
        "pgd",
        "--steps",
        "5",
        "--output",
        "report.json",
    ]
    assert main(evaluate) == 0
    assert "PGD-5" in capsys.readouterr().out
    report = json.loads((workplace / "report.json").read_text())
    assert report["natural"]["total"] == 18 and report["protocol"] == "custom"


def test_evaluate_refuses_other_classes(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    for name in ("red", "green", "yellow"):
        (workplace / "others" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(workplace / "others" / name / "0.png")
    assert main(["evaluate", "full", "--data", "others", "--attack", "pgd"]) == 1
    assert "other classes than the model was trained on" in capsys.readouterr().err
