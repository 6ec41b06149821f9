"""Exchange kept and pruned weights one by one, each exchange judged with every other weight of its row refitted."""

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from secateurs.layer import LayerProblem, LayerSolution
from secateurs.linalg import Damping, cholesky, refit_on_mask, unit_gram
from secateurs.patterns import NM, Pattern

ROWS_AT_ONCE = 16
PAIRS_AT_ONCE = 2**21  # of kept inputs, in the rows that are at work at once; on a GPU eight times as many
NEVER = float("inf")
TENURE = 1  # exchanges during which a weight that has moved stays


@dataclass(frozen=True, kw_only=True)
class Swaps:
    """The mask of `base`, improved by exact exchanges until none of a shortlist helps, then by tabu search; refit.

    For a row with support S, best weights z on it and residual correlations r = (t - z) A, over a shortlist of weights
    that cost least to lose and inputs that would gain most, Goodnight's sweep matrix of A on S is kept:
        N_SS = -A_SS^-1,    N_SP = A_SS^-1 A_SP,    N_PP = A_PP - A_PS A_SS^-1 A_SP
    Taking p in and leaving u out then changes the loss, all other weights refitted, by exactly
        -r_p^2 / N_pp + (z_u - N_up r_p / N_pp)^2 / (N_up^2 / N_pp - N_uu)
    The best exchange of every row is made, the matrix swept twice, and so on. Where the pattern counts over the layer,
    rows also trade places with each other. A is the damped Gram with unit diagonal. What is kept never has more loss.

    Cost: (2/3 k^3 + 2 k^2 c) flops a row of k kept weights, c candidates; for a last percent, on layers you can wait
    for. Memory beside the problem: one (2 c)^2 matrix a row, and k^2 for a few rows at a time.
    """

    base: Any
    candidates: int = 32
    """Of each kind in every row; with N:M, as many whole groups as make twice that number."""
    rounds: int = 16
    """Of exchanges that help, one a row each."""
    kicks: int = 8
    """Exchanges after that which may hurt; the best state is kept."""
    damp: float = 0.03
    damping: Damping = "capped"
    refit_steps: int = 10

    @property
    def by_rows(self) -> bool:
        """As `base`."""
        return self.base.by_rows

    def __post_init__(self):
        for name, least in (("candidates", 1), ("rounds", 1), ("kicks", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, but it must be {least} or more.")

    def solve(self, problem: LayerProblem) -> LayerSolution:
        """See `Solver.solve`. Raises NotPositiveDefiniteError where `base` does."""
        started = time.perf_counter()
        solution: LayerSolution = self.base.solve(replace(problem, weight=problem.weight.float()))
        if bool(solution.mask.all()):
            return replace(solution, weight=solution.weight.to(problem.weight.dtype))
        unit = unit_gram(problem.gram.xtx, self.damp, self.damping)
        goal = problem.goal.detach().float()
        target = goal * unit.scale
        frozen = problem.dead
        pairs = max(int(solution.mask.sum(1).max()), 1) ** 2
        at_once = min(ROWS_AT_ONCE, max(1, PAIRS_AT_ONCE * (8 if target.is_cuda else 1) // pairs))
        tables = [
            self._tables(target[rows], unit.matrix, solution.mask[rows], frozen, problem.pattern)
            for rows in torch.arange(len(target), device=target.device).split(at_once)
        ]
        state = _State(*(torch.cat(parts) for parts in zip(*tables, strict=True)))
        swaps = state.improve(problem.pattern, self.rounds)
        state.wander(problem.pattern, self.kicks)
        mask = solution.mask.clone()
        row, candidate = state.valid.nonzero(as_tuple=True)
        at = (row, state.index[row, candidate])
        mask[at] = state.inside[row, candidate]
        start = state.weights.clone()
        start[at] = state.values[row, candidate]
        start *= mask
        weight = refit_on_mask(goal, start, unit, mask, self.refit_steps).to(problem.weight.dtype)
        stats = solution.stats | {"swaps": float(swaps), "seconds": time.perf_counter() - started}
        return replace(solution, weight=weight, mask=mask, stats=stats)

    def _tables(self, target: Tensor, a: Tensor, mask: Tensor, frozen: Tensor, pattern: Pattern):
        """For some rows: the shortlist's indices, membership, validity, values and sweep matrix; z of the whole row."""
        rows, d_in = target.shape
        kept = mask.sum(1)
        size = int(kept.max())
        order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :size]  # kept inputs first
        real = torch.arange(size, device=a.device) < kept[:, None]
        block = a[order[:, :, None], order[:, None, :]]
        both = real[:, :, None] & real[:, None, :]
        block = torch.where(both, block, torch.eye(size, device=a.device, dtype=a.dtype))
        inverse = torch.cholesky_inverse(cholesky(block))
        inverse = inverse.masked_fill_(~both, 0)
        moments = (target @ a).gather(1, order) * real
        z = torch.zeros_like(target).scatter_add_(1, order, (inverse @ moments[:, :, None])[:, :, 0] * real)
        residual = ((target - z) @ a).masked_fill_(mask, 0)
        strength = torch.zeros_like(target).scatter_add_(1, order, inverse.diagonal(dim1=1, dim2=2) * real)
        cost = torch.where(mask & ~frozen, z**2 / strength.clamp_min(1e-30), NEVER)
        gain = torch.where(mask | frozen, -1.0, residual**2)
        index, valid = _shortlist(cost, gain, self.candidates, pattern)
        inside = mask.gather(1, index)
        values = torch.where(inside, z.gather(1, index), residual.gather(1, index))
        # Columns of A_SS^-1 for members and of A_SS^-1 A_SP for others, on the support's own order.
        place = torch.zeros(rows, d_in, dtype=torch.long, device=a.device)
        place.scatter_(1, order, torch.arange(size, device=a.device).expand(rows, size))
        cross = a[order[:, :, None], index[:, None, :]] * real[:, :, None]
        spread = inverse @ cross  # A_SS^-1 A_SC: a unit vector for members
        at = place.gather(1, index)
        member_rows = spread.gather(1, at[:, :, None].expand(-1, -1, index.shape[1]))
        inverse_part = inverse.gather(1, at[:, :, None].expand(-1, -1, size)).gather(
            2, at[:, None, :].expand(-1, index.shape[1], -1)
        )
        schur = a[index[:, :, None], index[:, None, :]] - cross.transpose(1, 2) @ spread
        row_in, column_in = inside[:, :, None], inside[:, None, :]
        sweep = torch.where(row_in & column_in, -inverse_part, schur)
        sweep = torch.where(row_in & ~column_in, member_rows, sweep)
        sweep = torch.where(~row_in & column_in, member_rows.transpose(1, 2), sweep)
        return index, inside, valid, values, sweep, z


def _shortlist(cost: Tensor, gain: Tensor, count: int, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Indices of the cheapest to lose and the most wanted of every row, or of whole groups, and which may be used."""
    rows, d_in = cost.shape
    usable = (cost < NEVER) | (gain >= 0)
    if isinstance(pattern, NM):
        groups = d_in // pattern.m
        promise = gain.view(rows, groups, pattern.m).amax(2) - cost.view(rows, groups, pattern.m).amin(2)
        best = promise.topk(min(groups, max(1, 2 * count // pattern.m)), dim=1).indices
        index = (best[:, :, None] * pattern.m + torch.arange(pattern.m, device=cost.device)).flatten(1)
        return index, usable.gather(1, index)
    count = min(count, d_in)
    out = cost.topk(count, dim=1, largest=False).indices
    into = gain.topk(count, dim=1).indices
    # A row with few kept or few pruned weights fills up with the other kind; what is listed twice counts once.
    once = torch.cat([torch.ones_like(out, dtype=torch.bool), ~(into[:, :, None] == out[:, None, :]).any(2)], 1)
    index = torch.cat([out, into], 1)
    return index, once & usable.gather(1, index)


@dataclass(eq=False)
class _State:
    """Shortlists of all rows with their sweep matrices, in the order of `_tables`; `weights` are whole rows."""

    index: Tensor
    inside: Tensor
    valid: Tensor
    values: Tensor
    sweep: Tensor
    weights: Tensor

    def improve(self, pattern: Pattern, rounds: int) -> int:
        """Make every row's best exchange as long as one helps, and trades between rows; how many were made."""
        total = 0
        for _ in range(rounds):
            change, pair = self._best_exchange(pattern)
            rows = (change < self._noise()).nonzero().squeeze(1)
            self._exchange(rows, pair[rows])
            made = len(rows)
            for rows in pattern.shared_rows(len(change)):
                made += self.trade_between_rows(rows)
            total += made
            if not made:
                break
        return total

    def wander(self, pattern: Pattern, rounds: int) -> None:
        """Make every row's best exchange even where it hurts, none twice in a row, and go back to the best state seen.

        Tabu search (Glover 1986): it leaves optima of single exchanges for those of several together.
        """
        change = torch.zeros_like(self.values[:, 0])
        least = self._noise()
        best = (self.inside.clone(), self.values.clone())
        moved = torch.full_like(self.inside, -TENURE - 1, dtype=torch.long)
        for now in range(rounds):
            step, pair = self._best_exchange(pattern, moved < now - TENURE)
            rows = (step < NEVER).nonzero().squeeze(1)
            self._exchange(rows, pair[rows])
            width = self.index.shape[1]
            moved[rows, pair[rows] % width] = now
            moved[rows, pair[rows] // width] = now
            change[rows] += step[rows]
            better = (change < least).nonzero().squeeze(1)
            least[better] = change[better]
            for kept, current in zip(best, (self.inside, self.values), strict=True):
                kept[better] = current[better]
        self.inside, self.values = best

    def _noise(self) -> Tensor:
        """Below this a change of the loss is a gain and not rounding."""
        return -1e-6 * (self.values**2 * self.valid).amax(1)

    def _best_exchange(self, pattern: Pattern, free: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The change of the loss by every row's best exchange of `free` candidates, and which: u * candidates + p."""
        diagonal = self.sweep.diagonal(dim1=1, dim2=2)
        usable = self.valid if free is None else self.valid & free
        into, out = usable & ~self.inside, usable & self.inside
        step = self.values / torch.where(into, diagonal, 1)  # r_p / N_pp
        left = self.values[:, :, None] - self.sweep * step[:, None, :]  # [u, p]
        room = self.sweep**2 / torch.where(into, diagonal, 1)[:, None, :] - diagonal[:, :, None]
        change = left**2 / room.clamp_min(1e-30) - (self.values * step)[:, None, :]
        allowed = out[:, :, None] & into[:, None, :]
        if isinstance(pattern, NM):
            group = self.index // pattern.m
            allowed &= group[:, :, None] == group[:, None, :]
        best = torch.where(allowed, change, NEVER).flatten(1).min(1)
        return best.values, best.indices

    def _exchange(self, rows: Tensor, pair: Tensor) -> None:
        width = self.index.shape[1]
        self._sweep(rows, pair % width)
        self._sweep(rows, pair // width)

    def trade_between_rows(self, rows: slice) -> int:
        """Of `rows` some take an input in and as many others leave one out, where that helps; how many pairs."""
        diagonal = self.sweep[rows].diagonal(dim1=1, dim2=2)
        valid, inside, squares = self.valid[rows], self.inside[rows], self.values[rows] ** 2
        into, out = valid & ~inside, valid & inside
        gain, p = torch.where(into, squares / torch.where(into, diagonal, 1), -1.0).max(1)
        cost, u = torch.where(out, squares / torch.where(out, -diagonal, 1), NEVER).min(1)
        takers, givers = gain.argsort(descending=True, stable=True), cost.argsort(stable=True)
        helps = gain[takers] > cost[givers] * (1 + 1e-4)
        # A row that would both take and give has made its own exchange; it does neither here.
        rank = torch.arange(len(gain), device=gain.device)
        take_rank, give_rank = torch.empty_like(rank), torch.empty_like(rank)
        take_rank[takers], give_rank[givers] = rank, rank
        pairs = int(helps.sum())
        good = helps & (give_rank[takers] >= pairs) & (take_rank[givers] >= pairs)
        takers, givers = takers[good], givers[good]
        self._sweep(takers + rows.start, p[takers])
        self._sweep(givers + rows.start, u[givers])
        return len(takers)

    def _sweep(self, rows: Tensor, pivot: Tensor) -> None:
        """Move candidate `pivot` of each of `rows` into the support, or out of it."""
        if not len(rows):
            return
        each = torch.arange(len(rows), device=rows.device)
        matrix, values = self.sweep[rows], self.values[rows]
        column = matrix[each, :, pivot]
        head = column[each, pivot]
        value = values[each, pivot]
        matrix -= column[:, :, None] * (column / head[:, None])[:, None, :]
        values -= column * (value / head)[:, None]
        scaled = column / head.abs()[:, None]
        scaled[each, pivot] = -1 / head
        matrix[each, :, pivot] = scaled
        matrix[each, pivot, :] = scaled
        values[each, pivot] = value / head.abs()
        self.sweep[rows], self.values[rows] = matrix, values
        self.inside[rows, pivot] = ~self.inside[rows, pivot]
