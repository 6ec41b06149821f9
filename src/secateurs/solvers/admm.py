"""ADMM on the unit Gram with a rising penalty: the default for quality."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from secateurs.layer import LayerProblem, LayerSolution
from secateurs.linalg import (
    Damping,
    NotPositiveDefiniteError,
    UnitGram,
    cholesky,
    raising_damp,
    refit_on_mask,
    unit_gram,
)
from secateurs.scores import dead_first


@dataclass(frozen=True, kw_only=True)
class ADMM:
    """Alternate between the best dense weights near a sparse copy and the best sparse copy of them; then refit.

    On the damped Gram with unit diagonal A and T = goal * scale, with sparse copy Z and scaled dual U:
        Z = keep largest of (X + U),    U += X - Z,    X = T + rho (Z - U - T)(A + rho I)^-1
    The penalty rho rises geometrically over `levels`, one Cholesky each, and U is rescaled when it does. X is written
    as the target plus a correction, so rounding in the products touches only the correction.

    The splitting is that of ALPS (arXiv 2406.07831). Differences: a fixed ladder of penalties and a fixed number of
    steps instead of a test of the support every third step; float32 Cholesky instead of a float64 eigendecomposition;
    three times the damping, which costs error on the tokens solved on and gains it on others (docs/solvers.md).
    Cost: a product of 2 d_out d_in^2 flops a step, d_in^3 a level, four products to refit. Memory beside the problem:
    two d_in x d_in and four d_out x d_in matrices.
    """

    steps: int = 20
    levels: int = 10
    """Penalties, evenly spread in ratio. More levels and steps gain a percent for several times the time."""
    rho_first: float = 0.1
    rho_last: float = 1.0
    """In units of the diagonal of A. It must reach about 1 for the support to settle."""
    damp: float = 0.03
    damping: Damping = "mean"
    refit_steps: int = 3

    def __post_init__(self):
        if not 1 <= self.levels <= self.steps:
            raise ValueError(f"levels is {self.levels}, but it must be 1 to the number of steps, {self.steps}.")
        if not 0 < self.rho_first <= self.rho_last:
            raise ValueError(f"rho_first is {self.rho_first}, but it must be above 0 and at most rho_last.")
        if not self.damp > 0:
            raise ValueError(f"damp is {self.damp}, but it must be above 0 (0.03 is a good value).")

    def penalties(self) -> Iterator[tuple[float, int]]:
        """Each penalty, and for how many steps."""
        for level in range(self.levels):
            share = level / max(self.levels - 1, 1)
            first, end = (-(-self.steps * edge // self.levels) for edge in (level, level + 1))
            yield self.rho_first * (self.rho_last / self.rho_first) ** share, end - first

    def solve(self, problem: LayerProblem) -> LayerSolution:
        """See `Solver.solve`. Raises NotPositiveDefiniteError, with the layer's name, if no damping helps."""
        started = time.perf_counter()
        goal = problem.goal.detach().float()
        dead = problem.dead
        some_dead = bool(dead.any())

        def keep(raw: Tensor) -> Tensor:
            scores = raw.abs()
            return problem.pattern.mask(dead_first(scores, goal, dead) if some_dead else scores)

        def factorise(damp: float) -> tuple[UnitGram, Tensor]:
            unit = unit_gram(problem.gram.xtx, damp, self.damping)
            return unit, _factor(unit.matrix, self.rho_first)

        try:
            (unit, lower), damp = raising_damp(factorise, self.damp)
        except NotPositiveDefiniteError as error:
            raise NotPositiveDefiniteError(f"{problem.name}: {error}") from None
        raw = self._split(goal * unit.scale, unit.matrix, lower, keep)
        mask = keep(raw)
        weight = refit_on_mask(goal, raw, unit, mask, self.refit_steps).to(problem.weight.dtype)
        stats = {"damp": damp, "dead_inputs": float(dead.sum()), "zeros": float((~mask).sum())}
        stats["seconds"] = time.perf_counter() - started
        return LayerSolution(weight=weight, mask=mask, outcome=problem.outcome(damp > self.damp), stats=stats)

    def _split(self, target: Tensor, a: Tensor, lower: Tensor, keep: Callable[[Tensor], Tensor]) -> Tensor:
        """X + U after the last step, from A and the factor of the first penalty.

        Products with a 0/1 float mask: boolean ones take several times as long.
        """
        raw, last = target, self.rho_first
        for rho, steps in self.penalties():
            solve = _resolvent(lower if rho == last else _factor(a, rho), len(target))
            for _ in range(steps):
                sparse = raw * keep(raw).to(raw.dtype)
                dual = (raw - sparse).mul_(last / rho)
                step = solve(sparse.sub_(dual).sub_(target))
                raw = dual.add_(target).add_(step, alpha=rho)
                last = rho
        return raw


def _factor(a: Tensor, rho: float) -> Tensor:
    """The lower Cholesky factor of A + rho I."""
    shifted = a.clone()
    shifted.diagonal().add_(rho)
    return cholesky(shifted)


def _resolvent(lower: Tensor, d_out: int) -> Callable[[Tensor], Tensor]:
    """B -> B (L L^T)^-1 by two triangular solves, or, where d_out >= d_in repays an inverse, by one product."""
    if d_out >= len(lower):
        inverse = torch.cholesky_inverse(lower)
        return lambda b: b @ inverse

    def solve(b: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(lower.T, b, upper=True, left=False)
        return torch.linalg.solve_triangular(lower, half, upper=False, left=False)

    return solve
