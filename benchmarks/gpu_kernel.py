"""The Triton kernel for packed matrices against torch's bfloat16 product, on a GPU; what it gave is in docs/faster.md.

    python benchmarks/gpu_kernel.py

Shapes of an 8B model's layers, half of the weights zero. Medians of `triton.testing.do_bench`, which empties the
cache between runs; both in one run, so that ratios are of one machine. Above 1 is faster than torch.
"""

import sys

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import linear
from triton.testing import do_bench

from secateurs.packed import PackedMatrix

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336)]
BATCHES = [1, 2, 4, 8, 16]


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


if __name__ == "__main__":
    main()
