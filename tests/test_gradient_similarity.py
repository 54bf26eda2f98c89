"""The similarity of natural and adversarial gradients: that it is what it says, and that measuring leaves no trace."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from script_modules import load
from test_trainer import StopAfter, arguments, copied_state, logged, new_trainer, pictures, same
from tiny_models import MODELS, MODES, change_everything, pixels
from torch.func import functional_call

from autolora_hf import AutoLoraTrainer, config_for, get_autolora_model
from autolora_hf.evaluation import training_curves_figure
from autolora_hf.objectives import OBJECTIVES, AutoLora, Batch, Trades
from autolora_hf.routes import NATURAL, ROBUST
from autolora_hf.schedules import LossScalars
from autolora_hf.training.gradient_similarity import (
    COSINE,
    COSINE_BRANCH,
    cosine,
    feature_gradients,
    feature_parameters,
    gradient_cosine,
)


BACKBONES = ("timm_resnet", "timm_vit")
SCALARS = LossScalars(0.3, 4.2)
ROUTE_OF = {COSINE: ROBUST, COSINE_BRANCH: NATURAL}


def changed(name, mode="full", **config):
    """A model of which both branches and the statistics have moved, in double precision, as is a batch for it."""
    model = MODELS[name].adapted(mode=mode, **config).double()
    change_everything(model)
    clean = pixels(6, dtype=torch.float64)
    adversarial = (clean + 0.03 * torch.randn(clean.shape, dtype=torch.float64)).clamp(0, 1)
    return model, (clean, adversarial, torch.arange(6) % 4)


def by_hand(model, batch, with_branch):
    """The cosine by definition: a plain network whose weights are the sums of what a route adds up."""
    clean, adversarial, labels = batch
    config, head = model.autolora_config, model.autolora_config.heads[0]
    network = copy.deepcopy(model).merge_and_unload().train()
    tensors = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    features, layers = {}, model.lora_layers()
    if config.mode == "full":
        features = {name: tensors[name].requires_grad_() for name, _ in network.named_parameters()}
    else:
        carried = [f"{n}.{k}" for n, module in model._saved_modules().items() for k, _ in module.named_parameters()]
        features = {name: tensors[name].requires_grad_() for name in carried}
        for name, layer in layers.items():
            tensors[f"{name}.weight"] = layer.get_base_layer().weight.detach().clone()
            for part in ("lora_A", "lora_B"):
                factor = getattr(layer, part)[ROBUST].weight.detach().clone().requires_grad_()
                features[f"{name}.{part}"] = factor
    features = {name: tensor for name, tensor in features.items() if not name.startswith(f"{head}.")}

    def change(layer, a, b):
        shape = layer.get_base_layer().weight.shape
        if a.ndim == 4:
            product = torch.einsum("or,rikl->oikl", b[:, :, 0, 0], a)
        else:
            product = (b @ a).reshape(shape)
        return product * config.lora_alpha / config.r

    def logits(images, branch):
        weights = dict(tensors)
        for name, layer in layers.items():
            if config.mode == "adapter":
                factors = features[f"{name}.lora_A"], features[f"{name}.lora_B"]
                weights[f"{name}.weight"] = weights[f"{name}.weight"] + change(layer, *factors)
            if branch:
                factors = (getattr(layer, part)[NATURAL] for part in ("lora_A", "lora_B"))
                factors = [getattr(factor, "weight", factor).detach() for factor in factors]
                weights[f"{name}.weight"] = weights[f"{name}.weight"] + change(layer, *factors)
        values = torch.tensor([model.preprocessing.mean, model.preprocessing.std], dtype=torch.float64)
        mean, std = values[..., None, None]
        return functional_call(network, weights, ((images - mean) / std,))

    p, q = logits(clean, with_branch).log_softmax(-1), logits(adversarial, False).log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    robust_ce = -q[range(6), labels].mean()
    term = (1 - SCALARS.lambda1) * robust_ce + SCALARS.lambda2 * kl
    leaves = list(features.values())
    natural = torch.autograd.grad(-p[range(6), labels].mean(), leaves, retain_graph=True)
    first, second = (torch.cat([g.flatten() for g in found]) for found in (natural, torch.autograd.grad(term, leaves)))
    return (first @ second / first.norm() / second.norm()).item()


@pytest.mark.parametrize("key", [COSINE, COSINE_BRANCH])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", BACKBONES)
def test_the_cosine_is_that_of_the_definition(name, mode, key):
    model, batch = changed(name, mode)
    found = gradient_cosine(model, AutoLora(), *batch, SCALARS, clean_route=ROUTE_OF[key])
    assert -1 <= found <= 1
    assert found == pytest.approx(by_hand(model, batch, key == COSINE_BRANCH), abs=1e-9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", BACKBONES)
def test_what_is_known_beforehand(name, mode):
    model, (clean, adversarial, labels) = changed(name, mode)
    # The same loss of the same images.
    cross_entropy, divergence = LossScalars(0, 0), LossScalars(1, 1)
    assert gradient_cosine(model, AutoLora(), clean, clean, labels, cross_entropy) == pytest.approx(1, abs=1e-12)
    # The weights of AutoLoRa's term make TRADES of it.
    both = [gradient_cosine(model, o, clean, adversarial, labels, divergence) for o in (AutoLora(), Trades())]
    assert both[0] == pytest.approx(both[1], abs=1e-12)
    # A branch that adds nothing makes no difference.
    fresh = MODELS[name].adapted(mode=mode).double()
    batch = (clean, adversarial, labels)
    found = [gradient_cosine(fresh, AutoLora(), *batch, SCALARS, route) for route in (ROBUST, NATURAL)]
    assert found[0] == pytest.approx(found[1], abs=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", BACKBONES)
def test_with_the_stop_gradient_no_natural_gradient_arrives(name, mode):
    model, batch = changed(name, mode)
    stopped = feature_gradients(model, AutoLora(), *batch, SCALARS, NATURAL, stop_gradient=True)
    whole = feature_gradients(model, AutoLora(), *batch, SCALARS, NATURAL)
    assert all((gradient == 0).all() for gradient in stopped[0])
    assert all(sum(gradient.abs().sum() for gradient in found) > 0 for found in (stopped[1], *whole))
    assert math.isnan(cosine(*stopped))
    # A model without it has nothing to be kept from.
    free = MODELS[name].adapted(mode=mode, stop_gradient=False).double()
    kept, ignored = (
        feature_gradients(free, AutoLora(), *batch, SCALARS, NATURAL, stop_gradient=stop) for stop in (True, False)
    )
    assert all(torch.equal(a, b) for a, b in zip(kept[0] + kept[1], ignored[0] + ignored[1], strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", BACKBONES)
def test_the_feature_extractor_is_all_but_the_head(name, mode):
    model = MODELS[name].adapted(mode=mode)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(parameter)] for parameter in feature_parameters(model)}
    others = (f".{model.autolora_config.heads[0]}.", f"lora_A.{NATURAL}", f"lora_B.{NATURAL}")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found and found == {name for name in trained if not any(other in name for other in others)}
    model.limit_training(heads_only=True)
    with pytest.raises(ValueError, match="does not train"):
        gradient_cosine(model, AutoLora(), pixels(2), pixels(2), torch.zeros(2).long(), SCALARS)


@pytest.mark.parametrize("name", ["timm_resnet", "hf_vit"])
def test_recomputed_activations_give_the_same(name):
    """Layers are recomputed in their route, and also then without its stop-gradient."""
    model, batch = changed(name)
    found = []
    for enable in (False, True):
        if enable:
            model.activation_checkpointing_enable()
        found += [feature_gradients(model, AutoLora(), *batch, SCALARS, NATURAL)]
    pairs = zip(found[0][0] + found[0][1], found[1][0] + found[1][1], strict=True)
    assert all(torch.allclose(one, other, rtol=1e-9, atol=1e-12) for one, other in pairs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["shared", "dual", "robust_stats"])
@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_changed_by_measuring(mode, norm, training):
    model, batch = changed("timm_resnet", mode, norm=norm)
    model.train(training)
    dropout = model.get_base_model().layer1[0].act1 = torch.nn.Dropout(0.5)
    dropout.train(False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)

    def everything():
        return {
            "state": copied_state(model),
            "flags": [(p.requires_grad, None if p.grad is None else p.grad.sum().item()) for p in model.parameters()],
            "modes": [module.training for module in model.modules()],
            "buffers": [id(buffer) for buffer in model.buffers()],
            "random": torch.get_rng_state(),
            "route": model.current_route,
            "blocked": [len(route.blocked) for route in model._switch.routes.values()],
        }

    before = everything()
    found = [gradient_cosine(model, AutoLora(), *batch, SCALARS, route) for route in (ROBUST, NATURAL, ROBUST)]
    after = everything()
    assert found[0] == found[2] != found[1]
    assert same(before.pop("state"), after.pop("state")) and torch.equal(before.pop("random"), after.pop("random"))
    assert before == after


def test_a_measurement_that_fails_leaves_no_trace_either():
    model, (clean, adversarial, _) = changed("timm_resnet")
    before, modes = copied_state(model), [module.training for module in model.modules()]
    with pytest.raises((IndexError, RuntimeError)):
        gradient_cosine(model, AutoLora(), clean, adversarial, torch.full((6,), 99), SCALARS, NATURAL)
    assert same(before, copied_state(model)) and modes == [module.training for module in model.modules()]
    assert all(parameter.requires_grad for parameter in feature_parameters(model))


@pytest.mark.parametrize(
    ("name", "options"),
    [("autolora", {}), ("pgd-at", {}), ("trades", {}), ("trades", {"automatic": True}), ("mart", {})],
)
def test_the_adversarial_term_is_part_of_the_loss(name, options):
    generator = torch.Generator().manual_seed(0)
    clean, robust = torch.randn(2, 5, 4, generator=generator)
    batch, objective = Batch(torch.zeros(5), torch.ones(5), torch.arange(5) % 4), OBJECTIVES[name](**options)
    loss = objective(lambda route, images: robust if images.all() else clean, batch, SCALARS).loss
    term = objective.adversarial_term(clean, robust, batch.labels, SCALARS)
    weight = {"autolora": SCALARS.lambda1, "trades": SCALARS.lambda1 if options else 1}.get(name, 0)
    assert torch.allclose(loss, term + weight * F.cross_entropy(clean, batch.labels))


# ---- in training ----


def results(trainer):
    """Weights and log of a run, without times and without what only the diagnosis logs."""
    timings = ("runtime", "per_second", "preparation_time")
    log = [
        {key: value for key, value in entry.items() if not key.endswith(timings)}
        for entry in trainer.state.log_history
        if COSINE not in entry
    ]
    return copied_state(trainer.model), copied_optimizer(trainer), log


def copied_optimizer(trainer):
    states = enumerate(trainer.optimizer.state.values())
    return {(i, k): v.clone() for i, state in states for k, v in state.items() if torch.is_tensor(v)}


def equal(first, second):
    return same(first[0], second[0]) and same(first[1], second[1]) and first[2] == second[2]


@pytest.mark.parametrize(
    ("name", "mode", "changes"),
    [
        ("timm_resnet", "full", {}),
        ("timm_resnet", "adapter", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8}),
        ("hf_vit", "full", {"bf16": True}),
        ("hf_vit", "adapter", {"average_weights": "ema", "logging_strategy": "steps", "logging_steps": 2}),
        ("timm_resnet", "full", {"activation_checkpointing": True}),
        ("hf_vit", "full", {"init": "linear-probe", "init_kwargs": {"epochs": 1}}),
    ],
)
def test_a_run_is_the_same_to_the_bit(tmp_path, name, mode, changes):
    found = []
    for on in (False, True):
        torch.manual_seed(0)
        trainer = new_trainer(tmp_path / str(on), name, mode, gradient_similarity=on, **changes)
        trainer.train()
        found.append(results(trainer))
    assert equal(*found)
    for key in (COSINE, COSINE_BRANCH):
        values = logged(trainer, key)
        assert len(values) == 3 and all(-1 <= value <= 1 for value in values), key
    epochs = [entry["epoch"] for entry in trainer.state.log_history if COSINE in entry]
    assert epochs == [0, 1, 2]
    assert logged(trainer, COSINE)[0] == pytest.approx(logged(trainer, COSINE_BRANCH)[0], abs=1e-5)


def test_a_resumed_run_is_the_same_to_the_bit(tmp_path):
    def run(folder, resume=None, on=True, callbacks=None):
        torch.manual_seed(0)
        trainer = new_trainer(folder, "timm_resnet", gradient_similarity=on, callbacks=callbacks)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole, without = run(tmp_path / "whole"), run(tmp_path / "without", on=False)
    run(tmp_path / "parts", callbacks=[StopAfter(1)])
    resumed = run(tmp_path / "parts", resume=True)
    for state, optimizer, _ in map(results, (resumed, without)):
        assert same(state, copied_state(whole.model)) and same(optimizer, copied_optimizer(whole))
    for key in (COSINE, COSINE_BRANCH, "loss", "eval_robust_accuracy", "next_learning_rate"):
        assert logged(resumed, key) == logged(whole, key), key


def test_the_measurement_can_be_repeated(tmp_path):
    """What is logged last is the cosine of the weights at the end, on unaugmented training images under attack."""
    trainer = new_trainer(
        tmp_path, "timm_resnet", num_train_epochs=1, gradient_similarity=True, load_best_model_at_end=False
    )
    trainer.train()
    generator = torch.Generator().manual_seed(trainer.args.seed)
    chosen = torch.randperm(len(trainer.train_dataset), generator=generator)[:16]
    plain = trainer.train_dataset.select(chosen.tolist(), augmentation="none")
    clean, labels = (torch.stack([torch.as_tensor(item[k]) for item in plain]) for k in ("pixel_values", "labels"))
    attack = trainer.args.training_attack()
    adversarial = trainer._attacker(attack, clean, labels, trainer.args.seed, 2, first=0)
    scalars = LossScalars(*(logged(trainer, key)[0] for key in ("lambda1", "lambda2")))
    for key, route in ROUTE_OF.items():
        again = gradient_cosine(trainer.model, AutoLora(), clean, adversarial, labels, scalars, route)
        assert logged(trainer, key)[-1] == pytest.approx(again, abs=1e-5)


@pytest.mark.parametrize("objective", ["pgd-at", "trades", "mart", "twins-at", "twins-trades", "ar-at"])
def test_without_a_branch_there_is_one_cosine(tmp_path, objective):
    trainer = new_trainer_for(objective, tmp_path)
    trainer.train()
    assert len(logged(trainer, COSINE)) == 2 and not logged(trainer, COSINE_BRANCH)


def new_trainer_for(objective, folder, **changes):
    network, tiny = MODELS["timm_resnet"].fresh(3), MODELS["timm_resnet"]
    model = get_autolora_model(network, config_for(objective, network), preprocessing=tiny.preprocessing)
    changes = {"num_train_epochs": 1, "gradient_similarity": True, **changes}
    return AutoLoraTrainer(model, arguments(folder, objective=objective, **changes), train_dataset=pictures())


def test_while_there_is_no_attack_there_is_no_cosine(tmp_path):
    changes = {"eps_schedule": "two-hinge", "eps_hinges": [0.4, 0.8], "num_train_epochs": 4}
    trainer = new_trainer_for("pgd-at", tmp_path, **changes)
    trainer.train()
    assert [entry["epoch"] for entry in trainer.state.log_history if COSINE in entry] == [2, 3, 4]


@pytest.mark.parametrize("objective", ["natural", "slf", "alf", "fare"])
def test_objectives_without_such_a_pair_are_refused(tmp_path, objective):
    with pytest.raises(ValueError, match="no such pair"):
        arguments(tmp_path, objective=objective, gradient_similarity=True)


def test_it_is_drawn_where_it_was_logged(tmp_path):
    trainer = new_trainer(tmp_path, gradient_similarity=True)
    trainer.train()
    figure = training_curves_figure(trainer.state.log_history, tmp_path / "curves.png")
    assert len(figure.axes) == 4 and figure.axes[3].get_xlabel() == "epoch" and not figure.axes[2].get_xlabel()
    assert figure.axes[3].get_legend_handles_labels()[1] == ["without the branch", "with the branch"]
    drawn = [list(line.get_ydata()) for line in figure.axes[3].lines[:2]]
    assert drawn == [logged(trainer, key) for key in (COSINE, COSINE_BRANCH)]
    log = [{k: v for k, v in entry.items() if k not in (COSINE, COSINE_BRANCH)} for entry in trainer.state.log_history]
    assert len(training_curves_figure(log).axes) == 3
    # What was always on the curves.
    assert [axis.get_legend_handles_labels()[1] for axis in figure.axes[1:3]] == [
        ["λ₁", "λ₂", "training loss"],
        ["learning rate"],
    ]


# ---- the script ----


def row(system, without, with_branch=()):
    parts = {
        f"{part} {where}": 0.5
        for part in ("cross-entropy", "KL", "KL, target detached", "natural")
        for where in ("without", "with")
    }
    curves = {COSINE: [0.1, *without], COSINE_BRANCH: [0.1, *with_branch] if with_branch else []}
    return {"system": system, "mode": "full", "seed": 0, **curves, "robust": 0.5, "parts": parts | {"arriving": 0.0}}


@pytest.mark.parametrize(
    ("without", "with_branch", "verdict"),
    [
        ([-0.5, -0.4], [0.2, 0.1], "cosine is lower without the branch than with it: lower in 2 of 2"),
        ([0.5, 0.4], [0.2, 0.1], "cosine is higher without the branch than with it: lower in 0 of 2"),
        (
            [0.5, -0.4],
            [0.2, 0.1],
            "cosine is neither lower nor higher without the branch than with it: lower in 1 of 2",
        ),
    ],
)
def test_the_page_says_what_the_figures_say(without, with_branch, verdict, tmp_path):
    script = load("gradient_similarity")
    rows = [row(name, without, with_branch if name.startswith("AutoLoRa, ") else ()) for name in script.SYSTEMS]
    rows[0] = row("AutoLoRa", without, with_branch)
    content = {"rows": rows, "date": "2000-01-01", "torch": "2", "device": "CPU", "epochs": 2, "images": 100}
    page = script.render(content)
    assert verdict in " ".join(page.split())
    assert max(len(line) for line in page.splitlines() if "|" not in line) <= 119
    script.draw(rows, tmp_path / "figure.png")
