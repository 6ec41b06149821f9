"""Plans: exact to the weight for any sizes, as published where published, and the least loss by the curves."""

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateurs.allocators import ALLOCATORS, ATP, MOST, OWL, Curves, Layer, Uniform, _lower_hull


def layers(*sizes: int, outliers=None, rise=None) -> list[Layer]:
    """A matrix a block, with quadratic curves whose height is `rise`."""
    grid = [step / 20 for step in range(1, 20)]
    return [
        Layer(
            name=f"layer {index}",
            block=index,
            size=size,
            outliers=outliers[index] if outliers else 0.01,
            curve=tuple((s, (rise[index] if rise else 1.0) * s**2) for s in grid),
        )
        for index, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("make", ALLOCATORS.values(), ids=ALLOCATORS)
@given(data=st.data())
def test_the_budget_is_exact(make, data):
    sizes = data.draw(st.lists(st.integers(20, 500), min_size=1, max_size=8))
    shares = st.lists(st.floats(0, 0.2), min_size=len(sizes), max_size=len(sizes))
    known = layers(*sizes, outliers=data.draw(shares), rise=[1 + share for share in data.draw(shares)])
    zeros = int(data.draw(st.floats(0.3, 0.8)) * sum(sizes))
    counts = make().allocate(known, zeros)
    assert sum(counts) == zeros
    assert all(0 <= count <= layer.size for count, layer in zip(counts, known, strict=True))


def test_uniform_is_uniform():
    assert Uniform().allocate(layers(100, 300, 50), 225) == [50, 150, 25]
    assert sorted(Uniform().allocate(layers(10, 10, 10), 16)) == [5, 5, 6]


def test_owl_is_the_published_formula_where_blocks_are_equal():
    outliers = [0.01, 0.05, 0.03]
    counts = OWL(spread=0.1).allocate(layers(1000, 1000, 1000, outliers=outliers), 1800)
    stretched = [(share - 0.01) / 0.04 * 0.2 for share in outliers]
    density = [one - sum(stretched) / 3 + 0.4 for one in stretched]
    assert counts == [round(1000 * (1 - one)) for one in density] == [700, 500, 600]
    assert OWL().allocate(layers(10, 10), 10) == [5, 5]


def test_atp_rises_by_its_step_and_finds_one_by_the_curves():
    assert ATP(step=0.1).allocate(layers(100, 100, 100), 150) == [40, 50, 60]
    assert ATP().allocate(layers(100, 100, 100), 150) == [50, 50, 50]
    early_matters = ATP().allocate(layers(100, 100, 100, rise=[8, 2, 1]), 150)
    assert early_matters[0] < early_matters[1] < early_matters[2]


@given(st.lists(st.floats(0.1, 9), min_size=2, max_size=4), st.integers(4, 30))
def test_curves_lose_least(rise, zeros):
    """Against every plan of whole numbers, for matrices of ten weights with curves that have a point at each count."""
    known = [
        Layer(name=str(i), block=i, size=10, curve=tuple((s / 10, height * s**2) for s in range(10)))
        for i, height in enumerate(rise)
    ]
    zeros = min(zeros, 9 * len(rise))

    def loss(counts) -> float:
        return sum(layer.loss(count / 10) for layer, count in zip(known, counts, strict=True))

    best = min(loss(counts) for counts in product(range(10), repeat=len(rise)) if sum(counts) == zeros)
    assert loss(Curves(within=1.0).allocate(known, zeros)) == pytest.approx(best)


def test_curves_stay_near_the_uniform_plan():
    counts = Curves(within=0.1).allocate(layers(100, 100, 100, rise=[100, 1, 0.01]), 150)
    assert counts == [40, 50, 60]


def test_a_curve_is_read_between_and_beyond_its_points():
    layer = Layer(name="a", block=0, size=10, curve=((0.2, 1.0), (0.4, 2.0), (0.6, 4.0)))
    assert [round(layer.loss(s), 9) for s in (0.1, 0.2, 0.3, 0.5, 0.7)] == [0.5, 1.0, 1.5, 3.0, 5.0]


def test_the_hull_is_convex_rising_and_below_the_points():
    assert _lower_hull([(0, 0.0), (1, 5.0), (2, 4.0), (3, 6.0)]) == [(0, 0.0), (3, 6.0)]
    assert _lower_hull([(0, 1.0), (1, 0.5), (2, 3.0)]) == [(0, 1.0), (1, 1.0), (2, 3.0)]
    assert _lower_hull([(0, 0.0), (1, 1.0), (2, 4.0)]) == [(0, 0.0), (1, 1.0), (2, 4.0)]


def test_a_budget_that_nothing_covers_is_refused():
    with pytest.raises(ValueError, match="the curves do not reach"):
        Curves(within=1.0).allocate(layers(100, 100), 199)
    with pytest.raises(ValueError, match="layer 0: its curve has no point within 0.1 of 0.99"):
        Curves(within=0.1).allocate([replace(layer, curve=layer.curve[:5]) for layer in layers(100, 100)], 199)
    with pytest.raises(ValueError, match=r"within is 0, but it must be in \(0, 1\]"):
        Curves(within=0)
    with pytest.raises(ValueError, match="201 zeros do not fit into 200 weights"):
        Uniform().allocate(layers(100, 100), 201)
    with pytest.raises(ValueError, match=r"spread is 0.6, but it must be in \[0, 0.5\)"):
        OWL(spread=0.6)
    assert max(OWL(spread=0.4).allocate(layers(100, 100, outliers=[0.0, 1.0]), 150)) <= MOST * 100 + 1
