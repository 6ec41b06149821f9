"""A decoder block with one token of each of a few rows on a CPU, in three calls: see block.c.

All tensors are float32, contiguous and on the CPU but where it is said otherwise: C takes them as that.
RuntimeError without a library.
"""

from collections.abc import Sequence
from itertools import chain

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from secateurs.kernels import Stored, best_level, loaded, most_threads

ALONE_BELOW = 1 << 14  # products of an attention: a second thread takes longer to wake than these take
Weight = Float32[Tensor, " width"]
Layer = tuple[Stored, Weight | None]  # a matrix and its bias


def before_attention(
    x: Float32[Tensor, "rows d_in"],
    norm: tuple[Weight, float],
    layers: Sequence[Layer],
    head_norms: tuple[Weight, Weight, float] | None,
    angles: tuple[Float32[Tensor, "_ 1 width"], Float32[Tensor, "_ 1 width"]],
    heads: Sequence[int],
) -> Float32[Tensor, "rows heads width"]:
    """The heads of queries, keys and values (as many as `heads` says) of x after an RMSNorm (its weight and epsilon).

    Queries and keys are normed, if there are two weights and an epsilon for it, and turned by cosine and sine
    [rows or 1, 1, width].
    """
    rows, width = len(x), angles[0].shape[2]
    query_norm, key_norm, eps = (None, None, 0.0) if head_norms is None else head_norms
    out = x.new_empty(rows, sum(heads), width)
    loaded().secateurs_before_attention(
        best_level(),
        most_threads(),
        *(layer.address for layer, _ in layers),
        *(_pointer(bias) for _, bias in layers),
        x.data_ptr(),
        norm[0].data_ptr(),
        norm[1],
        _pointer(query_norm),
        _pointer(key_norm),
        eps,
        *(angle.data_ptr() for angle in angles),
        0 if len(angles[0]) == 1 else width,
        out.data_ptr(),
        rows,
        width,
    )
    return out


def attended(
    queries: Float32[Tensor, "rows heads width"],
    keys: Float32[Tensor, "rows kv_heads tokens width"],
    values: Float32[Tensor, "rows kv_heads tokens width"],
    mask: Bool[Tensor, "_ 1 1 tokens"] | Float[Tensor, "_ 1 1 tokens"] | None,
    scale: float,
) -> Float32[Tensor, "rows heads*width"]:
    """Attention of one token a row, which reads the keys of a group of heads once; none need be contiguous.

    A mask says what is seen, or is added to the scores. A token that sees nothing gets zeros, as torch has it.
    """
    (rows, heads, width), (_, kv_heads, tokens, _) = queries.shape, keys.shape
    keys, values = (one.to("cpu", torch.float32) for one in (keys, values))  # some caches keep them otherwise
    keys, values = (one if one.stride(3) == 1 else one.contiguous() for one in (keys, values))
    seen = added = None
    step = 0
    if mask is not None:
        mask = (mask if mask.dtype == torch.bool else mask.float()).expand(rows, 1, 1, tokens)
        mask = mask if mask.stride(3) == 1 else mask.contiguous()
        step = mask.stride(0)
        seen, added = (mask.data_ptr(), None) if mask.dtype == torch.bool else (None, mask.data_ptr())
    out = queries.new_empty(rows, heads * width)
    loaded().secateurs_attended(
        best_level(),
        1 if rows * heads * tokens * width < ALONE_BELOW else torch.get_num_threads(),
        queries.data_ptr(),
        queries.stride(0),
        keys.data_ptr(),
        *keys.stride()[:3],
        values.data_ptr(),
        *values.stride()[:3],
        seen,
        added,
        step,
        scale,
        out.data_ptr(),
        rows,
        kv_heads,
        heads // kv_heads,
        tokens,
        width,
    )
    return out


def after_attention(
    x: Float32[Tensor, "rows width"],
    seen: Float32[Tensor, "rows d_in"],
    output: Layer,
    norm: tuple[Weight, float],
    gate: Layer,
    up: Layer,
    down: Layer,
) -> Float32[Tensor, "rows width"]:
    """What a block makes of x: plus the output layer of what was seen, plus a gated MLP of that after an RMSNorm."""
    out = torch.empty_like(x)
    addresses = ((layer.address, _pointer(bias)) for layer, bias in (output, gate, up, down))
    loaded().secateurs_after_attention(
        best_level(),
        most_threads(),
        *chain.from_iterable(addresses),
        seen.data_ptr(),
        x.data_ptr(),
        norm[0].data_ptr(),
        norm[1],
        out.data_ptr(),
        len(x),
    )
    return out


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
