"""What a layer should reproduce: the dense output where the data say how, its own where they do not."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateurs.goals import Drift, _least_in_box, imitate
from secateurs.layer import Gram

D_OUT, D_IN = 6, 12


def sums(x: torch.Tensor, dense: torch.Tensor, off: torch.Tensor | None = None) -> tuple[Gram, Drift]:
    gram = Gram.zeros(x.shape[1])
    gram.update(x)
    return gram, Drift((dense - x).T @ x, None if off is None else off.T @ x)


def layer(tokens: int, seed: int = 0, noise: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs now, and those of a dense model they are a linear image of, with noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, D_IN, generator=generator)
    change = torch.eye(D_IN) + 0.3 * torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(99))
    return x, x @ change + noise * torch.randn(tokens, D_IN, generator=generator)


def test_with_many_tokens_the_dense_output_is_reproduced():
    weight = torch.randn(D_OUT, D_IN)
    goal = imitate(weight, *sums(*layer(4000)), *sums(*layer(2000, seed=1)))
    x, dense = layer(1000, seed=2)
    own, imitated = ((x @ w.T - dense @ weight.T).square().sum() for w in (weight, goal.target))
    assert imitated < 0.01 * own
    assert goal.alpha > 0.95 and goal.beta == 0


def test_what_the_stream_lacks_is_made_up_for():
    weight, mixing = torch.randn(D_OUT, D_IN), torch.randn(D_IN, D_OUT)
    parts = []
    for seed in (0, 1):
        x, _ = layer(3000, seed)
        parts += sums(x, x, x @ mixing)
    goal = imitate(weight, *parts)
    assert goal.beta > 0.95
    torch.testing.assert_close(goal.target, weight + mixing.T, rtol=0.1, atol=0.2)


def test_noise_of_few_tokens_is_not_imitated():
    """Drift that has nothing to do with the inputs: what fits the calibration tokens makes the held-out ones worse."""
    weight, parts = torch.randn(D_OUT, D_IN), []
    for tokens, seed in ((D_IN, 0), (4000, 1)):
        x = torch.randn(tokens, D_IN, generator=torch.Generator().manual_seed(seed))
        noise = torch.randn(tokens, D_IN, generator=torch.Generator().manual_seed(seed + 10))
        parts += sums(x, x + noise, x @ torch.zeros(D_IN, D_OUT) + torch.randn(tokens, D_OUT))
    goal = imitate(weight, *parts)
    assert goal.alpha < 0.1 and goal.beta < 0.1


def test_no_drift_and_dead_inputs_leave_the_weights_alone():
    weight = torch.randn(D_OUT, D_IN)
    x, _ = layer(500)
    goal = imitate(weight, *sums(x, x), *sums(x, x))
    assert torch.equal(goal.target, weight) and goal.alpha == 0
    x, dense = layer(500)
    x[:, 3] = 0
    target = imitate(weight, *sums(x, dense), *sums(x, dense)).target
    assert torch.equal(target[:, 3], weight[:, 3]) and torch.isfinite(target).all()


def test_drifts_add_up_and_scale_like_tokens():
    x, dense = layer(100)
    off = torch.randn(100, D_OUT)
    whole = sums(x, dense, off)[1]
    two = sums(x[:40], dense[:40], off[:40])[1] + sums(x[40:], dense[40:], off[40:])[1]
    torch.testing.assert_close(two.inputs, whole.inputs)
    torch.testing.assert_close((two * 2.0).stream, 2 * whole.stream)
    assert (whole + sums(x, dense)[1]).stream is None


numbers = st.floats(-3, 3)


@given(numbers, numbers, numbers, numbers, numbers)
def test_shares_are_the_best_in_the_square(a, b, c, v0, v1):
    root = torch.tensor([[a, b], [b, c]], dtype=torch.float64)
    curvature, slope = root @ root.T, torch.tensor([v0, v1], dtype=torch.float64)

    def loss(points: torch.Tensor) -> torch.Tensor:
        return (points @ curvature * points).sum(-1) / 2 - points @ slope

    found = torch.tensor(_least_in_box(curvature.tolist(), slope.tolist()), dtype=torch.float64)
    line = torch.linspace(0, 1, 41, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    assert ((found >= 0) & (found <= 1)).all()
    assert loss(found) <= loss(grid).min() + 1e-9


@pytest.mark.parametrize(("slope", "share"), [(1.0, 0.5), (5.0, 1.0), (-1.0, 0.0)])
def test_one_share_is_clipped(slope, share):
    assert _least_in_box([[2.0]], [slope]) == (share,)
    assert _least_in_box([[0.0]], [slope]) == (0.0,)
