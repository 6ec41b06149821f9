"""How much each weight matters, from the weight and the Gram alone. Higher = keep. One function a score."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from secateurs.layer import Gram


def magnitude(weight: Float[Tensor, "d_out d_in"], gram: Gram) -> Float32[Tensor, "d_out d_in"]:
    """|W|. Blind to the inputs: the baseline every other score has to beat."""
    return weight.float().abs()


def wanda(weight: Float[Tensor, "d_out d_in"], gram: Gram) -> Float32[Tensor, "d_out d_in"]:
    """|W_ij| * ||X_j||_2, with ||X_j||^2 = G_jj (Sun et al. 2024, arXiv 2306.11695, eq. 1).

    The public code divides the norm by the square root of the number of samples: one factor for the whole layer, so the
    order is the same. Made for row scope ("per output"), which the paper found to matter.
    """
    return weight.float().abs() * gram.xtx.diagonal().sqrt()


def dead_first(
    scores: Float32[Tensor, "d_out d_in"],
    weight: Float[Tensor, "d_out d_in"],
    dead: Bool[Tensor, " d_in"],
) -> Float32[Tensor, "d_out d_in"]:
    """`scores` (none negative) with the weights of `dead` inputs below all others, the smallest of them lowest.

    Nothing is known of what a dead input would do, so size is what is left: with no tokens at all (an expert that was
    never chosen) this is magnitude pruning.
    """
    return torch.where(dead, -1 / weight.float().abs(), scores)


SCORES: dict[str, Callable[[Float[Tensor, "d_out d_in"], Gram], Float32[Tensor, "d_out d_in"]]] = {
    "magnitude": magnitude,
    "wanda": wanda,
}
