"""A path of sparsities against a solve for each: time in units of one solve, error as a ratio, on real layers.

python benchmarks/path.py PROBLEMS.safetensors [--sparsities 0.7,0.65,...] [--judge validation|test]
"""

import argparse
from dataclasses import replace
from pathlib import Path

from problems import load
from secateurs.layer import relative_error
from secateurs.patterns import Unstructured
from secateurs.solvers import ADMM


def main() -> None:
    """Print a row for every sparsity, and the cost of all but the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", type=Path)
    parser.add_argument("--sparsities", default="0.7,0.65,0.6,0.55,0.5,0.45,0.4,0.35,0.3")
    parser.add_argument("--judge", choices=("validation", "test"), default="test")
    options = parser.parse_args()
    patterns = [Unstructured(float(text), "layer") for text in options.sparsities.split(",")]
    ratios: dict[str, list[tuple[float, float]]] = {str(pattern): [] for pattern in patterns}
    path = cold = 0.0
    problems = load(options.problems, patterns[0])
    for problem, validation, test in problems:
        judge = test if options.judge == "test" else validation
        for pattern, found in zip(patterns, ADMM().path(problem, patterns), strict=True):
            alone = ADMM().solve(replace(problem, pattern=pattern))
            path += found.stats["seconds"]
            cold += alone.stats["seconds"] / len(patterns)
            train, held = (
                relative_error(found.weight, problem.weight, gram) / relative_error(alone.weight, problem.weight, gram)
                for gram in (problem.gram, judge)
            )
            ratios[str(pattern)].append((train, held))
    print(f"| sparsity | train | {options.judge} | worst matrix |\n| --- | --- | --- | --- |")
    for name, found in ratios.items():
        train, held = (sum(part) / len(found) for part in zip(*found, strict=True))
        print(f"| {name} | {train:.3f} | {held:.3f} | {max(ratio for _, ratio in found):.3f} |")
    print(f"\n{len(patterns) - 1} points more than one solve: {path / cold - 1:.2f} times as much again ({cold:.2f} s)")


if __name__ == "__main__":
    main()
