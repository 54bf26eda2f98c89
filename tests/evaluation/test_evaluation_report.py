"""The report: intervals, warnings, table and file."""

import json
import re
from dataclasses import replace

import pytest
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


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content.pop("robust"), r"missing fields \['robust'\], unknown fields \[\]"),
        (lambda content: content.update(score=1), r"unknown fields \['score'\]"),
        (lambda content: content["natural"].pop("low"), "low"),
        (lambda content: content["threat_model"].update(eps=8), "Did you mean 8/255"),
        (lambda content: content.update(attacks=3), "not iterable"),
    ],
)
def test_damaged_reports_are_refused(damage, message):
    content = make_report().to_dict()
    damage(content)
    with pytest.raises(ValueError, match=message):
        RobustnessReport.from_dict(content)


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "report.json"
    path.write_text('{"natural": ')
    with pytest.raises(ValueError, match=r"report\.json is not a JSON file"):
        RobustnessReport.load(path)
    with pytest.raises(ValueError, match="not a robustness report"):
        RobustnessReport.from_dict([])


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
    ],
)
def test_warnings(changes, message):
    report = make_report(**{"protocol": "autoattack", **changes})
    (found,) = standard_warnings(report)
    assert re.search(message, found)
    complete = replace(make_report(), protocol="autoattack")
    assert standard_warnings(complete) == []
