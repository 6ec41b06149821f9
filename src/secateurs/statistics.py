"""Intervals and exact tests on scores of questions. No torch."""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

Z95 = 1.959964  # two-sided 95 % of the normal distribution


def mean_variance(values: Sequence[float]) -> float:
    """Variance of the mean of independent values, from their spread; 0 for a single one."""
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1) / len(values)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % normal interval of the mean of independent values. A single value has none: it comes back twice."""
    mean, error = sum(values) / len(values), math.sqrt(mean_variance(values))
    return mean - Z95 * error, mean + Z95 * error


def share_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % Wilson interval of a mean of shares in [0, 1], one a question.

    Several samples of one question are not independent, so the count that enters is the effective one, p(1-p)/SE²,
    with SE over questions; at 0 or 1, where no spread is seen, it is the number of questions. Never leaves [0, 1].
    """
    n = len(values)
    p = sum(values) / n
    variance = mean_variance(values)
    effective = p * (1 - p) / variance if variance > 0 else n
    centre = (p + Z95**2 / (2 * effective)) / (1 + Z95**2 / effective)
    half = Z95 / (1 + Z95**2 / effective) * math.sqrt(p * (1 - p) / effective + Z95**2 / (4 * effective**2))
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p-value of paired differences: the share of all 2^n choices of their signs with as large a sum.

    Exact, by adding up the distribution of the sum; for single answers, right or wrong, it is McNemar's exact test.
    Differences must be multiples of 1/k for a k that is not large, as means of a few shares are.
    """
    exact = [abs(Fraction(d).limit_denominator(10_000)) for d in differences]
    scale = math.lcm(*(d.denominator for d in exact), 1)
    steps = [int(d * scale) for d in exact if d]
    seen = abs(round(math.fsum(differences) * scale))
    reach = sum(steps)
    chance = np.zeros(2 * reach + 1)
    chance[reach] = 1.0
    for step in steps:
        moved = np.zeros_like(chance)
        moved[step:] += chance[: len(chance) - step] / 2
        moved[: len(chance) - step] += chance[step:] / 2
        chance = moved
    sums = np.abs(np.arange(-reach, reach + 1))
    return min(1.0, float(chance[sums >= seen].sum()))


def holm(values: Sequence[float]) -> list[float]:
    """p-values corrected for there being several (Holm 1979): of those below .05 none is wrong in 95 of 100 reports."""
    corrected = [0.0] * len(values)
    worst = 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        worst = max(worst, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = worst
    return corrected
