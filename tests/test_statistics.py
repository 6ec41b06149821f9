"""Intervals by hand, and the exact test against every choice of signs."""

import math
from itertools import product

import pytest

from secateurs.statistics import holm, mean_interval, share_interval, sign_flip


def test_share_interval_is_wilsons_and_wider_when_samples_agree():
    low, high = share_interval([1.0] * 50 + [0.0] * 50)
    assert low == pytest.approx(0.4038, abs=2e-3) and high == pytest.approx(0.5962, abs=2e-3)
    assert share_interval([1.0] * 20)[0] == pytest.approx(1 / (1 + 1.959964**2 / 20))
    assert share_interval([1.0] * 20)[1] == 1.0
    clustered, spread = share_interval([1.0, 0.0] * 10), share_interval([0.5, 0.5, 1.0, 0.0] * 5)
    assert clustered[1] - clustered[0] > spread[1] - spread[0]


def test_mean_interval():
    low, high = mean_interval([0.0, 1.0, 1.0, 0.0])
    half = 1.959964 * math.sqrt(1 / 3 / 4)
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half))


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
