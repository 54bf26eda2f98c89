"""Trainings that go wrong without an error, healthy ones, and backbones that are not robust to begin with."""

import json
import logging
import math

import numpy as np
import pytest
import torch
from test_trainer import logged, new_trainer, pictures
from tiny_models import MODELS, MODES, pixels

from autolora_hf import AutoLoraConfig, ThreatModel, get_autolora_model
from autolora_hf.backbones import load_backbone
from autolora_hf.quickstart import load_digits
from autolora_hf.training import diagnosis
from autolora_hf.training.diagnosis import Epoch, Validation, epochs_of, findings, prediction_shares
from autolora_hf.training.robust_start import MOVABLE, feature_displacement


VALIDATION = Validation(images=100, guess=0.1)


def history(robust, natural=0.8, share=0.15, only=0.0, train=0.5, lambda1=0.2, radius=None):
    """A training log; every argument is one value or one an epoch. `radius` is that of the attack after each epoch."""
    log = [{"lambda1": lambda1, "epoch": 0}]
    for epoch in range(len(robust)):
        now = [value[epoch] if isinstance(value, list) else value for value in (robust, natural, share, only, train)]
        keys = ["eval_robust_accuracy", "eval_natural_accuracy", "eval_largest_share", "eval_only_robust"]
        log.append({"loss": 1.0, "train_robust_accuracy": now[4], "epoch": epoch + 1})
        log.append({**dict(zip(keys, now[:4], strict=True)), "epoch": epoch + 1})
        grown = {} if radius is None else {"eps_share": radius[epoch]}
        log.append({**grown, "lambda1": lambda1, "next_learning_rate": 0.01, "epoch": epoch + 1})
    return log


def found(log, total=12, validation=VALIDATION, **options):
    return [(finding.kind, finding.epoch) for finding in findings(log, validation, total, **options)]


RISING = [0.05, 0.2, 0.35, 0.4, 0.42, 0.44]


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (history(RISING), []),
        # Noise, and one bad epoch.
        (history([0.3, 0.33, 0.05, 0.32, 0.31, 0.34], train=[0.3, 0.33, 0.1, 0.32, 0.31, 0.34]), []),
        (history([0.1] * 6), [("robust_accuracy_at_chance", 3)]),
        (history([0.1, 0.1, 0.2, 0.1, 0.1, 0.0], train=0.0), [("robust_accuracy_at_chance", 6)]),
        (history([0.1, 0.1, 0.2, 0.1, 0.1, 0.2]), []),
        # The curriculum still trains naturally.
        (history([0.0] * 6, lambda1=0.9), []),
        # The attack does not have its radius yet, then has it for three epochs.
        (history([0.0] * 6, radius=[0.0, 0.2, 0.5, 0.8, 1.0, 1.0]), []),
        (history([0.0] * 6, radius=[0.5, 1.0, 1.0, 1.0, 1.0, 1.0]), [("robust_accuracy_at_chance", 5)]),
        # It stopped and came back.
        (
            history([0.0] * 4 + [0.3] + [0.0] * 3, train=0.0),
            [("robust_accuracy_at_chance", 3), ("robust_accuracy_at_chance", 8)],
        ),
        (history(RISING, share=[0.3, 1.0, 1.0, 0.3, 1.0, 1.0]), []),
        (history(RISING, share=[0.3, 1.0, 0.96, 1.0, 1.0, 1.0]), [("one_class", 4)]),
        (history(RISING, share=0.9), []),
        # 20 more right under attack, none less; the same difference, of 60 and 40.
        (history([0.5] * 3, natural=0.3, only=0.2), [("attack_helps", 1)]),
        (history([0.6] * 3, natural=0.4, only=0.6), []),
        (history([0.52] * 3, natural=0.5, only=0.03), []),
        (history([0.2, 0.4, 0.45, 0.01, 0.0], train=[0.3, 0.5, 0.6, 0.7, 0.9]), [("catastrophic_overfitting", 4)]),
        # The training attack finds it too: no overfitting to the attack.
        (history([0.2, 0.4, 0.45, 0.01, 0.0], train=[0.3, 0.5, 0.6, 0.1, 0.0]), []),
        # Ordinary robust overfitting.
        (history([0.2, 0.4, 0.45, 0.4, 0.35], train=[0.3, 0.5, 0.6, 0.7, 0.9]), []),
    ],
)
def test_findings(log, expected):
    assert found(log) == expected


def test_too_few_images_to_say_so():
    few = Validation(images=6, guess=1 / 3)
    assert found(history(RISING, share=1.0), validation=few) == []
    assert found(history([0.5, 0.5, 0.0], train=0.9), validation=few) == []
    # Labels that are nearly all the same explain it.
    assert found(history(RISING, share=0.97), adversarial=False, validation=Validation(100, 0.95)) == []


def test_natural_training_is_not_expected_to_be_robust():
    assert found(history([0.0] * 6), adversarial=False) == []
    assert found(history([0.0] * 6, share=1.0), adversarial=False) == [("one_class", 3)]


def test_patience_grows_with_the_length_of_the_training():
    log = history([0.0] * 15, train=0.0)
    assert found(log, total=60) == [("robust_accuracy_at_chance", 10)]
    assert found(log, total=240) == []


def test_epochs_of_a_log():
    (first, _) = epochs_of(history([0.25, 0.3]))
    assert first == Epoch(1, 0.8, 0.25, 0.15, 0.0, 0.5, 0.2)
    # An evaluation that ended no epoch.
    assert epochs_of(history([0.25])[:-1]) == []


def test_what_is_measured_for_it():
    clean = np.array([[1.0, 0], [2, 1], [0, 1], [3, 0]])
    natural, robust = np.array([True, False, False, True]), np.array([True, True, False, False])
    assert prediction_shares(clean, natural, robust) == {"largest_share": 0.75, "only_robust": 0.25}
    assert Validation.of([0, 0, 0, 1], 10) == Validation(4, 0.75)
    assert Validation.of([0, 1, 2, 3], 2).guess == 0.5


def test_it_is_said_once_kept_and_not_repeated_by_a_resume(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(diagnosis, "one_class", lambda epochs, validation: len(epochs) >= 2)
    monkeypatch.setattr(diagnosis, "feature_displacement", lambda *args: 0.1)
    caplog.set_level(logging.WARNING)

    def said():
        return [record.message for record in caplog.records if "collapsed" in record.message]

    trainer = new_trainer(tmp_path, num_train_epochs=3)
    trainer.train()
    assert len(said()) == 1 and said()[0].startswith("Epoch 2:")
    (warning,) = [entry for entry in trainer.model.training_plan["warnings"] if entry["kind"] == "one_class"]
    assert warning["epoch"] == 2
    plan = json.loads((tmp_path / "training_plan.json").read_text())
    assert plan["warnings"] == trainer.plan["warnings"]
    again = new_trainer(tmp_path, num_train_epochs=3)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert len(said()) == 1
    assert again.plan["warnings"] == trainer.plan["warnings"]


# ---- the start ----


def digits(count=16):
    images = load_digits()["train"].shuffle(seed=0).select(range(count))["image"]
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in images]).float() / 255
    return pixels[:, None].expand(-1, 3, -1, -1).contiguous()


@pytest.mark.parametrize("mode", MODES)
def test_the_robust_backbone_is_told_from_a_random_one(mode):
    config, robust = AutoLoraConfig(mode=mode), get_autolora_model("quickstart", AutoLoraConfig(mode=mode))
    network = load_backbone("quickstart")
    for module in network.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    random = get_autolora_model(network, config, preprocessing=robust.preprocessing)
    threat_model = ThreatModel("linf", 0.1)
    assert feature_displacement(robust, digits(), threat_model) < 0.6 * MOVABLE
    assert feature_displacement(random, digits(), threat_model) > 2 * MOVABLE


@pytest.mark.parametrize("name", MODELS)
def test_the_measurement_leaves_no_trace(name):
    model = MODELS[name].adapted().train()
    before = {key: tensor.clone() for key, tensor in model.state_dict(keep_vars=True).items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    state = torch.get_rng_state()
    first = feature_displacement(model, pixels(6), ThreatModel())
    assert math.isfinite(first) and first == feature_displacement(model, pixels(6), ThreatModel())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert not any(head._forward_pre_hooks for head in model.heads)


@pytest.mark.parametrize(("moved", "warned"), [(3.0, True), (math.inf, True), (0.2, False), (math.nan, False)])
def test_the_start_is_measured_once_and_said(tmp_path, caplog, monkeypatch, moved, warned):
    monkeypatch.setattr(diagnosis, "feature_displacement", lambda *args: moved)
    caplog.set_level(logging.WARNING)
    trainer = new_trainer(tmp_path, num_train_epochs=1)
    trainer.train()
    kinds = [entry["kind"] for entry in trainer.plan.get("warnings", [])]
    assert kinds.count("natural_backbone") == ("does not look robustly" in caplog.text) == warned
    assert len(logged(trainer, "feature_displacement")) == (0 if math.isnan(moved) else 1)


def test_a_start_that_cannot_be_measured_stops_nothing(tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("no features")

    monkeypatch.setattr(diagnosis, "feature_displacement", fail)
    trainer = new_trainer(tmp_path, num_train_epochs=1, train=pictures())
    trainer.train()
    assert trainer.state.global_step == 3 and logged(trainer, "feature_displacement") == []
