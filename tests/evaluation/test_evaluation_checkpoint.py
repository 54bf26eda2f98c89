"""Evaluations that are broken off and go on, what they do not go on from, and damaged files."""

import contextlib
import json
import logging
from dataclasses import dataclass, field

import pytest
import torch
from tiny_models import MODELS, pixels
from torch import nn

from autolora_hf.attacks import PGD
from autolora_hf.config import ThreatModel
from autolora_hf.evaluation import evaluate_robustness


LINF = ThreatModel("linf", 0.03)


class Channel(nn.Module):
    """The class is the colour channel of the first pixel with the largest value, plus a bias."""

    def __init__(self, bias=0.0):
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([bias, 0.0, 0.0]))

    def forward(self, x):
        return x[:, :, 0, 0] * 10 + self.bias


def case(count=12):
    """Images of every class; an attack of radius 0.03 breaks those whose first pixel leads by less than 0.06."""
    gaps = torch.linspace(0.005, 0.15, count)
    labels = torch.arange(count) % 3
    x = torch.full((count, 3, 8, 8), 0.5)
    x[torch.arange(count), labels, 0, 0] += gaps
    # No two images are the same.
    x[:, :, 7, 7] = torch.arange(count)[:, None] / 255
    return x, labels, (gaps > 0.06).tolist()


@dataclass
class Counting:
    """PGD that notes the sizes of its batches and breaks off when it has noted enough."""

    steps: int = 10
    calls: list = field(default_factory=list, repr=False)
    last: int | None = field(default=None, repr=False)

    def __call__(self, model, x, y):
        if len(self.calls) == self.last:
            raise KeyboardInterrupt
        self.calls.append(len(x))
        return PGD(LINF, steps=self.steps)(model, x, y)


def evaluate(folder, attack="pgd", model=None, data=None, threat_model=LINF, **options):
    options = {"batch_size": 4, "progress": False, "checkpoint_dir": folder, **options}
    return evaluate_robustness(model or Channel(), data or case()[:2], threat_model, attack, **options)


def timeless(report):
    content = report.to_dict()
    content.pop("seconds")
    for row in content["attacks"]:
        row.pop("seconds")
    return content


@pytest.mark.parametrize("finished", range(6))
def test_goes_on_after_any_batch(tmp_path, finished):
    """Two attacks, broken off after any number of batches, and once more after the next one."""
    expected = evaluate(None, [Counting(1, calls := []), Counting(10, calls)])
    assert calls == [4, 4, 4, 4, 4, 1] and sum(row.broken > 0 for row in expected.attacks) == 2
    done = []
    for last in (finished, 1):
        some = []
        with contextlib.suppress(KeyboardInterrupt):
            evaluate(tmp_path, [Counting(1, some, last), Counting(10, some, last)])
        done += some
    assert done == calls[: finished + 1]
    assert timeless(evaluate(tmp_path, [Counting(1, done), Counting(10, done)])) == timeless(expected)
    assert done == calls
    assert expected.robust_correct == case()[2]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 12, 100])
@pytest.mark.parametrize("count", [1, 2, 12])
def test_verdicts_with_and_without_a_checkpoint(tmp_path, batch_size, count):
    """Of images of each class, in batches of one too; a finished evaluation attacks nothing again."""
    x, labels, robust = case(count)
    attack = Counting()
    reports = [
        evaluate(folder, attack, data=(x, labels), batch_size=batch_size) for folder in (None, tmp_path, tmp_path)
    ]
    assert [timeless(report) for report in reports] == [timeless(reports[0])] * 3
    assert reports[0].robust_correct == robust
    assert len(attack.calls) == 2 * -(-count // batch_size)


def test_times_count_the_earlier_runs(tmp_path):
    first = evaluate(tmp_path)
    record = tmp_path / "stage-01-batch-00000.json"
    content = json.loads(record.read_text())
    assert content["correct"] == case()[2][:4] and 0 <= content["seconds"] <= first.attacks[0].seconds
    assert evaluate(tmp_path).attacks[0].seconds >= content["seconds"]


def test_models_of_the_package(tmp_path):
    model = MODELS["timm_resnet"].adapted(mode="adapter")
    x = pixels(6)
    labels = torch.arange(6) % 4
    options = {"model": model, "data": (x, labels), "threat_model": ThreatModel("linf", 0.003), "batch_size": 2}
    before = evaluate(tmp_path, **options)
    assert timeless(evaluate(tmp_path, **options)) == timeless(before)
    with pytest.raises(ValueError, match="They differ in route \\('robust' there, 'natural' here\\)"):
        evaluate(tmp_path, route="natural", **options)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_A" in name and "robust" in name).mul_(1.5)
    with pytest.raises(ValueError, match="They differ in weights"):
        evaluate(tmp_path, **options)


@pytest.mark.parametrize("part", ["lora_A.natural", "lora_A.robust"])
def test_the_other_route_may_be_asked_for_later(tmp_path, part):
    """Nothing is attacked again for it, and a model with another branch in any route is noticed."""
    model = MODELS["timm_resnet"].adapted(mode="adapter")
    with torch.no_grad():
        labels = model.eval().pixel_space()(pixels(6)).argmax(1)
    options = {"model": model, "data": (pixels(6), labels)}
    attack = Counting(2)
    first = evaluate(tmp_path, attack, **options)
    assert attack.calls == [4, 2]
    both = evaluate(tmp_path, attack, route="both", **options)
    assert len(attack.calls) <= 4 and both.other_route.route == "natural"
    assert timeless(both) == timeless(evaluate(None, Counting(2), route="both", **options))
    assert timeless(evaluate(tmp_path, attack, **options)) == timeless(first)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if part in name).mul_(1.5)
    with pytest.raises(ValueError, match="They differ in weights"):
        evaluate(tmp_path, attack, route="both", **options)


class Other(Channel):
    """Another network with the same weights."""


x, labels, _ = case()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": Channel(1e-7)},
            "They differ in weights. Repeat the evaluation as it was, or choose another folder",
        ),
        ({"model": Other()}, "They differ in network"),
        ({"seed": 1}, r"They differ in attacks .*; seed \(0 there, 1 here\)"),
        ({"batch_size": 5}, r"They differ in batch_size \(4 there, 5 here\)"),
        ({"attack": PGD(LINF, steps=11)}, "They differ in attacks"),
        ({"attack": ["pgd", Counting()]}, r"attacks .*; custom_attacks"),
        ({"threat_model": ThreatModel("linf", 0.031)}, r"threat_model: eps \(0.03 there, 0.031 here\)"),
        ({"threat_model": ThreatModel("l2", 0.03)}, r"threat_model: norm \('linf' there, 'l2' here\)"),
        ({"sample_indices": range(11)}, r"sample_indices \(12 there, 11 here, 11 in common\)"),
        ({"data": (x[:11], labels[:11])}, r"dataset_size \(12 there, 11 here\)"),
        (
            {"data": (x.flip(0), labels.flip(0))},
            "of other images: the ones at 0, 1, 2, 3 of the data set have changed",
        ),
        ({"data": (x, labels.clone().fill_(1))}, "of other images: the ones at 0, 2, 3 of the data set have changed"),
    ],
)
def test_another_evaluation_is_refused(tmp_path, changes, message):
    before = evaluate(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        evaluate(tmp_path, **changes)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    assert timeless(evaluate(tmp_path)) == timeless(before)


def test_other_versions_are_refused(tmp_path, monkeypatch):
    evaluate(tmp_path)
    monkeypatch.setattr("autolora_hf.__version__", "99")
    with pytest.raises(ValueError, match=r"They differ in versions: autolora_hf \('.*' there, '99' here\)"):
        evaluate(tmp_path)


def test_custom_attacks_are_known_by_what_they_state(tmp_path):
    evaluate(tmp_path, Counting(steps=2))
    with pytest.raises(
        ValueError, match=r"custom_attacks \(\['Counting\(steps=2\)'\] there, \['Counting\(steps=3\)'\]"
    ):
        evaluate(tmp_path, Counting(steps=3))
    with pytest.raises(ValueError, match=r"<function .* states none. Make it a dataclass"):
        evaluate(tmp_path / "new", lambda model, x, y: x)
    assert not (tmp_path / "new").exists()


def test_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("something")
    with pytest.raises(ValueError, match="`checkpoint_dir` must be a folder"):
        evaluate(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "something"


def truncated(content):
    return content[: len(content) // 2]


def empty(content):
    return b""


def changed_verdict(content):
    return content.replace(b"false", b"true ", 1) if b"false" in content else content.replace(b"true", b"null", 1)


def changed_bit(content):
    return content[:40] + bytes([content[40] ^ 1]) + content[41:]


def other_structure(content):
    return b"[1, 2]"


def not_a_number(content):
    return b'{"seconds": NaN, "sha256": "0"}'


@pytest.mark.parametrize("damage", [truncated, empty, changed_verdict, changed_bit, other_structure, not_a_number])
@pytest.mark.parametrize("name", ["stage-00-batch-00000", "stage-01-batch-00001", "stage-02-batch-00000"])
def test_damaged_files_are_measured_again(tmp_path, caplog, damage, name):
    expected = evaluate(tmp_path, [Counting(steps=1), Counting()])
    path = tmp_path / f"{name}.json"
    content = path.read_bytes()
    path.write_bytes(damage(content))
    attacks = [Counting(steps=1), Counting()]
    assert timeless(evaluate(tmp_path, attacks)) == timeless(expected)
    assert f"{name}.json" in caplog.text and "This batch is measured again." in caplog.text
    assert sum(len(attack.calls) for attack in attacks) == ("stage-00" not in name)
    caplog.clear()
    assert timeless(evaluate(tmp_path, [Counting(steps=1), Counting()])) == timeless(expected)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    repaired, original = json.loads(path.read_bytes()), json.loads(content)
    assert all(repaired[key] == original[key] for key in ("evaluation", "sample_indices", "correct"))


def test_damaged_manifest(tmp_path, caplog):
    """The files of the batches say themselves of what evaluation they are."""
    attack = Counting()
    expected = evaluate(tmp_path, attack)
    (tmp_path / "evaluation.json").write_bytes(b"{")
    again = Counting()
    assert timeless(evaluate(tmp_path, again)) == timeless(expected)
    assert again.calls == [] and "It is written anew." in caplog.text
    # Those of another evaluation are not believed.
    (tmp_path / "evaluation.json").write_bytes(b"{")
    evaluate(tmp_path, again, seed=1)
    assert again.calls == attack.calls and "belongs to another evaluation" in caplog.text


def test_files_of_other_batches_are_not_believed(tmp_path, caplog):
    expected = evaluate(tmp_path)
    for source, target in (
        ("stage-01-batch-00000", "stage-01-batch-00002"),
        ("stage-00-batch-00001", "stage-01-batch-00001"),
    ):
        (tmp_path / f"{target}.json").write_bytes((tmp_path / f"{source}.json").read_bytes())
    assert timeless(evaluate(tmp_path)) == timeless(expected)
    assert caplog.text.count("is about other images than PGD-10 has to be run on") == 2


class Rounding(Channel):
    """Answers otherwise for one clean image than before, as another processor might."""

    wrong = False
    __qualname__ = __name__ = "Channel"

    def forward(self, x):
        logits = super().forward(x)
        if self.wrong:
            logits[(x[:, 0, 7, 7] * 255).round() == 9] *= -1
        return logits


def test_earlier_clean_verdicts_count(tmp_path, caplog):
    # The diagnostics are of the model as it is now.
    expected = evaluate(tmp_path, model=Rounding(), diagnostics=False)
    model = Rounding()
    model.wrong = True
    assert timeless(evaluate(tmp_path, model=model, diagnostics=False)) == timeless(expected)
    assert "classifies 1 of 12 clean images otherwise" in caplog.text


class Wrapped(nn.Module):
    """What it does to the images shows neither in its weights nor in its layers."""

    def __init__(self, levels=0, blocks=False):
        super().__init__()
        self.model, self.levels, self.blocks = Channel(), levels, blocks

    def forward(self, x):
        logits = self.model((x * self.levels).round() / self.levels if self.levels else x)
        return logits.detach() if self.blocks else logits


@pytest.mark.parametrize("other", [Wrapped(levels=7), Wrapped(levels=31), Wrapped(blocks=True)])
def test_a_model_that_answers_otherwise_is_another_one(tmp_path, other):
    evaluate(tmp_path, model=other)
    with pytest.raises(ValueError, match="holds the verdicts of another model"):
        evaluate(tmp_path, model=Wrapped())
    (tmp_path / "answers.json").write_bytes(b"{")
    evaluate(tmp_path, model=Wrapped())  # what is damaged counts as not there


def test_rounding_is_no_other_model(tmp_path):
    class Rounded(Wrapped):
        def forward(self, x):
            return super().forward(x) * 1.00001 + 1e-6

    Rounded.__name__ = "Wrapped"
    expected = evaluate(tmp_path, model=Wrapped())
    assert evaluate(tmp_path, model=Rounded()).robust == expected.robust
