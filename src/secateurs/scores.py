"""How much a weight seems to matter: (weight, gram) -> scores [d_out, d_in], higher is kept."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from secateurs.layer import Gram


def magnitude(weight: Float[Tensor, "d_out d_in"], gram: Gram) -> Float[Tensor, "d_out d_in"]:
    """|W|."""
    return weight.abs()


def wanda(weight: Float[Tensor, "d_out d_in"], gram: Gram) -> Float[Tensor, "d_out d_in"]:
    """|W_ij| · ‖X_j‖₂ (Sun et al. 2024, arXiv:2306.11695, eq. 1); the norm is the root of the Gram's diagonal."""
    return weight.abs() * gram.xtx.diagonal().clamp(min=0).sqrt()


SCORES: dict[str, Callable[[Tensor, Gram], Tensor]] = {"magnitude": magnitude, "wanda": wanda}
