"""Packed models as transformers' models: linear layers that our kernels multiply, decoders that need fewer steps.

Between its products a token of a small model spends as long as in them, in fifty small steps a block, so decoders of
the families in `FAST` take a token of each row through all blocks in one; whatever else they are given goes the way of
transformers.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from secateurs import kernels
from secateurs.artifacts import read_json
from secateurs.checkpoint import compute_buffers, weight_files
from secateurs.engines.hf import GROW, Buffer
from secateurs.kernels import blocks as kernel
from secateurs.kernels.blocks import Block
from secateurs.linalg import all_finite
from secateurs.models import cannot_be_loaded, name_of
from secateurs.packed import RECORD, SCHEMA, STEM, VERSION, PackedMatrix

FEW = 16  # vectors up to which a product reads packed weights; more are worth making the matrix dense for a while


class PackedLinear(nn.Module):
    """A linear layer with a packed matrix, whose type is its format: `to` only moves it. Differentiable it is not."""

    bias: nn.Parameter | None

    def __init__(self, matrix: PackedMatrix, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.matrix = matrix
        self.register_parameter("bias", bias)
        self.in_features, self.out_features = matrix.d_in, matrix.rows

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        out = self.matrix.multiply(flat) if flat.shape[0] <= FEW else flat @ self.matrix.dense().to(x.dtype).T
        out = out if self.bias is None else out + self.bias
        return out.view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        self.matrix = self.matrix.to(fn(torch.empty(0, device=self.matrix.device)).device)
        return super()._apply(fn, recurse)


class PackedEmbedding(nn.Module):
    """An embedding in the type it is stored in, which gives `dtype`: `to` moves the one and changes the other."""

    def __init__(self, weight: Tensor, scale: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.table, self.scale, self.dtype = weight, scale, dtype

    def forward(self, ids: Tensor) -> Tensor:
        rows = nn.functional.embedding(ids, self.table).to(self.dtype)
        return rows if self.scale == 1 else rows * self.scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedEmbedding":
        like = fn(torch.empty(0, dtype=self.dtype, device=self.table.device))
        self.table, self.dtype = self.table.to(like.device), like.dtype
        return super()._apply(fn, recurse)


class Roomy(DynamicLayer):
    """A layer of a cache with room after its last token, so that one more does not copy all of them."""

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        vars(self).update(vars(layer))
        self.store: list[Tensor] = []
        self.shown: tuple[Any, Any] = None, None
        """What it last made of the store: keys and values that are others were put there since."""

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, which gets a store of its own."""
        return vars(self) | {"store": [], "shown": (None, None)}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        begin, old, new = self.get_seq_length(), (self.keys, self.values), (key_states, value_states)
        if not begin or self.keys.shape[:2] != key_states.shape[:2]:  # type: ignore[union-attr]
            return super().update(*new)  # which begins, or says what is wrong
        end = begin + key_states.shape[2]
        if not self._has_room(end, new):
            self.store = []
            types = [torch.promote_types(one.dtype, of.dtype) for one, of in zip(new, old, strict=True)]  # type: ignore[union-attr]
            sizes = [(*one.shape[:2], end + GROW, one.shape[3]) for one in new]
            store = [one.new_empty(size, dtype=kind) for one, size, kind in zip(new, sizes, types, strict=True)]
            for stored, one in zip(store, old, strict=True):
                stored[:, :, :begin] = one  # type: ignore[assignment]
            self.store = store
        for stored, one in zip(self.store, new, strict=True):
            stored[:, :, begin:end] = one
        self.keys, self.values = self.shown = self.store[0][:, :, :end], self.store[1][:, :, :end]
        return self.shown

    def _has_room(self, end: int, new: tuple[Tensor, Tensor]) -> bool:
        return (
            self.keys is self.shown[0]
            and self.values is self.shown[1]
            and all(end <= stored.shape[2] for stored in self.store)
            and all(torch.promote_types(s.dtype, one.dtype) == s.dtype for s, one in zip(self.store, new, strict=True))
            and not (self.store[0].is_inference() and not torch.is_inference_mode_enabled())
        )


class FastModel:
    """A decoder that takes one token of each of a few rows through all of its blocks in one call.

    What is unusual goes its family's way.
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
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPast:
        keeps = self.config.use_cache if use_cache is None else use_cache
        cache = DynamicCache(config=self.config) if keeps and past_key_values is None else past_key_values
        out = None
        if (
            keeps
            and not self.training
            and inputs_embeds is None
            and all(value is None or value is False for value in others.values())
            and "return_dict" not in others
        ):
            out = self._in_one_call(input_ids, attention_mask, position_ids, cache)
        if out is not None:
            return BaseModelOutputWithPast(last_hidden_state=self.norm(out), past_key_values=cache)
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **others,
        )

    def _in_one_call(
        self, ids: Tensor | None, mask: Any, positions: Tensor | None, cache: Any
    ) -> Float[Tensor, "batch 1 width"] | None:
        """What the blocks make of a token a row; None, and nothing is changed, if something is not as it mostly is."""
        if ids is None or ids.shape[1] != 1 or not 0 < len(ids) <= FEW or type(cache) not in (Cache, DynamicCache):
            return None
        rows, past = len(ids), cache.get_seq_length()
        usual = (
            self.config._attn_implementation == "sdpa"
            and not (self.config.output_attentions or self.config.output_hidden_states)
            and not torch.is_autocast_enabled("cpu")
            and (mask is None or (isinstance(mask, Tensor) and mask.shape == (rows, past + 1)))
            and (positions is None or positions.shape in ((1, 1), (rows, 1)))
            and not cache.offloading
            and len(cache.layers) == len(self.layers)
            and all(type(one) in IN_PLACE and one.get_seq_length() == past for one in cache.layers)
            and all(one.keys is None or one.keys.ndim < 4 or len(one.keys) == rows for one in cache.layers)
        )
        blocks = [block for layer in self.layers if (block := _block(layer))] if usual else []
        if len(blocks) < len(self.layers):
            return None
        x = self.embed_tokens(ids)
        angles = self.rotary_emb(x, torch.full((1, 1), past, device=x.device) if positions is None else positions)
        if not all(_plain(one) for one in (x, *angles)) or angles[0].shape[2] != self.layers[0].self_attn.head_dim:
            return None
        cache.layers[:] = [Roomy(one) if type(one) is DynamicLayer else one for one in cache.layers]
        blank = x.new_empty(rows, self.config.num_key_value_heads, 1, angles[0].shape[2])
        places = [layer.self_attn.layer_idx for layer in self.layers]
        stored = [cache.update(blank, blank, at) for at in places]  # written when they are known
        seen = None if mask is None or mask.all() else mask.bool().contiguous()
        x = x[:, 0].clone()
        kernel.run(x, blocks, stored, angles, seen)
        return x[:, None]


class FastLlamaModel(FastModel, llama.LlamaModel): ...


class FastMistralModel(FastModel, mistral.MistralModel): ...


class FastQwen2Model(FastModel, qwen2.Qwen2Model): ...


class FastQwen3Model(FastModel, qwen3.Qwen3Model): ...


FAST = {
    llama.LlamaModel: FastLlamaModel,
    mistral.MistralModel: FastMistralModel,
    qwen2.Qwen2Model: FastQwen2Model,
    qwen3.Qwen3Model: FastQwen3Model,
}
PARTS = {  # of blocks that C knows
    llama.LlamaDecoderLayer: (llama.LlamaAttention, llama.LlamaMLP, llama.LlamaRMSNorm),
    mistral.MistralDecoderLayer: (mistral.MistralAttention, mistral.MistralMLP, mistral.MistralRMSNorm),
    qwen2.Qwen2DecoderLayer: (qwen2.Qwen2Attention, qwen2.Qwen2MLP, qwen2.Qwen2RMSNorm),
    qwen3.Qwen3DecoderLayer: (qwen3.Qwen3Attention, qwen3.Qwen3MLP, qwen3.Qwen3RMSNorm),
}
IN_PLACE = DynamicLayer, DynamicSlidingWindowLayer, Buffer, Roomy
"""Layers of caches that keep what their `update` returns, and so what is written there."""


def _block(layer: Any) -> Block | None:
    """A block as C takes it; None if there is something that C does not know. Asked of every block for every token."""
    own = layer._modules  # what a module's own lookup takes is ten times as long
    attention, mlp = own.get("self_attn"), own.get("mlp")
    norms = [own.get("input_layernorm"), own.get("post_attention_layernorm")]
    if PARTS.get(type(layer)) != (type(attention), type(mlp), type(norms[0])):
        return None
    of_attention, of_mlp = attention._modules, mlp._modules
    linears = [of_attention[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    linears += [of_mlp[name] for name in ("gate_proj", "up_proj", "down_proj")]
    if "q_norm" in of_attention:
        norms += [of_attention["q_norm"], of_attention["k_norm"]]
    if (
        type(of_mlp["act_fn"]) is not SiLUActivation
        or any(type(linear) is not PackedLinear for linear in linears)
        or any(type(norm) is not type(norms[0]) for norm in norms)
        or any(_changed(module) for module in (layer, attention, mlp, of_mlp["act_fn"], *linears, *norms))
    ):
        return None
    weights, biases = [norm._parameters["weight"] for norm in norms], [linear._parameters["bias"] for linear in linears]
    if not all(one is None or _plain(one) for one in weights + biases):
        return None
    epsilons = [norm.variance_epsilon for norm in norms[:3]]
    of = attention.config if type(attention) is mistral.MistralAttention else attention
    window = getattr(of, "sliding_window", None)
    return Block([linear.matrix.stored for linear in linears], biases, weights, epsilons, attention.scaling, window)


def _changed(module: Any) -> bool:
    """Whether something is to happen when it is called that its class does not say."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


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
            matrix = PackedMatrix(rows, d_in, parts.get(name, {}))
            matrix.check(name)
            linear = model.get_submodule(name)
            if (linear.out_features, linear.in_features) != (rows, d_in):
                raise ValueError(f"{name} is {rows} x {d_in}, the model's {linear.out_features} x {linear.in_features}")
            if matrix.layout == "half" and place.type != "cpu" and not expand:
                matrix = matrix.with_bitmap()
            _replace(model, name, _linear(matrix.to(place), linear.bias, dtype, expand))
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        name = name_of(model, embedding)
        _check_fits(f"{name}.weight", rest.get(f"{name}.weight"), embedding.weight)
        table = rest[f"{name}.weight"].to(place)
        if type(embedding) is nn.Embedding or hasattr(embedding, "scalar_embed_scale"):
            rest.pop(f"{name}.weight")  # others do more than look rows up (XGLM's scale them), and stay what they are
            _replace(model, name, PackedEmbedding(table, float(getattr(embedding, "scalar_embed_scale", 1.0)), dtype))
        if (of_head := name_of(model, head)) not in record["matrices"]:  # tied, and so not stored again
            tied = PackedMatrix(len(table), table.shape[1], {"weight": table.to(torch.bfloat16)})
            _replace(model, of_head, _linear(tied, head.bias, dtype, expand))
        wanted = model.state_dict()
        for key in (*rest, *(key for key, tensor in wanted.items() if tensor.is_meta)):
            _check_fits(key, rest.get(key), wanted.get(key))
        model.load_state_dict({key: tensor.to(place, dtype) for key, tensor in rest.items()}, strict=False, assign=True)
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


def _linear(matrix: PackedMatrix, bias: nn.Parameter | None, dtype: torch.dtype, expand: bool) -> nn.Module:
    """With the model's own bias, which is empty until all that is not packed is loaded."""
    if not expand:
        return PackedLinear(matrix, bias).requires_grad_(False)
    dense: Any = nn.Linear(matrix.d_in, matrix.rows, device="meta")
    dense.weight, dense.bias = nn.Parameter(matrix.dense().to(dtype)), bias
    return dense.requires_grad_(False)


def _check_fits(key: str, found: Tensor | None, wanted: Tensor | None) -> None:
    """ValueError unless a tensor is there, the model has one of that name, and they are alike in shape and kind."""
    if found is None:
        raise ValueError(f"there is no {key}")
    if wanted is None:
        raise ValueError(f"{key} is not the model's")
    if (found.shape, found.is_floating_point()) != (wanted.shape, wanted.is_floating_point()):
        both = [f"{tuple(one.shape)} in {str(one.dtype).removeprefix('torch.')}" for one in (found, wanted)]
        raise ValueError(f"{key} is {both[0]}, the model's {both[1]}")


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for name in weight_files(folder, STEM):
        with safe_open(folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(key)
                if tensor.is_floating_point() and not all_finite(tensor):
                    raise ValueError(f"{key} in {name} holds numbers that are not finite")
                yield key, tensor
