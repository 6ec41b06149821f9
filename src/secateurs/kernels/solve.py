"""What solvers do between matrix products on a CPU, compiled: see solve.c. Each stands beside a torch version.

RuntimeError without a library.
"""

import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from secateurs.kernels import best_level, library, loaded


def fits(*tensors: Tensor) -> bool:
    """Whether the functions below can take these tensors, on the CPU, whole (contiguous) and of their types; and are
    there."""
    here = all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors)
    return here and all(tensor.dtype in (torch.float32, torch.bool) for tensor in tensors) and library() is not None


def sweep(
    w: Float32[Tensor, "width d_out"],
    pruned: Bool[Tensor, "count d_out"],
    strength: Float32[Tensor, " count"],
    u: Float32[Tensor, "count width"],
    errors: Float32[Tensor, "count d_out"],
) -> None:
    """What `kernels.sweep.sweep` does on a GPU, for any number of columns. All but `u` and `strength` are whole."""
    strength, u = strength.contiguous(), u.contiguous()
    loaded().secateurs_sweep(
        best_level(), torch.get_num_threads(), w.data_ptr(), pruned.data_ptr(), strength.data_ptr(), u.data_ptr(),
        errors.data_ptr(), len(pruned), *w.shape,
    )  # fmt: skip


def descend(
    kept: Bool[Tensor, "d_out d_in"],
    image: Float32[Tensor, "d_out d_in"],
    direction: Float32[Tensor, "d_out d_in"],
    solution: Float32[Tensor, "d_out d_in"],
    residual: Float32[Tensor, "d_out d_in"],
    inverse_energy: Float32[Tensor, " d_in"],
    rz: Float32[Tensor, "d_out 1"],
    enough: Float32[Tensor, "d_out 1"],
) -> None:
    """What follows the product of a step of conjugate gradients, in place: see `linalg.masked_cg`. All are whole."""
    loaded().secateurs_descend(
        best_level(), torch.get_num_threads(), kept.data_ptr(), image.data_ptr(), direction.data_ptr(),
        solution.data_ptr(), residual.data_ptr(), inverse_energy.data_ptr(), rz.data_ptr(), enough.data_ptr(),
        *kept.shape,
    )  # fmt: skip
