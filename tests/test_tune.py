"""Block reconstruction: closer to the dense block on unseen documents, zeros exactly zero, never worse."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from secateurs.tune import RATES, Example, Tune, tune


class Block(nn.Module):
    """A residual MLP that is called as a decoder block is, with a tensor of one row a document besides."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 32, bias=False)
        self.down = nn.Linear(32, width, bias=False)

    def forward(self, hidden, shift, scale=None):
        return (hidden + self.down(torch.relu(self.up(self.norm(hidden)) + shift)) * scale[0],)


def prepared(dtype=torch.float32):
    """A half pruned block, its masks, and examples of what it was before; some rows are padded with junk."""
    block = Block().to(dtype)

    def example(rows: int) -> Example:
        hidden, shift = torch.randn(rows, 9, 16).to(dtype), torch.randn(rows, 1, 1).to(dtype)
        weight = torch.ones(rows, 9)
        weight[::2, 6:] = 0
        with torch.no_grad():
            goal = block(hidden, shift, scale=(torch.ones(()),))[0]
        goal[weight == 0] = 1e6
        return Example(hidden, (shift,), {"scale": (torch.ones(()),)}, goal, weight)

    train, held = [part for one in (example(40), example(33)) for part in one.parts(100)], [example(20)]
    kept = {}
    with torch.no_grad():
        for linear in (block.up, block.down):
            kept[linear.weight] = linear.weight.abs() > linear.weight.abs().float().median()
            linear.weight.mul_(kept[linear.weight])
    return block, kept, train, held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_block_comes_closer_and_only_kept_weights_move(dtype):
    block, kept, train, held = prepared(dtype)
    norm, old = block.norm.weight.clone(), {p: p.clone() for p in kept}
    before, after = tune(block, kept, train, held, Tune(steps=80))
    assert 0 < after < 0.7 * before
    for parameter, mask in kept.items():
        assert parameter.dtype == dtype and parameter.grad is None
        assert not parameter[~mask].any() and (parameter[mask] != old[parameter][mask]).float().mean() > 0.5
    assert torch.equal(block.norm.weight, norm) and block.norm.weight.dtype == dtype


@torch.no_grad()
def test_the_same_twice_is_the_same():
    ends = []
    for _ in range(2):
        torch.manual_seed(0)
        block, kept, train, held = prepared()
        torch.manual_seed(len(ends))  # no global state may enter
        tune(block, kept, train, held, Tune(steps=10))
        ends.append(block.up.weight.clone())
    assert torch.equal(*ends)


@torch.no_grad()
def test_what_is_not_better_on_held_out_documents_is_thrown_away():
    block, kept, train, held = prepared()
    nonsense = [replace(example, goal=torch.randn_like(example.goal) * 50) for example in train]
    old = {p: p.clone() for p in kept}
    before, after = tune(block, kept, nonsense, held, Tune(steps=20))
    assert before == after
    assert all(torch.equal(p, old[p]) for p in kept)


@torch.no_grad()
def test_a_rate_that_is_too_high_is_lowered_until_it_helps():
    """On a block that has been fine-tuned already, the first rate undoes what a sixteenth of it still improves."""
    block, kept, train, held = prepared()
    tune(block, kept, train, held, Tune(steps=150))
    tuned = {p: p.clone() for p in kept}
    tries = []
    for rates in ((1.0,), RATES):
        for parameter, value in tuned.items():
            parameter.copy_(value)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("secateurs.tune.RATES", rates)
            tries.append(tune(block, kept, train, held, Tune(steps=20, rate=0.5)))
    (before, alone), (_, lowered) = tries
    assert alone == before > lowered


def test_examples_are_cut_into_rows():
    _, _, _, (example,) = prepared()
    parts = list(example.parts(tokens=60))
    assert [len(part.hidden) for part in parts] == [6, 6, 6, 2]
    assert all(len(part.args[0]) == len(part.goal) == len(part.weight) == len(part.hidden) for part in parts)
    assert torch.equal(torch.cat([part.args[0] for part in parts]), example.args[0])
    assert len(list(example.parts(tokens=1))) == 20


@pytest.mark.parametrize(
    ("options", "lesson"),
    [
        ({"steps": 0}, "at least 1"),
        ({"rate": 0.0}, "rate is 0.0"),
        ({"rate": 1.0}, "in (0, 1)"),
        ({"tokens": 0}, "2048"),
    ],
)
def test_bad_settings_teach(options, lesson):
    with pytest.raises(ValueError, match=".") as error:
        Tune(**options)
    assert lesson in str(error.value)
