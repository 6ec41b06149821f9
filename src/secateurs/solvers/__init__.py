"""Solvers: a `LayerProblem` in, a `LayerSolution` out, nothing else touched. A file and a line in SOLVERS each."""

from collections.abc import Callable
from functools import partial
from typing import Protocol

from secateurs.layer import LayerProblem, LayerSolution
from secateurs.solvers.admm import ADMM
from secateurs.solvers.alps import ALPS
from secateurs.solvers.masking import Masking
from secateurs.solvers.obs import OBS
from secateurs.solvers.refit import Refit
from secateurs.solvers.sparsegpt import SparseGPT
from secateurs.solvers.swaps import Swaps


class Solver(Protocol):
    """A solver is its hyper-parameters: a frozen dataclass with one method."""

    @property
    def by_rows(self) -> bool:
        """Whether rows meet only in the pattern, so that matrices with the same inputs can be solved as one."""
        ...

    def solve(self, problem: LayerProblem) -> LayerSolution:
        """Weights with exactly the zeros `problem.pattern` asks for. Changes nothing; same in, same out."""
        ...


SOLVERS: dict[str, Callable[..., Solver]] = {
    "magnitude": partial(Masking, score="magnitude"),
    "wanda": partial(Masking, score="wanda"),
    "sparsegpt": SparseGPT,
    "sparsegpt-reference": partial(SparseGPT, block_size=128, damping="mean"),
    "wanda+refit": partial(Refit, base=Masking(score="wanda")),
    "sparsegpt+refit": partial(Refit, base=SparseGPT()),
    "alps": ALPS,
    "admm": ADMM,
    "admm+": partial(Swaps, base=ADMM(steps=40, levels=20)),
}

# Those that can choose whole inputs, for structured cuts.
CUT_SOLVERS: dict[str, Callable[..., Solver]] = {"obs": OBS} | {
    name: SOLVERS[name] for name in ("magnitude", "wanda", "wanda+refit")
}
