"""Linear algebra against float64."""

from itertools import pairwise

import pytest
import torch

from secateurs import linalg
from secateurs.kernels import best_level, library, solve
from secateurs.linalg import (
    NotPositiveDefiniteError,
    ScaledGram,
    cholesky,
    cholesky_inverse,
    conditional_gram,
    damped_inverse_factor,
    damping_diagonal,
    dead_inputs,
    fast_product,
    masked_cg,
    masked_refit,
    refit_on_mask,
    row_chunks,
    unit_gram,
)


def gram_like(d_in, tokens, spread=1.0):
    x = torch.randn(tokens, d_in) @ torch.randn(d_in, d_in) * torch.exp(spread * torch.randn(d_in))
    return x.T @ x


def row_losses(weight, target, gram):
    delta = target.double() - weight.double()
    return ((delta @ gram.double()) * delta).sum(1)


@pytest.mark.parametrize("damping", ["relative", "mean", "capped"])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_factor_is_the_inverse_of_the_damped_gram(damping, scale):
    gram = gram_like(24, 200) * scale
    result = damped_inverse_factor(gram, 0.01, damping)
    u = result.factor.double()
    diagonal = gram.diagonal().double()
    level = {
        "relative": diagonal,
        "mean": diagonal.mean(),
        "capped": diagonal.mean().clamp_max(6 * diagonal.log().mean().exp()),
    }
    added = 0.01 * level[damping].expand(24)
    inverse = torch.linalg.inv(gram.double() + torch.diag(added))
    unit = (diagonal + added).sqrt()
    torch.testing.assert_close(u.T @ u * unit * unit[:, None], inverse * unit * unit[:, None], rtol=1e-3, atol=1e-3)
    assert torch.equal(u, u.triu())
    assert (result.damp, result.raised) == (0.01, False)


def test_massive_activations_cost_no_digits():
    channels = torch.ones(24)
    channels[[3, 17]] = 1e4
    plain = gram_like(24, 200)
    u = damped_inverse_factor(plain).factor
    massive = damped_inverse_factor(plain * channels * channels[:, None])
    torch.testing.assert_close(massive.factor * channels, u, rtol=1e-3, atol=1e-3 * float(u.abs().max()))
    assert not massive.raised


def test_massive_activations_raise_the_mean_but_not_its_capped_form():
    plain, massive = torch.eye(64), torch.eye(64)
    massive[0, 0] = 1e6
    for damping, factor in (("mean", 1e4), ("capped", 10)):
        before, after = (float(damping_diagonal(gram, 0.02, damping)[1]) for gram in (plain, massive))
        assert before == pytest.approx(0.02) and (after < factor * before) == (damping == "capped")


@pytest.mark.parametrize("share", [0.0, 0.75, 1.0])
def test_conditional_units_are_between_an_inputs_size_and_what_the_others_leave_of_it(share):
    gram = gram_like(24, 200)
    scaled = conditional_gram(gram, 0.02, "mean", share)
    damped = gram.double() + 0.02 * gram.diagonal().double().mean() * torch.eye(24)
    torch.testing.assert_close(
        (scaled.matrix * scaled.scale * scaled.scale[:, None]).double(),
        damped,
        rtol=1e-4,
        atol=1e-4 * float(damped.max()),
    )
    units = damped.diagonal() ** (1 - share) / torch.linalg.inv(damped).diagonal() ** share
    ratio = scaled.scale.double() ** 2 / units
    torch.testing.assert_close(ratio, ratio.mean().expand(24), rtol=1e-3, atol=0)
    assert float(scaled.matrix.diagonal().mean()) == pytest.approx(1, abs=1e-5)


def test_a_factor_by_panels_is_that_of_lapack():
    gram = gram_like(900, 1800)
    gram += gram.diagonal().mean() * torch.eye(900)
    torch.testing.assert_close(cholesky(gram), torch.linalg.cholesky(gram.double()).float(), rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(cholesky_inverse(cholesky(gram)) @ gram, torch.eye(900), rtol=0, atol=1e-4)
    gram[700, 700] = -1
    with pytest.raises(NotPositiveDefiniteError, match="pivot 701 of 900"):
        cholesky(gram)


def test_a_fast_product_is_right_to_three_digits_and_leaves_no_trace():
    a, b = torch.randn(64, 300), torch.randn(300, 50)
    settings = [torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]
    exact = a @ b
    assert float((fast_product(a, b) - exact).norm() / exact.norm()) < 5e-3
    assert settings == [torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]
    assert torch.equal(a @ b, exact)


def test_rows_are_cut_evenly():
    for rows, at_once in ((1, 4), (4, 4), (5, 4), (576, 512), (1536, 1024)):
        chunks = row_chunks(rows, at_once)
        assert torch.cat([torch.arange(rows)[chunk] for chunk in chunks]).tolist() == list(range(rows))
        assert len(chunks) == -(-rows // at_once) and max(len(range(rows)[chunk]) for chunk in chunks) <= at_once


def test_dead_inputs_are_cut_off():
    gram = gram_like(12, 100)
    gram[[2, 7]] = 0
    gram[:, [2, 7]] = 0
    gram[7, 7] = 1e-20
    assert dead_inputs(gram).nonzero().flatten().tolist() == [2, 7]
    assert dead_inputs(torch.zeros(4, 4)).all()
    live = [i for i in range(12) if i not in (2, 7)]
    for damping in ("relative", "mean", "capped"):
        u = damped_inverse_factor(gram, 0.01, damping).factor
        alone = damped_inverse_factor(gram[live][:, live], 0.01, damping).factor
        torch.testing.assert_close(u[live][:, live], alone, rtol=1e-4, atol=1e-6)
        assert u[2, 2] == u[7, 7] == 1 and u[[2, 7]].count_nonzero() == 2 and u[:, [2, 7]].count_nonzero() == 2
    assert torch.equal(damped_inverse_factor(torch.zeros(4, 4)).factor, torch.eye(4))


def test_ladder_raises_damping_and_says_so():
    indefinite = torch.eye(2) + 1.05 * (1 - torch.eye(2))
    result = damped_inverse_factor(indefinite, 0.01)
    assert result.raised and result.damp == pytest.approx(0.09)
    torch.testing.assert_close(
        result.factor.T @ result.factor,
        torch.linalg.inv(indefinite + torch.diag(damping_diagonal(indefinite, 0.09, "relative"))),
    )


def test_ladder_ends_in_an_error_never_in_the_identity():
    with pytest.raises(NotPositiveDefiniteError, match=r"damping 0\.01 raised to 0\.81"):
        damped_inverse_factor(torch.eye(2) + 5 * (1 - torch.eye(2)), 0.01)
    with pytest.raises(ValueError, match="above 0"):
        damped_inverse_factor(torch.eye(2), 0.0)


def test_refit_is_least_squares_on_the_support():
    x, target, mask = torch.randn(60, 9), torch.randn(5, 9), torch.rand(5, 9) > 0.4
    mask[0] = False
    refit = masked_refit(target, x.T @ x, mask)
    for row in range(5):
        columns = x[:, mask[row]].double()
        expected = torch.linalg.lstsq(columns, x.double() @ target[row].double()).solution
        torch.testing.assert_close(refit[row, mask[row]], expected, rtol=1e-4, atol=1e-5)
    assert (refit[~mask] == 0).all()


def refit(target, start, gram, mask, steps) -> torch.Tensor:
    return refit_on_mask(target, start, ScaledGram(gram, torch.ones(len(gram))), mask, steps)


@pytest.fixture(params=["compiled", "torch"])
def way(request, monkeypatch) -> None:
    """Both ways of conjugate gradients."""
    if request.param == "torch":
        monkeypatch.setattr(solve, "fits", lambda *tensors: False)
    elif library() is None:
        pytest.skip("installed without a C compiler")


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("tokens", [200, 10])
def test_cg_only_descends_and_reaches_the_refit(tokens):
    gram, target, mask = gram_like(16, tokens, spread=0.3), torch.randn(6, 16), torch.rand(6, 16) > 0.5
    start = target * mask
    best = row_losses(masked_refit(target, gram, mask), target, gram)
    losses = [row_losses(refit(target, start, gram, mask, steps), target, gram) for steps in (0, 1, 2, 4, 60)]
    slack = 1e-5 * losses[0]
    for before, after in pairwise(losses):
        assert (after <= before + slack).all()
    assert (losses[-1] <= best + 1e-3 * (losses[0] - best) + slack).all()


@pytest.mark.usefixtures("way")
def test_cg_freezes_rows_with_nothing_to_do():
    gram, target = gram_like(8, 100), torch.randn(4, 8)
    mask = torch.rand(4, 8) > 0.5
    mask[0], mask[1] = False, True  # empty support; already exact
    start = target * mask
    solution = refit(target, start, gram, mask, 50)
    assert torch.isfinite(solution).all()
    assert torch.equal(solution[:2], start[:2])
    assert (solution[~mask] == 0).all()
    assert torch.equal(start, target * mask)


@pytest.mark.usefixtures("way")
def test_cg_stops_at_negative_curvature_and_skips_dead_inputs():
    gram = torch.diag(torch.tensor([1.0, 1.0, 0.0]))
    gram[0, 1] = gram[1, 0] = -3.0
    start = torch.tensor([[0.0, 0.0, 7.0]])
    solution = refit(torch.ones(1, 3), start, gram, torch.ones(1, 3, dtype=torch.bool), 10)
    assert solution.tolist() == start.tolist()


@pytest.mark.skipif(library() is None, reason="installed without a C compiler")
@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (50, 8), (25, 83), (13, 130)], ids=str)
def test_sweeps_end_where_least_squares_do_and_each_row_as_if_it_were_alone(shape, level, monkeypatch):
    monkeypatch.setattr(solve, "best_level", lambda: min(level, best_level()))
    d_out, d_in = shape
    gram, target, mask = gram_like(d_in, 3 * d_in, spread=0.3), torch.randn(shape), torch.rand(shape) > 0.5
    best = masked_refit(target, gram, mask)
    found = refit(target, target * mask, gram, mask, 200)
    assert (row_losses(found, target, gram) <= row_losses(best, target, gram) * (1 + 1e-4) + 1e-4).all()
    assert (found[~mask] == 0).all()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 3)
        few = refit(target, target * mask, gram, mask, 6)
    assert torch.equal(refit(target.T.contiguous().T, target * mask, gram, mask, 6), few)  # as gpt-oss stores experts
    for row in {0, d_out // 2, d_out - 1}:
        alone = refit(*(t[row : row + 1] for t in (target, target * mask)), gram, mask[row : row + 1], 6)
        assert torch.equal(alone[0], few[row])


@pytest.mark.skipif(library() is None, reason="installed without a C compiler")
def test_half_as_many_sweeps_get_at_least_as_far(monkeypatch):
    gram, target, mask = gram_like(96, 400, spread=0.3), torch.randn(40, 96), torch.rand(40, 96) > 0.5
    swept = refit(target, target * mask, gram, mask, 10)
    monkeypatch.setattr(solve, "fits", lambda *tensors: False)
    plain = refit(target, target * mask, gram, mask, 10)
    best, one, other = (row_losses(w, target, gram).sum() for w in (masked_refit(target, gram, mask), swept, plain))
    assert best <= one <= other < 1.1 * best


def test_conjugate_gradients_by_rough_products_end_where_exact_ones_do(monkeypatch):
    """Few tokens that share a mean and hardly any damping: without a fresh residual rows go astray."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 256, generator=generator) + torch.randn(256, generator=generator)
    gram = unit_gram(x.T @ x, 1e-4, "relative").matrix
    target = torch.randn(32, 256, generator=generator)
    mask = torch.rand(32, 256, generator=generator) < 0.5

    def errors(solution: torch.Tensor) -> torch.Tensor:
        delta = (target - solution).double()
        return ((delta @ gram.double()) * delta).sum(1)

    def tf32(tensor: torch.Tensor) -> torch.Tensor:
        return ((tensor.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    before, exact = errors(target * mask), errors(masked_cg(target, target, gram, mask, 100))
    monkeypatch.setattr(linalg, "_has_tf32", lambda tensor: True)
    monkeypatch.setattr(linalg, "fast_product", lambda a, b: tf32(a) @ tf32(b))
    rough = errors(masked_cg(target, target, gram, mask, 100))
    assert bool((rough < before).all())
    assert float(rough.sum()) < 1.2 * float(exact.sum())
    monkeypatch.setattr(linalg, "ANEW", 1000)
    assert float(errors(masked_cg(target, target, gram, mask, 100)).sum()) > 1.5 * float(exact.sum())
