"""Steps that are not finite: skipped without a trace, counted, and fatal in a row."""

import logging
import math
from typing import ClassVar

import numpy as np
import pytest
import torch
from test_trainer import logged, new_trainer
from transformers import TrainerCallback

from autolora_hf import AutoLoraTrainer, ThreatModel
from autolora_hf.attacks.pgd import hits
from autolora_hf.training.numerics import MOST_IN_A_ROW, in_ball


class Poisoned(AutoLoraTrainer):
    """Spoils chosen micro batches; keeps what a skipped step must not change around every optimizer step.

    `bad` maps (step, micro step) to what is spoilt.
    """

    bad: ClassVar = {}

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.micro, self.states = (-1, 0), []
        self.honest, self._attacker = self._attacker, self.attacked
        trainer = self

        class Watch(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                trainer.states.append(trainer.everything())

            def on_step_end(self, args, state, control, **kwargs):
                trainer.states.append(trainer.everything())

        self.add_callback(Watch())

    def everything(self):
        state = {key: tensor.clone() for key, tensor in self.model.state_dict(keep_vars=True).items()}
        state |= {f"buffer {name}": buffer.clone() for name, buffer in self.model.named_buffers()}
        for index, entry in enumerate(self.optimizer.state.values()):
            state |= {f"optimizer {index} {key}": torch.as_tensor(value).clone() for key, value in entry.items()}
        return state

    def changed(self, step):
        before, after = self.states[2 * step : 2 * step + 2]
        names = before.keys() | after.keys()
        return {n for n in names if n not in before or n not in after or not torch.equal(before[n], after[n])}

    def compute_loss(self, model, inputs, *args, **kwargs):
        step = self.state.global_step
        self.micro = (step, self.micro[1] + 1 if self.micro[0] == step else 0)
        return super().compute_loss(model, inputs, *args, **kwargs)

    @property
    def spoilt(self):
        return self.bad.get(self.micro)

    def attacked(self, attack, pixels, *args, **kwargs):
        adversarial = self.honest(attack, pixels, *args, **kwargs)
        model = self.model
        if not model.training:  # an evaluation
            return adversarial
        if self.spoilt == "image":
            adversarial[0, 0, 0, 0] = math.nan
        elif self.spoilt == "far image":
            adversarial = 1 - pixels
        elif self.spoilt == "statistics":
            for module in model.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.running_var.fill_(math.inf)
        return adversarial

    def _objective_loss(self, *args):
        convolution = next(module for module in self.model.modules() if isinstance(module, torch.nn.Conv2d))

        def overflow(module, inputs):
            # Only where the objective is: the attack has been made by then, in eval mode.
            return (inputs[0] * 1e25,) if self.spoilt == "activations" and self.model.training else None

        hook = convolution.register_forward_pre_hook(overflow)
        try:
            loss = super()._objective_loss(*args)
        finally:
            hook.remove()
        if self.spoilt == "gradient":
            # Finite itself, with an infinite gradient.
            loss = loss + (loss - loss.detach()).abs().pow(0.5)
        return loss


def poisoned(bad):
    return type("Poisoned", (Poisoned,), {"bad": bad})


def loss_becomes(trainer, value, when):
    """An infinite loss whose gradient is finite: the one that only the loss gives away."""
    objective = trainer.objective

    class Spoilt(type(objective)):
        def __call__(self, *args):
            output = super().__call__(*args)
            return type(output)(output.loss + value, output.terms) if trainer.micro in when else output

    trainer.objective = Spoilt()


@pytest.mark.parametrize("what", ["image", "far image", "statistics", "activations", "gradient", "loss"])
@pytest.mark.parametrize(("name", "mode"), [("timm_resnet", "full"), ("timm_resnet", "adapter"), ("hf_vit", "full")])
def test_a_bad_step_leaves_no_trace(tmp_path, caplog, name, mode, what):
    if what in ("statistics", "activations") and name == "hf_vit":
        pytest.skip("has no running statistics")
    options = {"max_grad_norm": 1.0, "num_train_epochs": 1}
    trainer = new_trainer(tmp_path, name, mode, kind=poisoned({(1, 0): what}), **options)
    if what == "loss":
        loss_becomes(trainer, math.inf, {(1, 0)})
    caplog.set_level(logging.WARNING)
    trainer.train()
    # Step 0 made the optimizer state that step 1 must leave alone.
    assert trainer.changed(1) == set()
    assert trainer.changed(0) and trainer.changed(2)
    assert logged(trainer, "skipped_steps") == [1]
    assert trainer.lr_scheduler.skipped_in_a_row == 0
    assert np.isfinite([*logged(trainer, "loss"), *logged(trainer, "kl"), *logged(trainer, "robust_loss")]).all()
    (message,) = [record.getMessage() for record in caplog.records if "was skipped" in record.getMessage()]
    expected = {"image": "adversarial images", "far image": "adversarial images", "statistics": "running statistics"}
    expected["activations"] = "running statistics"
    assert message.startswith("Step 1 ") and {**expected, "gradient": "gradients", "loss": "loss"}[what] in message


def test_nothing_is_skipped_in_a_healthy_run(tmp_path, caplog):
    trainer = new_trainer(tmp_path, "timm_resnet", kind=poisoned({}))
    trainer.train()
    assert logged(trainer, "skipped_steps") == [0, 0]
    assert all(trainer.changed(step) for step in range(6))
    assert "was skipped" not in caplog.text


def test_the_guard_changes_no_bit_of_a_healthy_run(tmp_path, monkeypatch):
    guarded = new_trainer(tmp_path / "a", "timm_resnet", num_train_epochs=1)
    guarded.train()
    plain = new_trainer(tmp_path / "b", "timm_resnet", num_train_epochs=1)
    monkeypatch.setattr(plain._guard, "checked", lambda loss, *args: loss)
    plain.train()
    states = guarded.model.state_dict(), plain.model.state_dict()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("micro", [0, 1])
def test_one_bad_micro_batch_skips_the_whole_step(tmp_path, micro):
    trainer = new_trainer(
        tmp_path,
        "timm_resnet",
        kind=poisoned({(1, micro): "image"}),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
    )
    trainer.train()
    assert [bool(trainer.changed(step)) for step in range(3)] == [True, False, True]


def test_the_optimizer_counts_no_skipped_step(tmp_path):
    trainer = new_trainer(tmp_path, kind=poisoned({(1, 0): "image"}), mode="adapter", num_train_epochs=1)
    trainer.train()
    counts = {int(state["step"]) for state in trainer.optimizer.state.values()}
    assert counts == {2}


def test_training_stops_after_a_few_in_a_row(tmp_path):
    bad = {(step, 0): "image" for step in range(2, 100)}
    bad.pop((4, 0))
    trainer = new_trainer(tmp_path, kind=poisoned(bad), num_train_epochs=10)
    with pytest.raises(FloatingPointError, match=r"stopped at step 9: 5 steps in a row.*adversarial images.*lower"):
        trainer.train()
    assert all(torch.isfinite(tensor).all() for tensor in trainer.model.state_dict().values())
    assert (tmp_path / "checkpoint-9" / "trainer_state.json").is_file()


def test_weights_that_are_not_finite_are_left_as_they_are(tmp_path):
    trainer = new_trainer(tmp_path, kind=poisoned({}))
    with torch.no_grad():
        trainer.model.heads[0].bias[0] = math.nan
    before = {key: tensor.clone() for key, tensor in trainer.model.state_dict().items()}
    with pytest.raises(FloatingPointError, match=r"No step has succeeded.*weights are finite.*lower `learning_rate`"):
        trainer.train()
    for key, tensor in trainer.model.state_dict().items():
        torch.testing.assert_close(tensor, before[key], rtol=0, atol=0, equal_nan=True)


def test_the_run_of_bad_steps_survives_a_resume(tmp_path):
    bad = {(step, 0): "image" for step in range(4, 100)}
    trainer = new_trainer(tmp_path, kind=poisoned(bad), num_train_epochs=4)
    with pytest.raises(FloatingPointError, match="stopped at step 8"):
        trainer.train()
    again = new_trainer(tmp_path, kind=poisoned(bad), num_train_epochs=4)
    with pytest.raises(FloatingPointError, match="stopped at step 8"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert again.lr_scheduler.skipped_steps == MOST_IN_A_ROW
    assert len(again.states) == 2 * 2 + 1  # it trained steps 6 and 7, and stopped in step 8


@pytest.mark.parametrize("name", ["timm_resnet", "hf_vit"])
def test_buffers_that_are_infinite_by_design_are_no_failure(tmp_path, name):
    trainer = new_trainer(tmp_path, name, num_train_epochs=1)
    trainer.model.get_base_model().register_buffer("mask", torch.tensor([0.0, -math.inf]), persistent=False)
    trainer.train()
    assert logged(trainer, "skipped_steps") == [0]


class FakeScaler(torch.amp.GradScaler):
    """A scaler that works without a GPU; the first gradients overflow until the scale is small enough."""

    def __init__(self, overflow_above):
        super().__init__("cpu", init_scale=8.0)
        self.overflow_above = overflow_above

    def scale(self, loss):
        scaled = super().scale(loss)
        return scaled if self.get_scale() <= self.overflow_above else scaled * math.inf


@pytest.mark.parametrize(("above", "fatal"), [(2, False), (0, True)])
def test_looking_for_the_scale_is_no_failure(tmp_path, caplog, above, fatal):
    trainer = new_trainer(tmp_path, "timm_resnet", kind=poisoned({}), num_train_epochs=3 if fatal else 2)
    trainer.accelerator.scaler = FakeScaler(above)
    if fatal:
        # 8, 4, 2, 1 are the search; after that it is not the scale.
        with pytest.raises(FloatingPointError, match="stopped at step 7"):
            trainer.train()
        return
    trainer.train()
    assert [bool(trainer.changed(step)) for step in range(4)] == [False, False, True, True]
    assert logged(trainer, "skipped_steps") == [0] * 2
    assert "was skipped, because" not in caplog.text


# ---- evaluation ----


def test_nan_logits_are_wrong():
    logits = np.array([[math.nan, 0.0], [0.0, math.nan], [0.0, math.nan], [1.0, 0.0], [-math.inf, 0.0]])
    assert hits(logits, np.array([0, 0, 1, 0, 1])).tolist() == [False, False, False, True, True]


def test_a_model_of_nan_has_no_accuracy_and_is_not_the_best(tmp_path):
    trainer = new_trainer(tmp_path)
    with torch.no_grad():
        trainer.model.heads[0].weight.fill_(math.nan)
    metrics = trainer.evaluate()
    assert [metrics[f"eval_{key}accuracy"] for key in ("natural_", "robust_", "natural_route_")] == [0, 0, 0]
    assert trainer.natural_training_accuracy() == 0
    trainer.state.best_metric = 0.5
    for key in ("eval_robust_accuracy", "eval_loss"):
        trainer.args.metric_for_best_model = key
        assert not trainer._determine_best_metric({**metrics, key: math.nan}, None)
    assert trainer.state.best_metric == 0.5


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_in_ball(norm):
    threat_model, pixels = ThreatModel(norm, 0.25), torch.full((2, 3, 4, 4), 0.5)
    change = torch.zeros_like(pixels)
    change[1, 0, 0, 0] = 0.25
    assert in_ball(pixels + change, pixels, threat_model)
    assert not in_ball(pixels + 1.01 * change, pixels, threat_model)
    change[1, 0, 0, 0] = math.nan
    assert not in_ball(pixels + change, pixels, threat_model)
    outside = torch.full_like(pixels, 1.001)
    assert not in_ball(outside, outside, threat_model)
