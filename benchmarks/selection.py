"""Which of a model's own traces should calibrate? One table: every selection, the same budget, judge and questions.

    python benchmarks/selection.py OUT                                  # the bundled reasoner, all of SELECTIONS
    python benchmarks/selection.py OUT --only 'all;first 64 tokens' --recipe RECIPE --set model=FOLDER
    python benchmarks/selection.py OUT --only all --corpus 'written by people=human.jsonl'   # which solutions.py makes

A selection is a few settings on top of the recipe, which come after --set. p is of the exact paired test against the
first selection.
"""

import argparse
from pathlib import Path
from typing import Any

from secateurs.recipe import load_recipe
from secateurs.statistics import holm, sign_flip
from secateurs.study import study

BASE = [
    "sweep.arm=['rac']", "sweep.sparsity=[]", "sweep.seed=[0, 1, 2]", "prune.pattern.sparsity=0.7",
    "prune.solver={name='admm'}", "evaluate.sampling={max_new_tokens=512}",
]  # fmt: skip
HOT = ["traces.sampling.temperature=2.0"]  # the bundled reasoner errs in 3 of 1,000 replies at 1.3, in 180 at 2
SELECTIONS: dict[str, list[str]] = {
    "all": [],
    "temperature 2": HOT,
    "temperature 2, correct": [*HOT, "traces.filters={correct=true}"],
    "temperature 2, wrong": [*HOT, "traces.filters={max_solved=0.0}"],
    "temperature 2, hard but solved": [*HOT, "traces.samples=4", "traces.filters={correct=true, max_solved=0.75}"],
    "short (at most 150 tokens)": ["traces.filters={max_tokens=150}"],
    "moderate (150 to 300)": ["traces.filters={min_tokens=150, max_tokens=300}"],
    "long (at least 300)": ["traces.filters={min_tokens=300}"],
    "first 32 tokens": ["calibration.first_tokens=32"],
    "first 64 tokens": ["calibration.first_tokens=64"],
    "first 128 tokens": ["calibration.first_tokens=128"],
    "10,000 tokens": ["calibration.num_tokens=10_000"],
    "100,000 tokens": ["calibration.num_tokens=100_000"],
    "300,000 tokens": ["calibration.num_tokens=300_000"],
    "1,000,000 tokens": ["calibration.num_tokens=1_000_000"],
}
PLAIN: dict[str, list[str]] = {  # for a model that errs at its own temperature, and is slow
    "correct": ["traces.filters={correct=true}"],
    "temperature 1": ["traces.sampling.temperature=1.0"],
    "2,000 tokens": ["calibration.num_tokens=2_000"],
    "32,000 tokens": ["calibration.num_tokens=32_000"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default=";".join(SELECTIONS))
    parser.add_argument("--corpus", action="append", default=[], help="NAME=FILE: a selection of other texts")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    selections = {name: (SELECTIONS | PLAIN)[name] for name in options.only.split(";")}
    for name, _, file in (corpus.partition("=") for corpus in options.corpus):
        selections[name] = ["sweep.arm=['corpus']", f"calibration.corpus='{file}'"]
    recipes = {n: load_recipe(options.recipe, [*BASE, *options.set, *found]) for n, found in selections.items()}
    reports = {name: study(recipe, options.out, jobs=options.jobs) for name, recipe in recipes.items()}
    first = next(iter(reports.values()))
    rows: list[tuple[str, Any, float, float]] = []
    for name, report in reports.items():
        for row in report.summary:
            if row.arm != "dense":
                p = sign_flip(list(differences(report, first, row.solver).values()))
                rows.append((name, row, p, report.traces.pass_at_1 if report.traces else 0.0))
    corrected = holm([p for _, _, p, _ in rows])
    print("| calibrated on | solver | traces correct | layer error | hidden error | pass@1 (95 %) | p | corrected |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for (name, row, p, correct), p_holm in zip(rows, corrected, strict=True):
        low, high = row.interval
        print(
            f"| {name} | {row.solver} | {100 * correct:.0f} % | {row.held_out_error:.4f} | {row.hidden_error:.3f} "
            f"| {100 * row.pass_at_1:.1f} % ({100 * low:.1f} to {100 * high:.1f}) | {p:.2g} | {p_holm:.2g} |"
        )


def differences(report: Any, other: Any, solver: str) -> dict[tuple[int, str], float]:
    """pass@1 by seed and question, less the other report's."""
    ours, theirs = (
        {
            (cell.seed, question): score
            for cell in one.cells
            if cell.solver == solver
            for question, score in cell.evaluation.scores.items()
        }
        for one in (report, other)
    )
    return {key: ours[key] - theirs[key] for key in ours}


if __name__ == "__main__":
    main()
