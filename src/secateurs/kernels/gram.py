"""Grams of 16-bit activations on a GPU, in Triton: every tile of the upper triangle once, mirrored as it is written.

Import it only where triton is installed (`kernels.has_triton`); `TRITON_INTERPRET=1` runs it on a CPU.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32
from torch import Tensor

TILE = 128
TOKENS = 64  # of a step
CHUNK = 2048  # tokens of a short sum: the units lose digits of longer ones (docs/log.md)
BESIDE = 8  # rows of tiles that programs go through together, so that they read the same activations
WARPS = 8
STAGE = 2 * TILE * TOKENS * 2  # bytes that are loaded for a step while the one before is summed


@triton.jit
def _add(
    x, out, tokens, d_in, stride, tiles,
    TILE: tl.constexpr, TOKENS: tl.constexpr, CHUNK: tl.constexpr, BESIDE: tl.constexpr,
):  # fmt: skip
    """One tile of out [d_in, d_in] += x^T x, for x [tokens, d_in]; below the diagonal there is nothing to do."""
    program = tl.program_id(0)
    first_row = program // (BESIDE * tiles) * BESIDE
    height = tl.minimum(tiles - first_row, BESIDE)
    row_tile = first_row + program % (BESIDE * tiles) % height
    column_tile = program % (BESIDE * tiles) // height
    if row_tile > column_tile:
        return
    rows = row_tile * TILE + tl.arange(0, TILE)
    columns = column_tile * TILE + tl.arange(0, TILE)
    total = tl.zeros([TILE, TILE], tl.float32)
    for start in range(0, tokens, CHUNK):
        part = tl.zeros([TILE, TILE], tl.float32)
        for first in range(start, tl.minimum(start + CHUNK, tokens), TOKENS):
            token = first + tl.arange(0, TOKENS)
            at = x + token.to(tl.int64)[:, None] * stride
            here = (token < tokens)[:, None]
            left = tl.load(at + rows[None, :], here & (rows < d_in)[None, :], 0)
            right = tl.load(at + columns[None, :], here & (columns < d_in)[None, :], 0)
            part = tl.dot(tl.trans(left), right, part)
        total += part
    upper = (rows[:, None] <= columns[None, :]) & (columns < d_in)[None, :]
    place = out + rows[:, None].to(tl.int64) * d_in + columns[None, :]
    total += tl.load(place, upper, 0)
    tl.store(place, total, upper)
    tl.store(out + columns[None, :].to(tl.int64) * d_in + rows[:, None], total, upper)


def add_gram(out: Float32[Tensor, "d_in d_in"], x: Float[Tensor, "tokens d_in"]) -> None:
    """out += x^T x for bfloat16 or float16 tokens: exact products, float32 sums, exactly symmetric if `out` was.

    About d_in^2 flops a token. Differs from `layer.Gram.update` on CPUs by the rounding of sums only.
    """
    tokens, d_in = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    tiles = triton.cdiv(d_in, TILE)
    about = torch.cuda.get_device_properties(x.device) if x.is_cuda else None
    room = getattr(about, "shared_memory_per_block_optin", 0)  # not known of AMD's
    with torch.cuda.device_of(x):
        _add[(tiles * tiles,)](
            x, out, tokens, d_in, x.stride(0), tiles, TILE=TILE, TOKENS=TOKENS, CHUNK=CHUNK, BESIDE=BESIDE,
            num_warps=WARPS, num_stages=4 if room > 4 * STAGE else 2,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
