"""Derives published.json: SparseGPT and Wanda from their papers' formulas, in float64 numpy, without secateurs.

SparseGPT (arXiv:2301.00774, algorithm 1) with the published code's choices: H = 2/N Σ x xᵀ, damping .01 · mean(diag H),
mask over the whole block by w² / U_jj². One deliberate difference: exactly floor(s · size) weights of a block are
pruned, where the published `<=` prunes one more. Wanda (arXiv:2306.11695, eq. 1): |W| ‖X_j‖₂ within each row.
"""

import json
from pathlib import Path

import numpy as np

rng = np.random.default_rng(20240526)
d_out, d_in, tokens, block, sparsity = 6, 16, 64, 8, 0.5
x = (rng.normal(size=(tokens, d_in)) @ (np.eye(d_in) + rng.normal(size=(d_in, d_in)) / 4)).astype(np.float32)
weight = rng.normal(size=(d_out, d_in)).astype(np.float32)

h = 2 / tokens * x.T.astype(np.float64) @ x.astype(np.float64)
h += 0.01 * np.mean(np.diag(h)) * np.eye(d_in)
upper = np.linalg.cholesky(np.linalg.inv(h)).T
w = weight.astype(np.float64)
for start in range(0, d_in, block):
    stop = start + block
    scores = w[:, start:stop] ** 2 / np.diag(upper)[start:stop] ** 2
    pruned = np.zeros(scores.size, bool)
    pruned[np.argsort(scores, axis=None, kind="stable")[: int(scores.size * sparsity)]] = True
    pruned = pruned.reshape(scores.shape)
    for j in range(start, stop):
        kept = np.where(pruned[:, j - start], 0.0, w[:, j])
        error = (w[:, j] - kept) / upper[j, j]
        w[:, j:] -= np.outer(error, upper[j, j:])
        w[:, j] = kept
order = np.argsort(np.abs(weight) * np.linalg.norm(x, axis=0), axis=1, kind="stable")
wanda = weight.copy()
np.put_along_axis(wanda, order[:, : int(d_in * sparsity)], 0.0, axis=1)

out = {"sparsity": sparsity, "block_size": block, "weight": weight.tolist(), "x": x.tolist(),
       "sparsegpt": w.tolist(), "wanda": wanda.tolist()}  # fmt: skip
Path(__file__).with_name("published.json").write_text(json.dumps(out))
