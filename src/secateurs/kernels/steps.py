"""What a decoder block does between its products, for one token of each of a few rows on a CPU: see steps.c.

All take and give contiguous float32 but where they say otherwise, and raise RuntimeError without a library.
"""

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from secateurs.kernels import best_level, loaded

ALONE_BELOW = 1 << 14  # products: a second thread takes longer to wake than these take


def normed(
    x: Float32[Tensor, "rows width"], weight: Float32[Tensor, " width"], eps: float
) -> Float32[Tensor, "rows width"]:
    """Each row over its root mean square, times a weight (RMSNorm)."""
    out = torch.empty_like(x)
    loaded().secateurs_normed(best_level(), x.data_ptr(), weight.data_ptr(), eps, out.data_ptr(), *x.shape)
    return out


def turn(
    heads: Float32[Tensor, "rows heads width"],
    kv_heads: int,
    angles: tuple[Float32[Tensor, "rows 1 width"], Float32[Tensor, "rows 1 width"]],
    bias: Float32[Tensor, " all"] | None = None,
    norms: tuple[Float32[Tensor, " width"], Float32[Tensor, " width"], float] | None = None,
) -> None:
    """In place: heads of queries, keys and values get a bias, the first two are normed (their weights, and an epsilon)
    and turned by cosine and sine, of which rows may share one."""
    rows, count, width = heads.shape
    cosine, sine = (angle.contiguous() for angle in angles)
    query_norm, key_norm, eps = (None, None, 0.0) if norms is None else norms
    loaded().secateurs_turned(
        best_level(),
        heads.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if query_norm is None else query_norm.data_ptr(),
        None if key_norm is None else key_norm.data_ptr(),
        eps,
        cosine.data_ptr(),
        sine.data_ptr(),
        0 if len(cosine) == 1 else width,
        rows,
        count - 2 * kv_heads,
        kv_heads,
        width,
    )


def attended(
    queries: Float32[Tensor, "rows heads width"],
    keys: Float32[Tensor, "rows kv_heads tokens width"],
    values: Float32[Tensor, "rows kv_heads tokens width"],
    mask: Bool[Tensor, "_ 1 1 tokens"] | Float[Tensor, "_ 1 1 tokens"] | None,
    scale: float,
) -> Float32[Tensor, "rows heads*width"]:
    """Attention of one token a row, which reads the keys of a group of heads once; none need be contiguous.

    A mask says what is seen, or is added to the scores.
    """
    (rows, heads, width), (_, kv_heads, tokens, _) = queries.shape, keys.shape
    keys, values = (one if one.stride(3) == 1 else one.contiguous() for one in (keys, values))
    seen = added = None
    step = 0
    if mask is not None:
        mask = (mask if mask.dtype == torch.bool else mask.float()).expand(rows, 1, 1, tokens)
        mask = mask if mask.stride(3) == 1 else mask.contiguous()
        step = mask.stride(0)
        seen, added = (mask.data_ptr(), None) if mask.dtype == torch.bool else (None, mask.data_ptr())
    out = torch.empty(rows, heads * width)
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


def gated(both: Float32[Tensor, "rows 2*width"]) -> Float32[Tensor, "rows width"]:
    """silu(the first half) times the second."""
    rows, width = both.shape[0], both.shape[1] // 2
    out = torch.empty(rows, width)
    loaded().secateurs_gated(best_level(), both.data_ptr(), out.data_ptr(), rows, width)
    return out
