"""What rounding to int4 costs a layer's outputs: to the nearest number, and so that errors make up for each other.

    python benchmarks/problems.py RECIPE OUT.safetensors --set model=FOLDER --blocks 2,12,22
    python benchmarks/rounding.py OUT.safetensors [--sweeps 0,1,3]

For every matrix, with all weights (dense), with 4:8 (`admm`), and without 40 % of its inputs (`obs`): the squared error
of the outputs on the test Gram that rounding adds to what pruning costs, over the outputs' size, and over what plain
rounding (`pack --weights int4`) adds; and seconds, those of pruning too.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import geometric_mean, median

import torch
from torch import Tensor

from problems import load
from secateurs.layer import LayerProblem, relative_error
from secateurs.packed import PackedMatrix
from secateurs.patterns import NM, Columns, Pattern, Unstructured
from secateurs.solvers import ADMM, OBS, Solver
from secateurs.solvers.rounded import Rounded


def ways(d_in: int) -> Iterator[tuple[str, Pattern, Solver]]:
    """What is left of a matrix before it is rounded."""
    yield "dense", Unstructured(0.0), ADMM()
    yield "4:8", NM(4, 8), ADMM()
    yield "40 % narrower", Columns(6 * d_in // 10 // 64 * 64), OBS()


def plainly(weight: Tensor, kept: Tensor) -> Tensor:
    """Each weight rounded to the nearest, of the inputs that are kept as they would be stored."""
    found = torch.zeros_like(weight)
    found[:, kept] = PackedMatrix.of(weight[:, kept].contiguous(), "int4").dense()
    return found


def main() -> None:
    """One line a matrix and way, then their means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", type=Path)
    parser.add_argument("--sweeps", default="0,1,3")
    options = parser.parse_args()
    sweeps = [int(count) for count in options.sweeps.split(",")]
    ratios: dict[tuple[str, int], list[float]] = {}
    print("| matrix | | pruned | plain adds | " + " | ".join(f"sweeps {count}, of it, s" for count in sweeps) + " |")
    print("| --- |" + " --- |" * (3 + len(sweeps)))
    for problem, _, test in load(options.problems, Unstructured(0.0)):
        for name, pattern, base in ways(problem.weight.shape[1]):
            layer = LayerProblem(name=problem.name, weight=problem.weight, gram=problem.gram, pattern=pattern)
            pruned = base.solve(layer)
            kept = pruned.mask.any(0) if isinstance(pattern, Columns) else torch.ones_like(pruned.mask[0])
            lost = relative_error(pruned.weight, layer.weight, test)
            plain = relative_error(plainly(pruned.weight, kept), layer.weight, test) - lost
            row = [problem.name, name, f"{lost:.4f}", f"{plain:.4f}"]
            for count in sweeps:
                clock = time.perf_counter()
                found = Rounded(base=base, sweeps=count).solve(layer)
                seconds = time.perf_counter() - clock
                ratio = (relative_error(found.weight, layer.weight, test) - lost) / plain
                ratios.setdefault((name, count), []).append(ratio)
                row.append(f"{ratio:.2f}, {seconds:.1f}")
            print("| " + " | ".join(row) + " |", flush=True)
    for (name, count), found in ratios.items():
        print(f"{name}, sweeps {count}: mean {geometric_mean(found):.3f}, median {median(found):.3f}, "
              f"{min(found):.2f} to {max(found):.2f} of what plain rounding adds")  # fmt: skip


if __name__ == "__main__":
    main()
