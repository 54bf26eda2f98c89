"""`autolora verify`: what a release claims is measured again, and false claims are found."""

import copy
import json
import re
import shutil

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import IMAGE_SIZE, MODELS, change_everything

from autolora_hf import load_autolora_model
from autolora_hf.attacks import PGD
from autolora_hf.cli import main, verify
from autolora_hf.config import ThreatModel
from autolora_hf.evaluation import Accuracy, RobustnessReport, attack_list, evaluate_robustness
from autolora_hf.evaluation.autoattack import AutoAttackComponent
from autolora_hf.hub.claims import card_problems
from autolora_hf.hub.model_card import write_model_card
from autolora_hf.hub.remeasure import MissingDataError
from autolora_hf.hub.verification import verify_release


TINY = MODELS["timm_resnet"]
IMAGES, CLAIMED = 240, 120


def make_data(model, count=IMAGES, seed=0, size=IMAGE_SIZE, name="digits", wrong=0.15):
    """Noise images that are labelled as the model sees them, but for a share of them; looks like the quickstart's."""
    random = np.random.default_rng(seed)
    array = random.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    with torch.no_grad():
        logits = model.pixel_space("robust")(torch.from_numpy(array).permute(0, 3, 1, 2).float() / 255)
    labels = logits.argmax(1).numpy()
    flipped = random.random(count) < wrong
    labels = np.where(flipped, (labels + 1) % 4, labels)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(i) for i in range(4)])}
    )
    info = datasets.DatasetInfo(features=features, dataset_name=name, builder_name="autolora_hf")
    columns = {"image": list(array), "label": labels.tolist()}
    return datasets.Dataset.from_dict(columns, info=info, split="test")


def make_model(mode="full"):
    model = TINY.adapted(4, mode=mode)
    change_everything(model)
    with torch.no_grad():
        # Noise images all look alike to an untrained network: centre its logits, so that every class occurs.
        random = torch.randint(0, 256, (64, 3, IMAGE_SIZE, IMAGE_SIZE), generator=torch.Generator().manual_seed(5))
        for head in model.heads:
            logits = model.pixel_space("robust")(random / 255)
            head.weight /= logits.std(0)[:, None]
            head.bias.copy_((head.bias - logits.mean(0)) / logits.std(0))
    return model.eval()


@pytest.fixture(scope="module")
def quick_autoattack():
    """A stand-in for AutoAttack, under its name: PGD, which takes a second and not minutes."""

    def components(threat_model, num_classes, image_size, seed=0):
        return [AutoAttackComponent("APGD-CE", threat_model, num_classes, seed)], {}

    def attack(self, model, pixels, labels):
        return PGD(self.threat_model, steps=5, seed=self.seed)(model, pixels, labels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attack_list, "autoattack_components", components)
        patch.setattr(AutoAttackComponent, "__call__", attack)
        yield


@pytest.fixture(scope="module")
def published(tmp_path_factory, quick_autoattack):
    """A release with a result of PGD and one of AutoAttack, its data, and its card."""
    model = make_model()
    model.threat_model = ThreatModel("linf", 0.001)
    data = make_data(model)
    indices = sorted(np.random.default_rng(1).permutation(IMAGES)[:CLAIMED].tolist())
    options = {"sample_indices": indices, "batch_size": 50, "seed": 3, "progress": False}
    attack = PGD(model.threat_model, steps=3, step_size=0.0004, restarts=2, seed=9)
    model.add_result(evaluate_robustness(model, data, attack=attack, **options))
    model.add_result(evaluate_robustness(model, data, **options))
    folder = tmp_path_factory.mktemp("release")
    model.save_pretrained(folder)
    reports = reports_in(folder)
    assert 0.05 < reports[0].robust_accuracy < reports[0].natural_accuracy - 0.1 < 0.85, "the model is not trivial"
    write_card(folder, reports[1])
    return folder, data


@pytest.fixture
def release(published, tmp_path, monkeypatch):
    """A copy to spoil, with the recorded data at hand."""
    folder, data = published
    shutil.copytree(folder, tmp_path / "release")
    monkeypatch.setattr("autolora_hf.quickstart.load_digits", lambda: {"test": data})
    return tmp_path / "release"


def check(folder, dataset=None, **options):
    return verify_release(folder, dataset, **{"progress": False, **options})


def results_in(folder):
    return json.loads((folder / "autolora_config.json").read_text())["results"]


def reports_in(folder):
    return [
        RobustnessReport.from_dict({k: v for k, v in r.items() if k != "weights_sha256"}) for r in results_in(folder)
    ]


def edit(folder, change, which=None):
    """Applies `change` to one result of the record, or to all."""
    path = folder / "autolora_config.json"
    content = json.loads(path.read_text())
    for result in content["results"] if which is None else [content["results"][which]]:
        change(result)
    path.write_text(json.dumps(content))


def keep(folder, *which):
    """Leaves only some results; and the card only if it is about one of them."""
    if 1 not in which:
        (folder / "README.md").unlink()
    path = folder / "autolora_config.json"
    content = json.loads(path.read_text())
    content["results"] = [content["results"][index] for index in which]
    path.write_text(json.dumps(content))


def inflate(count):
    """Declares broken images robust, and makes everything else fit."""

    def change(result):
        pairs = zip(result["natural_correct"], result["robust_correct"], strict=True)
        broken = [index for index, (natural, robust) in enumerate(pairs) if natural and not robust]
        assert len(broken) >= count
        for index in broken[:count]:
            result["robust_correct"][index] = True
        total = len(result["robust_correct"])
        accuracy = Accuracy.from_counts(sum(result["robust_correct"]), total)
        result["robust"] = vars(accuracy).copy()
        result["attacks"][0]["broken"] -= count
        result["attacks"][0]["accuracy"] = accuracy.value

    return change


def write_card(folder, report, **changes):
    threat = {"norm": report.threat_model.norm, "eps": report.threat_model.eps, "attack": report.attack}
    threat |= {"n_examples": report.robust.total, "seed": report.seed}
    threat["confidence_interval_95"] = [report.robust.low, report.robust.high]
    common = {"task_type": "image-classification", "dataset_type": "image-folder", "dataset_name": "digits"}
    values = {"natural": report.natural_accuracy, "robust": report.robust_accuracy, **changes}
    name = changes.get("name", f"Robust accuracy ({report.threat_model}, AutoAttack (standard))")
    metrics = [
        EvalResult(metric_type="accuracy", metric_name="Natural accuracy", metric_value=values["natural"], **common),
        EvalResult(
            metric_type=changes.get("type", "accuracy"),
            metric_name=name,
            metric_value=values["robust"],
            metric_args={**threat, **changes.get("args", {})},
            **common,
        ),
    ]
    table = "| model | natural accuracy | robust accuracy | attack |\n|---|---|---|---|\n"
    for title in ("this model", "natural fine-tuning"):
        shown = {"natural": report.natural_accuracy, "robust": report.robust_accuracy, **changes.get("table", {})}
        shown = shown if title == "this model" else {"natural": 0.99, "robust": 0.0}
        cells = [f"{100 * shown[key]:.1f} [{1.0}, {99.9}]" for key in ("natural", "robust")]
        table += f"| {title} | {cells[0]} | {cells[1]} | AutoAttack |\n"
    data = ModelCardData(model_name="release", eval_results=metrics, license="mit")
    content = f"---\n{data.to_yaml()}\n---\n\n# A model\n\n{table}"
    ModelCard(content)
    (folder / "README.md").write_text(content)


def verdicts(result):
    return [figure.verdict for figure in result.figures]


def check_named(result, title):
    (found,) = [entry for entry in result.checks if entry.title == title]
    return found


# --- honest releases -------------------------------------------------------------------------------------------------


def test_honest_claims_hold_with_the_same_verdict_on_every_image(release):
    result = check(release)
    assert result.holds and verdicts(result) == ["holds"] * 4
    assert all(entry.holds for entry in result.checks)
    for figure in result.figures:
        assert figure.same_images and figure.measured == figure.claimed == figure.expected
        assert (figure.lost, figure.gained, figure.p_value) == (0, 0, 1)
        assert "the same verdict on each of all 120 images" in figure.reason
    text = str(result)
    assert "PGD-3, 2 restarts, Linf, eps = 0.001, 120 images of digits (test)" in text
    assert "AutoAttack (standard)" in text and "Every figure holds (4 measured again)." in text
    assert result.subset_seed is None
    assert "PGD-3, 2 restarts overstates robustness" in result.notes[0]


def test_the_result_as_json(release, tmp_path):
    keep(release, 0)
    result = check(release)
    result.save(tmp_path / "out" / "verification.json")
    content = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert content == result.to_dict() and content["holds"] is True
    assert content["figures"][1]["claimed"]["correct"] == reports_in(release)[0].robust.correct


@pytest.mark.parametrize("mode", ["full", "adapter"])
def test_both_modes(mode, tmp_path):
    """What was measured before saving is what a stranger measures after loading; an adapter belongs to its base."""
    model = make_model(mode)
    data = make_data(model, 60)
    model.add_result(evaluate_robustness(model, data, attack=PGD(model.threat_model, steps=2), progress=False))
    model.save_pretrained(tmp_path)
    base = {"base_model": TINY.fresh(4)} if mode == "adapter" else {}
    result = check(tmp_path, data, **base)
    assert result.holds and all(figure.lost == figure.gained == 0 for figure in result.figures)
    if mode == "adapter":
        assert check_named(result, "backbone").holds
        result = check(tmp_path, data, base_model=TINY.fresh(4, seed=1))
        assert verdicts(result) == ["fails"] * 2 and not check_named(result, "backbone").holds
        assert "backbone with other weights" in result.figures[0].reason
        assert all(figure.measured is None for figure in result.figures)


def test_other_batches_change_the_random_starts_only(release):
    keep(release, 0)
    result = check(release, batch_size=17)
    assert result.holds


# --- false releases --------------------------------------------------------------------------------------------------


def test_an_inflated_robust_accuracy_fails(release):
    edit(release, inflate(12), which=1)
    write_card(release, reports_in(release)[1])  # the card fits
    result = check(release)
    assert all(entry.holds for entry in result.checks)
    assert verdicts(result) == ["holds", "holds", "holds", "fails"] and not result.holds
    figure = result.figures[3]
    assert (figure.lost, figure.gained) == (12, 0) and figure.p_value == pytest.approx(2**-12)
    assert figure.adjusted_p_value == pytest.approx(2 * 2**-12)
    assert "12 were claimed correct and found wrong, 0 the reverse: lower than claimed beyond chance" in figure.reason
    assert "NOT VERIFIED: robust accuracy wrong." in str(result) and "FAILS" in str(result)


def test_a_few_images_are_put_down_to_chance(release):
    keep(release, 1)
    edit(release, inflate(5))
    (release / "README.md").unlink()
    result = check(release)
    assert result.holds and result.figures[1].lost == 5 and 0.05 < result.figures[1].adjusted_p_value < 0.07
    assert re.search(r"not lower beyond chance\. A drop by \d\.\d points would be noticed 4 times in 5", str(result))


def test_claims_that_turn_out_too_low_hold(release):
    keep(release, 1)

    def deflate(result):
        result["robust_correct"] = [False] * CLAIMED
        result["attacks"][0].update(broken=result["natural"]["correct"], accuracy=0.0)
        result["robust"] = vars(Accuracy.from_counts(0, CLAIMED)).copy()

    edit(release, deflate)
    (release / "README.md").unlink()
    result = check(release)
    assert result.holds and result.figures[1].gained > 0 and "nothing can be lower than zero" in str(result)


def test_spoiled_digests_do_not_hide_images(release):
    """An image whose digest is another one is not excused from the comparison."""
    keep(release, 1)

    def change(result):
        inflate(12)(result)
        for index in range(12, 52):
            result["sample_digests"][index] = "0" * 12

    edit(release, change)
    (release / "README.md").unlink()
    result = check(release)
    assert result.figures[1].verdict == "fails" and result.figures[1].same_images
    assert "of which 40 differ in their pixels" in result.figures[1].reason


def test_edited_weights_fail(release):
    weights = load_file(release / "model.safetensors")
    weights["fc.bias"] += 1e-3
    save_file(weights, release / "model.safetensors", metadata={"format": "pt"})
    result = check(release)
    assert not check_named(result, "weights").holds and verdicts(result) == ["fails"] * 4
    assert "measured with other weights" in result.figures[0].reason


def recount(result):
    result["robust"]["correct"] += 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (recount, "robust accuracy counts .* the verdicts image by image are"),
        (lambda r: r["robust"].update(low=r["robust"]["low"] - 0.01), "the interval of robust accuracy"),
        (lambda r: r.update(natural_correct=[True] * CLAIMED), "natural accuracy counts"),
        (lambda r: r.update(sample_digests=[]), "no digests"),
        (lambda r: r.update(num_classes=5), "about 5 classes, the model has 4"),
        (lambda r: r.update(route="natural"), "route 'natural'"),
        (lambda r: r["attacks"][0].update(broken=0), "its attacks broke 0 images"),
        (
            lambda r: r.update(attack="PGD-1000"),
            "called 'PGD-1000', but its settings are those of 'PGD-3, 2 restarts'",
        ),
        (lambda r: r["attack_settings"][0].update(step_size=5), "its attack cannot exist"),
        (lambda r: r.update(protocol="autoattack"), "its protocol is 'autoattack', but its attacks are pgd"),
    ],
)
def test_contradictions_are_found_without_measuring(release, change, message):
    edit(release, change, which=0)
    keep(release, 0)
    result = check(release)
    assert verdicts(result) == ["fails", "fails"] and not check_named(result, "record").holds
    assert re.search(message, result.figures[0].reason)
    assert result.figures[0].measured is None


def test_robust_images_must_be_right_when_clean(release):
    def change(result):
        pairs = zip(result["natural_correct"], result["robust_correct"], strict=True)
        index = next(i for i, pair in enumerate(pairs) if pair == (False, False))
        other = result["robust_correct"].index(True)
        result["robust_correct"][index], result["robust_correct"][other] = True, False

    edit(release, change, which=0)
    assert "1 images count as robust though they are misclassified" in check(release).figures[0].reason


def test_a_complete_autoattack_must_be_one(release, monkeypatch):
    """A claim of the whole of AutoAttack where only a part of it is defined."""
    keep(release, 1)

    def components(threat_model, num_classes, image_size, seed=0):
        return [AutoAttackComponent("APGD-CE", threat_model, num_classes, seed)], {"APGD-T": "too few classes"}

    monkeypatch.setattr(attack_list, "autoattack_components", components)
    result = check(release)
    assert verdicts(result) == ["holds", "fails"] and "AutoAttack (reduced)" in result.figures[1].reason


def test_results_that_are_none(release):
    edit(release, lambda result: result.update(seed="x"), which=0)
    result = check(release)
    assert not result.holds and "Result 1 of the record is not readable." in check_named(result, "record").reason
    assert "seed must be an integer" in str(result).replace("\n" + " " * 14, " ")
    assert verdicts(result) == ["holds"] * 2, "the other one is measured"


# --- the card --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"robust": 0.95}, r"Robust accuracy .*: the card says 0.95 and the record 0\."),
        ({"natural": 0.99}, r"Natural accuracy: the card says 0.99 and the record 0\."),
        ({"robust": 95.0}, "no share between 0 and 1"),
        ({"robust": "very high"}, "'very high' in its metadata, which is no share"),
        ({"args": {"eps": 0.1}}, r"eps is 0\.1 in its metadata and 0\.001 in the record"),
        ({"args": {"n_examples": 10_000}}, "n_examples is 10000 in its metadata and 120"),
        ({"args": {"confidence_interval_95": [0.9, 0.95]}}, "the interval is another one"),
        ({"args": {"confidence_interval_95": "narrow"}}, "the interval is another one"),
        ({"args": {"attack": {"a": 1}}}, r"attack is \{'a': 1\} in its metadata"),
        ({"name": "Robust accuracy (Linf, eps = 8/255)"}, r"the record's threat model is Linf, eps = 0\.001"),
        ({"name": "F1", "type": "f1", "args": {}, "robust": 0.9}, "the card says 0.9"),
        ({"table": {"natural": 0.9, "robust": 0.9}}, "its table says 90.0 % natural and 90.0 % robust accuracy"),
    ],
)
def test_edited_cards_fail(release, changes, message):
    keep(release, 1)
    report = reports_in(release)[0]
    write_card(release, report, **changes)
    (problem,) = card_problems((release / "README.md").read_text(), [report])
    assert re.search(message, problem)


def test_an_edited_card_fails_though_every_figure_of_the_record_holds(release):
    write_card(release, reports_in(release)[1], robust=0.95)
    result = check(release)
    assert verdicts(result) == ["holds"] * 4 and not result.holds
    assert "the card says 0.95" in check_named(result, "card").reason
    assert str(result).endswith("NOT VERIFIED: card wrong.")


def test_figures_of_pgd_are_none_to_publish(release):
    keep(release, 0)
    report = reports_in(release)[0]
    write_card(release, report)
    (problem,) = card_problems((release / "README.md").read_text(), [report])
    assert "the record holds no robust accuracy measured with AutoAttack" in problem


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("---\nmodel-index: [\n---\n", "not valid YAML"),
        ("---\nmodel-index: !!timestamp x\n---\n", "not valid YAML"),
        ("---\nmodel-index:\n- name: x\n---\n", "without a list of results"),
        ("---\nmodel-index:\n- results: [3]\n---\n", "without a list of metrics"),
        ("---\nmodel-index:\n- results:\n  - metrics: [3]\n---\n", "a metric in its metadata is not an object"),
        ("---\nmodel-index:\n- results:\n  - metrics:\n    - type: wer\n      value: 1\n---\n", "nothing of the kind"),
        (
            "---\na: &a [{type: accuracy, value: 1}, {type: accuracy}]\nb: &b {metrics: *a}\nc: &c {results: ["
            + ", ".join(["*b"] * 900)
            + "]}\nmodel-index: ["
            + ", ".join(["*c"] * 900)
            + "]\n---\n",
            "more than 1000",
        ),
    ],
)
def test_hostile_cards(card, message):
    (problem,) = card_problems(card, [])
    assert re.search(message, problem)


@pytest.mark.parametrize(
    "card", ["", "# A model", "---\nlicense: mit\n---\n", "---\n- 1\n---\n", "---\nmodel-index:\n---"]
)
def test_cards_without_figures(card):
    assert card_problems(card, []) == []


@settings(deadline=None, max_examples=200)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["results", "metrics", "type", "name", "value", "args", "eps"]), inner)
        ),
        max_leaves=20,
    )
)
def test_any_metadata_give_problems_and_no_error(content):
    assert isinstance(card_problems(f"---\nmodel-index: {json.dumps(content)}\n---\n", []), list)


def test_the_card_that_the_package_writes_holds(release):
    write_model_card(release, load_autolora_model(release))
    assert "Robust accuracy" in (release / "README.md").read_text()
    result = check(release)
    assert result.holds and "every figure in its metadata (3)" in check_named(result, "card").reason


# --- which images ----------------------------------------------------------------------------------------------------


def test_other_images_are_another_sample(release, published):
    model = load_autolora_model(release)
    result = check(release, make_data(model, 200, seed=8))
    assert result.holds and all(figure.same_images is False for figure in result.figures)
    assert result.figures[0].measured.total == CLAIMED and result.subset_seed is not None
    assert "compared as two samples, on 120 images that are not those of the claim" in result.figures[0].reason

    worse = check(release, make_data(model, 200, seed=8, wrong=0.6))
    assert set(verdicts(worse)) == {"fails"} and "Perhaps these images are harder" in str(worse).replace("\n  ", " ")


def test_as_many_other_images(release):
    """Data of the recorded size are recognised by what they show."""
    model = load_autolora_model(release)
    result = check(release, make_data(model, IMAGES, seed=8))
    assert result.holds and result.figures[0].same_images is False


def test_the_same_images_given_by_hand(release, published):
    keep(release, 0)
    edit(release, lambda result: result.update(dataset={**result["dataset"], "kind": "folder", "name": "birds"}))
    pixels = torch.stack([torch.tensor(np.asarray(row["image"])) for row in published[1]])
    pixels, labels = pixels.permute(0, 3, 1, 2).float() / 255, torch.tensor(published[1]["label"])
    for data in (published[1], (pixels, labels), torch.utils.data.TensorDataset(pixels, labels)):
        result = check(release, data)
        assert result.holds and all(figure.same_images for figure in result.figures)


def test_data_that_are_not_public_must_be_given(release):
    keep(release, 0)
    for kind, name, words in (
        ("folder", "birds", "a folder that is called 'birds' \\(split 'test', 120 of 240 images\\)"),
        ("memory", None, "data in memory that is not named"),
        ("hub", "/etc", "a data set on the Hub that is called '/etc'"),
        ("hub", "imagefolder", "a data set on the Hub that is called 'imagefolder'"),
        ("quickstart", "digits", "the digits"),
    ):
        split = "elsewhere" if kind == "quickstart" else "test"
        dataset = {"name": name, "kind": kind, "config": None, "split": split, "revision": None}
        edit(release, lambda result, dataset=dataset: result.update(dataset=dataset))
        with pytest.raises(MissingDataError, match=f"{words}.*Give the images"):
            check(release)


def test_missing_data_do_not_hide_what_is_wrong(release):
    """One result can be measured, one not; or one is wrong anyway."""
    edit(release, lambda result: result["dataset"].update(kind="memory", name=None), which=0)
    result = check(release)
    assert verdicts(result) == ["not re-measured"] * 2 + ["holds"] * 2 and not result.holds
    edit(release, recount, which=1)
    assert verdicts(check(release)) == ["not re-measured"] * 2 + ["fails"] * 2


def test_recorded_data_on_the_hub(release, published, monkeypatch):
    asked = []

    def load_source(name, split, **options):
        asked.append((name, split, options))
        return published[1]

    monkeypatch.setattr("autolora_hf.hub.remeasure.load_source", load_source)
    dataset = {"name": "org/birds", "kind": "hub", "config": "small", "split": "test", "revision": "abc"}
    edit(release, lambda result: result.update(dataset=dataset))
    assert check(release).holds
    assert asked == [("org/birds", "test", {"config": "small", "revision": "abc"})], "read once for both results"


def test_public_data_that_have_changed(release, published, monkeypatch):
    model = load_autolora_model(release)
    monkeypatch.setattr("autolora_hf.quickstart.load_digits", lambda: {"test": make_data(model, IMAGES, seed=8)})
    result = check(release)
    assert result.figures[0].same_images is False and not result.holds
    assert "another version of the data" in check_named(result, "images").reason


def test_a_record_that_hides_its_images_is_not_verified(release, published):
    """Compared with another sample, a small exaggeration would go unnoticed."""
    edit(release, lambda result: result.update(sample_digests=["0" * 12] * len(result["sample_digests"])))
    result = check(release)
    assert not result.holds and not check_named(result, "images").holds


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("| this model |", "| **this model** |"),
        ("| this model |", "| This model, on more images |"),
        ("Linf, eps = 0.001, 120 images |", "Linf, eps = 8/255, 10,000 images |"),
        ("**Threat model**: Linf, eps = 0.001", "**Threat model**: Linf, eps = 0.3"),
        (" [", " ± 0.1 ["),
    ],
)
def test_a_rewritten_table_fails(release, old, new):
    """Rows of a card that the package wrote are known to the letter."""
    model = load_autolora_model(release)
    text = write_model_card(release, model).read_text()
    assert not card_problems(text, reports_in(release))
    assert old in text
    assert card_problems(text.replace(old, new), reports_in(release))


def test_data_of_other_classes_are_refused(release):
    model = make_model()
    model.label_names = ["a", "b", "c", "d"]
    data = make_data(model, 60)
    attack = PGD(model.threat_model, steps=1)
    model.add_result(evaluate_robustness(model, data, attack=attack, progress=False))
    model.save_pretrained(release)
    with pytest.raises(ValueError, match="data has other classes"):
        check(release, data)


# --- subsets ---------------------------------------------------------------------------------------------------------


def test_a_subset_is_compared_with_itself(release):
    keep(release, 0)
    result = check(release, max_samples=60)
    assert result.holds and result.subset_seed is not None
    figure = result.figures[1]
    assert figure.same_images and figure.measured.total == figure.expected.total == 60
    assert figure.claimed.total == CLAIMED
    # Random starts depend on which images share a batch, so that a robust verdict may differ here and there.
    assert "the same verdict on each of 60 of 120 images of the claim" in result.figures[0].reason
    # Six images have to be lost for 2.5 per cent: 12.9 points of 60 images in four of five cases.
    assert figure.detectable_drop == pytest.approx(0.129, abs=0.002) and "A drop by 12.9 points" in figure.reason
    assert f"chosen with seed {result.subset_seed}" in str(result)
    again = check(release, max_samples=60, subset_seed=result.subset_seed)
    assert again.figures == result.figures
    assert check(release, max_samples=CLAIMED + 1).figures[1].measured.total == CLAIMED


def test_a_subset_that_is_too_small_proves_nothing(release):
    keep(release, 0)
    result = check(release, max_samples=5)
    assert set(verdicts(result)) == {"undecided"} and not result.holds
    assert "UNDECIDED" in str(result) and "natural accuracy and robust accuracy undecided" in str(result)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"max_samples": 0}, "max_samples"),
        ({"max_samples": True}, "max_samples"),
        ({"subset_seed": -1}, "subset_seed"),
    ],
)
def test_options_are_checked(release, options, name):
    with pytest.raises(ValueError, match=f"`{name}` must be an integer"):
        check(release, **options)


# --- attacks ---------------------------------------------------------------------------------------------------------


def test_an_attack_of_ones_own_cannot_be_repeated(tmp_path):
    model = make_model()
    data = make_data(model, 60)

    def nudge(view, pixels, labels):
        return (pixels + 0.01).clamp(0, 1)

    report = evaluate_robustness(model, data, attack=[nudge, PGD(model.threat_model, steps=1)], progress=False)
    assert report.attack_settings[0] == {"kind": "custom", "name": "nudge"}
    model.add_result(report)
    model.save_pretrained(tmp_path)
    result = check(tmp_path, data)
    assert verdicts(result) == ["holds", "not re-measured"] and not result.holds
    assert "does not describe its attack, 'nudge + PGD-1'" in result.figures[1].reason


def test_settings_of_attacks_are_recorded(published):
    pgd, autoattack = reports_in(published[0])
    settings = {"steps": 3, "step_size": 0.0004, "loss": "ce", "random_start": True, "restarts": 2, "seed": 9}
    assert pgd.attack_settings == [{"kind": "pgd", **settings}] and pgd.batch_size == 50
    assert autoattack.attack_settings == [{"kind": "autoattack"}]


def test_notes_of_another_threat_model(tmp_path):
    model = make_model()
    data = make_data(model, 40)
    smaller = ThreatModel("linf", 1 / 255)
    model.add_result(evaluate_robustness(model, data, smaller, PGD(smaller, steps=1), progress=False))
    model.save_pretrained(tmp_path)
    (note, _) = check(tmp_path, data).notes
    assert note == "The model was trained for Linf, eps = 8/255, a measurement is about Linf, eps = 1/255."


def test_a_huge_recorded_batch_is_not_used(release, monkeypatch):
    keep(release, 0)
    edit(release, lambda result: result.update(batch_size=10_000_000))
    seen = []

    def evaluate(*args, **options):
        seen.append(options["batch_size"])
        return evaluate_robustness(*args, **options)

    monkeypatch.setattr("autolora_hf.hub.remeasure.evaluate_robustness", evaluate)
    check(release)
    assert seen == [1024]


# --- releases without results ----------------------------------------------------------------------------------------


def test_nothing_to_verify(release):
    card = (release / "README.md").read_text()
    keep(release)
    (release / "README.md").write_text(card)
    with pytest.raises(ValueError, match=r"there is nothing to verify\. Its card states figures \(2\) that no"):
        check(release)
    (release / "README.md").write_text("# A model")
    with pytest.raises(ValueError, match=r"publishes no measurement of itself: there is nothing to verify\.$"):
        check(release)


def test_no_such_release():
    with pytest.raises(FileNotFoundError, match="neither a folder nor a Hub repository"):
        check("no-such-folder")


def test_a_release_on_the_hub(release, tmp_path, monkeypatch):
    """Everything is of the commit whose record was read, though the branch may move meanwhile."""
    snapshot = tmp_path / "models--org--birds" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    shutil.move(release, snapshot)
    asked = []

    def download(name, revision=None, **options):
        asked.append((name, revision, options["token"]))
        return str(snapshot)

    monkeypatch.setattr("autolora_hf.download.snapshot_download", download)
    result = check("org/birds", revision="main", token="hf_x")
    assert result.holds and (result.release, result.revision) == ("org/birds", "0123abc")
    assert asked[0] == ("org/birds", "main", "hf_x") and set(asked[1:]) == {("org/birds", "0123abc", "hf_x")}

    write_card(snapshot, reports_in(snapshot)[1], robust=0.95)
    assert not check_named(check("org/birds"), "card").holds


# --- the command -----------------------------------------------------------------------------------------------------


def test_exit_status(release, tmp_path, capsys):
    keep(release, 0)
    assert verify.run([str(release), "--output", str(tmp_path / "out.json")]).status == 0
    assert "Every figure holds (2 measured again)." in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["holds"] is True

    assert verify.run([str(release), "--samples", "4", "--subset-seed", "7"]).status == 3
    assert "UNDECIDED" in capsys.readouterr().out

    edit(release, inflate(12))
    assert verify.run([str(release)]).status == 1
    assert "NOT VERIFIED" in capsys.readouterr().out

    edit(release, lambda result: result["dataset"].update(kind="folder", name="birds"))
    with pytest.raises(ValueError, match=r"called 'birds' .* Options: `--data` and `--split`"):
        verify.run([str(release)])
    assert main(["verify", str(release)]) == 3
    assert "Options: `--data` and `--split`" in capsys.readouterr().err

    path = release / "autolora_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "results": []}))
    assert main(["verify", str(release)]) == 3
    assert "there is nothing to verify" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "nowhere")]) == 1

    for wrong in ([], [str(release), "--split", "test"], [str(release), "--samples", "few"]):
        with pytest.raises(SystemExit) as stop:
            verify.run(wrong)
        assert stop.value.code == 2


def test_images_from_the_command_line(release, published, tmp_path):
    keep(release, 0)
    published[1].save_to_disk(tmp_path / "data")
    assert verify.run([str(release), "--data", str(tmp_path / "data")]).status == 0


def test_nothing_is_changed(release):
    before = {path.name: path.read_bytes() for path in release.iterdir() if path.is_file()}
    results = copy.deepcopy(results_in(release))
    check(release, max_samples=20)
    assert {path.name: path.read_bytes() for path in release.iterdir() if path.is_file()} == before
    assert results_in(release) == results
