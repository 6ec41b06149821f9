"""Which weights may stay: exact masks and exact budgets. A mask is True where a weight is kept.

Higher scores stay, and among equal scores the lower index stays. `block_mask` serves solvers that go through a matrix a
block of columns at a time: the blocks' zeros always add up to `num_zeros`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Unstructured:
    """A fraction `sparsity` of the weights is zero, the same in every row (scope "row") or in the matrix as a whole."""

    sparsity: float
    scope: Literal["row", "layer"] = "row"

    def __post_init__(self) -> None:
        if not isinstance(self.sparsity, int | float) or not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be at least 0 and below 1, found {self.sparsity!r}")
        if self.scope not in ("row", "layer"):
            raise ValueError(f"scope must be `row` or `layer`, found {self.scope!r}")

    def __str__(self) -> str:
        return f"{100 * self.sparsity:g}%"

    def check(self, d_out: int, d_in: int) -> None:
        """Fits every shape."""

    def num_zeros(self, d_out: int, d_in: int) -> int:
        """floor(sparsity · size), of a row times the rows or of the matrix, by scope."""
        return d_out * self._quota(d_in) if self.scope == "row" else self._quota(d_out * d_in)

    def _quota(self, count: int) -> int:
        return int(count * self.sparsity + 1e-9)  # 0.6 · 5 is 2.9999999999999996 in floating point

    def block_mask(
        self, scores: Float[Tensor, "d_out width"], start: int, d_in: int, across_rows: bool = False
    ) -> Bool[Tensor, "d_out width"]:
        """The block's share of the budget is what the columns up to its end owe minus what those before it paid.

        `across_rows` spends the same budget wherever the scores of the block are lowest, whatever the scope.
        """
        d_out, width = scores.shape
        _finite(scores)
        zeros = self.num_zeros(d_out, start + width) - self.num_zeros(d_out, start)
        if self.scope == "row" and not across_rows:
            return _drop_lowest(scores, zeros // d_out)
        return _drop_lowest(scores.reshape(1, -1), zeros).reshape(d_out, width)


@dataclass(frozen=True, kw_only=True)
class NM:
    """Of every `m` neighbouring inputs of a row, `n` weights are KEPT (2:4 keeps two of four)."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not (isinstance(self.n, int) and isinstance(self.m, int) and 1 <= self.n <= self.m):
            raise ValueError(f"an N:M pattern keeps n of m with 1 <= n <= m, found {self.n}:{self.m}")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        """The fraction of zeros."""
        return 1 - self.n / self.m

    def check(self, d_out: int, d_in: int) -> None:
        """ValueError if a row is not made of whole groups."""
        if d_in % self.m:
            raise ValueError(f"pattern {self}: {d_in} inputs do not divide into groups of {self.m}")

    def num_zeros(self, d_out: int, d_in: int) -> int:
        """m - n of every group."""
        return d_out * (d_in // self.m) * (self.m - self.n)

    def block_mask(self, scores: Float[Tensor, "d_out width"], start: int, d_in: int) -> Bool[Tensor, "d_out width"]:
        """Every group on its own; blocks must begin and end between groups."""
        _finite(scores)
        if start % self.m or scores.shape[1] % self.m:
            raise ValueError(f"pattern {self}: a block of columns must hold whole groups of {self.m}")
        return _drop_lowest(scores.reshape(-1, self.m), self.m - self.n).reshape(scores.shape)


Pattern = Unstructured | NM
PATTERNS: dict[str, type] = {"unstructured": Unstructured, "nm": NM}


def _finite(scores: Tensor) -> None:
    if scores.isnan().any():
        raise ValueError("scores contain NaN: the weights or the calibration activations are not finite")


def _drop_lowest(scores: Float[Tensor, "rows width"], count: int) -> Bool[Tensor, "rows width"]:
    """False at the `count` lowest scores of each row. Exact under ties: of equal scores the last ones go first.

    A threshold by kthvalue, then the ties at it are counted off: cheaper than a stable sort of everything.
    """
    if count == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if count == scores.shape[1]:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(count, dim=1, keepdim=True).values
    below = scores < threshold
    ties = scores == threshold
    missing = count - below.sum(1, keepdim=True)
    rank = ties.flip(1).cumsum(1).flip(1)  # 1 for the last tie of a row, 2 for the one before
    return ~(below | (ties & (rank <= missing)))
