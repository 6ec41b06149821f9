"""One matrix to prune: its inputs as a `Gram`, the `LayerProblem` a solver gets and the `LayerSolution` it returns."""

from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Bool, Float, Float32, Shaped
from torch import Tensor

from secateurs.kernels import has_triton
from secateurs.linalg import all_finite, dead_inputs, fast_product
from secateurs.patterns import Pattern

TOKENS_AT_ONCE = 2048
COLUMNS_AT_ONCE = 256  # on a CPU; four times as many elsewhere, where a product needs to be larger to be fast
ROWS_AT_ONCE = 1024
CANCELS = 1e-2  # pruned layers have .1 to 1 left (docs/log.md)


@dataclass(eq=False)
class Gram:
    """The weighted sum of x x^T over tokens, and what went into it. All a solver ever knows of the inputs.

    A commutative monoid: `+` merges shards, processes and regions, and `2.0 * gram` re-weights one, so
    `w_p * prompt + w_t * think` needs no second pass over the data. Raw sums in float32, never a running mean (the
    public `H *= n / (n + b)` rounds at every batch and depends on their order). Unit: squared activation x weight.
    """

    xtx: Float32[Tensor, "d_in d_in"]
    weight_sum: float = 0.0
    tokens: int = 0

    @classmethod
    def zeros(cls, d_in: int, device: torch.device | str = "cpu") -> "Gram":
        """The Gram of no tokens."""
        return cls(torch.zeros(d_in, d_in, device=device))

    @property
    def d_in(self) -> int:
        return self.xtx.shape[0]

    def update(self, x: Float[Tensor, "*batch d_in"], weight: Shaped[Tensor, "*batch"] | None = None) -> None:
        """Add the tokens of `x`, each with its `weight` (1 when None). Weight 0 is as if the token were not there.

        Tokens of weight 0 are dropped before any arithmetic, so padding adds nothing even where it holds NaN. Exactly
        symmetric: only the upper triangle is computed, then mirrored. On a GPU unweighted 16-bit tokens are multiplied
        by its units for them, exactly, and summed in float32 (`kernels.gram`). ValueError if a weight is negative or
        not finite. Cost: about d_in^2 flops a token, in chunks of 2048 tokens: a short sum added to the long one rounds
        less than a token at a time.
        """
        if x.shape[-1] != self.d_in:
            raise ValueError(f"this Gram has {self.d_in} inputs, but the activations have {x.shape[-1]}.")
        x = x.detach().reshape(-1, self.d_in)
        weight = None if weight is None else weight.detach().reshape(-1).to(torch.float64)
        if weight is not None:
            if not bool(torch.isfinite(weight).all()) or bool((weight < 0).any()):
                raise ValueError(
                    "a token weight is negative or not finite: weights must be 0 (ignore the token) or more."
                )
            counted = weight > 0
            x, weight = x[counted], weight[counted]
        if weight is None and _is_for_units(x):
            from secateurs.kernels.gram import add_gram

            add_gram(self.xtx, x)
        else:
            self._add(x, weight)
        self.tokens += x.shape[0]
        self.weight_sum += float(x.shape[0] if weight is None else weight.sum())

    def _add(self, x: Tensor, weight: Tensor | None) -> None:
        for first in range(0, x.shape[0], TOKENS_AT_ONCE):
            chunk = x[first : first + TOKENS_AT_ONCE].float()
            if weight is not None:
                chunk = chunk * weight[first : first + TOKENS_AT_ONCE].sqrt().float()[:, None]
            for start, end in _column_blocks(self.xtx):
                self.xtx[start:end, start:] += chunk[:, start:end].T @ chunk[:, start:]
        for start, end in _column_blocks(self.xtx):
            corner = self.xtx[start:end, start:end]
            corner.copy_(corner.triu() + corner.triu(1).T)
            self.xtx[end:, start:end] = self.xtx[start:end, end:].T

    def __add__(self, other: "Gram") -> "Gram":
        if self.d_in != other.d_in:
            raise ValueError(f"cannot add a Gram of {other.d_in} inputs to one of {self.d_in}.")
        return Gram(self.xtx + other.xtx, self.weight_sum + other.weight_sum, self.tokens + other.tokens)

    def __mul__(self, factor: float | int) -> "Gram":
        """Every token's weight times `factor`. ValueError below 0. Factor 0 is the Gram of no tokens."""
        if not 0 <= factor < float("inf"):
            raise ValueError(f"a Gram can be weighted by 0 or more, not by {factor}.")
        return Gram(self.xtx * factor, self.weight_sum * factor, self.tokens if factor else 0)

    __rmul__ = __mul__


class Outcome(StrEnum):
    """How a solve went. When several apply, the one that appears last here is reported; `stats` has the figures."""

    OK = "ok"
    DEAD_INPUTS = "dead_inputs"
    RANK_DEFICIENT = "rank_deficient"
    DAMPING_RAISED = "damping_raised"

    @property
    def text(self) -> str:
        """Cause and remedy, in plain words."""
        return _OUTCOME_TEXT[self]


_OUTCOME_TEXT = {
    Outcome.OK: "Solved as asked.",
    Outcome.DEAD_INPUTS: "Some inputs were zero on every calibration token, so their weights were pruned first. "
    "Usual for padded or unused channels; if they are many, calibrate on more varied questions.",
    Outcome.RANK_DEFICIENT: "There were fewer calibration tokens than live inputs, so the layer was fitted to "
    "very little and its error on them says nothing about others. Use more tokens, at least ten for each input.",
    Outcome.DAMPING_RAISED: "The damped Gram could not be factored, so more damping was used than was asked for and "
    "weights compensate for each other less. Check for huge or nearly identical activations; use more tokens.",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerProblem:
    """Find sparse What with tr((T - What) G (T - What)^T) small: T = `target`, or `weight` when there is none.

    A target other than the weight is how an output to imitate, seen through other inputs than the ones this layer
    now gets, enters (QEP, GPTAQ): every solver runs on (T, G) unchanged. ValueError when shapes or devices disagree,
    a number is not finite, or the pattern does not fit the matrix; the message names the layer.
    """

    name: str
    weight: Float[Tensor, "d_out d_in"]
    gram: Gram
    pattern: Pattern
    target: Float[Tensor, "d_out d_in"] | None = None
    loss_root: Float[Tensor, "rank d_out"] | None = None
    """R, where an error e of an output costs the model |R e|^2 (`survey.loss_roots`), on any device; None: |e|^2."""
    costs: Float[Tensor, " groups"] | None = None
    """Of each group of inputs, where that alone decides which go (`survey.taylor_costs`), on any device."""

    def __post_init__(self):
        d_out, d_in = self.weight.shape
        if self.gram.d_in != d_in:
            raise ValueError(f"{self.name}: the weight has {d_in} inputs, but its Gram has {self.gram.d_in}.")
        if self.target is not None and self.target.shape != self.weight.shape:
            raise ValueError(
                f"{self.name}: the target is {tuple(self.target.shape)}, but the weight is {tuple(self.weight.shape)}."
            )
        for what, tensor in (("weight", self.weight), ("Gram", self.gram.xtx), ("target", self.target)):
            if tensor is not None and tensor.device != self.weight.device:
                raise ValueError(f"{self.name}: the {what} is on {tensor.device}, the weight on {self.weight.device}.")
            if tensor is not None and not all_finite(tensor):
                raise ValueError(
                    f"{self.name}: the {what} holds NaN or infinity; find the layer or token that makes it."
                )
        try:
            self.pattern.check(d_out, d_in)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None

    @property
    def goal(self) -> Float[Tensor, "d_out d_in"]:
        """T: the dense weights to approximate."""
        return self.weight if self.target is None else self.target

    @property
    def dead(self) -> Bool[Tensor, " d_in"]:
        """Inputs that were never active, see `linalg.dead_inputs`."""
        return dead_inputs(self.gram.xtx)

    def outcome(self, damping_raised: bool = False) -> Outcome:
        """What a solver reports that has kept to its algorithm, given whether it had to raise the damping."""
        num_dead = int(self.dead.sum())
        if damping_raised:
            return Outcome.DAMPING_RAISED
        if self.gram.tokens < self.gram.d_in - num_dead:
            return Outcome.RANK_DEFICIENT
        return Outcome.DEAD_INPUTS if num_dead else Outcome.OK


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerSolution:
    """New weights (same dtype as the old, exactly 0 off the mask), the mask (True = kept), how it went and figures."""

    weight: Float[Tensor, "d_out d_in"]
    mask: Bool[Tensor, "d_out d_in"]
    outcome: Outcome
    stats: dict[str, float]


def relative_error(
    weight_hat: Float[Tensor, "d_out d_in"], reference: Float[Tensor, "d_out d_in"], gram: Gram
) -> float:
    """tr(D G D^T) / tr(W G W^T) with D = W - What: the fraction of output energy lost. 0 is perfect, 1 is all zeros.

    0 / 0 is 0 (no input, nothing lost). Errors of 1e-12 still count: a difference is as exact as its numbers. Cost: two
    `gram_energy`s; 1024 rows are all the extra memory that grows with d_in.
    """
    lost = total = 0.0
    for dense, pruned in zip(reference.split(ROWS_AT_ONCE), weight_hat.split(ROWS_AT_ONCE), strict=True):
        lost += gram_energy(dense.float() - pruned.float(), gram)
        total += gram_energy(dense, gram)
    if total == 0:
        return 0.0 if lost == 0 else float("inf")
    return lost / total


def token_energies(weight: Float[Tensor, "d_out d_in"], x: Float[Tensor, "tokens d_in"]) -> Float32[Tensor, " tokens"]:
    """|W x|^2 of every token, on a GPU by TF32 products. Cost: 2 d_out d_in flops a token."""
    weight, product = weight.float(), fast_product if weight.is_cuda else torch.mm
    parts = [product(part.float(), weight.T).square().sum(-1) for part in x.split(TOKENS_AT_ONCE)]
    return torch.cat(parts) if parts else weight.new_zeros(0)


def gram_energy(weight: Float[Tensor, "d_out d_in"], gram: Gram) -> float:
    """tr(W G W^T): the sum of `token_energies` over the tokens of a Gram.

    By float32 products; by float64 ones, which are slow on most GPUs, where so much cancels that less than CANCELS of
    what every weight costs by itself is left. Cost: d_out d_in^2 flops, using the symmetry of G.
    """
    energy = 0.0
    for rows in weight.split(ROWS_AT_ONCE):
        single = rows.float()
        alone = float((single.square() @ gram.xtx.diagonal()).double().sum())
        found = _energy(single, gram.xtx)
        energy += found if found >= CANCELS * alone else _energy(rows.double(), gram.xtx)
    return energy


def _energy(delta: Float[Tensor, "d_out d_in"], gram: Float[Tensor, "d_in d_in"]) -> float:
    """tr(D G D^T) in the type of D, each pair of column blocks once."""
    energy = delta.new_zeros((), dtype=torch.float64)
    for start, end in _column_blocks(gram):
        images = delta[:, start:end] @ gram[start:end, start:].to(delta.dtype)
        within, beyond = images.split([end - start, images.shape[1] - (end - start)], dim=1)
        each = torch.linalg.vecdot(within, delta[:, start:end]) + 2 * torch.linalg.vecdot(beyond, delta[:, end:])
        energy += each.double().sum()
    return max(float(energy), 0.0)


def _is_for_units(x: Tensor) -> bool:
    """Whether these are 16-bit numbers on a GPU with units for both kinds, whose products are exact."""
    both = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 0)
    return both and x.dtype in (torch.bfloat16, torch.float16) and has_triton()


def _column_blocks(gram: Tensor) -> list[tuple[int, int]]:
    width, d_in = COLUMNS_AT_ONCE * (1 if gram.device.type == "cpu" else 4), gram.shape[0]
    return [(start, min(start + width, d_in)) for start in range(0, d_in, width)]
