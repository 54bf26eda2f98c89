"""The quickstart: shipped backbone, digits, and a small run of the whole journey."""

import json

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from autolora_hf import load_autolora_model
from autolora_hf.backbones import SHIPPED, load_backbone
from autolora_hf.hub.model_card import reports_of
from autolora_hf.quickstart import NATURAL_MODEL, QuickstartSettings, load_digits, run_quickstart


def test_digits_are_balanced_and_splits_disjoint():
    digits = load_digits()
    assert [len(digits["train"]), len(digits["test"])] == [4000, 1000]
    for split, count in (("train", 400), ("test", 100)):
        assert np.bincount(digits[split]["label"]).tolist() == [count] * 10
    images = {split: {np.asarray(image).tobytes() for image in digits[split]["image"]} for split in digits}
    assert not images["train"] & images["test"]


def test_shipped_backbone_is_small_and_says_how_it_was_made():
    folder = SHIPPED["quickstart"]
    assert (folder / "model.safetensors").stat().st_size < 2_000_000
    provenance = json.loads((folder / "PROVENANCE.json").read_text())
    backbone = load_backbone("quickstart")
    parameters = sum(parameter.numel() for parameter in backbone.parameters())
    assert provenance["parameters"] == parameters and 300_000 <= parameters <= 500_000
    assert provenance["measured"]["samples"] == 10_000
    assert provenance["measured"]["pgd20_accuracy"] > 0.7
    assert "pretrain_quickstart_backbone.py" in provenance["command"]


@pytest.mark.parametrize("settings", [{"train_images": 10}, {"test_images": 5000}])
def test_settings_out_of_range(settings):
    with pytest.raises(ValueError, match="must be between"):
        QuickstartSettings(**settings)


def test_whole_journey_in_small(tmp_path):
    settings = QuickstartSettings(epochs=2, train_images=100, test_images=10)
    result = run_quickstart(tmp_path / "run", settings)
    own, natural, *on_all_digits = result["reports"].values()
    assert own.protocol == natural.protocol == "autoattack"
    assert own.sample_indices == natural.sample_indices
    assert len(own.sample_indices) == 10
    assert [(report.protocol, len(report.sample_indices)) for report in on_all_digits] == [("custom", 1000)] * 3

    folder = tmp_path / "run"
    model = load_autolora_model(folder)
    assert model.label_names == [str(digit) for digit in range(10)]
    saved, on_all = reports_of(model)
    assert len(on_all.sample_indices) == 1000 and not on_all.publishable
    assert saved.dataset["kind"] == "quickstart" and saved.dataset["split"] == "test"
    assert saved.natural == own.natural and saved.robust_correct == own.robust_correct
    # The report is about the model that was saved.
    pixels = torch.stack([_pixels(load_digits()["test"][index]["image"]) for index in saved.sample_indices])
    labels = torch.tensor([load_digits()["test"][index]["label"] for index in saved.sample_indices])
    with torch.no_grad():
        assert (model.pixel_space()(pixels).argmax(1) == labels).tolist() == saved.natural_correct

    twin = load_autolora_model(folder / NATURAL_MODEL)
    assert twin.training_plan["objective"] == "natural"
    assert reports_of(twin)[0].robust_correct == natural.robust_correct

    card = ModelCard.load(folder / "README.md")
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values == {
        "Natural accuracy (10 images)": own.natural_accuracy,
        "Robust accuracy (Linf, eps = 0.1, AutoAttack (standard), 10 images)": own.robust_accuracy,
        "Natural accuracy (1,000 images)": on_all.natural_accuracy,
    }
    assert f"autolora quickstart --mode {settings.mode} --epochs 2" in card.text
    for picture in ("adversarial_examples.png", "training_curves.png"):
        assert picture in card.text
        with Image.open(folder / picture) as image:
            assert min(image.size) > 500
    page = (folder / "report.html").read_text()
    assert f"{100 * own.robust_accuracy:.1f}" in page and page.count("data:image/png;base64,") >= 5
    assert len(own.findings) == 12 and on_all.findings == []
    assert not [path for path in folder.rglob("*") if path.suffix in (".pt", ".pth", ".bin", ".pkl")]


def _pixels(image):
    return torch.from_numpy(np.array(image)).float().div(255).expand(3, -1, -1)
