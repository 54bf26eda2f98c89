"""Evaluations in two real processes: every verdict as in one process, errors end both, and a kill loses nothing."""

import json
import signal
import sys
from collections import Counter

import evaluation_worker as worker
import numpy as np
import pyautoattack
import pytest
import timm
import torch
from launcher import TESTS, run, torchrun
from PIL import Image

from autolora_hf import RobustnessReport, ThreatModel, get_autolora_model
from autolora_hf.cli import main


# One launch for all tests, also where the tests are shared out.
pytestmark = pytest.mark.xdist_group("test_evaluation")

WORKER = TESTS / "distributed" / "evaluation_worker.py"


@pytest.fixture(scope="module", autouse=True)
def shortened():
    original = pyautoattack.AutoAttack.__init__
    worker.shorten_autoattack()
    yield
    pyautoattack.AutoAttack.__init__ = original


def without_times(report):
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in report["attacks"]]
    return {**{key: value for key, value in report.items() if key != "seconds"}, "attacks": rows}


def one_process(case, **options):
    # Through JSON, as what the processes write down.
    return json.loads(json.dumps(worker.report_of(case, **options)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model and images by class, for the command."""
    root = tmp_path_factory.mktemp("evaluation")
    torch.manual_seed(0)
    threat_model = ThreatModel("linf", 2 / 255)
    names = ["blue", "green", "red"]
    network = timm.create_model("test_resnet", num_classes=3)
    get_autolora_model(network, label_names=names, threat_model=threat_model).save_pretrained(root / "model")
    random = np.random.default_rng(0)
    for name in names:
        (root / "images" / name).mkdir(parents=True)
        for index in range(3):
            Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(
                root / "images" / name / f"{index}.png"
            )
    return root


@pytest.fixture(scope="module")
def both(folder):
    """What each of two processes wrote down."""
    done = torchrun(WORKER, folder, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", worker.CASES)
def test_every_verdict_is_that_of_one_process(both, name):
    expected = one_process(worker.CASES[name])
    assert both[0][name] == both[1][name], "all processes return the same report"
    assert without_times(both[0][name]) == without_times(expected)
    if name != "pgd-one":
        assert 0 < expected["robust"]["correct"] < expected["natural"]["correct"]


def test_classes_and_attacks_of_the_cases(both):
    """The comparison covers every class, and batches that get fewer from attack to attack."""
    _, labels = worker.images(worker.network(), 23)
    assert set(labels.tolist()) == {0, 1, 2, 3}
    assert sum(row["broken"] > 0 for row in both[0]["autoattack"]["attacks"]) >= 3


@pytest.mark.parametrize(
    ("what", "error", "message", "culprit"),
    [
        ("attack raises", "ValueError", "the attack broke down", 1),
        ("own kind of error", "RuntimeError", "the attack broke down", 1),
        ("left the ball", "ValueError", "Nudge left the ball: the linf distance", 1),
        ("broken image", "OSError", "image 6 is truncated", 1),
        ("other weights", "ValueError", "evaluate different things. They differ in weights.", None),
        ("other seed", "ValueError", "They differ in seed (0 in process 0, 1 in process 1)", None),
        ("other number of images", "ValueError", "sample_indices (12 in process 0, 13 in process 1, 12 in", None),
        ("wrong argument", "ValueError", "`attack` must be 'autoattack', 'pgd'", 1),
        ("one without checkpoint", "ValueError", "checkpoint_dir is given (False in process 0, True in pro", None),
        ("checkpoint is a file", "ValueError", "`checkpoint_dir` must be a folder", 1),
    ],
)
def test_an_error_in_one_process_ends_both(both, what, error, message, culprit):
    first, second = (found["failures"][what] for found in both)
    assert message in first[1] and message in second[1]
    assert first[0] == error
    if culprit == 1:
        assert first[1].startswith("Process 1 of 2 failed with ") and not second[1].startswith("Process")
    else:
        assert first == second
    assert both[0]["again"] == both[1]["again"]


def test_only_the_main_process_shows_progress(both):
    assert "PGD-4" in both[0]["shown"] and both[1]["shown"] == ""


def test_one_process_goes_on_where_two_stopped(both, folder, caplog):
    """Two processes finished two attacks and failed in the third; one process measures only that."""
    assert "the attack broke down" in both[0]["interrupted"]
    attack = [*worker.WEAK, worker.Nudge(error=ValueError)]
    case = worker.Case(worker.network, 23, attack, {"batch_size": 4})
    before = {path.name: path.read_bytes() for path in (folder / "resumed").iterdir()}
    assert Counter(name[:8] for name in before) == {
        "stage-00": 6,
        "stage-01": 6,
        "stage-02": 5,
        "evaluati": 1,
        "answers.": 1,
    }
    with caplog.at_level("INFO", "autolora_hf"), pytest.raises(ValueError, match="the attack broke down"):
        worker.evaluate(case, checkpoint_dir=folder / "resumed")
    assert "PGD-4: 5 of 5 batches are known" in caplog.text
    assert {path.name: path.read_bytes() for path in (folder / "resumed").iterdir()} == before


def test_command_in_two_processes(both, folder, monkeypatch, capsys):
    """It prints and writes once, and one process finds in the checkpoint all that two have measured."""
    monkeypatch.chdir(folder)
    assert both[0]["status"] == both[1]["status"] == 0
    assert both[0]["printed"].count("threat model") == 1 and both[1]["printed"] == ""
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "kept").iterdir()}
    command = "evaluate model --data images --attack pgd --steps 2 --batch-size 4 --output again.json"
    assert main([*command.split(), "--checkpoint-dir", "kept"]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "kept").iterdir()} == before
    reports = [RobustnessReport.load(folder / name).to_dict() for name in ("report.json", "again.json")]
    assert without_times(reports[0]) == without_times(reports[1])
    # Another seed is another evaluation.
    assert main([*command.split(), "--checkpoint-dir", "kept", "--seed", "1"]) == 1
    assert "They differ in" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_in_the_middle_of_an_attack(tmp_path):
    """SIGKILL of one of two processes, then of a single one that went on alone; a third run ends as if nothing was."""
    expected = one_process(worker.LONG)
    checkpoint = tmp_path / "checkpoint"

    done = torchrun(WORKER, tmp_path, 1, 120, timeout=400)
    assert done.returncode != 0 and "Signal 9" in done.stdout
    first = {path: path.read_bytes() for path in checkpoint.glob("stage-*.json")}
    assert any("stage-02" in path.name for path in first)

    done = run([sys.executable, str(WORKER), str(tmp_path), "0", "100"], timeout=400)
    assert done.returncode == -signal.SIGKILL
    second = {path: path.read_bytes() for path in checkpoint.glob("stage-*.json")}
    assert first.items() < second.items(), "what was measured is not measured again"

    report = one_process(worker.LONG, checkpoint_dir=checkpoint)
    third = {path: path.read_bytes() for path in checkpoint.glob("stage-*.json")}
    assert second.items() < third.items()
    assert without_times(report) == without_times(expected)
