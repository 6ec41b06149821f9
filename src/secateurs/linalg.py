"""Pure tensor functions behind the solvers: a damped inverse factor, exact least squares on a support, masked CG.

Notation: `gram` G = sum w x x^T is symmetric, positive semi-definite and in any unit; damping is always relative to it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateurs.kernels import solve

Damping = Literal["relative", "mean", "capped"]
T = TypeVar("T")

ROWS_AT_ONCE = 1024  # enough for a fast product; what a step needs beside the matrix is this much of it
PANEL = 256  # columns of a Cholesky factor at a time
TOLERANCE = 1e-6  # of conjugate gradients: what a row's residual falls to
ANEW = 10  # steps of conjugate gradients by rough products, before the residual is exact again
DAMP_STEP = 3.0
MEAN_CAP = 6.0  # real layers seldom reach it, those with massive activations exceed it many times (docs/solvers.md)
DAMP_LIMIT = 1.0


class NotPositiveDefiniteError(ArithmeticError):
    """The Gram could not be factored even with the most damping that still means something."""


@dataclass(frozen=True, eq=False)
class ScaledGram:
    """The damped Gram in other units: G + damping = scale_i * matrix_ij * scale_j, with a mean diagonal of 1. Dead
    inputs are cut off (nothing beside their diagonal). Massive activations cost no digits here."""

    matrix: Float[Tensor, "d_in d_in"]
    scale: Float[Tensor, " d_in"]


@dataclass(frozen=True, eq=False)
class InverseFactor:
    """Upper `factor` U with U^T U = (G + damping)^-1, the `damp` it took, and whether that is more than was asked."""

    factor: Float[Tensor, "d_in d_in"]
    damp: float
    raised: bool


def all_finite(numbers: Float[Tensor, "*shape"]) -> bool:
    """Whether there is no NaN and no infinity, by one pass."""
    return not numbers.numel() or all(bool(end.isfinite()) for end in numbers.aminmax())


def dead_inputs(gram: Float[Tensor, "d_in d_in"]) -> Bool[Tensor, " d_in"]:
    """Inputs that were never active: G_jj <= 1e-12 median(diag G), or zero. What they multiply cannot be judged."""
    energy = gram.diagonal()
    return energy <= 1e-12 * energy.median()


def damping_diagonal(gram: Float[Tensor, "d_in d_in"], damp: float, damping: Damping) -> Float[Tensor, " d_in"]:
    """What to add to diag(G): `damp` times diag(G) ("relative"), its mean over live inputs ("mean"), or that mean but
    at most MEAN_CAP times the geometric mean ("capped").

    Relative damping treats every input alike. The mean, as in the SparseGPT code, is set by a handful of massive
    activations where a model has them, and then drowns the ordinary inputs. Dead inputs get 1, a placeholder.
    """
    energy, dead = gram.diagonal(), dead_inputs(gram)
    if damping == "relative":
        extra = damp * energy
    else:
        live = energy[~dead].double() if bool((~dead).any()) else energy.new_ones(1).double()
        level = float(live.mean())
        if damping == "capped":
            level = min(level, MEAN_CAP * float(live.log().mean().exp()))
        extra = torch.full_like(energy, damp * level)
    return torch.where(dead, torch.ones_like(extra), extra)


def unit_gram(gram: Float[Tensor, "d_in d_in"], damp: float, damping: Damping) -> ScaledGram:
    """G + damping with unit diagonal, in a new matrix."""
    dead = dead_inputs(gram)
    scale = (torch.where(dead, 0, gram.diagonal()) + damping_diagonal(gram, damp, damping)).sqrt()
    cutoff = torch.where(dead, 0, 1 / scale)
    matrix = (gram * cutoff[:, None]).mul_(cutoff)
    matrix.fill_diagonal_(1)
    return ScaledGram(matrix, scale)


def conditional_gram(gram: Float[Tensor, "d_in d_in"], damp: float, damping: Damping, share: float) -> ScaledGram:
    """H = G + damping in the units sqrt(H_jj^(1 - share) / (H^-1)_jj^share), each up to one factor for all.

    H_jj is what input j brings by itself, 1 / (H^-1)_jj what of it no other input explains: what pruning its weight
    costs if nothing else may be mended, and if everything may (Hassibi and Stork 1993). Some is pruned, so the truth
    lies between. Raises NotPositiveDefiniteError. Cost: d_in^3 flops, two d_in x d_in matrices for a while.
    """
    unit = unit_gram(gram, damp, damping)
    precision = cholesky_inverse(cholesky(unit.matrix)).diagonal()
    diagonal = precision**share
    factor = (diagonal.mean() / diagonal).sqrt()
    return ScaledGram(unit.matrix.div_(factor[:, None]).div_(factor), unit.scale * factor)


def raising_damp(factorise: Callable[[float], T], damp: float) -> tuple[T, float]:
    """The first of `factorise(damp)`, `factorise(3 damp)`, ... that works, and the damping it took, at most 1.

    Raises NotPositiveDefiniteError at the end of the ladder, ValueError if `damp` is not above 0.
    """
    if damp <= 0:
        raise ValueError(f"damp is {damp}, but it must be above 0: a Gram of few tokens is singular without it.")
    tried = damp
    while True:
        try:
            return factorise(tried), tried
        except NotPositiveDefiniteError as error:
            if tried * DAMP_STEP > max(DAMP_LIMIT, damp):
                raise NotPositiveDefiniteError(
                    f"the Gram is not positive semi-definite: {error} with damping {damp:g} raised to {tried:g}. "
                    f"Are the activations finite, and was it summed in float32?"
                ) from None
            tried *= DAMP_STEP


def cholesky(matrix: Float[Tensor, "*batch d_in d_in"]) -> Float[Tensor, "*batch d_in d_in"]:
    """Lower Cholesky factors. Raises NotPositiveDefiniteError, saying at which pivot.

    A large one is made by panels on CPU, each from those to its left: LAPACK is as fast, but torch then clears the
    upper half of its column-major result row by row, which takes as long again (d_in = 1536: 17 ms, by panels 9).
    """
    d_in = matrix.shape[-1]
    if matrix.ndim > 2 or matrix.device.type != "cpu" or d_in <= 3 * PANEL:
        lower, info = torch.linalg.cholesky_ex(matrix)
        if pivot := int(info.max()):
            raise NotPositiveDefiniteError(f"Cholesky failed at pivot {pivot} of {d_in}")
        return lower
    lower = matrix.clone()
    for start in range(0, d_in, PANEL):
        end = min(start + PANEL, d_in)
        panel = lower[start:, start:end]
        panel.addmm_(lower[start:, :start], lower[start:end, :start].T, alpha=-1)
        top, info = torch.linalg.cholesky_ex(panel[: end - start])
        if pivot := int(info):
            raise NotPositiveDefiniteError(f"Cholesky failed at pivot {start + pivot} of {d_in}")
        panel[: end - start] = top
        panel[end - start :] = torch.linalg.solve_triangular(top.T, panel[end - start :], upper=True, left=False)
        lower[:start, start:end] = 0
    return lower


def cholesky_inverse(lower: Float[Tensor, "d_in d_in"]) -> Float[Tensor, "d_in d_in"]:
    """(L L^T)^-1. Given as an upper factor, a row-major L is a column-major one to LAPACK: a third less time."""
    return torch.cholesky_inverse(lower.T, upper=True)


def fast_product(a: Float[Tensor, "m k"], b: Float[Tensor, "k n"]) -> Float[Tensor, "m n"]:
    """A @ B on tensor cores where there are any: TF32 on CUDA, bfloat16 with float32 sums on CPUs that multiply it.

    Three digits: for iterations that correct themselves. torch keeps this as a setting of the process; it is put back.
    """
    mkldnn = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    settings = ((torch.backends.cuda.matmul, "tf32"), (mkldnn, "bf16"))
    before = [backend.fp32_precision for backend, _ in settings]
    try:
        for backend, precision in settings:
            backend.fp32_precision = precision
        return a @ b
    finally:
        for (backend, _), precision in zip(settings, before, strict=True):
            backend.fp32_precision = precision


def damped_inverse_factor(
    gram: Float[Tensor, "d_in d_in"], damp: float = 0.01, damping: Damping = "relative"
) -> InverseFactor:
    """U, upper triangular, with U^T U = H^-1, H = G + damping: all that SparseGPT needs (arXiv 2301.00774, sec. 3).

    If the factorisation fails, damping is multiplied by 3, up to 1; the result says so. Differs from the public code,
    which factors H, inverts, and factors again: here H = R R^T with R upper is one Cholesky of the reversed matrix and
    U = R^-1 one triangular solve, so rounding in an inverse is never factored.
    Raises NotPositiveDefiniteError at the end of the ladder. Cost: 4/3 d_in^3 flops, three d_in x d_in matrices.
    """

    def factorise(tried: float) -> tuple[Tensor, Tensor]:
        unit = unit_gram(gram, tried, damping)
        return cholesky(unit.matrix.flip(0, 1)), unit.scale

    (lower, scale), used = raising_damp(factorise, damp)
    identity = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1).div_(scale)
    return InverseFactor(factor, used, used > damp)


def masked_refit(
    target: Float[Tensor, "d_out d_in"], gram: Float[Tensor, "d_in d_in"], mask: Bool[Tensor, "d_out d_in"]
) -> Float[Tensor, "d_out d_in"]:
    """The best weights on a given support, exactly, in float64: z_K = G_KK^+ (G t)_K for each row with support K.

    A singular G_KK gets the solution of least norm. The reference for tests and for matrices of a few hundred rows:
    cost d_out * k^3, one row after the other. Use `masked_cg` for anything larger.
    """
    gram64 = gram.double()
    moments = target.double() @ gram64
    refit = torch.zeros_like(moments)
    for row, kept in enumerate(mask):
        if kept.any():
            refit[row, kept] = torch.linalg.pinv(gram64[kept][:, kept], hermitian=True) @ moments[row, kept]
    return refit


def row_chunks(num_rows: int, at_once: int) -> list[slice]:
    """All rows in as few pieces of at most `at_once` as there can be, about equally large."""
    size = -(-num_rows // -(-num_rows // at_once))
    return [slice(first, first + size) for first in range(0, num_rows, size)]


def refit_on_mask(
    goal: Float[Tensor, "d_out d_in"],
    start: Float[Tensor, "d_out d_in"],
    scaled: ScaledGram,
    mask: Bool[Tensor, "d_out d_in"],
    steps: int,
) -> Float[Tensor, "d_out d_in"]:
    """Weights on `mask` after `steps` of conjugate gradients under the damped Gram, from `start`, in units of `scaled`.

    Computed as the goal plus a correction: where nothing is pruned, not a bit changes. On a CPU by half as many
    preconditioned steps of `kernels.solve.descend`, in half the time: on real layers as near the best.
    Elsewhere, and without that, by `masked_cg`, some rows after the other, which saves memory.
    """
    if solve.fits(start, mask, scaled.matrix):
        return _refit_by_sweeps(goal, start, scaled, mask, -(-steps // 2))
    refitted = torch.empty_like(goal)
    at_once = ROWS_AT_ONCE * 4 if goal.is_cuda else ROWS_AT_ONCE // 2  # seven matrices of these rows
    for rows in row_chunks(len(goal), at_once):
        target = goal[rows] * scaled.scale
        moved = masked_cg(target, start[rows], scaled.matrix, mask[rows], steps).sub_(target).div_(scaled.scale)
        torch.add(goal[rows], moved, out=refitted[rows]).mul_(mask[rows].to(goal.dtype))
    return refitted


def _refit_by_sweeps(goal: Tensor, start: Tensor, scaled: ScaledGram, mask: Tensor, steps: int) -> Tensor:
    """`refit_on_mask` in units that make the diagonal one, inputs with most energy first."""
    energy = scaled.matrix.diagonal()
    root = torch.where(energy > 0, energy.sqrt(), 1)
    scale = scaled.scale * root
    moved = start * mask
    for rows in row_chunks(len(goal), ROWS_AT_ONCE):
        moved[rows].sub_(goal[rows] * scaled.scale)
    order = scale.argsort(descending=True, stable=True)
    solve.descend(scaled.matrix, root, order, mask, moved.mul_(root), steps, TOLERANCE)
    return moved.div_(scale).add_(goal).mul_(mask)


def masked_cg(
    target: Float[Tensor, "d_out d_in"],
    start: Float[Tensor, "d_out d_in"],
    gram: Float[Tensor, "d_in d_in"],
    mask: Bool[Tensor, "d_out d_in"],
    steps: int,
) -> Float[Tensor, "d_out d_in"]:
    """`start` moved towards the best weights on its support by `steps` of conjugate gradients, all rows at once.

    Minimises (t - z) G (t - z)^T over z with support in `mask`, row by row, preconditioned by diag(G). A row stops for
    good when its support is empty, its residual has fallen by TOLERANCE, or G shows no positive curvature along its
    direction (a singular G), so no row ever moves away from the optimum. Cost: one d_out x d_in x d_in product a step.
    On a GPU products are in TF32, and every ten steps start anew from an exact residual, without which a Gram of few
    tokens and little damping would lead them astray (docs/log.md).
    """
    energy = gram.diagonal()
    inverse_energy = torch.where(energy > 0, 1 / energy, 0)
    kept = mask.to(target.dtype)  # a product with it takes a tenth of masked_fill_
    solution = start * kept
    residual = ((target - solution) @ gram).mul_(kept)
    direction = residual * inverse_energy
    rz = torch.linalg.vecdot(residual, direction)[:, None]
    enough = rz * TOLERANCE**2
    image, rough = torch.empty_like(residual), _has_tf32(residual)
    for number in range(steps):
        if rough and number and number % ANEW == 0:
            residual = ((target - solution) @ gram).mul_(kept)
            direction = residual * inverse_energy
            rz = torch.linalg.vecdot(residual, direction)[:, None]
        image = fast_product(direction, gram) if rough else torch.mm(direction, gram, out=image)
        image.mul_(kept)
        curvature = torch.linalg.vecdot(direction, image)[:, None]
        moving = (rz > enough) & (curvature > 0)
        step = torch.where(moving, rz / torch.where(moving, curvature, 1), 0)
        solution.addcmul_(direction, step)
        residual.addcmul_(image, step, value=-1)
        preconditioned = torch.mul(residual, inverse_energy, out=image)
        rz_next = torch.linalg.vecdot(residual, preconditioned)[:, None]
        ratio = torch.where(moving, rz_next / torch.where(moving, rz, 1), 0)
        torch.addcmul(preconditioned, direction, ratio, out=direction)
        rz.copy_(torch.where(moving, rz_next, 0))
    return solution


def _has_tf32(tensor: Tensor) -> bool:
    return tensor.is_cuda
