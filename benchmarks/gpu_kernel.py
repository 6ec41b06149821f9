"""Products with pruned matrices against torch's dense bfloat16 product, on a GPU; what it gave is in docs/faster.md.

    python benchmarks/gpu_kernel.py

Shapes of an 8B model's layers, half of the weights zero. Medians of `triton.testing.do_bench`, which empties the
cache between runs; all in one run, so that ratios are of one machine. Above 1 is faster than torch. The first table is
of our Triton kernel for packed matrices, the second of 2:4 through the library that torch has for it.
"""

import sys

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import linear
from torch.sparse import to_sparse_semi_structured
from triton.testing import do_bench

from secateurs.packed import PackedMatrix

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336)]
BATCHES = [1, 2, 4, 8, 16]
WIDE = [1, 8, 16, 64, 256, 4096]


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("this needs a CUDA GPU")
    device = torch.device("cuda")
    shown = Table("matrix", "batch", "torch bf16 µs", "GB/s", "packed bf16 µs", "x", "packed int8 µs", "x", "error")
    for rows, d_in in SHAPES:
        weight = torch.randn(rows, d_in) * (torch.rand(rows, d_in) < 0.5)
        dense = weight.to(device, torch.bfloat16)
        packed = [PackedMatrix.of(weight, kind, "packed").to(device) for kind in ("bf16", "int8")]
        for batch in BATCHES:
            x = torch.randn(batch, d_in, device=device, dtype=torch.bfloat16)
            wanted = x.double() @ dense.double().T
            error = float((packed[0].multiply(x).double() - wanted).abs().max() / wanted.abs().max())
            base = do_bench(lambda x=x, w=dense: linear(x, w), return_mode="median") * 1e3
            ours = [do_bench(lambda x=x, m=m: m.multiply(x), return_mode="median") * 1e3 for m in packed]
            shown.add_row(
                f"{rows} x {d_in}", str(batch), f"{base:.1f}", f"{dense.nbytes / base / 1e3:.0f}",
                *(text for one in ours for text in (f"{one:.1f}", f"{base / one:.2f}")), f"{error:.1e}",
            )  # fmt: skip
    Console(width=120).print(torch.cuda.get_device_name(), shown)
    two_of_four(device)


def two_of_four(device: torch.device) -> None:
    """2:4 on the sparse tensor cores, as torch offers it."""
    shown = Table("matrix", "batch", "torch bf16 µs", "2:4 µs", "x", "error")
    for rows, d_in in SHAPES:
        keep = torch.rand(rows, d_in // 4, 4, device=device).argsort(2).argsort(2) < 2
        weight = torch.randn(rows, d_in, device=device, dtype=torch.bfloat16) * keep.view(rows, d_in)
        halved = to_sparse_semi_structured(weight)
        for batch in WIDE:
            x = torch.randn(batch, d_in, device=device, dtype=torch.bfloat16)
            wanted = linear(x, weight).double()
            error = float((linear(x, halved).double() - wanted).abs().max() / wanted.abs().max())
            base, ours = (do_bench(lambda x=x, w=w: linear(x, w), return_mode="median") * 1e3 for w in (weight, halved))
            shown.add_row(
                f"{rows} x {d_in}", str(batch), f"{base:.1f}", f"{ours:.1f}", f"{base / ours:.2f}", f"{error:.1e}"
            )
    Console(width=120).print(shown)


if __name__ == "__main__":
    main()
