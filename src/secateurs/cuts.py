"""Structured cuts: what goes as a whole, so that what is left is a smaller dense model, which is faster everywhere.

A cut is carried out in two steps. The block loop prunes the matrices that write to the residual stream by whole inputs
(`patterns.Columns`): an MLP's neurons go with columns of `down_proj`, heads with columns of `o_proj`, a block with all
columns of both. Then `trim` writes a checkpoint without what nothing reads any more. Experts are not solved for
(`experts`), and a stream gets narrower in directions of its own (`narrow`).
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import nn
from transformers import PreTrainedModel

from secateurs.models import decoder_blocks, linears, mixtures, packed_experts
from secateurs.patterns import Columns

MULTIPLES = (256, 128, 64, 32, 16, 8, 4, 2, 1)  # of neurons; engines like the large ones
CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts")  # experts that a token goes to
ROUNDED_TO = 16  # parts of the neurons, at least, that a multiple leaves to choose from
STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""The matrices of a block by what they receive, each on what those before it give."""
PAIRED_HEADS = ("diffllama",)  # the first half of its heads with the second
# Between their blocks these have nothing but sums, and RMS norms that multiply by their weight.
PLAIN_STREAMS = ("llama", "mistral", "qwen2", "qwen3")


@runtime_checkable
class Cut(Protocol):
    """What is cut, as a fraction `sparsity` of the parameters in the matrices of the decoder blocks, or of experts."""

    sparsity: float

    def patterns(self, model: PreTrainedModel) -> Mapping[str, Columns]:
        """What stays of each matrix that is pruned, by name. ValueError for a model that cannot be cut so."""
        ...


@dataclass(frozen=True)
class Anatomy:
    """A decoder of blocks with one attention and one MLP each, all of the same sizes."""

    prefix: str
    """The name of the list of blocks."""
    blocks: int
    heads: int
    kv_heads: int
    head_dim: int
    d_model: int
    d_ff: int
    gates: int
    """Matrices beside `down_proj` that have a row for each neuron: `up_proj`, and `gate_proj` if there is one."""

    @property
    def in_attention(self) -> int:
        """Parameters of a block's q, k, v and o."""
        return 2 * (self.heads + self.kv_heads) * self.head_dim * self.d_model

    @property
    def in_neuron(self) -> int:
        """Parameters of one neuron."""
        return (1 + self.gates) * self.d_model

    @property
    def in_block(self) -> int:
        """Parameters of a block's matrices."""
        return self.in_attention + self.d_ff * self.in_neuron

    def each(self, part: str) -> list[str]:
        """The matrix of every block that is called so, such as `mlp.down_proj`."""
        return [f"{self.prefix}.{index}.{part}" for index in range(self.blocks)]


def anatomy(model: PreTrainedModel) -> Anatomy:
    """What a model is made of. ValueError for one that is not made as Llama, Mistral and Qwen are."""
    prefix, blocks = decoder_blocks(model)
    config: Any = model.config.get_text_config(decoder=True)
    found = {_sizes(block, config) for block in blocks}
    sizes = found.pop()
    if found or sizes is None:
        instead = "; prune single weights instead" if any(linears(block) for block in blocks) else ""
        raise ValueError(
            f"{type(model).__name__} cannot be cut: every block must have self_attn.q_proj, k_proj, v_proj, o_proj "
            f"and mlp.up_proj, down_proj of the same sizes, and norms that no cut changes{instead}"
        )
    return Anatomy(prefix, len(blocks), *sizes)


def _sizes(block: nn.Module, config: Any) -> tuple[int, int, int, int, int, int] | None:
    shapes = {name: tuple(p.shape) for name, p in block.named_parameters()}
    attention = [shapes.get(f"self_attn.{part}_proj.weight") for part in "qkvo"]
    up, gate, down = (shapes.get(f"mlp.{part}_proj.weight") for part in ("up", "gate", "down"))
    if None in attention or up is None or down is None:
        return None
    q, k, v, o = attention
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    assert q and k and v and o
    head_dim, d_model, d_ff = o[1] // heads, down[0], down[1]
    rows = {heads * head_dim: q[0], kv_heads * head_dim: k[0]}
    if k != v or any(wanted != there for wanted, there in rows.items()) or up != (d_ff, d_model):
        return None
    known = {f"self_attn.{part}_proj" for part in "qkvo"} | {f"mlp.{part}_proj" for part in ("up", "gate", "down")}
    for name, shape in shapes.items():  # a norm over all heads, say, would have to be cut too
        right = [(head_dim,)] if name.startswith("self_attn.") else [(d_model,), (head_dim,)]
        if name.rsplit(".", 1)[0] not in known and shape not in right:
            return None
    return heads, kv_heads, head_dim, d_model, d_ff, 1 if gate is None else 2


@dataclass(frozen=True)
class Width:
    """The same number of MLP neurons goes in every block, and of attention heads if they are to.

    `attention` says what goes there: nothing, as heads cost more than they weigh (`docs/faster.md`); query heads, as
    many of each group that shares keys and values; or whole groups with their keys and values, which makes the cache
    smaller too. Heads come first, as near below `sparsity` as they can; neurons make up the rest, rounded to `multiple`
    (0: the largest power of two up to 256 that leaves sixteen choices). `score` says what a cost is: of a layer's
    "output", of the model's "loss", or what a neuron or head does to that loss by itself, "taylor" (`survey`: both for
    solver obs only, and with the whole model in memory).
    """

    sparsity: float
    attention: Literal["none", "heads", "kv_heads"] = "none"
    multiple: int = 0
    score: Literal["output", "loss", "taylor"] = "output"

    def __post_init__(self):
        _check_sparsity(self.sparsity)
        _check_multiple(self.multiple)

    def __str__(self) -> str:
        what = {"none": "", "heads": " heads too", "kv_heads": " kv-heads too"}[self.attention]
        return f"width {100 * self.sparsity:.6g}%{what}" + ("" if self.score == "output" else f" by {self.score}")

    def kept(self, body: Anatomy) -> tuple[int, int, int]:
        """Query heads of each group of keys and values, such groups, and neurons. ValueError if nothing would stay."""
        group, heads, kv_heads = body.heads // body.kv_heads, body.heads // body.kv_heads, body.kv_heads
        removed = 0
        if self.attention == "heads":
            heads = group - self._gone(group, f"the {group} heads of a group" if group > 1 else "a group's only head")
            removed = 2 * (group - heads) * body.kv_heads * body.head_dim * body.d_model
        elif self.attention == "kv_heads":
            kv_heads = body.kv_heads - self._gone(body.kv_heads, f"the {body.kv_heads} groups of keys and values")
            removed = body.in_attention * (body.kv_heads - kv_heads) // body.kv_heads
        multiple = self.multiple or _suits(body.d_ff)
        wanted = body.d_ff - (self.sparsity * body.in_block - removed) / body.in_neuron
        neurons = min(round(wanted / multiple) * multiple, body.d_ff)
        if neurons <= 0:
            raise ValueError(
                f"{self} would leave no neuron: {body.d_ff} of them have {body.d_ff * body.in_neuron:,} of a block's "
                f"{body.in_block:,} parameters; ask for less, or cut attention too"
            )
        if self.sparsity and (heads, kv_heads, neurons) == (group, body.kv_heads, body.d_ff):
            raise ValueError(
                f"{self} takes nothing: neurons go {multiple} at a time, which is "
                f"{100 * multiple * body.in_neuron / body.in_block:.2g} % of a block; ask for more, or set multiple"
            )
        return heads, kv_heads, neurons

    def _gone(self, count: int, of_what: str) -> int:
        """How many of so many go. ValueError if none do that should."""
        gone = int(self.sparsity * count)
        if self.sparsity and not gone:
            least = f"ask for {ceil(1000 / count) / 10:g} % or more, or for" if count > 1 else "ask for"
            other = "kv_heads or none" if self.attention == "heads" else "heads or none"
            raise ValueError(f"{self} takes none of {of_what}: {least} another attention ({other})")
        return gone

    def patterns(self, model: PreTrainedModel) -> dict[str, Columns]:
        """See `Cut.patterns`."""
        body = anatomy(model)
        heads, kv_heads, neurons = self.kept(body)
        if self.attention != "none":
            _check_heads(model, body, heads * kv_heads, kv_heads)
        found = dict.fromkeys(body.each("mlp.down_proj"), Columns(neurons))
        if self.attention == "heads":
            found |= dict.fromkeys(body.each("self_attn.o_proj"), Columns(heads, body.head_dim, body.kv_heads))
        elif self.attention == "kv_heads":
            size = body.heads // body.kv_heads * body.head_dim
            found |= dict.fromkeys(body.each("self_attn.o_proj"), Columns(kv_heads, size))
        return found


def _check_heads(model: PreTrainedModel, body: Anatomy, heads: int, kv_heads: int) -> None:
    """ValueError unless a configuration can say that there are so many heads, as large as they were."""
    if model.config.model_type in PAIRED_HEADS:
        raise ValueError(f"{type(model).__name__} pairs its heads, which cannot go one by one: neurons can be cut")
    config = deepcopy(model.config)
    text: Any = config.get_text_config(decoder=True)
    try:
        text.num_attention_heads, text.num_key_value_heads, text.head_dim = heads, kv_heads, body.head_dim
        with torch.device("meta"):
            smaller: Any = type(model)(config)
        attention: Any = decoder_blocks(smaller)[1][0].self_attn
        found = [tuple(part.weight.shape) for part in (attention.q_proj, attention.k_proj, attention.o_proj)]
    except Exception as error:  # families check their numbers in ways of their own
        found = " ".join(str(error).split())[:200]
    wanted = [(count * body.head_dim, body.d_model) for count in (heads, kv_heads)]
    wanted.append((body.d_model, heads * body.head_dim))
    if found != wanted:
        raise ValueError(
            f"{type(model).__name__} has no configuration with {heads} heads and {kv_heads} of keys and values of "
            f"{body.head_dim} numbers each ({found}): neurons can be cut"
        )


@dataclass(frozen=True)
class Depth:
    """Whole blocks go: round(`sparsity` x blocks), those whose absence changes the final hidden states least.

    `score` says how that is found: "drop" leaves out one block after the other and takes the one that matters least,
    then looks again; "angle" takes those that turn the residual stream least in the dense model (Men et al. 2024,
    arXiv 2403.03853), in one pass.
    """

    sparsity: float
    score: Literal["drop", "angle"] = "drop"

    def __post_init__(self):
        _check_sparsity(self.sparsity)

    def __str__(self) -> str:
        return f"depth {100 * self.sparsity:.6g}%" + ("" if self.score == "drop" else f" {self.score}")

    def count(self, blocks: int) -> int:
        """How many blocks go. ValueError if none would stay, or none would go."""
        count = round(self.sparsity * blocks)
        if not 0 < count < blocks and self.sparsity:
            raise ValueError(f"{self} is {count} of {blocks} blocks; it must be 1 to {blocks - 1}")
        return count

    def patterns(self, model: PreTrainedModel, dropped: Sequence[int] | None = None) -> dict[str, Columns]:
        """See `Cut.patterns`. Before it is known which blocks go, as if it were the last ones."""
        body = anatomy(model)
        blocks: Any = decoder_blocks(model)[1]
        ends = (part for one in blocks for part in (one.self_attn.o_proj, one.mlp.down_proj))
        if any(part.bias is not None for part in ends):
            raise ValueError(f"blocks of {type(model).__name__} have biases that would stay: width can be cut")
        if (number := _by_place(blocks)) is not None:
            raise ValueError(
                f"blocks of {type(model).__name__} depend on their place ({number}), and would have others: width can "
                "be cut"
            )
        count = self.count(body.blocks)
        gone = set(range(body.blocks - count, body.blocks) if dropped is None else dropped)
        found = {}
        for part, size in (("self_attn.o_proj", body.heads * body.head_dim), ("mlp.down_proj", body.d_ff)):
            for index, name in enumerate(body.each(part)):
                found[name] = Columns(0 if index in gone else 1, size)
        return found


def _by_place(blocks: Sequence[nn.Module]) -> str | None:
    """A number that a block has by its place alone, if there is one, as DiffLlama's `lambda_init`."""
    found: dict[str, set[float]] = {}
    for block in blocks:
        for name, module in block.named_modules():
            for key, value in vars(module).items():
                if isinstance(value, float):
                    found.setdefault(f"{name}.{key}".lstrip("."), set()).add(value)
    return next((name for name, values in found.items() if len(values) > 1), None)


@dataclass(frozen=True)
class Hidden:
    """The residual stream gets narrower, the same everywhere: all matrices of all blocks lose as large a part, and so
    do embeddings and head (`narrow`). `multiple` is as in `Width`."""

    sparsity: float
    multiple: int = 0

    def __post_init__(self):
        _check_sparsity(self.sparsity)
        _check_multiple(self.multiple)

    def __str__(self) -> str:
        return f"hidden {100 * self.sparsity:.6g}%"

    def kept(self, body: Anatomy) -> int:
        """Numbers of the stream that stay. ValueError if none would."""
        multiple = self.multiple or _suits(body.d_model)
        kept = min(round((1 - self.sparsity) * body.d_model / multiple) * multiple, body.d_model)
        if kept <= 0:
            raise ValueError(
                f"{self} would leave nothing of a stream of {body.d_model} numbers in multiples of {multiple}"
            )
        return kept

    def patterns(self, model: PreTrainedModel) -> dict[str, Columns]:
        """See `Cut.patterns`: as many zeros as what goes; of matrices that write to the stream, rows go."""
        if model.config.model_type not in PLAIN_STREAMS:
            raise ValueError(
                f"the stream of {type(model).__name__} cannot be made narrower, only that of "
                f"{', '.join(PLAIN_STREAMS)}; width or depth can be cut, or single weights"
            )
        body = anatomy(model)
        kept = self.kept(body)
        inner = {"self_attn.o_proj": body.heads * body.head_dim, "mlp.down_proj": body.d_ff}
        columns = {
            part: Columns(round(inner.get(part, body.d_model) * kept / body.d_model)) for part in sum(STAGES, ())
        }
        return {name: some for part, some in columns.items() for name in body.each(part)}


@dataclass(frozen=True)
class FewerExperts:
    """round(`sparsity` x experts) of every mixture go, as many of each group that its router knows; each token still
    goes to as many. Routers choose among those that stay (`experts.drop_experts`)."""

    sparsity: float

    def __post_init__(self):
        _check_sparsity(self.sparsity)

    def __str__(self) -> str:
        return f"experts {100 * self.sparsity:.6g}%"

    def kept(self, experts: int) -> int:
        """How many of so many stay."""
        return experts - round(self.sparsity * experts)

    def check(self, model: PreTrainedModel) -> None:
        """ValueError for a model without experts, or with too few for this."""
        found = [mixture for block in decoder_blocks(model)[1] for mixture in mixtures(block)]
        if not found:
            raise ValueError(f"{type(model).__name__} has no experts: width or depth can be cut, or single weights")
        config: Any = model.config.get_text_config(decoder=True)
        chosen = next((n for key in CHOSEN if isinstance(n := getattr(config, key, None), int)), None)
        if chosen is None:
            raise ValueError(f"{type(model).__name__} does not say to how many experts a token goes ({CHOSEN[0]})")
        groups, of_group = found[0].groups, found[0].of_group
        each = self.kept(of_group)
        if each == of_group and self.sparsity:
            raise ValueError(f"{self} is none of {of_group} experts: ask for more than {50 / of_group:.3g} %")
        least = -(-chosen // (getattr(config, "topk_group", 1) or 1)) if groups > 1 else chosen
        if each < max(least, 2 if groups > 1 else 1):
            where = f" of each of {groups} groups" if groups > 1 else ""
            raise ValueError(f"{self} would leave {each} of {of_group} experts{where}, and a token goes to {chosen}")

    def patterns(self, model: PreTrainedModel) -> dict[str, Columns]:
        """See `Cut.patterns`. Before it is known which experts go, as if they were the last ones."""
        self.check(model)
        prefix, blocks = decoder_blocks(model)
        found = {}
        for index, block in enumerate(blocks):
            for (name, experts), mixture in zip(packed_experts(block).items(), mixtures(block), strict=True):
                d_ff = experts.module.down_proj.shape[1 if experts.transposed else 2]
                for expert in range(experts.count):
                    keep = int(expert % mixture.of_group < self.kept(mixture.of_group))
                    found[f"{prefix}.{index}.{name}.{expert}.down_proj"] = Columns(keep, d_ff)
        return found


CUTS: dict[str, type[Width] | type[Depth] | type[Hidden] | type[FewerExperts]] = {
    "width": Width, "depth": Depth, "hidden": Hidden, "experts": FewerExperts
}  # fmt: skip


def _suits(size: int) -> int:
    """The multiple for a width that has none said."""
    return next(multiple for multiple in MULTIPLES if multiple * ROUNDED_TO <= max(size, ROUNDED_TO))


def _check_multiple(multiple: int) -> None:
    if multiple < 0:
        raise ValueError(f"multiple is {multiple}; it must be 1 or more, or 0 for one that suits the model")


def _check_sparsity(sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}, but it must be in [0, 1): the fraction of parameters that goes.")
