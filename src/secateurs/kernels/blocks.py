"""All blocks of a decoder with one token of each of a few rows on a CPU, in one call: see blocks.c.

All tensors are float32 and on the CPU but where it is said otherwise: C takes them as that. RuntimeError without a
library.
"""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Bool, Float32
from torch import Tensor, float32

from secateurs.kernels import Stored, best_level, loaded, most_threads

Weight = Float32[Tensor, " width"]
LAYERS = ("queries", "keys", "values", "output", "gate", "up", "down")
BIASES = ("query_bias", "key_bias", "value_bias", "output_bias", "gate_bias", "up_bias", "down_bias")
NORMS = ("norm", "mlp_norm", "query_norm", "key_norm")
PLACES = ("stored_keys", "stored_values")
STEPS = ("key_row", "key_head", "key_token", "value_row", "value_head", "value_token")
NUMBERS = ("norm_eps", "mlp_eps", "head_eps", "scale")


class Struct(ctypes.Structure):
    """`struct block` of blocks.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*LAYERS, *BIASES, *NORMS, *PLACES)),
        *((name, ctypes.c_int64) for name in (*STEPS, "tokens", "window")),
        *((name, ctypes.c_float) for name in NUMBERS),
    ]


class Block(NamedTuple):
    """A decoder block: RMSNorm, attention, RMSNorm, gated MLP. Weights are contiguous."""

    layers: Sequence[Stored]
    """Of `LAYERS`, those of keys and values with as many rows."""
    biases: Sequence[Weight | None]
    norms: Sequence[Weight]
    """Of `NORMS`: two, or four where heads of queries and keys are normed."""
    epsilons: Sequence[float]
    """Two, or three: heads have one."""
    scale: float
    """Of the scores."""
    window: int | None = None
    """How many tokens a token sees, itself the last of them; None: all."""


def run(
    x: Float32[Tensor, "rows stream"],
    blocks: Sequence[Block],
    stored: Sequence[tuple[Float32[Tensor, "rows kv_heads _ width"], Float32[Tensor, "rows kv_heads _ width"]]],
    angles: tuple[Float32[Tensor, "_ 1 width"], Float32[Tensor, "_ 1 width"]],
    seen: Bool[Tensor, "rows tokens"] | None,
) -> None:
    """Take a token of each row, x, through all blocks, in place.

    `stored` are each block's keys and values, of which the last token's are written: any that are apart in memory, with
    heads' numbers side by side. Queries and keys are turned by cosine and sine [rows or 1, 1, width]. A block whose
    store has fewer tokens than the mask sees the last of them. A token that sees nothing gets zeros, as torch has it.
    """
    if any(one.dtype is not float32 or one.stride(3) != 1 or len(one) != len(x) for both in stored for one in both):
        raise ValueError(f"keys and values are to be float32, side by side in a head, and of {len(x)} rows")
    if seen is not None and not seen.is_contiguous():
        raise ValueError("the mask is to be contiguous")
    structs = (Struct * len(blocks))()
    for struct, block, (keys, values) in zip(structs, blocks, stored, strict=True):
        addresses = [layer.address for layer in block.layers]
        pointers = [None if one is None else one.data_ptr() for one in (*block.biases, *block.norms)]
        pointers += [None] * (len(BIASES) + len(NORMS) - len(pointers))
        places = [keys.data_ptr(), values.data_ptr()]
        numbers = (*block.epsilons, 0.0)[:3]
        steps = (*keys.stride()[:3], *values.stride()[:3], keys.shape[2], block.window or 0)
        struct.__init__(*addresses, *pointers, *places, *steps, *numbers, block.scale)
    cosine, sine = angles
    width = cosine.shape[2]
    loaded().secateurs_blocks(
        best_level(),
        most_threads(),
        ctypes.addressof(structs),
        len(blocks),
        x.data_ptr(),
        len(x),
        width,
        cosine.data_ptr(),
        sine.data_ptr(),
        0 if len(cosine) == 1 else width,
        None if seen is None else seen.data_ptr(),
        0 if seen is None else seen.shape[1],
    )
