"""Model families as data: where the decoder blocks are, which matrices can be pruned, what never is. Loads models."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

BUNDLED = "bundled"  # the name of the tiny reasoner that ships with the package

# Submodules of a decoder block whose weights are never pruned: they route, or say what a linear attention forgets.
ROUTERS = re.compile(
    r"(^|\.)(\w*router|gate|shared_expert_gate|forget_gate|in_proj_(ba|b|a)|(linear_attn|self_attn)\.[ab]_proj)(\.|$)"
)


@dataclass(frozen=True, eq=False)
class Matrix:
    """One prunable weight [d_out, d_in]: a linear's, or one expert's slice of a packed 3-D parameter.

    Known by where it is, not by its tensor: a block that is read from disk anew has new ones.
    """

    name: str
    module: nn.Module
    attribute: str = "weight"
    expert: int | None = None
    transposed: bool = False
    """Whether the parameter is [d_in, d_out]."""

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter it is, or is part of."""
        return getattr(self.module, self.attribute)

    @property
    def weight(self) -> Tensor:
        """A view of the weight, [d_out, d_in]; writing to it writes to the model."""
        return self.part_of(self.parameter.data)

    def part_of(self, whole: Tensor) -> Tensor:
        """Its place [d_out, d_in] in a tensor shaped like the parameter, as a view."""
        part = whole if self.expert is None else whole[self.expert]
        return part.T if self.transposed else part


def model_path(name: str) -> str:
    """What transformers is given for `name`: the bundled reasoner's folder, a folder, or a hub id as it is."""
    return str(files("secateurs") / "assets" / "reasoner") if name == BUNDLED else name


QUANTISED = ("quantization_config", "compression_config", "quantization")  # in config.json; the last one is MLX's


def load_model(name: str, *, device: str = "cpu", trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal language model `name` in its checkpoint's dtype, in eval mode. Safetensors only.

    ValueError in one sentence for a missing folder, a damaged or quantised checkpoint, a device that is not there.
    """
    path = model_path(name)
    check_folder(name, path)
    try:
        options: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": trust_remote_code}
        both: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto", output_loading_info=True, **options)
        model, found = both
        if found["missing_keys"]:  # which transformers would make up
            raise ValueError(f"the checkpoint has no {min(found['missing_keys'])}")
        return model.to(device).eval()
    except Exception as error:  # transformers and safetensors raise many types for the same user mistake
        raise cannot_be_loaded(f"model `{name}`", error) from error


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of `name`. ValueError in one sentence if there is none."""
    path = model_path(name)
    check_folder(name, path)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # which transformers makes up for a Qwen or Gemma
            raise ValueError("it knows no words, as where its files are missing")
        return tokenizer
    except Exception as error:  # as above
        raise cannot_be_loaded(f"the tokenizer of `{name}`", error) from error


def cannot_be_loaded(what: str, error: Exception) -> ValueError:
    """Another library's reason, which may be a page long, in one sentence."""
    return ValueError(f"{what} cannot be loaded: {' '.join(str(error).split())[:300]}")


def check_folder(name: str, path: str) -> None:
    """ValueError for a path that is no folder, a folder that is no checkpoint, or a quantised checkpoint."""
    folder = Path(path)
    if not folder.exists():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise ValueError(f"model `{name}`: no such folder")
        return  # a hub id, whose files are looked at once they are here
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"model `{name}`: the folder has no config.json, so it is not a Hugging Face checkpoint")
    try:
        settings = json.loads(config.read_text())
    except ValueError as error:
        raise ValueError(f"model `{name}`: config.json is not valid JSON ({error})") from None
    if not isinstance(settings, dict):
        raise ValueError(f"model `{name}`: config.json holds no table of settings")
    tables = [settings, settings.get("text_config") or {}]
    found = [table[key] for table in tables for key in QUANTISED if table.get(key)]
    if found or (folder / "hf_quant_config.json").exists():
        method = found[0].get("quant_method", "unknown") if found and isinstance(found[0], dict) else "unknown"
        raise ValueError(f"model `{name}` is quantised ({method}), and secateurs reads dense weights: use the original")


def window(model: PreTrainedModel) -> int:
    """How many tokens the narrowest attention of a model sees; 0 if all see everything."""
    config: Any = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and not {"sliding_attention", "chunked_attention"} & set(kinds):
        return 0
    sizes = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min((size for size in sizes if size), default=0)


def decoder_blocks(model: PreTrainedModel) -> tuple[str, Sequence[nn.Module]]:
    """The decoder blocks in order, and the name of the list that holds them. ValueError if there is no such list."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    candidates = [(name, m) for name, m in lists if "vision" not in name and "encoder" not in name.split(".")]
    if not candidates:
        raise ValueError(f"{type(model).__name__} has no list of {count} decoder blocks; secateurs cannot prune it")
    return min(candidates, key=lambda item: item[0].count("."))  # type: ignore[return-value]


def computes_in(model: PreTrainedModel) -> torch.dtype:
    """The type of the blocks, which that of embeddings may differ from."""
    return next(decoder_blocks(model)[1][0].parameters()).dtype


def linears(block: nn.Module, *, routers: bool = False) -> dict[str, nn.Linear]:
    """The linears of a block that may be pruned, by name within the block; with `routers` those that may not too."""
    found = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in found.items() if routers or not ROUTERS.search(name)}


@dataclass(frozen=True)
class Experts:
    """A module that holds all its experts in two 3-D parameters: [E, d_up, d], and `down_proj` [E, d, d_ff], or each
    expert transposed. d_up is d_ff, or twice that where a gate goes with it."""

    module: Any
    up: str
    transposed: bool

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.module.down_proj)

    def inner(self, expert: int, x: Tensor) -> Tensor:
        """What `down_proj` receives for the inputs `x` [tokens, d] of an expert [tokens, d_ff]."""
        weight = getattr(self.module, self.up)[expert]
        bias = getattr(self.module, f"{self.up}_bias", None)
        out = nn.functional.linear(x, weight.T if self.transposed else weight, None if bias is None else bias[expert])
        if self.up == "up_proj":
            return self.module.act_fn(out)
        if hasattr(self.module, "_apply_gate"):
            return self.module._apply_gate(out)
        gate, up = out.chunk(2, dim=-1)
        return self.module.act_fn(gate) * up

    def run(self, expert: int, x: Tensor) -> Tensor:
        """What an expert makes of the inputs `x` [tokens, d], before it is weighted [tokens, d]."""
        weight, bias = self.module.down_proj[expert], getattr(self.module, "down_proj_bias", None)
        inner = self.inner(expert, x)
        return nn.functional.linear(
            inner, weight.T if self.transposed else weight, None if bias is None else bias[expert]
        )


def packed_experts(block: nn.Module) -> dict[str, Experts]:
    """Modules of a block that hold all their experts in 3-D parameters, by name within the block.

    ValueError for a packed layout with other shapes: it would be left dense without a word.
    """
    found = {}
    for name, module in block.named_modules():
        packed = {key: tuple(p.shape) for key, p in module.named_parameters(recurse=False) if p.dim() == 3}
        if not packed or isinstance(module, nn.Conv1d):
            continue
        up = "gate_up_proj" if "gate_up_proj" in packed else "up_proj"
        transposed = bool(getattr(module, "is_transposed", False))
        if set(packed) == {up, "down_proj"}:
            turned = slice(None, 0, -1) if transposed else slice(1, None)
            (d_up, d), (d_out, d_ff) = packed[up][turned], packed["down_proj"][turned]
            if d_out == d and d_up == (2 if up == "gate_up_proj" else 1) * d_ff:
                found[name] = Experts(module, up, transposed)
                continue
        shapes = ", ".join(f"{key} {shape}" for key, shape in packed.items())
        raise ValueError(f"{type(module).__name__} packs its experts in a layout secateurs does not know: {shapes}")
    return found


@dataclass(frozen=True, eq=False)
class Mixture:
    """A module of a block with a router and experts to choose from."""

    name: str
    """Within the block."""
    module: nn.Module
    router: nn.Module
    experts: Experts

    @property
    def groups(self) -> int:
        """Runs of experts that the router chooses among first (DeepSeek-V3): each keeps as many."""
        return int(getattr(self.router, "num_group", 1) or 1)

    @property
    def of_group(self) -> int:
        """Experts of each of those groups."""
        return self.experts.count // self.groups

    @property
    def size(self) -> int:
        """Parameters of an expert."""
        return sum(p[0].numel() for p in self.experts.module.parameters(recurse=False))

    @property
    def parts(self) -> list[tuple[nn.Module, dict[str, Tensor]]]:
        """The parameters and buffers that have a row for each expert, by the module that holds them."""
        count, holders = self.experts.count, (self.router, self.experts.module, self.module)
        return [(holder, {name: t for name, t in _own(holder) if t.shape[:1] == (count,)}) for holder in holders]


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))


def mixtures(block: nn.Module) -> list[Mixture]:
    """Those of a block whose experts are packed. ValueError where it is not seen what belongs to each expert."""
    found = []
    for name, experts in packed_experts(block).items():
        parent = name.rpartition(".")[0]
        module = block.get_submodule(parent)
        others = [child for child in module.children() if child is not experts.module]
        routers = [child for child in others if getattr(child, "num_experts", 0) == experts.count]
        hidden = [  # what has a number for each expert, and is in none of the places where `parts` looks
            one for child in others for inner in child.modules() if inner not in routers
            for _, one in _own(inner) if one.numel() == experts.count or (child in routers and inner is not child)
        ]  # fmt: skip
        if len(routers) != 1 or hidden:
            raise ValueError(f"{type(module).__name__} has no router that secateurs knows: it cannot lose experts")
        found.append(Mixture(parent, module, routers[0], experts))
    return found


def chosen(names: Sequence[str], targets: Sequence[str], ignore: Sequence[str]) -> list[str]:
    """The names that match a target (all when there is none) and no ignore: glob patterns, or regular ones after `re:`.

    ValueError names a pattern that matches nothing: a typo there would silently prune something else than asked.
    """

    known = set(names)

    def matches(pattern: str) -> set[str]:
        if pattern in known:  # a cut names thousands of experts
            return {pattern}
        if pattern.startswith("re:"):
            try:
                return {name for name in names if re.search(pattern[3:], name)}
            except re.error as error:
                raise ValueError(f"`{pattern}` holds no regular expression: {error}") from None
        return {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")}

    for pattern in (*targets, *ignore):
        if not matches(pattern):
            example = names[0] if names else "nothing"
            raise ValueError(f"`{pattern}` matches no prunable layer; names look like `{example}`")
    kept = set().union(*map(matches, targets)) if targets else set(names)
    kept -= set().union(*map(matches, ignore)) if ignore else set()
    return [name for name in names if name in kept]


def name_of(model: nn.Module, wanted: nn.Module) -> str:
    """What a module of a model is called."""
    return next(name for name, module in model.named_modules() if module is wanted)


def decoder(model: PreTrainedModel) -> nn.Module:
    """The part that turns ids into final hidden states, without lm_head."""
    return model.get_decoder()
