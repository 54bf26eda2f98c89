"""`--json` of every command, and the exit statuses."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import timm
from huggingface_hub import CommitInfo
from safetensors.torch import save_file
from test_conversion import DUAL, RESNET18, resnet_file
from timm.models import save_for_hf
from tiny_models import MODELS, change_everything, save_colours

from autolora_hf import ThreatModel
from autolora_hf.cli import COMMANDS, main
from autolora_hf.cli import push as push_command
from autolora_hf.cli.result import CommandResult, standard_output_aside


PAGE = Path(__file__).parents[1] / "docs" / "guides" / "command-line.md"
ACCURACY = {"value", "correct", "total", "low", "high"}
NAMES = ["blue", "green", "red"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A backbone, a saved model of mode `full`, and images of three colours by class."""
    root = tmp_path_factory.mktemp("json")
    save_for_hf(timm.create_model("test_resnet", num_classes=7), str(root / "backbone"), safe_serialization=True)
    save_colours(root / "images", train=12, test=4)
    model = MODELS["timm_resnet"].adapted(num_classes=3, mode="full")
    change_everything(model)
    model.threat_model, model.label_names = ThreatModel("linf", 2 / 255), list(NAMES)
    model.save_pretrained(root / "model")
    return root


@pytest.fixture(autouse=True)
def inside(workplace, monkeypatch):
    monkeypatch.chdir(workplace)


def documented(command):
    """The keys that the page lists for a command."""
    section = re.search(rf"^### {command}$(.*?)(?=^###? |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)[1]
    return set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))


def answer(capsys, *argv, status=0):
    """The one document on standard output, checked to have the keys that the page lists."""
    capsys.readouterr()
    assert main([*argv, "--json"]) == status, capsys.readouterr().err
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["command"] == argv[0] and document["status"] == status
    if "error" in document:
        assert document.keys() == {"command", "status", "error"}
        assert document["error"] in captured.err
    else:
        assert document.keys() == documented(argv[0]) | {"command", "status"}
    return document


def test_the_page_has_a_section_for_every_command():
    assert all(documented(command) for command in COMMANDS)


def report_keys():
    return documented("evaluate") - {"model", "files"}


# ---- every command ----


def test_evaluate(workplace, capsys):
    options = ["evaluate", "model", "--data", "images/test", "--attack", "pgd", "--steps", "2"]
    found = answer(capsys, *options, "--curve", "1/255", "--output", "r.json", "--html", "r.html", "--examples", "0")
    report = json.loads((workplace / "r.json").read_text())
    for name, key in (("natural_accuracy", "natural"), ("robust_accuracy", "robust")):
        assert found[name] == {**report[key], "value": report[key]["correct"] / 12}
        assert found[name].keys() == ACCURACY
    assert found["attack"] == "PGD-2" and found["protocol"] == "custom" and found["images"] == 12
    assert found["publishable"] is False and "only AutoAttack" in found["not_publishable_because"]
    assert found["threat_model"] == {"norm": "linf", "eps": pytest.approx(2 / 255)}
    assert found["worst_class"]["name"] in NAMES and found["worst_class"]["robust_accuracy"].keys() == ACCURACY
    assert 0 <= found["calibration_error"]["natural"] <= 1 and found["corruptions"] is None
    assert [row["eps"] for row in found["curve"]] == [0.0, pytest.approx(1 / 255)]
    values = [row["robust_accuracy"]["value"] for row in found["curve"]]
    assert found["expected_robustness"] == pytest.approx(sum(values) / 2)
    assert found["files"] == {"report": "r.json", "html": "r.html", "checkpoints": None}

    again = answer(capsys, *options, "--no-diagnostics", "--norm", "l2", "--eps", "0.5")
    assert again["curve"] is again["expected_robustness"] is again["other_route"] is None
    assert again["threat_model"] == {"norm": "l2", "eps": 0.5}

    both = answer(capsys, *options, "--no-diagnostics", "--route", "both", "--output", "r.json")
    other = json.loads((workplace / "r.json").read_text())["other_route"]
    assert both["route"] == "robust" and both["other_route"]["route"] == other["route"] == "natural"
    for name, key in (("natural_accuracy", "natural"), ("robust_accuracy", "robust")):
        assert both["other_route"][name] == {**other[key], "value": other[key]["correct"] / 12}


TRAIN = "train --model backbone --train-data images/train --eps 1/255 --num_train_epochs 2 --attack_steps 1"
TRAIN += " --eval_attack_steps 1 --use_cpu True --output-dir"


def test_train(workplace, capsys):
    found = answer(capsys, *TRAIN.split(), "trained")
    plan = json.loads((workplace / "trained" / "training_plan.json").read_text())
    assert found["training_plan"] == plan and plan["epochs"] == 2
    assert found["steps"] == 2 and found["skipped_steps"] == 0
    log = json.loads((workplace / "trained" / "checkpoint-2" / "trainer_state.json").read_text())
    kept = [entry for entry in log["log_history"] if "eval_loss" in entry and entry["step"] == log["best_global_step"]]
    assert found["validation"]["robust_accuracy"] == kept[0]["eval_robust_accuracy"]
    assert found["validation"]["step"] == log["best_global_step"]
    assert found["test"] is found["published"] is None
    assert all((workplace / path).exists() for path in found["files"].values())
    # The command on the card is what a person would type.
    assert "--json" not in (workplace / "trained" / "README.md").read_text()


@pytest.mark.slow
def test_a_publishable_figure(workplace, capsys):
    found = answer(capsys, *TRAIN.split(), "tested", "--test-data", "images/test", "--test-samples", "3")["test"]
    assert found.keys() == report_keys() and found["images"] == 3
    assert found["publishable"] is True and found["not_publishable_because"] is None


def test_release_without_figures(workplace, capsys):
    found = answer(capsys, "release", "model", "bare")
    assert found["mode"] == "full" and found["adapter"] is found["test"] is found["files"]["examples"] is None
    assert "nothing to verify" in answer(capsys, "verify", "bare", status=3)["error"]


@pytest.mark.slow
def test_release_and_verify(workplace, capsys):
    options = ["release", "model", "small", "--adapter-size", "0.4", "--base-model", "backbone"]
    found = answer(capsys, *options, "--data", "images/test", "--samples", "3")
    assert found["mode"] == "adapter" and 0 < found["adapter"]["size"] <= 0.4
    assert found["adapter"]["size"] == found["adapter"]["values"] / found["adapter"]["full_values"]
    assert found["test"].keys() == report_keys() and found["test"]["protocol"].startswith("autoattack")
    assert all((workplace / path).exists() for path in found["files"].values())

    verify = ["verify", "small", "--data", "images/test", "--base-model", "backbone"]
    found = answer(capsys, *verify, "--output", "v.json")
    assert found["holds"] is True and [figure["verdict"] for figure in found["figures"]] == ["holds"] * 2
    assert found["figures"][0]["claimed"].keys() == ACCURACY - {"value"}
    assert json.loads((workplace / "v.json").read_text())["checks"] == found["checks"]

    # Without images nothing is known; with a card that says otherwise than the record, it does not hold.
    assert "Options: `--data`" in answer(capsys, *verify[:2], *verify[4:], status=3)["error"]
    card = workplace / "small" / "README.md"
    text = card.read_text()
    changed = re.sub(r"(value: )[\d.]+", r"\g<1>0.987", text, count=1)
    assert changed != text
    card.write_text(changed)
    assert answer(capsys, *verify, status=1)["holds"] is False


def test_push(workplace, capsys, monkeypatch):
    def push_folder(folder, repository, **options):
        address = f"https://huggingface.co/{repository}/commit/abc"
        return CommitInfo(address, "message", "", "abc", pr_url=None)

    monkeypatch.setattr(push_command, "push_folder", push_folder)
    found = answer(capsys, "push", "model", "org/birds", "--license", "mit")
    assert found["repository"] == "org/birds" and found["commit"] == "abc" and found["pull_request"] is None
    assert found["url"].endswith("/commit/abc") and found["files"] == {"folder": "model"}


def test_demo(workplace, capsys, monkeypatch):
    pytest.importorskip("gradio", reason='needs Gradio: pip install "autolora-hf[demo]"')
    found = answer(capsys, "demo", "model", "--space", "space")
    assert found["model"] == "model" and found["files"] == {"space": "space"}
    assert (workplace / "space" / "app.py").is_file()
    assert "name a new folder" in answer(capsys, "demo", "model", "--space", "space", status=1)["error"]
    # Without a folder the document comes when the page is no longer served.
    served = []
    # The module, which a function of the same name hides.
    module = import_module("autolora_hf.demo.launch")
    monkeypatch.setattr(module, "launch", lambda demo, **options: served.append((demo.title, options)))
    assert answer(capsys, "demo", "model", "--port", "7999")["files"] == {"space": None}
    assert served == [("model", {"host": "127.0.0.1", "port": 7999, "share": False})]


def test_convert(workplace, capsys):
    save_file(resnet_file(**RESNET18, sets=2, down=DUAL), workplace / "robust.safetensors")
    options = ["--num-classes", "7", "--kind", "acl", "--normalization", "imagenet"]
    found = answer(capsys, "convert", "robust.safetensors", "converted", *options)
    report = json.loads((workplace / "converted" / "conversion.json").read_text())
    assert found["architecture"] == "resnet18_cifar" and found["norm_set"] == "adversarial"
    assert found["num_classes"] == 7 and found["dropped"] == report["dropped"] and found["tensors_used"] > 60
    assert found["files"] == {"checkpoint": "converted", "report": "converted/conversion.json"}
    assert "is not empty" in answer(capsys, "convert", "robust.safetensors", "images", *options, status=1)["error"]


def test_export(workplace, capsys):
    pytest.importorskip("onnxruntime", reason='needs ONNX: pip install "autolora-hf[onnx]"')
    found = answer(capsys, "export", "model", "model.onnx")
    assert found["bytes"] == (workplace / "model.onnx").stat().st_size
    assert found["max_difference"] < 1e-4 and found["files"] == {"onnx": "model.onnx", "checkpoint": None}
    found = answer(capsys, "export", "model", "plain", "--format", "checkpoint")
    assert found["opset"] is None and found["files"] == {"onnx": None, "checkpoint": "plain"}
    assert (workplace / "plain" / "model.safetensors").is_file()


@pytest.mark.slow
def test_quickstart(workplace, capsys):
    options = "--epochs 1 --train-images 100 --test-images 10 --attack-steps 1 --output-dir digits"
    found = answer(capsys, "quickstart", *options.split())
    assert found["reports"][0].keys() == report_keys() | {"model"}
    assert found["reports"][0]["publishable"] is True and found["reports"][2]["publishable"] is False
    assert all((workplace / path).exists() for path in found["files"].values())


# ---- what goes wrong ----


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["evaluate", "nowhere", "--data", "images/test"], 1, "nowhere"),
        (["train", "--model", "backbone", "--train-data", "no/such/folder", "--output-dir", "x"], 1, "no folder"),
        (["evaluate", "model"], 2, "--data"),
        (["train", "--model", "backbone", "--train-data", "images/train", "--lerning-rate", "1"], 2, "--lerning-rate"),
        (["verify", "model", "--split", "test"], 2, "--split is about --data"),
        (["verify", "model", "--samples", "few"], 2, "invalid int value"),
        (["quikstart"], 2, "unknown command 'quikstart'"),
    ],
)
def test_errors(capsys, argv, status, message):
    assert message in answer(capsys, *argv, status=status)["error"]
    # The same without it.
    try:
        found = main(argv)
    except SystemExit as stop:
        found = stop.code
    captured = capsys.readouterr()
    assert found == status and captured.out == "" and message in captured.err


def test_an_error_that_nobody_expected(monkeypatch, capsys):
    def run(argv):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(push_command, "run", run)
    assert main(["push", "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["error"] == "RuntimeError: out of memory"
    assert "Traceback" in captured.err
    with pytest.raises(RuntimeError):
        main(["push"])


def test_help_is_no_document(capsys):
    for command in ("push", "train"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--json", "--help"])
        assert stop.value.code == 0 and "--json" in capsys.readouterr().out


def test_the_beginning_of_the_option_is_enough(monkeypatch, capsys):
    monkeypatch.setattr(push_command, "run", lambda argv: CommandResult({"argv": argv}))
    assert main(["push", "--js", "x", "--"]) == 0
    assert json.loads(capsys.readouterr().out)["argv"] == ["x", "--"]


def test_one_process_of_several_prints(monkeypatch, capsys):
    monkeypatch.setattr(push_command, "run", lambda argv: CommandResult())
    monkeypatch.setenv("RANK", "1")
    assert main(["push", "--json"]) == 0
    assert capsys.readouterr().out == ""


def test_numbers_that_json_does_not_have():
    values = {"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": (float("-inf"), None)}}
    document = json.loads(CommandResult(values).document("x"))
    assert document == {"command": "x", "status": 0, "a": None, "b": [1.5, None], "c": {"d": [None, None]}}


def test_nothing_else_reaches_standard_output(capfd):
    """Neither from Python nor from outside of it."""
    with standard_output_aside():
        print("python")
        os.write(1, b"descriptor\n")
        subprocess.run([sys.executable, "-c", "print('child')"], check=True)
    print("result")
    out, err = capfd.readouterr()
    assert out == "result\n"
    assert err.split() == ["python", "descriptor", "child"]


# ---- Ctrl-C ----


@pytest.mark.parametrize(
    ("command", "advice"),
    [
        ("train", "--resume-from-checkpoint True"),
        ("evaluate", "--checkpoint-dir FOLDER"),
        ("push", "what has arrived is not sent again"),
        ("export", "begin anew"),
    ],
)
def test_interrupt(monkeypatch, capsys, command, advice):
    def run(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"autolora_hf.cli.{command}.run", run)
    assert main([command]) == 130
    captured = capsys.readouterr()
    assert captured.out == "" and f"autolora {command}: interrupted." in captured.err and advice in captured.err
    assert "Traceback" not in captured.err
    assert advice in answer(capsys, command, status=130)["error"]


@pytest.mark.slow
def test_interrupting_a_training(workplace):
    """Ctrl-C in the midst of it, and then what the message says."""
    options = "train --model backbone --train-data images/train --eps 1/255 --attack_steps 20 --use_cpu True"
    options += " --per_device_train_batch_size 4 --output-dir interrupted --num_train_epochs"
    command = [sys.executable, "-m", "autolora_hf", *options.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*command, "1000", "--json"], env=environment, cwd=workplace, **pipes)
    folder, deadline = workplace / "interrupted", time.monotonic() + 300
    while not list(folder.glob("checkpoint-*/checkpoint.json")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.1)
    for _ in range(6):
        # An interrupt that meets Python in a finaliser is ignored, and the user presses again.
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            out, err = process.communicate(timeout=30)
            break
    assert process.returncode == 130 and "Traceback" not in err
    assert "--resume-from-checkpoint True" in json.loads(out)["error"]
    done = max(int(path.name.split("-")[1]) // 9 for path in folder.glob("checkpoint-*"))
    more = [*command, str(done + 1), "--resume-from-checkpoint", "True", "--json"]
    finished = subprocess.run(more, env=environment, cwd=workplace, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["steps"] == 9 * (done + 1)
