"""The report: intervals, warnings, table and file."""

import json
import math
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta

from autolora_hf.config import ThreatModel
from autolora_hf.evaluation import Accuracy, AttackResult, RobustnessReport
from autolora_hf.evaluation.report import standard_warnings, write_atomically


def make_report(**changes):
    rows = [
        AttackResult("APGD-CE", 900, 250, 0.65, 12.3),
        AttackResult("FAB-T", 650, 0, 0.65, 40.0),
        AttackResult("Square", 650, 1, 0.649, 60.7),
        AttackResult("APGD-T", left_out="its loss needs at least 4 classes, this model has 2"),
    ]
    fields = {
        "threat_model": ThreatModel("linf", 8 / 255),
        "natural": Accuracy.from_counts(900, 1000),
        "robust": Accuracy.from_counts(649, 1000),
        "attacks": rows,
        "protocol": "autoattack-reduced",
        "attack": "AutoAttack (reduced): APGD-CE, FAB-T (1 target classes), Square (5000 queries)",
        "sample_indices": list(range(0, 2000, 2)),
        "natural_correct": [True] * 900 + [False] * 100,
        "robust_correct": [True] * 649 + [False] * 351,
        "dataset_size": 2000,
        "num_classes": 2,
        "seed": 3,
        "route": "robust",
        "device": "cpu",
        "seconds": 120.5,
        "versions": {"autolora_hf": "0.1.0", "torch": "2.10"},
        "warnings": ["Something to know."],
    }
    return RobustnessReport(**{**fields, **changes})


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        # Clopper and Pearson's rule of three at the ends: 1 - (alpha / 2)^(1 / n).
        (0, 10, 0.0, 1 - 0.025**0.1),
        (10, 10, 0.025**0.1, 1.0),
        # Table I of Newcombe (1998), Statistics in Medicine 17, method 5.
        (81, 263, 0.2527, 0.3676),
        (15, 148, 0.0578, 0.1617),
        (0, 20, 0.0, 0.1684),
        (1, 29, 0.0009, 0.1776),
        (142, 200, beta.ppf(0.025, 142, 59), beta.ppf(0.975, 143, 58)),
    ],
)
def test_clopper_pearson(correct, total, low, high):
    accuracy = Accuracy.from_counts(correct, total)
    assert accuracy.value == correct / total
    assert (accuracy.low, accuracy.high) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(("correct", "total"), [(1, 0), (-1, 5), (6, 5)])
def test_impossible_counts(correct, total):
    with pytest.raises(ValueError, match="0 <= correct <= total"):
        Accuracy.from_counts(correct, total)


def test_round_trip(tmp_path):
    report = make_report()
    path = tmp_path / "new" / "report.json"
    report.save(path)
    assert RobustnessReport.load(path) == report
    assert RobustnessReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    content = json.loads(path.read_text())
    assert content["robust"] == {"correct": 649, "total": 1000, **{k: content["robust"][k] for k in ("low", "high")}}
    assert content["threat_model"] == {"norm": "linf", "eps": 8 / 255}
    assert len(path.read_text().splitlines()) == len(content) + 2, "one field a line"
    assert [entry.name for entry in path.parent.iterdir()] == ["report.json"]


def test_round_trip_of_everything(tmp_path):
    """With all optional fields, as an evaluation gives them."""
    pgd = {"kind": "pgd", "steps": 20, "step_size": 0.01, "loss": "ce", "random_start": True, "restarts": 2, "seed": 3}
    report = make_report(
        dataset={"name": "org/birds", "kind": "hub", "config": None, "split": "test", "revision": "abc"},
        sample_digests=[f"{index:012x}" for index in range(1000)],
        attack_settings=[{"kind": "autoattack"}, pgd, {"kind": "custom", "name": "nudge"}],
        batch_size=128,
        route=None,
    )
    report.save(tmp_path / "report.json")
    assert RobustnessReport.load(tmp_path / "report.json") == report


PGD = {"kind": "pgd", "steps": 20, "step_size": 0.01, "loss": "ce", "random_start": True, "restarts": 1, "seed": 3}


def put(path, value, named=None):
    """A change of one field, and the path that the message must have."""

    def damage(content):
        *outer, last = (int(key) if key.isdigit() else key for key in re.findall(r"\w+", path))
        for key in outer:
            content = content[key]
        content[last] = value

    return damage, re.escape(named or path) + r"[ .\[]"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content.pop("robust"), "the file lacks robust"),
        (lambda content: content.pop("attack_settings"), "the file lacks attack_settings"),
        (lambda content: content.update(score=1), "the file has the unknown 'score'"),
        (lambda content: content["natural"].pop("low"), "natural lacks low"),
        (lambda content: content["threat_model"].update(eps=8), "Did you mean 8/255"),
        put("threat_model", "linf"),
        put("threat_model.eps", math.nan),
        put("threat_model.eps", 10**400),
        put("attacks", 3),
        put("attacks[0]", None),
        put("attacks[0].accuracy", math.inf),
        put("attacks[0].broken", 10**400),
        put("attacks[0].broken", 901),
        put("attacks[0].accuracy", None),
        put("attacks[3].left_out", None, "attacks[3].accuracy"),
        put("natural.correct", -1),
        put("natural.correct", True),
        put("natural.correct", 1001),
        put("natural.total", 999),
        put("robust.low", math.nan),
        put("robust.low", 0.99),
        put("robust.high", "1"),
        put("protocol", "secret"),
        put("attack", ["PGD"]),
        put("attack", "PGD\x1b[2J"),
        put("device", "cpu\nall is well"),
        put("sample_indices", []),
        put("sample_indices", "0123"),
        put("sample_indices[1]", -1),
        put("sample_indices[1]", 0.5),
        put("sample_indices", [0] * 1000),
        (lambda content: content.update(dataset_size=1998), "sample_indices has 1998, but dataset_size is 1998"),
        put("natural_correct", [True] * 999),
        put("natural_correct[0]", 1),
        put("robust_correct", None),
        put("sample_digests", ["0" * 12]),
        put("sample_digests", ["X" * 12] * 1000),
        put("dataset_size", 0),
        put("num_classes", 1),
        put("num_classes", 10**9),
        put("seed", 2**64),
        put("seed", None),
        put("route", "both"),
        put("device", 1),
        put("seconds", -1.0),
        put("seconds", math.nan),
        put("dataset", None),
        put("dataset", {"kind": "elsewhere"}, "dataset.kind"),
        put("dataset", {"path": "/"}, "dataset"),
        put("dataset", {"revision": "../../x"}, "dataset.revision"),
        put("attack_settings", {}),
        put("attack_settings", [3], "attack_settings[0]"),
        put("attack_settings", [{"kind": []}], "attack_settings[0].kind"),
        put("attack_settings", [{"kind": "pgd"}], "attack_settings[0]"),
        put("attack_settings", [{**PGD, "steps": 10**9}], "attack_settings[0].steps"),
        put("attack_settings", [{**PGD, "step_size": math.nan}], "attack_settings[0].step_size"),
        put("attack_settings", [{**PGD, "loss": "targeted"}], "attack_settings[0].loss"),
        put("attack_settings", [{**PGD, "loss": "kl", "random_start": False}], "attack_settings[0].random_start"),
        put("batch_size", 0),
        put("versions", {"torch": 2}),
        put("warnings", "none"),
        put("warnings", ["x" * 5000], "warnings[0]"),
    ],
)
def test_damaged_reports_are_refused(damage, message):
    content = make_report().to_dict()
    damage(content)
    with pytest.raises(ValueError, match=f"This is not a robustness report: .*{message}"):
        RobustnessReport.from_dict(content)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_whatever_a_file_says_it_is_a_report_or_a_value_error(data):
    content = make_report(
        natural=Accuracy.from_counts(1, 2),
        robust=Accuracy.from_counts(1, 2),
        sample_indices=[0, 1],
        natural_correct=[True, False],
        robust_correct=[True, False],
        sample_digests=["0" * 12, "1" * 12],
        attacks=[AttackResult("PGD-20", 1, 0, 0.5, 1.0)],
        attack_settings=[PGD],
    ).to_dict()
    place, key = content, data.draw(st.sampled_from(sorted(content)))
    while isinstance(place[key], (dict, list)) and len(place[key]) and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    place[key] = data.draw(ANYTHING)
    try:
        report = RobustnessReport.from_dict(content)
    except ValueError as error:
        assert "not a robustness report" in str(error)
    else:
        assert report.to_dict() == content and str(report)


@pytest.mark.parametrize("field", ["attack", "natural", "sample_indices", "dataset", "attack_settings"])
def test_nesting_without_end_is_refused(field):
    content = make_report().to_dict()
    content[field] = []
    for _ in range(100_000):
        content[field] = [content[field]]
    with pytest.raises(ValueError, match=f"not a robustness report: {field}"):
        RobustnessReport.from_dict(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"natural": ', r"report\.json is not valid JSON"), ("[]", r"report\.json: This is not a robustness report")],
)
def test_damaged_files_are_refused(tmp_path, text, message):
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        RobustnessReport.load(path)


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "report.json"
    make_report().save(path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        make_report(seed=object()).save(path)
    with pytest.raises(TypeError):
        write_atomically(path, "not bytes")
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]


def test_table():
    assert (
        str(make_report())
        == """\
threat model  Linf, eps = 8/255
attack        AutoAttack (reduced): APGD-CE, FAB-T (1 target classes), Square (5000 queries)
images        1,000 of 2,000, 2 classes, seed 3
route         robust
ran           120.5 s on cpu
versions      autolora_hf 0.1.0, torch 2.10

                  accuracy       95 % interval       correct
------------------------------------------------------------
natural            90.00 %  [87.97 %, 91.79 %]    900 / 1000
robust             64.90 %  [61.85 %, 67.86 %]    649 / 1000

after             accuracy        broken       seconds
------------------------------------------------------
APGD-CE            65.00 %    250 of 900          12.3
FAB-T              65.00 %      0 of 650          40.0
Square             64.90 %      1 of 650          60.7

not run       APGD-T: its loss needs at least 4 classes, this model has 2

warning       Something to know."""
    )


def test_table_without_optional_parts():
    text = str(make_report(route=None, attacks=[], warnings=[], sample_indices=list(range(2000))))
    assert "route" not in text and "not run" not in text and "warning" not in text
    assert "images        all 2,000" in text


def test_properties():
    report = make_report()
    assert (report.natural_accuracy, report.robust_accuracy) == (0.9, 0.649)
    assert report.publishable and not make_report(protocol="custom").publishable
    assert list(report.left_out) == ["APGD-T"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": "custom", "attack": "PGD-10"}, "PGD-10: a training signal, not a figure to publish"),
        ({"protocol": "autoattack-reduced"}, "AutoAttack without APGD-T"),
        ({"robust": Accuracy.from_counts(901, 1000)}, r"90\.10%\) is above natural"),
        ({"robust": Accuracy.from_counts(64, 100)}, "Only 100 images: .* is 20 points wide"),
        ({"attacks": [AttackResult("Square", 650, 3, 0.647, 1.0)]}, "Square, .* broke 3 images .* gradient masking"),
        (
            {"labels": [0, 1, 1] * 100, "natural_predicted": [1] * 300, "class_names": ["ant", "bee"]},
            "All clean images are taken for one class, bee: the model tells no classes apart",
        ),
    ],
)
def test_warnings(changes, message):
    report = make_report(**{"protocol": "autoattack", **changes})
    # Figures that were changed alone contradict the verdicts on single images.
    (found,) = (text for text in standard_warnings(report) if "verdicts on single images" not in text)
    assert re.search(message, found)
    complete = replace(make_report(), protocol="autoattack")
    assert standard_warnings(complete) == []


def test_one_answer_is_right_where_nearly_all_images_are_of_one_class():
    answers = {"labels": [0] + [1] * 19, "natural_predicted": [1] * 20, "class_names": ["ant", "bee"]}
    report = make_report(protocol="autoattack", **answers)
    assert not any("one class" in text for text in standard_warnings(report))
