"""The tests that compare accuracies, claimed with re-measured ones and methods with each other: exact values,
calibration, power."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, fisher_exact, ttest_rel

from autolora_hf.evaluation import Accuracy
from autolora_hf.evaluation.comparison import (
    LEVEL,
    crossed_difference,
    holm,
    paired_detectable_drop,
    paired_p_value,
    sign_flip_p_value,
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


# ---- methods ----


def drawn(random, shape, mean=0.7, of_training=0.0, of_image=0.25):
    """Verdicts of trainings on images; some trainings are better, some images easier."""
    chance = mean + of_training * random.standard_normal((shape[0], 1)) + of_image * random.standard_normal(shape[1])
    return random.random(shape) < chance


def test_where_images_do_not_matter_it_is_the_t_test_of_the_trainings():
    # Every training has its images right in another place, so images differ no more than the rest does.
    own, others = (
        np.array([np.roll(np.arange(60) < count, 20 * training) for training, count in enumerate(counts)])
        for counts in ([50, 30, 40], [20, 25, 10])
    )
    found = crossed_difference(own, others)
    expected = ttest_rel(own.mean(1), others.mean(1))
    interval = expected.confidence_interval(0.95)
    assert found.value == pytest.approx(own.mean() - others.mean())
    assert found.p_value == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx((max(interval.low, -1), min(interval.high, 1)))


def test_where_trainings_agree_images_are_all_there_is():
    one = np.arange(400) % 4 > 0
    other = np.arange(400) % 5 > 0
    found = crossed_difference([one, one], [other, other])
    # The t-test of the images' differences.
    expected = ttest_rel(one.astype(float), other.astype(float))
    interval = expected.confidence_interval(0.95)
    assert found.value == pytest.approx(-0.05) and found.p_value == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_trainings_that_agree_by_chance_are_no_certainty():
    """Every training is better on 4 of 40 images, each on others: that says little of further images."""
    own, others = np.zeros((2, 3, 40), dtype=bool)
    for training in range(3):
        own[training, 8 * training : 8 * training + 8] = True
        others[training, 8 * training : 8 * training + 4] = True
    found = crossed_difference(own, others)
    assert found.value == pytest.approx(0.1)
    assert 0.03 < found.low < found.high < 0.17 and 1e-4 < found.p_value < LEVEL


def test_the_same_verdicts_differ_in_nothing():
    verdicts = drawn(np.random.default_rng(0), (3, 50))
    found = crossed_difference(verdicts, verdicts)
    assert (found.value, found.low, found.high, found.p_value) == (0, 0, 0, 1)
    assert sign_flip_p_value(verdicts, verdicts) == 1
    nothing, everything = np.zeros((2, 9), bool), np.ones((2, 9), bool)
    assert crossed_difference(everything, nothing).p_value == 0


def test_the_other_way_round():
    random = np.random.default_rng(1)
    own, others = drawn(random, (3, 60)), drawn(random, (3, 60), mean=0.5)
    one, other = crossed_difference(own, others), crossed_difference(others, own)
    assert (one.value, one.low, one.high) == pytest.approx((-other.value, -other.high, -other.low))
    assert one.p_value == pytest.approx(other.p_value)
    assert sign_flip_p_value(own, others) == pytest.approx(sign_flip_p_value(others, own))


@pytest.mark.parametrize(
    "shapes", [((1, 9), (1, 9)), ((3, 1), (3, 1)), ((3, 9), (2, 9)), ((3, 9), (3, 8)), ((9,), (9,))]
)
def test_what_cannot_be_compared(shapes):
    own, others = (np.ones(shape, bool) for shape in shapes)
    with pytest.raises(ValueError, match="two of each"):
        crossed_difference(own, others)


@pytest.mark.parametrize("of_training", [0.0, 0.1])
def test_equal_methods_seldom_differ(of_training):
    """Five per cent of the time, about; pooling the verdicts would say so far more often where trainings vary."""
    random = np.random.default_rng(2)
    rounds, found, pooled = 400, 0, 0
    for _ in range(rounds):
        easy = 0.2 * random.standard_normal(200)
        own, others = (
            random.random((3, 200)) < 0.7 + of_training * random.standard_normal((3, 1)) + easy for _ in range(2)
        )
        found += crossed_difference(own, others).p_value <= LEVEL
        lost, gained = int((own & ~others).sum()), int((others & ~own).sum())
        pooled += binomtest(lost, lost + gained).pvalue <= LEVEL
    assert found / rounds <= LEVEL + 3 * (LEVEL * (1 - LEVEL) / rounds) ** 0.5
    if of_training:
        assert pooled / rounds > 0.3


def test_a_better_method_is_found():
    random = np.random.default_rng(3)
    found = [
        crossed_difference(*(drawn(random, (3, 1000), mean, of_training=0.01, of_image=0) for mean in (0.8, 0.6)))
        for _ in range(40)
    ]
    assert sum(one.p_value <= LEVEL for one in found) >= 34
    assert sum(one.low <= 0.2 <= one.high for one in found) >= 34


def test_signs_are_flipped_image_by_image():
    random = np.random.default_rng(4)
    own, others = drawn(random, (2, 10)), drawn(random, (2, 10), 0.4)
    differences = own.astype(int).sum(0) - others.astype(int).sum(0)
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product((-1, 1), repeat=10)]
    assert sign_flip_p_value(own, others) == pytest.approx(np.mean(np.array(sums) >= abs(differences.sum())))


@pytest.mark.parametrize(("lost", "gained"), [(8, 1), (3, 3), (0, 5), (20, 9)])
def test_with_one_training_it_is_mcnemars_test(lost, gained):
    own = [[True] * lost + [False] * gained + [True] * 7]
    others = [[False] * lost + [True] * gained + [True] * 7]
    assert sign_flip_p_value(own, others) == pytest.approx(binomtest(lost, lost + gained).pvalue)
