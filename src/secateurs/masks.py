"""Masks that last: whether a pruned model's zeros outlived training or a merge, putting them back, keeping them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from secateurs.artifacts import atomic_folder, read_json, write_json
from secateurs.checkpoint import Checkpoint
from secateurs.collect import matrices_of
from secateurs.compressed import Compressed, is_compressed
from secateurs.export import SIDE_FILE, copy_beside, mask_hash
from secateurs.models import Matrix, decoder_blocks
from secateurs.packed import RECORD
from secateurs.runtime import PackedLinear, load_packed


@dataclass(frozen=True)
class Kept:
    """What became of one matrix: its zeros when it was pruned, and how many of them are something else now.

    `lost` is None where only the hash of the mask is known, and is another one now.
    """

    name: str
    zeros: int
    lost: int | None


def check(model: str, pruned: str | None = None) -> list[Kept]:
    """Every pruned matrix of `model`, compared with the model it was made from, or with the hashes in its side file.

    `model` may be packed, or in int4 for engines, as `compress` writes it. Against `pruned`, weights that became zero
    since do not count; against hashes any other mask does. ValueError if a folder is not what it is taken for, and
    where rounding made zeros that no hash knows.
    """
    rows, found = _layers(side_file(pruned or model)), []
    checkpoint = _stored(model)
    if pruned is not None:
        source = _exact(pruned)
        return [_kept(old, new) for _, pairs in _blocks(source, checkpoint, rows) for old, new in pairs]
    for index in range(len(checkpoint.blocks)):
        with checkpoint.opened(index):
            for name, matrix in _matrices(checkpoint, index).items():
                if row := rows.pop(name, None):
                    same = mask_hash(matrix.weight) == row["mask_sha256"]
                    if not same and isinstance(checkpoint, _Packed | Compressed) and checkpoint.weights != "bf16":
                        raise ValueError(
                            f"{model} is {checkpoint.weights}, where small weights are zero too, so hashes do not tell "
                            f"whether {name} lost zeros: name the pruned model by --of"
                        )
                    found.append(Kept(name, row["zeros"], 0 if same else None))
    _all_found(rows, model)
    return found


class _Packed:
    """A packed model whose blocks have dense weights while they are open, as those of a checkpoint have."""

    def __init__(self, name: str) -> None:
        self.name, model = name, load_packed(name)
        self.weights = read_json(Path(name) / RECORD).get("weights")
        self.prefix, self.blocks = decoder_blocks(model)

    @contextmanager
    def opened(self, index: int) -> Iterator[None]:
        block = self.blocks[index]
        packed = {name: module for name, module in block.named_modules() if isinstance(module, PackedLinear)}
        for name, module in packed.items():
            dense = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            dense.weight = nn.Parameter(module.matrix.dense(), requires_grad=False)
            block.set_submodule(name, dense)
        yield
        for name, module in packed.items():
            block.set_submodule(name, module)


def apply(model: str, pruned: str, out: Path) -> list[Kept]:
    """Write `model` to `out` with the zeros of `pruned` put back; returns what `check` would have said before.

    For a fine-tuned model, a merged LoRA, a model that was quantised and written out as floating point again. Its
    files are copied and weights written over in the copy, so `out` loads wherever `model` does.
    """
    side, found, hashes = side_file(pruned), [], {}
    with atomic_folder(out) as folder:
        target = _exact(model)
        copy_beside(target.folder, folder)
        target.copy_to(folder)
        for index, pairs in _blocks(_exact(pruned), target, _layers(side)):
            for old, new in pairs:
                found.append(_kept(old, new))
                new.weight.masked_fill_(old.weight == 0, 0)
                hashes[new.name] = mask_hash(new.weight)
            target.write_block(index, folder)
        layers = [row | {"mask_sha256": hashes[row["name"]]} for row in side["layers"]]
        write_json(folder / SIDE_FILE, side | {"layers": layers, "masks_of": pruned})
    return found


def _is_packed(folder: str) -> bool:
    return (Path(folder) / RECORD).is_file()


def _stored(folder: str) -> Checkpoint | _Packed:
    """A model whose zeros are asked for: packed, in int4 for engines, or dense."""
    if _is_packed(folder):
        return _Packed(folder)
    return Compressed(folder, compute_dtype="float32") if is_compressed(folder) else _exact(folder)


def _exact(folder: str) -> Checkpoint:
    """In float32, where what a file holds stays exact. ValueError if it is packed."""
    if _is_packed(folder):
        raise ValueError(f"{folder} is packed: name the folder that it was packed from")
    return Checkpoint(folder, compute_dtype="float32")


def side_file(folder: str) -> dict[str, Any]:
    """The side file of a pruned model. ValueError if there is none, or nothing was masked but cut."""
    file = Path(folder) / SIDE_FILE
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: no such folder")
    if not file.is_file():
        raise ValueError(f"{folder} has no {SIDE_FILE}: let --of name the folder of the model as it was pruned")
    data: Any = read_json(file)
    table = data if isinstance(data, dict) else {}
    if table.get("cut"):
        raise ValueError(f"{folder} is smaller than the model it was cut from and has no zeros that could be lost")
    rows, wanted = table.get("layers"), {"name": str, "mask_sha256": str, "zeros": int}
    sound = isinstance(rows, list) and all(
        isinstance(row, dict) and all(isinstance(row.get(key), kind) for key, kind in wanted.items()) for row in rows
    )
    if not rows or not sound:
        raise ValueError(f"{file} is damaged: it does not say which matrices have which zeros")
    return table


def _layers(side: dict[str, Any]) -> dict[str, Any]:
    return {row["name"]: row for row in side["layers"]}


def _all_found(rows: dict[str, Any], model: str) -> None:
    if rows:
        raise ValueError(f"{model} has no {next(iter(rows))}, which the pruned model has; it is another architecture")


def _matrices(checkpoint: Checkpoint | _Packed, index: int) -> dict[str, Matrix]:
    every = matrices_of(checkpoint.blocks[index], f"{checkpoint.prefix}.{index}", routers=True)  # older versions' too
    return {one.name: one for one in every}


def _kept(old: Matrix, new: Matrix) -> Kept:
    zeros = old.weight == 0
    return Kept(old.name, int(zeros.count_nonzero()), int((zeros & (new.weight != 0)).count_nonzero()))


def _blocks(
    source: Checkpoint, target: Checkpoint | _Packed, rows: dict[str, Any]
) -> Iterator[tuple[int, list[tuple[Matrix, Matrix]]]]:
    """Block by block, open in both checkpoints, the pruned matrices of the one with those of the other.

    ValueError if they do not fit each other.
    """
    model, pruned, missing = target.name, source.name, dict(rows)
    if len(source.blocks) != len(target.blocks):
        raise ValueError(f"{model} has {len(target.blocks)} decoder blocks, and {pruned} has {len(source.blocks)}")
    for index in range(len(source.blocks)):
        with source.opened(index), target.opened(index):
            old, new = _matrices(source, index), _matrices(target, index)
            names = [name for name in old if name in rows and name in new]
            for name in names:
                before, now = tuple(old[name].weight.shape), tuple(new[name].weight.shape)
                if before != now:
                    raise ValueError(f"{name} is {now} in {model}, and {before} in {pruned}")
                del missing[name]
            yield index, [(old[name], new[name]) for name in names]
    _all_found(missing, model)


class KeepZeros(TrainerCallback):
    """Weights that are exactly zero when training starts stay zero: `Trainer(..., callbacks=[KeepZeros()])`.

    In a loop of your own: `keep = KeepZeros(); keep.remember(model)`, then `keep.restore()` after every step of the
    optimiser. Of all trainable parameters with two dimensions or more, but those that are zero everywhere, as half of
    an adapter (LoRA) is when it starts; costs a byte a weight. Adapters train other parameters and fill the zeros when
    they are merged: use `secateurs mask apply` on the merged model.
    """

    def __init__(self) -> None:
        self._zeros: dict[nn.Parameter, Tensor] = {}
        self._model = nn.Module()

    def remember(self, model: nn.Module) -> None:
        """Take down where the zeros are. ValueError if there are none to keep."""
        self._model = model
        trained = (p for p in model.parameters() if p.requires_grad and p.ndim > 1)
        self._zeros = {p: zeros for p in trained if (zeros := p.detach() == 0).any() and not zeros.all()}
        if not self._zeros:
            raise ValueError(
                "KeepZeros: no trainable parameter has zeros to keep; adapters train others (mask apply, once they are "
                "merged), and parameters in shards show none"
            )

    @torch.no_grad()
    def restore(self) -> None:
        """Put zeros where they were. ValueError if the model has other parameters by now, as after `assign=True`."""
        if not self._zeros.keys() <= set(self._model.parameters()):
            raise ValueError(
                "KeepZeros: the model's parameters are others than those it remembers: `remember` it again"
            )
        for parameter, zeros in self._zeros.items():
            parameter.masked_fill_(zeros, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Called by the trainer."""
        self.remember(given["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Called by the trainer."""
        self.restore()
