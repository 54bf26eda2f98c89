"""`evaluate_robustness`: what it measures, what it refuses, and that it leaves everything as it was."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from autolora_hf.attacks import PGD
from autolora_hf.config import ThreatModel
from autolora_hf.data import as_pixel_dataset
from autolora_hf.evaluation import evaluate_robustness
from autolora_hf.pixels import Normalize, Preprocessing


LINF = ThreatModel("linf", 0.03)


class Channel(nn.Module):
    """The class is the colour channel of the first pixel with the largest value: easy to construct cases for."""

    def forward(self, pixels):
        return pixels[:, :, 0, 0] * 10


def case(gaps, size=8):
    """Images of class 0 whose first pixel leads by `gaps`: an attack of radius eps breaks those with gap < 2 eps."""
    pixels = torch.full((len(gaps), 3, size, size), 0.5)
    pixels[:, 0, 0, 0] += torch.tensor(gaps)
    return pixels, torch.zeros(len(gaps), dtype=torch.long)


def evaluate(model, dataset, attack="pgd", threat_model=LINF, **options):
    return evaluate_robustness(model, dataset, threat_model, attack, progress=False, **options)


def test_counts_image_by_image():
    pixels, labels = case([0.01, 0.2, 0.05, 0.07, 0.2])
    labels[4] = 1
    report = evaluate(Channel(), (pixels, labels), batch_size=2, threat_model=ThreatModel("linf", 0.03))
    assert report.natural_correct == [True, True, True, True, False]
    assert report.robust_correct == [False, True, False, True, False]
    assert (report.natural_accuracy, report.robust_accuracy) == (0.8, 0.4)
    assert (report.robust.correct, report.robust.total) == (2, 5)
    assert report.protocol == "custom" and not report.publishable and report.attack == "PGD-10"
    assert report.sample_indices == [0, 1, 2, 3, 4] and report.dataset_size == 5 and report.num_classes == 3
    assert report.route is None and report.device == "cpu"
    assert {"autolora_hf", "torch", "python", "pyautoattack"} <= set(report.versions)


def test_later_attacks_get_only_what_is_left():
    pixels, labels = case([0.01, 0.05, 0.2, 0.2])
    labels[3] = 2
    seen = []

    def nudge(model, x, y):
        seen.append((nudge.__name__, len(x), y.tolist()))
        return torch.cat([x[:, :1] - 0.01, x[:, 1:] + 0.01], 1).clamp(0, 1)

    class Harder:
        def __call__(self, model, x, y):
            seen.append(("Harder", len(x), y.tolist()))
            return torch.cat([x[:, :1] - 0.03, x[:, 1:] + 0.03], 1).clamp(0, 1)

    report = evaluate(Channel(), TensorDataset(pixels, labels), [nudge, Harder()])
    assert seen == [("nudge", 3, [0, 0, 0]), ("Harder", 2, [0, 0])]
    assert [(row.name, row.attacked, row.broken, row.accuracy) for row in report.attacks] == [
        ("nudge", 3, 1, 0.5),
        ("Harder", 2, 1, 0.25),
    ]
    assert report.attack == "nudge + Harder"


def test_own_attacks_next_to_autoattack():
    pixels, labels = case([0.01, 0.05])

    def nudge(model, x, y):
        return torch.cat([x[:, :1] - 0.01, x[:, 1:] + 0.01], 1)

    report = evaluate(Channel(), (pixels, labels), [nudge, "autoattack"])
    assert report.attack == (
        "nudge + AutoAttack (reduced): APGD-CE, APGD-DLR, FAB-T (2 target classes), Square (5000 queries)"
    )
    assert [row.name for row in report.attacks] == ["nudge", "APGD-CE", "APGD-DLR", "FAB-T", "Square", "APGD-T"]
    assert [row.broken for row in report.attacks] == [1, 1, 0, 0, 0, 0]
    report = evaluate(Channel(), (pixels, labels), ["autoattack", nudge])
    assert report.attack.startswith("AutoAttack (reduced): APGD-CE") and report.attack.endswith("queries) + nudge")


def test_claims_of_an_attack_are_not_believed():
    """An attack that returns clean images breaks nothing, and one that answers NaN logits does."""
    pixels, labels = case([0.1, 0.1])
    assert evaluate(Channel(), (pixels, labels), lambda model, x, y: x).robust_accuracy == 1

    class Fragile(nn.Module):
        def forward(self, x):
            return (0.5 - x[:, :, 0, 0]).sqrt()

    pixels = torch.full((2, 3, 8, 8), 0.5)
    report = evaluate(Fragile(), (pixels, labels), lambda model, x, y: x + 0.01)
    assert (report.natural_accuracy, report.robust_accuracy) == (1, 0)


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (lambda model, x, y: x + 0.04, r"left the ball: the linf distance to the clean image is up to 0.04, .* 0.03"),
        (lambda model, x, y: x + 0.6, r"must be in \[0, 1\], got values from 1.1"),
        (lambda model, x, y: x * torch.nan, "contains NaN"),
        (lambda model, x, y: x[:1], r"must return images of shape \(2, 3, 8, 8\), got \(1, 3, 8, 8\)"),
        (lambda model, x, y: None, "must return images of shape .* got NoneType"),
        (lambda model, x, y: x.add_(0.04), "left the ball"),
    ],
)
def test_wrong_attacks_are_refused(attack, message):
    with pytest.raises(ValueError, match=message):
        evaluate(Channel(), case([0.1, 0.1]), attack)


def test_l2_distance_is_measured_over_the_whole_image():
    step = 1 / (3 * 64) ** 0.5
    evaluate(Channel(), case([0.1]), lambda model, x, y: x + 0.1 * step, ThreatModel("l2", 0.1))
    with pytest.raises(ValueError, match=r"l2 distance to the clean image is up to 0\.102"):
        evaluate(Channel(), case([0.1]), lambda model, x, y: x + 0.102 * step, ThreatModel("l2", 0.1))


def explode(model, pixels, labels):
    raise AssertionError("the attack must not start")


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        ((torch.rand(4, 3, 8, 8), torch.tensor([0, 5, 5, -1])), ValueError, r"3 of 4 labels .* -1 \(1 x\), 5 \(2 x\)"),
        ((torch.rand(0, 3, 8, 8), torch.zeros(0).long()), ValueError, "empty"),
        ((torch.randn(4, 3, 8, 8), torch.zeros(4).long()), ValueError, "look normalised"),
        ((torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4).long()), TypeError, "float pixels"),
        ((torch.rand(4, 3, 8, 8), torch.zeros(4)), TypeError, "integer tensor of class indices"),
        ((torch.rand(4, 3, 8, 8), torch.zeros(3).long()), ValueError, "one class index an image"),
        ((torch.rand(4, 3, 8, 8),), ValueError, "two tensors"),
        (["image.png"], TypeError, "states no preprocessing"),
    ],
)
def test_bad_data_is_refused_before_the_attack(dataset, error, message):
    with pytest.raises(error, match=message):
        evaluate(Channel(), dataset, explode)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threat_model": None}, "`threat_model` is required"),
        ({"attack": "apgd"}, "'autoattack', 'pgd', a PGD, a callable or a list of these, got 'apgd'"),
        ({"attack": []}, "empty list"),
        ({"attack": PGD(ThreatModel("linf", 0.02))}, "attacks under Linf, eps = 0.02, the evaluation under Linf"),
        ({"attack": PGD(LINF, loss="targeted")}, "classes to reach"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_samples": 0}, "max_samples"),
        ({"max_samples": 1, "sample_indices": [0]}, "not both"),
        ({"sample_indices": []}, "is empty"),
        ({"sample_indices": [0, 2]}, r"must be in 0 \.\. 1, got 0 \.\. 2"),
        ({"sample_indices": [1, 1]}, "duplicates"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(Channel(), case([0.1, 0.1]), **{"attack": explode, **options})
    with pytest.raises(TypeError, match="must be a ThreatModel"):
        evaluate(Channel(), case([0.1]), threat_model=8 / 255)


class NanModel(nn.Module):
    def forward(self, pixels):
        return pixels[:, :, 0, 0] * torch.nan


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Flatten(0), "must return logits N x K"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 1)), "K >= 2"),
        (NanModel(), "NaN for 2 of 2 clean images"),
    ],
)
def test_bad_models_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        evaluate(model, case([0.1, 0.1]), explode)


def test_subset_is_stratified_seeded_and_recorded():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    pixels = torch.rand(100, 3, 8, 8)
    run = [evaluate(Channel(), (pixels, labels), max_samples=20, seed=seed) for seed in (0, 0, 1)]
    assert [(labels[run[0].sample_indices] == k).sum().item() for k in range(3)] == [12, 6, 2]
    assert run[0].sample_indices == run[1].sample_indices != run[2].sample_indices
    assert run[0].dataset_size == 100 and run[0].natural.total == 20 and run[2].seed == 1
    again = evaluate(Channel(), (pixels, labels), sample_indices=run[2].sample_indices)
    assert again.robust_correct == run[2].robust_correct
    assert evaluate(Channel(), (pixels, labels), max_samples=1000).natural.total == 100
    # Labels of images that are not used do not matter.
    assert evaluate(Channel(), (pixels[:2], torch.tensor([0, 77])), sample_indices=[0]).natural.total == 1


class Net(nn.Module):
    """BatchNorm, dropout and an output object, as transformers models have them."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten())
        self.head = nn.Linear(144, 4)

    def forward(self, pixels):
        return SimpleNamespace(logits=self.head(self.body(pixels)))


def test_model_and_random_state_are_left_as_they_were():
    torch.manual_seed(0)
    model = Net().train()
    model.body[1].eval()
    model.body[0].weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def greedy(view, x, y):
        """Draws from the global states and leaves the model in training mode, as some libraries do."""
        view.train()
        noise = torch.rand_like(x) + torch.from_numpy(np.random.rand(*x.shape)).float() + random.random()
        return (x + (noise - 1.5).clamp(-0.03, 0.03)).clamp(0, 1)

    dataset = torch.rand(10, 3, 8, 8), torch.randint(0, 4, (10,))
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with torch.no_grad():
        reports = [evaluate(model, dataset, [greedy, PGD(LINF, steps=2)]) for _ in range(2)]

    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1]) and random.getstate() == before[2]
    assert reports[0].robust_correct == reports[1].robust_correct
    assert model.training and model.body[3].training and not model.body[1].training
    assert not model.body[0].weight.requires_grad and model.head.weight.requires_grad
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight)) and model.head.bias.grad is None
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        accuracy = (model.eval()(dataset[0]).logits.argmax(1) == dataset[1]).float().mean()
    assert reports[0].natural_accuracy == pytest.approx(accuracy.item())


def test_restored_after_an_error():
    model = Net().train()
    with pytest.raises(AssertionError, match="must not start"):
        evaluate(model, (torch.rand(40, 3, 8, 8), torch.randint(0, 4, (40,))), explode)
    assert model.training and model.head.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).to(dtype)
    dataset = torch.rand(6, 3, 8, 8), torch.randint(0, 4, (6,))
    report = evaluate(model, dataset, device="cpu")
    assert report.natural.total == 6 and model[1].weight.dtype == dtype


class WithRoutes(nn.Module):
    """Stands in for an AutoLoRa model: its natural route answers the opposite of its robust one."""

    def __init__(self):
        super().__init__()
        self.threat_model = ThreatModel("linf", 0.01)
        self.preprocessing = Preprocessing((8, 8), (0.4,) * 3, (0.2,) * 3, crop_pct=1.0)

    def pixel_space(self, route=None):
        sign = {"robust": 1, "natural": -1}[route]
        return nn.Sequential(Normalize(self.preprocessing), Signed(sign))


class Signed(nn.Module):
    def __init__(self, sign):
        super().__init__()
        self.sign = sign

    def forward(self, normalised):
        return self.sign * normalised[:, :, 0, 0]


def test_routes_and_threat_model_of_the_model():
    model = WithRoutes()
    robust = evaluate_robustness(model, case([0.1, 0.1]), attack="pgd", progress=False)
    natural = evaluate_robustness(model, case([0.1, 0.1]), attack="pgd", route="natural", progress=False)
    assert (robust.natural_accuracy, robust.route, str(robust.threat_model)) == (1, "robust", "Linf, eps = 0.01")
    assert (natural.natural_accuracy, natural.route) == (0, "natural")
    with pytest.raises(ValueError, match="8 x 8 pixels"):
        evaluate(model, case([0.1], size=9))


class Images(torch.utils.data.Dataset):
    """8-bit images of class 0 or 1, read from arrays."""

    targets = (0, 1, 0, 1)

    def __len__(self):
        return 4

    def __getitem__(self, index):
        from PIL import Image

        array = np.full((8, 8, 3), 100, np.uint8)
        array[..., self.targets[index]] = 200
        array[:, 4:] = 0
        return Image.fromarray(array), self.targets[index]


def test_image_data_sets():
    model = WithRoutes()
    report = evaluate_robustness(model, Images(), attack="pgd", batch_size=3, progress=False)
    assert report.natural_accuracy == report.robust_accuracy == 1
    # The augmentation of a training set is not used: flipped images of class 1 would be misclassified.
    augmented = as_pixel_dataset(Images(), model.preprocessing, augmentation="crop-flip")
    assert evaluate_robustness(model, augmented, attack="pgd", progress=False).natural_accuracy == 1
    plain = as_pixel_dataset(Images(), model.preprocessing)
    assert evaluate(Channel(), plain, sample_indices=[1, 2]).natural_correct == [True, True]


class Masked(nn.Module):
    """Answers correctly but gives no gradient."""

    def forward(self, pixels):
        return pixels[:, :, 0, 0].detach().mul(10).round()


class Noisy(nn.Module):
    def forward(self, pixels):
        return pixels[:, :, 0, 0] + torch.rand(len(pixels), 3) * 0.01


class Probabilities(nn.Module):
    def forward(self, pixels):
        return pixels[:, :, 0, 0].softmax(1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Masked(), "gradient is exactly zero or not finite for 2 of 2 clean images"),
        (Noisy(), "From pass to pass the logits of 2 of 2 images change"),
        (Probabilities(), "look like probabilities"),
    ],
)
def test_suspicious_models_are_reported(model, message):
    report = evaluate(model, case([0.4, 0.4]))
    assert sum(message in text for text in report.warnings) == 1
    clean = evaluate(Channel(), case([0.4] * 200))
    assert [text for text in clean.warnings if "training signal" not in text] == []


def test_progress_bar(capsys):
    evaluate_robustness(Channel(), case([0.1] * 4), LINF, "pgd")
    assert "PGD-10" in capsys.readouterr().err
    evaluate(Channel(), case([0.1] * 4))
    assert capsys.readouterr().err == ""
