"""A first pass in bfloat16: it may only break what the model itself says is broken, and replaces no attack."""

import pytest
import torch
import torch.nn.functional as F
from test_evaluation_robustness import Channel, case
from tiny_models import MODELS, change_everything, pixels

from autolora_hf import PGD, RobustnessReport, ThreatModel, evaluate_robustness
from autolora_hf.evaluation.attack_list import FIRST_PASS, FirstPass
from autolora_hf.hub.claims import rebuild_attack


LINF = ThreatModel("linf", 0.5 / 255)


@pytest.fixture(scope="module")
def model():
    """Some images can be broken and some cannot."""
    model = MODELS["timm_resnet"].adapted()
    change_everything(model)
    return model


@pytest.fixture(scope="module")
def data(model):
    images = pixels(14)
    with torch.no_grad():
        labels = model.pixel_space()(images).argmax(1)
    labels[0] = (labels[0] + 1) % 4
    return images, labels


def evaluate(model, data, attack, **options):
    return evaluate_robustness(model, data, LINF, attack, progress=False, batch_size=16, **options)


@pytest.mark.slow
def test_the_rest_gets_the_whole_attack(model, data):
    plain, quick = evaluate(model, data, "autoattack"), evaluate(model, data, [FIRST_PASS, "autoattack"])
    assert plain.protocol == quick.protocol == "autoattack" and quick.publishable
    first, *others = quick.attacks
    assert first.name == "PGD-10 in bfloat16" and [row.name for row in others] == [row.name for row in plain.attacks]
    assert 0 < first.broken < first.attacked == 13
    assert others[0].attacked == 13 - first.broken
    # More attacks can only break more.
    assert all(before >= after for before, after in zip(plain.robust_correct, quick.robust_correct, strict=True))
    assert plain.natural_correct == quick.natural_correct
    assert quick.attack == "PGD-10 in bfloat16 + " + plain.attack


def test_the_model_judges(model, data, monkeypatch):
    """What only the copy takes for broken is not."""
    found = []

    def harmless(self, network, images, labels):
        found.append(self.copy)
        return images

    monkeypatch.setattr(FirstPass, "__call__", harmless)
    report = evaluate(model, data, [FIRST_PASS, PGD(LINF)])
    assert report.attacks[0].broken == 0 and found
    assert report.robust_correct == evaluate(model, data, PGD(LINF)).robust_correct
    images, _ = data
    logits = found[0](images)
    assert next(found[0].parameters()).dtype == torch.bfloat16
    assert not torch.equal(logits, model.pixel_space()(images))
    assert F.cosine_similarity(logits, model.pixel_space()(images)).min() > 0.98


def test_the_report_can_be_repeated(model, data, tmp_path):
    report = evaluate(model, data, [FIRST_PASS, "pgd"])
    report.save(tmp_path / "report.json")
    loaded = RobustnessReport.load(tmp_path / "report.json")
    assert loaded.attack_settings[0] == {"kind": FIRST_PASS}
    attacks = [rebuild_attack(settings, loaded.threat_model) for settings in loaded.attack_settings]
    again = evaluate(model, data, attacks)
    assert again.robust_correct == report.robust_correct and again.attack == report.attack


def test_it_resumes(model, data, tmp_path):
    first = evaluate(model, data, [FIRST_PASS, "pgd"], checkpoint_dir=tmp_path)
    again = evaluate(model, data, [FIRST_PASS, "pgd"], checkpoint_dir=tmp_path)
    assert again.robust_correct == first.robust_correct
    with pytest.raises(ValueError, match="attacks"):
        evaluate(model, data, "pgd", checkpoint_dir=tmp_path)


@pytest.mark.parametrize("attack", [FIRST_PASS, ["pgd", FIRST_PASS], [FIRST_PASS, FIRST_PASS, "pgd"]])
def test_only_before_other_attacks(model, data, attack):
    with pytest.raises(ValueError, match=r"put it first and once, for instance `attack=\['pgd-bf16', 'autoattack'\]`"):
        evaluate(model, data, attack)


def test_other_modules_are_refused():
    with pytest.raises(ValueError, match="for an AutoLoraModel only, got Channel"):
        evaluate_robustness(Channel(), case([0.1]), LINF, [FIRST_PASS, "pgd"])
