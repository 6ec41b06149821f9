"""Prune by a score and leave the surviving weights alone: magnitude and Wanda."""

import time
from dataclasses import dataclass

from secateurs.layer import LayerProblem, LayerSolution
from secateurs.scores import SCORES, dead_first


@dataclass(frozen=True, kw_only=True)
class Masking:
    """What = T where `score` ranks high enough for the pattern, 0 elsewhere. No survivor moves.

    With score "wanda" this is Wanda (Sun et al. 2024, arXiv 2306.11695). Weights of dead inputs go first, whatever the
    score: pruning them costs nothing. Cost: one selection over the matrix.
    """

    score: str

    @property
    def by_rows(self) -> bool:
        """Yes."""
        return True

    def __post_init__(self):
        if self.score not in SCORES:
            raise ValueError(f"unknown score `{self.score}`. Known: {', '.join(sorted(SCORES))}.")

    def solve(self, problem: LayerProblem) -> LayerSolution:
        """See `Solver.solve`."""
        started = time.perf_counter()
        scores = SCORES[self.score](problem.goal, problem.gram)
        dead = problem.dead
        mask = problem.pattern.mask(dead_first(scores, problem.goal, dead))
        weight = problem.goal.detach().masked_fill(~mask, 0).to(problem.weight.dtype)
        return LayerSolution(
            weight=weight,
            mask=mask,
            outcome=problem.outcome(),
            stats={
                "zeros": float((~mask).count_nonzero()),
                "dead_inputs": float(dead.sum()),
                "seconds": time.perf_counter() - started,
            },
        )
