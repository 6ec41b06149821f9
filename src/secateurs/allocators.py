"""How many zeros each matrix gets under one budget for the model: uniform, OWL, ATP, or by measured curves. Exact.

The budget is always what the uniform plan prunes, so that plans can be compared; what is given out sums to it exactly.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Protocol

MOST = 0.98
"""No matrix is pruned further than this, unless the budget leaves no choice."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What an allocator may know of a matrix.

    `outliers` is the share of its block's Wanda scores above five times their mean. `curve` has points (sparsity, loss)
    with rising sparsity, the loss in nats of KL a token.
    """

    name: str
    block: int
    size: int
    outliers: float = 0.0
    curve: tuple[tuple[float, float], ...] = ()

    def loss(self, sparsity: float) -> float:
        """The curve between its points, and straight on beyond them."""
        ends = next((pair for pair in pairwise(self.curve) if sparsity <= pair[1][0]), self.curve[-2:])
        (left, low), (right, high) = ends
        return low + (high - low) * (sparsity - left) / (right - left)


class Allocator(Protocol):
    """An allocator is its hyper-parameters: a frozen dataclass with one method."""

    needs_survey: ClassVar[bool]
    """Whether the dense model must be looked at first."""
    needs_curves: ClassVar[bool]
    """Whether that must measure curves, which takes a solve and a forward pass for every matrix."""

    def allocate(self, layers: Sequence[Layer], zeros: int) -> list[int]:
        """Zeros for each of `layers`, `zeros` together."""
        ...


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """The same sparsity everywhere. The pattern does that by itself."""

    needs_survey: ClassVar[bool] = False
    needs_curves: ClassVar[bool] = False

    def allocate(self, layers: Sequence[Layer], zeros: int) -> list[int]:
        """See `Allocator.allocate`."""
        return _to_budget([0.0 for _ in layers], layers, zeros)


@dataclass(frozen=True, kw_only=True)
class OWL:
    """Blocks with more outlying weights keep more (Yin et al. 2024, arXiv 2310.05175, sec. 3).

    The density of a block is 1 - s plus its outlier share, stretched over blocks to a range of 2 `spread`, minus the
    mean. The public code leaves the budget to chance where blocks differ in size; here one shift of all sparsities
    makes it exact.
    """

    spread: float = 0.08
    """Lambda in the paper."""
    needs_survey: ClassVar[bool] = True
    needs_curves: ClassVar[bool] = False

    def __post_init__(self):
        if not 0 <= self.spread < 0.5:
            raise ValueError(f"spread is {self.spread}, but it must be in [0, 0.5): half the range of sparsities.")

    def allocate(self, layers: Sequence[Layer], zeros: int) -> list[int]:
        """See `Allocator.allocate`."""
        shares = [layer.outliers for layer in layers]
        low, width = min(shares), max(shares) - min(shares)
        return _to_budget(
            [-2 * self.spread * (share - low) / width if width else 0.0 for share in shares], layers, zeros
        )


@dataclass(frozen=True, kw_only=True)
class ATP:
    """Sparsity rises from block to block by `step`: an arithmetic progression (arXiv 2502.14770).

    Early errors go through every later block. Without a `step` the best of a few, 0 among them, by the measured curves:
    the paper tries each on the model.
    """

    step: float | None = None
    needs_survey: ClassVar[bool] = True
    needs_curves: ClassVar[bool] = True

    def allocate(self, layers: Sequence[Layer], zeros: int) -> list[int]:
        """See `Allocator.allocate`."""
        blocks = max(layer.block for layer in layers)

        def plan(step: float) -> list[int]:
            return _to_budget([step * layer.block for layer in layers], layers, zeros)

        if self.step is not None:
            return plan(self.step)
        plans = [plan(rise / max(blocks, 1)) for rise in (0.0, 0.05, 0.1, 0.15, 0.2, 0.3)]
        return min(plans, key=lambda counts: _total_loss(layers, counts))


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Least sum of measured losses: every zero goes where the next one costs least.

    Exact for the lower convex hulls of the curves, where all matrices end at the same slope (Lagrange). That losses of
    matrices add up is an assumption, false by far at high sparsity (docs/log.md); so no matrix leaves the neighbourhood
    of the uniform plan, `within` of its sparsity.
    """

    within: float = 0.1
    needs_survey: ClassVar[bool] = True
    needs_curves: ClassVar[bool] = True

    def __post_init__(self):
        if not 0 < self.within <= 1:
            raise ValueError(f"within is {self.within}, but it must be in (0, 1]: how far from the uniform sparsity.")

    def allocate(self, layers: Sequence[Layer], zeros: int) -> list[int]:
        """See `Allocator.allocate`. ValueError if the budget is outside of what the curves cover."""
        counts, pieces = [], []
        uniform = zeros / sum(layer.size for layer in layers)
        reach = self.within + 0.001  # the budget is rounded down
        for index, layer in enumerate(layers):
            near = [(round(s * layer.size), loss) for s, loss in layer.curve if abs(s - uniform) <= reach]
            if not near:
                raise ValueError(f"{layer.name}: its curve has no point within {self.within} of {uniform:.2f}")
            hull = _lower_hull(near)
            counts.append(hull[0][0])
            pieces += [((high - low) / (b - a), index, b - a) for (a, low), (b, high) in pairwise(hull)]
        left = zeros - sum(counts)
        for _, index, length in sorted(pieces, key=lambda piece: piece[:2]):
            taken = min(max(left, 0), length)
            counts[index] += taken
            left -= taken
        if left:
            raise ValueError(f"the curves do not reach the budget of {zeros:,} zeros: let them go further")
        return counts


ALLOCATORS: dict[str, Callable[..., Allocator]] = {"uniform": Uniform, "owl": OWL, "atp": ATP, "curves": Curves}


def _total_loss(layers: Sequence[Layer], counts: Sequence[int]) -> float:
    return sum(layer.loss(count / layer.size) for layer, count in zip(layers, counts, strict=True))


def _lower_hull(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The points, from left to right, that no line between others lies below. A curve that falls counts as flat."""
    hull: list[tuple[int, float]] = []
    least = float("-inf")
    for x, y in points:
        least = max(least, y)
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (least - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        if not hull or x > hull[-1][0]:
            hull.append((x, least))
    return hull


def _to_budget(offsets: Sequence[float], layers: Sequence[Layer], zeros: int) -> list[int]:
    """Sparsities that differ by `offsets`, all shifted alike to make `zeros` zeros, each in [0, MOST]; whole numbers.

    Fractions of a zero go to the matrices that were cut by most, the first of equals.
    """
    total = sum(layer.size for layer in layers)
    if not 0 <= zeros <= total:
        raise ValueError(f"{zeros:,} zeros do not fit into {total:,} weights")
    most = max(MOST, zeros / total)

    def shares(shift: float) -> list[float]:
        return [min(max(offset + shift, 0.0), most) for offset in offsets]

    low, high = -max(offsets), 1.0 - min(offsets)
    for _ in range(100):
        middle = (low + high) / 2
        count = sum(share * layer.size for share, layer in zip(shares(middle), layers, strict=True))
        low, high = (middle, high) if count < zeros else (low, middle)
    wanted = [share * layer.size for share, layer in zip(shares(high), layers, strict=True)]
    counts = [int(count) for count in wanted]
    order = sorted(range(len(layers)), key=lambda index: counts[index] - wanted[index])
    at = 0
    while (missing := zeros - sum(counts)) != 0:
        index, step = order[at % len(order)], 1 if missing > 0 else -1
        if 0 <= counts[index] + step <= layers[index].size:
            counts[index] += step
        at += 1
    return counts
