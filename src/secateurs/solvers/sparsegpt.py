"""SparseGPT: prune column by column and let the columns to the right make up for it."""

import time
from dataclasses import dataclass
from typing import Literal

import torch

from secateurs.layer import LayerProblem, LayerSolution
from secateurs.linalg import inverse_factor
from secateurs.patterns import NM


@dataclass(frozen=True, kw_only=True)
class SparseGPT:
    """Approximate optimal-brain-surgeon pruning with one shared factor (Frantar & Alistarh 2023, arXiv:2301.00774, alg. 1).

    For columns i in order: e = (w_i - ŵ_i) / U_ii, then w_j -= e U_ij for all j > i, with Uᵀ U = (G + damping)⁻¹. Masks are
    chosen a block of columns at a time by w² / U_jj².

    Differs from the published code: exact counts (its `<=` threshold prunes one weight too many a block); relative damping
    damp·diag(G) and blocks of 32 by default, where it has the mean diagonal and 128; inputs that are zero on every token are
    pruned first and count. `damping="mean"`, `block_size=128` and `across_rows` give the published arithmetic.
    The published factor 2/N of the Gram cancels and is left out. Cost: 4/3 d_in³ + d_out d_in².
    """

    block_size: int = 32
    damp: float = 0.01
    damping: Literal["relative", "mean"] = "relative"
    across_rows: bool = False
    """Compare over all rows of a block whatever the pattern's scope, as the published code does."""

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"sparsegpt: block_size must be 1 or more, found {self.block_size}")
        if not 0 <= self.damp < 10:
            raise ValueError(f"sparsegpt: damp must be in [0, 10), found {self.damp}")
        if self.damping not in ("relative", "mean"):
            raise ValueError(f"sparsegpt: damping must be `relative` or `mean`, found {self.damping!r}")

    def solve(self, problem: LayerProblem) -> LayerSolution:
        """Exact zeros, kept weights re-fitted on the way. NotPositiveDefinite if no damping helps."""
        clock = time.perf_counter()
        pattern, block_size = problem.pattern, self.block_size
        if isinstance(pattern, NM):
            block_size = -(-block_size // pattern.m) * pattern.m
        dead = problem.dead
        gram = problem.gram.xtx.clone()
        gram.diagonal()[dead] = gram.diagonal().mean().clamp(min=1e-30)
        factor = inverse_factor(gram, self.damp, self.damping)
        upper = factor.upper
        weight = problem.goal.T.contiguous()  # columns are rows here: each step works on contiguous memory
        weight[dead] = 0.0
        mask = torch.empty_like(weight, dtype=torch.bool)
        d_in = len(weight)
        for start in range(0, d_in, block_size):
            stop = min(start + block_size, d_in)
            block, local = weight[start:stop], upper[start:stop, start:stop]
            diagonal = local.diagonal()
            errors = torch.zeros_like(block)
            if not isinstance(pattern, NM):
                scores = (block / diagonal[:, None]).square().T
                kept = pattern.block_mask(scores, start, d_in, self.across_rows).T
            else:
                kept = torch.empty_like(mask[start:stop])
            for i in range(stop - start):
                if isinstance(pattern, NM) and i % pattern.m == 0:
                    group = slice(i, i + pattern.m)
                    scores = (block[group] / diagonal[group, None]).square().T
                    kept[group] = pattern.block_mask(scores, start + i, d_in).T
                torch.div(block[i] * ~kept[i], diagonal[i], out=errors[i])
                block[i] *= kept[i]
                if i + 1 < stop - start:
                    block[i + 1 :].addr_(local[i, i + 1 :], errors[i], alpha=-1)
            mask[start:stop] = kept
            weight[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
        keep = mask.T.contiguous()
        result = (weight.T * keep).to(problem.weight.dtype).contiguous()
        stats = {"seconds": time.perf_counter() - clock, "damp": factor.damp, "dead_inputs": float(dead.sum())}
        return LayerSolution(result, keep, problem.outcome(factor.raised), stats)
