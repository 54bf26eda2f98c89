"""Schedules of the learning rate, of the attack's radius, of the loss scalars and of the weights."""

import math

import pytest
import torch
from test_stages import trainer_for
from test_trainer import (
    NAMES,
    Spy,
    StopAfter,
    arguments,
    copied_state,
    fake_robust_accuracy,
    logged,
    new_trainer,
    same,
)
from tiny_models import MODELS

from autolora_hf import AutoLoraTrainer
from autolora_hf.schedules import EpsilonSchedule, LossScalars, PlateauHalving, constant, cosine, milestones
from autolora_hf.training.averaging import TRAINING_STATE
from autolora_hf.training.schedule import AutoLoraScheduler


# ---- curves ----


def test_milestones_divide_by_ten():
    curve = milestones((1 / 2, 5 / 6))
    assert [curve(x) for x in (0, 0.49, 0.5, 0.8, 0.84, 1)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_cosine_rises_and_falls():
    curve = cosine(0.25)
    assert [curve(x) for x in (0, 0.125, 0.25, 0.625, 1)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert cosine()(0) == 1 and constant()(0.7) == 1


@pytest.mark.parametrize("shares", [(), (0.5, 0.5), (0.8, 0.2), (0, 0.5), (0.5, 1.0), (5, 8)])
def test_milestones_that_are_no_rising_shares(shares):
    with pytest.raises(ValueError, match="rising shares of the run"):
        milestones(shares)


def test_the_scheduler_follows_its_curve_and_goes_on_after_a_resume():
    def scheduler():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        return optimizer, AutoLoraScheduler(optimizer, None, cosine(0.2), total_steps=10)

    def step(optimizer, schedule):
        rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        schedule.step()
        return rate

    optimizer, schedule = scheduler()
    whole = [step(optimizer, schedule) for _ in range(10)]
    assert whole == pytest.approx([cosine(0.2)(n / 10) for n in range(10)])
    optimizer, schedule = scheduler()
    first = [step(optimizer, schedule) for _ in range(4)]
    state, inner = schedule.state_dict(), optimizer.state_dict()
    assert all(isinstance(value, (int, float, str, bool, list, dict, type(None))) for value in state.values())
    optimizer, schedule = scheduler()
    optimizer.load_state_dict(inner)
    schedule.load_state_dict(state)
    assert first + [step(optimizer, schedule) for _ in range(6)] == whole


@pytest.mark.parametrize("schedule, expected", [("milestones", [0.1, 0.01, 0.01, 0.001]), ("constant", [0.1] * 4)])
def test_the_schedule_of_the_arguments_is_the_one_that_runs(tmp_path, schedule, expected):
    trainer = new_trainer(tmp_path, objective="trades", schedule=schedule, learning_rate=0.1, num_train_epochs=4)
    assert trainer.plan["schedule"] == schedule
    trainer.train()
    assert logged(trainer, "next_learning_rate") == pytest.approx([*expected])
    assert logged(trainer, "reload") == [0] * 4


def test_trades_with_the_automatic_learning_rate(tmp_path):
    trainer = new_trainer(tmp_path, objective="trades", schedule="plateau", num_train_epochs=6)
    trainer.train()
    assert trainer.plan["halving_checkpoints"] == [0, 2, 4] and len(logged(trainer, "reload")) == 6
    assert isinstance(trainer.lr_scheduler.halving, PlateauHalving)
    assert new_trainer(tmp_path / "own", objective="trades").plan["schedule"] == "milestones"


# ---- radius ----


def test_two_hinges():
    schedule = EpsilonSchedule(50, "two-hinge")
    assert [schedule.share(e) for e in (0, 12, 24.5, 37, 50)] == pytest.approx([0, 0, 0.5, 1, 1])
    assert EpsilonSchedule(50).share(0) == 1


def test_the_automatic_radius_waits_for_natural_accuracy_to_converge():
    schedule = EpsilonSchedule(50, "auto")
    accuracies = [0.1, 0.3, 0.5, 0.6, 0.7] + [0.705, 0.71, 0.69, 0.715, 0.71] + [0.9] * 5
    for epoch, accuracy in enumerate(accuracies):
        schedule.end_epoch(accuracy)
        # Five epochs within two points of the best before them.
        assert (schedule.started is not None) == (epoch >= 9), epoch
    assert schedule.started == 10
    assert [schedule.share(e) for e in (10, 30, 50)] == pytest.approx([0, 0.5, 1])
    other = EpsilonSchedule(50, "auto")
    other.load_state_dict(schedule.state_dict())
    assert other == schedule


def test_the_automatic_radius_rises_at_the_latest_in_the_middle():
    schedule = EpsilonSchedule(10, "auto")
    assert [schedule.share(e) for e in (0, 5, 7.5, 10)] == [0, 0, 0.5, 1]


@pytest.mark.parametrize("kind, hinges", [("linear", {}), ("two-hinge", {"first": 0.7, "second": 0.3})])
def test_schedules_that_there_are_not(kind, hinges):
    with pytest.raises(ValueError, match="eps_"):
        EpsilonSchedule(10, kind, **hinges)


class RadiusSpy(AutoLoraTrainer):
    def _adversarial(self, pixels, labels, *args):
        found = super()._adversarial(pixels, labels, *args)
        self.radii = [*getattr(self, "radii", []), (found - pixels).abs().max().item()]
        return found


def test_the_training_attack_has_the_scheduled_radius(tmp_path):
    eps, options = 16 / 255, {"eps_schedule": "two-hinge", "eps_hinges": [0.25, 0.75], "num_train_epochs": 4}
    trainer = new_trainer(tmp_path, kind=RadiusSpy, objective="pgd-at", eps=eps, **options)
    trainer.train()
    steps = trainer.plan["steps_per_epoch"]
    expected = [eps * min(1, max(0, (n / steps / 4 - 0.25) / 0.5)) for n in range(4 * steps)]
    pairs = zip(trainer.radii, expected, strict=True)
    # Two steps of a quarter of the radius and a random start: up to all of it, and hardly ever less than two thirds.
    assert all(r <= e + 1e-6 and (e == 0) == (r == 0) and r >= 0.6 * e for r, e in pairs)
    # Validation always has the whole of it.
    assert trainer._eval_attack.threat_model.eps == eps
    assert logged(trainer, "eps_share") == pytest.approx([0, 0.5, 1, 1])


def test_while_the_radius_rises_nothing_is_a_plateau():
    rule = PlateauHalving([0, 2, 4])
    assert [rule.update(0.5, hold=hold) for hold in (True, True, True, False, False)] == [0, 0, 0, 0, 1]


# ---- loss scalars ----


def test_fixed_scalars(tmp_path):
    trainer = new_trainer(tmp_path, kind=Spy, loss_scalars=[0.25, 3.0])
    trainer.train()
    assert {scalars for _, scalars in trainer.scalars_used} == {LossScalars(0.25, 3.0)}
    assert not logged(trainer, "train_natural_route_accuracy"), "measured for nothing"
    assert set(logged(trainer, "lambda1")) == {0.25}


def test_scalars_from_a_part_of_the_training_images(tmp_path):
    trainer = new_trainer(tmp_path, scalar_images=9)
    seen = []
    trainer.model.register_forward_pre_hook(lambda _model, inputs: seen.append(len(inputs[0])))
    accuracy = trainer.natural_training_accuracy()
    assert sum(seen) == 9 and (9 * accuracy) == pytest.approx(round(9 * accuracy))
    labels = [int(batch) for inputs in trainer._plain_loader for batch in inputs["labels"]]
    assert sorted(labels) == [0] * 3 + [1] * 3 + [2] * 3, "not in proportion to the classes"


def test_no_divergence_is_one_option(tmp_path):
    trainer = new_trainer(tmp_path, kind=Spy, scalar_lambda2_max=0)
    trainer.train()
    assert {scalars.lambda2 for _, scalars in trainer.scalars_used} == {0}


# ---- weights ----


def averaged_by_hand(trainer, kind, decay, start):
    """The average of the weights after every step, from copies that a callback made."""
    average, count = None, 0
    for number, weights in enumerate(trainer.after_steps, start=1):
        if number <= start:
            continue
        if average is None:
            average = {key: tensor.double() for key, tensor in weights.items()}
        share = 1 / (1 + count) if kind == "swa" else 1 - min(decay, (1 + count) / (10 + count))
        average = {key: (1 - share) * average[key] + share * weights[key].double() for key in average}
        count += 1
    return average


class AfterSteps(AutoLoraTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.after_steps = []

    def compute_loss(self, *args, **kwargs):
        self._remember()
        return super().compute_loss(*args, **kwargs)

    def _remember(self):
        if len(self.after_steps) < self.state.global_step:
            self.after_steps.append({n: p.detach().clone() for n, p in self.model.named_parameters()})

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        self._remember()
        return super()._maybe_log_save_evaluate(*args, **kwargs)


@pytest.mark.parametrize("kind", ["ema", "swa"])
@pytest.mark.parametrize("name", ["timm_resnet", "hf_vit"])
def test_averages_are_what_is_validated_and_saved(tmp_path, kind, name):
    options = {"objective": "pgd-at", "num_train_epochs": 4, "load_best_model_at_end": False}
    plain = new_trainer(tmp_path / "plain", name, **options)
    plain.train()
    options |= {"average_weights": kind, **({"ema_decay": 0.7} if kind == "ema" else {})}
    trainer = new_trainer(tmp_path, name, kind=AfterSteps, **options)
    trainer.train()
    assert logged(trainer, "loss") == logged(plain, "loss"), "training went on from the average"
    steps = trainer.state.max_steps
    expected = averaged_by_hand(trainer, kind, 0.7, 0.75 * steps if kind == "swa" else 0)
    saved = MODELS[name].adapted(num_classes=len(NAMES))
    saved.load_weights(tmp_path / f"checkpoint-{steps}")
    live = dict(trainer.model.named_parameters())
    moved = 0
    for key, parameter in saved.named_parameters():
        if live[key].requires_grad:
            assert torch.allclose(parameter.double(), expected[key], atol=1e-5), key
            moved += (parameter - trainer.after_steps[-1][key]).abs().sum().item()
    assert moved > 0, "the average is the last point"
    # Where no best weights are loaded the run ends with the average.
    assert all(torch.equal(live[key], parameter) for key, parameter in saved.named_parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "autolora", "average_weights": "ema", "ema_decay": 0.8},
        {"objective": "pgd-at", "average_weights": "swa"},
        {"objective": "ar-at"},
        {"objective": "ar-at", "average_weights": "ema"},
        {"objective": "trades", "schedule": "cosine", "warmup_steps": 0.3},
        {"objective": "pgd-at", "eps_schedule": "auto"},
        {"objective": "slf"},
        {"objective": "alf"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
@pytest.mark.parametrize("name", ["timm_resnet", "hf_vit"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, name, options):
    def run(folder, resume=None, **kwargs):
        trainer = trainer_for(folder, name, num_train_epochs=4, **options, **kwargs)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", callbacks=[StopAfter(2)])
    resumed = run(tmp_path / "parts", resume=True)
    assert same(copied_state(resumed.model), copied_state(whole.model))
    for key in ("loss", "eval_robust_accuracy", "learning_rate"):
        assert logged(resumed, key) == logged(whole, key), key


def test_the_best_of_a_run_with_swa_is_an_average(tmp_path):
    trainer = new_trainer(tmp_path, objective="pgd-at", average_weights="swa", num_train_epochs=4)
    fake_robust_accuracy(trainer, [0.9, 0.8, 0.7, 0.5])
    trainer.train()
    assert trainer.state.best_global_step == trainer.state.max_steps and trainer.state.best_metric == 0.5
    other = new_trainer(tmp_path / "ema", objective="pgd-at", average_weights="ema", num_train_epochs=4)
    fake_robust_accuracy(other, [0.9, 0.8, 0.7, 0.5])
    other.train()
    assert other.state.best_metric == 0.9, "a moving average is there from the first step on"


def test_what_a_method_was_made_of_is_in_the_plan(tmp_path):
    plan = new_trainer(tmp_path, scalar_lambda2_max=0.0, scalar_images=9, average_weights="ema").plan
    assert (plan["scalar_lambda2_max"], plan["scalar_images"], plan["ema_decay"]) == (0, 9, 0.999)
    plan = new_trainer(tmp_path / "other", objective="mart", finish="rift", finish_kwargs={"points": 3}).plan
    assert (plan["milestones"], plan["finish_options"]) == ([3 / 4, 9 / 10], {"points": 3})
    assert plan["halving_rule"] is plan["halving_checkpoints"] is plan["scalar_lambda2_max"] is None


def test_the_radius_and_a_plateau_without_accuracies():
    """Label-free objectives have no natural accuracy, but epochs."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    epsilon = EpsilonSchedule(20, "two-hinge")
    schedule = AutoLoraScheduler(optimizer, PlateauHalving(list(range(0, 20, 2)), chance=-math.inf), epsilon=epsilon)
    halved = [schedule.end_epoch(0.0, None) for _ in range(20)]
    assert not any(halved[:15]) and sum(halved[15:]) > 0


def test_only_runs_that_need_it_write_more_than_the_model(tmp_path):
    new_trainer(tmp_path / "plain", num_train_epochs=1).train()
    assert not list((tmp_path / "plain").rglob(TRAINING_STATE))
    trainer = trainer_for(tmp_path / "ar", objective="ar-at", num_train_epochs=1)
    trainer.train()
    trainer.save_model()
    assert len(list((tmp_path / "ar").glob(f"checkpoint-*/{TRAINING_STATE}"))) == 1
    assert not (tmp_path / "ar" / TRAINING_STATE).exists(), "the predictor was published"


# ---- arguments ----


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"schedule": "linear"}, "`schedule` must be one of plateau, milestones"),
        ({"objective": "trades", "milestones": [30, 50]}, "rising shares"),
        ({"eps_schedule": "linear"}, "`eps_schedule` must be"),
        ({"eps_hinges": [0.1, 0.2]}, "for `eps_schedule='two-hinge'`"),
        ({"average_weights": "mean"}, "`average_weights` must be one of none, ema, swa"),
        ({"average_weights": "ema", "ema_decay": 1.0}, "`ema_decay` must be between 0 and 1"),
        ({"objective": "trades", "loss_scalars": [0.5, 3.0]}, "no effect: `objective='trades'` has no such scalars"),
        ({"objective": "pgd-at", "scalar_lambda2_max": 0.0}, "no effect"),
        ({"loss_scalars": [0.5, 3.0], "scalar_images": 5}, "no effect: `loss_scalars` are fixed"),
        ({"objective": "natural", "eps_schedule": "auto"}, "has no training attack"),
        ({"schedule": "cosine", "milestones": [0.5]}, "no effect: the schedule is 'cosine'"),
        ({"objective": "trades", "halving_interval": 3}, "no effect: the schedule is 'milestones'"),
        ({"warmup_steps": 5}, "no effect: the schedule is 'plateau'"),
        ({"average_weights": "swa", "ema_decay": 0.9}, "no effect: `average_weights` is 'swa'"),
        ({"objective": "trades", "objective_kwargs": {"automatic": "false"}}, "`automatic` must be true or false"),
        ({"objective": "trades", "objective_kwargs": {"beta": "six"}}, "`beta` must be a number, got 'six'"),
        ({"objective": "ar-at", "objective_kwargs": {"gamma": True}}, "`gamma` must be a number, got True"),
        ({"objective": "ar-at", "objective_kwargs": {"layers": [1]}}, "a list, each of it a text or null"),
        ({"loss_scalars": [0.5]}, "two numbers"),
        ({"loss_scalars": [1.5, 1]}, "two numbers"),
        ({"scalar_images": 0}, "`scalar_images` must be positive"),
        ({"objective": "trades", "objective_kwargs": {"gamma": 1}}, "Its options are attack_loss, automatic, beta"),
        ({"objective_kwargs": "{beta: 1}"}, "must be a JSON object"),
        ({"objective_kwargs": "[1]"}, "must be an object"),
        ({"objective": "pgd-at", "objective_kwargs": '{"beta": 1}'}, "It has no options"),
        ({"init": "random"}, "`init` must be one of none, zero-head"),
        ({"init_kwargs": {"epochs": 3}}, "but `init` is 'none'"),
        ({"init": "linear-probe", "init_kwargs": {"epochs": 0.5}}, "`epochs` of a linear probe"),
        ({"finish": "polish"}, "`finish` must be one of none, rift"),
        ({"finish": "rift", "finish_kwargs": {"radius": -1}}, "positive `radius`"),
        ({"finish": "rift", "finish_kwargs": {"epochs": -3}}, "at least one step, image, point and epoch"),
    ],
)
def test_bad_arguments_are_told_before_anything_is_loaded(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **changes)


def test_learning_rates_that_are_left_open(tmp_path):
    def rate(mode="full", **changes):
        args = arguments(tmp_path, **changes)
        args.resolve_optimizer(mode)
        return args.learning_rate

    found = rate(), rate("adapter"), rate(objective="trades"), rate(objective="twins-at")
    assert found == (0.01, 0.005, 0.01, 0.003)
    assert rate(objective="twins-at", learning_rate=0.5) == 0.5 and math.isfinite(rate(objective="mart"))
