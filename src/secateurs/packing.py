"""A model written in the format of `packed`, one block at a time, and the check that the runtime says the same."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.artifacts import atomic_folder, write_json
from secateurs.calibration import Batch
from secateurs.checkpoint import Checkpoint, Shards
from secateurs.collect import logits_of
from secateurs.export import copy_beside, has_moved, mask_hashes, packed_card
from secateurs.models import linears, name_of
from secateurs.packed import RECORD, SCHEMA, STEM, VERSION, WORD, PackedMatrix, Weights
from secateurs.planner import SAFE, available
from secateurs.runtime import PackedLinear, has_kernels, load_packed

PROBED = 24  # tokens that are read at once, as matrices made dense: more than `runtime.FEW`
OFF, ROUNDED_OFF = 2e-3, 0.3  # of the largest logit; kernels of int4 round a single token's vectors
AT_ONCE = 256  # rows that are compared
NO_ROOM = "no room here to load it"


def pack(model: str, out: Path, weights: Weights = "bf16") -> dict[str, Any]:
    """Write the model in the folder or hub id `model` to `out` with its linear layers packed; one block at a time.

    Returns how much there is of what, and in how many matrices (`moved`) zeros are not where they were when it was
    pruned, as its side file has them; how far what is stored is from the weights as they were (`rounded_off`, of their
    root mean square; with int4 of the blocks alone); and whether it was `checked`, or `why_unchecked`: the runtime says
    what the model says with its weights rounded so. ValueError for a model that cannot be loaded, or that the runtime
    has no way to run.
    Embeddings stay as they are, and so does a head that is tied to them, but for int8. With int4 a head is int8.
    """
    if (Path(model) / RECORD).exists():
        raise ValueError(f"{model} is packed already")
    if out.exists():
        raise ValueError(f"{out} exists: name another folder, or remove it")
    with atomic_folder(out) as folder:
        found, beside = _write(model, folder, weights)
        held = sum(file.stat().st_size for file in folder.glob(f"{STEM}*.safetensors")) + beside
        why = _check(model, folder) if held <= SAFE * available(torch.device("cpu")) else NO_ROOM
        found |= {"checked": not why, "why_unchecked": why}
    return found


def _write(model: str, folder: Path, weights: Weights) -> tuple[dict[str, Any], int]:
    """Pack a model: what there is of what, and the bytes that a check holds beside what was written."""
    checkpoint = Checkpoint(model)
    if not any(linears(block) for block in checkpoint.blocks):
        raise ValueError(f"{model} has no linear layers that could be packed")
    counts = {"matrices": 0, "packed": 0, "weights": 0, "zeros": 0, "dense_bytes": 0, "bytes": 0}
    names: dict[str, list[int]] = {}
    off = whole = 0.0
    masks, moved = mask_hashes(checkpoint.folder), 0
    files = Shards(folder, STEM)

    def add(name: str, weight: Tensor, kind: Weights = weights) -> None:
        nonlocal off, whole
        weight = weight.detach().cpu()
        matrix = PackedMatrix.of(weight, kind)
        lost, size = _rounded(name, weight, matrix)
        if kind == weights:
            off, whole = off + lost, whole + size
        names[name] = [matrix.rows, matrix.d_in]
        for part, tensor in matrix.tensors.items():
            files.add(f"{name}.{part}", tensor.contiguous())
        zeros = int((weight == 0).count_nonzero())
        found = (1, int(matrix.layout != "dense"), weight.numel(), zeros, 2 * weight.numel(), matrix.nbytes)
        for key, number in zip(counts, found, strict=True):
            counts[key] += number

    for index, block in enumerate(checkpoint.blocks):
        with checkpoint.opened(index):
            place = f"{checkpoint.prefix}.{index}"
            inside = linears(block)
            for name, linear in inside.items():
                moved += has_moved(masks, f"{place}.{name}", linear.weight)
                add(f"{place}.{name}", linear.weight)
            for name, tensor in block.state_dict().items():
                if name.removesuffix(".weight") not in inside:
                    files.add(f"{place}.{name}", tensor.cpu().contiguous())
    head: Any = checkpoint.model.get_output_embeddings()
    embedding: Any = checkpoint.model.get_input_embeddings()
    if weights != "bf16" or head.weight is not embedding.weight:
        add(name_of(checkpoint.model, head), head.weight, "bf16" if weights == "bf16" else "int8")
    weight = f"{name_of(checkpoint.model, head)}.weight"
    for name, tensor in checkpoint.model.state_dict().items():
        if name != weight and not name.startswith(f"{checkpoint.prefix}."):
            files.add(name, tensor.cpu().contiguous())
    files.close()
    copy_beside(checkpoint.folder, folder)
    packed_card(checkpoint.folder, folder, model=model, weights=weights, counts=counts)
    write_json(folder / RECORD, {"schema": SCHEMA, "version": VERSION, "weights": weights, "matrices": names})
    density = 1 - counts["zeros"] / counts["weights"]
    block = max(sum(parameter.numel() for parameter in block.parameters()) for block in checkpoint.blocks)
    single = head.weight.numel() + 2 * block + (0 if has_kernels(torch.device("cpu")) else counts["weights"])
    rounded_off = (off / whole) ** 0.5 if off else 0.0
    return {"weights": weights, **counts, "moved": moved, "density": density, "rounded_off": rounded_off}, 4 * single


def _rounded(name: str, weight: Tensor, matrix: PackedMatrix) -> tuple[float, float]:
    """What rounding took from a weight, and the weight, both squared and summed.

    RuntimeError if the matrix stands for anything else: a zero that is none, or a number that rounding cannot explain.
    """
    off, whole, expanded = 0.0, 0.0, matrix.dense()
    for first in range(0, matrix.rows, AT_ONCE):
        rows = slice(first, first + AT_ONCE)
        was, now = weight[rows].float(), expanded[rows]
        far = (now - was).abs()
        if matrix.kind == "bf16":
            right = torch.equal(now, was.bfloat16().float())
        elif matrix.kind == "int8":
            right = bool((far <= (was != 0) * 0.501 * matrix.tensors["scale"][rows, None]).all())
        else:
            step = matrix.tensors["scales"][rows].float().abs().repeat_interleave(WORD, 1)[:, : matrix.d_in]
            steps = torch.where(was.abs() > 7 * step, 3.1, 0.501)  # the largest is at most 10 of them, and stored as 7
            right = bool((far <= (was != 0) * (steps * step + 1e-38)).all())
        if not right:
            raise RuntimeError(f"{name} is not the same when it is packed as {matrix.format}: a fault of secateurs")
        off, whole = off + float(far.square().sum()), whole + float(was.square().sum())
    return off, whole


def _check(model: str, folder: Path) -> str:
    """Why a packed model could not be compared; "" if it was.

    ValueError if it does not run, or says something else than `model` does with the weights that are packed: for PROBED
    tokens at once, then for one more.
    """
    source = Checkpoint(model, compute_dtype="float32")
    try:
        with torch.inference_mode():
            packed: Any = load_packed(folder)
            size: int = packed.config.get_text_config(decoder=True).vocab_size
            ids = (torch.arange(PROBED + 1) * 7919 % size)[None]
            first = packed(input_ids=ids[:, :-1], use_cache=True)
            cache = first.get("past_key_values")
            last = None if cache is None else packed(input_ids=ids[:, -1:], past_key_values=cache)
            said = torch.cat([first.logits[0], *([] if last is None else [last.logits[0]])])
    except MemoryError:
        return NO_ROOM
    except Exception as error:  # whatever a family's code does where its layers are others
        raise ValueError(f"the runtime cannot run {type(source.model).__name__} ({_short(error)})") from error
    try:
        wanted = _said_with(source, packed, ids[:, : len(said)])
    except Exception as error:  # nothing is known of a family whose code runs in one piece only
        return f"{type(source.model).__name__} does not run block by block ({_short(error)})"
    off, largest = (said - wanted).abs(), float(wanted.abs().max())
    rounds = "int4" in {module.matrix.kind for module in packed.modules() if isinstance(module, PackedLinear)}
    at_once, after = float(off[:PROBED].max()), float(off[PROBED:].max()) if len(off) > PROBED else 0.0
    if not (at_once <= OFF * largest and after <= (ROUNDED_OFF if rounds else OFF) * largest):
        raise ValueError(
            f"the runtime does not say what {type(source.model).__name__} says: logits are off by {at_once:.3g}, of a "
            f"token by itself by {after:.3g} (largest {largest:.3g})"
        )
    return ""


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _said_with(source: Checkpoint, packed: nn.Module, ids: Tensor) -> Tensor:
    """The logits of `source`, a block at a time, with the weights of a packed model in its linear layers."""

    def dense(name: str) -> nn.Parameter:
        module: Any = packed.get_submodule(name)
        weight = module.matrix.dense() if isinstance(module, PackedLinear) else module.weight
        return nn.Parameter(weight, requires_grad=False)

    @contextmanager
    def opened(index: int) -> Iterator[None]:
        with source.opened(index):
            for name, linear in linears(source.blocks[index]).items():
                linear.weight = dense(f"{source.prefix}.{index}.{name}")
            yield

    head: Any = source.model.get_output_embeddings()
    head.weight = dense(name_of(source.model, head))
    with torch.inference_mode():
        (logits,) = logits_of(source.model, [Batch(ids, torch.ones_like(ids))], opened)
        return logits[:].float()
