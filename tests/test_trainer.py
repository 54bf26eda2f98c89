"""`AutoLoraTrainer`: what it logs, what it selects by, and that it can be interrupted."""

import json
from collections import Counter
from functools import cache
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import IMAGE_SIZE, MODELS, MODES, change_everything
from transformers import TrainerCallback, TrainingArguments

from autolora_hf import AutoLoraTrainer, AutoLoraTrainingArguments, ThreatModel, load_autolora_model
from autolora_hf.data import as_pixel_dataset
from autolora_hf.schedules import default_checkpoints, default_epochs, loss_scalars
from autolora_hf.training import trainer as trainer_module
from autolora_hf.training.attacking import RouteAttacker
from autolora_hf.training.distributed import random_starts


NAMES = ["circle", "cross", "square"]
TRAINED = ("timm_resnet", "hf_vit")


@cache
def pictures(count=60, seed=0, split=None):
    """Noisy copies of one random pattern a class, 20 images of each by default."""
    generator = np.random.default_rng(seed)
    patterns = np.random.default_rng(42).integers(40, 216, (len(NAMES), IMAGE_SIZE, IMAGE_SIZE, 3))
    labels = np.arange(count) % len(NAMES)
    noise = generator.integers(-40, 41, (count, IMAGE_SIZE, IMAGE_SIZE, 3))
    images = [Image.fromarray(pixels.astype(np.uint8)) for pixels in patterns[labels] + noise]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    columns = {"image": images, "label": labels.tolist()}
    return datasets.Dataset.from_dict(columns, features=features, split=split)


def arguments(folder, **changes):
    options = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 32,
        "attack_steps": 2,
        "eval_attack_steps": 2,
        "validation_fraction": 0.2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return AutoLoraTrainingArguments(str(folder), **{**options, **changes})


def new_trainer(folder, name="hf_vit", mode="full", train=None, kind=AutoLoraTrainer, callbacks=None, **changes):
    model = MODELS[name].adapted(num_classes=len(NAMES), mode=mode)
    train = pictures() if train is None else train
    return kind(model, arguments(folder, **changes), train_dataset=train, callbacks=callbacks)


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def copied_state(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def fake_robust_accuracy(trainer, values):
    """Makes the robust validation accuracy of epoch e what `values` says, whatever the model does."""
    genuine = trainer.compute_metrics

    def compute_metrics(prediction):
        return genuine(prediction) | {"robust_accuracy": values[round(trainer.state.epoch) - 1]}

    trainer.compute_metrics = compute_metrics


class Recorder(TrainerCallback):
    """Copies of the weights at the end of every epoch (before its evaluation), and its learning rate."""

    def __init__(self):
        self.ends, self.rates = [], []

    def on_epoch_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.ends.append(copied_state(model))
        self.rates.append(optimizer.param_groups[0]["lr"])


class StopAfter(TrainerCallback):
    def __init__(self, epochs):
        self.epochs = epochs

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_training_stop = round(state.epoch) >= self.epochs


class Spy(AutoLoraTrainer):
    """Keeps the batches it was given, the loss scalars in force, and the weights at the first step of each epoch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.batches, self.scalars_used, self.starts, self.momenta = [], [], {}, {}

    def compute_loss(self, model, inputs, *args, **kwargs):
        epoch = int(self.state.epoch + 1e-6)
        if epoch not in self.starts:
            self.starts[epoch] = copied_state(model)
            states = self.optimizer.state.values()
            self.momenta[epoch] = [s["momentum_buffer"].clone() for s in states if "momentum_buffer" in s]
        self.batches.append((inputs["labels"].tolist(), inputs["pixel_values"].clone()))
        self.scalars_used.append((epoch, self.lr_scheduler.scalars))
        return super().compute_loss(model, inputs, *args, **kwargs)


# ---- a run ----


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TRAINED)
def test_a_run(tmp_path, name, mode):
    trainer = new_trainer(tmp_path, name, mode, kind=Spy, num_train_epochs=3, logging_nan_inf_filter=False)
    before = copied_state(trainer.model)
    trainer.train()
    assert not same(copied_state(trainer.model), before)

    evaluated = ["eval_natural_accuracy", "eval_robust_accuracy", "eval_natural_route_accuracy", "eval_loss"]
    for key in ("loss", "natural_loss", "robust_loss", "kl", "learning_rate", "reload", *evaluated):
        values = logged(trainer, key)
        assert len(values) == 3, key
        assert np.isfinite(values).all(), key

    # SA is measured before the first epoch and after every one, and the scalars follow it.
    accuracies = logged(trainer, "train_natural_route_accuracy")
    assert len(accuracies) == 4
    scalars = [loss_scalars(accuracy) for accuracy in accuracies]
    assert logged(trainer, "lambda1") == [lambda1 for lambda1, _ in scalars]
    assert logged(trainer, "lambda2") == [lambda2 for _, lambda2 in scalars]
    assert trainer.scalars_used == [(epoch, scalars[epoch]) for epoch in range(3) for _ in range(3)]

    # The best weights are in the model at the end.
    robust = logged(trainer, "eval_robust_accuracy")
    best = Path(trainer.state.best_model_checkpoint)
    assert trainer.state.best_metric == robust[int(best.name.split("-")[1]) // 3 - 1]
    # Accuracies up to that of guessing count as equal.
    assert trainer.state.best_metric == max(robust) or max(robust) <= 1 / 3
    live = copied_state(trainer.model)
    trainer.model.load_weights(best)
    assert same(copied_state(trainer.model), live)
    base = MODELS[name].fresh(num_classes=3) if mode == "adapter" else None
    assert same(load_autolora_model(best, base_model=base).state_dict(), live)
    assert trainer.evaluate()["eval_robust_accuracy"] == trainer.state.best_metric

    assert trainer.model.label_names == NAMES
    assert trainer.model.threat_model == ThreatModel("linf", 8 / 255)
    # Trainer's own state (optimizer, schedule, random numbers) apart, checkpoints hold no pickles.
    files = {file.name for file in best.rglob("*") if file.is_file()}
    files -= {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert {Path(file).suffix for file in files} <= {".json", ".safetensors", ".md"}


def test_the_plan(tmp_path):
    trainer = new_trainer(tmp_path, num_train_epochs=30, halving_rule="released")
    plan = json.loads((tmp_path / "training_plan.json").read_text())
    assert plan == trainer.plan
    expected = {
        "objective": "autolora",
        "threat_model": "Linf, eps = 8/255",
        "training_images": 48,
        "validation_images": 12,
        "validation_held_out_of_training": True,
        "batch_size": 16,
        "steps_per_epoch": 3,
        "epochs": 30,
        "optimizer": "sgd",
        "learning_rate": 0.01,
        "halving_rule": "released",
        "halving_checkpoints": list(range(0, 30, 2)),
    }
    assert expected.items() <= plan.items()


def test_epochs_by_default(tmp_path):
    assert [default_epochs(steps) for steps in (1, 3, 5, 15, 1000)] == [240, 240, 180, 60, 60]
    trainer = new_trainer(tmp_path, num_train_epochs=None)
    assert trainer.plan["epochs"] == trainer.args.num_train_epochs == 240
    assert new_trainer(tmp_path, num_train_epochs=None, per_device_train_batch_size=4).plan["epochs"] == 75


def test_checkpoints_by_default():
    assert default_checkpoints(60) == list(range(0, 60, 4))
    assert default_checkpoints(15) == list(range(0, 15, 2))
    assert default_checkpoints(240) == list(range(0, 240, 16))
    assert default_checkpoints(10, interval=3) == [0, 3, 6, 9]


@pytest.mark.parametrize(("mode", "optimizer", "rate"), [("full", "SGD", 0.01), ("adapter", "AdamW", 0.005)])
def test_optimizer_by_default(tmp_path, mode, optimizer, rate):
    trainer = new_trainer(tmp_path, mode=mode)
    found = trainer.create_optimizer()
    assert type(found).__name__ == optimizer
    assert all(group["lr"] == rate for group in found.param_groups)
    trainable = {id(parameter) for parameter in trainer.model.parameters() if parameter.requires_grad}
    # Every parameter decays, as in the paper.
    decaying = [group["params"] for group in found.param_groups if group["weight_decay"] == 1e-4]
    assert {id(parameter) for parameters in decaying for parameter in parameters} == trainable
    if optimizer == "SGD":
        assert all(group["momentum"] == 0.9 for group in found.param_groups)


def test_the_natural_objective_attacks_nothing(tmp_path):
    trainer = new_trainer(tmp_path, objective="natural", kind=Spy)
    attacked = []
    honest = trainer._attacker
    trainer._attacker = lambda attack, *args, **kw: attacked.append(attack) or honest(attack, *args, **kw)
    trainer.train()
    assert all(used is trainer._eval_attack for used in attacked)
    assert logged(trainer, "train_natural_route_accuracy") == []
    assert trainer.args.metric_for_best_model == "eval_natural_accuracy"
    natural = logged(trainer, "eval_natural_accuracy")
    # Accuracies up to that of guessing count as equal.
    assert trainer.state.best_metric == max(natural) or max(natural) <= 1 / 3


# ---- the attack ----


def test_attacks_leave_no_trace_in_the_data(tmp_path, monkeypatch):
    """Same order and same augmentation without attacks, and with longer ones."""

    def batches(**changes):
        trainer = new_trainer(tmp_path, kind=Spy, **changes)
        trainer.train()
        return trainer.batches

    runs = [batches(), batches(attack_steps=3, eval_attack_steps=1)]
    natural = batches(objective="natural")
    monkeypatch.setattr(RouteAttacker, "__call__", lambda self, attack, pixels, *args, **kwargs: pixels)
    runs.append(batches())
    for run in runs:
        assert [labels for labels, _ in run] == [labels for labels, _ in natural]
        assert len(run) == 6
        assert all(torch.equal(images, wanted) for (_, images), (_, wanted) in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("name", ["timm_resnet", "hf_vit"])
@pytest.mark.parametrize("mode", MODES)
def test_the_attack_goes_through_the_deployed_route_in_eval_mode(tmp_path, name, mode):
    trainer = new_trainer(tmp_path, name, mode)
    trainer.create_optimizer_and_scheduler(3)
    model, base = trainer.model, trainer.model.get_base_model()
    change_everything(model)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    images = batch["pixel_values"]
    with torch.no_grad():
        robust, natural = (model.pixel_space(route)(images) for route in ("robust", "natural"))
    attacked, passes = [], []
    attack = trainer._train_attack

    def spy(view, *args, **kwargs):
        with torch.no_grad():
            attacked.append(view(images))
        return attack.search(view, *args, **kwargs)

    def hook(module, *_):
        if module is base:
            passes.append((model.current_route, module.training))

    trainer._train_attack = spy
    base.register_forward_hook(hook)
    trainer.compute_loss(model.train(), batch)
    (logits,) = attacked
    torch.testing.assert_close(logits, robust, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits, natural, rtol=1e-2, atol=1e-2)
    assert passes[-2:] == [("natural", True), ("robust", True)]
    assert {training for _, training in passes[:-2]} <= {False}
    assert all(module.training for module in model.modules())
    assert model.current_route == "robust"


@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_step_has_random_starts_of_its_own(tmp_path, accumulation):
    """They depend on seed, step and position in the step, and not on how a step is divided into micro steps."""

    def starts(**changes):
        options = {"num_train_epochs": 1, "per_device_train_batch_size": 16 // accumulation, **changes}
        trainer = new_trainer(tmp_path, gradient_accumulation_steps=accumulation, **options)
        seen, attack = [], trainer._train_attack

        def spy(view, images, labels, start):
            seen.append((images, start))
            return attack.search(view, images, labels, start=start)

        trainer._train_attack = spy
        trainer.train()
        return [torch.cat(tensors) for tensors in zip(*seen, strict=True)]

    images, first = starts(seed=0)
    assert (first - images).abs().max() <= 8 / 255 + 1e-6
    assert 0 <= first.min() <= first.max() <= 1
    assert len(first) == len({tuple(noise.flatten().tolist()) for noise in first - images}) == 48
    for step in range(3):
        part = slice(16 * step, 16 * (step + 1))
        assert torch.equal(first[part], random_starts(images[part], ThreatModel(), 0, 0, step, first=0))
    images, other = starts(seed=1)
    assert not torch.equal(other, random_starts(images, ThreatModel(), 0, 0, 0, first=0))


def test_evaluation_repeats(tmp_path):
    trainer = new_trainer(tmp_path, "timm_resnet")
    state = copied_state(trainer.model)
    first, second = trainer.evaluate(), trainer.evaluate()
    for key in ("eval_loss", "eval_robust_accuracy", "eval_natural_accuracy", "eval_natural_route_accuracy"):
        assert first[key] == second[key]
    assert same(copied_state(trainer.model), state)
    # An independent count.
    images, labels = zip(*((item["pixel_values"], item["labels"]) for item in trainer.eval_dataset), strict=True)
    for key, route in (("eval_natural_accuracy", "robust"), ("eval_natural_route_accuracy", "natural")):
        with torch.no_grad():
            predictions = trainer.model.eval().pixel_space(route)(torch.stack(images)).argmax(-1)
        assert first[key] == (predictions == torch.tensor(labels)).double().mean().item()


# ---- validation data ----


def test_held_out_validation(tmp_path):
    trainer = new_trainer(tmp_path)
    train, validation = trainer.train_dataset, trainer.eval_dataset
    assert Counter(validation.labels) == {0: 4, 1: 4, 2: 4}
    assert Counter(train.labels) == {0: 16, 1: 16, 2: 16}
    identities = [dataset.source_identity for dataset in (train, validation)]
    for key in identities[0]:
        one, other = (set(identity[key].tolist()) for identity in identities)
        assert not one & other
        assert len(one | other) == 60
    assert (train.augmentation, validation.augmentation) == ("crop-flip", "none")
    again = new_trainer(tmp_path)
    assert again.eval_dataset.source_identity.keys() == identities[1].keys()
    assert all(np.array_equal(again.eval_dataset.source_identity[key], identities[1][key]) for key in identities[1])


def test_a_validation_set_of_ones_own(tmp_path):
    trainer = AutoLoraTrainer(
        MODELS["hf_vit"].adapted(num_classes=3),
        arguments(tmp_path),
        train_dataset=pictures(),
        eval_dataset=pictures(12, seed=1, split="validation"),
    )
    assert len(trainer.train_dataset) == 60
    assert len(trainer.eval_dataset) == 12
    assert not trainer.plan["validation_held_out_of_training"]
    assert trainer.eval_dataset.augmentation == "none"


# ---- learning rate and best weights ----

# Best after epoch 2; the third and every later checkpoint of the schedule halves.
FALLING = [0.8, 0.9, 0.6, 0.55, 0.5, 0.45]


def test_halving_goes_back_to_the_best_weights(tmp_path):
    recorder = Recorder()
    options = {"num_train_epochs": 6, "halving_interval": 2, "callbacks": [recorder]}
    trainer = new_trainer(tmp_path, "timm_resnet", kind=Spy, **options)
    fake_robust_accuracy(trainer, FALLING)
    trainer.train()
    # Checkpoints 0, 2, 4 are tested after epochs 1, 3, 5.
    assert logged(trainer, "reload") == [0, 0, 1, 0, 1, 0]
    assert recorder.rates == [0.01, 0.01, 0.01, 0.005, 0.005, 0.0025]
    assert logged(trainer, "learning_rate") == recorder.rates
    assert logged(trainer, "next_learning_rate") == [0.01, 0.01, 0.005, 0.005, 0.0025, 0.0025]

    best, starts = recorder.ends[1], trainer.starts
    for epoch in range(1, 6):
        # Counted from 0: epochs 3 and 5 start from the best weights, statistics included, others where the last ended.
        expected = best if epoch in (3, 5) else recorder.ends[epoch - 1]
        assert same(starts[epoch], expected), epoch
    assert not same(best, recorder.ends[2])
    assert same(copied_state(trainer.model), best)
    assert trainer.state.best_metric == 0.9
    # The momentum is kept: it still points where the weights were going.
    assert all(buffer.any() for buffer in trainer.momenta[3])

    # The best checkpoint outlives newer ones.
    kept = {int(folder.name.split("-")[1]) for folder in tmp_path.glob("checkpoint-*")}
    assert 2 * 3 in kept
    assert len(kept) <= 3


def test_training_stops_when_the_learning_rate_is_small(tmp_path):
    trainer = new_trainer(tmp_path, num_train_epochs=6, halving_interval=2, min_learning_rate=0.004)
    fake_robust_accuracy(trainer, FALLING)
    trainer.train()
    assert trainer.state.epoch == 5
    assert logged(trainer, "next_learning_rate")[-1] == 0.0025


def test_nothing_is_halved_before_robust_accuracy_beats_chance(tmp_path):
    recorder = Recorder()
    trainer = new_trainer(tmp_path, kind=Spy, num_train_epochs=5, halving_interval=2, callbacks=[recorder])
    fake_robust_accuracy(trainer, [0.3, 0.2, 0.1, 0.05, 0.0])
    trainer.train()
    assert logged(trainer, "reload") == [0] * 5
    # Among epochs that are all no better than guessing, the longest trained one is taken.
    assert same(copied_state(trainer.model), recorder.ends[-1])


@pytest.mark.parametrize(
    ("name", "mode", "stop"),
    [
        ("timm_resnet", "full", 3),
        ("hf_resnet", "adapter", 2),
        ("hf_resnet", "full", 2),
        ("hf_vit", "adapter", 3),
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, name, mode, stop):
    """Interrupted in the middle of a window (2), or just when the best weights are due to be loaded (3)."""
    robust = [0.8, 0.9, 0.6, 0.7]

    def run(folder, resume=None, **kwargs):
        trainer = new_trainer(folder, name, mode, kind=Spy, num_train_epochs=4, halving_interval=2, **kwargs)
        fake_robust_accuracy(trainer, robust)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole")
    assert logged(whole, "reload") == [0, 0, 1, 0]
    stopped = run(tmp_path / "parts", callbacks=[StopAfter(stop)])
    assert stopped.state.epoch == stop
    torch.manual_seed(99)  # what a new process has in its place
    resumed = run(tmp_path / "parts", resume=True)
    assert sorted(resumed.starts) == list(range(stop, 4))

    assert same(copied_state(resumed.model), copied_state(whole.model))
    for epoch in resumed.starts:
        assert same(resumed.starts[epoch], whole.starts[epoch]), epoch
    last = [folder / f"checkpoint-{4 * 3}" for folder in (tmp_path / "whole", tmp_path / "parts")]
    for file in ("model.safetensors", "adapter_model.safetensors", "natural/adapter_model.safetensors"):
        one, other = (folder / file for folder in last)
        assert one.exists() == other.exists() == (file[0] == "n" or (file[0] == "a") == (mode == "adapter"))
        assert not one.exists() or one.read_bytes() == other.read_bytes()
    one, other = (torch.load(folder / "optimizer.pt", weights_only=True)["state"] for folder in last)
    assert all(torch.equal(one[i][key], other[i][key]) for i in one for key in one[i] if torch.is_tensor(one[i][key]))
    for key in ("loss", "lambda1", "learning_rate", "eval_loss", "eval_natural_accuracy", "kl"):
        assert logged(resumed, key) == logged(whole, key), key


def test_gradient_accumulation_gives_the_gradients_of_the_whole_batch(tmp_path):
    """With LayerNorm, where images do not mix."""

    class Gradients(TrainerCallback):
        found = None

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    gradients = []
    for size, steps in ((16, 1), (4, 4)):
        seen = Gradients()
        trainer = new_trainer(
            tmp_path,
            train=pictures(20),
            callbacks=[seen],
            kind=Spy,
            num_train_epochs=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            augmentation="none",
        )
        # Random starts are drawn for each micro step.
        trainer._train_attack.random_start = False
        trainer.train()
        assert trainer.state.global_step == 1
        assert len(trainer.batches) == steps
        assert trainer.plan["batch_size"] == 16
        gradients.append(seen.found)
    scale = max(gradient.abs().max() for gradient in gradients[0].values())
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6 * scale.item())


# ---- refused before training ----


def relabelled(labels, names=None):
    feature = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    columns = {"image": pictures()["image"][: len(labels)], "label": labels}
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.mark.parametrize(
    ("dataset", "parts"),
    [
        (lambda: relabelled([0, 1, 2, 3, 7] * 4), ["8 of 20 labels of train_dataset", "outside 0 .. 2", "7 (4 x)"]),
        (lambda: relabelled([0, 1, -1] * 4), ["4 of 12 labels", "-1 (4 x)", "hidden"]),
        (lambda: relabelled([1] * 10), ["All 10 samples of train_dataset have label 1"]),
        (lambda: pictures().remove_columns("label"), ["no label column", "image (Image)", "`label_column=`"]),
        (lambda: pictures().remove_columns("image"), ["no image column", "label (ClassLabel)", "`image_column=`"]),
        (lambda: pictures().select([]), ["train_dataset is empty"]),
        (lambda: relabelled([0, 1, 2]), ["Cannot hold out samples"]),
        (lambda: datasets.DatasetDict({"train": pictures()}), ["DatasetDict", "dataset['train']"]),
    ],
    ids=["outside", "negative", "one class", "no labels", "no images", "empty", "too few", "dict"],
)
def test_bad_training_data_is_refused(tmp_path, dataset, parts):
    with pytest.raises(ValueError) as caught:
        new_trainer(tmp_path, train=dataset())
    for part in parts:
        assert part in str(caught.value)


def with_validation(folder, validation, train=None):
    model = MODELS["hf_vit"].adapted(num_classes=3)
    return AutoLoraTrainer(model, arguments(folder), train_dataset=train or pictures(), eval_dataset=validation)


def test_the_test_split_is_no_validation_set(tmp_path):
    for split in ("test", "test[:50%]"):
        with pytest.raises(ValueError, match=r"`eval_dataset` is the 'test\S*' split.*`evaluate_robustness`"):
            with_validation(tmp_path, pictures(12, seed=1, split=split))
    with_validation(tmp_path, pictures(12, seed=1, split="validation"))


@pytest.mark.parametrize(
    "validation",
    [
        lambda: pictures(),
        lambda: pictures().select(range(50, 60)),
        lambda: pictures().shuffle(seed=0).select(range(12)),
        lambda: pictures().train_test_split(0.2, seed=0)["test"],
        lambda: as_pixel_dataset(pictures(), MODELS["hf_vit"].preprocessing).select([1, 2, 3]),
    ],
    ids=["same", "part", "shuffled part", "split of it", "pixels of it"],
)
def test_training_images_are_no_validation_set(tmp_path, validation):
    with pytest.raises(ValueError, match=r"shares images with `train_dataset`|'test' split"):
        with_validation(tmp_path, validation())


def test_disjoint_parts_of_one_data_set_are_fine(tmp_path):
    trainer = with_validation(tmp_path, pictures().select(range(48, 60)), train=pictures().select(range(48)))
    assert len(trainer.eval_dataset) == 12


def test_validation_labels_are_checked_too(tmp_path):
    with pytest.raises(ValueError, match="4 of 8 labels of eval_dataset"):
        with_validation(tmp_path, relabelled([0, 9] * 4))
    with pytest.raises(ValueError, match="eval_dataset has other classes"):
        with_validation(tmp_path, relabelled([0, 1, 2] * 4, ["circle", "square", "cross"]))


def test_test_data_must_be_new(tmp_path):
    trainer = new_trainer(tmp_path)
    train_rows, validation_rows = rows_of(trainer.train_dataset), rows_of(trainer.eval_dataset)
    with pytest.raises(ValueError, match="shares images with the training data"):
        trainer.evaluate_robustness(pictures(), attack="pgd")
    with pytest.raises(ValueError, match="shares images with the training data"):
        trainer.evaluate_robustness(pictures().select(train_rows[:3]), attack="pgd")
    with pytest.raises(ValueError, match=r"shares images with the validation data.*selected with"):
        trainer.evaluate_robustness(pictures().select(validation_rows[:3]), attack="pgd")
    with pytest.raises(ValueError, match="shares images with the validation data"):
        trainer.evaluate_robustness(trainer.eval_dataset, attack="pgd")
    assert trainer.model.results == []

    report = trainer.evaluate_robustness(pictures(9, seed=5, split="test"), attack="pgd", progress=False)
    assert [result["robust_correct"] for result in trainer.model.results] == [report.robust_correct]
    assert report.threat_model == trainer.args.threat_model
    assert report.natural.total == 9


def rows_of(dataset):
    """Row numbers of `pictures()` that a part of it shows, found by the images themselves."""
    wanted = [np.asarray(image) for image in pictures()["image"]]
    plain = dataset.select(range(len(dataset)), augmentation="none")
    shown = [(plain[i]["pixel_values"] * 255).round().byte().permute(1, 2, 0).numpy() for i in range(len(plain))]
    return [next(row for row, image in enumerate(wanted) if np.array_equal(image, pixels)) for pixels in shown]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"eps": 8}, ["`eps` is 8", "8/255"]),
        ({"eps": "8"}, ["`eps` is 8", "8/255"]),
        ({"eps": 0}, ["`eps` is 0"]),
        ({"eps": "-8/255"}, ["must be positive"]),
        ({"threat_norm": "l0"}, ["'linf', 'l2' or 'l1', got 'l0'"]),
        ({"objective": "trades2"}, ["`objective`", "autolora", "'trades2'"]),
        ({"augmentation": "mixup"}, ["`augmentation`", "'mixup'"]),
        ({"halving_rule": "cosine"}, ["`halving_rule`", "'cosine'"]),
        ({"num_train_epochs": 0}, ["`num_train_epochs`", "got 0"]),
        ({"validation_fraction": 5}, ["`validation_fraction`", "got 5"]),
        ({"attack_steps": 0}, ["`steps`", "got 0"]),
        ({"attack_step_size": -1.0}, ["`step_size`", "-1.0"]),
        ({"eval_strategy": "steps", "eval_steps": 5}, ["`eval_strategy='epoch'`", "'steps' and 'epoch'"]),
        ({"eval_strategy": "no", "load_best_model_at_end": False}, ["`eval_strategy='epoch'`", "'no'"]),
        ({"save_strategy": "no", "load_best_model_at_end": False}, ["`save_strategy='epoch'`", "'no'"]),
        ({"activation_checkpointing_kwargs": {"use_reentrant": True}}, ["Reentrant", "`use_reentrant=False`"]),
    ],
)
def test_bad_arguments_are_refused(tmp_path, changes, parts):
    with pytest.raises(ValueError) as caught:
        arguments(tmp_path, **changes)
    for part in parts:
        assert part in str(caught.value)


def test_arguments(tmp_path):
    for eps in ("8/255", 8 / 255):
        assert arguments(tmp_path, eps=eps).threat_model == ThreatModel("linf", 8 / 255)
    args = arguments(tmp_path, eps="1/2", threat_norm="l2", attack_steps=7, attack_step_size="1/8")
    attack = args.training_attack()
    assert (attack.threat_model, attack.steps, attack.step_size) == (ThreatModel("l2", 0.5), 7, 0.125)
    assert attack.random_start
    assert args.validation_attack().steps == 2
    assert json.loads(args.to_json_string())["eps"] == 0.5
    assert AutoLoraTrainingArguments(str(tmp_path)).training_attack().step_size == pytest.approx(2 / 255)


def test_wrong_kinds_of_arguments(tmp_path):
    model = MODELS["hf_vit"].adapted(num_classes=3)
    with pytest.raises(ValueError, match="needs a `train_dataset`"):
        AutoLoraTrainer(model, arguments(tmp_path))
    with pytest.raises(TypeError, match="must be AutoLoraTrainingArguments, got TrainingArguments"):
        AutoLoraTrainer(model, TrainingArguments(str(tmp_path)), train_dataset=pictures())
    schedule = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD(model.parameters()))
    with pytest.raises(ValueError, match="own learning-rate schedule"):
        AutoLoraTrainer(model, arguments(tmp_path), train_dataset=pictures(), optimizers=(None, schedule))


def test_a_bare_backbone_is_adapted(tmp_path):
    network = MODELS["timm_vit"].fresh(num_classes=3)
    trainer = AutoLoraTrainer(network, arguments(tmp_path), train_dataset=pictures())
    assert trainer.model.get_base_model() is network
    assert trainer.model.autolora_config.mode == "full"
    assert trainer_module.PLAN == "training_plan.json"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mode", MODES)
def test_models_of_another_precision_train(tmp_path, mode, dtype):
    model = MODELS["hf_vit"].adapted(mode=mode).to(dtype)
    before = copied_state(model)
    args = arguments(tmp_path, max_steps=2, attack_steps=2, eval_attack_steps=1)
    trainer = AutoLoraTrainer(model, args, train_dataset=pictures())
    trainer.train()
    assert {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()} == {dtype}
    assert not same(before, copied_state(model))
    assert np.isfinite(logged(trainer, "loss")).all()
