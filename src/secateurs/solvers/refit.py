"""Least squares on a support: any solver's mask, with the best weights it can have."""

import time
from dataclasses import dataclass, replace
from typing import Any

from secateurs.layer import LayerProblem, LayerSolution
from secateurs.linalg import Damping, refit_on_mask, unit_gram


@dataclass(frozen=True, kw_only=True)
class Refit:
    """The mask of `base`, then `steps` of conjugate gradients towards the best weights on it, from its own.

    On the damped Gram H: min (t - z) H (t - z)^T over z with the row's support, all rows at once (`linalg.masked_cg`).
    Damping pulls towards the dense weights and so keeps a layer of few tokens from being fitted to noise. No row gets
    worse under H. Cost: `steps` products of 2 d_out d_in^2 flops; one d_in x d_in and two d_out x d_in matrices.
    """

    base: Any
    steps: int = 10
    damp: float = 0.03
    damping: Damping = "capped"

    @property
    def by_rows(self) -> bool:
        """As `base`."""
        return self.base.by_rows

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, but a refit takes at least 1 (10 is a good value).")

    def solve(self, problem: LayerProblem) -> LayerSolution:
        """See `Solver.solve`."""
        started = time.perf_counter()
        solution = self.base.solve(replace(problem, weight=problem.weight.float()))  # not rounded between the two
        unit = unit_gram(problem.gram.xtx, self.damp, self.damping)
        goal, start = problem.goal.detach().float(), solution.weight.mul_(unit.scale)
        weight = refit_on_mask(goal, start, unit, solution.mask, self.steps).to(problem.weight.dtype)
        return replace(solution, weight=weight, stats=solution.stats | {"seconds": time.perf_counter() - started})
