"""What solvers do between matrix products on a CPU, compiled: see solve.c. Each stands beside a torch version.

RuntimeError without a library.
"""

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from secateurs.kernels import best_level, library, loaded

PANEL = 8  # as in solve.c
ROWS = 48  # it takes at a time, at most


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
    gram: Float32[Tensor, "d_in d_in"],
    root: Float32[Tensor, " d_in"],
    order: Int64[Tensor, " d_in"],
    kept: Bool[Tensor, "d_out d_in"],
    moved: Float32[Tensor, "d_out d_in"],
    steps: int,
    tolerance: float,
) -> None:
    """Rows of `moved`, where kept, moved in place towards the least m G m^T, by conjugate gradients.

    `moved` is in units where the diagonal is one, or zero for dead inputs: the Gram's over `root` twice. `order` says
    which input comes when in the symmetric Gauss-Seidel sweep that preconditions every step: (1 + L) (1 + L)^T, L what
    the ordered Gram of a row's kept inputs has below its diagonal. In coordinates where that is the identity a step is
    two triangular solves and no product (Eisenstat, "Efficient implementation of a class of preconditioned conjugate
    gradient methods", 1981): as many operations as a step without, and 48 rows stay in a core's own cache throughout. A
    row stops as in `linalg.masked_cg`; its bits depend on nothing but itself. `kept` and `moved` are whole. Memory: one
    d_in x d_in matrix, 288 d_in numbers a thread.
    """
    inputs, count = len(order), -(-len(order) // PANEL)
    threads, inverse = torch.get_num_threads(), 1 / root
    panels = gram.new_empty(count, count * PANEL, PANEL)
    room = gram.new_empty(min(threads, -(-len(moved) // ROWS)), 6, ROWS, count * PANEL)
    loaded().secateurs_order(
        threads, gram.data_ptr(), order.data_ptr(), inverse.data_ptr(), panels.data_ptr(), inputs, count
    )
    loaded().secateurs_descend(
        best_level(), len(room), panels.data_ptr(), order.data_ptr(), kept.data_ptr(), moved.data_ptr(),
        room.data_ptr(), tolerance, steps, len(moved), inputs, count,
    )  # fmt: skip
