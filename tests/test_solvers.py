"""One conformance suite over every solver and pattern, brute force, and fixed numbers of the published arithmetic."""

import json
from itertools import combinations
from pathlib import Path

import pytest
import torch

from secateurs.layer import Gram, LayerProblem, Outcome, relative_error
from secateurs.linalg import NotPositiveDefinite, inverse_factor
from secateurs.patterns import NM, Unstructured
from secateurs.solvers import SOLVERS, SparseGPT

PATTERNS = [
    Unstructured(sparsity=0.5),
    Unstructured(sparsity=0.63),
    Unstructured(sparsity=0.7, scope="layer"),
    NM(n=2, m=4),
    NM(n=1, m=4),
    NM(n=3, m=4),
]
EVERY = pytest.mark.parametrize("solver", SOLVERS)
ALL = pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: f"{p}-{getattr(p, 'scope', 'nm')}")


def gram_of(x: torch.Tensor) -> Gram:
    gram = Gram.zeros(x.shape[-1])
    gram.update(x)
    return gram


def problem(pattern, d_out=24, d_in=68, tokens=400, seed=0, **changes) -> LayerProblem:
    """A correlated random layer; 68 inputs make the last block of every solver a short one."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d_in, d_in, generator=g) / d_in**0.5 + torch.eye(d_in)
    scale = torch.exp(torch.randn(d_in, generator=g))
    x = torch.randn(tokens, d_in, generator=g) @ mix * scale
    weight = torch.randn(d_out, d_in, generator=g)
    fields = {"name": "layer", "weight": weight, "gram": gram_of(x), "pattern": pattern} | changes
    return LayerProblem(**fields)


@EVERY
@ALL
def test_exact_zeros_pure_and_deterministic(solver, pattern):
    p = problem(pattern)
    weight, xtx = p.weight.clone(), p.gram.xtx.clone()
    a, b = SOLVERS[solver]().solve(p), SOLVERS[solver]().solve(p)
    assert int((~a.mask).sum()) == pattern.num_zeros(*p.weight.shape)
    assert a.weight.shape == p.weight.shape and a.weight.dtype == p.weight.dtype
    assert torch.equal(a.weight != 0, a.mask)
    if isinstance(pattern, NM):
        assert (a.mask.reshape(-1, pattern.m).sum(1) == pattern.n).all()
    elif pattern.scope == "row" and solver != "sparsegpt-paper":
        assert (a.mask.sum(1) == a.mask.sum(1)[0]).all()
    assert torch.equal(a.weight, b.weight) and torch.equal(a.mask, b.mask)
    assert torch.equal(p.weight, weight) and torch.equal(p.gram.xtx, xtx)
    assert a.outcome is Outcome.ok and a.stats["seconds"] >= 0
    assert 0 < relative_error(a.weight, p.weight, p.gram) < 1


@EVERY
def test_sparsity_zero_returns_the_target(solver):
    pattern = Unstructured(sparsity=0.0)
    assert torch.equal(SOLVERS[solver]().solve(problem(pattern)).weight, problem(pattern).weight)
    target = torch.randn(24, 68)
    assert torch.equal(SOLVERS[solver]().solve(problem(pattern, target=target)).weight, target)


@EVERY
def test_a_target_is_solved_like_a_weight(solver):
    """min over the target T is the same problem as min over W = T."""
    pattern, target = Unstructured(sparsity=0.5), torch.randn(24, 68)
    with_target = SOLVERS[solver]().solve(problem(pattern, target=target))
    assert torch.equal(with_target.weight, SOLVERS[solver]().solve(problem(pattern, weight=target)).weight)


@EVERY
def test_rows_and_scale_are_equivariant(solver):
    pattern = Unstructured(sparsity=0.5)
    p = problem(pattern)
    base = SOLVERS[solver]().solve(p)
    order = torch.randperm(24)
    moved = SOLVERS[solver]().solve(problem(pattern, weight=p.weight[order]))
    assert torch.equal(moved.mask, base.mask[order])
    scaled = SOLVERS[solver]().solve(problem(pattern, weight=4 * p.weight, gram=p.gram * 0.25))
    assert torch.equal(scaled.mask, base.mask)
    assert torch.allclose(scaled.weight, 4 * base.weight, rtol=1e-4, atol=1e-5)


@EVERY
def test_dead_inputs_are_counted_and_reported(solver):
    x = torch.randn(400, 68)
    x[:, [3, 40, 41]] = 0
    p = problem(Unstructured(sparsity=0.5), gram=gram_of(x))
    s = SOLVERS[solver]().solve(p)
    assert s.outcome is Outcome.dead_inputs and int((~s.mask).sum()) == p.pattern.num_zeros(24, 68)
    assert s.weight.isfinite().all()
    if solver != "magnitude":
        assert (s.weight[:, [3, 40, 41]] == 0).all()


@EVERY
def test_fewer_tokens_than_inputs_is_reported(solver):
    p = problem(Unstructured(sparsity=0.5), tokens=20)
    s = SOLVERS[solver]().solve(p)
    assert s.outcome is Outcome.rank_deficient and s.weight.isfinite().all()


@EVERY
def test_bf16_weights_stay_bf16(solver):
    p = problem(NM(n=2, m=4))
    s = SOLVERS[solver]().solve(problem(NM(n=2, m=4), weight=p.weight.bfloat16()))
    assert s.weight.dtype == torch.bfloat16 and torch.equal(s.mask, s.mask & (s.weight != 0) | s.mask)
    assert ((s.weight == 0) | s.mask).all()


@EVERY
def test_nobody_beats_brute_force(solver):
    for seed in range(5):
        p = problem(Unstructured(sparsity=0.5), d_out=3, d_in=8, seed=seed)
        found = relative_error(SOLVERS[solver]().solve(p).weight, p.weight, p.gram)
        best = sum(best_row(row, p.gram.xtx.double(), 4) for row in p.weight.double())
        whole = torch.einsum("oi,ij,oj->", p.weight.double(), p.gram.xtx.double(), p.weight.double())
        if solver == "sparsegpt-paper":
            continue  # its rows need not keep four each
        assert found >= float(best / whole) - 1e-6


def best_row(row: torch.Tensor, g: torch.Tensor, keep: int) -> float:
    """The least loss of a row with `keep` weights, over all supports, each with its exact least squares."""
    losses = []
    for support in combinations(range(len(row)), keep):
        s = list(support)
        refit = torch.zeros_like(row)
        refit[s] = torch.linalg.solve(g[s][:, s], g[s] @ row)
        losses.append(float((row - refit) @ g @ (row - refit)))
    return min(losses)


def test_better_solvers_are_better_on_average():
    def mean(name):
        problems = [problem(Unstructured(sparsity=0.5), seed=seed) for seed in range(8)]
        return sum(relative_error(SOLVERS[name]().solve(p).weight, p.weight, p.gram) for p in problems) / 8

    assert mean("sparsegpt") < mean("wanda") < mean("magnitude")


def test_massive_activations_do_not_drown_the_others():
    """Mean-diagonal damping is set by the largest channels; relative damping is not."""
    x = torch.randn(2000, 64) @ (torch.eye(64) + torch.randn(64, 64) / 8)
    x[:, :2] *= 500
    w = torch.randn(32, 64)
    errors = {}
    for damping in ("relative", "mean"):
        p = LayerProblem("layer", w, gram_of(x), Unstructured(sparsity=0.5))
        solved = SparseGPT(damping=damping).solve(p).weight
        delta = (solved - w)[:, 2:]
        errors[damping] = relative_error(w[:, 2:] + delta, w[:, 2:], gram_of(x[:, 2:]))
    assert errors["relative"] < 0.8 * errors["mean"]


def test_damping_is_raised_and_said_or_refused():
    indefinite = torch.eye(8)
    indefinite[0, 1] = indefinite[1, 0] = 1.02
    factor = inverse_factor(indefinite, 0.001)
    assert factor.raised and factor.damp > 0.02
    gram = Gram(indefinite, 100.0, 100)
    solved = SparseGPT(damp=0.001).solve(LayerProblem("layer", torch.randn(4, 8), gram, Unstructured(sparsity=0.5)))
    assert solved.outcome is Outcome.damping_raised and "damp" in solved.outcome.value
    with pytest.raises(NotPositiveDefinite, match="not finite"):
        inverse_factor(torch.full((4, 4), float("inf")), 0.01)


@pytest.mark.parametrize("damping", ["relative", "mean"])
def test_the_factor_against_float64(damping):
    g = problem(PATTERNS[0]).gram.xtx
    upper = inverse_factor(g, 0.01, damping).upper.double()
    extra = g.diagonal() if damping == "relative" else g.diagonal().mean().expand(len(g))
    inverse = torch.linalg.inv((g + 0.01 * torch.diag(extra)).double())
    assert torch.equal(upper, upper.triu())
    assert torch.allclose(upper.T @ upper, inverse, rtol=1e-3, atol=1e-5 * float(inverse.abs().max()))


GOLDEN = json.loads((Path(__file__).parent / "golden" / "published.json").read_text())


def golden_problem() -> LayerProblem:
    weight, x = torch.tensor(GOLDEN["weight"]), torch.tensor(GOLDEN["x"])
    return LayerProblem("golden", weight, gram_of(x), Unstructured(sparsity=GOLDEN["sparsity"]))


def test_sparsegpt_reproduces_the_published_arithmetic():
    solved = SOLVERS["sparsegpt-paper"](block_size=GOLDEN["block_size"]).solve(golden_problem())
    assert torch.allclose(solved.weight, torch.tensor(GOLDEN["sparsegpt"]), atol=2e-4)
    assert torch.equal(solved.mask, torch.tensor(GOLDEN["sparsegpt"]) != 0)


def test_wanda_reproduces_the_published_arithmetic():
    assert torch.allclose(SOLVERS["wanda"]().solve(golden_problem()).weight, torch.tensor(GOLDEN["wanda"]))
