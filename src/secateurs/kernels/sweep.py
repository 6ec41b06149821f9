"""SparseGPT's columns on a GPU, in Triton: one launch for all columns whose mask is known, instead of two a column.

Import it only where triton is installed (`kernels.has_triton`); `TRITON_INTERPRET=1` runs it on a CPU.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float32
from torch import Tensor

ROWS = 32  # of the weight, for a program
WIDEST = 256  # columns that fit into its registers


@triton.jit
def _sweep(
    w, pruned, strength, u, errors, count, width, d_out, row_stride, column_stride, R: tl.constexpr, C: tl.constexpr
):
    """A tile of `width` columns and R rows stays in registers while the first `count` columns are gone through."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    real = row < d_out
    column = tl.arange(0, C)
    here = (column < width)[:, None] & real[None, :]
    place = w + column[:, None].to(tl.int64) * d_out + row[None, :]
    tile = tl.load(place, here, 0)
    for i in range(0, count):
        value = tl.sum(tl.where((column == i)[:, None], tile, 0), 0)
        gone = tl.load(pruned + i * d_out + row, real, 0) != 0
        error = tl.where(gone, value * tl.load(strength + i), 0)
        tl.store(errors + i * d_out + row, error, real)
        push = tl.load(u + i * row_stride + column * column_stride, (column >= i) & (column < width), 0)
        tile -= push[:, None] * error[None, :]
    tl.store(place, tile, here)


def sweep(
    w: Float32[Tensor, "width d_out"],
    pruned: Bool[Tensor, "count d_out"],
    strength: Float32[Tensor, " count"],
    u: Float32[Tensor, "count width"],
    errors: Float32[Tensor, "count d_out"],
) -> None:
    """For each of the first `count` columns i: e = w_i strength_i where pruned, errors_i = e, w_j -= u_ij e for j >= i.

    Columns lie one after the other (w is transposed), in place. ValueError for more than WIDEST columns.
    """
    width, d_out = w.shape
    if width > WIDEST:
        raise ValueError(f"{width} columns at once, but at most {WIDEST} fit")
    padded = triton.next_power_of_2(width)
    with torch.cuda.device_of(w):
        _sweep[(triton.cdiv(d_out, ROWS),)](
            w, pruned.view(torch.uint8), strength, u, errors, len(pruned), width, d_out, *u.stride(), R=ROWS, C=padded,
            num_warps=max(1, padded // 64),  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
