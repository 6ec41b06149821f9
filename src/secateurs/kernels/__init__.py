"""Products of a few vectors with a matrix that is stored packed, on a CPU: the compiled half is packed.c,
and blocks.c for all blocks of a decoder; solve.c is what solvers do between products.

Built when the package is installed, if there is a C compiler. Without one `library()` is None. Beside it lie kernels
for GPUs, in Triton: `has_triton` says whether they can be used.
"""

import ctypes
import warnings
from collections.abc import Mapping
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path

import torch  # its OpenMP must be there before the library looks for one: two would fight for the cores
from jaxtyping import Float32
from torch import Tensor

FORMATS = ("dense_bf16", "packed_bf16", "dense_int8", "packed_int8", "dense_int4", "half_bf16", "half_int8")
EXPANDED = tuple(name for name in FORMATS if name != "dense_bf16")
"""Those that can be made dense here; for bfloat16 torch does as well."""
FIELDS = {"weight": "weights", "values": "weights", "kept": "weights"}  # of tensors, where they are called otherwise
FUNCTIONS = {  # whose arguments are ints, pointers, numbers (int64) and floats
    "multiply": "iipppn",
    "expand": "iipp",
    "blocks": "iipnpnnppnpn",
    "sweep": "iipppppnnn",
    "order": "ippppnn",
    "descend": "iipppppfnnnn",
}


class Matrix(ctypes.Structure):
    """`struct matrix` of packed.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("format", "rows", "columns", "words", "step")] + [
        (name, ctypes.c_void_p) for name in ("weights", "bits", "starts", "scale", "scales", "places")
    ]


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where there are none, with a warning where there is a file that cannot be used."""
    here = Path(__file__).parent
    file = next(
        (here / f"_packed{suffix}" for suffix in EXTENSION_SUFFIXES if (here / f"_packed{suffix}").exists()), None
    )
    if file is None:
        return None
    kinds = {"i": ctypes.c_int, "p": ctypes.c_void_p, "n": ctypes.c_int64, "f": ctypes.c_float}
    try:
        found = ctypes.CDLL(str(file))
        for name, arguments in FUNCTIONS.items():
            function = getattr(found, f"secateurs_{name}")
            function.argtypes, function.restype = [kinds[one] for one in arguments], None
        found.secateurs_level_name.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        warnings.warn(f"the compiled kernels cannot be used ({error}): install secateurs again", stacklevel=2)
        return None
    return found


@cache
def has_triton() -> bool:
    """Whether kernels in Triton run on this machine's GPUs. Warns, with the reason, where they should and do not."""
    if not torch.cuda.is_available() or find_spec("triton") is None:
        return False
    from secateurs.kernels.sweep import sweep

    try:
        one = torch.ones(1, 1, device="cuda")
        sweep(one, one.bool(), one[0], one, one.clone())
    except Exception as error:  # triton, its compiler and the driver each raise their own
        reason = (str(error).splitlines() or [repr(error)])[0]
        warnings.warn(
            f"triton cannot compile kernels here ({reason}), so Grams and SparseGPT take several times as long: "
            "it needs a C compiler on the machine",
            stacklevel=2,
        )
        return False
    return True


@cache
def best_level() -> int:
    """The fastest code this processor can run, as a number. RuntimeError without a library."""
    return loaded().secateurs_level()


def level_name(level: int) -> str:
    """Its name: portable, avx2, avx512, avx512vbmi2 or neon. RuntimeError without a library."""
    return loaded().secateurs_level_name(level).decode()


class Stored:
    """A matrix [rows, d_in] in one of FORMATS as kernels take it, made once: that takes longer than a small product."""

    def __init__(self, name: str, tensors: Mapping[str, Tensor], rows: int, d_in: int) -> None:
        self._tensors = [(FIELDS.get(part, part), tensor) for part, tensor in tensors.items()]
        self._matrix = Matrix(FORMATS.index(name), rows, d_in)
        self._found: list[int] = []

    @property
    def address(self) -> int:
        """Of the struct, whose pointers are right for now: what shares a tensor with another process moves it."""
        found = [tensor.data_ptr() for _, tensor in self._tensors]
        if found != self._found:
            for (field, _), pointer in zip(self._tensors, found, strict=True):
                setattr(self._matrix, field, pointer)
            self._found = found
        return ctypes.addressof(self._matrix)

    def multiply(
        self, x: Float32[Tensor, "batch d_in"], *, level: int | None = None, threads: int | None = None
    ) -> Float32[Tensor, "batch rows"]:
        """x W^T. Each result is the same whatever the batch and the threads; of a packed format, the same bits as of
        the dense one with the same weights. RuntimeError without a library."""
        x = x.contiguous()
        out = x.new_empty(x.shape[0], self._matrix.rows)
        loaded().secateurs_multiply(
            best_level() if level is None else level,
            most_threads() if threads is None else threads,
            self.address,
            x.data_ptr(),
            out.data_ptr(),
            x.shape[0],
        )
        return out

    def expand(self, *, level: int | None = None) -> Float32[Tensor, "rows d_in"]:
        """The weights of a matrix whose format is in EXPANDED. RuntimeError without a library."""
        out = torch.empty(self._matrix.rows, self._matrix.columns, dtype=torch.float32, device="cpu")
        level = best_level() if level is None else level
        loaded().secateurs_expand(level, torch.get_num_threads(), self.address, out.data_ptr())
        return out


def most_threads() -> int:
    """As kernels take it: at most torch's threads, or one where there is little to do."""
    return -torch.get_num_threads()


def loaded() -> ctypes.CDLL:
    """The compiled kernels. RuntimeError where there are none."""
    found = library()
    if found is None:
        raise RuntimeError("secateurs was installed without its compiled kernels: install a C compiler, then it, again")
    return found
