"""A checkpoint written without what a cut left out: smaller matrices, fewer blocks or experts, a config to match."""

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from secateurs.checkpoint import Checkpoint, Shards
from secateurs.cuts import Anatomy, anatomy
from secateurs.models import packed_experts

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # what configurations call the number of experts


class Smaller(Protocol):
    """Writes a smaller checkpoint block by block: made of the checkpoint and an empty folder."""

    def write_block(self, index: int) -> None:
        """Write what is left of block `index`, while it is open with its pruned weights."""
        ...

    def close(self) -> dict[str, Any]:
        """Write what lies around the blocks, the index and the configuration; returns what was cut, for the record."""
        ...


class Trimmer:
    """Writes the folder of a checkpoint whose blocks were pruned by whole inputs, block by block.

    What may go is seen from the weights: neurons that `down_proj` does not read, heads that `o_proj` does not, blocks
    that add nothing to the residual stream. Every block that stays keeps the same number of each.
    """

    def __init__(self, checkpoint: Checkpoint, folder: Path) -> None:
        self.checkpoint, self.folder = checkpoint, folder
        self.body: Anatomy = anatomy(checkpoint.model)
        self.blocks: list[int] = []
        """Those that stayed."""
        self.sizes: dict[str, int] = {}
        self._files = Shards(folder, "model")

    def write_block(self, index: int) -> None:
        """Trim and write block `index`, while it is open with its pruned weights; nothing if it adds nothing.

        ValueError if it does not keep as much as the blocks before it, or heads that no engine could group.
        """
        weights = self.checkpoint.block_weights(index)
        o, down = (self._of(weights, index, part) for part in ("self_attn.o_proj.weight", "mlp.down_proj.weight"))
        if not bool(o.any()) and not bool(down.any()):
            return
        neurons = down.any(0).nonzero().squeeze(-1)
        heads, kv_heads = self._heads(index, o.any(0).view(self.body.heads, -1).any(1))
        sizes = {
            "intermediate_size": len(neurons), "num_attention_heads": len(heads), "num_key_value_heads": len(kv_heads)
        }  # fmt: skip
        self.sizes = self.sizes or sizes
        if sizes != self.sizes:
            raise ValueError(f"block {index} keeps {sizes}, but those before it {self.sizes}; engines take one size")
        queries, keys = (_rows(heads, self.body.head_dim), _rows(kv_heads, self.body.head_dim))
        smaller: dict[str, Callable[[Tensor], Tensor]] = {
            "self_attn.q_proj": lambda w: w[queries], "self_attn.k_proj": lambda w: w[keys],
            "self_attn.v_proj": lambda w: w[keys], "self_attn.o_proj.weight": lambda w: w[:, queries],
            "mlp.gate_proj": lambda w: w[neurons], "mlp.up_proj": lambda w: w[neurons],
            "mlp.down_proj.weight": lambda w: w[:, neurons],
        }  # fmt: skip
        place = self.body.prefix.rsplit(".", 1)[-1]  # the key may lack what stands before it
        for key, tensor in weights.items():
            old, part = f"{place}.{index}.", key.split(f"{place}.{index}.", 1)[1]
            cut = next((smaller[name] for name in smaller if part.startswith(name)), lambda w: w)
            self._files.add(key.replace(old, f"{place}.{len(self.blocks)}.", 1), cut(tensor).contiguous())
        self.blocks.append(index)

    def close(self) -> dict[str, Any]:
        """See `Smaller.close`."""
        _finish(self.checkpoint, self.folder, self._files, self._config)
        body = self.body
        was = {
            "intermediate_size": body.d_ff, "num_attention_heads": body.heads, "num_key_value_heads": body.kv_heads,
            "num_hidden_layers": body.blocks,
        }  # fmt: skip
        return {"was": was, "is": self.sizes | {"num_hidden_layers": len(self.blocks)}, "blocks": self.blocks}

    def _config(self, config: dict[str, Any]) -> None:
        """Make it that of what is left; `head_dim` is spelled out, as heads no longer share out the width."""
        config |= self.sizes | {"num_hidden_layers": len(self.blocks), "head_dim": self.body.head_dim}
        whole: dict[str, Any] = self.checkpoint.model.config.get_text_config(decoder=True).to_dict()
        for key, value in whole.items():  # what a block is by its index, also where the file leaves it to be computed
            each = "layer" in key and key != "mlp_only_layers" and isinstance(value, list)
            if each and len(value) == self.body.blocks:
                config[key] = [value[index] for index in self.blocks]
        if isinstance(config.get("max_window_layers"), int):  # blocks below it attend to everything
            config["max_window_layers"] = sum(index < config["max_window_layers"] for index in self.blocks)

    def _of(self, weights: dict[str, Tensor], index: int, part: str) -> Tensor:
        return next(tensor for key, tensor in weights.items() if key.endswith(f".{index}.{part}"))

    def _heads(self, index: int, read: Tensor) -> tuple[Tensor, Tensor]:
        """The heads that stay, and the groups of keys and values: those of which a head stays, each with as many."""
        by_group = read.view(self.body.kv_heads, -1)
        groups = by_group.any(1).nonzero().squeeze(-1)
        counts = by_group[groups].sum(1)
        if not len(groups) or bool((counts != counts[0]).any()):
            raise ValueError(f"block {index}: heads of a group that stay, by group: {by_group.sum(1).tolist()}")
        return read.nonzero().squeeze(-1), groups


class ExpertTrimmer:
    """Writes the folder of a checkpoint whose blocks have, while they are open, only the experts that stay."""

    def __init__(self, checkpoint: Checkpoint, folder: Path) -> None:
        self.checkpoint, self.folder = checkpoint, folder
        self.before, self.after = self._count(), 0
        self._files = Shards(folder, "model")

    def write_block(self, index: int) -> None:
        """See `Smaller.write_block`."""
        for key, tensor in self.checkpoint.block_weights(index).items():
            self._files.add(key, tensor)
        self.after = self._count(index) or self.after

    def close(self) -> dict[str, Any]:
        """See `Smaller.close`."""
        _finish(self.checkpoint, self.folder, self._files, self._config)
        return {"was": {"experts": self.before}, "is": {"experts": self.after}}

    def _config(self, config: dict[str, Any]) -> None:
        """ValueError if no entry says how many experts there are."""
        known = [name for name in COUNTS if config.get(name) == self.before]
        if not known:
            raise ValueError(f"config.json has none of {', '.join(COUNTS)} with {self.before} experts in it")
        config |= dict.fromkeys(known, self.after)

    def _count(self, *blocks: int) -> int:
        """Experts of a mixture in some blocks, or in all."""
        for index in blocks or range(len(self.checkpoint.blocks)):
            for experts in packed_experts(self.checkpoint.blocks[index]).values():
                return experts.count
        return 0


class StreamTrimmer:
    """Writes the folder of a checkpoint whose residual stream is narrower already than the `before` it had."""

    def __init__(self, checkpoint: Checkpoint, folder: Path, *, before: int) -> None:
        self.checkpoint, self.folder, self.before = checkpoint, folder, before
        checkpoint.copy_to(folder)

    def write_block(self, index: int) -> None:
        """See `Smaller.write_block`."""
        self.checkpoint.write_block(index, self.folder)

    def close(self) -> dict[str, Any]:
        """See `Smaller.close`."""
        self.checkpoint.write_head(self.folder)
        embeddings: Any = self.checkpoint.model.get_input_embeddings()
        return {"was": {"hidden_size": self.before}, "is": {"hidden_size": embeddings.weight.shape[1]}}


def _finish(checkpoint: Checkpoint, folder: Path, files: Shards, change: Callable[[dict[str, Any]], None]) -> None:
    """Write what lies around the blocks, the index, and the configuration; `change` mends that of the decoder."""
    checkpoint.copy_settings(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for key, tensor in chain(checkpoint.around(), checkpoint.unused() if "text_config" in config else ()):
        files.add(key, tensor)
    files.close()
    change(config.get("text_config", config))
    file.write_text(json.dumps(config, indent=2))


def _rows(groups: Tensor, size: int) -> Tensor:
    """The places of all members of some groups."""
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()
