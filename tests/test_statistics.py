"""Intervals by hand and by simulation, and the exact test against every choice of signs."""

import math
from itertools import product
from statistics import variance

import numpy as np
import pytest

from secateurs.statistics import cost_ratio_interval, difference_interval, holm, share_interval, sign_flip, spread


def seed(values, start=0):
    """One seed's values of questions, numbered from `start`."""
    return {f"q{start + i}": value for i, value in enumerate(values)}


def test_share_interval_is_wilsons_and_wider_when_samples_agree():
    low, high = share_interval([seed([1.0] * 50 + [0.0] * 50)])
    assert low == pytest.approx(0.4038, abs=2e-3) and high == pytest.approx(0.5962, abs=2e-3)
    assert share_interval([seed([1.0] * 20)])[0] == pytest.approx(1 / (1 + 1.959964**2 / 20))
    assert share_interval([seed([1.0] * 20)])[1] == 1.0
    clustered, spread = share_interval([seed([1.0, 0.0] * 10)]), share_interval([seed([0.5, 0.5, 1.0, 0.0] * 5)])
    assert clustered[1] - clustered[0] > spread[1] - spread[0]


def test_the_interval_of_one_seed_is_what_it_has_been_to_the_last_digit():
    assert share_interval([seed([0.5, 1.0, 0.75, 0.0, 1.0, 1.0, 0.25])]) == (0.34542428879865317, 0.8599394441802124)
    assert share_interval([seed([1 / 3, 2 / 3, 1.0, 0.0, 1 / 3])]) == (0.19971262430688225, 0.7541794692630479)
    assert share_interval([seed([1.0] * 71 + [0.0] * 29)]) == (0.614107216285739, 0.7902044344075227)


def test_the_variance_of_one_seed_is_that_of_its_questions():
    values = [0.5, 1.0, 0.75, 0.0]
    assert spread([seed(values)]) == pytest.approx((0.5625, 4, variance(values) / 4, 0.0))
    assert spread([seed([0.25])]) == (0.25, 1, 0.0, 0.0), "a single question shows no variance"


def test_seeds_that_ask_other_questions_are_more_questions_until_they_differ():
    alike = spread([seed([1.0, 0.0, 1.0, 0.0]), seed([0.0, 1.0, 1.0, 0.0], 4)])
    assert alike == pytest.approx((0.5, 8, variance([1.0, 0.0] * 4) / 8, 0.0))
    apart = [1.0] * 9 + [0.0], [1.0] + [0.0] * 9
    found = spread([seed(apart[0]), seed(apart[1], 10)])
    both = variance([*apart[0], *apart[1]]) / 20
    assert found == pytest.approx((0.5, 20, both, variance([0.9, 0.1]) / 2 - both)), "so the sum is that of the seeds"


def test_seeds_that_ask_the_same_questions_count_them_once_and_what_they_differ_by_is_added():
    same = [1.0, 0.0, 1.0, 1.0]
    assert spread([seed(same), seed(same)]) == pytest.approx(spread([seed(same)]))
    apart = [[1.0] * 9 + [0.0], [1.0] + [0.0] * 9]
    questions = [(a + b) / 2 for a, b in zip(*apart, strict=True)]
    answers = variance([*apart[0], *apart[1]]) / 20
    found = spread([seed(values) for values in apart])
    assert found == pytest.approx((0.5, 10, variance(questions) / 10, variance([0.9, 0.1]) / 2 - answers))


def test_every_seed_weighs_the_same_whatever_it_asked():
    assert spread([seed([1.0] * 4), seed([0.0, 0.0], 2)]).mean == 0.5


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("interval", [share_interval, difference_interval])
def test_about_95_of_100_intervals_of_three_seeds_hold_the_truth(interval, same):
    """Questions of several difficulties, 100 a seed, answered once by two models of which the second is worse."""
    random = np.random.default_rng(7)
    paired = interval is difference_interval
    truth, held = (0.1 if paired else 0.6), 0
    for _ in range(400):
        ease = random.uniform(0.2, 1.0, size=(1 if same else 3, 100)) * np.ones((3, 1))
        values = (random.random(ease.shape) < ease).astype(float)
        if paired:
            values -= random.random(ease.shape) < ease - 0.1
        low, high = interval([seed(row, 0 if same else 100 * i) for i, row in enumerate(values)])
        held += low <= truth <= high
    assert 0.93 <= held / 400 <= 0.99


def test_seeds_that_differ_widen_the_interval_beyond_their_questions():
    """Seeds .08 apart: the questions alone would be wrong in one of three; of three seeds it cannot be known well."""
    random = np.random.default_rng(7)
    held = 0
    for _ in range(400):
        chance = 0.6 + random.normal(0, 0.08, size=(3, 1))
        values = (random.random((3, 100)) < chance).astype(float)
        low, high = share_interval([seed(row, 100 * i) for i, row in enumerate(values)])
        held += low <= 0.6 <= high
    assert 0.82 <= held / 400 <= 0.95


def by_agresti_and_min(differences):
    count, total = len(differences) + 2, sum(differences)
    squares = sum(d * d for d in differences) + 1 - total**2 / count
    half = 1.959964 * math.sqrt(squares) / count
    return max(-1.0, total / count - half), min(1.0, total / count + half)


@pytest.mark.parametrize(
    "differences",
    [
        [1.0] * 19 + [0.0],
        [1.0] * 20,
        [-1.0] * 20,
        [0.0] * 20,
        [1.0] * 30 + [-1.0] * 10 + [0.0] * 60,
        [0.5, -0.25],
        [1.0],
    ],
)
def test_a_difference_stays_between_one_and_minus_one_and_always_has_an_interval(differences):
    low, high = difference_interval([seed(differences)])
    assert (low, high) == pytest.approx(by_agresti_and_min(differences))
    assert -1 <= low <= sum(differences) / len(differences) <= high <= 1
    assert high - low > 0.1


def test_seeds_widen_the_interval_of_a_difference_too():
    alone, both = [0.4] * 100, [[0.8] * 100, [0.0] * 100]
    narrow, wide = difference_interval([seed(alone)]), difference_interval([seed(row) for row in both])
    _, _, _, of_seeds = spread([seed(row) for row in both])
    assert of_seeds == pytest.approx(0.16 - 200 / 199 * 0.16 / 200)
    half = math.hypot((narrow[1] - narrow[0]) / 2, 1.959964 * math.sqrt(of_seeds))
    assert wide == pytest.approx((0.4 * 100 / 102 - half, 1.0))


@pytest.mark.parametrize(
    "differences",
    [
        [1, 1, 1, -1, 0, 0, 1],
        [1, -1],
        [0.25, -0.5, 0.75, 0.75, 1.0, -0.25, 0.0],
        [1 / 3, 2 / 3, -1 / 3, 1.0, 1 / 3, 1 / 3],
        [0.5, 1 / 3, -1 / 6, 1.0],
    ],
)
def test_the_sign_flip_test_counts_every_choice_of_signs(differences):
    seen = abs(sum(differences)) - 1e-9
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
            for signs in product((1, -1), repeat=len(differences))]  # fmt: skip
    assert sign_flip(differences) == pytest.approx(sum(s >= seen for s in sums) / len(sums))


def test_it_is_mcnemars_exact_test_for_single_answers():
    right, wrong = 10, 2
    tail = sum(math.comb(right + wrong, k) for k in range(wrong + 1)) / 2 ** (right + wrong)
    assert sign_flip([1.0] * right + [-1.0] * wrong + [0.0] * 88) == pytest.approx(2 * tail)


def test_it_bears_the_extremes():
    assert sign_flip([]) == sign_flip([0.0, 0.0]) == 1.0
    assert sign_flip([0.1] * 3000) < 1e-100
    assert sign_flip([1.0, -1.0] * 500) == 1.0


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_a_ratio_of_costs_has_the_interval_of_resampled_questions():
    """Half of the time for each question; the same time and accuracy, two hundred times; nothing right at all."""
    first = {str(n): (2.0, 1.0) for n in range(9)}
    second = {str(n): (1.0, 1.0) for n in range(9)}
    assert cost_ratio_interval(first, second) == (0.5, 0.5)
    rng = np.random.default_rng(3)
    inside = 0
    for _ in range(200):  # both right three times of four and independent, with the same costs: the ratio is 1
        draws = [{str(n): (1.0, float(rng.random() < 0.75)) for n in range(60)} for _ in range(2)]
        low, high = cost_ratio_interval(*draws, draws=400)
        inside += low <= 1 <= high
    assert 180 <= inside <= 199
    assert cost_ratio_interval(first, {name: (1.0, 0.0) for name in first})[1] == math.inf
    assert cost_ratio_interval({name: (1.0, 0.0) for name in first}, first) == (0.0, 0.0)
    with pytest.raises(ValueError, match="the same questions"):
        cost_ratio_interval(first, {"other": (1.0, 1.0)})
