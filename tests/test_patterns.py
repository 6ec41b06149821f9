"""A pattern gives exactly the zeros that were asked for, whole or in blocks, with ties decided by position."""

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateurs.patterns import NM, PATTERNS, Pattern, Unstructured, _sampled_kth, _sampled_kth_numpy, stack

SCOPES = st.sampled_from(["row", "layer"])
SPARSITIES = st.integers(0, 99).map(lambda percent: percent / 100) | st.floats(0, 0.999)


HEIGHTS, WIDTHS = st.integers(1, 9), st.integers(1, 40)


@st.composite
def scores(draw, d_in=WIDTHS):
    """Score matrices, half of them full of ties."""
    rows, columns, seed = draw(HEIGHTS), draw(d_in), draw(st.integers(0, 10**6))
    values = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    return (3 * values).round() if draw(st.booleans()) else values


@st.composite
def groups(draw):
    """A pattern n:m and scores for a whole number of its groups."""
    m = draw(st.integers(1, 8))
    n = draw(st.integers(1, m))
    return NM(n, m), draw(scores(d_in=st.integers(1, 6).map(lambda count: count * m)))


@given(SPARSITIES, SCOPES, scores())
def test_unstructured_count_is_exact(sparsity, scope, s):
    pattern = Unstructured(sparsity, scope)
    mask = pattern.mask(s)
    assert int((~mask).sum()) == pattern.num_zeros(*s.shape)
    if scope == "row":
        assert (~mask).sum(1).unique().numel() == 1


@pytest.mark.parametrize(("sparsity", "d_in", "zeros"), [(0.29, 100, 29), (0.57, 100, 57), (0.5, 3, 1), (0.7, 10, 7)])
def test_sparsity_is_the_decimal_that_was_written(sparsity, d_in, zeros):
    assert Unstructured(sparsity).num_zeros(1, d_in) == zeros
    assert Unstructured(sparsity, "layer").num_zeros(1, d_in) == zeros


@given(SPARSITIES, SCOPES, scores())
def test_unstructured_prunes_the_lowest_and_the_first_among_equals(sparsity, scope, s):
    mask = Unstructured(sparsity, scope).mask(s)
    pools = s if scope == "row" else s.reshape(1, -1)
    for pool, kept in zip(pools, mask.view(pools.shape), strict=True):
        order = pool.argsort(stable=True)
        count = int((~kept).sum())
        assert not kept[order[:count]].any()
        assert kept[order[count:]].all()


@given(SPARSITIES, SCOPES, scores(), st.lists(st.integers(0, 40), max_size=6))
def test_blocks_sum_to_the_budget(sparsity, scope, s, cuts):
    pattern, (d_out, d_in) = Unstructured(sparsity, scope), s.shape
    edges = sorted({0, d_in, *(cut for cut in cuts if cut < d_in)})
    blocks = [pattern.block_mask(s[:, a:b], a) for a, b in pairwise(edges)]
    zeros = (~torch.cat(blocks, dim=1)).sum(1)
    assert int(zeros.sum()) == pattern.num_zeros(d_out, d_in)
    if scope == "row":
        assert (zeros == pattern.num_zeros(1, d_in)).all()


@given(groups())
def test_nm_keeps_the_n_highest_of_every_m(pattern_and_scores):
    pattern, s = pattern_and_scores
    mask = pattern.mask(s)
    assert (mask.view(-1, pattern.m).sum(1) == pattern.n).all()
    assert int((~mask).sum()) == pattern.num_zeros(*s.shape)
    for group, kept in zip(s.view(-1, pattern.m), mask.view(-1, pattern.m), strict=True):
        assert kept[group.argsort(stable=True)[pattern.m - pattern.n :]].all()


@given(groups())
def test_nm_blocks_are_the_whole(pattern_and_scores):
    pattern, s = pattern_and_scores
    pieces = [pattern.block_mask(s[:, i : i + pattern.m], i) for i in range(0, s.shape[1], pattern.m)]
    assert torch.equal(torch.cat(pieces, dim=1), pattern.mask(s))


@given(scores(), st.sampled_from([Unstructured(0.5), Unstructured(0.3, "layer"), Unstructured(0.0), NM(1, 1)]))
def test_masking_twice_is_masking_once(s, pattern):
    mask = pattern.mask(s + 1)
    assert torch.equal(pattern.mask((s + 1) * mask), mask)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.5, "layer"), NM(2, 4)])
def test_infinite_scores_are_ordered_and_nan_is_refused(pattern):
    s = torch.tensor([[1.0, float("inf"), -float("inf"), 2.0]])
    assert pattern.mask(s).tolist() == [[False, True, False, True]]
    s[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        pattern.mask(s)


@pytest.mark.parametrize(
    ("make", "lesson"),
    [
        (lambda: Unstructured(1.0), r"\[0, 1\)"),
        (lambda: Unstructured(-0.1), r"\[0, 1\)"),
        (lambda: Unstructured(float("nan")), r"\[0, 1\)"),
        (lambda: NM(5, 4), r"1\.\.m"),
        (lambda: NM(0, 4), r"1\.\.m"),
        (lambda: NM(2, 4).check(3, 10), "that 4 divides"),
        (lambda: NM(2, 4).block_mask(torch.rand(1, 4), 2), "cut a group"),
        (lambda: Unstructured(0.5).check(0, 4), "empty"),
    ],
)
def test_errors_teach(make, lesson):
    with pytest.raises(ValueError, match=lesson):
        make()


def test_labels_and_table():
    assert [str(p) for p in (Unstructured(0.5), Unstructured(0.625, "layer"), NM(2, 4))] == [
        "50%",
        "62.5% per layer",
        "2:4",
    ]
    assert isinstance(PATTERNS["unstructured"](sparsity=0.5), Pattern)
    assert isinstance(PATTERNS["nm"](n=2, m=4), Pattern)


@pytest.mark.parametrize(
    "make",
    [
        lambda size: torch.randn(size),
        lambda size: torch.randint(0, 3, (size,)).float(),
        lambda size: torch.zeros(size),
        lambda size: torch.arange(size).float() % 109,  # in step with the sample: its bracket is far off
        lambda size: torch.cat([torch.full((size - 2,), torch.inf), torch.tensor([-torch.inf, 0.0])]),
    ],
    ids=["normal", "three values", "all equal", "periodic", "infinite"],
)
def test_selection_from_a_sample_is_exact(make):
    scores = make(900_000)
    ordered = scores.sort().values
    for k in (1, 2, 450_000, 629_999, 900_000):
        assert _sampled_kth(scores, k) == _sampled_kth_numpy(scores, k) == ordered[k - 1]
    mask = Unstructured(0.7, "layer").mask(scores.view(900, 1000))
    assert int((~mask).sum()) == 630_000
    assert scores[mask.flatten()].min() >= scores[~mask.flatten()].max()


@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_a_fraction_is_an_exact_count(d_out, d_in, data):
    zeros = data.draw(st.integers(0, d_out * d_in - 1))
    pattern = Unstructured(Fraction(zeros, d_out * d_in), "layer")
    assert pattern.num_zeros(d_out, d_in) == zeros == int((~pattern.mask(torch.rand(d_out, d_in))).sum())


@given(scores(), st.data())
def test_a_stack_has_the_masks_of_its_parts(scores, data):
    cut = data.draw(st.integers(1, max(1, len(scores) - 1)))
    rows = (cut, len(scores) - cut)
    if not rows[1]:
        return
    parts = [Unstructured(0.5, "layer"), Unstructured(0.3, data.draw(SCOPES))]
    pattern = stack(parts, rows)
    masks = [part.mask(some) for part, some in zip(parts, scores.split(rows), strict=True)]
    assert torch.equal(pattern.mask(scores), torch.cat(masks))
    assert pattern.num_zeros(*scores.shape) == int((~pattern.mask(scores)).sum())
    assert pattern.shared_rows(len(scores)) == [slice(0, cut)] + [slice(cut, len(scores))] * (parts[1].scope == "layer")


def test_what_goes_together_in_a_stack():
    assert stack([NM(2, 4), NM(2, 4)], (3, 5)) == NM(2, 4)
    assert stack([Unstructured(0.5)] * 2, (3, 5)) == Unstructured(0.5)
    assert stack([NM(2, 4), NM(1, 4)], (3, 5)) is None
    assert stack([NM(2, 4), Unstructured(0.5)], (3, 5)) is None
    with pytest.raises(ValueError, match="9 rows cannot be a stack"):
        stack([Unstructured(0.5, "layer")] * 2, (3, 5)).check(9, 4)
