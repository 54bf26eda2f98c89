"""Training with two real processes: the same as with one, in step with each other, and no waiting for the dead."""

import dataclasses
import json
import re
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from agreement import DECISIONS, LOSSES, METRICS, SCALARS, gap, parameters, series
from launcher import run, torchrun
from test_trainer import NAMES, arguments, new_trainer, pictures
from tiny_models import MODELS
from training_worker import FAULTS, SCENARIOS, train

import autolora_hf
from autolora_hf import AutoLoraTrainer
from autolora_hf.training.distributed import Share, check_parallelism, step_shares
from autolora_hf.training.numerics import MOST_IN_A_ROW


# One launch for all tests, also where the tests are shared out.
pytestmark = pytest.mark.xdist_group("test_training")

HERE = Path(__file__).parent
QUICK = ("full", "short", "batch_norm", "faults")
SLOW = ("adapter", "shorter", "accumulation", "halving", "batch_norm_adapter")


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What both processes did in a scenario; those of a group are run in one launch, when the first is asked for."""
    folder, done = tmp_path_factory.mktemp("two"), set()

    @cache
    def results(name):
        group = QUICK if name in QUICK else SLOW
        if name not in done:
            result = torchrun(HERE / "training_worker.py", folder, *group)
            assert result.returncode == 0, result.stdout[-4000:]
            done.update(group)
        return [torch.load(folder / name / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]

    return results


# ---- equal to one process ----


@pytest.mark.parametrize("name", ["full", "short", *map(slow, ("adapter", "shorter", "accumulation", "halving"))])
def test_two_processes_train_as_one(tmp_path, two_processes, name):
    """Also where the data do not divide by the batch, and with micro steps, which one process here makes none of."""
    first, second = two_processes(name)
    one = train(SCENARIOS[name], tmp_path, accumulation=1)
    assert one["plan"] == first["plan"]
    for two in (first, second):
        assert gap(one["gradients"], two["gradients"]) < 1e-6
        assert len(one["ends"]) == SCENARIOS[name].epochs
        for key in ("ends", "evaluated"):
            for state, other in zip(one[key], two[key], strict=True):
                # Of the way they went: Adam's steps do not shrink with the gradient, nor their rounding.
                assert gap(parameters(state, one["start"]), parameters(other, one["start"])) < 1e-4
        for keys in (DECISIONS, SCALARS, METRICS):
            assert series(one, *keys) == series(two, *keys)
        for values, others in zip(series(one, *LOSSES), series(two, *LOSSES), strict=True):
            assert values == pytest.approx(others, rel=1e-4)
            assert len(values) == SCENARIOS[name].epochs
    in_step(first, second)


@pytest.mark.slow
def test_repeated_samples_would_change_the_gradient(tmp_path, two_processes):
    """The same comparison finds a difference if what fills up the last batch counts as well."""
    first, _ = two_processes("short")
    filled = train(dataclasses.replace(SCENARIOS["short"], images=16), tmp_path)
    assert gap(filled["gradients"], first["gradients"]) > 1e-2


@pytest.mark.parametrize("images", [43, 16, 5])
def test_micro_steps_make_no_difference(tmp_path, images):
    """In one process: the step is the mean over all of its samples, though the last micro step has fewer."""
    scenario = dataclasses.replace(SCENARIOS["full"], images=images, epochs=1)
    one, other = (train(scenario, tmp_path / str(steps), accumulation=steps) for steps in (1, 4))
    assert gap(one["gradients"], other["gradients"]) < 1e-6
    assert gap(parameters(one["ends"][0], one["start"]), parameters(other["ends"][0], one["start"])) < 1e-5
    assert series(one, *METRICS, *DECISIONS) == series(other, *METRICS, *DECISIONS)
    for values, others in zip(series(one, *LOSSES), series(other, *LOSSES), strict=True):
        assert values == pytest.approx(others, rel=1e-5)


class Place:
    """What [`step_shares`] reads of the arguments."""

    def __init__(self, process_index, world_size, dataloader_drop_last=False):
        self.process_index, self.world_size = process_index, world_size
        self.dataloader_drop_last = dataloader_drop_last


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 4, 7, 12, 20, 23, 24])
def test_shares_of_a_step(processes, count):
    """Every sample of the step counts once, and equally; positions do not overlap."""
    size, micro_steps = 24 // processes // 2, 2
    used = min(micro_steps, -(-count // (size * processes)))
    sizes = [size] * used
    if processes == 1:
        sizes[-1] = count - size * (used - 1)
    weights, positions = [0.0] * count, []
    for rank in range(processes):
        for share in step_shares(sizes, Place(rank, processes), range(count)):
            positions += range(share.first, share.first + share.count)
            for position in range(share.first, share.first + share.count):
                # The mean over own samples, over processes and over micro steps.
                weights[position] += share.weight / share.count / processes / used
    assert sorted(positions) == list(range(count))
    assert weights == pytest.approx([1 / count] * count)


def test_shares_without_a_last_batch():
    full = [Share(first, 4, 1.0) for first in (4, 12)]
    assert step_shares([4, 4], Place(1, 2)) == full
    assert step_shares([4, 4], Place(1, 2), range(16)) == full
    # What does not fill a batch is left out by the loader.
    assert step_shares([4, 4], Place(1, 2, dataloader_drop_last=True), range(19)) == full
    assert step_shares([4, 4], Place(1, 2), iter([])) == full


# ---- in step ----


def in_step(first, second):
    for one, other in zip(first["evaluated"], second["evaluated"], strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert all(torch.equal(first["final"][key], second["final"][key]) for key in first["final"])
    keys = (*DECISIONS, *SCALARS, *METRICS, "eval_loss", "natural_loss", "robust_loss", "kl")
    assert series(first, *keys) == series(second, *keys)
    assert first["best"] == second["best"] is not None


@pytest.mark.parametrize("name", ["full", "batch_norm"])
def test_similarities_of_gradients_are_those_of_the_main_process(two_processes, name):
    """Where running statistics differ, so do the attacks."""
    first, second = (series(result, "gradient_cosine", "gradient_cosine_branch") for result in two_processes(name))
    assert first == second
    assert [len(values) for values in first] == [SCENARIOS[name].epochs + 1] * 2


@pytest.mark.parametrize("name", ["batch_norm", slow("batch_norm_adapter")])
def test_running_statistics_are_those_of_the_main_process(tmp_path, two_processes, name):
    first, second = two_processes(name)
    # Each process gathers its own, and only then they are made the same.
    statistics = [key for key in first["start"] if "running_mean" in key]
    ends = zip(first["ends"], second["ends"], strict=True)
    assert all(any(not torch.equal(one[key], other[key]) for key in statistics) for one, other in ends)
    in_step(first, second)
    for end, evaluated in zip(first["ends"], first["evaluated"], strict=True):
        assert all(torch.equal(end[key], evaluated[key]) for key in end)

    # What was saved is what was evaluated: one process finds the same accuracies in it.
    scenario = SCENARIOS[name]
    data = pictures(scenario.images + scenario.validation)
    trainer = AutoLoraTrainer(
        MODELS[scenario.model].adapted(num_classes=len(NAMES), mode=scenario.mode, norm="shared"),
        arguments(tmp_path),
        train_dataset=data.select(range(scenario.images)),
        eval_dataset=data.select(range(scenario.images, len(data))),
    )
    trainer.model.load_weights(first["best"])
    epoch = round(int(first["best"].rsplit("-", 1)[1]) / first["plan"]["steps_per_epoch"])
    metrics = trainer.evaluate()
    assert [[metrics[key]] for key in METRICS] == [[values[epoch - 1]] for values in series(first, *METRICS)]
    assert metrics["eval_loss"] == pytest.approx(series(first, "eval_loss")[0][epoch - 1], rel=1e-4)


# ---- numbers that are not finite, in one process alone ----


def test_a_step_that_fails_in_one_process_is_skipped_in_both(two_processes):
    """Without a trace in either, and both stop at the same step when it happens too often in a row."""
    results = two_processes("faults")
    for result in results:
        states = result["states"]
        assert len(states) == 2 * (max(FAULTS) + 1)
        for step in range(max(FAULTS) + 1):
            before, after = states[2 * step : 2 * step + 2]
            assert same_state(before, after) == (step in FAULTS), step
        assert result["counts"] == (len(FAULTS), MOST_IN_A_ROW)
        assert f"stopped at step {max(FAULTS)}: {MOST_IN_A_ROW} steps in a row" in result["verdict"]
        assert all(tensor.isfinite().all() for tensor in states[-1].values())
    for one, other in zip(*(result["states"] for result in results), strict=True):
        # Running statistics are of the part of the batch that a process has, until the next forward pass.
        trained = [name for name in one if "running_" not in name]
        assert all(torch.equal(one[name], other[name]) for name in trained)


def same_state(before, after):
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_process_that_fails_says_what_it_was(two_processes, rank):
    said = [message for message in two_processes("faults")[rank]["said"] if "was skipped" in message]
    named = {"image": "adversarial images", "statistics": "running statistics", "gradient": "gradients"}
    named["activations"] = "running statistics"
    own = {step: named[what] for step, (at, what) in FAULTS.items() if at == rank}
    # The main process reports the steps of the others too, of which it only knows the gradients; the other one does
    # not report what it knows nothing of.
    others = {step: "gradients" for step in FAULTS if step not in own} if rank == 0 else {}
    expected = {step: words for step, words in {**own, **others}.items() if rank == 0 or words != "gradients"}
    assert len(said) == len(expected)
    for message, (step, words) in zip(said, sorted(expected.items()), strict=True):
        assert message.startswith(f"Step {step} ")
        assert words in message


# ---- what is refused ----


@pytest.mark.parametrize(
    ("changes", "env", "message"),
    [
        ({"fsdp": True}, {}, "FSDP is not supported.*DDP"),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "FSDP is not supported"),
        ({}, {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism_config"),
        ({"accelerator_config": {"even_batches": False}}, {}, "even_batches"),
        ({"accelerator_config": {"split_batches": True}}, {}, "split_batches"),
    ],
)
def test_other_kinds_of_parallelism_are_refused(tmp_path, monkeypatch, changes, env, message):
    args = arguments(tmp_path, **changes)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        AutoLoraTrainer(MODELS["hf_vit"].adapted(num_classes=3), args, train_dataset=pictures())
    assert not list(tmp_path.iterdir())


def test_deepspeed_is_refused(tmp_path):
    args = arguments(tmp_path)
    args.deepspeed = {"zero_optimization": {"stage": 2}}
    with pytest.raises(ValueError, match=r"DeepSpeed is not supported.*DDP"):
        check_parallelism(args)


def test_one_process_keeps_to_one_gpu(tmp_path, caplog):
    args = arguments(tmp_path)
    args._n_gpu = 4
    check_parallelism(args)
    assert args.n_gpu == 1
    assert args.train_batch_size == 16
    assert "Using one of 4 GPUs" in caplog.text
    assert "accelerate launch --num_processes 4" in caplog.text


def test_persistent_workers_do_not_mix_up_the_data(tmp_path):
    """The accuracies of training and validation set are of those sets, whichever was measured first."""
    options = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = new_trainer(tmp_path, **options)
    before = trainer.natural_training_accuracy(), trainer.evaluate()["eval_natural_route_accuracy"]
    fresh = new_trainer(tmp_path / "again")
    expected = fresh.natural_training_accuracy(), fresh.evaluate()["eval_natural_route_accuracy"]
    assert before == expected


# ---- failures ----


@pytest.mark.slow
@pytest.mark.parametrize(("how", "said"), [("raise", "broken on purpose"), ("kill", r"exitcode  : -9")])
def test_a_process_that_fails_ends_the_others(tmp_path, how, said):
    """In the middle of an epoch, while the other one waits for its gradients."""
    started = time.monotonic()
    result = torchrun(HERE / "failing_worker.py", tmp_path, how, timeout=400)
    assert result.returncode != 0
    assert re.search(said, result.stdout), result.stdout[-4000:]
    assert "finished" not in result.stdout
    assert time.monotonic() - started < 150
    # It got past the first epoch, of which a whole checkpoint is left.
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    new_trainer(tmp_path / "again").model.load_weights(checkpoint)


@pytest.mark.slow
def test_output_folders_of_its_own_for_each_machine_are_refused(tmp_path):
    """Only one of them would hold the best weights to go back to."""
    result = torchrun(HERE / "failing_worker.py", tmp_path, "apart", timeout=400)
    assert result.returncode != 0
    assert "output_dir` is another folder on another machine" in result.stdout
    assert not list(tmp_path.rglob("checkpoint-*"))


# ---- the command ----


@pytest.mark.slow
def test_the_train_command_in_two_processes(tmp_path):
    for split, count, seed in (("train", 60, 0), ("test", 12, 7)):
        for index, row in enumerate(pictures(count, seed)):
            folder = tmp_path / "data" / split / str(row["label"])
            folder.mkdir(parents=True, exist_ok=True)
            row["image"].save(folder / f"{index}.png")
    config = Path(autolora_hf.__file__).parent / "assets" / "accelerate" / "cpus.yaml"
    output = tmp_path / "output"
    options = {
        "--model": "quickstart",
        "--train-data": tmp_path / "data/train",
        "--test-data": tmp_path / "data/test",
        "--test_samples": 4,
        "--output_dir": output,
        "--num_train_epochs": 1,
        "--per_device_train_batch_size": 8,
        "--attack_steps": 1,
        "--eval_attack_steps": 1,
        "--validation_fraction": 0.2,
        "--report_to": "none",
    }
    words = [str(word) for option in options.items() for word in option]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "-m", "autolora_hf"]
    result = run([*launcher, "train", "--use_cpu", *words], timeout=600)
    assert result.returncode == 0, result.stdout[-4000:]
    plan = json.loads((output / "training_plan.json").read_text())
    assert plan["batch_size"] == 16
    for said in ("Training plan:", "natural route %", "threat model  Linf", "Saved in"):
        assert result.stdout.count(said) == 1, said
    assert (output / "README.md").is_file()
    assert len(autolora_hf.load_autolora_model(output, base_model=None).results) == 1
