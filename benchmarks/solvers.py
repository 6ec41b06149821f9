"""Solvers on equal problems, in one run: error and time as ratios to the published SparseGPT's on the same Gram.

    python benchmarks/solvers.py PROBLEMS.safetensors... [--solvers NAME,...] [--patterns 0.5,0.6,0.7,2:4]
    python benchmarks/solvers.py --synthetic 2048 ...

Ratios are means over matrices of error / SparseGPT's error, on the Gram solved on (train) and on one that shares no
question with it (test). A ratio of times is of sums. A solver's name may carry options in TOML's syntax:
`admm(steps=40,damping="mean")`.
"""

import argparse
import json
import platform
import re
import time
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from problems import load
from secateurs.layer import Gram, LayerProblem, relative_error
from secateurs.patterns import NM, Pattern, Unstructured
from secateurs.recipe import build_solver
from secateurs.solvers import Solver

REFERENCE = "sparsegpt-reference"
Problems = list[tuple[LayerProblem, Gram]]  # with the Gram it is judged on


def pattern(text: str, scope: Literal["row", "layer"]) -> Pattern:
    """`0.5` in a scope, or `2:4`."""
    if ":" in text:
        n, m = map(int, text.split(":"))
        return NM(n, m)
    return Unstructured(float(text), scope)


def solver(text: str) -> Solver:
    """A line of SOLVERS, perhaps with options in parentheses."""
    name, _, options = text.rstrip(")").partition("(")
    return build_solver({"name": name} | tomllib.loads(f"options = {{{options}}}")["options"])


def synthetic(size: int, seed: int = 0) -> Problems:
    """Three layers of `size` inputs, 16 tokens each: power-law spectra, lognormal channels, a few massive ones."""
    problems = []
    for number, decay in enumerate((0.5, 0.8, 1.0)):
        generator = torch.Generator().manual_seed(seed + number)
        mixing = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
        spectrum = torch.arange(1, size + 1) ** (-decay / 2)
        channels = torch.exp(0.5 * torch.randn(size, generator=generator))
        channels[:3] *= 15
        parts = []
        for tokens in (16 * size, 4 * size):
            gram = Gram.zeros(size)
            gram.update(torch.randn(tokens, size, generator=generator) * spectrum @ mixing * channels)
            parts.append(gram)
        weight = torch.randn(size, size, generator=generator) / channels
        name = f"synthetic.{size}.{decay}"
        problems.append((LayerProblem(name=name, weight=weight, gram=parts[0], pattern=Unstructured(0.5)), parts[1]))
    return problems


def synchronise(device: str) -> None:
    """Wait for the device, so that a clock means something."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def measure(problems: Problems, make: Solver, form: Pattern, device: str) -> list[dict[str, float]]:
    """Train and test error and seconds of every problem."""
    found = []
    for problem, test in problems:
        one = replace(problem, pattern=form)
        synchronise(device)
        clock = time.perf_counter()
        solution = make.solve(one)
        synchronise(device)
        seconds = time.perf_counter() - clock
        assert int((~solution.mask).sum()) == form.num_zeros(*problem.weight.shape)
        errors = [relative_error(solution.weight, problem.weight, gram) for gram in (problem.gram, test)]
        found.append({"train": errors[0], "test": errors[1], "seconds": seconds})
    return found


def main() -> None:
    """Measure every solver on every pattern and print a table; --json also writes every figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="*", type=Path)
    parser.add_argument("--synthetic", type=int, action="append", default=[])
    parser.add_argument("--solvers", default="sparsegpt,sparsegpt+refit,wanda+refit,alps,admm")
    parser.add_argument("--patterns", default="0.5,0.6,0.7,2:4")
    parser.add_argument("--scope", choices=("row", "layer"), default="layer")
    parser.add_argument("--judge", choices=("validation", "test"), default="test")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    problems: Problems = []
    for path in options.problems:
        for problem, validation, test in load(path, Unstructured(0.5)):
            problems.append((problem, test if options.judge == "test" else validation))
    for size in options.synthetic:
        problems += synthetic(size)
    problems = [
        (
            replace(
                problem,
                weight=problem.weight.to(options.device),
                gram=Gram(problem.gram.xtx.to(options.device), problem.gram.weight_sum, problem.gram.tokens),
            ),
            Gram(test.xtx.to(options.device), test.weight_sum, test.tokens),
        )
        for problem, test in problems
    ]
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.processor()
    print(f"{len(problems)} matrices, scope {options.scope}, {torch.get_num_threads()} threads, {device}\n")
    print("| pattern | solver | train | test | time | seconds |\n| --- | --- | --- | --- | --- | --- |")
    record = []
    for text in options.patterns.split(","):
        form = pattern(text, options.scope)
        solver(REFERENCE).solve(replace(problems[0][0], pattern=form))  # warm up
        base = measure(problems, solver(REFERENCE), pattern(text, "layer"), options.device)
        for name in [REFERENCE, *re.findall(r"[\w+-]+(?:\([^)]*\))?", options.solvers)]:
            found = base if name == REFERENCE else measure(problems, solver(name), form, options.device)
            ratio = {
                part: sum(a[part] / b[part] for a, b in zip(found, base, strict=True)) / len(base)
                for part in ("train", "test")
            }
            seconds, base_seconds = (sum(one["seconds"] for one in many) for many in (found, base))
            print(
                f"| {text} | {name} | {ratio['train']:.3f} | {ratio['test']:.3f} | {seconds / base_seconds:.2f} "
                f"| {seconds:.2f} |",
                flush=True,
            )
            layers = [{"name": problem.name, **figures} for (problem, _), figures in zip(problems, found, strict=True)]
            record.append({"pattern": text, "solver": name, **ratio, "seconds": seconds, "layers": layers})
    if options.json:
        options.json.write_text(json.dumps({"scope": options.scope, "device": device, "results": record}, indent=1))


if __name__ == "__main__":
    main()
