"""Pure tensor functions on symmetric positive semi-definite matrices: damping, factors. Float32 in, float32 out."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

LADDER = 3.0  # each failed factorisation multiplies the damping by this
STEPS = 12  # .01 · 3¹² is far past anything useful


class NotPositiveDefinite(ArithmeticError):
    """A Gram that no damping on the ladder makes positive definite: it holds infinities or is not symmetric."""


@dataclass(frozen=True)
class Factor:
    """The upper U with Uᵀ U = (A + damping)⁻¹, the damping that was needed, and whether it is more than was asked."""

    upper: Float[Tensor, "n n"]
    damp: float
    raised: bool


def inverse_factor(
    gram: Float[Tensor, "n n"], damp: float, damping: Literal["relative", "mean"] = "relative"
) -> Factor:
    """Factor the inverse of a damped Gram: `relative` adds damp·diag(G), `mean` adds damp·mean(diag G) (SparseGPT's way).

    Relative damping treats every input alike whatever its scale, so massive activations do not drown the rest. The work is
    done on the diagonal-normalised matrix. If Cholesky fails the damping is tripled and tried again, and the result says so;
    nothing else is ever put in its place. NotPositiveDefinite when the ladder ends. Cost: 4/3 n³.
    """
    diagonal = gram.diagonal()
    scale = diagonal.clamp(min=torch.finfo(gram.dtype).tiny).rsqrt()
    normal = gram * scale[:, None] * scale[None, :]
    extra = torch.ones_like(diagonal) if damping == "relative" else diagonal.mean() * scale.square()
    for step in range(STEPS):
        used = damp * LADDER**step if damp else (0.0 if step == 0 else 1e-6 * LADDER**step)
        damped = normal.clone()
        damped.diagonal().add_(used * extra)
        # With J the reversal of rows and columns, J A J = L Lᵀ gives A⁻¹ = Uᵀ U with U = J L⁻¹ J, upper triangular.
        lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if info.item() == 0 and bool(lower.isfinite().all()):
            eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            upper = torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1)
            return Factor(upper * scale[None, :], used, step > 0)
    raise NotPositiveDefinite(
        f"no damping up to {used:.3g} makes the Gram positive definite; the activations are not finite or overflowed"
    )
