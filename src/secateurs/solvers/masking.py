"""Score and cut, with no change to the weights that stay: magnitude and Wanda."""

import time
from dataclasses import dataclass

from secateurs.layer import LayerProblem, LayerSolution
from secateurs.scores import SCORES


@dataclass(frozen=True, kw_only=True)
class ScoreMask:
    """Keep the highest-scoring weights as they are.

    Wanda compares within a row (Sun et al. 2024, sec. 3), which is a pattern of scope "row". Cost: d_out d_in log d_in.
    """

    score: str = "wanda"

    def solve(self, problem: LayerProblem) -> LayerSolution:
        """Exact zeros by score; the kept weights are the target's."""
        clock = time.perf_counter()
        d_in = problem.weight.shape[1]
        mask = problem.pattern.block_mask(SCORES[self.score](problem.goal, problem.gram), 0, d_in)
        weight = (problem.goal * mask).to(problem.weight.dtype)
        return LayerSolution(weight, mask, problem.outcome(), {"seconds": time.perf_counter() - clock})
