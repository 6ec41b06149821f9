"""Packed models as transformers' models: linear layers that our kernels multiply, blocks that need fewer steps.

Between its products a token of a small model spends as long as in them, in fifty small steps a block, so blocks of the
families in `FAST` take a token of each row in as few as they can; whatever else they are given goes the way of
transformers.
"""

import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from secateurs import kernels
from secateurs.artifacts import read_json
from secateurs.checkpoint import compute_buffers, weight_files
from secateurs.kernels import block
from secateurs.models import cannot_be_loaded, name_of
from secateurs.packed import RECORD, SCHEMA, STEM, VERSION, PackedMatrix

FEW = 16  # vectors up to which a product reads packed weights; more are worth making the matrix dense for a while


class PackedLinear(nn.Module):
    """A linear layer with a packed matrix. Differentiable it is not."""

    def __init__(self, matrix: PackedMatrix, bias: Tensor | None) -> None:
        super().__init__()
        self.matrix, self.bias = matrix, bias
        self.in_features, self.out_features = matrix.d_in, matrix.rows

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        out = self.matrix.multiply(flat) if flat.shape[0] <= FEW else flat @ self.matrix.dense().to(x.dtype).T
        out = out if self.bias is None else out + self.bias
        return out.view(*x.shape[:-1], self.out_features)


class PackedEmbedding(nn.Module):
    """An embedding in the type it is stored in, which gives `dtype`."""

    def __init__(self, weight: Tensor, scale: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.table, self.scale, self.dtype = weight, scale, dtype

    def forward(self, ids: Tensor) -> Tensor:
        rows = nn.functional.embedding(ids, self.table).to(self.dtype)
        return rows if self.scale == 1 else rows * self.scale


class FastBlock:
    """A decoder block that takes one token of each of a few rows in three calls; what is unusual goes its family's way.

    Forward hooks inside it are not called for single tokens.
    """

    training: bool
    self_attn: Any
    mlp: Any
    input_layernorm: Any
    post_attention_layernorm: Any

    def forward(
        self,
        hidden_states: Float[Tensor, "batch tokens width"],
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: Any = None,
        **others: Any,
    ) -> Float[Tensor, "batch tokens width"]:
        attention, mlp = self.self_attn, self.mlp
        layers = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
        layers += mlp.gate_proj, mlp.up_proj, mlp.down_proj
        norms = [self.input_layernorm, self.post_attention_layernorm]
        if hasattr(attention, "q_norm"):
            norms += [attention.q_norm, attention.k_norm]
        batch, tokens, _ = hidden_states.shape
        usual = (
            tokens == 1
            and 0 < batch <= FEW
            and not self.training
            and (attention_mask is None or attention_mask.shape[1:3] == (1, 1))
            and attention.config._attn_implementation == "sdpa"
            and all(type(layer) is PackedLinear for layer in layers)
            and type(mlp.act_fn) is SiLUActivation
            and position_embeddings[0].shape[2] == attention.head_dim
            and all(value is None or isinstance(value, bool) for value in others.values())
            and _plain(hidden_states, *position_embeddings)
            and _plain(*(norm.weight for norm in norms), *(layer.bias for layer in layers if layer.bias is not None))
        )
        if not usual:
            state = (attention_mask, position_ids, past_key_values, use_cache, position_embeddings)
            return super().forward(hidden_states, *state, **others)  # type: ignore[misc]
        x = hidden_states[:, 0]
        heads = [layer.out_features // attention.head_dim for layer in layers[:3]]
        stored = [(layer.matrix.stored, layer.bias) for layer in layers]
        first, second, *of_heads = ((norm.weight, norm.variance_epsilon) for norm in norms)
        head_norms = (of_heads[0][0], *of_heads[1]) if of_heads else None
        projected = block.before_attention(x, first, stored[:3], head_norms, position_embeddings, heads)
        queries, keys, values = projected.split(heads, 1)
        keys, values = keys[:, :, None], values[:, :, None]
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, attention.layer_idx)
        seen = block.attended(queries, keys, values, attention_mask, attention.scaling)
        return block.after_attention(x, seen, stored[3], second, *stored[4:])[:, None]


class FastLlamaBlock(FastBlock, LlamaDecoderLayer): ...


class FastMistralBlock(FastBlock, MistralDecoderLayer): ...


class FastQwen2Block(FastBlock, Qwen2DecoderLayer): ...


class FastQwen3Block(FastBlock, Qwen3DecoderLayer): ...


FAST = {
    LlamaDecoderLayer: FastLlamaBlock,
    MistralDecoderLayer: FastMistralBlock,
    Qwen2DecoderLayer: FastQwen2Block,
    Qwen3DecoderLayer: FastQwen3Block,
}


def _plain(*tensors: Tensor) -> bool:
    """Whether C can take them for what it knows: float32, one after the other in this memory."""
    return all(one.dtype == torch.float32 and one.device.type == "cpu" and one.is_contiguous() for one in tensors)


def load_packed(path: str | Path, device: str = "cpu", *, expand: bool | None = None) -> PreTrainedModel:
    """The model in a folder that `pack` wrote: `generate` and all of transformers but `save_pretrained` work on it.

    It computes in float32 on a CPU, elsewhere in bfloat16. With `expand` its linear layers are made dense: the same
    results (but for int4, where kernels round vectors) with more memory, slower on a CPU and faster on a GPU. None
    expands on GPUs, and where there are no kernels.
    ValueError for a folder that is none of ours or is damaged, or to keep packed what no kernel can multiply.
    """
    folder, place = Path(path), torch.device(device)
    if expand is False and not has_kernels(place):
        raise ValueError(f"no kernel multiplies packed matrices on {device} here: leave out expand=False")
    if expand is None:
        expand = place.type != "cpu" or not has_kernels(place)
        if expand and place.type == "cpu":
            warnings.warn(
                "secateurs has no compiled kernels here, so the model is unpacked and no faster than dense: install a "
                "C compiler, then secateurs again",
                stacklevel=2,
            )
    dtype = torch.float32 if place.type == "cpu" else torch.bfloat16
    if not (folder / RECORD).is_file():
        raise ValueError(f"{folder} has no {RECORD}; `secateurs pack` makes such a folder of a pruned model")
    record: Any = read_json(folder / RECORD)
    known = isinstance(record, dict) and (record.get("schema"), record.get("version")) == (SCHEMA, VERSION)
    if not known or not isinstance(record.get("matrices"), dict):
        raise ValueError(f"{folder / RECORD} is not of this version of secateurs: pack the model again")
    try:
        config: Any = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        parts: dict[str, dict[str, Tensor]] = {}
        rest: dict[str, Tensor] = {}
        for key, tensor in _tensors(folder):
            name, _, part = key.rpartition(".")
            if name in record["matrices"] and part != "bias":
                parts.setdefault(name, {})[part] = tensor
            else:
                rest[key] = tensor
        for name, (rows, d_in) in record["matrices"].items():
            matrix = PackedMatrix(rows, d_in, parts[name])
            matrix.check(name)
            linear = model.get_submodule(name)
            if (linear.out_features, linear.in_features) != (rows, d_in):
                raise ValueError(f"{name} is {rows} x {d_in}, the model's {linear.out_features} x {linear.in_features}")
            if matrix.layout == "half" and place.type != "cpu" and not expand:
                matrix = matrix.with_bitmap()
            bias = rest.pop(f"{name}.bias", None)
            bias = None if bias is None else bias.to(place, dtype)
            _replace(model, name, _linear(matrix.to(place), bias, dtype, expand))
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        name = name_of(model, embedding)
        table = rest[f"{name}.weight"].to(place)
        if type(embedding) is nn.Embedding or hasattr(embedding, "scalar_embed_scale"):
            rest.pop(f"{name}.weight")  # others do more than look rows up (XGLM's scale them), and stay what they are
            _replace(model, name, PackedEmbedding(table, float(getattr(embedding, "scalar_embed_scale", 1.0)), dtype))
        if (of_head := name_of(model, head)) not in record["matrices"]:  # tied, and so not stored again
            tied = PackedMatrix(len(table), table.shape[1], {"weight": table.to(torch.bfloat16)})
            _replace(model, of_head, _linear(tied, None, dtype, expand))
        known = model.state_dict()
        if wrong := [key for key, tensor in rest.items() if key not in known or known[key].shape != tensor.shape]:
            raise ValueError(f"{wrong[0]} is not the model's")
        model.load_state_dict({key: tensor.to(place, dtype) for key, tensor in rest.items()}, strict=False, assign=True)
        if absent := [key for key, tensor in model.state_dict().items() if tensor.is_meta]:
            raise ValueError(f"there is no {absent[0]}")
        compute_buffers(model, place)
        if not any(True for _ in model.parameters()):  # OLMo's norms have none, and transformers asks one for its type
            model.register_parameter("of_type", nn.Parameter(torch.empty(0, dtype=dtype, device=place)))
        if place.type == "cpu" and not expand:
            for module in model.modules():
                module.__class__ = FAST.get(type(module), type(module))
        if (folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    except Exception as error:  # transformers and safetensors raise many types for the same damage
        raise cannot_be_loaded(f"packed model `{folder}`", error) from error
    model.save_pretrained = partial(_not_saved, folder)
    return model.eval()


def _not_saved(folder: Path, *_: object, **__: object) -> None:
    raise ValueError(f"a packed model holds no weights that transformers could save: copy its folder, {folder}")


def has_kernels(device: torch.device) -> bool:
    """Whether packed matrices can be multiplied on a device: a CPU with the compiled library, a GPU with triton."""
    return kernels.library() is not None if device.type == "cpu" else kernels.has_triton()


def _linear(matrix: PackedMatrix, bias: Tensor | None, dtype: torch.dtype, expand: bool) -> nn.Module:
    if not expand:
        return PackedLinear(matrix, bias)
    dense = nn.Linear(matrix.d_in, matrix.rows, bias=bias is not None, device="meta")
    dense.weight = nn.Parameter(matrix.dense().to(dtype), requires_grad=False)
    if bias is not None:
        dense.bias = nn.Parameter(bias, requires_grad=False)
    return dense


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for name in weight_files(folder, STEM):
        with safe_open(folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                yield key, file.get_tensor(key)
