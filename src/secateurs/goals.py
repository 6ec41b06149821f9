"""What a layer should reproduce: its own dense weights, or the dense model's outputs on inputs that have changed."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from secateurs.layer import Gram
from secateurs.linalg import cholesky, raising_damp, unit_gram

Goal = Literal["own", "dense", "residual"]
Propagate = Literal["dense", "block", "group"]

DAMP = 0.03  # of the mean, as the solvers' own


def check_goal(goal: Goal, propagate: Propagate) -> None:
    """ValueError for a goal that nothing can come of."""
    if goal != "own" and propagate == "dense":
        raise ValueError(
            f'goal "{goal}" needs propagate "block" or "group": with "dense" no input differs from the dense '
            "model's, so there is nothing to make up for"
        )


@dataclass(eq=False)
class Drift:
    """How far the layer's inputs, and the stream its output is added to, are from the dense model's: sums over tokens.

    `inputs` = sum w (x_dense - x) x^T and, for a layer that writes to the residual stream, `stream` = sum w (h_dense -
    h) x^T. Differences, so that they lose no digits where the two models still agree; either may be left out. Adds up
    and scales like a `Gram`.
    """

    inputs: Float32[Tensor, "d_in d_in"] | None
    stream: Float32[Tensor, "d_out d_in"] | None = None

    def __add__(self, other: "Drift") -> "Drift":
        return Drift(_plus(self.inputs, other.inputs), _plus(self.stream, other.stream))

    def __mul__(self, factor: float) -> "Drift":
        return Drift(*(None if one is None else one * factor for one in (self.inputs, self.stream)))


def _plus(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return None if one is None or other is None else one + other


@dataclass(frozen=True, eq=False)
class Imitation:
    """T for a `LayerProblem`, and how far it goes: `alpha` of the way for the inputs, `beta` for the stream."""

    target: Float[Tensor, "d_out d_in"]
    alpha: float
    beta: float


def imitate(
    weight: Float[Tensor, "d_out d_in"], gram: Gram, drift: Drift, held_gram: Gram, held_drift: Drift
) -> Imitation:
    """T = W + (alpha W D + beta R)(G + damping)^-1, with D = `drift.inputs`, R = `drift.stream`: weights that, on the
    inputs there are, give what W gives on the dense ones, and make up for what is missing in the stream.

    Least squares for |W x_dense + (h_dense - h) - T x|^2, shrunk. alpha and beta in [0, 1] minimise the same loss on
    the HELD-OUT sums, in closed form: with few tokens the correction fits noise, and they come out small. D is that of
    QEP (arXiv 2504.09629) and GPTAQ (arXiv 2504.02692), where alpha is a constant.
    Raises NotPositiveDefiniteError where a solver would.
    """
    dense = weight.detach().float()

    def factorise(damp: float):
        unit = unit_gram(gram.xtx, damp, "mean")
        return unit, cholesky(unit.matrix)

    (unit, lower), _ = raising_damp(factorise, DAMP)
    scale = unit.scale
    live = (gram.xtx.diagonal() > 0).float()

    def solve(moments: Tensor) -> Tensor:
        return torch.cholesky_solve((moments / scale).T, lower).T / scale * live

    directions: dict[str, Tensor] = {}
    wanted = torch.zeros_like(dense)
    if drift.inputs is not None and held_drift.inputs is not None:
        directions["alpha"] = solve(dense @ drift.inputs)
        wanted += dense @ held_drift.inputs
    if drift.stream is not None and held_drift.stream is not None:
        directions["beta"] = solve(drift.stream)
        wanted += held_drift.stream
    steps = list(directions.values())
    images = [step @ held_gram.xtx for step in steps]
    curvature = [[float((image * other).sum(dtype=torch.float64)) for other in steps] for image in images]
    slope = [float((step * wanted).sum(dtype=torch.float64)) for step in steps]
    shares = dict(zip(directions, _least_in_box(curvature, slope), strict=True))
    target = dense + sum(share * directions[name] for name, share in shares.items())
    return Imitation(target.to(weight.dtype), shares.get("alpha", 0.0), shares.get("beta", 0.0))


def _least_in_box(curvature: list[list[float]], slope: list[float]) -> tuple[float, ...]:
    """c in [0, 1]^n, n = 1 or 2, with least c^T M c / 2 - v^T c, for M positive semi-definite."""

    def along(i: int, fixed: dict[int, float]) -> float:
        """The best c_i for given other ones."""
        pull = slope[i] - sum(curvature[i][j] * c for j, c in fixed.items())
        return min(max(pull / curvature[i][i], 0.0), 1.0) if curvature[i][i] > 0 else 0.0

    if len(slope) == 1:
        return (along(0, {}),)
    candidates = [(along(0, {1: edge}), edge) for edge in (0.0, 1.0)]
    candidates += [(edge, along(1, {0: edge})) for edge in (0.0, 1.0)]
    (a, b), (_, d) = curvature
    determinant = a * d - b * b
    if determinant > 1e-9 * a * d:
        inside = ((d * slope[0] - b * slope[1]) / determinant, (a * slope[1] - b * slope[0]) / determinant)
        if all(0 <= c <= 1 for c in inside):
            candidates.append(inside)

    def loss(c: tuple[float, float]) -> float:
        return (a * c[0] ** 2 + d * c[1] ** 2) / 2 + b * c[0] * c[1] - slope[0] * c[0] - slope[1] * c[1]

    return min(candidates, key=loss)
