"""Matrices stored without their zeros, as kernels of ours read them: `packing` writes models, `runtime` runs them.

One token of a small batch reads every weight once, so reading less can be being faster. A matrix is stored in halves
where no eight columns keep more than four (4:8, 2:4), packed with a bitmap where that is less to read, else dense; as
bfloat16, as int8 with a scale for each row, or (dense only) as int4 with a scale for each 64 columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from secateurs import kernels
from secateurs.int4 import LOWEST, group_scales, numbers_of

Weights = Literal["bf16", "int8", "int4"]
WEIGHTS: tuple[Weights, ...] = get_args(Weights)
Layout = Literal["dense", "packed", "half"]
STEM = "packed"
RECORD = "packed.json"
SCHEMA, VERSION = "secateurs.packed", 1
DENSE_FROM = 0.8  # of the weights: with so many kept a bitmap saves too little to be worth expanding
HALF_FROM = 0.35  # with fewer kept a bitmap is so much less to read that halves are not worth it
GROUP, KEPT, BLOCK, PLACES = 8, 4, 8, 3  # halves: columns in a group, kept of them, rows in a block, bytes for two rows
WORD = 64  # columns in a word of the bitmap, and with a scale of int4
PADDING = 64  # bytes after the kept weights that a kernel may read


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A matrix [rows, d_in] in one of the formats of packed.c."""

    rows: int
    d_in: int
    tensors: Mapping[str, Tensor]
    """weight; or bits, values and starts (packed); or kept and places (half). And scale with int8, scales with int4."""

    @classmethod
    def of(cls, weight: Float[Tensor, "rows d_in"], weights: Weights, layout: Layout | None = None) -> "PackedMatrix":
        """A weight, rounded to what it is stored as, in a layout or (None) the one that suits it. Zeros stay zero.

        int8 is symmetric, with the largest weight of a row at 127; int4 (`int4`) is always dense: a bitmap would save
        little of so few bits. Weights that are int4 numbers already stay what they are (`int4.EXACT`). ValueError
        for int4 in another layout, and for halves of a matrix that keeps more than four of some eight columns.
        """
        rows, d_in = weight.shape
        if weights == "int4":
            if layout not in (None, "dense"):
                raise ValueError("int4 is stored dense: there is no other layout for it")
            return cls(rows, d_in, _int4(weight.float()))
        kept = weight != 0
        which = _kept_bytes(kept)
        tensors: dict[str, Tensor] = {}
        if weights == "int8":
            scale = weight.float().abs().amax(1).clamp(min=1e-30) / 127
            stored, tensors["scale"] = (weight.float() / scale[:, None]).round().to(torch.int8), scale
        else:
            stored = weight.to(torch.bfloat16)
        if layout is None:
            density = float(kept.float().mean())
            sparse = "half" if density > HALF_FROM and _fits(which) else "packed"
            layout = sparse if density < DENSE_FROM else "dense"
        if layout == "half":
            return cls(rows, d_in, _half(stored, which) | tensors)
        if layout == "packed":
            bits = nn.functional.pad(which, (0, -which.shape[1] % (WORD // 8))).view(torch.int64)
            starts = torch.zeros(rows + 1, dtype=torch.int64)
            starts[1:] = kept.sum(1).cumsum(0)
            spare = torch.zeros(PADDING // stored.itemsize, dtype=stored.dtype)
            values = torch.cat([stored[kept], spare])
            return cls(rows, d_in, {"bits": bits, "values": values, "starts": starts} | tensors)
        return cls(rows, d_in, {"weight": stored} | tensors)

    def check(self, name: str) -> None:
        """ValueError unless the tensors are what kernels may be given: they read where these say, and check nothing."""
        parts, rows = self.tensors, self.rows
        kind = torch.int8 if self.kind == "int8" else torch.bfloat16
        words = -(-self.d_in // WORD)
        wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"weight": ((rows, self.d_in), kind)}
        if self.kind == "int4":
            wanted = {"weight": ((rows, words * WORD // 2), torch.uint8), "scales": ((rows, words), torch.bfloat16)}
        elif self.layout == "half":
            blocks, groups = -(-rows // BLOCK), -(-self.d_in // GROUP)
            wanted = {
                "kept": ((blocks, groups, BLOCK, KEPT), kind),
                "places": ((blocks * groups * BLOCK // 2 * PLACES + PADDING,), torch.uint8),
            }
        elif self.layout == "packed":
            wanted = {
                "bits": ((rows, words), torch.int64),
                "starts": ((rows + 1,), torch.int64),
                "values": ((-1,), kind),
            }
        if self.kind == "int8":
            wanted["scale"] = ((rows,), torch.float32)
        sound = set(parts) == set(wanted) and all(
            parts[part].dtype == dtype and parts[part].is_contiguous() and shape in (tuple(parts[part].shape), (-1,))
            for part, (shape, dtype) in wanted.items()
        )
        if sound and self.layout == "packed":  # halves need no more: whatever three bits say is inside a group
            counts = np.bitwise_count(parts["bits"].view(torch.uint8).numpy()).sum(1, dtype=np.int64)
            starts, last = parts["starts"].numpy(), self.d_in % WORD
            sound = starts[0] == 0 and np.array_equal(np.diff(starts), counts)
            sound = sound and len(parts["values"]) * kind.itemsize >= starts[-1] * kind.itemsize + PADDING
            if last:  # no bit beyond the last column
                sound = sound and not bool((parts["bits"][:, -1] & ~((1 << last) - 1)).any())
        if not sound:
            raise ValueError(f"{name}: its tensors are not those of a {rows} x {self.d_in} matrix")

    @property
    def layout(self) -> Layout:
        """How zeros are left out, if they are."""
        return "packed" if "bits" in self.tensors else "half" if "places" in self.tensors else "dense"

    @property
    def kind(self) -> Weights:
        """What the weights are stored as."""
        return "int4" if "scales" in self.tensors else "int8" if "scale" in self.tensors else "bf16"

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(iter(self.tensors.values())).device

    @property
    def nbytes(self) -> int:
        """What one product reads."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def format(self) -> str:
        """What packed.c calls it."""
        return f"{self.layout}_{self.kind}"

    @property
    def _weights(self) -> tuple[Tensor, ...]:
        """The tensors of a packed matrix in the order of `kernels.gpu`."""
        order = ("weight", "bits", "values", "starts", "scale")
        return tuple(self.tensors[part] for part in order if part in self.tensors)

    def to(self, device: torch.device) -> "PackedMatrix":
        """The matrix on another device."""
        return replace(self, tensors={part: tensor.to(device) for part, tensor in self.tensors.items()})

    @cached_property
    def stored(self) -> kernels.Stored:
        """As the compiled kernels take it."""
        return kernels.Stored(self.format, self.tensors, self.rows, self.d_in)

    def __getstate__(self) -> dict[str, Any]:
        """Copies, which may be made where there are no kernels, find their own."""
        return {key: value for key, value in vars(self).items() if key != "stored"}

    def with_bitmap(self) -> "PackedMatrix":
        """The same matrix packed, for a GPU, whose kernel takes bitmaps."""
        return PackedMatrix.of(self.dense(), self.kind, "packed")

    def multiply(self, x: Float[Tensor, "batch d_in"], **options: int) -> Float[Tensor, "batch rows"]:
        """x W^T by a compiled kernel, in x's type: see `kernels.Stored`, which is for float32, and `kernels.gpu`."""
        if x.device.type == "cpu":
            return self.stored.multiply(x.float(), **options).to(x.dtype)
        if self.format == "dense_bf16":
            return nn.functional.linear(x, self.tensors["weight"].to(x.dtype))
        if self.kind == "int4" or self.layout == "half" or not kernels.has_triton():
            return nn.functional.linear(x, self.dense().to(x.dtype))
        from secateurs.kernels import gpu

        return gpu.multiply(self.format, self._weights, x, self.rows)

    def dense(self) -> Float32[Tensor, "rows d_in"]:
        """The weights that it stands for."""
        scale = self.tensors.get("scale")
        if self.format in kernels.EXPANDED and self.device.type == "cpu" and kernels.library() is not None:
            return self.stored.expand()
        if self.kind == "int4":
            pairs = self.tensors["weight"].view(self.rows, -1, WORD // 2)
            numbers = torch.cat([pairs & 15, pairs >> 4], 2).float() + LOWEST
            whole = numbers * self.tensors["scales"][:, :, None].float()
            return whole.view(self.rows, -1)[:, : self.d_in].contiguous()
        if self.layout == "half":
            whole = _whole(self.tensors["kept"], self.tensors["places"])[: self.rows, : self.d_in].contiguous()
        elif self.layout == "packed":
            bits = self.tensors["bits"].view(torch.uint8)[:, :, None]
            kept = (bits >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
            kept = kept.view(self.rows, -1)[:, : self.d_in].bool()
            whole = torch.zeros(kept.shape, device=bits.device)
            whole[kept] = self.tensors["values"][: int(self.tensors["starts"][-1])].float()
        else:
            whole = self.tensors["weight"].float()
        return whole if scale is None else whole * scale[:, None]


def _kept_bytes(kept: Tensor) -> Tensor:
    """A bit a weight that says whether it is kept, the first of eight in the lowest [rows, groups]."""
    return torch.from_numpy(np.packbits(kept.numpy(), axis=1, bitorder="little"))


def _grouped(matrix: Tensor) -> Tensor:
    """A matrix [rows, d_in] with zeros around it, as halves order it: [blocks, groups, 8 rows, 8 columns]."""
    rows, d_in = matrix.shape
    whole = nn.functional.pad(matrix, (0, -d_in % GROUP, 0, -rows % BLOCK))
    return whole.view(-1, BLOCK, whole.shape[1] // GROUP, GROUP).transpose(1, 2)


def _fits(which: Tensor) -> bool:
    """Whether no row keeps more than four of eight columns."""
    return int(np.bitwise_count(which.numpy()).max(initial=0)) <= KEPT


@cache
def _places() -> Tensor:
    """The four columns that a byte with as many bits keeps; with fewer others too, whose weights are zero [256, 4]."""
    bits = torch.arange(256)[:, None] >> torch.arange(GROUP) & 1
    return bits.sort(dim=1, descending=True, stable=True).indices[:, :KEPT].sort(dim=1).values


def _half(stored: Tensor, which: Tensor) -> dict[str, Tensor]:
    """Four weights for each eight columns [blocks, groups, 8, 4], and bytes with three bits each that say where."""
    if not _fits(which):
        raise ValueError("a matrix in halves keeps at most four of each eight columns; this one keeps more somewhere")
    which = nn.functional.pad(which, (0, 0, 0, -len(which) % BLOCK))
    which = which.view(-1, BLOCK, which.shape[1]).transpose(1, 2)
    codes = (_places() << torch.arange(0, 3 * KEPT, 3)).sum(1).int()
    weights, places = [], []
    for values, byte in zip(_grouped(stored).split(64), which.split(64), strict=True):  # what is looked up is int64
        weights.append(values.gather(3, _places()[byte.long()]))
        first, second = codes[byte.long()].unflatten(2, (-1, 2)).unbind(3)
        words = first | second << 3 * KEPT
        places.append(words.contiguous().view(torch.uint8).view(-1, 4)[:, :PLACES].flatten())
    spare = torch.zeros(PADDING, dtype=torch.uint8)
    return {"kept": torch.cat(weights), "places": torch.cat([*places, spare])}


def _whole(kept: Tensor, places: Tensor) -> Float32[Tensor, "rows d_in"]:
    """The matrix that halves stand for, with the zeros around it."""
    blocks, groups = kept.shape[:2]
    spread = places[:-PADDING].view(blocks, groups, BLOCK // 2, PLACES).long()
    words = (spread << torch.tensor([0, 8, 16], device=places.device)).sum(3)
    columns = words[..., None] >> torch.arange(0, 6 * KEPT, 3, device=places.device) & 7
    whole = torch.zeros(blocks, groups, BLOCK, GROUP, device=kept.device)
    whole.scatter_add_(3, columns.view(kept.shape), kept.float())
    return whole.transpose(1, 2).reshape(blocks * BLOCK, groups * GROUP)


def _int4(weight: Float32[Tensor, "rows d_in"]) -> dict[str, Tensor]:
    """Two numbers in a byte, in the order of packed.c [rows, words * 32], and bfloat16 scales [rows, words]."""
    rows, d_in = weight.shape
    scales = group_scales(weight)
    numbers = nn.functional.pad(numbers_of(weight, scales), (0, -d_in % WORD)).view(rows, -1, WORD)
    first, second = (numbers - LOWEST).to(torch.uint8).split(WORD // 2, dim=2)
    return {"weight": (first | second << 4).view(rows, -1), "scales": scales.to(torch.bfloat16)}
