"""A model in int4 as compressed-tensors packs it: what vLLM, SGLang and, with that package, transformers run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float32, Int32
from torch import Tensor, nn

from secateurs.artifacts import atomic_folder
from secateurs.checkpoint import Checkpoint, Extent, Shards
from secateurs.export import copy_beside, has_moved, mask_hashes, packed_card
from secateurs.int4 import GROUP, LOWEST, group_scales, numbers_of
from secateurs.models import linears, packed_experts
from secateurs.packed import RECORD

IN_A_WORD = 8  # numbers of four bits


def compress(model: str, out: Path) -> dict[str, Any]:
    """Write the model in the folder or hub id `model` to `out` with its linear layers in int4; one block at a time.

    Returns how many matrices there are (`matrices`), their bytes before and after, in how many of the blocks' matrices
    zeros are not where they were when it was pruned (`moved`), and how far the numbers are from the weights as they
    were, of their root mean square (`rounded_off`; 0 for what a solver rounded). Layers whose inputs
    are no whole number of groups, embeddings, head and routers stay, and the configuration names them. ValueError for a
    mixture of experts, for a model that is packed or quantised already, and where nothing could be packed.
    """
    if (Path(model) / RECORD).exists():
        raise ValueError(f"{model} is packed already")
    if out.exists():
        raise ValueError(f"{out} exists: name another folder, or remove it")
    checkpoint = Checkpoint(model)
    if any(packed_experts(block) for block in checkpoint.blocks):
        raise ValueError(f"{type(checkpoint.model).__name__} has experts, which are not packed so")
    found = {"weights": "int4", "matrices": 0, "dense_bytes": 0, "bytes": 0, "moved": 0}
    masks = mask_hashes(checkpoint.folder)
    off = whole = 0.0
    packed: set[str] = set()
    with atomic_folder(out) as folder:
        files = Shards(folder, "model")
        for index, block in enumerate(checkpoint.blocks):
            place, inside = f"{checkpoint.prefix}.{index}", linears(block)
            fit = {name for name, linear in inside.items() if linear.weight.shape[1] % GROUP == 0}
            with checkpoint.opened(index):
                found["moved"] += sum(has_moved(masks, f"{place}.{name}", one.weight) for name, one in inside.items())
                for key, tensor in checkpoint.block_weights(index).items():
                    name = checkpoint.names[key].removeprefix(f"{place}.").removesuffix(".weight")
                    if name not in fit or not key.endswith(".weight"):
                        files.add(key, tensor)
                        continue
                    packed.add(checkpoint.names[key].removesuffix(".weight"))
                    weight = tensor.float()
                    scales = group_scales(weight).to(tensor.dtype)
                    numbers = numbers_of(weight, scales.float())
                    parts = {"packed": _words(numbers), "scale": scales, "shape": torch.tensor(weight.shape)}
                    for part, value in parts.items():
                        files.add(f"{key}_{part}", value)
                    rounded = numbers * scales.float().repeat_interleave(GROUP, 1)
                    off += float((rounded - weight).square().sum())
                    whole += float(weight.square().sum())
                    sizes = (1, 2 * weight.numel(), sum(value.nbytes for value in parts.values()))
                    for what, size in zip(("matrices", "dense_bytes", "bytes"), sizes, strict=True):
                        found[what] += size
        if not packed:
            raise ValueError(f"{model} has no linear layers with inputs in groups of {GROUP}")
        for key, tensor in checkpoint.around():
            files.add(key, tensor)
        files.close()
        copy_beside(checkpoint.folder, folder)
        packed_card(checkpoint.folder, folder, model=model, weights="int4", counts=found, for_engines=True, group=GROUP)
        layers = (name for name, module in checkpoint.model.named_modules() if isinstance(module, nn.Linear))
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = _settings([name for name in layers if name not in packed])
        (folder / "config.json").write_text(json.dumps(config, indent=2))
    return found | {"rounded_off": (off / whole) ** 0.5 if off else 0.0}


def _words(numbers: Float[Tensor, "rows d_in"]) -> Int32[Tensor, "rows words"]:
    """Eight numbers in a word, the first in its lowest bits, counted from -8."""
    bits = (numbers - LOWEST).to(torch.int64).view(len(numbers), -1, IN_A_WORD)
    words = (bits << torch.arange(0, 4 * IN_A_WORD, 4, device=bits.device)).sum(2)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _numbers(words: Int32[Tensor, "rows words"]) -> Float32[Tensor, "rows d_in"]:
    """What `_words` put into words."""
    bits = words.unsqueeze(2) >> torch.arange(0, 4 * IN_A_WORD, 4) & 15
    return (bits + LOWEST).view(len(words), -1).float()


def _settings(ignored: list[str]) -> dict[str, Any]:
    """What engines read of a configuration; `ignored` are the linear layers that stay as they are."""
    weights = {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP, "dynamic": False
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}},
        "ignore": ignored,
    }


def is_compressed(folder: str) -> bool:
    """Whether `compress` wrote it, by its configuration; other int4 is not taken for this."""
    try:
        settings: Any = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
        return settings == _settings(settings["ignore"])
    except (OSError, ValueError, LookupError, TypeError):
        return False


class Compressed(Checkpoint):
    """A folder that `compress` wrote, to be read a block at a time: what is in int4 is dense while its block is open.

    Also any folder that `Checkpoint` reads. It cannot be written over. ValueError in one sentence for what is damaged
    or quantised by others.
    """

    weights = "int4"

    def _check(self, path: str) -> None:
        if not is_compressed(path):
            super()._check(path)

    def _layout(self) -> Mapping[str, Extent]:
        """With an entry for every weight that is in words."""
        places = dict(super()._layout())
        for key, words in [item for item in places.items() if item[0].endswith(".weight_packed")]:
            name, rows, d_in = key.removesuffix("_packed"), words.shape[0], words.shape[-1] * IN_A_WORD
            scales = places.get(f"{name}_scale")
            if words.dtype != "I32" or scales is None or scales.shape != (rows, d_in // GROUP):
                raise ValueError(f"{name} has no scales that fit its {rows} x {d_in} numbers")
            places[name] = Extent(words.file, scales.dtype, (rows, d_in), 0, 0)
        return places

    def _source(self, key: str, file: Any) -> Any:
        if f"{key}_packed" not in self.places:
            return super()._source(key, file)
        numbers, scales = _numbers(self._tensor(f"{key}_packed")), self._tensor(f"{key}_scale").float()
        return numbers * scales.repeat_interleave(GROUP, 1)
