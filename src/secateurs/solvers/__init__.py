"""The solvers, one algorithm a file, in one table. A solver is its hyper-parameters: `SparseGPT(damp=0.02)`."""

from collections.abc import Callable
from functools import partial
from typing import Protocol

from secateurs.layer import LayerProblem, LayerSolution
from secateurs.solvers.masking import ScoreMask
from secateurs.solvers.sparsegpt import SparseGPT


class Solver(Protocol):
    """Problem in, solution out; nothing else is touched."""

    def solve(self, problem: LayerProblem) -> LayerSolution:
        """A weight with exactly the zeros `problem.pattern` asks for."""
        ...


SOLVERS: dict[str, Callable[..., Solver]] = {
    "magnitude": partial(ScoreMask, score="magnitude"),
    "wanda": partial(ScoreMask, score="wanda"),
    "sparsegpt": SparseGPT,
    "sparsegpt-paper": partial(SparseGPT, block_size=128, damping="mean", across_rows=True),
}
