"""Intervals and exact tests on scores of questions. No torch."""

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

Z95 = 1.959964  # two-sided 95 % of the normal distribution


class Spread(NamedTuple):
    """A mean over seeds and questions, and its variance in two parts."""

    mean: float
    questions: int
    """Different ones."""
    of_questions: float
    """With the seeds as they are."""
    of_seeds: float
    """What is added because they differ by more than the chance in their answers; 0 for a single one."""


def spread(seeds: Sequence[Mapping[str, float]]) -> Spread:
    """Mean over seeds of each one's mean over its own questions, with two-way clustered variance.

    Questions and seeds are both clusters (Cameron, Gelbach & Miller 2011, J. Bus. Econ. Stat. 29:238): to the variance
    between questions is added that between seeds, less that of all answers as if each were independent, where this is
    above 0; each has its n/(n-1). A seed with as many questions of its own is as good as so many more questions, one
    with the same questions is not. From a single question no variance is seen, and it is 0.
    """
    means = [sum(values.values()) / len(values) for values in seeds]
    mean = sum(means) / len(means)

    def variance(clusters: int, of: Callable[[int, str], Hashable]) -> float:
        sums: dict[Hashable, float] = defaultdict(float)
        for seed, values in enumerate(seeds):
            weight = clusters / (len(seeds) * len(values))
            for question, value in values.items():
                sums[of(seed, question)] += weight * (value - mean)
        return sum(total**2 for total in sums.values()) / max(clusters - 1, 1) / clusters

    questions = len(set().union(*seeds))
    of_questions = variance(questions, lambda _, question: question)
    of_answers = variance(sum(map(len, seeds)), lambda *both: both)
    between = sum((one - mean) ** 2 for one in means) / max(len(means) - 1, 1) / len(means)
    return Spread(mean, questions, of_questions, max(0.0, between - of_answers))


def share_interval(seeds: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """95 % Wilson interval of a mean of shares in [0, 1], given for each seed by question.

    Several samples of one question are not independent, nor are seeds' answers to it, so the count that enters is the
    effective one, p(1-p)/V, with V of `spread`; where that is 0, as at 0 or 1, it is the number of different questions.
    Never leaves [0, 1].
    """
    p, questions, of_questions, of_seeds = spread(seeds)
    variance = of_questions + of_seeds
    effective = p * (1 - p) / variance if variance > 0 else questions
    centre = (p + Z95**2 / (2 * effective)) / (1 + Z95**2 / effective)
    half = Z95 / (1 + Z95**2 / effective) * math.sqrt(p * (1 - p) / effective + Z95**2 / (4 * effective**2))
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


def difference_interval(seeds: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """95 % interval of a mean of paired differences in [-1, 1], given for each seed by question.

    As if there were two more questions, of which half a one was won, half a one lost and one tied (Agresti & Min 2005,
    Statistics in Medicine 24:729), so it has a width where all differences are equal; what seeds add (`spread`) is
    added. It is not centred at the plain mean, but holds it. Never leaves [-1, 1].
    """
    mean, n, of_questions, of_seeds = spread(seeds)
    squares = n * (n - 1) * of_questions  # about the plain mean
    variance = (squares + 1 + 2 * n * mean**2 / (n + 2)) / (n + 2) ** 2 + of_seeds
    centre, reach = mean * n / (n + 2), Z95 * math.sqrt(variance)
    return max(-1.0, centre - reach), min(1.0, centre + reach)


def cost_ratio_interval(
    first: Mapping[str, tuple[float, float]], second: Mapping[str, tuple[float, float]], draws: int = 4000
) -> tuple[float, float]:
    """95 % interval of the second's cost of a success over the first's: (cost, success) of both by question.

    Percentiles of what resampled questions give (Efron 1979, Ann. Statist. 7:1), from a fixed seed; a draw without a
    success of the first has 0, one without any of the second infinity. ValueError for other questions.
    """
    if set(first) != set(second):
        raise ValueError("ratios of costs are of the same questions")
    names = sorted(first)
    weights = np.random.default_rng(0).multinomial(len(names), [1 / len(names)] * len(names), size=draws)
    sums = [weights @ np.array([of[name] for name in names], dtype=float) for of in (first, second)]
    with np.errstate(divide="ignore", invalid="ignore"):
        base, other = (each[:, 0] / each[:, 1] for each in sums)
        ratios = np.nan_to_num(other / base, nan=np.inf, posinf=np.inf)
    low, high = np.quantile(ratios, [0.025, 0.975], method="nearest")
    return float(low), float(high)


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
