"""ADMM in conditional units with a rising penalty: the default."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from secateurs.layer import LayerProblem, LayerSolution
from secateurs.linalg import (
    ROWS_AT_ONCE,
    Damping,
    NotPositiveDefiniteError,
    ScaledGram,
    cholesky,
    cholesky_inverse,
    conditional_gram,
    fast_product,
    raising_damp,
    refit_on_mask,
    row_chunks,
)
from secateurs.patterns import Pattern
from secateurs.scores import dead_first

WARM_REFIT_STEPS = 2
SETTLED = 0.05  # of the kept weights may still change in a step
SETTLE_GROWTH = 1.3  # of the penalty, a step
SETTLE_STEPS = 12  # at most

Resolvent = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class ADMM:
    """Alternate between the best dense weights near a sparse copy and the best sparse copy of them; then refit.

    On the damped Gram in conditional units A and T = goal * scale, with sparse copy Z and scaled dual U:
        Z = keep largest of (X + U),    U += X - Z,    X = T + rho (Z - U - T)(A + rho I)^-1
    The penalty rho rises geometrically over `levels`, one Cholesky each, and U is rescaled when it does. X is written
    as the target plus a correction, so rounding in the products touches only the correction.

    The splitting is that of ALPS (arXiv 2406.07831). Differences: the units (`linalg.conditional_gram`) in which
    weights are compared and the penalty is counted; a fixed ladder of penalties and a fixed number of steps instead of
    a test of the support every third step; float32 Cholesky instead of a float64 eigendecomposition; more damping,
    which costs error on the tokens solved on and gains it on others (docs/solvers.md for all of it).
    Cost: a product of 2 d_out d_in^2 flops a step, d_in^3 a level, four products to refit. Memory beside the problem:
    three d_in x d_in and three d_out x d_in matrices.
    """

    steps: int = 12
    levels: int = 6
    """Penalties, evenly spread in ratio. 20 steps in 10 levels gain .6 %, 40 in 20 1 %.

    Where the support then still moves, as with few inputs or massive channels, the penalty goes on rising until it
    has settled. On large layers of real models it has.
    """
    rho_first: float = 0.2
    rho_last: float = 0.5
    """In units of the mean diagonal of A. Higher, and the support settles too early; lower, and it does not settle."""
    conditional: float = 0.75
    """0: an input counts as large as it is. 1: as large as what the others do not explain of it."""
    damp: float = 0.02
    damping: Damping = "capped"
    refit_steps: int = 3

    @property
    def by_rows(self) -> bool:
        """Yes."""
        return True

    def __post_init__(self):
        if not 1 <= self.levels <= self.steps:
            raise ValueError(f"levels is {self.levels}, but it must be 1 to the number of steps, {self.steps}.")
        if not 0 < self.rho_first <= self.rho_last:
            raise ValueError(f"rho_first is {self.rho_first}, but it must be above 0 and at most rho_last.")
        if not 0 <= self.conditional <= 1:
            raise ValueError(f"conditional is {self.conditional}, but it must be in [0, 1] (0.75 is a good value).")
        if not self.damp > 0:
            raise ValueError(f"damp is {self.damp}, but it must be above 0 (0.02 is a good value).")

    def penalties(self) -> Iterator[tuple[float, int]]:
        """Each penalty, and for how many steps."""
        for level in range(self.levels):
            share = level / max(self.levels - 1, 1)
            first, end = (-(-self.steps * edge // self.levels) for edge in (level, level + 1))
            yield self.rho_first * (self.rho_last / self.rho_first) ** share, end - first

    def solve(self, problem: LayerProblem) -> LayerSolution:
        """See `Solver.solve`. Raises NotPositiveDefiniteError, with the layer's name, if no damping helps."""
        return next(self.path(problem, [problem.pattern]))

    def path(self, problem: LayerProblem, patterns: Sequence[Pattern]) -> Iterator[LayerSolution]:
        """A solution for each of `patterns` (not `problem.pattern`), the SPARSEST FIRST.

        The first is that of `solve`, up to rounding where d_out < d_in. Each later one starts from the state before:
        one step a penalty, by inverses made once and kept. Going down, a weight that comes back has a dual to come back
        with; going up, the error is 4 % above a single solve's, not 1 % (docs/solvers.md). Memory: a d_in x d_in matrix
        a penalty more.
        """
        started = time.perf_counter()
        goal = problem.goal.detach().float()
        dead = problem.dead
        some_dead = bool(dead.any())

        def factorise(damp: float) -> tuple[ScaledGram, Tensor]:
            scaled = conditional_gram(problem.gram.xtx, damp, self.damping, self.conditional)
            return scaled, _factor(scaled.matrix, self.rho_first)

        try:
            (scaled, lower), damp = raising_damp(factorise, self.damp)
        except NotPositiveDefiniteError as error:
            raise NotPositiveDefiniteError(f"{problem.name}: {error}") from None
        target, outcome = goal * scaled.scale, problem.outcome(damp > self.damp)
        raw, last, refit_steps = target.clone(), self.rho_first, self.refit_steps
        ladder: Iterable[tuple[float, int, Resolvent]]
        if len(patterns) == 1:
            ladder = self._ladder(scaled.matrix, lower, len(goal))
        else:
            ladder = list(self._ladder(scaled.matrix, lower, None))
        del lower
        for number, pattern in enumerate(patterns):
            pattern.check(*goal.shape)

            def keep(raw: Tensor, pattern: Pattern = pattern) -> Tensor:
                scores = raw.abs()
                return pattern.mask(dead_first(scores, goal, dead) if some_dead else scores)

            if number == 1:
                refit_steps = min(self.refit_steps, WARM_REFIT_STEPS)
                ladder = [(rho, 1, solve) for rho, _, solve in ladder]
            last, mask = _split(raw, last, target, scaled.matrix, ladder, keep, pattern)
            if number == len(patterns) - 1:
                target = raw  # the last one needs it no more: a matrix less in memory
            weight = refit_on_mask(goal, raw, scaled, mask, refit_steps).to(problem.weight.dtype)
            stats = {"damp": damp, "dead_inputs": float(dead.sum()), "zeros": float((~mask).count_nonzero())}
            stats["seconds"] = time.perf_counter() - started
            yield LayerSolution(weight=weight, mask=mask, outcome=outcome, stats=stats)
            started = time.perf_counter()

    def _ladder(self, a: Tensor, lower: Tensor, d_out: int | None) -> Iterator[tuple[float, int, Resolvent]]:
        """Each penalty, for how many steps, and its resolvent, one at a time; `lower` is the first one's factor."""
        first: Tensor | None = lower
        del lower
        for rho, steps in self.penalties():
            solve = _resolvent(_factor(a, rho) if first is None else first, d_out)
            first = None
            yield rho, steps, solve
            del solve


def _split(
    raw: Tensor,
    last: float,
    target: Tensor,
    a: Tensor,
    ladder: Iterable[tuple[float, int, Resolvent]],
    keep: Callable[[Tensor], Tensor],
    pattern: Pattern,
) -> tuple[float, Tensor]:
    """Take X + U in `raw` through the ladder, then, a step a penalty, the rows whose support still moves.

    Returns the last penalty and the support. U shrinks as the penalty rises, and stays when it falls: grown, what was
    pruned would all come back.
    """
    kept = None
    for rho, steps, solve in ladder:
        for _ in range(steps):
            del kept  # before the next one is made
            kept = keep(raw)
            _step(raw, kept, target, min(last / rho, 1.0), rho, solve)
            last = rho
        del solve
    for _ in range(SETTLE_STEPS):
        mask = keep(raw)
        moving = _moving(mask, kept, pattern)
        if not len(moving):
            return last, mask
        kept = None
        rho = last * SETTLE_GROWTH
        solve = _resolvent(_factor(a, rho), 0)  # no inverse: it would have to serve one step
        for rows in moving.split(ROWS_AT_ONCE // 2):
            part = raw[rows]
            _step(part, mask[rows], target[rows], last / rho, rho, solve)
            raw[rows] = part
        kept, last = mask, rho
        del solve, part, mask
    return last, keep(raw)


def _step(raw: Tensor, kept: Tensor, target: Tensor, shrink: float, rho: float, solve: Resolvent) -> None:
    """X + U in `raw` becomes that of the next step, U having shrunk; chunks of rows, which saves memory."""
    for rows in row_chunks(len(raw), ROWS_AT_ONCE):
        sparse = kept[rows].to(raw.dtype).mul_(raw[rows])
        dual = raw[rows].sub_(sparse).mul_(shrink)
        step = solve(sparse.sub_(dual).sub_(target[rows]))
        dual.add_(target[rows]).add_(step, alpha=rho)
        del sparse, step


def _moving(mask: Tensor, before: Tensor | None, pattern: Pattern) -> Tensor:
    """Numbers of rows of whose kept weights more than SETTLED changed; those that share a budget all or none."""
    assert before is not None, "a ladder has a step"
    changed, kept = (mask != before).sum(1, dtype=torch.float32), mask.sum(1, dtype=torch.float32)
    for rows in pattern.shared_rows(len(mask)):
        changed[rows], kept[rows] = changed[rows].sum(), kept[rows].sum()
    return (changed > SETTLED * kept).nonzero().flatten()


def _factor(a: Tensor, rho: float) -> Tensor:
    """The lower Cholesky factor of A + rho I."""
    shifted = a.clone()
    shifted.diagonal().add_(rho)
    return cholesky(shifted)


def _resolvent(lower: Tensor, d_out: int | None) -> Resolvent:
    """B -> B (L L^T)^-1 by two triangular solves, or, where d_out >= d_in or much use (None) repays it, an inverse."""
    if d_out is None or d_out >= len(lower):
        inverse = cholesky_inverse(lower)
        return lambda b: fast_product(b, inverse)
    return partial(_by_triangles, lower)


def _by_triangles(lower: Tensor, b: Tensor) -> Tensor:
    half = torch.linalg.solve_triangular(lower.T, b, upper=True, left=False)
    return torch.linalg.solve_triangular(lower, half, upper=False, left=False)
