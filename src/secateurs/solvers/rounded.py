"""Weights that are int4 numbers: what another solver finds, rounded so that errors make up for each other."""

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from secateurs.int4 import EXACT, GROUP, group_scales, nearest
from secateurs.layer import LayerProblem, LayerSolution, Outcome
from secateurs.linalg import (
    Damping,
    NotPositiveDefiniteError,
    damped_inverse_factor,
    damping_diagonal,
    dead_inputs,
    row_chunks,
)
from secateurs.patterns import Columns

COLUMNS_AT_ONCE = 64
ROWS_AT_ONCE = 1024  # of a CPU: a block of columns stays in its cache


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """The solution of `base`, every weight an int4 number (`int4`): zeros stay zero, outputs change little.

    Column by column, those with the most energy first, each is rounded and the columns after it make up for that, as
    in GPTQ (Frantar et al. 2023, arXiv 2210.17323, eq. 2-4). Differs from it: scales are chosen before, for the least
    loss weighted by energy, and a weight that was pruned is rounded to 0. Then every weight in turn goes to the number
    that is best given all others, `sweeps` times, which never makes the damped loss worse: pruned weights could not
    make up for anything at first. What is kept near are the outputs of `base`, not those of the dense weights. Scales
    have five binary digits, so that weights are exact in a checkpoint of bfloat16, and `pack` finds them again.
    Of whole inputs that go (`Columns`), those that stay are grouped as they will be stored; one of which nothing is
    left keeps a number that is next to nothing, as `trim` sees from zeros what went.
    Cost: `base`, and (1 + 2 `sweeps`) d_out d_in^2 flops + 4/3 d_in^3; five d_in x d_in matrices.
    """

    base: Any
    sweeps: int = 1
    damp: float = 0.03
    damping: Damping = "capped"

    @property
    def by_rows(self) -> bool:
        """As `base`."""
        return self.base.by_rows

    def __post_init__(self):
        if self.sweeps < 0:
            raise ValueError(f"sweeps is {self.sweeps}, but it must be 0 or more (1 is a good value).")

    def solve(self, problem: LayerProblem) -> LayerSolution:
        """See `Solver.solve`. Weights that are kept may be zero, too. Where nothing goes, only rounds."""
        started = time.perf_counter()
        pattern, as_stored = problem.pattern, problem.weight.dtype
        if pattern.num_zeros(*problem.weight.shape):
            solution = self.base.solve(replace(problem, weight=problem.weight.float()))
        else:
            weight = problem.goal.detach().to(torch.float32, copy=True).masked_fill_(problem.weight == 0, 0)
            whole = torch.ones_like(weight, dtype=torch.bool)
            solution = LayerSolution(weight=weight, mask=whole, outcome=problem.outcome(), stats={})
        stays = solution.mask.any(0) if isinstance(pattern, Columns) else slice(None)
        weight, gram = solution.weight[:, stays], problem.gram.xtx[stays][:, stays]
        damp, raised = solution.stats.get("damp", 0.0), False
        if weight.numel():
            try:
                rounded, used = self._round(weight, gram)
            except NotPositiveDefiniteError as error:
                raise NotPositiveDefiniteError(f"{problem.name}: {error}") from None
            damp, raised = max(damp, used), used > self.damp
            if isinstance(pattern, Columns):
                next_to_nothing = 2.0**-24 if as_stored == torch.float16 else 2.0**-100
                rounded[0].masked_fill_(~rounded.any(0) & weight.any(0), next_to_nothing)
            solution.weight[:, stays] = rounded
        return LayerSolution(
            weight=solution.weight.to(as_stored),
            mask=solution.mask,
            outcome=max(solution.outcome, problem.outcome(raised), key=list(Outcome).index),
            stats=solution.stats | {"damp": damp, "seconds": time.perf_counter() - started},
        )

    def _round(
        self, weight: Float32[Tensor, "rows d_in"], gram: Float32[Tensor, "d_in d_in"]
    ) -> tuple[Float32[Tensor, "rows d_in"], float]:
        """The rounded weights, and the damping it took."""
        energy = gram.diagonal()
        order = energy.argsort(descending=True, stable=True)
        gram = gram[order][:, order]
        inverse = damped_inverse_factor(gram, self.damp, self.damping)
        extra, dead = damping_diagonal(gram, inverse.damp, self.damping), dead_inputs(gram)
        gram[dead], gram[:, dead] = 0, 0  # as in the factor
        gram.diagonal().add_(extra)
        rounded = torch.empty_like(weight)
        for rows in row_chunks(len(weight), ROWS_AT_ONCE * (4 if weight.is_cuda else 1)):
            columns = weight[rows].T[order]
            scales = group_scales(weight[rows], energy, EXACT).T.repeat_interleave(GROUP, 0)[order]
            kept = (columns != 0) & (scales != 0)
            scales.masked_fill_(scales == 0, 1)
            found = _one_after_the_other(columns, scales, kept, inverse.factor)
            for _ in range(self.sweeps):
                _each_given_the_others(found, columns, scales, kept, gram)
            rounded[rows] = torch.empty_like(found).index_copy_(0, order, found).T
        return rounded, inverse.damp


def _nearest(wanted: Tensor, scale: Tensor, kept: Tensor) -> Tensor:
    """The number nearest to each, 0 where none is `kept`."""
    return nearest(wanted, scale).mul_(scale).mul_(kept)


def _one_after_the_other(
    columns: Float32[Tensor, "d_in rows"],
    scales: Float32[Tensor, "d_in rows"],
    kept: Bool[Tensor, "d_in rows"],
    factor: Float32[Tensor, "d_in d_in"],
) -> Float32[Tensor, "d_in rows"]:
    """Each column rounded, its error taken up by those after it: `factor` is the upper U with U^T U = H^-1."""
    left, found = columns.clone(), torch.empty_like(columns)
    for start in range(0, len(left), COLUMNS_AT_ONCE):
        end = min(start + COLUMNS_AT_ONCE, len(left))
        corner, errors = factor[start:end, start:end], torch.empty_like(left[start:end])
        for j in range(end - start):
            at = start + j
            found[at] = _nearest(left[at], scales[at], kept[at])
            errors[j] = (left[at] - found[at]) / corner[j, j]
            left[at + 1 : end].addr_(corner[j, j + 1 :], errors[j], alpha=-1)
        left[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return found


def _each_given_the_others(
    found: Float32[Tensor, "d_in rows"],
    columns: Float32[Tensor, "d_in rows"],
    scales: Float32[Tensor, "d_in rows"],
    kept: Bool[Tensor, "d_in rows"],
    gram: Float32[Tensor, "d_in d_in"],
) -> None:
    """One sweep of coordinate descent over `found`, in place: less tr(E^T H E), E = `columns` - `found`."""
    for start in range(0, len(found), COLUMNS_AT_ONCE):
        end = min(start + COLUMNS_AT_ONCE, len(found))
        pull = gram[start:end] @ (columns - found)
        for j in range(end - start):
            at, before = start + j, found[start + j].clone()
            found[at] = _nearest(before + pull[j] / gram[at, at], scales[at], kept[at])
            pull.addr_(gram[start:end, at], before - found[at])
