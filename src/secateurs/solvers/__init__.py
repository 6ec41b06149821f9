"""Solvers: a `LayerProblem` in, a `LayerSolution` out, nothing else touched. A file and a line in SOLVERS each."""

from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from typing import Protocol

from secateurs.layer import LayerProblem, LayerSolution
from secateurs.solvers.masking import Masking
from secateurs.solvers.sparsegpt import SparseGPT


class Solver(Protocol):
    """A solver is its hyper-parameters: a frozen dataclass with one method."""

    def solve(self, problem: LayerProblem) -> LayerSolution:
        """Weights with exactly the zeros `problem.pattern` asks for. Changes nothing; same in, same out."""
        ...


SOLVERS: dict[str, Callable[..., Solver]] = {
    "magnitude": partial(Masking, score="magnitude"),
    "wanda": partial(Masking, score="wanda"),
    "sparsegpt": SparseGPT,
    "sparsegpt-reference": partial(SparseGPT, block_size=128, damping="mean"),
}


def solver(name: str, **options) -> Solver:
    """The solver called `name`, with `options` over its defaults. ValueError for an unknown one says what is known."""
    if name not in SOLVERS:
        near = get_close_matches(name, SOLVERS, n=1)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        raise ValueError(f"unknown solver `{name}`.{hint} Known: {', '.join(sorted(SOLVERS))}.")
    try:
        return SOLVERS[name](**options)
    except TypeError as error:
        raise ValueError(f"solver `{name}`: {error}") from None
