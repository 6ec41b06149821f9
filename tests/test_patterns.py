"""Exact counts under any scores, ties included; blocks add up; N:M keeps n of m."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateurs.patterns import NM, Unstructured

sparsities = st.floats(0, 0.999)
shapes = st.tuples(st.integers(1, 9), st.integers(1, 40))


def scores_of(shape, levels, seed):
    """Random scores with many ties."""
    return torch.randint(0, levels, shape, generator=torch.Generator().manual_seed(seed)).float()


@settings(max_examples=60, deadline=None)
@given(shapes, sparsities, st.sampled_from(["row", "layer"]), st.integers(1, 6), st.integers(0, 99), st.integers(1, 40))
def test_unstructured_is_exact_in_one_piece_and_in_blocks(shape, sparsity, scope, levels, seed, width):
    pattern, scores = Unstructured(sparsity=sparsity, scope=scope), scores_of(shape, levels, seed)
    d_out, d_in = shape
    whole = pattern.block_mask(scores, 0, d_in)
    assert int((~whole).sum()) == pattern.num_zeros(d_out, d_in)
    kept_least, dropped_most = scores[whole], scores[~whole]
    if scope == "layer" and len(kept_least) and len(dropped_most):
        assert kept_least.min() >= dropped_most.max()
    blocks = [pattern.block_mask(scores[:, i : i + width], i, d_in) for i in range(0, d_in, width)]
    assert int((~torch.cat(blocks, 1)).sum()) == pattern.num_zeros(d_out, d_in)
    again = pattern.block_mask(whole.float(), 0, d_in)
    assert torch.equal(again, whole), "a mask's own scores give the mask back"


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 8), st.integers(1, 4), st.integers(0, 99))
def test_nm_keeps_n_of_every_m(d_out, groups, m, levels, seed):
    for n in range(1, m + 1):
        pattern, scores = NM(n=n, m=m), scores_of((d_out, groups * m), levels, seed)
        mask = pattern.block_mask(scores, 0, groups * m)
        assert (mask.reshape(-1, m).sum(1) == n).all()
        assert int((~mask).sum()) == pattern.num_zeros(d_out, groups * m)


def test_of_equal_scores_the_last_go_first():
    assert Unstructured(sparsity=0.5).block_mask(torch.zeros(1, 4), 0, 4).tolist() == [[True, True, False, False]]


def test_bad_patterns_teach():
    with pytest.raises(ValueError, match="sparsity must be at least 0 and below 1, found 1.5"):
        Unstructured(sparsity=1.5)
    with pytest.raises(ValueError, match="keeps n of m with 1 <= n <= m, found 3:2"):
        NM(n=3, m=2)
    with pytest.raises(ValueError, match="10 inputs do not divide into groups of 4"):
        NM(n=2, m=4).check(3, 10)
    with pytest.raises(ValueError, match="NaN"):
        Unstructured(sparsity=0.5).block_mask(torch.full((1, 4), float("nan")), 0, 4)
    assert str(Unstructured(sparsity=0.5)) == "50%" and str(NM(n=2, m=4)) == "2:4"
