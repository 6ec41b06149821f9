"""Products of a few vectors with a matrix that is stored packed, on a CPU: the compiled half is packed.c.

Built when the package is installed, if there is a C compiler. Without one `library()` is None. Beside it lie kernels
for GPUs, in Triton: `has_triton` says whether they can be used.
"""

import ctypes
import warnings
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path

import torch  # its OpenMP must be there before the library looks for one: two would fight for the cores
from jaxtyping import Float32
from torch import Tensor

ALONE_BELOW = 1 << 17  # products: a second thread takes longer to wake than these take
ARGUMENTS = {  # after level and threads: pointers to the weights, then x, y, batch, rows, d_in
    "dense_bf16": 1,
    "packed_bf16": 3,
    "dense_int8": 2,
    "packed_int8": 4,
    "dense_int4": 2,
    "half_bf16": 2,
    "half_int8": 3,
}
STEPS = {"normed": "ippfpnn", "turned": "ippppfppnnnnn", "attended": "iipnpnnnpnnnppnfpnnnnn", "gated": "ippnn"}
"""Arguments of the functions of steps.c: ints, pointers, numbers (int64) and floats."""
EXPANDED = {name: weights for name, weights in ARGUMENTS.items() if name not in ("dense_bf16", "dense_int8")}
"""The same, of a matrix that is made dense."""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where there are none."""
    here = Path(__file__).parent
    file = next(
        (here / f"_packed{suffix}" for suffix in EXTENSION_SUFFIXES if (here / f"_packed{suffix}").exists()), None
    )
    if file is None:
        return None
    found = ctypes.CDLL(str(file))
    for name, weights in ARGUMENTS.items():
        function = getattr(found, f"secateurs_{name}")
        function.argtypes = [ctypes.c_int] * 2 + [ctypes.c_void_p] * (weights + 2) + [ctypes.c_int64] * 3
        function.restype = None
    for name, weights in EXPANDED.items():
        function = getattr(found, f"secateurs_expand_{name}")
        function.argtypes = [ctypes.c_int] + [ctypes.c_void_p] * (weights + 1) + [ctypes.c_int64] * 2
        function.restype = None
    kinds = {"i": ctypes.c_int, "p": ctypes.c_void_p, "n": ctypes.c_int64, "f": ctypes.c_float}
    for name, arguments in STEPS.items():
        function = getattr(found, f"secateurs_{name}")
        function.argtypes, function.restype = [kinds[one] for one in arguments], None
    found.secateurs_level_name.restype = ctypes.c_char_p
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
    """Its name: portable, avx2, avx512 or neon. RuntimeError without a library."""
    return loaded().secateurs_level_name(level).decode()


class Product:
    """x W^T for a matrix of `rows` rows in the format `name`: `weights` are its tensors in the order of packed.c.

    What does not change from one product to the next is looked up once, which takes longer than a small one.
    RuntimeError without a library.
    """

    def __init__(self, name: str, weights: tuple[Tensor, ...], rows: int) -> None:
        self._function = getattr(loaded(), f"secateurs_{name}")
        self._weights, self._rows, self._level = weights, rows, best_level()

    def __call__(
        self, x: Float32[Tensor, "batch d_in"], *, level: int | None = None, threads: int | None = None
    ) -> Float32[Tensor, "batch rows"]:
        """Each result is the same whatever the batch and the threads; of a packed format, the same bits as of the dense
        one with the same weights."""
        x = x.contiguous()
        batch, d_in = x.shape
        if threads is None:
            threads = 1 if batch * self._rows * d_in < ALONE_BELOW else torch.get_num_threads()
        out = torch.empty(batch, self._rows, dtype=torch.float32)
        self._function(
            self._level if level is None else level,
            threads,
            *(tensor.data_ptr() for tensor in self._weights),  # asked each time: sharing moves them
            x.data_ptr(),
            out.data_ptr(),
            batch,
            self._rows,
            d_in,
        )
        return out


def expand(name: str, weights: tuple[Tensor, ...], rows: int, d_in: int) -> Float32[Tensor, "rows d_in"]:
    """The weights of a matrix in the format `name`, which is in EXPANDED. RuntimeError without a library."""
    out = torch.empty(rows, d_in, dtype=torch.float32)
    pointers = (tensor.data_ptr() for tensor in (*weights, out))
    getattr(loaded(), f"secateurs_expand_{name}")(torch.get_num_threads(), *pointers, rows, d_in)
    return out


def loaded() -> ctypes.CDLL:
    """The compiled kernels. RuntimeError where there are none."""
    found = library()
    if found is None:
        raise RuntimeError("secateurs was installed without its compiled kernels: install a C compiler, then it, again")
    return found
