"""The tests that compare a claimed accuracy with a re-measured one: exact values, calibration, power."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, fisher_exact

from autolora_hf.evaluation import Accuracy
from autolora_hf.evaluation.comparison import (
    LEVEL,
    holm,
    paired_detectable_drop,
    paired_p_value,
    unpaired_detectable_drop,
    unpaired_p_value,
)


def accuracy(correct, total):
    """Without its interval, which plays no part in the tests and takes longer than they do."""
    return Accuracy(correct, total, 0, 1)


@pytest.mark.parametrize(
    ("lost", "gained", "expected"),
    [(0, 0, 1), (0, 5, 1), (5, 0, 1 / 32), (4, 0, 1 / 16), (3, 3, 42 / 64), (8, 1, 10 / 512)],
)
def test_sign_test_counts_the_coin_tosses(lost, gained, expected):
    assert paired_p_value(lost, gained) == pytest.approx(expected)


def test_tea_tasting():
    """Fisher's lady: all of four cups right, p = 1/70; three of four, p = 17/70."""
    assert unpaired_p_value(accuracy(4, 4), accuracy(0, 4)) == pytest.approx(1 / 70)
    assert unpaired_p_value(accuracy(3, 4), accuracy(1, 4)) == pytest.approx(17 / 70)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 300), st.integers(1, 300), st.data())
def test_fisher_agrees_with_scipy(first, second, data):
    claimed, found = (accuracy(data.draw(st.integers(0, total)), total) for total in (first, second))
    table = [[claimed.correct, first - claimed.correct], [found.correct, second - found.correct]]
    assert unpaired_p_value(claimed, found) == pytest.approx(fisher_exact(table, alternative="greater").pvalue)


def test_holm():
    assert holm([]) == []
    assert holm([0.04]) == [0.04]
    assert holm([0.04, 0.01]) == [0.04, 0.02]
    assert holm([0.04, 0.03]) == [0.06, 0.06], "the order of the p-values is kept"
    assert holm([0.9, 0.7, 0.001]) == pytest.approx([1, 1, 0.003])


@settings(deadline=None, max_examples=6)
@given(st.integers(30, 1000), st.floats(0.05, 0.95), st.integers(0, 2**32 - 1))
def test_an_honest_claim_seldom_fails_on_other_images(images, true, seed):
    """Two figures that depend on each other as much as they can, one measurement each, independently drawn."""
    random = np.random.default_rng(seed)
    rounds, failed = 200, 0
    for _ in range(rounds):
        claims = [accuracy(int((random.random(images) < share).sum()), images) for share in (true, 0.8 * true)]
        others = [accuracy(int((random.random(images) < share).sum()), images) for share in (true, 0.8 * true)]
        failed += min(holm([unpaired_p_value(*pair) for pair in zip(claims, others, strict=True)])) <= LEVEL
    assert failed <= binom.ppf(1 - 1e-6, rounds, LEVEL)


@settings(deadline=None, max_examples=6)
@given(st.integers(10, 1000), st.floats(0, 0.3), st.integers(0, 2**32 - 1))
def test_an_honest_claim_seldom_fails_on_the_same_images(images, undecided, seed):
    """Verdicts on some images depend on the random starts of the attack, anew in each measurement."""
    random = np.random.default_rng(seed)
    rounds, failed = 200, 0
    chance = np.where(random.random(images) < undecided, random.random(images), random.random(images) < 0.7)
    for _ in range(rounds):
        p_values = []
        for _ in range(2):
            claimed, found = random.random((2, images)) < chance
            p_values.append(paired_p_value(int((claimed & ~found).sum()), int((found & ~claimed).sum())))
        failed += min(holm(p_values)) <= LEVEL
    assert failed <= binom.ppf(1 - 1e-6, rounds, LEVEL)


@settings(deadline=None, max_examples=6)
@given(st.floats(0.2, 0.9), st.integers(0, 2**32 - 1))
def test_ten_points_too_many_on_500_images_are_found(true, seed):
    """On the same images always, on 500 others mostly; the figure beside it is honest."""
    random = np.random.default_rng(seed)
    verdicts = random.random(500) < true
    inflated = verdicts.copy()
    inflated[np.flatnonzero(~verdicts)[:50]] = True
    assert holm([paired_p_value(int((inflated & ~verdicts).sum()), 0), 1.0])[0] < 1e-9

    rounds = 100
    claim = accuracy(round(500 * (true + 0.1)), 500)
    found = sum(
        holm([unpaired_p_value(claim, accuracy(int(random.binomial(500, true)), 500)), 1.0])[0] <= LEVEL
        for _ in range(rounds)
    )
    # At an accuracy of one half the difference of two samples has a standard deviation of 3.2 points.
    assert found / rounds > 0.7
    assert unpaired_detectable_drop(claim, 500, LEVEL / 2) < 0.11


@pytest.mark.parametrize("claim", [accuracy(35, 50), accuracy(300, 500), accuracy(990, 1000)])
def test_detectable_drop_on_the_same_images_is_what_it_says(claim):
    drop = paired_detectable_drop(claim, LEVEL / 2)
    random = np.random.default_rng(0)
    lost = random.binomial(claim.total, drop, 2000)
    noticed = np.mean([paired_p_value(int(count), 0) <= LEVEL / 2 for count in lost])
    assert 0.77 < noticed < 0.84


@pytest.mark.parametrize(("claim", "images"), [(accuracy(35, 50), 60), (accuracy(300, 500), 500)])
def test_detectable_drop_on_other_images_is_what_it_says(claim, images):
    drop = unpaired_detectable_drop(claim, images)
    random = np.random.default_rng(0)
    found = random.binomial(images, claim.value - drop, 2000)
    noticed = np.mean([unpaired_p_value(claim, accuracy(int(count), images)) <= LEVEL for count in found])
    assert 0.77 < noticed < 0.84


def test_too_few_images_notice_nothing():
    assert paired_detectable_drop(accuracy(4, 100)) is None
    assert paired_detectable_drop(accuracy(5, 5)) == pytest.approx(0.8 ** (1 / 5)), "all five have to be lost"
    assert paired_detectable_drop(accuracy(5, 100)) == 0.05, "no more than all can be lost"
    assert unpaired_detectable_drop(accuracy(2, 3), 3) is None
    assert unpaired_detectable_drop(accuracy(0, 100), 100) is None
    # Fisher's lady again: only zero of four fails, which has probability 0.8 at an accuracy of 1 - 0.8^(1/4).
    assert unpaired_detectable_drop(accuracy(4, 4), 4, 1 / 69) == pytest.approx(0.8 ** (1 / 4))
