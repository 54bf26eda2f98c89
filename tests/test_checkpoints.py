"""Checkpoints that appear whole or not at all, and runs that go on from them."""

import gc
import json
import logging
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from test_trainer import StopAfter, copied_state, fake_robust_accuracy, logged, new_trainer, same
from transformers import TrainerCallback

from autolora_hf.training import checkpoints, resuming
from autolora_hf.training.checkpoints import SEAL, damage, delete_obsolete, last_whole_checkpoint


def write_checkpoint(run, step, best=None, text="weights"):
    folder = checkpoints.checkpoint_folder(run, step)
    existed = folder.exists()
    with checkpoints.incomplete(folder) as staging:
        (staging / "natural").mkdir(parents=True)
        (staging / "natural" / "model.safetensors").write_text(text)
        state = {"best_model_checkpoint": None if best is None else f"elsewhere/checkpoint-{best}"}
        (staging / "trainer_state.json").write_text(json.dumps(state))
        assert folder.exists() == existed
        checkpoints.complete(staging, folder)
    return folder


# ---- folders ----


def test_a_sealed_checkpoint_is_whole(tmp_path):
    folder = write_checkpoint(tmp_path, 3)
    assert damage(folder) is None
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


@pytest.mark.parametrize(
    ("harm", "part"),
    [
        (lambda folder: (folder / "natural" / "model.safetensors").write_text("weighty"), "checksum"),
        (lambda folder: (folder / "natural" / "model.safetensors").write_text("w"), "checksum"),
        (lambda folder: (folder / "trainer_state.json").unlink(), "missing"),
        (lambda folder: (folder / SEAL).unlink(), "never finished"),
        (lambda folder: (folder / SEAL).write_text("{"), "cannot be read"),
        (lambda folder: (folder / SEAL).write_text('{"saved_at_ns": 9000000000000000000}'), "cannot be read"),
        (lambda folder: (folder / SEAL).write_text("[]"), "cannot be read"),
    ],
)
def test_damage_is_noticed_and_the_checkpoint_before_is_used(tmp_path, caplog, harm, part):
    older, newer = write_checkpoint(tmp_path, 3), write_checkpoint(tmp_path, 6)
    assert last_whole_checkpoint(tmp_path) == newer
    harm(newer)
    assert part in damage(newer)
    with caplog.at_level(logging.WARNING):
        assert last_whole_checkpoint(tmp_path) == older
    assert "checkpoint-6" in caplog.text and "passed over" in caplog.text
    harm(older)
    assert last_whole_checkpoint(tmp_path) is None


def test_a_failed_write_leaves_nothing(tmp_path):
    write_checkpoint(tmp_path, 3)
    folder = checkpoints.checkpoint_folder(tmp_path, 6)
    with pytest.raises(OSError, match=r"checkpoint-6 could not be written: no space.*checkpoint-3"):
        with checkpoints.incomplete(folder) as staging:
            staging.mkdir()
            (staging / "half").write_text("x")
            raise RuntimeError("no space")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    (tmp_path / ".incomplete-checkpoint-6").mkdir()
    (tmp_path / ".deleting-abc").mkdir()
    write_checkpoint(tmp_path, 3)
    delete_obsolete(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_the_best_of_the_checkpoint_before_stays(tmp_path):
    """With the best at 9 now, a run that has to go back to 6 needs 3."""
    for step, best in ((1, 1), (2, 1), (3, 3), (6, 3), (9, 9)):
        write_checkpoint(tmp_path, step, best)
    delete_obsolete(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-6", "checkpoint-9"]
    write_checkpoint(tmp_path, 12, 9)
    delete_obsolete(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-12", "checkpoint-9"]


def test_the_latest_is_the_last_one_saved(tmp_path):
    """Not the one with most steps, which an earlier, longer run may have left."""
    write_checkpoint(tmp_path, 30)
    latest = write_checkpoint(tmp_path, 3)
    assert last_whole_checkpoint(tmp_path) == latest
    again = write_checkpoint(tmp_path, 30, text="new")
    assert last_whole_checkpoint(tmp_path) == again
    assert (again / "natural" / "model.safetensors").read_text() == "new"


# ---- runs ----

ROBUST = [0.8, 0.9, 0.6, 0.7, 0.7, 0.7]


def run(folder, resume=None, name="hf_vit", mode="adapter", epochs=4, **kwargs):
    trainer = new_trainer(folder, name, mode, num_train_epochs=epochs, halving_interval=2, **kwargs)
    fake_robust_accuracy(trainer, ROBUST)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_damaged_checkpoint_costs_an_epoch_and_no_bit(tmp_path, caplog):
    whole = run(tmp_path / "whole")
    stopped = run(tmp_path / "parts", callbacks=[StopAfter(3)])
    last = Path(tmp_path / "parts" / f"checkpoint-{stopped.state.global_step}")
    weights = last / "optimizer.pt"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    # The folder is moved, too; the state of the checkpoint names the best one by its old path.
    shutil.move(tmp_path / "parts", tmp_path / "moved")
    caplog.clear()
    resumed = run(tmp_path / "moved", resume=True)
    assert "optimizer.pt is not what was written" in caplog.text
    assert same(copied_state(resumed.model), copied_state(whole.model))
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert logged(resumed, "train_loss") == logged(whole, "train_loss")
    assert Path(resumed.state.best_model_checkpoint).parent == tmp_path / "moved"
    with pytest.raises(ValueError, match=r"Cannot resume from .*never finished"):
        run(tmp_path / "moved", resume=str(tmp_path))


def test_no_checkpoint_yet_means_the_beginning(tmp_path, caplog):
    assert run(tmp_path, resume=True, epochs=1).state.epoch == 1
    assert "training starts at its beginning" in caplog.text


def test_a_run_that_was_over_trains_no_further(tmp_path):
    """Killed between its last checkpoint and its end."""
    first = run(tmp_path, min_learning_rate=0.004, learning_rate=0.005)
    assert first.state.epoch == 3, "halved below the minimum"
    again = run(tmp_path, resume=True, min_learning_rate=0.004, learning_rate=0.005)
    assert again.state.global_step == first.state.global_step
    assert same(copied_state(again.model), copied_state(first.model))


def test_what_the_last_checkpoint_made_obsolete_goes(tmp_path, monkeypatch):
    """Killed after the last checkpoint appeared and before older ones were deleted."""
    run(tmp_path / "whole", epochs=5)
    deletions = []

    def killed_at_the_last(*args):
        deletions.append(args)
        if len(deletions) == 5:
            raise KeyboardInterrupt
        delete_obsolete(*args)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(resuming, "delete_obsolete", killed_at_the_last)
        run(tmp_path / "killed", epochs=5)
    whole, killed = ({path.name for path in (tmp_path / name).iterdir()} for name in ("whole", "killed"))
    assert len(killed - whole) == 1
    run(tmp_path / "killed", resume=True, epochs=5)
    assert {path.name for path in (tmp_path / "killed").iterdir()} == whole


def test_changed_conditions_are_said(tmp_path, caplog):
    run(tmp_path, callbacks=[StopAfter(1)])
    caplog.clear()
    run(tmp_path, resume=True, callbacks=[StopAfter(2)])
    assert "other conditions" not in caplog.text
    run(tmp_path, resume=True, learning_rate=0.001, callbacks=[StopAfter(3)])
    assert "learning_rate was 0.005 and is 0.001" in caplog.text


def test_damaged_best_weights_are_not_loaded(tmp_path):
    stopped = run(tmp_path, callbacks=[StopAfter(3)])
    best = Path(stopped.state.best_model_checkpoint)
    assert best.name == f"checkpoint-{2 * stopped.state.global_step // 3}"
    (best / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"best weights are in .* damaged: adapter_model\.safetensors"):
        run(tmp_path, resume=True)
    shutil.rmtree(best)
    resumed = run(tmp_path, resume=True)
    assert resumed.state.best_metric == 0.7 and resumed.state.best_global_step == resumed.state.global_step


class FillDisk(TrainerCallback):
    """From the second epoch on, no file can grow beyond some bytes, as on a disk that has filled up."""

    def on_epoch_end(self, args, state, control, **kwargs):
        if round(state.epoch) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, resource.RLIM_INFINITY))


@pytest.fixture
def files_may_fail():
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, files_may_fail):
    whole = run(tmp_path / "whole", mode="full")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(OSError, match=r"could not be written: .*last good checkpoint is checkpoint-\d+ in"):
        run(tmp_path / "full", mode="full", callbacks=[FillDisk()])
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    left = [path.name for path in (tmp_path / "full").iterdir() if path.is_dir()]
    assert left == [f"checkpoint-{whole.state.global_step // 4}"]
    assert damage(tmp_path / "full" / left[0]) is None
    resumed = run(tmp_path / "full", resume=True, mode="full")
    assert same(copied_state(resumed.model), copied_state(whole.model))


def test_the_conditions_are_recorded(tmp_path):
    trainer = run(tmp_path, epochs=1)
    seal = json.loads((Path(trainer.state.best_model_checkpoint) / SEAL).read_text())
    assert (
        seal["environment"]
        == trainer.plan["environment"]
        == json.loads((tmp_path / "training_plan.json").read_text())["environment"]
    )
    assert seal["environment"]["threads"] == torch.get_num_threads()
    assert seal["environment"]["processes"] == 1
    assert set(seal["files"]) >= {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert (
        os.path.getsize(Path(trainer.state.best_model_checkpoint) / "optimizer.pt")
        == seal["files"]["optimizer.pt"]["size"]
    )


class OpenFiles(TrainerCallback):
    def __init__(self):
        self.counts = []

    def on_epoch_end(self, args, state, control, **kwargs):
        gc.collect()
        self.counts.append(len(os.listdir("/proc/self/fd")))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_no_epoch_leaves_files_open(tmp_path):
    """A run of a thousand epochs would reach the limit of the system."""
    files = OpenFiles()
    run(tmp_path, epochs=6, callbacks=[files], min_learning_rate=1e-12)
    assert len(set(files.counts[1:])) == 1, files.counts
