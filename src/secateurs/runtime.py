"""Packed models as transformers' models: linear layers that our kernels multiply, decoders that need fewer steps.

Between its products a token of a small model spends as long as in them, in fifty small steps a block, so decoders of
the families in `FAST` take a token of each row through all blocks in one; whatever else they are given goes the way of
transformers.
"""

import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3Model

from secateurs import kernels
from secateurs.artifacts import read_json
from secateurs.checkpoint import compute_buffers, weight_files
from secateurs.engines.hf import GROW, Buffer
from secateurs.kernels import blocks as kernel
from secateurs.kernels.blocks import Block
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


class Roomy(DynamicLayer):
    """A layer of a cache with room after its last token, so that one more does not copy all of them."""

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        vars(self).update(vars(layer))
        self.store: list[Tensor] = []
        self.shown: tuple[Any, Any] = None, None
        """What it last made of the store: keys and values that are others were put there since."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin, more = self.get_seq_length(), (key_states, value_states)
        end = begin + key_states.shape[2]
        store, known = self.store, self.keys is self.shown[0] and self.values is self.shown[1]
        if not known or end > store[0].shape[2] or len(key_states) != len(store[0]):
            store = [one.new_empty(*one.shape[:2], end + GROW, one.shape[3]) for one in more]
            old: Any = (self.keys, self.values) if begin else ()
            for stored, one in zip(store, old, strict=begin > 0):
                stored[:, :, :begin] = one
        for stored, one in zip(store, more, strict=True):
            stored[:, :, begin:end] = one
        self.store = store
        self.keys, self.values = self.shown = store[0][:, :, :end], store[1][:, :, :end]
        return self.shown


class FastModel:
    """A decoder that takes one token of each of a few rows through all of its blocks in one call.

    What is unusual goes its family's way. Forward hooks of its blocks are not called for single tokens.
    """

    training: bool
    config: Any
    layers: Any
    norm: Any
    rotary_emb: Any
    embed_tokens: Any

    def forward(
        self,
        input_ids: Int[Tensor, "batch tokens"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPast:
        keeps = self.config.use_cache if use_cache is None else use_cache
        cache = DynamicCache(config=self.config) if keeps and past_key_values is None else past_key_values
        rows, tokens = (0, 0) if input_ids is None else input_ids.shape
        usual = (
            keeps
            and not self.training
            and tokens == 1
            and 0 < rows <= FEW
            and inputs_embeds is None
            and all(value is None or value is False for value in others.values())
            and "return_dict" not in others
            and self.config._attn_implementation == "sdpa"
            and not (self.config.output_attentions or self.config.output_hidden_states)
            and len(cache.layers) == len(self.layers)
            and all(type(layer) in IN_PLACE for layer in cache.layers)
        )
        past = cache.get_seq_length() if usual else 0
        if attention_mask is not None and usual:
            usual = isinstance(attention_mask, Tensor) and attention_mask.shape == (rows, past + 1)
        blocks = [block for layer in self.layers if (block := _block(layer))] if usual else []
        if len(blocks) < len(self.layers):
            return super().forward(  # type: ignore[misc]
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **others,
            )
        x = self.embed_tokens(input_ids)
        angles = self.rotary_emb(x, torch.full((1, 1), past) if position_ids is None else position_ids)
        cache.layers[:] = [Roomy(layer) if type(layer) is DynamicLayer else layer for layer in cache.layers]
        blank = x.new_empty(rows, self.config.num_key_value_heads, 1, angles[0].shape[2])
        stored = [cache.update(blank, blank, at) for at in range(len(blocks))]  # written when they are known
        seen = None if attention_mask is None or attention_mask.all() else attention_mask.bool()
        x = x[:, 0]
        kernel.run(x, blocks, stored, angles, seen)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x[:, None]), past_key_values=cache)


class FastLlamaModel(FastModel, LlamaModel): ...


class FastMistralModel(FastModel, MistralModel): ...


class FastQwen2Model(FastModel, Qwen2Model): ...


class FastQwen3Model(FastModel, Qwen3Model): ...


FAST = {
    LlamaModel: FastLlamaModel,
    MistralModel: FastMistralModel,
    Qwen2Model: FastQwen2Model,
    Qwen3Model: FastQwen3Model,
}
BLOCKS = LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer
IN_PLACE = DynamicLayer, DynamicSlidingWindowLayer, Buffer, Roomy
"""Layers of caches that keep what their `update` returns, and so what is written there."""


def _block(layer: Any) -> Block | None:
    """A block as C takes it; None if there is something that C does not know. Asked of every block for every token."""
    if type(layer) not in BLOCKS:
        return None
    own = layer._modules  # what a module's own lookup takes is ten times as long
    attention, of_mlp = own["self_attn"], own["mlp"]._modules
    of_attention = attention._modules
    linears = [of_attention[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    linears += [of_mlp[name] for name in ("gate_proj", "up_proj", "down_proj")]
    norms = [own["input_layernorm"], own["post_attention_layernorm"]]
    if "q_norm" in of_attention:
        norms += [of_attention["q_norm"], of_attention["k_norm"]]
    if type(of_mlp["act_fn"]) is not SiLUActivation or any(type(linear) is not PackedLinear for linear in linears):
        return None
    weights, biases = [norm._parameters["weight"] for norm in norms], [linear.bias for linear in linears]
    if not all(one is None or _plain(one) for one in weights + biases):
        return None
    epsilons = [norm.variance_epsilon for norm in norms[:3]]
    of = attention.config if type(layer) is MistralDecoderLayer else attention
    window = getattr(of, "sliding_window", None)
    return Block([linear.matrix.stored for linear in linears], biases, weights, epsilons, attention.scaling, window)


def _plain(tensor: Tensor) -> bool:
    """Whether C can take it for what it knows: float32, one after the other in this memory."""
    return tensor.dtype is torch.float32 and tensor.is_cpu and tensor.is_contiguous()


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
            if place.type == "cpu" and not expand and type(model.base_model) in FAST:
                setattr(model, model.base_model_prefix, FAST[type(model.base_model)](model.config))
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
