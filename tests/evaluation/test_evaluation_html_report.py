"""The report as a page: well-formed, self-contained, escaped, and with the figures of the report."""

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from autolora_hf import AutoLoraConfig, RobustnessReport, ThreatModel, get_autolora_model
from autolora_hf.cli import main
from autolora_hf.evaluation import Accuracy, AttackResult, html_report
from autolora_hf.evaluation.breakdown import class_results, frequent_confusions
from autolora_hf.evaluation.calibration import calibration
from autolora_hf.evaluation.curve import CurvePoint, RobustnessCurve
from autolora_hf.evaluation.drawing import new_figure, plain_name, png
from autolora_hf.evaluation.findings import Finding
from autolora_hf.evaluation.report import CorruptionResult, RouteResult
from autolora_hf.evaluation.report_figures import (
    class_accuracy_figure,
    confusion_figure,
    corruptions_figure,
    reliability_figure,
    robustness_curve_figure,
)
from autolora_hf.evaluation.training_log import read_training_log
from autolora_hf.quickstart import load_digits


VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Parses strictly: every element that is opened is closed, in order."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.open, self.words, self.headings = [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open, self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute of {tag} comes twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)
            if self.open and self.open[-1] == "h2":
                self.headings.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def parsed(page):
    """The parsed page, after the checks that every page must pass."""
    found = Page(page)
    tags = {tag for tag, _ in found.elements}
    assert not tags & {"script", "iframe", "object", "embed", "link", "form", "base"}, tags
    attributes = [pair for _, attrs in found.elements for pair in attrs.items()]
    assert not [name for name, _ in attributes if name.startswith("on")]
    for name, value in attributes:
        if name in ("src", "href", "srcset", "action"):
            assert re.match(r"#[\w-]+$|data:image/\w+;base64,", value), value[:80]
    assert "@import" not in page and "url(" not in page
    assert found.all("html")[0]["lang"] == "en"
    assert all(image["alt"] and int(image["width"]) and int(image["height"]) for image in found.all("img"))
    assert all(header.get("scope") in ("row", "col") for header in found.all("th"))
    ids = [attrs["id"] for _, attrs in found.elements if "id" in attrs]
    assert len(set(ids)) == len(ids)
    named = [attrs["aria-labelledby"] for _, attrs in found.elements if "aria-labelledby" in attrs]
    targets = [attrs["href"][1:] for attrs in found.all("a")]
    assert {*named, *targets} <= set(ids)
    return found


def make_report(classes=4, images=80, **changes):
    random = torch.Generator().manual_seed(classes)
    labels = torch.randint(classes, (images,), generator=random)
    natural = torch.rand(images, generator=random) < 0.8
    robust = natural & (torch.rand(images, generator=random) < 0.6)
    other = (labels + 1) % classes
    confidence = torch.rand(2, images, generator=random).tolist()
    clean, attacked = Accuracy.from_counts(int(natural.sum()), images), Accuracy.from_counts(int(robust.sum()), images)
    fields = {
        "threat_model": ThreatModel("linf", 8 / 255),
        "natural": clean,
        "robust": attacked,
        "attacks": [
            AttackResult("APGD-CE", clean.correct, clean.correct - attacked.correct, attacked.value, 3.25),
            AttackResult("Square", attacked.correct, 0, attacked.value, 1.5),
        ],
        "protocol": "autoattack",
        "attack": "AutoAttack (standard): APGD-CE, Square",
        "sample_indices": list(range(images)),
        "natural_correct": natural.tolist(),
        "robust_correct": robust.tolist(),
        "dataset_size": 2 * images,
        "num_classes": classes,
        "seed": 3,
        "route": "robust",
        "device": "cpu",
        "seconds": 12.5,
        "dataset": {"name": "org/birds", "kind": "hub", "split": "test"},
        "attack_settings": [{"kind": "autoattack"}],
        "batch_size": 16,
        "versions": {"torch": "2.10"},
        "labels": labels.tolist(),
        "natural_predicted": torch.where(natural, labels, other).tolist(),
        "robust_predicted": torch.where(robust, labels, other).tolist(),
        "natural_confidence": confidence[0],
        "robust_confidence": confidence[1],
        "class_names": [f"bird {index}" for index in range(classes)],
    }
    return RobustnessReport(**{**fields, **changes})


def everything(**changes):
    report = make_report(**changes)
    half = Accuracy.from_counts(report.robust.correct // 2, 80)
    report.curve = RobustnessCurve(
        "PGD-20",
        [CurvePoint(0.0, report.natural), CurvePoint(8 / 255, report.robust), CurvePoint(16 / 255, half)],
    )
    report.corruptions = [
        CorruptionResult(name, severity, half) for name in ("fog", "jpeg_compression") for severity in range(1, 6)
    ]
    report.other_route = RouteResult("natural", report.natural, half)
    report.natural_top5, report.robust_top5 = Accuracy.from_counts(80, 80), Accuracy.from_counts(79, 80)
    outcomes = ["passed", "failed", "not run", "passed"]
    report.findings = [Finding(f"check {n}", outcome, f"Sentence {n}.") for n, outcome in enumerate(outcomes)]
    report.warnings = ["Something to know.", "Sentence 1."]
    return report


LOG = [{"epoch": 1.0, "loss": 1.0, "eval_robust_accuracy": 0.4}, {"epoch": 2.0, "eval_robust_accuracy": 0.5}]


def test_everything_is_there():
    report = everything()
    page = html_report(report, title="Robustness of birds", examples=new_figure(2, 2), log_history=LOG)
    found = parsed(page)
    assert len(page) < 1_000_000 and page.count('class="value"') == 2
    assert found.headings == [
        "Natural accuracy",
        "Robust accuracy",
        "AutoAttack, with doubts",
        "Before using these figures",
        "Can the attacks be trusted? 2 of 4 checks passed",
        "Attacks",
        "Accuracy against the radius",
        "Accuracy by class",
        "What is taken for what under attack",
        "Calibration",
        "Common corruptions",
        "Further accuracies",
        "Adversarial examples",
        "Training",
        "How to repeat it",
    ]
    assert len(found.all("img")) == 7
    for accuracy in (report.natural, report.robust):
        assert f"{100 * accuracy.value:.1f} %" in found.text
        assert f"95 % interval [{100 * accuracy.low:.1f}, {100 * accuracy.high:.1f}]" in found.text
        assert f"{accuracy.correct} of 80 images" in found.text
    worst = report.worst_class
    assert f"Worst class: {worst.name} , {100 * worst.robust.value:.1f} % [" in found.text
    assert "The lowest of 4 estimates lies by chance below the lowest true accuracy." in found.text
    assert f"mean over radii from 0 to 0.06275: {100 * report.curve.expected_robustness:.1f} %" in found.text
    assert "80 of 160 images of org/birds (test)" in found.text and "Linf, eps = 8/255" in found.text
    assert "not the benchmark's mCE" in found.text and "Not in this report" not in found.text
    # The sentence of a failed check stands with the check, not among the warnings too.
    assert found.text.count("Sentence 1.") == 1 and found.text.count("Something to know.") == 1
    failed, rest = page.index("Sentence 1."), [page.index(f"Sentence {number}.") for number in (0, 2, 3)]
    opened = page.index("<details", page.index('id="diagnostics"'))
    assert failed < opened < min(rest)
    settings = json.loads(re.search(r"<pre>(.*?)</pre>", page, re.DOTALL)[1].replace("&#34;", '"'))
    assert settings["threat_model"] == {"norm": "linf", "eps": 8 / 255} and settings["samples"] == 80
    assert html_report(report, title="Robustness of birds", examples=new_figure(2, 2), log_history=LOG) == page


def test_what_was_not_measured_is_left_out_and_named():
    report = make_report(sample_digests=[], class_names=None)
    found = parsed(html_report(report))
    assert found.headings[2] == "AutoAttack, without diagnostics" and len(found.all("img")) == 3
    absent = ("Can the attacks", "radius of", "corruptions", "Further", "Adversarial examples", "Training")
    assert not [heading for heading in found.headings if heading.startswith(absent)]
    for option in ("--no-diagnostics", "--curve", "--corruptions", "--route both", "--examples", "--training-log"):
        assert option in found.text
    assert "Robustness on org/birds (test)" in found.text and "Worst class: class " in found.text
    # No route, no other route to miss.
    assert "--route" not in parsed(html_report(replace(report, route=None))).text


def test_an_older_report_without_answers(tmp_path):
    content = make_report().to_dict()
    for name in ("labels", "natural_predicted", "robust_predicted", "natural_confidence", "robust_confidence"):
        del content[name]
    for name in ("findings", "curve", "corruptions", "other_route", "class_names", "natural_top5", "robust_top5"):
        del content[name]
    content["dataset"] = {}
    found = parsed(html_report(RobustnessReport.from_dict(content)))
    assert not found.all("img") and "Accuracy by class" not in found.headings
    assert "older reports lack them" in found.text and "Robustness report" in found.text


@pytest.mark.parametrize(
    ("changes", "title", "level"),
    [
        ({"images": 400, "findings": [Finding("check", "passed", "Fine.")]}, "Publishable: AutoAttack", "good"),
        ({"findings": [Finding("check", "passed", "Fine.")]}, "AutoAttack, on few images", "fair"),
        ({"images": 400}, "AutoAttack, without diagnostics", "fair"),
        ({"protocol": "autoattack-reduced"}, "Publishable: reduced AutoAttack", "fair"),
        ({"protocol": "custom", "attack": "PGD-10"}, "Not a figure to publish", "poor"),
        ({"natural": Accuracy.from_counts(1, 80)}, "Impossible figures", "poor"),
        ({"findings": [Finding("check", "failed", "Masked.")]}, "AutoAttack, with doubts", "fair"),
    ],
)
def test_verdict(changes, title, level):
    found = parsed(html_report(make_report(**changes)))
    assert title in found.headings
    assert [attrs["class"] for attrs in found.all("div") if "verdict" in attrs.get("class", "")] == [
        f"verdict {level}"
    ]


def test_warnings_that_follow_from_the_figures_cannot_be_left_out():
    found = parsed(html_report(make_report(protocol="custom", attack="PGD-10", warnings=[])))
    assert "a training signal, not a figure to publish" in found.text and "Only 80 images" in found.text


def test_left_out_attacks_say_why():
    report = make_report()
    report.attacks.append(AttackResult("FAB-T", left_out="its loss needs 4 classes"))
    found = parsed(html_report(report))
    assert "FAB-T not run: its loss needs 4 classes" in found.text
    assert "the strongest of 2 attacks" in found.text


HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7 * 7 }}&amp;\u202e$\\frac$'


def test_texts_of_strangers_stay_texts():
    report = everything()
    report.class_names = [HOSTILE + str(index) for index in range(4)]
    report.warnings = [HOSTILE, f"</li></ul>\ud800{HOSTILE}"]
    report.findings = [Finding(HOSTILE, "failed", HOSTILE + "."), Finding(HOSTILE, "passed", HOSTILE + "!")]
    report.dataset = {"name": HOSTILE, "split": HOSTILE}
    report.attack, report.device, report.versions = HOSTILE, HOSTILE, {HOSTILE: HOSTILE}
    report.attacks = [AttackResult(HOSTILE, 80, 1, 0.5, 1.0), AttackResult(HOSTILE, left_out=HOSTILE)]
    report.attack_settings = [{"kind": "custom", "name": HOSTILE}]
    report.curve = replace(report.curve, attack=HOSTILE)
    report.other_route = replace(report.other_route, route=HOSTILE)
    page = html_report(report, title=HOSTILE, log_history=LOG)
    found = parsed(page)
    assert "<script" not in page and "\u202e" not in page and "\ud800" not in page
    assert "49" not in found.all("img")[0]["alt"] and "{{ 7 * 7 }}&amp; $\\frac$" in found.text
    page.encode()


@pytest.mark.parametrize("classes", [2, 31, 200])
def test_few_and_many_classes(classes):
    report = make_report(classes, images=400, class_names=[f"{index} $a$ \u732b" for index in range(classes)])
    page = html_report(report)
    found = parsed(page)
    # The heat map of many classes is a table instead.
    assert len(found.all("img")) == (3 if classes <= 30 else 2) and len(page) < 1_000_000
    assert "What is taken for what under attack" in found.headings and "commonest mistakes" in page.lower()


def test_nothing_is_taken_for_another_class():
    report = make_report()
    right = [True] * 80
    full = Accuracy.from_counts(80, 80)
    report = replace(report, robust_predicted=report.labels, robust_correct=right, natural_correct=right)
    report = replace(report, natural_predicted=report.labels, natural=full, robust=full)
    assert "No image is taken for another class." in parsed(html_report(report)).text


def test_huge_number_of_classes_takes_no_memory():
    parsed(html_report(make_report(4, num_classes=200_000, class_names=None)))


# ---- files ----


def picture(kind, size=(6, 4)):
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, kind)
    return buffer.getvalue()


def test_examples_as_bytes_path_or_figure(tmp_path):
    report = make_report()
    for kind in ("PNG", "JPEG", "WEBP"):
        content = picture(kind, (1320, 400))
        found = parsed(html_report(report, examples=content)).all("img")[-1]
        assert base64.b64decode(found["src"].partition(",")[2]) == content
        assert found["src"].startswith(f"data:image/{kind.lower()};") and found["width"] == "660"
    path = tmp_path / "examples.png"
    path.write_bytes(picture("PNG"))
    assert parsed(html_report(report, examples=path)).all("img")[-1]["height"] == "4"
    assert parsed(html_report(report, examples=new_figure(3, 2))).all("img")[-1]["width"] == "288"


def test_large_pictures_are_compressed():
    figure = new_figure(6, 6)
    figure.subplots().imshow(torch.rand(300, 300, 3, generator=torch.Generator().manual_seed(0)).numpy())
    found = parsed(html_report(make_report(), examples=figure)).all("img")[-1]
    assert found["src"].startswith("data:image/jpeg;") and len(found["src"]) < 900_000


@pytest.mark.parametrize("content", [b"", b"<svg onload='alert(1)'/>", picture("BMP"), picture("PNG")[:20]])
def test_other_files_are_no_pictures(content, tmp_path):
    with pytest.raises(ValueError, match="`examples` is no PNG"):
        html_report(make_report(), examples=content)


def test_saved_whole_or_not_at_all(tmp_path):
    report = make_report()
    path = tmp_path / "new" / "report.html"
    report.save_html(path, title="Birds")
    assert path.read_text(encoding="utf-8") == html_report(report, title="Birds")
    with pytest.raises(ValueError, match="no PNG"):
        report.save_html(path, examples=b"nothing")
    assert "Birds" in path.read_text(encoding="utf-8")
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_training_log(tmp_path):
    path = tmp_path / "trainer_state.json"
    path.write_text('{"log_history": [{"epoch": 1, "loss": NaN, "note": "x", "eval_loss": 2.0}], "best_metric": null}')
    assert read_training_log(path) == [{"epoch": 1, "eval_loss": 2.0}]
    path.write_text(json.dumps(LOG))
    assert read_training_log(path) == LOG


@pytest.mark.parametrize(
    "content", ["{}", "[]", "[1]", '[{"epoch": "one"}]', '[{"loss": 1}]', '{"log_history": {}}', "x"]
)
def test_other_files_are_no_training_logs(content, tmp_path):
    path = tmp_path / "log.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"log\.json is not (the log of a training run|valid JSON)"):
        read_training_log(path)


# ---- figures ----


def test_curve_figure():
    report = everything()
    axis = robustness_curve_figure(report.curve, report.threat_model, report.robust).axes[0]
    expected = [(0, report.natural.value), (8, report.robust.value), (16, report.curve.points[2].accuracy.value)]
    assert axis.lines[0].get_xydata().tolist() == [pytest.approx(pair) for pair in expected]
    assert axis.get_xlabel() == "radius in steps of 1/255"
    assert axis.get_legend_handles_labels()[1] == ["under PGD-20", "all attacks of this report"]
    assert robustness_curve_figure(report.curve).axes[0].get_xlabel() == "radius, in [0, 1] pixels"


def test_class_figure_begins_with_the_worst():
    rows = class_results([0, 0, 1, 1, 2], [True] * 5, [True, False, False, False, True], ["a", "b$^$", "c"])
    axis = class_accuracy_figure(rows).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == [r"b\$^\$", "a", "c"]
    bottom, top = axis.get_ylim()
    assert bottom > top, "the first row is at the top"


def test_confusion_figure():
    figure = confusion_figure([[3, 1], [0, 0]], ["cat", "dog"])
    axis = figure.axes[0]
    assert axis.images[0].get_array().tolist() == [[0.75, 0.25], [0, 0]]
    assert [text.get_text() for text in axis.texts] == ["3", "1"]
    with pytest.raises(ValueError, match="A heat map of 31 classes"):
        confusion_figure([[0] * 31] * 31)
    assert frequent_confusions([0, 0, 0, 1, 2], [1, 1, 2, 1, 0], most=2) == [(0, 1, 2, 3), (0, 2, 1, 3)]


def test_reliability_figure():
    found = calibration([0.1, 0.95, 0.9, 0.97], [False, True, False, True], bins=5)
    upper, lower = reliability_figure({"clean": found}).axes
    assert [bar.get_height() for bar in upper.patches] == pytest.approx([0, 2 / 3])
    assert [bar.get_height() for bar in lower.patches] == [1, 3]
    assert upper.get_title() == f"clean\nECE {found.ece:.3f}"


def test_corruptions_figure():
    report = everything()
    accuracies = {(row.name, row.severity): row.severity / 10 for row in report.corruptions}
    summary = replace(report.corruption_summary, by_corruption={"fog": 0.3, "jpeg_compression": 0.3})
    axis = corruptions_figure(accuracies, summary).axes[0]
    assert axis.images[0].get_array()[0].tolist() == [0.1, 0.2, 0.3, 0.4, 0.5, 0.3]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["fog", "jpeg compression"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("house finch", "house finch"),
        ("$x$", r"\$x\$"),
        (r"\$x$", r"\$x\$"),
        ("a\nb", "a b"),
        ("x" * 30, "x" * 23 + "…"),
        ("\u732b", "class 3"),
        ("", "class 3"),
    ],
)
def test_plain_names_are_drawn_letter_by_letter(name, shown):
    assert plain_name(name, "class 3") == shown
    figure = new_figure(1, 1)
    figure.suptitle(plain_name(name, "class 3"))
    assert png(figure) == png(figure)


# ---- command ----


def test_command_end_to_end(tmp_path, monkeypatch, capsys):
    pytest.importorskip("imagecorruptions")
    monkeypatch.chdir(tmp_path)
    digits = load_digits()["test"].features["label"].names
    model = get_autolora_model("quickstart", AutoLoraConfig(mode="adapter"), label_names=digits)
    model.save_pretrained("digits-model")
    (tmp_path / "log.json").write_text(json.dumps(LOG))
    command = "evaluate digits-model --data digits --split test --attack pgd --steps 2 --samples 12 --batch-size 12"
    more = "--curve 0.05 0.1 --corruptions fog --route both --no-diagnostics --transfer-from digits-model --examples 2"
    assert main([*command.split(), *more.split(), "--html", "out/r.html", "--training-log", "log.json"]) == 0
    found = parsed((tmp_path / "out" / "r.html").read_text(encoding="utf-8"))
    assert "Robustness of digits-model" in found.text and str(tmp_path) not in found.text
    assert "transfer from digits-model (PGD-50)" in found.text
    for heading in ("Accuracy against the radius", "Common corruptions", "Adversarial examples", "Training"):
        assert heading in found.headings
    assert "Not in this report: diagnostics" in found.text

    capsys.readouterr()
    for options, message in [
        ("--html digits-model", "digits-model is a folder"),
        ("--html log.json/r.html", "is no folder"),
        ("--output log.json/r.json", "is no folder"),
        ("--html r.html --training-log none.json", "none.json does not exist"),
        ("--html r.html --training-log digits-model/autolora_config.json", "is not the log of a training run"),
        ("--corruptions foggy", "Did you mean 'fog'?"),
        ("--curve 8", "Did you mean 8/255"),
    ]:
        assert main([*command.split(), *options.split()]) == 1
        assert message in capsys.readouterr().err
    for options in ("--examples -1", "--training-log log.json", "--curve zero"):
        with pytest.raises(SystemExit) as stop:
            main([*command.split(), *options.split()])
        assert stop.value.code == 2
    assert not (tmp_path / "r.html").exists()
