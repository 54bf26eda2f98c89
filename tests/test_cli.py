"""The `autolora` command, as a user calls it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from timm.models import save_for_hf
from tiny_models import save_colours

from autolora_hf import AutoLoraConfig, Preprocessing, ThreatModel, get_autolora_model, load_autolora_model
from autolora_hf.cli import COMMANDS, main
from autolora_hf.hub.model_card import public_command
from autolora_hf.hub.push import _published


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A backbone in timm's folder format, and training and test images of three colours by class."""
    root = tmp_path_factory.mktemp("cli")
    save_for_hf(timm.create_model("test_resnet", num_classes=7), str(root / "backbone"), safe_serialization=True)
    save_colours(root / "images", train=20, test=6)
    return root


def test_help_is_quick_and_lists_the_commands():
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "autolora_hf", "--help"], capture_output=True)
    text = done.stdout.decode()
    assert done.returncode == 0
    assert all(command in text for command in COMMANDS)
    assert b"| torch\n" not in done.stderr  # importing torch takes seconds


@pytest.mark.parametrize("command", COMMANDS)
def test_command_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: autolora {command}" in text
    option = {"push": "--private", "verify": "--samples", "release": "--keep", "export": "--format"}
    option |= {"convert": "--norm-set", "demo": "--space"}
    assert option.get(command, "--eps") in text


def test_unknown_command_is_wrong_usage(capsys):
    assert main(["quikstart"]) == 2
    assert "unknown command 'quikstart'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "wrong", "meant"),
    [
        ("train --model resnet18 --train-data birds", "--epochs 3", "--num-train-epochs"),
        ("train --model resnet18 --train-data birds", "--batch_size=8", "--per-device-train-batch-size"),
        ("train --model resnet18 --train-data birds", "--objectif slf", "--objective"),
        ("evaluate birds --data birds", "--test-samples 5", "--samples"),
    ],
)
def test_an_unknown_option_names_the_one_that_was_meant(capsys, command, wrong, meant):
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), *wrong.split()])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert f"unrecognized arguments: {wrong}. Did you mean " in said
    assert meant in said.partition("Did you mean ")[2]


def test_options_unlike_any_get_no_proposal(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "birds", "--data", "birds", "--xyzzy"])
    assert "Did you mean" not in capsys.readouterr().err


def test_messages_of_the_hub_appear_once(capfd):
    code = (
        "import logging; from autolora_hf.cli.display import show_progress; show_progress(); "
        "logging.getLogger('huggingface_hub.utils._http').warning('Retrying in 1s')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert capfd.readouterr().err.count("Retrying in 1s") == 1


def test_a_deprecation_between_the_libraries_is_not_shown(capfd):
    code = (
        "from autolora_hf.cli.display import show_progress; show_progress()\n"
        "from tiny_towers import tower\n"
        "from autolora_hf import get_autolora_model; get_autolora_model(tower())"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
    assert "is_gradient_checkpointing" not in capfd.readouterr().err


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
    options += " --disable_tqdm true --hub_token hf_private"
    assert main(["train", *options.split(), "--mode", mode, "--output_dir", mode]) == 0
    assert not [
        path for path in (workplace / mode).rglob("*") if path.is_file() and b"hf_private" in path.read_bytes()
    ]
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
    assert main([*evaluate, "--first-pass", "--no-diagnostics"]) == 0
    report = json.loads((workplace / "report.json").read_text())
    assert [row["name"] for row in report["attacks"]] == ["PGD-10 in bfloat16", "PGD-5"]


def test_a_command_that_is_given_again_goes_on_to_the_same_bits(workplace, monkeypatch, capsys):
    """From a checkpoint, from none, and from the start: new heads and branches come from the seed, too."""
    monkeypatch.chdir(workplace)
    options = "train --model backbone --train-data images/train --eps 4/255 --num_train_epochs 2 --attack_steps 1"
    options = [*options.split(), "--eval_attack_steps", "1", "--disable_tqdm", "true", "--use_cpu", "true"]

    def weights(folder, *more):
        torch.manual_seed(len(str(folder)))  # whatever the process did before
        assert main([*options, "--output_dir", folder, *more]) == 0, capsys.readouterr().err
        return (workplace / folder / "model.safetensors").read_bytes()

    whole = weights("whole")
    first, last = sorted((workplace / "whole").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.copytree(first, workplace / "killed" / first.name)
    assert weights("killed", "--resume-from-checkpoint", "True") == whole
    assert (workplace / "killed" / last.name).is_dir()
    assert weights("killed early", "--resume-from-checkpoint", "true") == whole
    assert weights("killed", "--resume-from-checkpoint", str(workplace / "whole" / first.name)) == whole


def test_evaluate_refuses_other_classes(workplace, full, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    for name in ("red", "green", "yellow"):
        (workplace / "others" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(workplace / "others" / name / "0.png")
    assert main(["evaluate", "full-model", "--data", "others", "--attack", "pgd"]) == 1
    assert "other classes than the model was trained on" in capsys.readouterr().err


# ---- releases ----


@pytest.fixture(scope="module")
def full(workplace):
    """A model of mode `full`, trained a little by hand: its weights are the backbone's and a change of low rank."""
    preprocessing = Preprocessing((32, 32), crop_pct=1.0)
    model = get_autolora_model(
        str(workplace / "backbone"),
        AutoLoraConfig(mode="full"),
        num_classes=3,
        preprocessing=preprocessing,
        label_names=["blue", "green", "red"],
        threat_model=ThreatModel("linf", 2 / 255),
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.lora_layers().values():
            weight = layer.get_base_layer().weight
            rows = torch.randn(len(weight), 1, generator=generator) @ torch.randn(
                1, weight[0].numel(), generator=generator
            )
            weight += 0.05 * rows.view_as(weight) / weight[0].numel() ** 0.5
    model.save_pretrained(workplace / "full-model")
    return workplace / "full-model"


def test_release_of_an_extracted_adapter(workplace, full, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    options = (
        "--adapter-size 0.4 --data images/test --samples 6 --train-data images/train --license mit --name org/small"
    )
    assert (
        main(["release", "full-model", "small", *options.split(), "--dataset-name", "colours", "--token", "secret"])
        == 0
    )
    printed = capsys.readouterr().out
    assert "of the squared weight change" in printed and "autolora push small org/small" in printed
    adapter = load_autolora_model("small", base_model="backbone")
    assert adapter.autolora_config.mode == "adapter"
    assert adapter.training_plan["extraction"]["size"] <= 0.4
    (result,) = adapter.results
    assert result["protocol"].startswith("autoattack") and len(result["sample_indices"]) == 6
    card = ModelCard.load("small/README.md")
    assert card.data.license == "mit" and "colours" in card.text and "secret" not in card.content
    assert (workplace / "small" / "adversarial_examples.png").stat().st_size > 5000
    assert not list((workplace / "small").rglob("checkpoint-*"))

    # The figures can be verified, and a tampered card cannot.
    verify = ["verify", "small", "--data", "images/test", "--base-model", "backbone"]
    assert main(verify) == 0
    assert "Every figure holds" in capsys.readouterr().out
    value = f"value: {card.data.eval_results[0].metric_value}"
    text = (workplace / "small" / "README.md").read_text()
    assert value in text
    (workplace / "small" / "README.md").write_text(text.replace(value, "value: 0.99", 1))
    assert main(verify) == 1
    assert "NOT VERIFIED" in capsys.readouterr().out


def test_release_trains_an_adapter_on(workplace, full, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    options = "--adapter-size 0.4 --train-data images/train --repair-epochs 1"
    assert main(["release", "full-model", "repaired", *options.split()]) == 0
    plan = load_autolora_model("repaired", base_model="backbone").training_plan
    assert plan["repair_epochs"] == 1 and plan["extraction"]["size"] <= 0.4
    files = {path.name for path in (workplace / "repaired").iterdir()}
    assert files == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "autolora_config.json",
        "natural",
    }


def test_release_as_it_is(workplace, full, monkeypatch):
    monkeypatch.chdir(workplace)
    assert main(["release", "full-model", "as-it-is"]) == 0
    assert "makes no claim" in (workplace / "as-it-is" / "README.md").read_text()
    assert load_autolora_model("as-it-is").autolora_config.mode == "full"


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--keep", "0.9"], 2, "need --train-data"),
        (["--repair-epochs", "1"], 2, "give --adapter-size or --keep too"),
        (["--adapter-size", "0.1", "--keep", "0.9"], 2, "not allowed with argument"),
        (["--adapter-size", "7"], 1, "between 0 and 1"),
        (["--data", "images"], 1, "are splits and not classes"),
        (["--data", "images/train", "--train-data", "images/train"], 1, "shares images with the training data"),
    ],
)
def test_release_refuses(workplace, full, monkeypatch, capsys, options, status, message):
    monkeypatch.chdir(workplace)
    try:
        found = main(["release", "full-model", "refused", *options])
    except SystemExit as stop:
        found = stop.code
    assert found == status and message in capsys.readouterr().err
    assert not (workplace / "refused").exists()


def test_push_refuses_before_it_asks_the_hub(workplace, full, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    for folder, message in (("nowhere", "There is no folder 'nowhere'"), ("images", "was not saved by autolora_hf")):
        assert main(["push", folder, "org/name"]) == 1
        assert message in capsys.readouterr().err


def test_what_a_push_sends(workplace, full):
    """The release and what lies beside it, nothing from inside other folders, and nothing of this machine."""
    folder = workplace / "to-push"
    shutil.copytree(full, folder)
    stray = [
        "repair/checkpoint-2/optimizer.pt",
        "repair/autolora_config.json",
        "repair/a.png",
        "last-checkpoint/x.json",
    ]
    for name in (*stray, "training_args.json", "trainer_state.json", ".hidden.json", "weights.bin", "notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    for name in ("README.md", "curve.png", "model.onnx", "report.json"):
        (folder / name).write_text("{}")
    kept = {path.relative_to(full).as_posix() for path in full.rglob("*") if path.is_file()}
    assert set(_published(folder)) == kept | {"README.md", "curve.png", "model.onnx", "report.json"}
    (folder / "secret.json").symlink_to(workplace / "backbone" / "config.json")
    with pytest.raises(ValueError, match="link out of its folder"):
        _published(folder)


def test_commands_on_cards_have_no_paths_of_this_machine():
    command = "autolora release /home/me/model out --data '/data/my birds/test' --eps 8/255"
    assert public_command(command) == "autolora release model out --data test --eps 8/255"
    assert public_command("autolora release a b --base-model=/home/me/net") == "autolora release a b --base-model=net"


@pytest.mark.parametrize(
    "secret", ["--token hf_x", "--token=hf_x", "--tok hf_x", "--hub-token hf_x", "--hub_token hf_x", "--hub_tok=hf_x"]
)
def test_commands_on_cards_have_no_tokens(secret):
    assert public_command(f"autolora train --seed 1 {secret} --hub-model-id org/a --torch-compile True") == (
        "autolora train --seed 1 --hub-model-id org/a --torch-compile True"
    )
    assert public_command(f"autolora train {secret}") == "autolora train"
