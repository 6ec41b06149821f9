"""ADMM on the unit Gram with a rising penalty: the default for quality."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from secateurs.layer import LayerProblem, LayerSolution
from secateurs.linalg import Damping, NotPositiveDefiniteError, masked_cg, raising_damp, shifted_inverse, unit_gram
from secateurs.scores import dead_first


@dataclass(frozen=True, kw_only=True)
class ADMM:
    """Alternate between the best dense weights near a sparse copy and the best sparse copy of them; then refit.

    On the damped Gram with unit diagonal A and T = goal * scale, with sparse copy Z and scaled dual U:
        Z = keep largest of (X + U),    U += X - Z,    X = T + (Z - U - T) rho (A + rho I)^-1
    The penalty rho rises geometrically over `levels`, one Cholesky each, and U is rescaled when it does. X is written
    as the target plus a correction, so rounding in the products touches only the correction.

    The splitting is that of ALPS (arXiv 2406.07831). Differences: a fixed ladder of penalties and a fixed number of
    steps instead of a support test every third step; Cholesky in float32 instead of an eigendecomposition in float64.
    """

    steps: int = 20
    levels: int = 10
    rho_first: float = 0.05
    rho_last: float = 1.0
    damp: float = 0.01
    damping: Damping = "mean"
    refit_steps: int = 10

    def __post_init__(self):
        if not 1 <= self.levels <= self.steps:
            raise ValueError(f"levels is {self.levels}, but it must be 1 to the number of steps, {self.steps}.")
        if not 0 < self.rho_first <= self.rho_last:
            raise ValueError(f"rho_first is {self.rho_first}, but it must be above 0 and at most rho_last.")

    def penalties(self) -> Iterator[float]:
        """The penalty of every step: `levels` values from `rho_first` to `rho_last`, evenly spread in ratio."""
        ratio = self.rho_last / self.rho_first
        for step in range(self.steps):
            level = step * self.levels // self.steps
            yield self.rho_first * ratio ** (level / max(self.levels - 1, 1))

    def solve(self, problem: LayerProblem) -> LayerSolution:
        """See `Solver.solve`. Raises NotPositiveDefiniteError, with the layer's name, if no damping helps."""
        started = time.perf_counter()
        dead = problem.dead
        goal = problem.goal.detach().float()
        penalties = list(self.penalties())

        def keep(raw: Tensor) -> Tensor:
            return problem.pattern.mask(dead_first(raw.abs(), goal, dead))

        def factorise(damp: float):
            unit = unit_gram(problem.gram.xtx, damp, self.damping)
            return unit, shifted_inverse(unit.matrix, penalties[0])

        try:
            (unit, inverse), damp = raising_damp(factorise, self.damp)
        except NotPositiveDefiniteError as error:
            raise NotPositiveDefiniteError(f"{problem.name}: {error}") from None
        target = goal * unit.scale
        raw = target.clone()  # X + U
        rho = penalties[0]
        for penalty in penalties:
            ratio = rho / penalty
            if penalty != rho:
                inverse, rho = shifted_inverse(unit.matrix, penalty), penalty
            mask = keep(raw)
            dual = (raw * ratio).masked_fill_(mask, 0)
            raw = raw.mul_(mask).sub_(dual).sub_(target)
            raw = (target + dual).addmm_(raw, inverse, alpha=rho)
        mask = keep(raw)
        refitted = masked_cg(target, raw, unit.matrix, mask, self.refit_steps)
        # The goal plus a correction: where nothing was pruned, not a bit changes.
        weight = (goal + (refitted - target).div_(unit.scale)).masked_fill_(~mask, 0).to(problem.weight.dtype)
        stats = {"damp": damp, "dead_inputs": float(dead.sum()), "zeros": float((~mask).sum())}
        stats["seconds"] = time.perf_counter() - started
        return LayerSolution(weight=weight, mask=mask, outcome=problem.outcome(damp > self.damp), stats=stats)
