"""The Gram is Σ w x xᵀ whatever the order, the batches or the padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateurs.layer import CHUNK, Gram, LayerProblem, relative_error
from secateurs.patterns import Unstructured


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 50), st.integers(1, 12), st.integers(0, 50), st.integers(0, 99))
def test_any_split_and_order_gives_the_dense_sum(tokens, d_in, cut, seed):
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(tokens, d_in, generator=g), torch.rand(tokens, generator=g)
    expected = (x.double() * w.double()[:, None]).T @ x.double()
    left, right = Gram.zeros(d_in), Gram.zeros(d_in)
    order = torch.randperm(tokens, generator=g)
    left.update(x[order[:cut]], w[order[:cut]])
    right.update(x[order[cut:]], w[order[cut:]])
    total = left + right
    assert torch.allclose(total.xtx.double(), expected, rtol=1e-5, atol=1e-5)
    assert total.tokens == int((w > 0).sum()) and total.weight_sum == pytest.approx(float(w.double().sum()))
    assert torch.allclose((2 * total).xtx, 2 * total.xtx)


def test_padding_is_not_even_looked_at():
    x = torch.randn(2, 5, 4)
    weight = torch.tensor([[1.0, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    padded = x.clone()
    padded[0, 3:] = float("nan")
    a, b = Gram.zeros(4), Gram.zeros(4)
    a.update(padded, weight)
    b.update(torch.cat([x[0, :3], x[1]]))
    assert torch.equal(a.xtx, b.xtx) and a.tokens == b.tokens == 8


def test_many_chunks_in_bf16_against_float64():
    x = torch.randn(9 * CHUNK + 100, 8).bfloat16()
    gram = Gram.zeros(8)
    gram.update(x)
    expected = x.double().T @ x.double()
    assert (gram.xtx.double() - expected).norm() / expected.norm() < 5e-6


def test_relative_error_by_hand():
    gram = Gram(torch.diag(torch.tensor([1.0, 4.0])), 1.0, 1)
    dense, half = torch.tensor([[2.0, 1.0]]), torch.tensor([[2.0, 0.0]])
    assert relative_error(half, dense, gram) == pytest.approx(4 / 8)
    assert relative_error(torch.zeros(1, 2), torch.zeros(1, 2), gram) == 0


def test_shapes_that_do_not_fit_and_negative_weights():
    with pytest.raises(ValueError, match="layer: the Gram is \\(3, 3\\), the weight has 4 inputs"):
        LayerProblem("layer", torch.zeros(2, 4), Gram.zeros(3), Unstructured(sparsity=0.5))
    with pytest.raises(ValueError, match="must not be negative"):
        Gram.zeros(2).update(torch.ones(1, 2), torch.tensor([-1.0]))
