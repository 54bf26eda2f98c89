"""Zero-shot classifiers of image towers."""

import pytest
import torch
import torch.nn.functional as F
from tiny_towers import WIDTH, adapted, pictures, pixels, save_with_processor, tokenizer, whole_clip

from autolora_hf import ThreatModel, config_for, evaluate_robustness, get_autolora_model
from autolora_hf.evaluation import ZeroShotClassifier, class_embeddings


NAMES = ["cat", "dog", "car"]
TEMPLATES = ("a photo of a {}", "a blurry photo of a {}")


@pytest.fixture(scope="module")
def clip():
    return whole_clip()


@pytest.fixture(scope="module")
def classifier(clip, tmp_path_factory):
    folder = save_with_processor(clip, tmp_path_factory.mktemp("clip"))
    model = get_autolora_model(folder, config_for("fare"), tower=True, threat_model=ThreatModel("linf", 4 / 255))
    return ZeroShotClassifier(model, class_embeddings(clip, tokenizer(), NAMES, TEMPLATES))


def test_class_embeddings(clip):
    found = class_embeddings(clip, tokenizer(), NAMES, TEMPLATES)
    assert found.shape == (3, WIDTH)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    rows = []
    for template in TEMPLATES:
        tokens = tokenizer()([template.replace("{}", name) for name in NAMES], padding=True, return_tensors="pt")
        text = {key: tokens[key] for key in ("input_ids", "attention_mask")}
        rows.append(F.normalize(clip.get_text_features(**text).pooler_output, dim=1))
    torch.testing.assert_close(found, F.normalize(sum(rows), dim=1).detach(), rtol=1e-4, atol=1e-5)
    assert not found.requires_grad


def test_the_logits_are_those_of_clip(clip, classifier):
    tokens = tokenizer()([TEMPLATES[0].replace("{}", name) for name in NAMES], padding=True, return_tensors="pt")
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3)))
    with torch.no_grad():
        output = clip(
            pixel_values=(pixels() - mean) / std,
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
        )
        scale = clip.logit_scale.exp().item()
        embeddings = class_embeddings(clip, tokenizer(), NAMES, TEMPLATES[:1])
        ours = ZeroShotClassifier(classifier.tower.model, embeddings, scale=scale)
        torch.testing.assert_close(ours(pixels()), output.logits_per_image, rtol=1e-3, atol=1e-4)
    assert ZeroShotClassifier(classifier.tower.model, embeddings).scale == 100


def test_it_can_be_attacked_with_autoattack(classifier):
    answers = classifier(pixels(12)).argmax(1)
    report = evaluate_robustness(classifier, (pixels(12), answers), attack="autoattack", progress=False)
    assert report.threat_model == ThreatModel("linf", 4 / 255)
    assert report.num_classes == 3
    assert report.natural.value == 1
    assert report.robust.value < 1
    assert not report.warnings or "gradient masking" not in " ".join(report.warnings)


def test_it_reads_images_as_the_tower_does(classifier):
    data = pictures(12).add_column("label", [0, 1, 2] * 4)
    report = evaluate_robustness(classifier, data, attack="pgd", progress=False)
    assert report.robust.total == 12
    assert report.natural.value >= report.robust.value


def test_errors(clip, classifier):
    model = adapted()
    with pytest.raises(ValueError, match="must be K x 12"):
        ZeroShotClassifier(model, torch.rand(3, 16))
    with pytest.raises(ValueError, match="at least two classes"):
        ZeroShotClassifier(model, torch.rand(1, WIDTH))
    with pytest.raises(ValueError, match="finite"):
        ZeroShotClassifier(model, torch.full((3, WIDTH), float("nan")))
    with pytest.raises(ValueError, match="made of an image tower, got CLIPVisionModelWithProjection"):
        ZeroShotClassifier(model.get_base_model(), torch.rand(3, WIDTH))
    for names, templates, message in (("cat", TEMPLATES, "lists"), ([], TEMPLATES, "lists"), (NAMES, ["a"], "place")):
        with pytest.raises(ValueError, match=message):
            class_embeddings(clip, tokenizer(), names, templates)
    for tower in (model, model.get_base_model()):
        with pytest.raises(ValueError, match="ZeroShotClassifier"):
            evaluate_robustness(tower, (pixels(), torch.zeros(6, dtype=torch.long)), ThreatModel())
