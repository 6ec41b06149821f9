"""Block reconstruction: a short fine-tune of what pruning left of a decoder block, towards the dense block's output."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import cos, pi
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from secateurs.ranks import ALONE, Ranks

RATES = (1.0, 0.25, 0.0625)  # tried one after the other until one helps


@dataclass(frozen=True, kw_only=True)
class Tune:
    """Adam on the kept weights of one block at a time, all its matrices together; pruned weights stay exactly zero.

    Minimises sum over tokens of w |goal - block(x)|^2, on the tokens and weights the Grams are made of. Solving one
    matrix at a time leaves what matrices could do for each other, through the nonlinearities between them. After any
    solver, as in arXiv 2510.14444 and 2603.01376; but the step is in units of a matrix's own root mean square, and a
    result that is not better on held-out documents is thrown away.
    Cost: about three forward passes of the block over `tokens` a step; in float32, with two moments a weight.
    """

    steps: int = 100
    rate: float = 0.01
    """The first step, over the root mean square of a matrix's kept weights; it falls to zero along a cosine. Where it
    does not help on held-out documents a quarter of it is tried, then a sixteenth."""
    tokens: int = 2048
    """Padded tokens a step (one document at least)."""

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, but a fine-tune takes at least 1 (100 is a good value).")
        if not 0 < self.rate < 1:
            raise ValueError(f"rate is {self.rate}, but it must be in (0, 1): a share of the weights' size.")
        if self.tokens < 1:
            raise ValueError(f"tokens is {self.tokens}, but a step needs at least 1 (2048 is a good value).")


@dataclass(frozen=True)
class Example:
    """Documents before a block: hidden states, what else the block is called with, the output wanted, token weights.

    Wherever they are kept: a step takes its own to the block's device.
    """

    hidden: Float[Tensor, "rows seq d_model"]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    goal: Float[Tensor, "rows seq d_model"]
    weight: Float[Tensor, "rows seq"]

    def parts(self, tokens: int) -> Iterator["Example"]:
        """Rows together, at most `tokens` padded tokens at a time. Tensors with one entry a row are cut likewise."""
        rows, width = self.weight.shape
        step = max(1, tokens // width)

        def cut(value: Any, at: slice) -> Any:
            if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == rows:
                return value[at]
            if isinstance(value, tuple):
                return tuple(cut(one, at) for one in value)
            return value

        for first in range(0, rows, step):
            at = slice(first, first + step)
            kwargs = {name: cut(value, at) for name, value in self.kwargs.items()}
            yield Example(self.hidden[at], cut(self.args, at), kwargs, self.goal[at], self.weight[at])


def tune(
    block: nn.Module,
    kept: Mapping[nn.Parameter, Bool[Tensor, "..."]],
    train: Sequence[Example | None],
    held_out: Sequence[Example],
    how: Tune,
    *,
    stored: torch.dtype | None = None,
    ranks: Ranks = ALONE,
) -> tuple[float, float]:
    """Move the `kept` entries of the parameters; the block's relative error on `held_out` before and after.

    `train` has an example a step, in every process the same ones: None where another process holds it. Steps follow
    each other whoever takes them, so that several processes save memory here, and no time. `held_out` are this one's.
    The error is over sum w |goal - x|^2, what the block adds to its input. Where it has not fallen the parameters are
    back as they were, and both figures are the same. Everything else of the block is left as it is. What is moved ends
    as numbers of type `stored`, or else of its own.
    """
    old = {parameter: parameter.detach().clone() for parameter in kept}
    before = _error(block, held_out, ranks)
    for gentler in RATES:
        with _float32(block):
            _descend(block, kept, train, replace(how, rate=how.rate * gentler), ranks)
        for parameter in kept:
            parameter.copy_(parameter.to(stored or parameter.dtype))
        after = _error(block, held_out, ranks)
        if after < before:
            return before, after
        for parameter, value in old.items():
            parameter.copy_(value)
    return before, before


def _descend(
    block: nn.Module,
    kept: Mapping[nn.Parameter, Tensor],
    train: Sequence[Example | None],
    how: Tune,
    ranks: Ranks,
) -> None:
    groups = []
    for parameter, mask in kept.items():
        size = float((parameter.square() * mask).sum() / mask.sum().clamp_min(1)) ** 0.5
        groups.append({"params": [parameter], "lr": how.rate * size})
    adam = torch.optim.Adam(groups, betas=(0.9, 0.99))
    fall = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: (1 + cos(pi * step / how.steps)) / 2)
    generator = torch.Generator().manual_seed(0)
    order: list[int] = []
    for _ in range(how.steps):
        order = order or torch.randperm(len(train), generator=generator).tolist()
        _differentiate(block, kept, train[order.pop()], ranks)
        adam.step()
        fall.step()
        adam.zero_grad()  # before the next ones are made: there is room for one of each


def _differentiate(
    block: nn.Module, kept: Mapping[nn.Parameter, Tensor], example: Example | None, ranks: Ranks
) -> None:
    """Give the parameters their gradients on the example that one of the processes has."""
    if example is None:
        gradients: Sequence[Tensor] = [torch.zeros_like(parameter) for parameter in kept]
    else:
        with torch.enable_grad():
            lost, total = _energies(block, example)
            gradients = torch.autograd.grad(lost / total.clamp_min(1e-30), list(kept))
    for (parameter, mask), gradient in zip(kept.items(), gradients, strict=True):
        ranks.add(gradient)
        parameter.grad = gradient.mul_(mask)  # no gradient, no moment, no step: zeros stay exactly zero


def _energies(block: nn.Module, example: Example) -> tuple[Tensor, Tensor]:
    """Of what differs from the goal, and of what the goal adds to the input, summed over weighted tokens."""
    parameter = next(block.parameters())
    dtype, device = parameter.dtype, parameter.device
    hidden, goal, weight = (one.to(device) for one in (example.hidden, example.goal, example.weight[..., None]))
    out = block(_cast(hidden, dtype), *_cast(example.args, dtype), **_cast(dict(example.kwargs), dtype))
    out = out[0] if isinstance(out, tuple) else out
    goal = goal.float()
    return (weight * (goal - out.float()) ** 2).sum(), (weight * (goal - hidden.float()) ** 2).sum()


def _error(block: nn.Module, examples: Sequence[Example], ranks: Ranks) -> float:
    sums = torch.zeros(2, dtype=torch.float64, device=next(block.parameters()).device)
    for example in examples:
        sums += torch.stack(_energies(block, example)).double()
    ranks.add(sums)
    return float(sums[0] / sums[1]) if sums[1] else 0.0


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors in `dtype`, inside tuples and dicts too."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(_cast(one, dtype) for one in value)
    return {name: _cast(one, dtype) for name, one in value.items()} if isinstance(value, dict) else value


@contextmanager
def _float32(block: nn.Module) -> Iterator[None]:
    """While open, the block computes in float32; afterwards every parameter has the type it had."""
    types = {parameter: parameter.dtype for parameter in block.parameters()}
    block.float()
    try:
        yield
    finally:
        for parameter, dtype in types.items():
            parameter.data = parameter.data.to(dtype)
