"""The eps row of the error table, and what a threat model says of itself."""

import dataclasses

import pytest

from autolora_hf.config import PixelRadius, ThreatModel


@pytest.mark.parametrize(
    ("norm", "eps", "hint"),
    [
        ("linf", 0, "natural accuracy"),
        ("linf", -8 / 255, f"Did you mean {8 / 255}"),
        ("linf", 8, "8/255 = 0.03137"),
        ("linf", 1.0001, "largest sensible linf radius is 1"),
        ("l2", 128, "128/255 = 0.50196"),
        ("l2", 16.5, "largest sensible l2 radius is 16"),
        ("l2", -0.5, "Did you mean 0.5"),
        ("l2", 0.0, "natural accuracy"),
        ("l1", 12 * 255, "3060/255 = 12"),
        ("l1", 1025, "largest sensible l1 radius is 1024"),
    ],
)
def test_unlikely_radius_is_refused_with_the_likely_meaning(norm, eps, hint):
    with pytest.raises(ValueError) as error:
        ThreatModel(norm, eps)
    assert "`eps`" in str(error.value)
    assert hint in str(error.value)


@pytest.mark.parametrize("eps", [True, False, float("nan"), float("inf"), -float("inf"), "8/255", None])
def test_radius_must_be_a_finite_number(eps):
    with pytest.raises(ValueError, match="`eps` must be a finite number") as error:
        ThreatModel("linf", eps)
    assert repr(eps) in str(error.value)


@pytest.mark.parametrize("norm", ["Linf", "l0", 1, None])
def test_unknown_norm_is_refused(norm):
    with pytest.raises(ValueError, match="`norm` must be 'linf', 'l2' or 'l1'"):
        ThreatModel(norm, 0.1)


@pytest.mark.parametrize(
    ("norm", "eps"), [("linf", 1 / 255), ("linf", 1), ("l2", 0.5), ("l2", 3.0), ("l2", 16), ("l1", 12), ("l1", 255)]
)
def test_plausible_radius_is_accepted(norm, eps):
    assert ThreatModel(norm, eps).eps == eps


def test_default_is_the_common_one():
    assert ThreatModel() == ThreatModel("linf", 8 / 255)


@pytest.mark.parametrize(
    ("threat_model", "text"),
    [
        (ThreatModel("linf", 8 / 255), "Linf, eps = 8/255"),
        (ThreatModel("linf", 0.1), "Linf, eps = 0.1"),
        (ThreatModel("l2", 0.5), "L2, eps = 0.5"),
        (ThreatModel("l1", 12), "L1, eps = 12"),
    ],
)
def test_text_form(threat_model, text):
    assert str(threat_model) == text


def test_round_trip_and_immutability():
    threat_model = ThreatModel("l2", 0.5)
    assert ThreatModel(**threat_model.to_dict()) == threat_model
    with pytest.raises(dataclasses.FrozenInstanceError):
        threat_model.eps = 1.0


@pytest.mark.parametrize("text", ["8/0", "abc", ""])
def test_radius_text_that_is_no_number(text):
    with pytest.raises(ValueError, match="must be a number such as"):
        PixelRadius(text)


def test_radius_reads_fractions():
    assert PixelRadius("8/255") == 8 / 255 and PixelRadius(0.5) == 0.5
