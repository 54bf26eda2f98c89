"""What a report has besides its two accuracies: answers, classes, calibration, curve, corruptions, the other route."""

import contextlib
from dataclasses import dataclass, replace

import pytest
import torch
from tiny_models import MODELS, pixels
from torch import nn

from autolora_hf.attacks import PGD
from autolora_hf.config import ThreatModel
from autolora_hf.evaluation import RobustnessReport, evaluate_robustness
from autolora_hf.evaluation.autoattack import autoattack_components
from autolora_hf.evaluation.corruptions import CORRUPTIONS
from autolora_hf.evaluation.curve import curve_radii
from autolora_hf.evaluation.findings import Finding
from autolora_hf.evaluation.html_report import html_report
from autolora_hf.evaluation.progress import passes_of
from autolora_hf.evaluation.report_text import standard_warnings
from autolora_hf.evaluation.view import AttackView


LINF = ThreatModel("linf", 0.03)


class Channel(nn.Module):
    """Logits of four classes: the first three channels of the first pixel, and one that never wins."""

    def forward(self, x):
        first = x[:, :, 0, 0] * 10
        return torch.cat([first, first.amin(1, keepdim=True) - 1], 1)


def case(gaps, labels, size=16):
    """Images whose first pixel leads by `gaps` in the channel of their label."""
    x = torch.full((len(gaps), 3, size, size), 0.5)
    x[torch.arange(len(gaps)), torch.tensor(labels), 0, 0] += torch.tensor(gaps)
    # No two images are the same.
    x[:, :, 7, 7] = torch.arange(len(gaps))[:, None] / 255
    return x, torch.tensor(labels)


def evaluate(data, attack="pgd", model=None, threat_model=LINF, **options):
    options = {"progress": False, "diagnostics": False, **options}
    return evaluate_robustness(model or Channel(), data, threat_model, attack, **options)


def timeless(report):
    content = report.to_dict()
    content.pop("seconds")
    for row in content["attacks"]:
        row.pop("seconds")
    return content


# ---- answers ----


def test_answers_to_single_images():
    x, labels = case([0.2, 0.01, 0.2, 0.2], [0, 1, 2, 2])
    labels[3] = 0  # wrong when clean: channel 2 leads
    report = evaluate((x, labels))
    assert report.labels == [0, 1, 2, 0] and report.has_answers
    assert report.natural_predicted == [0, 1, 2, 2]
    assert report.robust_correct == [True, False, True, False]
    assert [report.robust_predicted[i] for i in (0, 2, 3)] == [0, 2, 2] and report.robust_predicted[1] != 1
    logits = Channel()(x)
    expected = logits.double().softmax(1).amax(1)
    assert report.natural_confidence == pytest.approx(expected.tolist(), abs=1e-6)
    # What was not broken counts with its clean confidence, what was broken with that of the attack.
    assert report.robust_confidence[0] == report.natural_confidence[0]
    assert report.robust_confidence[1] != report.natural_confidence[1]
    assert report.natural_top5 is None


def test_classes_and_confusions():
    x, labels = case([0.2, 0.01, 0.2, 0.01, 0.2], [0, 0, 1, 1, 1])
    labels[4] = 2
    report = evaluate((x, labels))
    rows = [
        (row.label, row.name, row.natural.correct, row.robust.correct, row.natural.total) for row in report.classes
    ]
    assert rows == [(0, "class 0", 2, 1, 2), (1, "class 1", 2, 1, 2), (2, "class 2", 0, 0, 1)]
    assert report.worst_class.label == 2
    assert report.confusions(under_attack=False) == [[2, 0, 0, 0], [0, 2, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    under_attack = report.confusions()
    assert [sum(row) for row in under_attack] == [2, 2, 1, 0] and under_attack[0][0] == under_attack[1][1] == 1


def test_top_five():
    class Six(nn.Module):
        def forward(self, x):
            return torch.cat([x[:, :, 0, 0], x[:, :, 0, 0] - 1], 1) * 10

    x = torch.full((3, 3, 8, 8), 0.5)
    x[:, 0, 0, 0] = 0.9
    x[:, 1, 0, 0] = 0.1
    report = evaluate((x, torch.tensor([0, 4, 3])), model=Six())
    # Class 4 is the last of six, class 3 the fourth.
    assert report.natural_top5.correct == 2 and report.natural.correct == 1

    class Constant(nn.Module):
        def forward(self, x):
            return torch.zeros(len(x), 7)

    assert evaluate((x, torch.tensor([0, 4, 3])), model=Constant()).natural_top5.correct == 0


def test_class_names_are_recorded():
    tiny = MODELS["timm_resnet"]
    model = tiny.adapted()
    model.label_names = ["ant", "bee", "cat", "dog"]
    report = evaluate((pixels(4), torch.arange(4)), model=model, attack=PGD(LINF, steps=1))
    assert report.class_names == ["ant", "bee", "cat", "dog"] and report.classes[1].name == "bee"


def test_a_report_of_before_has_no_answers(tmp_path):
    report = evaluate(case([0.2, 0.01], [0, 1]))
    content = report.to_dict()
    for name in ("labels", "natural_predicted", "robust_predicted", "natural_confidence", "robust_confidence"):
        content.pop(name)
    for name in ("findings", "curve", "corruptions", "other_route", "natural_top5", "robust_top5", "class_names"):
        content.pop(name)
    old = RobustnessReport.from_dict(content)
    assert not old.has_answers and old.classes == [] and old.worst_class is None
    assert old.calibration() is None and old.corruption_summary is None
    old.save(tmp_path / "old.json")
    assert RobustnessReport.load(tmp_path / "old.json").robust == report.robust


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [0]}, "labels has 1 entries for the 2 of sample_indices"),
        ({"labels": []}, "must be given together"),
        ({"labels": [0, 4]}, "labels has 4, but num_classes is 4"),
        ({"robust_predicted": [0, -1]}, "robust_predicted"),
        ({"natural_confidence": [0.5, 1.5]}, "natural_confidence"),
        ({"findings": [{"name": "x", "outcome": "fine", "sentence": "y", "figures": {}}]}, "outcome"),
        ({"curve": {"attack": "PGD-20", "points": []}}, "curve"),
        ({"corruptions": [{"name": "fog", "severity": 9, "accuracy": None}]}, "corruptions"),
        ({"other_route": {"route": "natural"}}, "other_route"),
    ],
)
def test_damaged_sections_are_refused(change, message):
    content = evaluate(case([0.2, 0.01], [0, 1])).to_dict()
    with pytest.raises(ValueError, match=message):
        RobustnessReport.from_dict({**content, **change})


def test_a_curve_must_grow():
    content = evaluate(case([0.2, 0.01], [0, 1]), curve=[0.01, 0.02]).to_dict()
    content["curve"]["points"].reverse()
    with pytest.raises(ValueError, match="go on by growing eps"):
        RobustnessReport.from_dict(content)


# ---- curve ----


def test_curve_on_a_known_model():
    """An attack of radius r breaks what leads by less than 2 r."""
    x, labels = case([0.05, 0.11, 0.21, 0.33], [0, 1, 2, 0])
    report = evaluate((x, labels), curve=[0.1, 0.03, 0.2])
    assert [point.eps for point in report.curve.points] == [0, 0.03, 0.1, 0.2]
    assert [point.accuracy.correct for point in report.curve.points] == [4, 3, 2, 0]
    expected = (0.03 * (1 + 0.75) / 2 + 0.07 * (0.75 + 0.5) / 2 + 0.1 * (0.5 + 0) / 2) / 0.2
    assert report.curve.expected_robustness == pytest.approx(expected)
    # It changes nothing of the measurement itself.
    assert timeless(replace(report, curve=None)) == timeless(evaluate((x, labels)))


def test_radii():
    assert curve_radii(LINF, False) == []
    shares = [model.eps / LINF.eps for model in curve_radii(LINF, True)]
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4])
    assert max(model.eps for model in curve_radii(ThreatModel("linf", 0.5), True)) == 1
    assert [model.norm for model in curve_radii(ThreatModel("l2", 1), [2, 1])] == ["l2", "l2"]
    for radii, message in (
        ([], "list of radii"),
        ("0.1", "list of radii"),
        (0.1, "list of radii"),
        ([8], "8/255"),
        ([0.1, 0.1], "0.1 twice"),
        ([0], "natural accuracy"),
    ):
        with pytest.raises(ValueError, match=message):
            curve_radii(LINF, radii)


# ---- corruptions ----


def test_corruptions_are_measured_on_all_images():
    x, labels = case([0.45, -0.45], [0, 0])
    report = evaluate((x, labels), corruptions=["brightness", "gaussian_noise"])
    assert [(row.name, row.severity) for row in report.corruptions] == [
        (name, severity) for name in ("brightness", "gaussian_noise") for severity in range(1, 6)
    ]
    assert all(row.accuracy.total == 2 for row in report.corruptions)
    # Brightness keeps the order of the channels.
    assert {row.accuracy.correct for row in report.corruptions[:5]} == {1}
    summary = report.corruption_summary
    assert summary.by_corruption["brightness"] == 0.5
    mean = sum(row.accuracy.value for row in report.corruptions) / 10
    assert summary.mean_accuracy == pytest.approx(mean) and summary.clean_accuracy == 0.5
    again = evaluate((x, labels), corruptions=["brightness", "gaussian_noise"], batch_size=1)
    assert again.corruptions == report.corruptions


@pytest.mark.parametrize(
    ("corruptions", "size", "message"),
    [
        (["fogg"], 16, "Did you mean 'fog'"),
        ("fog", 16, "True, False or a list of names"),
        ([], 16, "True, False or a list of names"),
        (["fog"], 8, "at least 16 x 16"),
    ],
)
def test_corruptions_are_checked_before_any_attack(corruptions, size, message):
    def never(model, x, y):
        raise AssertionError("attacked")

    with pytest.raises(ValueError, match=message):
        evaluate(case([0.2], [0], size), never, corruptions=corruptions)


def test_all_corruptions():
    report = evaluate(case([0.2], [0]), corruptions=True)
    assert [row.name for row in report.corruptions[::5]] == list(CORRUPTIONS)


# ---- routes ----


@pytest.mark.parametrize("key", ["timm_resnet", "timm_vit"])
def test_both_routes(key):
    model = MODELS[key].adapted()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "natural" in name:
                parameter.normal_(std=0.5)
    x = pixels(8)
    labels = model.pixel_space()(x).argmax(1).detach()
    attack = PGD(LINF, steps=3)
    both, robust, natural = (
        evaluate((x, labels), attack, model, route=route) for route in ("both", "robust", "natural")
    )
    assert both.other_route.route == "natural" and both.route == "robust"
    assert (both.other_route.natural, both.other_route.robust) == (natural.natural, natural.robust)
    assert both.natural != natural.natural
    assert timeless(replace(both, other_route=None)) == timeless(robust)


@pytest.mark.parametrize("config", [None, {"natural_route": "none"}])
def test_a_model_with_one_route_has_no_other(config):
    model = Channel() if config is None else MODELS["timm_resnet"].adapted(**config)
    with pytest.raises(ValueError, match="needs a model with two routes"):
        evaluate((pixels(2), torch.tensor([0, 1])), PGD(LINF, steps=1), model, route="both")


# ---- together ----


def test_the_text_has_every_section():
    model = MODELS["timm_resnet"].adapted(num_classes=6)
    x = pixels(6)
    labels = model.pixel_space()(x).argmax(1).detach()
    options = {"curve": [0.01, 0.02], "corruptions": ["contrast"], "route": "both", "diagnostics": True}
    report = evaluate((x, labels), PGD(LINF, steps=2), model, **options)
    text = str(report)
    for part in (
        "natural, top-5",
        "under attack, top-5",
        "route natural, robust",
        "under PGD-20",
        "eps = 0.01",
        "worst class   class",
        f"{100 * report.curve.expected_robustness:.2f} % robust, over radii from 0 to 0.02",
        "expected calibration error",
        "in the mean of 1 corruptions, severities 1, 2, 3, 4, 5",
        "checks of gradient masking passed",
    ):
        assert part in text, part
    plain = str(evaluate(case([0.2], [0])))
    assert "top-5" not in plain and "severities" not in plain and "diagnostics" not in plain


@pytest.mark.parametrize("finished", range(0, 16, 3))
def test_sections_are_resumed(tmp_path, finished):
    """Killed after any number of batches, with curve and corruptions, an evaluation ends with the same report."""
    data = case([0.01, 0.05, 0.2, 0.3], [0, 1, 2, 0])
    options = {"curve": [0.02, 0.1], "corruptions": ["contrast"], "batch_size": 2}
    expected = evaluate(data, **options)

    class Dying(Channel):
        passes = 0

        def forward(self, x):
            if x.requires_grad or not torch.is_grad_enabled():
                type(self).passes += 1
            if type(self).passes > 12 * finished + 2:
                raise KeyboardInterrupt
            return super().forward(x)

    Dying.__name__ = Dying.__qualname__ = "Channel"
    with contextlib.suppress(KeyboardInterrupt):
        evaluate(data, model=Dying(), checkpoint_dir=tmp_path, **options)
    assert timeless(evaluate(data, checkpoint_dir=tmp_path, **options)) == timeless(expected)


def test_sections_may_be_asked_for_later(tmp_path):
    """A finished evaluation gets a curve, corruptions, and other ones, without an attack that it had already."""
    data = case([0.01, 0.05, 0.2, 0.3], [0, 1, 2, 0])
    calls = []

    @dataclass
    class Counted:
        def __call__(self, model, x, y):
            calls.append(len(x))
            return PGD(LINF)(model, x, y)

    asked = [{}, {"curve": [0.02, 0.1]}, {"curve": [0.02, 0.2]}, {"corruptions": ["fog"]}, {"curve": [0.02, 0.1]}, {}]
    for sections in asked:
        found = evaluate(data, attack=Counted(), checkpoint_dir=tmp_path, batch_size=2, **sections)
        assert calls == [2, 2]
        expected = evaluate(data, attack=Counted(), batch_size=2, **sections)
        assert timeless(found) == timeless(expected)
        del calls[2:]


def test_merged_reports_keep_the_answers():
    data = case([0.2, 0.01, 0.2, 0.01], [0, 1, 2, 0])
    whole = evaluate(data, batch_size=2)
    parts = [evaluate(data, batch_size=2, sample_indices=indices) for indices in ([0, 1], [2, 3])]
    merged = RobustnessReport.merged(parts[::-1])
    for name in ("labels", "natural_predicted", "robust_predicted", "natural_confidence", "robust_confidence"):
        assert getattr(merged, name) == getattr(whole, name), name
    with pytest.raises(ValueError, match="cannot be merged"):
        RobustnessReport.merged([parts[0], evaluate(data, sample_indices=[2, 3], curve=[0.1])])


def test_reports_of_other_models_are_not_merged():
    data = case([0.2, 0.01, 0.2, 0.01], [0, 1, 2, 0])
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(768, 4)) for _ in range(2)]
    parts = [evaluate(data, model=networks[n], sample_indices=[2 * n, 2 * n + 1]) for n in range(2)]
    assert parts[0].network_sha256 != parts[1].network_sha256
    with pytest.raises(ValueError, match="differ in `network_sha256`"):
        RobustnessReport.merged(parts)
    with pytest.raises(ValueError, match="no reports"):
        RobustnessReport.merged([])


def test_a_curve_below_the_attacks_is_a_warning():
    data = case([0.01, 0.01, 0.2], [0, 1, 2])
    weak = evaluate(data, lambda model, x, y: x, curve=[0.03, 0.1])
    assert sum("they are too weak" in text for text in weak.warnings) == 1
    assert not any("they are too weak" in text for text in evaluate(data, curve=[0.03, 0.1]).warnings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(robust_correct=[False] * 3), "The verdicts on single images give 2 and 0 right answers"),
        (lambda c: c.update(protocol="autoattack"), "AutoAttack is not among its attacks"),
        (lambda c: c["natural_correct"].reverse(), "wrong when clean are called robust"),
    ],
)
def test_contradictions_are_seen(change, message):
    x, labels = case([0.01, 0.2, 0.2], [0, 1, 2])
    labels[0] = 3
    content = evaluate((x, labels)).to_dict()
    change(content)
    report = RobustnessReport.from_dict(content)
    assert any(message in text for text in standard_warnings(report))
    assert "Impossible figures" in html_report(report)


def test_impossible_accuracies_are_refused():
    content = evaluate(case([0.2, 0.01], [0, 1]), curve=[0.01]).to_dict()
    content["curve"]["points"][1]["accuracy"]["correct"] = 9
    with pytest.raises(ValueError, match=r"curve.points\[1\].accuracy.correct is 9 of 2 images"):
        RobustnessReport.from_dict(content)


def test_the_page_calls_nothing_publishable_without_diagnostics():
    report = evaluate(case([0.2] * 250, [0, 1] * 125))
    report = replace(report, protocol="autoattack", attack_settings=[{"kind": "autoattack"}])
    assert "AutoAttack, without diagnostics" in html_report(report)
    report.findings = [Finding("zero gradients", "passed", "None.")]
    assert "Publishable: AutoAttack" in html_report(report)
    few = evaluate(case([0.2] * 3, [0, 1, 2]))
    few = replace(few, protocol="autoattack", attack_settings=[{"kind": "autoattack"}], findings=report.findings)
    assert "AutoAttack, on few images" in html_report(few)


@pytest.mark.parametrize("loss", ["l2", "cosine"])
def test_attacks_on_embeddings_are_refused(loss):
    with pytest.raises(ValueError, match="for models without classes"):
        evaluate(case([0.2], [0]), PGD(LINF, loss=loss))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_passes_are_those_of_the_library(norm):
    """The progress bar's estimate rests on them."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(75, 5))
    view = AttackView(network)
    x = torch.rand(4, 3, 5, 5)
    threat_model = ThreatModel(norm, {"linf": 1e-4, "l2": 1e-3, "l1": 1e-2}[norm])
    attacks, _ = autoattack_components(threat_model, 5, (5, 5))
    for attack in [*attacks[:3], PGD(threat_model, steps=3, restarts=2)]:
        count = []
        view.on_pass = lambda count=count: count.append(1)
        attack(view, x, network(x).argmax(1))
        assert abs(len(count) - passes_of(attack)) <= 2, attack
