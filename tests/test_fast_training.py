"""What makes a training step cheap: no waiting, memory formats, reduced precision, bounded measurements."""

import logging
import math

import pytest
import torch
from test_trainer import arguments, logged, new_trainer, pictures
from tiny_models import MODELS, change_everything
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from autolora_hf import (
    PGD,
    AutoLoraTrainer,
    AutoLoraTrainingArguments,
    ThreatModel,
    evaluate_robustness,
    load_autolora_model,
)
from autolora_hf import attention as attention_module
from autolora_hf.attacks import bf16_keeps_strength
from autolora_hf.evaluation import Accuracy
from autolora_hf.frozen import FrozenRoute


# ---- waiting for the device ----


class Waits(TorchDispatchMode):
    """Counts the operations that bring a value to the host (`.item()`, `bool`, `.nonzero()`)."""

    OPERATIONS = (
        torch.ops.aten._local_scalar_dense,
        torch.ops.aten.is_nonzero,
        torch.ops.aten.nonzero,
        torch.ops.aten.equal,
    )

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in self.OPERATIONS
        return func(*args, **(kwargs or {}))


class CountWaits(TrainerCallback):
    """Must be the first callback, so that those of the trainer are counted too."""

    def __init__(self):
        self.counts = []

    def on_step_begin(self, *args, **kwargs):
        self.mode = Waits()
        self.mode.__enter__()

    def on_step_end(self, *args, **kwargs):
        self.mode.__exit__(None, None, None)
        self.counts.append(self.mode.count)


def test_the_counter_counts():
    with Waits() as waits:
        value = torch.ones(3).sum()
        bool(value > 2), value.item(), torch.arange(3).nonzero()
    assert waits.count == 3


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}, {"max_grad_norm": 1.0}])
@pytest.mark.parametrize("name", ["timm_resnet", "hf_vit"])
def test_a_step_waits_for_the_device_once(tmp_path, name, changes):
    """For the gradient norm, which says whether the step may be made; from the first batch to then nothing waits."""
    trainer = new_trainer(tmp_path, name, num_train_epochs=1, per_device_train_batch_size=8, **changes)
    counter = CountWaits()
    trainer.callback_handler.callbacks.insert(0, counter)
    # Made at the first attack, with a check of its own.
    trainer._attacker(trainer._train_attack, torch.rand(1, 3, 32, 32), torch.zeros(1).long(), 0, first=0)
    trainer.train()
    assert len(counter.counts) >= 3
    assert set(counter.counts) == {1}


def test_losses_that_are_not_finite_stay_out_of_the_log(tmp_path):
    class Spoilt(AutoLoraTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * math.nan if self.state.global_step == 1 else loss

    trainer = new_trainer(tmp_path, kind=Spoilt, num_train_epochs=1)
    trainer.train()
    assert logged(trainer, "skipped_steps") == [1]
    assert math.isfinite(logged(trainer, "loss")[0])
    again = new_trainer(tmp_path / "filter", kind=Spoilt, num_train_epochs=1, logging_nan_inf_filter=True)
    again.train()
    assert logged(again, "loss") == logged(trainer, "loss")


# ---- memory format ----


@pytest.mark.parametrize("name", MODELS)
def test_channels_last_changes_no_more_than_rounding(tmp_path, name):
    """Losses and gradients of a step, in float64."""
    results = []
    for number, channels_last in enumerate((True, False)):
        trainer = new_trainer(tmp_path / str(number), name, channels_last=channels_last)
        trainer.create_optimizer_and_scheduler(3)
        change_everything(trainer.model)
        trainer.model.double().train()
        trainer._normalize.double()
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
        batch["pixel_values"] = batch["pixel_values"].double()
        formats = []
        convolution = next(module for module in trainer.model.modules() if isinstance(module, nn.Conv2d))
        convolution.register_forward_pre_hook(lambda _, inputs, formats=formats: formats.append(inputs[0]))
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        # The copy for attacks has the hook too.
        natural, robust = formats[-2:]
        assert natural.is_contiguous(memory_format=torch.channels_last) is channels_last
        assert robust.is_contiguous(memory_format=torch.channels_last) is channels_last
        results.append([loss, *(p.grad for p in trainer.model.parameters() if p.grad is not None)])
    scale = max(gradient.abs().max() for gradient in results[0][1:])
    for one, other in zip(*results, strict=True):
        assert (one - other).abs().max() <= 1e-11 * max(1, scale)


# ---- precision ----


@pytest.mark.parametrize(
    ("threat_model", "size", "expected"),
    [
        (ThreatModel("linf", 2 / 255), 224, True),
        (ThreatModel("linf", 1.9 / 255), 32, False),
        (ThreatModel("l2", 0.5), 32, True),
        (ThreatModel("l2", 0.5), 224, False),
    ],
)
def test_where_bfloat16_is_strong_enough(threat_model, size, expected):
    assert bf16_keeps_strength(threat_model, (size, size)) is expected


@pytest.mark.parametrize(
    ("changes", "precision", "warns"),
    [
        ({}, "float32", False),
        ({"attack_bf16": True}, "bfloat16", False),
        ({"bf16": True}, "bfloat16", False),
        ({"bf16": True, "attack_bf16": False}, "float32", False),
        ({"bf16": True, "eps": "1/255"}, "float32", False),
        ({"attack_bf16": True, "eps": "1/255"}, "bfloat16", True),
    ],
)
def test_precision_of_the_attack(tmp_path, caplog, changes, precision, warns):
    caplog.set_level(logging.WARNING)
    trainer = new_trainer(tmp_path, num_train_epochs=1, **changes)
    assert trainer.plan["attack_precision"] == precision
    assert ("makes attacks weaker" in caplog.text) is warns
    trainer.train()
    assert trainer._attacker.frozen.dtype == getattr(torch, precision)
    assert math.isfinite(logged(trainer, "robust_loss")[0])
    # The model itself is not touched.
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


def test_precision_that_the_launcher_sets(tmp_path, monkeypatch):
    """`accelerate launch --mixed_precision bf16`."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    trainer = new_trainer(tmp_path)
    assert not trainer.args.bf16
    assert trainer.plan["attack_precision"] == "bfloat16"


@pytest.mark.parametrize(("changes", "used"), [({"bf16": True}, True), ({}, False)])
@pytest.mark.parametrize("name", ["timm_vit", "hf_vit"])
def test_attention_of_the_update(tmp_path, monkeypatch, name, changes, used):
    """Plain products in bfloat16, on both routes of every step."""
    seen, attention = [], attention_module._attention
    monkeypatch.setattr(attention_module, "_attention", lambda *args, **kw: seen.append(1) or attention(*args, **kw))
    trainer = new_trainer(tmp_path, name, num_train_epochs=1, attack_bf16=False, **changes)
    trainer.train()
    blocks = 2
    assert len(seen) == used * 3 * 2 * blocks


@pytest.mark.parametrize("name", ["timm_vit", "hf_vit"])
def test_bfloat16_with_recomputed_blocks(tmp_path, name):
    options = {"num_train_epochs": 1, "bf16": True, "save_strategy": "epoch"}
    losses = []
    for recompute in (False, True):
        trainer = new_trainer(tmp_path / str(recompute), name, activation_checkpointing=recompute, **options)
        trainer.train()
        losses += logged(trainer, "loss")
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_the_model_itself_judges(tmp_path):
    """Validation and tests run in the model's own precision, the update under autocast."""
    trainer = new_trainer(tmp_path, "timm_vit", num_train_epochs=1, bf16=True)
    seen = []
    block = trainer.model.get_base_model().blocks[0]
    block.register_forward_hook(lambda module, *_: seen.append((module.training, torch.is_autocast_enabled("cpu"))))
    trainer.train()
    report = trainer.evaluate_robustness(pictures(12, seed=5), "pgd", progress=False)
    # The hook is copied with the layer that attacks run on, where there is no autocast either.
    assert set(seen) == {(True, True), (False, False)}
    trainer.save_model(str(tmp_path / "saved"))
    loaded = load_autolora_model(tmp_path / "saved")
    again = evaluate_robustness(loaded, pictures(12, seed=5), attack="pgd", progress=False)
    assert again.robust_correct == report.robust_correct
    assert "forward" in trainer.model.__dict__, "the update still runs under autocast"


class Noted(PGD):
    """An attack that does more in its call than PGD does."""

    calls = 0

    def __call__(self, *args, **kwargs):
        type(self).calls += 1
        return super().__call__(*args, **kwargs)


def test_an_attack_of_ones_own(tmp_path):
    trainer = new_trainer(tmp_path, num_train_epochs=1)
    trainer._train_attack = Noted(steps=1)
    trainer.train()
    assert Noted.calls == 3


def test_switches_reach_the_copy(tmp_path, monkeypatch):
    seen = []

    class Copy(FrozenRoute):
        def __init__(self, *args, **options):
            seen.append(options)
            super().__init__(*args, **{**options, "compiled_batch": None})

    monkeypatch.setattr("autolora_hf.training.attacking.FrozenRoute", Copy)
    switches = {"attack_fold_norms": False, "attack_linear_patches": False, "channels_last": False}
    switches["attack_compile"] = True
    trainer = new_trainer(tmp_path, "timm_resnet", num_train_epochs=1, **switches)
    trainer.train()
    assert seen == [
        {
            "fold_norms": False,
            "linear_patches": False,
            "channels_last": False,
            "dtype": torch.float32,
            "compiled_batch": 16,
        },
    ]


# ---- the accuracy behind the loss scalars ----


def test_running_accuracy(tmp_path):
    """The mean of the natural route's accuracy over the batches of the epoch; a pass of its own only at the start."""
    passes = []

    class Counting(AutoLoraTrainer):
        def natural_training_accuracy(self):
            passes.append(self.state.global_step)
            return super().natural_training_accuracy()

    trainer = new_trainer(
        tmp_path, kind=Counting, scalar_accuracy="running", logging_strategy="steps", logging_steps=1
    )
    trainer.train()
    assert passes == [0]
    steps = logged(trainer, "train_natural_accuracy")
    start, *found = logged(trainer, "train_natural_route_accuracy")
    assert len(steps) == 6 and len(found) == 2
    assert found == pytest.approx([sum(steps[:3]) / 3, sum(steps[3:]) / 3])
    assert found[0] != start
    assert logged(trainer, "lambda1")[1:] == pytest.approx([1 - accuracy for accuracy in found])


def test_exact_accuracy_is_measured_after_every_epoch(tmp_path):
    trainer = new_trainer(tmp_path)
    trainer.train()
    assert trainer.args.scalar_accuracy == "exact"
    assert logged(trainer, "train_natural_route_accuracy")[-1] == trainer.natural_training_accuracy()
    # Sums of one epoch, not of the whole run.
    assert trainer._guard._epoch_steps == 3


def test_unknown_scalar_accuracy(tmp_path):
    with pytest.raises(ValueError, match="`scalar_accuracy` must be 'exact' or 'running', got 'none'"):
        AutoLoraTrainingArguments(str(tmp_path), scalar_accuracy="none")


# ---- validation ----


def test_a_bounded_validation_set(tmp_path):
    """A fixed part of the given images, in proportion to the classes."""
    seen = []
    for number in range(2):
        args = arguments(tmp_path / str(number), max_validation_images=12, seed=number)
        model = MODELS["hf_vit"].adapted(num_classes=3)
        trainer = AutoLoraTrainer(model, args, train_dataset=pictures(), eval_dataset=pictures(30, seed=1))
        assert len(trainer.eval_dataset) == trainer.plan["validation_images"] == 12
        labels = trainer.eval_dataset.labels
        assert sorted(labels) == [0] * 4 + [1] * 4 + [2] * 4
        seen.append(torch.stack([trainer.eval_dataset[i]["pixel_values"] for i in range(12)]))
    assert not torch.equal(*seen)


@pytest.mark.parametrize(("limit", "held_out"), [(6, 6), (None, 12), (2000, 12)])
def test_no_more_is_held_out(tmp_path, limit, held_out):
    trainer = new_trainer(tmp_path, max_validation_images=limit)
    assert [len(trainer.train_dataset), len(trainer.eval_dataset)] == [60 - held_out, held_out]
    assert trainer.plan["validation_fraction"] == pytest.approx(held_out / 60)


def test_robust_accuracy_has_its_interval(tmp_path):
    trainer = new_trainer(tmp_path, num_train_epochs=1)
    trainer.train()
    (robust,) = logged(trainer, "eval_robust_accuracy")
    expected = Accuracy.from_counts(round(robust * 12), 12)
    assert logged(trainer, "eval_robust_accuracy_low") == [expected.low]
    assert logged(trainer, "eval_robust_accuracy_high") == [expected.high]
    assert expected.low <= robust <= expected.high


def test_an_impossible_bound(tmp_path):
    with pytest.raises(ValueError, match="`max_validation_images` must be positive, got 0"):
        AutoLoraTrainingArguments(str(tmp_path), max_validation_images=0)


# ---- reading images ----


@pytest.mark.parametrize(
    ("device", "cores", "processes", "streams", "workers"),
    [
        ("cpu", 16, 1, False, 0),
        ("cuda", 16, 1, False, 8),
        ("cuda", 16, 4, False, 3),
        ("cuda", 1, 1, False, 0),
        ("cuda", 16, 1, True, 0),
    ],
)
def test_processes_that_read_images(tmp_path, monkeypatch, device, cores, processes, streams, workers):
    args = arguments(tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(AutoLoraTrainingArguments, "device", torch.device(device))
    monkeypatch.setattr(AutoLoraTrainingArguments, "world_size", processes)
    args.dataloader_pin_memory = True
    args.resolve_workers(streams)
    assert args.dataloader_num_workers == workers
    assert args.dataloader_persistent_workers is (workers > 0)
    assert args.accelerator_config.non_blocking is (device == "cuda" and not streams)


@pytest.mark.parametrize("workers", [0, 3])
def test_a_given_number_of_readers_stays(tmp_path, monkeypatch, workers):
    args = arguments(tmp_path, dataloader_num_workers=workers)
    monkeypatch.setattr(AutoLoraTrainingArguments, "device", torch.device("cuda"))
    args.resolve_workers(streams=False)
    assert args.dataloader_num_workers == workers
