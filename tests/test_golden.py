"""Parity with the published SparseGPT, Wanda and ALPS: their arithmetic re-derived in float64 numpy, numbers committed.

`python tests/test_golden.py` writes golden/published.json anew. The derivation follows the papers' formulas and
the conventions of the authors' code, restated; it shares no line with secateurs. Known, deliberate differences:

- Unstructured SparseGPT there prunes every score <= the one of rank int(size * sparsity) in a block, which is that many
  weights plus one. The derivation keeps that rule and asks for (k - 1/2) / size, so that it prunes the k we ask for.
- There a block's quota is over all rows: our scope "layer". `prunen` there counts pruned weights, our n kept ones.
- Both multiply or divide the Gram by the number of samples: a factor that cancels. Ours is the raw sum.
- Columns of dead inputs are set to zero there, and count as 1 in the mean of the damping; here there are none.
- ALPS there keeps round((1 - sparsity) * size) weights, and stops its conjugate gradients for all rows together, here
  for each row; in ten steps neither stops.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from secateurs.layer import Gram, LayerProblem, Outcome
from secateurs.patterns import NM, Unstructured
from secateurs.solvers import SOLVERS

GOLDEN = Path(__file__).parent / "golden" / "published.json"
BLOCK = 8


def published_sparsegpt(weight, x, sparsity=0.0, pruned_of=(0, 0), percdamp=0.01):
    """arXiv 2301.00774, algorithm 1: damped Hessian, inverse, upper Cholesky factor, blocks of columns."""
    w, (tokens, d_in) = weight.astype(np.float64), x.shape
    hessian = 2 / tokens * (x.T.astype(np.float64) @ x)
    hessian += percdamp * np.trace(hessian) / d_in * np.eye(d_in)
    u = np.linalg.cholesky(np.linalg.inv(hessian)).T
    pruned = np.zeros(w.shape, dtype=bool)
    for left in range(0, d_in, BLOCK):
        right = left + BLOCK
        if not pruned_of[0]:
            saliency = (w[:, left:right] / np.diag(u)[left:right]) ** 2
            rank = int(saliency.size * sparsity)
            pruned[:, left:right] = saliency <= np.sort(saliency, axis=None)[rank]
        for column in range(left, right):
            if pruned_of[0] and column % pruned_of[1] == 0:
                group = slice(column, column + pruned_of[1])
                order = np.argsort((w[:, group] / np.diag(u)[group]) ** 2, axis=1)
                np.put_along_axis(pruned[:, group], order[:, : pruned_of[0]], True, axis=1)
            residual = np.where(pruned[:, column], w[:, column], 0) / u[column, column]
            w[:, column:] -= residual[:, None] * u[column, column:]
    return np.where(pruned, 0, w)


def published_wanda(weight, x, sparsity=0.0, pruned_of=(0, 0)):
    """arXiv 2306.11695, eq. 1: |W| times the norm of the input, compared within a row, or within a group of a row."""
    saliency = np.abs(weight.astype(np.float64)) * np.sqrt((x.astype(np.float64) ** 2).mean(axis=0))
    size = pruned_of[1] or weight.shape[1]
    count = pruned_of[0] or int(weight.shape[1] * sparsity)
    order = np.argsort(saliency.reshape(-1, size), axis=1, kind="stable")
    pruned = np.zeros((weight.size // size, size), dtype=bool)
    np.put_along_axis(pruned, order[:, :count], True, axis=1)
    return np.where(pruned.reshape(weight.shape), 0, weight)


def published_alps(weight, x, sparsity=0.0, pruned_of=(0, 0), rho=0.1):
    """arXiv 2406.07831, algorithm 1 with the authors' schedule of rho, then ten conjugate gradient steps (sec. 3.3)."""
    gram = x.T.astype(np.float64) @ x
    gram += 0.01 * np.diag(gram).mean() * np.eye(len(gram))
    scale = np.sqrt(np.diag(gram)) + 1e-8
    gram /= np.outer(scale, scale)
    dense = weight * scale
    values, vectors = np.linalg.eigh(gram)
    count = pruned_of[0] or dense.size - round((1 - sparsity) * dense.size)

    def largest(w):
        order = np.argsort((w**2).reshape(-1, pruned_of[1] or w.size), axis=1, kind="stable")
        support = np.ones(order.shape)
        np.put_along_axis(support, order[:, :count], 0, axis=1)
        return support.reshape(w.shape)

    before = first = largest(dense)
    kept, moved = before.sum(), False
    sparse, dual = dense * first, np.zeros_like(dense)
    for step in range(1, 301):
        w = (dense @ gram - dual + rho * sparse) @ (vectors / (values + rho) @ vectors.T)
        support = largest(w + dual / rho)
        sparse = (w + dual / rho) * support
        dual = dual + rho * (w - sparse)
        if step % 3 == 0:
            change, before = np.abs(support - before).sum() / kept, support
            if change == 0 and moved:
                break
            if change > 0.005:
                rho, moved = rho * (1.3 if change > 0.1 else 1.2), True
            elif moved:
                rho *= 1.1
            else:
                rho /= 5
                if change:
                    sparse, dual = dense * first, np.zeros_like(dense)
            if step > 30 and change < 3e-4:
                break
    support = largest(w)
    solution = w * support
    residual = (dense - solution) @ gram * support
    direction = residual
    for _ in range(10):
        length = (residual**2).sum(1, keepdims=True) / (direction * (direction @ gram)).sum(1, keepdims=True)
        solution = solution + length * direction
        following = residual - length * (direction @ gram) * support
        direction = following + (following**2).sum(1, keepdims=True) / (residual**2).sum(1, keepdims=True) * direction
        residual = following
    return solution / scale


def derive() -> dict:
    rng = np.random.default_rng(20230102)
    weight = rng.normal(size=(6, 24)).round(3)
    x = (rng.normal(size=(96, 24)) @ (np.eye(24) + rng.normal(size=(24, 24)) / 5)).round(3)
    k = 6 * BLOCK // 2
    cases = {
        "sparsegpt 50%": published_sparsegpt(weight, x, sparsity=(k - 0.5) / (6 * BLOCK)),
        "sparsegpt 2:4": published_sparsegpt(weight, x, pruned_of=(2, 4)),
        "sparsegpt 1:4": published_sparsegpt(weight, x, pruned_of=(3, 4)),
        "wanda 50%": published_wanda(weight, x, sparsity=0.5),
        "wanda 1:4": published_wanda(weight, x, pruned_of=(3, 4)),
        "alps 50%": published_alps(weight, x, sparsity=0.5),
        "alps 75%": published_alps(weight, x, sparsity=0.75),
        "alps 2:4": published_alps(weight, x, pruned_of=(2, 4)),
    }
    return {
        "provenance": "tests/test_golden.py, float64, default_rng(20230102), re-derived from the formulas, no code "
        "copied. SparseGPT: arXiv 2301.00774, alg. 1, conventions of IST-DASLab/sparsegpt 147d215, blocks of 8, damp "
        ".01 of mean. Wanda: arXiv 2306.11695, eq. 1, locuslab/wanda 8e8fc87. ALPS: arXiv 2406.07831, alg. 1 and "
        "sec. 3.3, schedule of mazumder-lab/ALPS 8af9e6b.",
        "weight": weight.tolist(),
        "x": x.tolist(),
        "cases": {name: solution.round(6).tolist() for name, solution in cases.items()},
    }


@pytest.fixture(scope="module")
def golden() -> dict:
    return json.loads(GOLDEN.read_text())


OURS = {
    "sparsegpt 50%": ("sparsegpt-reference", {"block_size": BLOCK}, Unstructured(0.5, "layer")),
    "sparsegpt 2:4": ("sparsegpt-reference", {"block_size": BLOCK}, NM(2, 4)),
    "sparsegpt 1:4": ("sparsegpt-reference", {"block_size": BLOCK}, NM(1, 4)),
    "wanda 50%": ("wanda", {}, Unstructured(0.5)),
    "wanda 1:4": ("wanda", {}, NM(1, 4)),
    "alps 50%": ("alps", {}, Unstructured(0.5, "layer")),
    "alps 75%": ("alps", {}, Unstructured(0.75, "layer")),
    "alps 2:4": ("alps", {}, NM(2, 4)),
}


@pytest.mark.parametrize("case", OURS)
def test_ours_is_the_published_arithmetic(case, golden):
    name, options, pattern = OURS[case]
    gram = Gram.zeros(24)
    gram.update(torch.tensor(golden["x"]))
    problem = LayerProblem(name=case, weight=torch.tensor(golden["weight"]), gram=gram, pattern=pattern)
    solution = SOLVERS[name](**options).solve(problem)
    expected = torch.tensor(golden["cases"][case])
    assert solution.outcome is Outcome.OK
    assert torch.equal(solution.mask, expected != 0)
    torch.testing.assert_close(solution.weight, expected, rtol=1e-4, atol=1e-5)


def test_the_committed_numbers_are_the_derived_ones(golden):
    derived = derive()
    assert golden["cases"].keys() == derived["cases"].keys() == OURS.keys()
    assert golden["weight"] == derived["weight"] and golden["x"] == derived["x"]
    for case, solution in derived["cases"].items():
        np.testing.assert_allclose(golden["cases"][case], solution, atol=1e-6)


def test_the_published_threshold_prunes_one_more_in_every_block(golden):
    """The difference the docstring names, so that nobody has to take it on trust."""
    weight, x = np.array(golden["weight"]), np.array(golden["x"])
    assert (published_sparsegpt(weight, x, sparsity=0.5) == 0).sum() == weight.size // 2 + weight.shape[1] // BLOCK


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(derive()) + "\n")
