"""The layer-wise problem: a weight, the Gram of its inputs, a pattern; and its solution."""

from dataclasses import dataclass
from enum import Enum

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateurs.patterns import Pattern

CHUNK = 2048  # tokens summed in one float32 product; short sums keep the rounding near 1e-6


@dataclass
class Gram:
    """Σ w x xᵀ over tokens: a sum that starts at zero, adds up in any order, and can be scaled and merged.

    `tokens` counts tokens of positive weight, `weight_sum` adds their weights. Sums are raw; nothing is divided.
    """

    xtx: Float[Tensor, "d_in d_in"]
    weight_sum: float = 0.0
    tokens: int = 0

    @classmethod
    def zeros(cls, d_in: int, device: torch.device | str = "cpu") -> "Gram":
        """The empty sum, float32."""
        return cls(torch.zeros(d_in, d_in, dtype=torch.float32, device=device))

    def update(self, x: Float[Tensor, "*tokens d_in"], weight: Float[Tensor, "*tokens"] | None = None) -> None:
        """Add tokens, weighted where `weight` is given; a token of weight 0 (padding) is not looked at, even if NaN.

        Inputs are cast to float32 before they are multiplied, so bf16 products are exact. ValueError for negative weights.
        """
        flat = x.reshape(-1, x.shape[-1])
        if weight is not None:
            per_token = weight.reshape(-1)
            if (per_token < 0).any():
                raise ValueError("token weights must not be negative")
            kept = per_token > 0
            flat, per_token = flat[kept], per_token[kept].float()
            self.weight_sum += float(per_token.double().sum())
        else:
            per_token = None
            self.weight_sum += len(flat)
        self.tokens += len(flat)
        for start in range(0, len(flat), CHUNK):
            part = flat[start : start + CHUNK].float()
            left = part if per_token is None else part * per_token[start : start + CHUNK, None]
            self.xtx += left.T @ part  # not addmm_: it may add token by token to the large sum, which rounds more

    def __add__(self, other: "Gram") -> "Gram":
        return Gram(self.xtx + other.xtx, self.weight_sum + other.weight_sum, self.tokens + other.tokens)

    def __mul__(self, factor: float | int) -> "Gram":
        return Gram(self.xtx * factor, self.weight_sum * factor, self.tokens)

    __rmul__ = __mul__


class Outcome(Enum):
    """How a solve ended; the text says what it means and what to do about it."""

    ok = "solved as asked"
    damping_raised = (
        "the Gram was not positive definite at the asked damping, so more was used; give more calibration tokens or raise "
        "`damp` to make it explicit"
    )
    dead_inputs = (
        "some inputs were zero on every calibration token; their weights were pruned first; use more varied documents if "
        "that is not expected"
    )
    rank_deficient = (
        "there are fewer calibration tokens than inputs, so the error on them says little; raise calibration.num_tokens"
    )


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """Find Ŵ with the pattern's zeros that minimises tr((T - Ŵ) G (T - Ŵ)ᵀ); T is `target`, or the weight itself.

    A target other than W carries corrections for the errors of earlier layers. ValueError for shapes that do not fit.
    """

    name: str
    weight: Float[Tensor, "d_out d_in"]
    gram: Gram
    pattern: Pattern
    target: Float[Tensor, "d_out d_in"] | None = None

    def __post_init__(self) -> None:
        d_out, d_in = self.weight.shape
        if tuple(self.gram.xtx.shape) != (d_in, d_in):
            raise ValueError(f"{self.name}: the Gram is {tuple(self.gram.xtx.shape)}, the weight has {d_in} inputs")
        if self.target is not None and self.target.shape != self.weight.shape:
            raise ValueError(f"{self.name}: the target is {tuple(self.target.shape)}, the weight {(d_out, d_in)}")
        self.pattern.check(d_out, d_in)

    @property
    def goal(self) -> Float[Tensor, "d_out d_in"]:
        """T in float32."""
        return (self.weight if self.target is None else self.target).float()

    @property
    def dead(self) -> Bool[Tensor, " d_in"]:
        """Inputs that were (all but) zero on every token."""
        diagonal = self.gram.xtx.diagonal()
        return diagonal <= 1e-12 * diagonal.median()

    def outcome(self, raised: bool = False) -> Outcome:
        """What a solver reports, given whether it had to raise the damping."""
        if raised:
            return Outcome.damping_raised
        if self.gram.tokens < self.weight.shape[1]:
            return Outcome.rank_deficient
        return Outcome.dead_inputs if bool(self.dead.any()) else Outcome.ok


@dataclass(frozen=True, eq=False)
class LayerSolution:
    """The new weight (in the old one's dtype, exactly zero off the mask), its mask (True = kept), and figures."""

    weight: Float[Tensor, "d_out d_in"]
    mask: Bool[Tensor, "d_out d_in"]
    outcome: Outcome
    stats: dict[str, float]


def relative_error(weight: Tensor, reference: Tensor, gram: Gram) -> float:
    """tr(D G Dᵀ) / tr(W G Wᵀ) with D = weight - reference and W = reference, in float64. 0/0 is 0."""
    g = gram.xtx.double()
    dense = reference.double()
    delta = weight.double() - dense
    lost = float(((delta @ g) * delta).sum())
    whole = float(((dense @ g) * dense).sum())
    return lost / whole if whole > 0 else (0.0 if lost <= 0 else float("inf"))
