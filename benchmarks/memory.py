"""Peak memory of a solve over what the problem itself takes, in units of its Gram. One process a figure.

    python benchmarks/memory.py [--solvers NAME,NAME@int4,...] [--shapes 2048x2048,1024x4096] [--dtype bfloat16]

Resident memory is sampled every millisecond, with an allocator told to give back what is freed. On a GPU the caching
allocator keeps count, and `--device cuda` asks it.
"""

import argparse
import os
import subprocess
import sys
import threading
from pathlib import Path

import torch

from secateurs.layer import Gram, LayerProblem
from secateurs.patterns import Unstructured
from secateurs.recipe import build_solver


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measure(name: str, d_out: int, d_in: int, device: str, dtype: str) -> float:
    """The peak of one solve over the bytes of its Gram, the problem not counted."""
    x = torch.randn(4 * d_in, d_in, device=device) * torch.arange(1, d_in + 1, device=device) ** -0.5
    gram = Gram.zeros(d_in, device)
    gram.update(x)
    del x
    weight = torch.randn(d_out, d_in, device=device, dtype=getattr(torch, dtype))
    problem = LayerProblem(name="layer", weight=weight, gram=gram, pattern=Unstructured(0.5, "layer"))
    name, _, weights = name.partition("@")
    solver = build_solver({"name": name, **({"weights": weights} if weights else {})})
    corner = Gram(gram.xtx[:64, :64].clone(), 1.0, 999)
    solver.solve(LayerProblem(name="warm up", weight=weight[:64, :64].clone(), gram=corner, pattern=problem.pattern))
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        solver.solve(problem)
        return (torch.cuda.max_memory_allocated() - before) / (4 * d_in**2)
    peak, done = [resident()], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], resident())

    before = resident()
    watcher = threading.Thread(target=watch)
    watcher.start()
    solver.solve(problem)
    done.set()
    watcher.join()
    return (peak[0] - before) / (4 * d_in**2)


def main() -> None:
    """A table; each figure from a process of its own, so that none inherits another's memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--solvers", default="sparsegpt-reference,sparsegpt+refit,alps,admm")
    parser.add_argument("--shapes", default="2048x2048,1024x2048,4096x2048")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the weights")
    parser.add_argument("--one", nargs=3, metavar=("SOLVER", "D_OUT", "D_IN"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, d_out, d_in = options.one
        print(measure(name, int(d_out), int(d_in), options.device, options.dtype))
        return
    print("| solver | d_out x d_in | peak / Gram |\n| --- | --- | --- |")
    for shape in options.shapes.split(","):
        for name in options.solvers.split(","):
            how = ["--device", options.device, "--dtype", options.dtype]
            one = [sys.executable, __file__, *how, "--one", name, *shape.split("x")]
            giving_back = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
            peak = float(subprocess.run(one, check=True, capture_output=True, text=True, env=giving_back).stdout)
            print(f"| {name} | {shape} | {peak:.1f} |", flush=True)


if __name__ == "__main__":
    main()
