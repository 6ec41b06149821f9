"""Optimal brain surgeon for whole inputs: the cheapest go first, and what stays makes up for each of them exactly."""

import time
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateurs.layer import LayerProblem, LayerSolution
from secateurs.linalg import (
    Damping,
    NotPositiveDefiniteError,
    ScaledGram,
    cholesky,
    cholesky_inverse,
    raising_damp,
    unit_gram,
)
from secateurs.patterns import Columns


@dataclass(frozen=True, kw_only=True)
class OBS:
    """Remove groups of inputs greedily by what the output loses when all others are refitted, then refit exactly.

    With H = G + damping and C = H^-1 over what is left, removing the inputs R costs tr(W_R (C_RR)^-1 W_R^T), and then
        W -= W_R (C_RR)^-1 C_R:,    C -= C_:R (C_RR)^-1 C_R:
    (Hassibi & Stork 1993; for structures of transformers Kurtic et al. 2023, ZipLM, arXiv 2302.04089, eq. 2-4). Some
    go at a time, `steps` times in all; at the end the kept weights are solved for anew: W_K = (W H)_K (H_KK)^-1.
    Differs from ZipLM: groups of a step are removed together, by one factorisation, and the last solve takes out what
    rounding has added up. Weights of dead inputs cost nothing, so those go first. With a `loss_root` R the cost is
    tr(R W_R (C_RR)^-1 W_R^T R^T): what the model's loss would rise by, to second order, if outputs were independent of
    inputs (K-FAC, Martens & Grosse 2015). What stays is the same either way: least squares goes row by row. With
    `costs` those decide what goes, all at once.

    Only for `Columns`. Cost: about 2 d_in^3 flops and 2 d_out d_in^2, whatever is removed; three d_in x d_in matrices.
    """

    steps: int = 16
    damp: float = 0.01
    damping: Damping = "capped"

    @property
    def by_rows(self) -> bool:
        """Yes: rows choose together, as the pattern has it."""
        return True

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, but it takes at least 1 (16 is a good value).")
        if not self.damp > 0:
            raise ValueError(f"damp is {self.damp}, but it must be above 0 (0.01 is a good value).")

    def solve(self, problem: LayerProblem) -> LayerSolution:
        """See `Solver.solve`. ValueError for another pattern than `Columns`."""
        started, pattern = time.perf_counter(), problem.pattern
        if not isinstance(pattern, Columns):
            raise ValueError(f"{problem.name}: obs removes whole inputs, which {pattern} does not; use another solver")
        goal, dead = problem.goal.detach().float(), problem.dead

        def factorise(tried: float) -> tuple[ScaledGram, Tensor]:
            unit = unit_gram(problem.gram.xtx, tried, self.damping)
            return unit, cholesky_inverse(cholesky(unit.matrix))

        try:
            (unit, inverse), damp = raising_damp(factorise, self.damp)
        except NotPositiveDefiniteError as error:
            raise NotPositiveDefiniteError(f"{problem.name}: {error}") from None
        target = (goal * unit.scale).masked_fill_(dead, 0)
        if problem.costs is not None:
            kept = pattern.kept(problem.costs.to(target))
        else:
            judged = target if problem.loss_root is None else problem.loss_root.to(target) @ target
            kept = self._choose(judged, inverse, pattern)
        weight = torch.zeros_like(goal)
        if bool(kept.all()):
            weight.copy_(goal)
        elif bool(kept.any()):
            moments = target @ unit.matrix[:, kept]
            solved = torch.cholesky_solve(moments.T, cholesky(unit.matrix[kept][:, kept])).T
            weight[:, kept] = torch.where(dead[kept], goal[:, kept], solved / unit.scale[kept])
        mask = kept.expand(weight.shape).contiguous()
        stats = {"damp": damp, "dead_inputs": float(dead.sum()), "zeros": float((~mask).count_nonzero())}
        stats["seconds"] = time.perf_counter() - started
        outcome = problem.outcome(damp > self.damp)
        return LayerSolution(weight=weight.to(problem.weight.dtype), mask=mask, outcome=outcome, stats=stats)

    def _choose(
        self, target: Float[Tensor, "rank d_in"], inverse: Float[Tensor, "d_in d_in"], pattern: Columns
    ) -> Bool[Tensor, " d_in"]:
        """The inputs that stay. Works on what is left of `target` and `inverse`, which shrink."""
        size, groups = pattern.size, len(inverse) // pattern.size
        there = torch.arange(groups, device=inverse.device)  # the groups that are left
        run = there // (groups // pattern.runs)
        gone = groups // pattern.runs - pattern.keep  # of each run
        rounds = min(self.steps, gone)
        for step in range(rounds):
            count = gone * (step + 1) // rounds - gone * step // rounds
            costs = _costs(target, inverse, size)
            worst = torch.cat([mine[costs[mine].argsort(stable=True)[:count]] for mine in _members(run, pattern.runs)])
            stays = torch.ones(len(there), dtype=torch.bool, device=there.device)
            stays[worst] = False
            keep, out = (flags.repeat_interleave(size) for flags in (stays, ~stays))
            if bool(stays.any()):
                corner = cholesky(inverse[out][:, out])
                pushed = torch.cholesky_solve(inverse[out][:, keep], corner)
                target = target[:, keep].addmm_(target[:, out], pushed, alpha=-1)
                inverse = inverse[keep][:, keep].addmm_(inverse[keep][:, out], pushed, alpha=-1)
            there, run = there[stays], run[stays]
        kept = torch.zeros(groups, dtype=torch.bool, device=inverse.device)
        kept[there] = True
        return kept.repeat_interleave(size)


def _members(run: Tensor, runs: int) -> list[Tensor]:
    """The places of every run."""
    return [(run == number).nonzero().squeeze(-1) for number in range(runs)]


def _costs(
    target: Float[Tensor, "rank left"], inverse: Float[Tensor, "left left"], size: int
) -> Float[Tensor, " groups"]:
    """What the output loses when one group goes and the others are refitted: tr(W_g (C_gg)^-1 W_g^T) of each."""
    if size == 1:
        return target.square().sum(0) / inverse.diagonal()
    groups = len(inverse) // size
    corners = torch.stack([inverse[i : i + size, i : i + size] for i in range(0, len(inverse), size)])
    columns = target.T.reshape(groups, size, -1)
    return torch.linalg.solve_triangular(cholesky(corners), columns, upper=False).square().sum((1, 2))
