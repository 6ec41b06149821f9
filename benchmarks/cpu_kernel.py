"""The kernels for packed matrices on this CPU: dense, with a bitmap, in halves; what they gave is in docs/faster.md.

    python benchmarks/cpu_kernel.py [--shape 14336x4096] [--threads 1,2] [--batch 1,4,8] [--rounds 20]

Rows x inputs of an 8B and of a 0.5B, for packed and half with four of each eight weights at zero, in more copies than
a cache holds. Turns go round and the least time of each is kept, in one run, so that ratios are of one machine. The
first column is torch's own product in bfloat16. What is read is shown as GB/s: memory is the limit.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from secateurs.bench import machine
from secateurs.packed import Layout, PackedMatrix, Weights

SHAPES = ["14336x4096", "4864x896", "896x4864"]
OURS: list[tuple[Weights, Layout]] = [
    ("bf16", "dense"), ("bf16", "packed"), ("bf16", "half"),
    ("int8", "dense"), ("int8", "packed"), ("int8", "half"),
    ("int4", "dense"),
]  # fmt: skip
CACHE = 1 << 27  # bytes: more than a cache holds


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def least(turns: Sequence[Sequence[Callable[[], object]]], rounds: int) -> list[float]:
    """Seconds of the fastest call of each list, the lists in turn."""
    best = [float("inf")] * len(turns)
    for _ in range(rounds):
        for place, calls in enumerate(turns):
            for call in calls:
                start = time.perf_counter()
                call()
                best[place] = min(best[place], time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=SHAPES)
    parser.add_argument("--threads", type=numbers, default=[1, 2])
    parser.add_argument("--batch", type=numbers, default=[1, 4, 8])
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    shown = Table(
        "matrix", "threads", "batch", "torch", *(f"{layout} {kind}" for kind, layout in OURS), "half over dense"
    )
    for shape in options.shape:
        rows, d_in = map(int, shape.split("x"))
        whole = torch.randn(rows, d_in)
        order = whole.view(rows, -1, 8).abs().argsort(2).argsort(2)
        halved = whole * (order >= 4).view(rows, d_in)
        copies = -(-CACHE // (2 * rows * d_in))
        dense = [whole.bfloat16() for _ in range(copies)]
        packed = [PackedMatrix.of(whole if layout == "dense" else halved, kind, layout) for kind, layout in OURS]
        ours = [[deepcopy(matrix) for _ in range(copies)] for matrix in packed]
        for threads in options.threads:
            torch.set_num_threads(threads)
            for batch in options.batch:
                x = torch.randn(batch, d_in)
                rounded = x.bfloat16()
                turns = [[partial(torch.nn.functional.linear, rounded, weight) for weight in dense]]
                turns += [[partial(matrix.multiply, x) for matrix in matrices] for matrices in ours]
                times = least(turns, options.rounds)
                sizes = [dense[0].nbytes, *(matrices[0].nbytes for matrices in ours)]
                gains = ", ".join(f"{times[first] / times[first + 2]:.2f} {OURS[first - 1][0]}" for first in (1, 4))
                cells = (f"{1e3 * t:.3f} ms, {size / t / 1e9:.0f}" for t, size in zip(times, sizes, strict=True))
                shown.add_row(shape, str(threads), str(batch), *cells, gains)
    where = machine()
    Console(width=200).print(f"{where['cpu']}, {where['kernels']}; ms and GB/s", shown)


if __name__ == "__main__":
    main()
