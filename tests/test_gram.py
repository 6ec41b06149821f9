"""A Gram is the weighted sum of x x^T: in any pieces and any order, and never with padding in it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateurs import layer
from secateurs.layer import Gram, LayerProblem, Outcome, gram_energy, relative_error
from secateurs.patterns import NM, Unstructured


def gram_of(x, weight=None):
    gram = Gram.zeros(x.shape[-1])
    gram.update(x, weight)
    return gram


def dense(x, weight=None):
    x = x.double().reshape(-1, x.shape[-1])
    weight = torch.ones(len(x)) if weight is None else weight.reshape(-1)
    return (x * weight.double()[:, None]).T @ x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("chunk", [7, 8192])
@pytest.mark.parametrize("columns", [5, 1024])
def test_update_is_the_dense_sum(dtype, chunk, columns, monkeypatch):
    monkeypatch.setattr(layer, "TOKENS_AT_ONCE", chunk)
    monkeypatch.setattr(layer, "COLUMNS_AT_ONCE", columns)
    x, weight = torch.randn(3, 11, 17).to(dtype), torch.rand(3, 11)
    for w in (None, weight):
        gram = gram_of(x, w)
        torch.testing.assert_close(gram.xtx.double(), dense(x, w), rtol=1e-5, atol=1e-5)
        assert torch.equal(gram.xtx, gram.xtx.T)
        assert gram.tokens == 33
        assert gram.weight_sum == pytest.approx(33 if w is None else float(w.sum()))


@given(st.integers(0, 30), st.integers(0, 10**6))
def test_split_merge_and_permute_change_nothing(cut, seed):
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(30, 6, generator=generator), torch.rand(30, generator=generator)
    whole = gram_of(x, weight)
    order = torch.randperm(30, generator=generator)
    running = gram_of(x[:cut], weight[:cut])
    running.update(x[cut:], weight[cut:])
    merged = gram_of(x[:cut], weight[:cut]) + gram_of(x[cut:], weight[cut:])
    for other in (running, merged, gram_of(x[order], weight[order]), whole + Gram.zeros(6)):
        torch.testing.assert_close(other.xtx, whole.xtx, rtol=1e-5, atol=1e-5)
        assert (other.tokens, other.weight_sum) == (30, pytest.approx(whole.weight_sum))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("kind", [torch.float32, torch.bool, torch.int64])
def test_padding_never_leaks(poison, kind):
    x, weight = torch.randn(4, 5, 8), torch.ones(4, 5)
    weight[1, 3:] = weight[3, :] = 0
    clean = gram_of(x[weight > 0])
    x[weight == 0] = poison
    padded = gram_of(x, weight.to(kind))
    assert torch.equal(padded.xtx, clean.xtx)
    assert (padded.tokens, padded.weight_sum) == (clean.tokens, clean.weight_sum) == (13, 13.0)


def test_long_sums_stay_accurate():
    x = torch.randn(9 * layer.TOKENS_AT_ONCE + 100, 8).bfloat16()
    assert (gram_of(x).xtx.double() - dense(x)).norm() / dense(x).norm() < 5e-6


def test_weights_of_regions_are_weights_of_tokens():
    prompt, think = torch.randn(9, 5), torch.randn(21, 5)
    mixed = 2.0 * gram_of(prompt) + gram_of(think) * 0.5
    weight = torch.cat([torch.full((9,), 2.0), torch.full((21,), 0.5)])
    once = gram_of(torch.cat([prompt, think]), weight)
    torch.testing.assert_close(mixed.xtx, once.xtx)
    assert (mixed.tokens, mixed.weight_sum) == (once.tokens, pytest.approx(once.weight_sum))
    assert (0 * gram_of(think) + gram_of(prompt)).tokens == 9


def test_update_leaves_its_input_alone_and_needs_no_gradient():
    x = torch.randn(6, 3, requires_grad=True)
    before = x.detach().clone()
    gram = gram_of(x)
    assert torch.equal(x, before) and not gram.xtx.requires_grad


@pytest.mark.parametrize(
    ("call", "lesson"),
    [
        (lambda: gram_of(torch.randn(2, 3), torch.tensor([1.0, -1.0])), "negative"),
        (lambda: gram_of(torch.randn(2, 3), torch.tensor([1.0, float("nan")])), "not finite"),
        (lambda: Gram.zeros(3).update(torch.randn(2, 4)), "3 inputs.* 4"),
        (lambda: Gram.zeros(3) + Gram.zeros(4), "4 inputs .* 3"),
        (lambda: -1.0 * Gram.zeros(3), "0 or more"),
    ],
)
def test_gram_errors_teach(call, lesson):
    with pytest.raises(ValueError, match=lesson):
        call()


@pytest.mark.parametrize("columns", [3, 1024])
def test_relative_error_is_the_lost_output_energy(columns, monkeypatch):
    monkeypatch.setattr(layer, "COLUMNS_AT_ONCE", columns)
    x, w = torch.randn(50, 10), torch.randn(4, 10)
    w_hat = w * (torch.rand(4, 10) > 0.3)
    lost = (x.double() @ (w - w_hat).double().T).square().sum() / (x.double() @ w.double().T).square().sum()
    assert relative_error(w_hat, w, gram_of(x)) == pytest.approx(float(lost), rel=1e-5)
    assert relative_error(torch.zeros_like(w), w, gram_of(x)) == 1.0
    assert relative_error(w, w, gram_of(x)) == 0.0
    assert relative_error(w_hat, w, Gram.zeros(10)) == 0.0
    assert relative_error(w, torch.zeros_like(w), gram_of(x)) == float("inf")


def test_relative_error_of_bfloat16_weights_sees_small_errors():
    w = torch.randn(4, 10, dtype=torch.bfloat16)
    nearly = w.float()
    nearly[0, 0] *= 1 + 1e-6
    assert 0 < relative_error(nearly, w, gram_of(torch.randn(50, 10))) < 1e-11


def test_errors_that_nearly_cancel_keep_their_digits():
    gram = gram_of(torch.randn(50, 300))
    unseen = torch.linalg.eigh(gram.xtx.double()).eigenvectors[:, :250]
    d = ((torch.randn(4, 250, dtype=torch.float64) @ unseen.T) + 1e-3 * torch.randn(4, 300)).float()
    exact = (d.double() @ gram.xtx.double() * d.double()).sum()
    assert gram_energy(d, gram) == pytest.approx(float(exact), rel=1e-7)
    assert float((d @ gram.xtx * d).sum()) != pytest.approx(float(exact), rel=1e-6)


@pytest.mark.parametrize(
    ("change", "lesson"),
    [
        ({"gram": Gram.zeros(4)}, "q_proj: .*8 inputs.* 4"),
        ({"pattern": NM(2, 3)}, "q_proj: 2:3"),
        ({"weight": torch.full((3, 8), float("nan"))}, "q_proj: the weight holds NaN"),
        ({"gram": Gram(torch.full((8, 8), float("inf")))}, "q_proj: the Gram holds NaN"),
        ({"target": torch.full((3, 8), float("inf"))}, "q_proj: the target holds NaN"),
    ],
)
def test_a_bad_problem_is_refused_by_name(change, lesson):
    good = {"name": "q_proj", "weight": torch.zeros(3, 8), "gram": Gram.zeros(8), "pattern": Unstructured(0.5)}
    LayerProblem(**good)
    with pytest.raises(ValueError, match=lesson):
        LayerProblem(**good | change)


def test_every_outcome_explains_itself():
    assert all(outcome.text.endswith(".") for outcome in Outcome)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d_in", [96, 1537])
def test_tokens_of_16_bits_on_a_gpu_are_summed_as_well_as_in_float64(dtype, d_in):
    x = torch.randn(5000, d_in, generator=torch.Generator().manual_seed(0))
    x[:, :3] *= 300  # massive channels
    x = x.to("cuda", dtype)
    gram = Gram.zeros(d_in, "cuda")
    gram.update(x)
    exact = x.double().T @ x.double()
    size = (exact.diagonal()[:, None] * exact.diagonal()).sqrt()
    assert float(((gram.xtx.double() - exact).abs() / size).max()) < 1e-5
    assert torch.equal(gram.xtx, gram.xtx.T) and gram.tokens == 5000
