"""Which weights may stay: `Unstructured(sparsity, scope)`, `NM(n, m)`. Exact budgets, exact masks, no randomness.

A pattern turns scores into a mask (True = kept) with exactly the number of zeros that was asked for, whether the matrix
is seen whole (`mask`) or a few columns at a time (`block_mask`). Among equal scores the lowest index is pruned first,
counted row by row, as a stable ascending sort would do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from math import ceil, floor
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

SAMPLED_FROM = 1 << 16  # scores; below, one selection is faster
SAMPLE = 1 << 14
SORTED_UP_TO = 1 << 22  # scores, on a GPU
COMPARED_UP_TO = 8  # members of a group


@runtime_checkable
class Pattern(Protocol):
    """What a solver may ask of a pattern. Scores are any real numbers: the higher, the more worth keeping."""

    def check(self, d_out: int, d_in: int) -> None:
        """ValueError, in one sentence, if a `d_out` x `d_in` matrix cannot have this pattern."""
        ...

    def num_zeros(self, d_out: int, d_in: int) -> int:
        """The exact number of zeros in a `d_out` x `d_in` matrix."""
        ...

    def mask(self, scores: Float[Tensor, "d_out d_in"]) -> Bool[Tensor, "d_out d_in"]:
        """True where the weight is kept. ValueError if a score is NaN."""
        ...

    def block_mask(self, scores: Float[Tensor, "d_out block"], start: int) -> Bool[Tensor, "d_out block"]:
        """The mask of columns `start, start + 1, ...` alone; blocks that tile the matrix sum to `num_zeros`."""
        ...

    def columns_at_once(self, block_size: int) -> int:
        """How many columns a solver that sweeps `block_size` columns at a time should choose together."""
        ...

    def shared_rows(self, d_out: int) -> list[slice]:
        """Rows with one count for all, so that zeros may move between them; none where rows are on their own."""
        ...


@dataclass(frozen=True)
class Unstructured:
    """Any `sparsity` of the weights is zero: the same count in every row, or wherever the scores say in the layer.

    The budget is floor(sparsity * d_in) zeros a row (scope "row"), or floor(sparsity * d_out * d_in) a layer (scope
    "layer"). `sparsity` is read as the decimal that was written, so 0.29 of 100 is 29 (in binary it would be 28).
    Columns [start, end) get floor(end * s) - floor(start * s) of it, so blocks of any sizes sum to the budget; with
    scope "layer" a block's quota is over its d_out x (end - start) weights. The public SparseGPT code takes
    int(numel * s) + 1 in every block instead. Cost: one selection (no sort).
    """

    sparsity: float | Fraction
    """As a Fraction, zeros / weights, it is an exact count: what an allocator gives a layer."""
    scope: Literal["row", "layer"] = "row"

    def __post_init__(self):
        if not 0 <= self.sparsity < 1:
            raise ValueError(
                f"sparsity is {self.sparsity}, but it must be in [0, 1): the fraction set to zero (0.5 = half)."
            )
        if self.scope not in ("row", "layer"):
            raise ValueError(
                f"scope is {self.scope!r}, but it must be 'row' (each row has the same count) or 'layer' (one count)."
            )

    def __str__(self) -> str:
        return f"{100 * float(self.sparsity):.6g}%" + (" per layer" if self.scope == "layer" else "")

    def check(self, d_out: int, d_in: int) -> None:
        """Every matrix that is not empty can have this pattern; ValueError for an empty one."""
        _check_shape(d_out, d_in)

    def num_zeros(self, d_out: int, d_in: int) -> int:
        """The exact number of zeros in a `d_out` x `d_in` matrix."""
        return self._zeros_before(d_in, d_out) * (d_out if self.scope == "row" else 1)

    def mask(self, scores: Float[Tensor, "d_out d_in"]) -> Bool[Tensor, "d_out d_in"]:
        """True where the weight is kept. ValueError if a score is NaN."""
        return self.block_mask(scores, 0)

    def block_mask(self, scores: Float[Tensor, "d_out block"], start: int) -> Bool[Tensor, "d_out block"]:
        """The mask of columns [start, start + block) alone, with the block's share of the budget as its quota."""
        d_out, width = scores.shape
        quota = self._zeros_before(start + width, d_out) - self._zeros_before(start, d_out)
        pools = scores if self.scope == "row" else scores.reshape(1, -1)
        return ~_lowest(pools, quota).view(d_out, width)

    def columns_at_once(self, block_size: int) -> int:
        """The whole block: the wider it is, the freer the choice."""
        return block_size

    def shared_rows(self, d_out: int) -> list[slice]:
        """All rows, with scope "layer"."""
        return [slice(0, d_out)] if self.scope == "layer" else []

    def _zeros_before(self, column: int, d_out: int) -> int:
        """Zeros in the first `column` columns: of one row, or of all `d_out` rows together with scope "layer"."""
        exact = self.sparsity if isinstance(self.sparsity, Fraction) else Fraction(str(float(self.sparsity)))
        return floor(exact * column * (1 if self.scope == "row" else d_out))


@dataclass(frozen=True)
class NM:
    """KEEPS `n` of every `m` neighbouring inputs, in every row: `NM(2, 4)` is what sparse tensor cores run.

    `prunen` in the public SparseGPT code counts the pruned ones; the two readings agree only when n = m / 2.
    """

    n: int
    m: int

    def __post_init__(self):
        if not 1 <= self.n <= self.m:
            raise ValueError(
                f"the pattern {self.n}:{self.m} keeps {self.n} of every {self.m} weights, but n must be in 1..m "
                f"(2:4 keeps two of four)."
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def check(self, d_out: int, d_in: int) -> None:
        """ValueError unless every row is a whole number of groups."""
        _check_shape(d_out, d_in)
        if d_in % self.m:
            raise ValueError(
                f"{self} needs a number of inputs that {self.m} divides, but this layer has {d_in}: "
                f"leave it out, or prune it with an unstructured pattern."
            )

    def num_zeros(self, d_out: int, d_in: int) -> int:
        """The exact number of zeros in a `d_out` x `d_in` matrix."""
        return d_out * (d_in // self.m) * (self.m - self.n)

    def mask(self, scores: Float[Tensor, "d_out d_in"]) -> Bool[Tensor, "d_out d_in"]:
        """True where the weight is kept. ValueError if a score is NaN or a group is cut."""
        return self.block_mask(scores, 0)

    def block_mask(self, scores: Float[Tensor, "d_out block"], start: int) -> Bool[Tensor, "d_out block"]:
        """The mask of columns [start, start + block) alone. ValueError if the block cuts a group."""
        d_out, width = scores.shape
        if start % self.m or width % self.m:
            raise ValueError(
                f"columns {start}..{start + width} cut a group of {self}: both ends must be multiples of m."
            )
        groups = scores.reshape(-1, self.m)
        pruned = _ranks_below if self.m <= COMPARED_UP_TO else _lowest
        return ~pruned(groups, self.m - self.n).view(d_out, width)

    def columns_at_once(self, block_size: int) -> int:
        """One group: the later it is chosen, the more is known about the weights before it."""
        return self.m

    def shared_rows(self, d_out: int) -> list[slice]:
        """None: every row is on its own."""
        return []


@dataclass(frozen=True)
class Columns:
    """Whole inputs go, the same ones for every row: what is then left is a smaller dense matrix.

    Neighbouring inputs fall into groups of `size` (the outputs of one attention head), and groups into `runs` equal
    runs, each of which keeps `keep` groups. A group's score is the sum of its weights' scores.
    """

    keep: int
    size: int = 1
    runs: int = 1

    def __post_init__(self):
        if self.keep < 0 or self.size < 1 or self.runs < 1:
            raise ValueError(f"{self!r}: keep must be 0 or more, size and runs 1 or more.")

    def __str__(self) -> str:
        return f"{self.keep * self.runs} groups of {self.size} inputs" if self.size > 1 else f"{self.keep} inputs"

    def check(self, d_out: int, d_in: int) -> None:
        """ValueError unless the inputs are equal runs of whole groups, of which so many can be kept."""
        _check_shape(d_out, d_in)
        if d_in % (self.size * self.runs) or self.keep * self.size * self.runs > d_in:
            raise ValueError(
                f"{d_in} inputs are not {self.runs} equal runs with at least {self.keep} groups of {self.size}."
            )

    def num_zeros(self, d_out: int, d_in: int) -> int:
        """The exact number of zeros in a `d_out` x `d_in` matrix."""
        return d_out * (d_in - self.keep * self.size * self.runs)

    def kept(self, scores: Float[Tensor, " groups"]) -> Bool[Tensor, " d_in"]:
        """True for the inputs of the groups that are kept, by their scores. ValueError if one is NaN."""
        pools = scores.view(self.runs, -1)
        return ~_lowest(pools, pools.shape[1] - self.keep).flatten().repeat_interleave(self.size)

    def mask(self, scores: Float[Tensor, "d_out d_in"]) -> Bool[Tensor, "d_out d_in"]:
        """True where the weight is kept. ValueError if a score is NaN."""
        kept = self.kept(scores.sum(0).view(-1, self.size).sum(1))
        return kept.expand(scores.shape).contiguous()

    def block_mask(self, scores: Float[Tensor, "d_out block"], start: int) -> Bool[Tensor, "d_out block"]:
        """Of all columns at once. ValueError for some of them, as they cannot be chosen without the others."""
        raise ValueError(f"{self} are chosen among all inputs, not column by column.")

    def columns_at_once(self, block_size: int) -> int:
        """The whole block."""
        return block_size

    def shared_rows(self, d_out: int) -> list[slice]:
        """None: no zero can move."""
        return []


@dataclass(frozen=True)
class Stacked:
    """Matrices with the same inputs, one upon the other: `rows[i]` rows with `patterns[i]`, each with its own count.

    How q/k/v, or gate and up, are solved as one problem. See `stack`.
    """

    patterns: tuple[Unstructured, ...]
    rows: tuple[int, ...]

    def __str__(self) -> str:
        return " + ".join(map(str, self.patterns))

    def check(self, d_out: int, d_in: int) -> None:
        """ValueError if the rows are not those of the parts."""
        if sum(self.rows) != d_out:
            raise ValueError(f"{d_out} rows cannot be a stack of {self.rows}")

    def num_zeros(self, d_out: int, d_in: int) -> int:
        """The zeros of all parts."""
        return sum(pattern.num_zeros(rows, d_in) for pattern, rows in zip(self.patterns, self.rows, strict=True))

    def mask(self, scores: Float[Tensor, "d_out d_in"]) -> Bool[Tensor, "d_out d_in"]:
        """True where the weight is kept. ValueError if a score is NaN."""
        return self.block_mask(scores, 0)

    def block_mask(self, scores: Float[Tensor, "d_out block"], start: int) -> Bool[Tensor, "d_out block"]:
        """The mask of columns [start, start + block) alone, part by part."""
        parts = zip(self.patterns, scores.split(self.rows), strict=True)
        return torch.cat([pattern.block_mask(part, start) for pattern, part in parts])

    def columns_at_once(self, block_size: int) -> int:
        """The whole block."""
        return block_size

    def shared_rows(self, d_out: int) -> list[slice]:
        """Those of each part."""
        ends = [sum(self.rows[: index + 1]) for index in range(len(self.rows))]
        return [
            slice(end - rows, end)
            for pattern, rows, end in zip(self.patterns, self.rows, ends, strict=True)
            if pattern.shared_rows(rows)
        ]


def stack(patterns: Sequence[Pattern], rows: Sequence[int]) -> Pattern | None:
    """One pattern for matrices one upon the other; None if theirs do not go together."""
    first = patterns[0]
    if isinstance(first, Columns):
        return None  # rows do meet in the choice
    if all(pattern == first for pattern in patterns) and not first.shared_rows(rows[0]):
        return first
    if all(isinstance(pattern, Unstructured) for pattern in patterns):
        return Stacked(tuple(pattern for pattern in patterns if isinstance(pattern, Unstructured)), tuple(rows))
    return None


PATTERNS: dict[str, type[Pattern]] = {"unstructured": Unstructured, "nm": NM}


def _check_shape(d_out: int, d_in: int) -> None:
    if d_out < 1 or d_in < 1:
        raise ValueError(f"a layer of {d_out} x {d_in} weights is empty: there is nothing to prune.")


def _lowest(scores: Float[Tensor, "pools size"], count: int) -> Bool[Tensor, "pools size"]:
    """True at exactly the `count` lowest scores of every pool; among equals the lowest index wins.

    A selection finds the threshold; only when the threshold is tied does a second pass take the last ties out again.
    """
    _refuse_nan(scores)
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if scores.is_cuda and len(scores) == 1 and scores.numel() <= SORTED_UP_TO:  # in one launch
        first = scores[0].sort(stable=True).indices[:count]
        return torch.zeros_like(scores, dtype=torch.bool).index_fill_(1, first, True)
    threshold = _kth_smallest(scores, count)
    chosen = scores <= threshold
    total = chosen.count_nonzero()
    if int(total) == count * scores.shape[0]:
        return chosen
    pool, member = (scores == threshold).nonzero(as_tuple=True)  # pool by pool, in the order of members
    ties = torch.bincount(pool, minlength=len(scores))
    place = torch.arange(len(pool), device=pool.device) - (ties.cumsum(0) - ties)[pool]
    surplus = (total.view(1) if len(scores) == 1 else chosen.count_nonzero(dim=1)) - count
    late = place >= (ties - surplus)[pool]
    chosen[pool[late], member[late]] = False
    return chosen


def _ranks_below(scores: Float[Tensor, "pools size"], count: int) -> Bool[Tensor, "pools size"]:
    """`_lowest` for pools of a few: every pair is compared, which is faster than a selection in each."""
    _refuse_nan(scores)
    if scores.is_cuda and scores.numel() <= SORTED_UP_TO:  # all pairs at once: a launch costs more than the work
        of, other = scores[:, :, None], scores[:, None, :]
        earlier = torch.ones(scores.shape[1], scores.shape[1], dtype=torch.bool, device=scores.device).tril(-1)
        return ((other < of) | (other == of) & earlier).sum(2) < count
    members = scores.T.contiguous()
    ranks = torch.zeros(members.shape, dtype=torch.uint8, device=scores.device)
    for i, j in combinations(range(len(members)), 2):
        first = members[i] <= members[j]
        ranks[j] += first
        ranks[i] += ~first
    return (ranks < count).T.contiguous()


def _refuse_nan(scores: Tensor) -> None:
    if torch.isnan(scores.sum()) and torch.isnan(scores).any():  # a sum is faster, but is NaN for inf - inf too
        raise ValueError(
            "a score is NaN, so there is no order to prune by: check the weights and the Gram for overflow."
        )


def _kth_smallest(scores: Float[Tensor, "pools size"], k: int) -> Float[Tensor, "pools 1"]:
    """The k-th smallest score (k = 1 is the minimum) of every pool. On CPU numpy selects 3-9x faster than torch."""
    on_cpu = scores.device.type == "cpu" and scores.dtype != torch.bfloat16
    if scores.shape[0] == 1 and scores.numel() >= SAMPLED_FROM:
        select = _sampled_kth_numpy if on_cpu else _sampled_kth
        return select(scores[0].detach(), k).view(1, 1)
    if on_cpu:
        return torch.from_numpy(np.partition(scores.detach().numpy(), k - 1, axis=1)[:, k - 1 : k])
    return scores.kthvalue(k, dim=1, keepdim=True).values


def _bracket(size: int, sample_size: int, k: int) -> tuple[int, int]:
    """Ranks (from 0) in a sample between which the k-th smallest of the whole very likely lies."""
    share = k / size
    centre, spread = share * sample_size, 3 * (sample_size * share * (1 - share)) ** 0.5 + 2
    return max(0, floor(centre - spread) - 1), min(sample_size, ceil(centre + spread)) - 1


def _sampled_kth(scores: Float[Tensor, " size"], k: int) -> Float[Tensor, ""]:
    """The k-th smallest of many scores, exactly: a sample brackets it, one pass counts, a few in between are selected.

    Floyd and Rivest (1975), with a regular sample instead of a random one; where the bracket misses, the whole is
    selected from as usual.
    """
    sample = scores[:: scores.numel() // SAMPLE | 1]
    low, high = (sample.kthvalue(rank + 1).values for rank in _bracket(scores.numel(), sample.numel(), k))
    rank = k - int((scores < low).count_nonzero())
    between = scores[(scores >= low) & (scores <= high)]
    if not 1 <= rank <= between.numel():
        between, rank = scores, k
    return between.kthvalue(rank).values


def _sampled_kth_numpy(scores: Float[Tensor, " size"], k: int) -> Float[Tensor, ""]:
    """`_sampled_kth` on CPU, where numpy counts and picks several times as fast as torch."""
    values = scores.numpy()
    sample = values[:: values.size // SAMPLE | 1]
    ends = _bracket(values.size, sample.size, k)
    low, high = np.partition(sample, ends)[list(ends)]
    between = values < low
    rank = k - np.count_nonzero(between)
    between ^= values <= high
    between = values[np.flatnonzero(between)]
    if not 1 <= rank <= between.size:
        between, rank = values, k
    return torch.tensor(np.partition(between, rank - 1)[rank - 1])
