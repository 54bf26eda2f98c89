"""FARE and Sim-CLIP: the losses, the frozen teacher, attacks and training, on tiny image towers."""

import json
import logging

import pytest
import torch
import torch.nn.functional as F
from tiny_towers import adapted, pictures, pixels, tower
from transformers import TrainerCallback

from autolora_hf import AutoLoraTrainer, AutoLoraTrainingArguments, ThreatModel, get_autolora_model
from autolora_hf.attacks import PGD
from autolora_hf.objectives import OBJECTIVES, Batch, Fare, SimClip
from autolora_hf.objectives.terms import similarity
from autolora_hf.schedules import LossScalars, default_epochs
from autolora_hf.training.progress import LOSS_COLUMNS, EpochTableCallback


METHODS = ("fare", "sim-clip")
SCALARS = LossScalars(0.0, 0.0)


def arguments(folder, objective="fare", **changes):
    options = {
        "objective": objective,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 32,
        "learning_rate": 1e-3,
        "attack_steps": 3,
        "eval_attack_steps": 5,
        "eps": "4/255",
        "validation_fraction": 0.2,
        "augmentation": "none",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return AutoLoraTrainingArguments(str(folder), **{**options, **changes})


def new_trainer(folder, objective="fare", mode="full", train=None, callbacks=None, model=None, **changes):
    model = adapted(mode=mode) if model is None else model
    train = pictures() if train is None else train
    return AutoLoraTrainer(model, arguments(folder, objective, **changes), train, callbacks=callbacks)


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def copied_state(module):
    return {key: tensor.clone() for key, tensor in module.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


class StopAfter(TrainerCallback):
    def __init__(self, epochs):
        self.epochs = epochs

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_training_stop = round(state.epoch) >= self.epochs


def run(objective, model, clean, adversarial):
    """The objective's loss of a batch, with gradients."""

    def forward(route, images):
        assert route == "robust"
        return model.pixel_space()(images)

    batch = Batch(clean, adversarial, torch.zeros(len(clean), dtype=torch.long), objective.reference(clean))
    return objective(forward, batch, SCALARS)


# ---- losses ----


def test_fare_is_the_squared_distance_to_the_original_tower():
    model, original = adapted(), tower()
    objective = Fare()
    objective.prepare(model, seed=0)
    clean, adversarial = pixels(), pixels(seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (model.preprocessing.mean, model.preprocessing.std))
    moved = model.get_base_model()((adversarial - mean) / std).image_embeds
    wanted = (moved - original((clean - mean) / std).image_embeds).pow(2).sum(1).mean()
    output = run(objective, model, clean, adversarial)
    torch.testing.assert_close(output.loss, wanted)
    assert output.terms["embedding_distance"] == output.loss.detach()

    each = objective.losses(moved, None, objective.reference(clean))
    assert each.shape == (len(clean),)
    torch.testing.assert_close(each.mean(), wanted)


def test_fare_with_cosines():
    model, objective = adapted(), Fare(distance="cosine")
    assert objective.attack_loss == "cosine"
    objective.prepare(model, seed=0)
    clean, adversarial = pixels(), pixels(seed=1)
    view = model.pixel_space()
    wanted = (1 - F.cosine_similarity(view(adversarial), view(clean))).mean()
    torch.testing.assert_close(run(objective, model, clean, adversarial).loss, wanted)


@pytest.mark.parametrize("symmetric", [True, False])
def test_sim_clip_stops_the_gradient(symmetric):
    objective = SimClip(symmetric=symmetric)
    clean, adversarial = (pixels(seed=seed).flatten(1)[:, :12].requires_grad_() for seed in (0, 1))
    batch = Batch(clean, adversarial, torch.zeros(6, dtype=torch.long), None)
    loss = objective(lambda route, outputs: outputs, batch, SCALARS).loss
    plain = (1 - F.cosine_similarity(adversarial, clean)).mean()
    torch.testing.assert_close(loss, plain)
    loss.backward()
    wanted = torch.autograd.grad(plain, (clean, adversarial))
    if symmetric:
        # Each direction gives one side its whole gradient, and the loss is the mean of both.
        torch.testing.assert_close(clean.grad, wanted[0] / 2)
        torch.testing.assert_close(adversarial.grad, wanted[1] / 2)
    else:
        assert clean.grad is None
        torch.testing.assert_close(adversarial.grad, wanted[1])


def test_similarity_of_images():
    different, equal = torch.eye(4), torch.ones(4, 4)
    for embeddings, wanted in ((different, 0.0), (equal, 1.0), (equal[:1], 1.0)):
        assert similarity(3 * embeddings).item() == pytest.approx(wanted, abs=1e-6)
    embeddings = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    cosines = F.cosine_similarity(embeddings[:, None], embeddings[None], dim=-1)
    torch.testing.assert_close(similarity(embeddings).float(), (cosines.sum() - 5) / 20)


def test_sim_clips_reference_is_the_tower_of_now():
    model, objective = adapted(), SimClip()
    objective.prepare(model, seed=0)
    before = objective.reference(pixels())
    torch.testing.assert_close(before, model.pixel_space()(pixels()).detach())
    with torch.no_grad():
        model.get_base_model().visual_projection.weight += 0.1
    assert not torch.allclose(objective.reference(pixels()), before, atol=1e-3)
    assert not objective.reference(pixels()).requires_grad


# ---- the teacher ----


@pytest.mark.parametrize("mode", ["full", "adapter"])
def test_the_teacher_stays_while_the_tower_moves(tmp_path, mode):
    trainer = new_trainer(tmp_path, mode=mode)
    original = adapted(mode=mode).pixel_space()(pixels()).detach()
    teacher, student = copied_state(trainer.objective._teacher), copied_state(trainer.model)
    trainer.train()
    assert same(copied_state(trainer.objective._teacher), teacher)
    assert not same(copied_state(trainer.model), student)
    torch.testing.assert_close(trainer.objective.reference(pixels()), original)
    # Again, from the weights it has now: the teacher is still the original.
    trainer.train()
    torch.testing.assert_close(trainer.objective.reference(pixels()), original)


def test_no_gradient_reaches_the_teacher():
    model, objective = adapted(), Fare()
    objective.prepare(model, seed=0)
    run(objective, model, pixels(), pixels(seed=1)).loss.backward()
    assert all(parameter.grad is None for parameter in objective._teacher.parameters())
    assert all(parameter.grad is not None for parameter in model.robust_parameters())
    # Nor does it train, or is it saved, as a part of the model.
    owned = {id(parameter) for parameter in model.parameters()}
    assert not owned & {id(parameter) for parameter in objective._teacher.parameters()}


@pytest.mark.parametrize("objective", METHODS)
def test_a_resumed_run_has_the_same_teacher_and_the_same_end(tmp_path, objective):
    whole = new_trainer(tmp_path / "whole", objective)
    whole.train()
    new_trainer(tmp_path / "killed", objective, callbacks=[StopAfter(1)]).train()
    resumed = new_trainer(tmp_path / "killed", objective)
    resumed.train(resume_from_checkpoint=True)
    assert same(copied_state(resumed.model), copied_state(whole.model))
    assert logged(resumed, "eval_loss") == logged(whole, "eval_loss")
    if objective == "fare":
        assert same(copied_state(resumed.objective._teacher), copied_state(whole.objective._teacher))
        assert resumed.plan["teacher_sha256"] == whole.plan["teacher_sha256"]


def test_another_teacher_after_a_resume_is_said(tmp_path, caplog):
    new_trainer(tmp_path, callbacks=[StopAfter(1)]).train()
    other = new_trainer(tmp_path, model=adapted(seed=1))
    with caplog.at_level(logging.WARNING):
        other.train(resume_from_checkpoint=True)
    assert "teacher_sha256 was" in caplog.text


# ---- attack and training ----


@pytest.mark.parametrize("loss", ["l2", "cosine"])
@pytest.mark.parametrize("norm, eps", [("linf", 4 / 255), ("l2", 0.5)])
def test_the_attack_moves_embeddings_away(loss, norm, eps):
    model, threat_model = adapted(), ThreatModel(norm, eps)
    objective = Fare(distance=loss)
    objective.prepare(model, seed=0)
    clean, labels = pixels(), torch.zeros(6, dtype=torch.long)
    reference, view = objective.reference(clean), model.pixel_space()
    found = PGD(threat_model, loss=loss)(view, clean, labels, reference=reference)
    noise = PGD(threat_model, steps=1, step_size=1e-9, loss=loss)(view, clean, labels, reference=reference)
    change = (found - clean).flatten(1)
    size = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
    assert size.max() <= eps + 1e-6
    assert found.min() >= 0 and found.max() <= 1
    with torch.no_grad():
        attacked, random = (objective.losses(view(images), labels, reference) for images in (found, noise))
    assert (attacked > 1.5 * random).all()


@pytest.mark.parametrize("objective", METHODS)
@pytest.mark.parametrize("mode", ["full", "adapter"])
def test_training_makes_unseen_images_harder_to_move(tmp_path, objective, mode):
    trainer = new_trainer(tmp_path, objective, mode, train=pictures(200), num_train_epochs=8)
    unseen = new_trainer(tmp_path / "other", objective, mode, train=pictures(64, seed=9)).train_dataset
    view = trainer.model.pixel_space()
    images = torch.stack([item["pixel_values"] for item in unseen])
    loss = trainer.objective.attack_loss
    attack = PGD(ThreatModel("linf", 4 / 255), steps=20, loss=loss)

    def distance():
        reference = trainer.objective.reference(images)
        adversarial = attack(view, images, torch.zeros(len(images), dtype=torch.long), reference=reference)
        with torch.no_grad():
            return trainer.objective.losses(view(adversarial), None, reference).mean().item()

    before = distance()
    validated = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert distance() < 0.8 * before
    assert trainer.evaluate()["eval_loss"] < 0.8 * validated
    # The best epoch is the one of the smallest loss.
    assert trainer.state.best_metric == min(logged(trainer, "eval_loss")[1:-1])
    start, after = logged(trainer, "image_similarity")[0], logged(trainer, "eval_image_similarity")[-1]
    warnings = [warning["kind"] for warning in trainer.plan.get("warnings", ())]
    if objective == "fare":
        # It tells images apart as before.
        assert 1 - after > 0.6 * (1 - start)
        assert warnings == []
    else:
        # At a hundred times the published learning rate nothing holds the embeddings apart, and a warning says so.
        assert logged(trainer, "eval_clean_loss") == pytest.approx([0] * 9, abs=1e-5)
        assert 1 - after < 0.4 * (1 - start)
        assert warnings == ["collapse"]


# ---- arguments, plan and logs ----


def test_the_published_recipe(tmp_path):
    for objective in METHODS:
        trainer = new_trainer(tmp_path, objective, learning_rate=None, num_train_epochs=None)
        plan = trainer.plan
        assert (plan["optimizer"], plan["learning_rate"], plan["schedule"]) == ("adamw_torch", 1e-5, "cosine")
        assert trainer.args.weight_decay == 1e-4
        curve = trainer._curve(1000)
        assert [curve(progress) for progress in (0, 0.035, 0.07, 1)] == pytest.approx([0, 0.5, 1, 0], abs=1e-6)
    assert arguments(tmp_path, optim="sgd").optim == "sgd"
    chosen = new_trainer(tmp_path, optim="sgd", warmup_steps=0.5)
    assert chosen.plan["optimizer"] == "sgd"
    assert chosen._curve(1000)(0.25) == pytest.approx(0.5)
    assert new_trainer(tmp_path, mode="adapter", learning_rate=None).plan["learning_rate"] == 0.005


def test_the_length_of_the_run():
    steps = OBJECTIVES["fare"].steps
    # ImageNet: two epochs; small sets: the package's own number.
    assert default_epochs(10_000, steps) == 2
    assert default_epochs(30_000, steps) == 1
    assert default_epochs(100, steps) == default_epochs(100) == 60
    assert default_epochs(3, steps) == default_epochs(3)


def test_what_is_logged_planned_and_drawn(tmp_path, capsys):
    trainer = new_trainer(tmp_path, disable_tqdm=False)
    trainer.train()
    table = capsys.readouterr()
    lines = [line for line in (table.out + table.err).splitlines() if "val. loss" in line]
    assert lines
    assert "robust %" not in table.out + table.err
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, EpochTableCallback))
    assert callback.columns is LOSS_COLUMNS
    for key in ("loss", "embedding_distance", "eval_loss", "eval_clean_loss", "next_learning_rate"):
        assert len(logged(trainer, key)) == 2, key
    assert not logged(trainer, "eval_robust_accuracy")
    assert not logged(trainer, "feature_displacement")
    assert "warnings" not in trainer.plan
    assert trainer.model.label_names is None

    plan = json.loads((tmp_path / "training_plan.json").read_text())
    assert plan["objective"] == "fare"
    assert len(plan["teacher_sha256"]) == 64

    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert (tmp_path / "training_curves.png").stat().st_size > 10_000
    for text in (
        "CLIPVisionModelWithProjection.from_pretrained",
        "pipeline_tag: image-feature-extraction",
        "an embedding of 12 values",
        "validation and train loss",
        "arxiv.org/abs/2402.12336",
    ):
        assert text in card, text
    for text in ("**Classes**", "AutoModelForImageClassification", "logits"):
        assert text not in card, text


# ---- errors ----


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"metric_for_best_model": "robust_accuracy"}, "must be one of loss"),
        ({"metric_for_best_model": "eval_natural_accuracy"}, "must be one of loss"),
        ({"init": "linear-probe"}, "`init='linear-probe'` prepares a classification layer"),
        ({"finish": "rift"}, "`finish='rift'` measures accuracies"),
        ({"eps_schedule": "auto"}, "`eps_schedule='auto'` goes by natural accuracy"),
        ({"objective_kwargs": {"distance": "l1"}}, "`distance` must be 'l2' or 'cosine'"),
    ],
)
def test_arguments_that_need_labels(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **changes)


def test_selection_by_loss_may_be_said(tmp_path):
    args = arguments(tmp_path, metric_for_best_model="loss")
    assert args.greater_is_better is False


@pytest.mark.parametrize("objective", sorted(OBJECTIVES.keys() - set(METHODS)))
def test_objectives_with_labels_refuse_towers(objective):
    model = get_autolora_model(tower())
    with pytest.raises(ValueError, match="needs logits of classes, but a CLIPVisionModelWithProjection gives embed"):
        OBJECTIVES[objective]().prepare(model, seed=0)


@pytest.mark.parametrize("objective", METHODS)
def test_classifiers_are_refused(tmp_path, objective):
    from tiny_models import MODELS

    with pytest.raises(ValueError, match=r"trains the embeddings of an image tower, but a .* gives logits"):
        AutoLoraTrainer(MODELS["hf_vit"].fresh(), arguments(tmp_path, objective), pictures())
    with pytest.raises(ValueError, match="timm's 'resnet18' is no image tower"):
        AutoLoraTrainer("resnet18", arguments(tmp_path, objective), pictures())


def test_there_is_no_accuracy_of_embeddings(tmp_path):
    trainer = new_trainer(tmp_path)
    with pytest.raises(ValueError, match="gives embeddings, so it has no accuracy"):
        trainer.evaluate_robustness(pictures(8, seed=3))
