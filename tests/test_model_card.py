"""Model cards: valid metadata, figures only from measurements, names that cannot break the page."""

import dataclasses
import re
from dataclasses import asdict

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from tiny_models import MODELS, MODES, change_everything, pixels

from autolora_hf import PGD, ThreatModel, evaluate_robustness, load_autolora_model
from autolora_hf.evaluation import Accuracy
from autolora_hf.evaluation.findings import Finding as Diagnostic
from autolora_hf.hub.model_card import inline, rename_card, reports_of, write_model_card
from autolora_hf.training.diagnosis import Finding


THREAT = ThreatModel("linf", 1 / 255)
STANDARD = {"protocol": "autoattack", "attack": "AutoAttack (standard): APGD-CE, APGD-T"}


def measured(model, count=8, **changes):
    """A report of a few PGD steps; `changes` may give it another protocol."""
    labels = torch.arange(count) % model.num_classes
    report = evaluate_robustness(model, (pixels(count), labels), THREAT, PGD(THREAT, steps=2), progress=False)
    return dataclasses.replace(report, **changes)


def new_model(name="timm_resnet", mode="adapter", **config):
    model = MODELS[name].adapted(mode=mode, **config)
    change_everything(model)
    model.threat_model = THREAT
    return model


def text_of(folder):
    return (folder / "README.md").read_text()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_metadata_of_every_kind(tmp_path, name, mode):
    model = new_model(name, mode)
    model.label_names = ["ant", "bee", "cat", "dog"]
    report = measured(model, **STANDARD)
    model.add_result(report)
    model.save_pretrained(tmp_path)
    write_model_card(tmp_path, model, name="alice/robust", license="mit", tags=["insects"])
    card = ModelCard.load(tmp_path / "README.md")
    library = "peft" if mode == "adapter" else name.split("_")[0].replace("hf", "transformers")
    assert card.data.library_name == library
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.license == "mit"
    assert {"adversarial-robustness", "autolora", "insects"} <= set(card.data.tags)
    natural, robust = card.data.eval_results
    assert natural.metric_value == report.natural_accuracy and robust.metric_value == report.robust_accuracy
    assert natural.metric_name == "Natural accuracy (8 images)"
    assert robust.metric_name == "Robust accuracy (Linf, eps = 1/255, AutoAttack (standard), 8 images)"
    assert robust.metric_args["eps"] == THREAT.eps and robust.metric_args["norm"] == "linf"
    assert robust.metric_args["confidence_interval_95"] == [report.robust.low, report.robust.high]
    # What is written is what huggingface-hub reads back.
    block = yaml.safe_load(text_of(tmp_path).split("---")[1])
    assert model_index_to_eval_results(block["model-index"]) == ("robust", card.data.eval_results)
    assert "(ant, bee, cat, dog)" in card.text
    assert 'load_autolora_model("alice/robust"' in card.text
    assert "autolora verify alice/robust --data PATH" in card.text
    assert "@@" not in card.text and "None" not in card.text and "{{" not in card.text


def test_robust_accuracy_in_the_metadata_is_autoattack(tmp_path):
    """PGD is a training signal: the table shows it as such, the metadata do not have it."""
    model = new_model()
    model.add_result(measured(model))
    model.save_pretrained(tmp_path)
    card = ModelCard.load(write_model_card(tmp_path, model))
    assert [result.metric_name for result in card.data.eval_results] == ["Natural accuracy (8 images)"]
    assert "There is no AutoAttack among these" in card.text and "PGD-2" in card.text

    model.add_result(measured(model, **STANDARD))
    card = ModelCard.load(write_model_card(tmp_path, model))
    assert [result.metric_name.split(" (")[0] for result in card.data.eval_results] == [
        "Natural accuracy",
        "Robust accuracy",
        "Natural accuracy",
    ]
    assert "There is no AutoAttack" not in card.text and "upper bounds" in card.text


def test_a_repeated_measurement_is_one_measurement(tmp_path):
    """The test after a training and the release of what it saved measure the same; the card has it once."""
    model = new_model("timm_resnet", "full")
    report = measured(model, **STANDARD)
    model.add_result(report)
    model.save_pretrained(tmp_path / "trained")
    loaded = load_autolora_model(tmp_path / "trained")
    attacks = [dataclasses.replace(attack, seconds=attack.seconds + 1) for attack in report.attacks]
    loaded.add_result(dataclasses.replace(report, seconds=report.seconds + 4, attacks=attacks))
    assert [found.seconds for found in reports_of(loaded)] == [report.seconds + 4]
    loaded.add_result(dataclasses.replace(report, seed=1))
    assert [found.seed for found in reports_of(loaded)] == [0, 1]


def test_no_measurement_no_claim(tmp_path):
    model = new_model()
    model.save_pretrained(tmp_path)
    card = ModelCard.load(write_model_card(tmp_path, model))
    assert "makes no claim about accuracy" in card.text
    assert card.data.eval_results is None and "model-index" not in text_of(tmp_path)


def test_results_travel_with_the_weights_they_belong_to(tmp_path, caplog):
    model = new_model("hf_vit")
    report = measured(model, **STANDARD)
    model.add_result(report)
    model.save_pretrained(tmp_path / "first")
    loaded = load_autolora_model(tmp_path / "first", base_model=MODELS["hf_vit"].fresh())
    assert reports_of(loaded) == [report]
    loaded.save_pretrained(tmp_path / "again")
    again = load_autolora_model(tmp_path / "again", base_model=MODELS["hf_vit"].fresh())
    assert reports_of(again) == [report]

    change_everything(again, seed=9)
    caplog.clear()
    again.save_pretrained(tmp_path / "changed")
    assert "1 of 1 measured results belong to other weights" in caplog.text
    changed = load_autolora_model(tmp_path / "changed", base_model=MODELS["hf_vit"].fresh())
    assert changed.results == []
    assert "makes no claim" in write_model_card(tmp_path / "changed", again).read_text()
    # On another backbone the figures do not hold either.
    assert load_autolora_model(tmp_path / "first", base_model=MODELS["hf_vit"].fresh(seed=1)).results == []


def test_only_the_deployed_route_is_published():
    model = new_model()
    report = dataclasses.replace(measured(model), route="natural")
    with pytest.raises(ValueError, match="Only results of the deployed route"):
        model.add_result(report)


def test_names_of_strangers_cannot_break_the_page(tmp_path):
    evil = '<script>alert(1)</script>| {{ 7 * 7 }} {% raw %}\n# heading\x1b[31m `code` [link](http://x) "---"'
    model = new_model()
    with pytest.raises(ValueError, match=r"label_names\[0\] must be a text without control characters"):
        model.label_names = [evil, "b", "c", "d"]
    model.label_names = [evil.replace("\x1b", ""), "b", "c", "d"]
    report = measured(model, **STANDARD)
    # Reports refuse line breaks too.
    report.dataset["name"] = printable = "".join(char for char in evil if char.isprintable())
    model.add_result(report)
    model.save_pretrained(tmp_path)
    write_model_card(tmp_path, model, figures={evil: "picture.png"}, comparisons={evil: report})
    card = ModelCard.load(tmp_path / "README.md")
    assert r"7 \* 7" in card.text and "\x1b" not in card.text
    assert not re.search(r"(?<!\\)<script", card.text)
    assert not re.search(r"^# heading", card.text, re.MULTILINE)
    assert card.data.eval_results[0].dataset_name == printable
    # One row a comparison, with as many cells as the head of the table.
    rows = [line for line in card.text.splitlines() if "AutoAttack" in line and line.startswith("|")]
    assert len(rows) == 2 and {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {5}
    assert inline("a_b*c") == r"a\_b\*c" and inline("two\nlines") == "two lines"


def card_of_plan(tmp_path, plan):
    """The card of a model that was saved with a plan and loaded again, as one from a stranger."""
    model = new_model("timm_vit", "full")
    model.training_plan = plan
    model.save_pretrained(tmp_path)
    return ModelCard.load(write_model_card(tmp_path, load_autolora_model(tmp_path)))


def test_warnings_of_the_training_are_listed(tmp_path):
    found = [
        Finding("natural_backbone", 0, "It is a *natural* backbone."),
        Finding("one_class", 3.5, "It has collapsed. <b>Try</b> a lower `learning_rate` | eps."),
    ]
    warnings = [asdict(finding) for finding in found]
    plan = {"epochs": 4, "warnings": warnings, "repair_warnings": warnings[:1], "repair_environment": {"torch": "2"}}
    text = card_of_plan(tmp_path, plan).text
    training = text[text.index("## Training") :]
    table, _, listed = training.partition("Warnings during training:")
    assert "| epochs | 4 |" in table and "warnings" not in table and "repair" not in table
    assert listed.strip().splitlines() == [
        r"- Epoch 0: It is a \*natural\* backbone.",
        r"- Epoch 3.5: It has collapsed. \<b\>Try\</b\> a lower \`learning\_rate\` \| eps.",
        r"- Epoch 0: It is a \*natural\* backbone.",
    ]


@pytest.mark.parametrize("warnings", [None, [], {}, "x", 3, [None], ["x"], [{}], [{"epoch": 1}], [{"message": [1]}]])
def test_a_plan_without_warnings_has_no_list_of_them(tmp_path, warnings):
    text = card_of_plan(tmp_path, {"epochs": 4, "warnings": warnings}).text
    assert text.rstrip().endswith("| epochs | 4 |")


@pytest.mark.parametrize(
    "plan",
    [
        {"warnings": [{"epoch": ["x"], "message": "# evil\u2028<script>| {{ 7 * 7 }}"}]},
        {"warnings": [{"epoch": True, "message": "<script>"}, {"epoch": 10**15, "message": "- - -"}]},
        {"training_data": "x"},
        {"training_data": {"kind": "hub"}},
        {"training_data": {"kind": "hub", "name": [1]}},
        {"environment": "x", "extraction": 3, "halving_checkpoints": [{"a": None}]},
    ],
)
def test_the_plan_of_a_stranger_cannot_break_the_page(tmp_path, plan):
    text = card_of_plan(tmp_path, plan).text
    assert not re.search(r"(?<!\\)<script", text) and not re.search(r"^# evil", text, re.MULTILINE)
    assert len(re.findall(r"^## Training$", text, re.MULTILINE)) == 1


def test_a_path_of_this_machine_stays_here(tmp_path):
    model = new_model()
    model.backbone["name_or_path"] = str(tmp_path / "secret" / "backbone")
    model.save_pretrained(tmp_path / "model")
    card = write_model_card(tmp_path / "model", model).read_text()
    assert str(tmp_path) not in card and "backbone" in card
    assert "base_model" not in ModelCard(card).data.to_dict()


@pytest.mark.parametrize(
    ("source", "base"),
    [("resnet50", "timm/resnet50.a1_in1k"), ("google/vit-base-patch16-224", "google/vit-base-patch16-224")],
)
def test_the_backbone_on_the_hub(tmp_path, source, base):
    for mode, relation in (("adapter", "adapter"), ("full", "finetune")):
        model = new_model("timm_resnet" if source == "resnet50" else "hf_vit", mode)
        model.backbone["name_or_path"] = source
        data = ModelCard.load(write_model_card(tmp_path, model)).data.to_dict()
        assert data["base_model"] == base and data["base_model_relation"] == relation


def test_data_of_the_hub_are_named(tmp_path):
    model = new_model()
    report = measured(model, **STANDARD)
    report.dataset.update(name="org/birds", kind="hub", config="small", split="test", revision="0123abc")
    model.add_result(report)
    card = ModelCard.load(write_model_card(tmp_path, model))
    assert card.data.datasets == ["org/birds"]
    result = card.data.eval_results[0]
    assert (result.dataset_type, result.dataset_config, result.dataset_split) == ("org/birds", "small", "test")
    assert result.dataset_revision == "0123abc"
    assert "--data PATH" not in card.text


def test_renaming_for_the_hub(tmp_path):
    folder = tmp_path / "here"
    model = new_model("timm_vit", "full")
    model.add_result(measured(model, **STANDARD))
    model.save_pretrained(folder)
    write_model_card(folder, model)
    assert 'load_autolora_model("here")' in text_of(folder) and "local-dir:here" in text_of(folder)
    rename_card(folder, "alice/there")
    write_model_card(tmp_path, model, name="alice/there")
    assert text_of(folder) == text_of(tmp_path)
    rename_card(folder, "alice/there")
    assert text_of(folder) == text_of(tmp_path)


def test_intervals_are_in_the_table(tmp_path):
    model = new_model()
    accuracy = Accuracy.from_counts(90, 100)
    many = {"sample_indices": list(range(100)), "natural_correct": [True] * 90 + [False] * 10}
    report = measured(model, **STANDARD, **many, natural=accuracy, robust=accuracy)
    report.robust_correct, report.sample_digests = report.natural_correct, ["0" * 12] * 100
    report.dataset_size = 100
    # Those of the eight images that were really measured.
    report.labels = report.natural_predicted = report.robust_predicted = []
    report.natural_confidence = report.robust_confidence = []
    model.add_result(report)
    assert "| this model | 90.0 [82.4, 95.1] | 90.0 [82.4, 95.1] |" in write_model_card(tmp_path, model).read_text()


def test_the_diagnostics_are_summed_up(tmp_path):
    model = new_model()
    findings = [
        Diagnostic("zero gradients", "passed", "None."),
        Diagnostic("black box", "not run", "No images."),
        Diagnostic("random noise", "failed", "It is stronger."),
    ]
    report = measured(model, **STANDARD, findings=findings)
    model.add_result(report)
    text = write_model_card(tmp_path, model).read_text()
    assert (
        "Diagnostics of gradient masking: 1 of 3 checks passed; black box was not run; random noise failed.\n" in text
    )
