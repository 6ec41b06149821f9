"""Products of a few vectors with a matrix that is stored packed, on a GPU: the formats of packed.c, in Triton.

Import it only where triton is installed, as CUDA builds of torch have it; `TRITON_INTERPRET=1` runs it on a CPU.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

ROWS = 4  # of a program, a warp for each
PIECES = 32  # bytes of the bitmap that a warp takes at a time, eight weights each


@triton.jit
def _product(
    values, bits, starts, scale, x, y, batch, rows, d_in, pieces,
    PACKED: tl.constexpr, SCALED: tl.constexpr, B: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """y [batch, rows] for R rows: a lane takes a byte of a row's bitmap, and one of its eight columns after the other.

    `x` is [batch, 8, pieces], so that lanes read side by side. What a lane has kept begins after what the lanes before
    it have: a running sum of set bits.
    """
    row = tl.program_id(0) * R + tl.arange(0, R)
    real = row < rows
    vectors = tl.arange(0, B)
    start = tl.load(starts + row, real, 0) if PACKED else row.to(tl.int64) * d_in
    total = tl.zeros([B, R, P], tl.float32)
    for first in range(0, pieces, P):
        piece = first + tl.arange(0, P)
        here = real[:, None] & (piece < pieces)[None, :]
        if PACKED:
            byte = tl.load(bits + row[:, None].to(tl.int64) * pieces + piece[None, :], here, 0).to(tl.int32)
            count = byte - ((byte >> 1) & 0x55)
            count = (count & 0x33) + ((count >> 2) & 0x33)
            count = (count + (count >> 4)) & 0xF
            through = tl.cumsum(count, 1)
            place = start[:, None] + (through - count)
            start += tl.max(through, 1)
        else:
            place = start[:, None] + piece[None, :] * 8
        for k in tl.static_range(8):  # pyright: ignore[reportGeneralTypeIssues]
            kept = (byte >> k) & 1 if PACKED else (here & (piece * 8 + k < d_in)[None, :]).to(tl.int32)
            weight = tl.load(values + place, kept != 0, 0).to(tl.float32)
            place += kept if PACKED else 1
            read = (vectors < batch)[:, None] & (piece < pieces)[None, :]
            vector = tl.load(x + (vectors[:, None] * 8 + k) * pieces + piece[None, :], read, 0).to(tl.float32)
            total += weight[None, :, :] * vector[:, None, :]
    out = tl.sum(total, 2)
    if SCALED:
        out *= tl.load(scale + row, real, 0)[None, :]
    tl.store(y + vectors[:, None] * rows + row[None, :], out, (vectors < batch)[:, None] & real[None, :])


def multiply(name: str, weights: tuple[Tensor, ...], x: Float[Tensor, "batch d_in"], rows: int) -> Tensor:
    """x W^T [batch, rows] in x's type, summed in float32, for a matrix in the format `name`; see `kernels.Product`."""
    batch, d_in = x.shape
    packed, scaled = name.startswith("packed"), name.endswith("int8")
    bits, values, starts = weights[:3] if packed else (weights[0],) * 3  # what is not packed reads only the second
    bits = bits.view(torch.uint8)
    pieces = -(-d_in // 64) * 8
    spread = torch.nn.functional.pad(x, (0, 8 * pieces - d_in)).view(batch, pieces, 8).transpose(1, 2).contiguous()
    out = torch.empty(batch, rows, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        _product[(triton.cdiv(rows, ROWS),)](
            values, bits, starts, weights[-1], spread, out, batch, rows, d_in, pieces,
            PACKED=packed, SCALED=scaled, B=triton.next_power_of_2(batch), R=ROWS, P=PIECES,
            num_warps=ROWS,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return out
