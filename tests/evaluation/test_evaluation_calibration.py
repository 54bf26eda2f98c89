"""Calibration: by hand, against torchmetrics, at the edges of bins, and of simulated forecasters."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autolora_hf.evaluation.calibration import Calibration, CalibrationBin, calibration


def test_by_hand():
    """Two bins: 0.2 and 0.4, of which one is right, |0.5 - 0.3|; 0.6, 0.8 and 1.0, of which one is, |1/3 - 0.8|."""
    found = calibration([0.2, 0.4, 0.6, 0.8, 1.0], [True, False, False, False, True], bins=2)
    assert found.bins == [
        CalibrationBin(0.0, 0.5, 2, pytest.approx(0.3), 0.5),
        CalibrationBin(0.5, 1.0, 3, pytest.approx(0.8), pytest.approx(1 / 3)),
    ]
    assert found.ece == pytest.approx(0.4 * 0.2 + 0.6 * (0.8 - 1 / 3))
    assert found.confidence == pytest.approx(0.6) and found.accuracy == 0.4
    assert found.overconfidence == pytest.approx(0.2)
    assert found.brier == pytest.approx((0.8**2 + 0.4**2 + 0.6**2 + 0.8**2 + 0) / 5)


def scattered(multiplier, offset, classes):
    """Confidences away from all edges of bins, each another one, and verdicts unrelated to them."""
    confidences = [((multiplier * index + offset) % 97 + 0.5) / 97 for index in range(97)]
    return confidences, [index * index % classes < classes // 2 for index in range(97)]


# `torchmetrics.functional.classification.binary_calibration_error(confidences, correct, n_bins, norm="l1")` of
# torchmetrics 1.9.0 on float64 tensors: the error of the confidence as the probability of being right.
@pytest.mark.parametrize(
    ("data", "bins", "golden"),
    [
        ((37, 11, 10), 15, 0.2764905941120204),
        ((37, 11, 10), 7, 0.25066425762567757),
        ((61, 5, 7), 15, 0.2725581889680094),
        ((10, 3, 7), 9, 0.3086938038048678),
    ],
)
def test_agrees_with_torchmetrics(data, bins, golden):
    assert calibration(*scattered(*data), bins).ece == pytest.approx(golden, abs=1e-12)


# `multiclass_calibration_error(logits.softmax(1), labels, num_classes, n_bins=15, norm="l1")` of torchmetrics 1.9.0,
# which computes in float32.
@pytest.mark.parametrize(("classes", "golden"), [(3, 0.40085771679878235), (10, 0.2944653332233429)])
def test_agrees_with_torchmetrics_on_a_classifier(classes, golden):
    angles = torch.arange(200 * classes, dtype=torch.float64).reshape(200, classes)
    probabilities = (3 * torch.sin(angles**2)).softmax(1)
    labels = torch.arange(200) ** 2 % classes
    confidences, predictions = probabilities.max(1)
    found = calibration(confidences.tolist(), (predictions == labels).tolist())
    assert found.ece == pytest.approx(golden, abs=1e-6)


@pytest.mark.parametrize(
    ("confidences", "correct"),
    [
        ([1.0] * 4, [True] * 4),
        ([0.0] * 4, [False] * 4),
        ([0.75] * 4, [True, True, False, True]),
        ([0.5, 0.5, 1.0, 0.0], [True, False, True, False]),
    ],
)
def test_perfect_calibration(confidences, correct):
    found = calibration(confidences, correct)
    assert found.ece == 0 and found.overconfidence == 0


def test_worst_calibration():
    found = calibration([1.0, 1.0, 0.0], [False, False, True])
    assert found.ece == 1 and found.brier == 1
    # Over- and underconfidence of different images cancel out in the mean, not in the error.
    assert found.overconfidence == pytest.approx(1 / 3)


def test_edges_belong_to_the_bin_below():
    """Guo et al.: ((m - 1) / M, m / M]. A confidence of 0 would have no bin; it belongs to the first one."""
    found = calibration([0.0, 0.2, math.nextafter(0.2, 1), 1.0], [True] * 4, bins=5)
    assert [row.count for row in found.bins] == [2, 1, 0, 0, 1]
    for bins in (1, 5, 10, 15, 49):
        edges = [index / bins for index in range(1, bins + 1)]
        assert [row.count for row in calibration(edges, [True] * bins, bins).bins] == [1] * bins
        assert [row.high for row in calibration(edges, [True] * bins, bins).bins] == edges


def test_empty_bins_have_no_means():
    found = calibration([0.9], [True], bins=2)
    assert found.bins[0] == CalibrationBin(0.0, 0.5, 0, None, None)
    assert found.bins[1].count == 1


def test_json():
    found = calibration([0.3, 0.9, 1.0], [False, True, True])
    content = json.loads(json.dumps(asdict(found), allow_nan=False))
    assert content == asdict(found)
    rows = [CalibrationBin(**row) for row in content.pop("bins")]
    assert Calibration(**content, bins=rows) == found and len(rows) == 15


def test_takes_arrays_and_tensors():
    values, right = [0.25, 0.75, 0.5], [True, False, True]
    expected = calibration(values, right)
    assert calibration(np.array(values, np.float32), np.array(right)) == expected
    assert calibration(torch.tensor(values), torch.tensor(right)) == expected


@pytest.mark.parametrize(
    ("confidences", "correct", "bins", "message"),
    [
        ([], [], 15, "empty"),
        ([0.5], [True, False], 15, "one value an image"),
        ([[0.5]], [[True]], 15, "one value an image"),
        ([1.0000001], [True], 15, r"in \[0, 1\], got 1"),
        ([-0.1, 2.0], [True, True], 15, "got -0.1 and 1 more"),
        ([float("nan")], [True], 15, "got nan"),
        ([0.5], [1], 15, "must be booleans, got int64"),
        ([0.5], [True], 0, "positive integer, got 0"),
        ([0.5], [True], True, "positive integer, got True"),
        ([0.5], [True], 1.5, "positive integer, got 1.5"),
    ],
)
def test_wrong_input(confidences, correct, bins, message):
    with pytest.raises(ValueError, match=message):
        calibration(confidences, correct, bins)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60), st.integers(1, 40))
def test_what_always_holds(rows, bins):
    confidences, correct = map(list, zip(*rows, strict=True))
    found = calibration(confidences, correct, bins)
    assert abs(found.overconfidence) <= found.ece + 1e-12 and found.ece <= 1 + 1e-12
    # The mean square is at least the square of the mean.
    assert found.ece**2 <= found.brier + 1e-12
    assert sum(row.count for row in found.bins) == len(rows)
    for row in found.bins:
        if row.count:
            assert row.low - 1e-12 <= row.confidence <= row.high + 1e-12
            assert 0 <= row.accuracy <= 1
    order = np.random.default_rng(0).permutation(len(rows))
    shuffled = calibration([confidences[place] for place in order], [correct[place] for place in order], bins)
    assert shuffled.ece == pytest.approx(found.ece, abs=1e-12)


def test_of_a_simulated_forecaster():
    """Right exactly as often as it says: an error near 0. Said 10 points too much: an error near 0.1."""
    rng = np.random.default_rng(0)
    chances = rng.uniform(0.3, 0.9, 100_000)
    right = rng.random(100_000) < chances
    assert calibration(chances, right).ece < 0.01
    found = calibration(chances + 0.1, right)
    assert found.ece == pytest.approx(0.1, abs=0.01)
    assert found.overconfidence == pytest.approx(0.1, abs=0.005)
    assert calibration(chances, right).brier < found.brier
