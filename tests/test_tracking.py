"""What a training logs: stable names, that trackers show them, and the page that lists them."""

import importlib.util
from pathlib import Path

import pytest
import test_fare
import torch
from script_modules import load
from test_trainer import NAMES, arguments, logged, new_trainer, pictures
from tiny_models import MODELS

from autolora_hf import PGD, AutoLoraTrainer, config_for, get_autolora_model
from autolora_hf.objectives import OBJECTIVES
from autolora_hf.training.logged import END, LOGGED
from autolora_hf.training.throughput import Throughput


# What a user watches, as trackers call it.
WATCHED = {
    "eval/natural_accuracy",
    "eval/robust_accuracy",
    "train/lambda1",
    "train/lambda2",
    "train/learning_rate",
    "train/reload",
    "train/robust_loss",
    "train/attack_loss_start",
    "train/attack_loss_end",
    "train/images_per_second",
    "train/eps",
    "train/skipped_steps",
}


def needs(package):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f'needs {package}: pip install "autolora-hf[tracking]"')


def shown(history):
    """Every logged value by what trackers call it, in order."""
    names = {entry.name: entry.shown_as for entry in LOGGED}
    found = {}
    for entry in history:
        for key, value in entry.items():
            if key != "step":
                found.setdefault(names[key], []).append(value)
    return found


# ---- trackers ----


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_tracker_that_is_not_installed_is_a_missing_package(tmp_path):
    """So the command line says it in one message; transformers raises a `RuntimeError`."""
    model = MODELS["timm_resnet"].adapted()
    with pytest.raises(ModuleNotFoundError, match=r"`--report-to`\) names a tracker .* `pip install wandb`"):
        AutoLoraTrainer(model, arguments(tmp_path, report_to=["wandb"]), train_dataset=pictures())


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A run that both trackers have followed, offline, and their folders."""
    pytest.importorskip("trackio", reason='needs trackio: pip install "autolora-hf[tracking]"')
    pytest.importorskip("tensorboard", reason='needs tensorboard: pip install "autolora-hf[tracking]"')
    folder = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        from trackio import sqlite_storage

        patch.setattr(sqlite_storage, "TRACKIO_DIR", folder / "trackio")
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "tensorboard"))
        options = {"report_to": ["trackio", "tensorboard"], "project": "birds", "run_name": "first"}
        trainer = new_trainer(folder / "run", "timm_resnet", **options)
        trainer.train()
        logs = sqlite_storage.SQLiteStorage.get_logs("birds", "first")
        config = sqlite_storage.SQLiteStorage.get_run_config("birds", "first")
    return trainer, folder, logs, config


@needs("tensorboard")
@needs("trackio")
def test_tensorboard(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer, folder, _, _ = tracked
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    found = {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert found.keys() >= WATCHED
    expected = shown(trainer.state.log_history)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-6), name
    assert [event.step for event in events.Scalars("eval/robust_accuracy")] == [3, 6]


@needs("tensorboard")
@needs("trackio")
def test_trackio(tracked):
    trainer, _, logs, config = tracked
    expected = shown(trainer.state.log_history)
    # Those that `Trainer` adds once after training are left out.
    late = {entry.shown_as for entry in LOGGED if entry.when == END}
    for name in expected.keys() - late:
        assert [entry[name] for entry in logs if name in entry] == pytest.approx(expected[name]), name
    assert expected.keys() >= WATCHED and not WATCHED & late
    steps = [entry["train/global_step"] for entry in logs if "eval/robust_accuracy" in entry]
    assert steps == [3, 6]
    assert config["objective"] == "autolora" and config["num_train_epochs"] == 2


# ---- names ----


def run_of(objective, folder, **changes):
    tiny = MODELS["timm_resnet"]
    if not OBJECTIVES[objective].classifies:
        trainer = test_fare.new_trainer(folder, objective, num_train_epochs=1, **changes)
    else:
        network = tiny.fresh(len(NAMES))
        model = get_autolora_model(network, config_for(objective, network), preprocessing=tiny.preprocessing)
        args = arguments(folder, objective=objective, num_train_epochs=1, **changes)
        trainer = AutoLoraTrainer(model, args, train_dataset=pictures())
    trainer.train()
    return trainer


@pytest.mark.slow
def test_every_name_is_explained_and_every_explained_name_exists(tmp_path):
    """Over all objectives: what is logged is in `LOGGED`, and nothing is there that no run logs."""
    seen = set()
    for objective in OBJECTIVES:
        trainer = run_of(objective, tmp_path / objective)
        keys = {key for entry in trainer.state.log_history for key in entry} - {"step"}
        known = {entry.name for entry in LOGGED}
        assert keys <= known, f"{objective} logs {sorted(keys - known)}, which training/logged.py does not explain"
        attacks = OBJECTIVES[objective].needs_adversarial
        assert ({"eps", "attack_loss_start", "attack_loss_end"} <= keys) is attacks, objective
        assert {"images_per_second", "skipped_steps", "learning_rate", "loss"} <= keys, objective
        seen |= keys
    options = {"eps_schedule": "two-hinge", "gradient_similarity": True}
    seen |= {key for entry in run_of("autolora", tmp_path / "more", **options).state.log_history for key in entry}
    assert {entry.name for entry in LOGGED} <= seen


def test_names_are_unique_in_trackers_too():
    assert len({entry.name for entry in LOGGED}) == len({entry.shown_as for entry in LOGGED}) == len(LOGGED)


def test_the_page_lists_them():
    page = load("tracking_page")
    text = Path(page.PAGE).read_text()
    assert text == page.with_table(text), "docs/guides/tracking.md is behind: python scripts/tracking_page.py"
    assert all(f"| `{entry.name}` |" in text for entry in LOGGED)


# ---- values ----


def test_loss_of_the_attack(tmp_path):
    """At the start and at the last gradient of every step, as a mean over the images since the last log."""
    seen = []

    class Watching(AutoLoraTrainer):
        def _adversarial(self, pixels, labels, first, reference, losses=None):
            adversarial = super()._adversarial(pixels, labels, first, reference, losses)
            seen.append([found.tolist() for found in losses])
            return adversarial

    trainer = new_trainer(tmp_path, kind=Watching, num_train_epochs=1, attack_steps=3)
    trainer.train()
    assert [len(losses) for losses in seen] == [3, 3, 3]
    for key, position in (("attack_loss_start", 0), ("attack_loss_end", -1)):
        means = [sum(losses[position]) / len(losses[position]) for losses in seen]
        assert logged(trainer, key) == [pytest.approx(sum(means) / 3, rel=1e-5)]
    assert logged(trainer, "attack_loss_end") > logged(trainer, "attack_loss_start")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_attack_loss_with_accumulation(tmp_path, accumulation):
    """The mean over all images of a step, however it is split; the last step has fewer."""
    batch = {"per_device_train_batch_size": 16 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = new_trainer(tmp_path, "hf_vit", num_train_epochs=1, learning_rate=1e-9, **batch)
    trainer.train()
    whole = new_trainer(tmp_path / "whole", "hf_vit", num_train_epochs=1, learning_rate=1e-9)
    whole.train()
    assert logged(trainer, "attack_loss_end") == pytest.approx(logged(whole, "attack_loss_end"), rel=1e-3)


def test_losses_of_the_attack_are_those_of_its_images():
    model = MODELS["hf_vit"].adapted().pixel_space()
    pixels, labels = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    losses = []
    attack = PGD(steps=3)
    found = attack.search(model, pixels, labels, start=pixels, losses=losses)
    assert torch.equal(found, attack(model, pixels, labels, start=pixels))
    with torch.no_grad():
        logits = model(pixels)
        logits = getattr(logits, "logits", logits)
        assert torch.allclose(losses[0], torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
    assert len(losses) == 3 and all(loss.shape == (4,) and not loss.requires_grad for loss in losses)


def test_radius_while_it_grows(tmp_path):
    """Of the last step before the log; 0 is no attack, so there is no loss of one."""
    options = {"eps_schedule": "two-hinge", "logging_strategy": "steps", "logging_steps": 1, "num_train_epochs": 6}
    trainer = new_trainer(tmp_path, **options)
    trainer.train()
    radii = logged(trainer, "eps")
    assert len(radii) == 18 and radii == sorted(radii)
    assert radii[-1] == pytest.approx(8 / 255)
    without = sum(radius == 0 for radius in radii)
    assert 0 < without < 18
    assert len(logged(trainer, "attack_loss_start")) == 18 - without


def test_images_per_second(tmp_path, monkeypatch):
    """Of the time from the beginning of an epoch to the log, so without the validation."""
    now = [0.0]
    monkeypatch.setattr("autolora_hf.training.throughput.time.perf_counter", lambda: now[0])

    class Slow(AutoLoraTrainer):
        def training_step(self, *args, **kwargs):
            now[0] += 2.0
            return super().training_step(*args, **kwargs)

        def prediction_step(self, *args, **kwargs):
            now[0] += 1000.0
            return super().prediction_step(*args, **kwargs)

    trainer = new_trainer(tmp_path, kind=Slow)
    trainer.train()
    # 48 images in three steps.
    assert logged(trainer, "images_per_second") == [8.0, 8.0]
    again = new_trainer(tmp_path / "steps", kind=Slow, logging_strategy="steps", logging_steps=2, num_train_epochs=1)
    again.train()
    assert logged(again, "images_per_second") == [8.0, 8.0]


def test_throughput_is_restarted_with_an_epoch(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("autolora_hf.training.throughput.time.perf_counter", lambda: now[0])
    trainer = new_trainer(tmp_path)
    throughput = Throughput()
    throughput.count(100)
    now[0] = 50.0
    throughput.on_epoch_begin(trainer.args, trainer.state, trainer.control)
    throughput.count(6)
    now[0] = 53.0
    assert throughput.images_per_second(trainer.accelerator) == 2.0
