"""What runs before a training (initialisers) and after it (RiFT)."""

import json

import pytest
import torch
from test_trainer import NAMES, StopAfter, arguments, copied_state, logged, new_trainer, pictures, same
from tiny_models import MODELS, pixels
from torch import nn

from autolora_hf import PGD, AutoLoraTrainer, ThreatModel, config_for, get_autolora_model
from autolora_hf.objectives import OBJECTIVES
from autolora_hf.postprocessing import rift as rift_module
from autolora_hf.postprocessing.base import Finished
from autolora_hf.postprocessing.rift import RiFT, candidates
from autolora_hf.training.stages import FOLDER, run_initializer


PROBES = ("linear-probe", "adversarial-linear-probe")


def trainer_for(folder, name="timm_resnet", mode="full", kind=AutoLoraTrainer, callbacks=None, config=None, **changes):
    torch.manual_seed(0)
    tiny = MODELS[name]
    network = tiny.fresh(len(NAMES))
    config = config_for(changes.get("objective", "autolora"), network, mode=mode, **(config or {}))
    model = get_autolora_model(network, config, preprocessing=tiny.preprocessing)
    return kind(model, arguments(folder, **changes), pictures(), callbacks=callbacks)


# ---- initialisers ----


@pytest.mark.parametrize("init", PROBES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", ["full", "adapter"])
def test_a_probe_changes_the_head_alone(tmp_path, init, name, mode):
    trainer = trainer_for(tmp_path, name, mode, init=init, init_kwargs={"epochs": 2})
    before = copied_state(trainer.model)
    run_initializer(trainer, None)
    after = copied_state(trainer.model)
    heads = {id(p) for head in trainer.model.heads for p in head.parameters()}
    of_the_head = {key for key, p in trainer.model.named_parameters() if id(p) in heads}
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and changed <= of_the_head, "buffers or other weights have moved"


def test_the_stage_is_a_training_of_its_own_kind(tmp_path):
    options = {"init": "adversarial-linear-probe", "init_kwargs": {"epochs": 2, "learning_rate": 0.2}}
    trainer = trainer_for(tmp_path, objective="trades", num_train_epochs=3, **options)
    trainer.train()
    plan = json.loads((tmp_path / FOLDER / "training_plan.json").read_text())
    assert (plan["objective"], plan["epochs"], plan["learning_rate"]) == ("alf", 2, 0.2)
    assert (plan["schedule"], plan["optimizer"]) == ("cosine", "sgd")
    assert plan["threat_model"] == str(trainer.args.threat_model)
    assert plan["training_images"] == trainer.plan["training_images"]
    assert trainer.model.training_plan is trainer.plan and trainer.plan["init"] == "adversarial-linear-probe"
    assert trainer.plan["objective"] == "trades"


def test_the_training_starts_from_the_probe(tmp_path):
    options = {"init": "adversarial-linear-probe", "init_kwargs": {"epochs": 2}}
    alone = trainer_for(tmp_path / "alone", **options)
    untrained = copied_state(alone.model)
    run_initializer(alone, None)
    starts = []

    class Start(AutoLoraTrainer):
        def compute_loss(self, *args, **kwargs):
            if self.args.init != "none" and not starts:  # not in the stage, which is a training too
                starts.append(copied_state(self.model))
            return super().compute_loss(*args, **kwargs)

    trainer_for(tmp_path / "whole", kind=Start, **options).train()
    assert same(starts[0], copied_state(alone.model)) and not same(starts[0], untrained)


@pytest.mark.parametrize("objective", [n for n, kind in OBJECTIVES.items() if n != "natural" and kind.classifies])
def test_a_probe_goes_before_every_objective(tmp_path, objective):
    options = {"init": "adversarial-linear-probe", "init_kwargs": {"epochs": 1}, "num_train_epochs": 1}
    trainer = trainer_for(tmp_path, objective=objective, **options)
    trainer.train()
    assert (tmp_path / FOLDER / "training_plan.json").is_file() and len(logged(trainer, "loss")) == 1
    # What trains is again what the objective says.
    heads_only = OBJECTIVES[objective].heads_only
    heads = {id(p) for head in trainer.model.heads for p in head.parameters()}
    backbone = [p for p in trainer.model.robust_parameters() if id(p) not in heads]
    assert (not backbone) is heads_only


@pytest.mark.parametrize("branch", ["loha", "lnlora", "efft"])
def test_a_probe_goes_before_every_branch(tmp_path, branch):
    options = {"init": "linear-probe", "init_kwargs": {"epochs": 1}, "num_train_epochs": 1, "objective": "pgd-at"}
    trainer = trainer_for(tmp_path, "hf_vit", "adapter", config={"branch": branch}, **options)
    trainer.train()
    assert len(logged(trainer, "loss")) == 1


def test_zero_head(tmp_path):
    trainer = trainer_for(tmp_path, init="zero-head")
    run_initializer(trainer, None)
    assert not any(parameter.any() for head in trainer.model.heads for parameter in head.parameters())
    assert not (tmp_path / FOLDER).exists()
    trainer.train()
    assert all(parameter.any() for head in trainer.model.heads for parameter in head.parameters())


@pytest.mark.slow
def test_a_run_that_is_interrupted_anywhere_ends_with_the_same_bits(tmp_path):
    options = {"init": "adversarial-linear-probe", "init_kwargs": {"epochs": 3}, "num_train_epochs": 3}

    class Interrupted(Exception):
        pass

    class Interrupt(AutoLoraTrainer):
        """Breaks off in the middle of the stage, after it, or in the training."""

        where = None

        def compute_loss(self, *args, **kwargs):
            stage = self.args.init == "none"
            if self.where == ("stage" if stage else "training", round(self.state.epoch or 0, 2)):
                raise Interrupted
            return super().compute_loss(*args, **kwargs)

    whole = trainer_for(tmp_path / "whole", "hf_vit", **options)
    whole.train()
    for number, where in enumerate([("stage", 1.0), ("training", 0.0), ("training", 2.0)]):
        folder = tmp_path / str(number)
        Interrupt.where = where
        with pytest.raises(Interrupted):
            trainer_for(folder, "hf_vit", kind=Interrupt, **options).train()
        resumed = trainer_for(folder, "hf_vit", **options)
        resumed.train(resume_from_checkpoint=True)
        assert same(copied_state(resumed.model), copied_state(whole.model)), where


def test_a_training_that_starts_again_is_initialised_again(tmp_path):
    """Its only checkpoint is damaged, so it goes back to its beginning, which the initialiser belongs to."""
    options = {"init": "adversarial-linear-probe", "init_kwargs": {"epochs": 1}, "num_train_epochs": 1}
    whole = trainer_for(tmp_path, "hf_vit", **options)
    whole.train()
    (weights,) = tmp_path.glob("checkpoint-*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    again = trainer_for(tmp_path, "hf_vit", **options)
    again.train(resume_from_checkpoint=True)
    assert same(copied_state(again.model), copied_state(whole.model))


# ---- RiFT ----


def finished(model, epochs=6):
    data = [(pixels(12, seed), torch.arange(12) % 4) for seed in (0, 1)]
    attack = PGD(ThreatModel("linf", 4 / 255), steps=2)
    return Finished(model, lambda: iter(data), lambda: iter(data), attack, epochs)


@pytest.mark.parametrize("name", ["timm_resnet", "hf_vit"])
@pytest.mark.parametrize("mode", ["full", "adapter"])
def test_measuring_criticality_leaves_the_model_as_it_is(name, mode):
    model = MODELS[name].adapted(mode=mode)
    before = copied_state(model)
    modules = dict(list(candidates(model).items())[:3])
    found = RiFT(steps=3).criticality(finished(model), modules)
    assert found.keys() == modules.keys() and all(value >= 0 for value in found.values())
    assert same(copied_state(model), before)
    assert all(p.grad is None for p in model.parameters())


def test_candidates_are_layers_of_the_deployed_route():
    model = MODELS["timm_resnet"].adapted()
    convolutions = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in MODELS["timm_resnet"].fresh().modules())
    assert len(candidates(model)) == convolutions - 1, "all but the head"
    branches = candidates(MODELS["hf_vit"].adapted(mode="adapter"))
    assert all(len(parameters) == 2 for parameters in branches.values()), "the two factors of a branch are one module"
    assert not any("natural" in key for parameters in branches.values() for key in parameters)


def test_a_larger_disturbance_never_makes_a_module_less_critical():
    model = MODELS["hf_vit"].adapted()
    modules = dict(list(candidates(model).items())[-2:])
    small, large = (RiFT(radius=radius, steps=5).criticality(finished(model), modules) for radius in (0.01, 0.3))
    assert all(large[name] > small[name] for name in modules)


def test_the_least_critical_module_is_fine_tuned_and_nothing_else(monkeypatch):
    model = MODELS["hf_vit"].adapted()
    names = list(candidates(model))
    chosen = names[2]
    monkeypatch.setattr(RiFT, "criticality", lambda *_: {name: float(name != chosen) for name in names})
    # Every point is as robust as the start, and the further the more accurate.
    shares = iter([(0.5, 0.2), *((0.5, 0.9 - 0.05 * n) for n in range(5))])
    monkeypatch.setattr(rift_module, "accuracies", lambda *_: next(shares))
    before = copied_state(model)
    found = RiFT(points=5, learning_rate=0.1)(finished(model))
    after = copied_state(model)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert found["module"] == chosen and found["interpolation"] == 1
    assert changed and all(
        key.removeprefix("base_model.model.").startswith(chosen.removesuffix(".base_layer")) for key in changed
    )


@pytest.mark.parametrize(
    "measured, kept",
    [
        ([(0.5, 0.8), (0.4, 0.95), (0.5, 0.85), (0.5, 0.9)], 1 / 3),  # the best of those that cost no robustness
        ([(0.5, 0.8), (0.4, 0.95), (0.49, 0.9), (0.3, 0.9)], 0),  # all cost some
        ([(0.5, 0.8), (0.6, 0.8), (0.5, 0.7), (0.5, 0.8)], 0),  # none is more accurate
        ([(0.5, 0.8), (0.5, 0.9), (0.5, 0.9), (0.5, 0.9)], 1 / 3),  # the nearest one of equals
    ],
)
def test_which_point_is_kept(monkeypatch, measured, kept):
    model = MODELS["hf_vit"].adapted()
    names, answers = list(candidates(model)), iter(measured)
    monkeypatch.setattr(RiFT, "criticality", lambda *_: {name: float(name != names[0]) for name in names})
    monkeypatch.setattr(rift_module, "accuracies", lambda *_: next(answers))
    before = copied_state(model)
    found = RiFT(points=3, learning_rate=0.1)(finished(model))
    assert found["interpolation"] == pytest.approx(kept)
    assert same(copied_state(model), before) is (kept == 0)


def test_rift_after_a_training_costs_no_robust_validation_accuracy(tmp_path):
    trainer = new_trainer(tmp_path, objective="pgd-at", finish="rift", finish_kwargs={"steps": 2, "images": 16})
    trainer.train()
    found = json.loads((tmp_path / "training_plan.json").read_text())["finished"]
    before, after = found["natural_validation_accuracy"]
    assert after >= before and found["criticality"] <= found["highest_criticality"]
    metrics = trainer.evaluate()
    assert metrics["eval_natural_accuracy"] == pytest.approx(after)


@pytest.mark.parametrize("objective", ["slf", "alf"])
def test_rift_says_before_training_that_it_has_nothing_to_tune(tmp_path, objective):
    with pytest.raises(ValueError, match="a layer other than the head, and none trains here"):
        trainer_for(tmp_path / "run", objective=objective, finish="rift")
    assert not (tmp_path / "run").exists()


def test_stopping_early_still_finishes(tmp_path):
    options = {"finish": "rift", "finish_kwargs": {"steps": 1, "images": 8, "epochs": 1}}
    trainer = new_trainer(tmp_path, callbacks=[StopAfter(1)], num_train_epochs=3, **options)
    trainer.train()
    assert "finished" in trainer.plan
