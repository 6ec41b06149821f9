"""Engine `hf`: batched sampling with transformers that keeps the batch full (continuous batching).

Rows share one write column. A finished row gives its slot to the next request, whose prompt is prefilled on its own
and laid left of the write column; positions and masks are each row's own, so neighbours never change a trace beyond
float rounding. Works for every decoder with an ordinary key-value cache, or with linear attention, whose state has no
columns.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer

from secateurs.engines import Completion, Request, Sampling

GROW = 256  # spare columns after each move of the buffers
NUCLEUS = 1024  # likeliest tokens, where top-p is looked for first: sorting a vocabulary takes as long as a small model
REFILL = 16  # steps that free slots may wait for a prefill, which is a forward pass of its own


def sample_tokens(
    logits: Float[Tensor, "batch vocab"], uniforms: Float[Tensor, " batch"], sampling: Sampling
) -> Int[Tensor, " batch"]:
    """Draw one token a row by inverting the cumulative distribution at `uniforms` in [0, 1).

    Filters in the order temperature, top-k, top-p (the smallest set whose mass reaches p), as transformers does. One
    uniform number a token makes a trace a function of its seed alone. Float64, so that equal logits draw equal tokens.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    scaled, vocabulary = logits.double() / sampling.temperature, logits.shape[-1]
    if sampling.top_k == 0 and sampling.top_p == 1:
        return _at(uniforms, scaled.softmax(dim=-1)).clamp(max=vocabulary - 1)
    drawn, reached = _draw(scaled, uniforms, sampling, min(sampling.top_k or NUCLEUS, vocabulary))
    if not sampling.top_k and not reached.all():
        drawn[~reached] = _draw(scaled[~reached], uniforms[~reached], sampling, vocabulary)[0]
    return drawn


def _draw(
    scaled: Float[Tensor, "batch vocab"], uniforms: Float[Tensor, " batch"], sampling: Sampling, count: int
) -> tuple[Int[Tensor, " batch"], Bool[Tensor, " batch"]]:
    """Tokens drawn from the `count` likeliest, and whether these reach top-p."""
    top, order = scaled.topk(count, dim=-1)
    probs = (top - (top if sampling.top_k else scaled).logsumexp(dim=-1, keepdim=True)).exp()
    cumulative = probs.cumsum(dim=-1)
    nucleus = probs.masked_fill(cumulative - probs >= sampling.top_p, 0.0)
    place = torch.minimum(_at(uniforms, nucleus), (nucleus > 0).sum(dim=-1) - 1)
    return order.gather(-1, place[:, None]).squeeze(-1), cumulative[:, -1] >= sampling.top_p


def _at(uniforms: Float[Tensor, " batch"], probs: Float[Tensor, "batch count"]) -> Int[Tensor, " batch"]:
    """The first place where this share of all probability is passed; `count` where rounding finds none."""
    cumulative = probs.cumsum(dim=-1)
    return torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True).squeeze(-1)


class Buffer(DynamicLayer):
    """One layer's keys and values, written in place: row i in slot i, in columns `first` to `length` of its store."""

    def __init__(self) -> None:
        super().__init__()
        self.store: list[Tensor] = []
        self.rows = self.first = self.length = 0

    def get_seq_length(self) -> int:
        return self.length - self.first

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        end = self.length + key_states.shape[-2]
        for stored, new in zip(self.store, (key_states, value_states), strict=True):
            stored[: self.rows, :, self.length : end] = new
        self.length = end
        keys, values = (stored[: self.rows, :, self.first : end] for stored in self.store)
        return keys, values

    def move(self, slots: int, columns: int, shift: int, like: Sequence[Tensor]) -> None:
        """To a larger store, `shift` columns to the left (negative: to the right)."""
        old, start = self.store, max(self.first, shift)
        self.store = [one.new_zeros(slots, one.shape[1], columns, one.shape[3]) for one in like]
        for new, stored in zip(self.store, old, strict=bool(old)):
            kept = stored[: self.rows, :, start : self.length]
            new[: self.rows, :, start - shift : self.length - shift] = kept

    def swap_in(self, hole: int, last: int) -> None:
        """Give the slot of a row that is done to the last one."""
        for stored in self.store:
            stored[hole, :, self.first : self.length] = stored[last, :, self.first : self.length]


class _State(LinearAttentionLayer):
    """What one linear attention remembers of every row."""

    def add(self, fresh: LinearAttentionLayer) -> None:
        """The rows of a prefill, after those that are there."""
        if self.device is None:
            vars(self).update(vars(fresh))
            return
        for own, new in ((self.conv_states, fresh.conv_states), (self.recurrent_states, fresh.recurrent_states)):
            own |= {key: torch.cat([state, new[key]]) for key, state in own.items() if state is not None}  # type: ignore[list-item]


@dataclass
class _Row:
    request: Request
    uniforms: numpy.ndarray
    ids: list[int] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class HF:
    """Samples from a transformers model in this process. `batch_size` is how many traces are in flight."""

    model: PreTrainedModel
    eos_ids: tuple[int, ...]
    pad_id: int
    batch_size: int = 32

    @torch.inference_mode()
    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        """Yield completions as they finish; at most `batch_size` requests are drawn ahead.

        Free slots wait until an eighth of all is free, or the last prefill is `REFILL` steps ago.
        """
        self.model.eval()
        queue = iter(requests)
        batch, waited = _Batch(self.model, self.pad_id), 0  # steps since the last prefill
        while True:
            clock = time.perf_counter()
            free = self.batch_size - len(batch.rows)
            fresh = list(islice(queue, free)) if waited >= REFILL or 8 * free >= self.batch_size else []
            waited = 0 if fresh else waited + 1
            if fresh:
                tokens = batch.admit([_Row(r, _uniforms(r.seed, sampling)) for r in fresh], sampling)
            elif batch.rows:
                tokens = batch.step(sampling)
            else:
                return
            share = (time.perf_counter() - clock) / len(batch.rows)
            done = []
            for index, (row, token) in enumerate(zip(batch.rows, tokens, strict=True)):
                row.seconds += share
                if token is None:
                    continue
                row.ids.append(token)
                if token in self.eos_ids or len(row.ids) == sampling.max_new_tokens:
                    done.append(index)
            finished = batch.drop(done)
            for row in finished:
                reason = "eos" if row.ids[-1] in self.eos_ids else "length"
                yield Completion(request=row.request, ids=tuple(row.ids), finish=reason, seconds=row.seconds)


def _uniforms(seed: int, sampling: Sampling) -> numpy.ndarray:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(sampling.max_new_tokens, generator=generator, dtype=torch.float64).numpy()


class _Batch:
    """The rows in flight: row i is slot i of the buffers, its tokens the columns [starts[i], column)."""

    def __init__(self, model: PreTrainedModel, pad_id: int) -> None:
        self.model, self.pad_id, self.device = model, pad_id, model.device
        config: Any = model.config.get_text_config(decoder=True)
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        self.linear = [kind == "linear_attention" for kind in kinds]
        self.cache = Cache(layers=[_State() if linear else Buffer() for linear in self.linear])
        self.buffers = [layer for layer in self.cache.layers if isinstance(layer, Buffer)]
        self.states = [layer for layer in self.cache.layers if isinstance(layer, _State)]
        self.most = learned_positions(model)
        self.rows: list[_Row] = []
        self.starts = torch.zeros(0, dtype=torch.long, device=self.device)
        self.last = torch.zeros(0, dtype=torch.long, device=self.device)
        self.first = self.column = self.slots = self.capacity = 0

    def admit(self, rows: list[_Row], sampling: Sampling) -> list[int | None]:
        """Prefill new rows and lay them left of the write column; returns a first token for each new row only."""
        size: int = self.model.config.get_text_config(decoder=True).vocab_size
        if (largest := max(token for row in rows for token in row.request.prompt_ids)) >= size:
            raise ValueError(f"the tokenizer gives the id {largest}, and the model knows {size}: it is another model's")
        lengths = torch.tensor([len(row.request.prompt_ids) for row in rows], device=self.device)
        self._fits(int(lengths.max()))
        width = int(lengths.max())
        ids = torch.full((len(rows), width), self.pad_id, device=self.device)
        for index, row in enumerate(rows):
            ids[index, width - len(row.request.prompt_ids) :] = torch.tensor(row.request.prompt_ids)
        mask = torch.arange(width, device=self.device) >= (width - lengths)[:, None]
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
        prefill = Cache(layers=[LinearAttentionLayer() if linear else DynamicLayer() for linear in self.linear])
        out = self.model(
            input_ids=ids, attention_mask=mask.long(), position_ids=positions, past_key_values=prefill, logits_to_keep=1
        )
        if not bool(out.logits[:, -1].amax(-1).isfinite().all()):
            raise ValueError("the model's logits are not finite: some of its weights are not, or they overflow")
        old, new = len(self.rows), len(self.rows) + len(rows)
        filled: list[Any] = [[one.keys, one.values] for one in prefill.layers if isinstance(one, DynamicLayer)]
        if new > self.slots or self.column < width:
            self._move(max(new, self.slots), min(self.first, self.column - width), filled)
        for buffer, pair in zip(self.buffers, filled, strict=True):
            for stored, one in zip(buffer.store, pair, strict=True):
                stored[old:new, :, self.column - width : self.column] = one
        fresh = [layer for layer in prefill.layers if isinstance(layer, LinearAttentionLayer)]
        for state, more in zip(self.states, fresh, strict=True):
            state.add(more)
        self.rows += rows
        self.starts = torch.cat([self.starts, self.column - lengths])
        self._look()
        tokens = self._draw(out.logits[:, -1], rows, sampling)
        self.last = torch.cat([self.last, tokens])
        return [*([None] * old), *tokens.tolist()]

    def step(self, sampling: Sampling) -> list[int | None]:
        """One token for every row."""
        self._fits(self.column - self.first + 1)
        if self.column == self.capacity:
            self._move(self.slots, self.first, [buffer.store for buffer in self.buffers])
        columns = torch.arange(self.first, self.column + 1, device=self.device)
        out = self.model(
            input_ids=self.last[:, None],
            attention_mask=(columns >= self.starts[:, None]).long(),
            position_ids=(self.column - self.starts)[:, None],
            past_key_values=self.cache,
        )
        self.column += 1
        self.last = self._draw(out.logits[:, -1], self.rows, sampling)
        return self.last.tolist()

    def drop(self, done: list[int]) -> list[_Row]:
        """Take the rows `done` out of the batch and return them; the last ones take their slots."""
        if not done:
            return []
        gone, order = [self.rows[index] for index in done], list(range(len(self.rows)))
        for hole in sorted(done, reverse=True):
            for buffer in self.buffers:
                buffer.swap_in(hole, len(order) - 1)
            order[hole] = order[-1]
            order.pop()
        kept = torch.tensor(order, dtype=torch.long, device=self.device)
        for state in self.states:
            state.reorder_cache(kept)  # type: ignore[arg-type]
        self.rows = [self.rows[index] for index in order]
        self.starts, self.last = self.starts[kept], self.last[kept]
        self._look()
        return gone

    def _fits(self, tokens: int) -> None:
        """ValueError for more tokens than the model has positions."""
        if self.most is not None and tokens > self.most:
            raise ValueError(
                f"{type(self.model).__name__} has {self.most} positions, and a prompt with its answer takes {tokens}: "
                "set max_new_tokens lower"
            )

    def _look(self) -> None:
        """Have the buffers show what is in use: the rows in flight, from the column where the first of them starts."""
        self.first = int(self.starts.min()) if self.rows else self.column
        for buffer in self.buffers:
            buffer.rows, buffer.first, buffer.length = len(self.rows), self.first, self.column

    def _move(self, slots: int, shift: int, like: Sequence[Sequence[Tensor]]) -> None:
        """Move every buffer `shift` columns to the left, to a store with room for `slots` rows and `GROW` columns."""
        self.slots, self.capacity = slots, self.column - shift + GROW
        for buffer, one in zip(self.buffers, like, strict=True):
            buffer.move(slots, self.capacity, shift, one)
        self.column -= shift
        self.starts = self.starts - shift
        self._look()

    def _draw(self, logits: Tensor, rows: list[_Row], sampling: Sampling) -> Tensor:
        uniforms = torch.from_numpy(numpy.array([row.uniforms[len(row.ids)] for row in rows]))
        return sample_tokens(logits.float(), uniforms.to(logits.device), sampling)


def learned_positions(model: PreTrainedModel) -> int | None:
    """How many tokens a model with a table of positions can take (OPT, GPT-2); None where they are computed."""
    config: Any = model.config.get_text_config(decoder=True)
    most, words = getattr(config, "max_position_embeddings", None), model.get_input_embeddings()
    tables = [one for one in model.modules() if isinstance(one, nn.Embedding) and one is not words]
    return most if most and any(most <= one.num_embeddings <= most + 2 for one in tables) else None


def hf_engine(model: PreTrainedModel, tokenizer: Any, batch_size: int) -> HF:
    """The engine for `model`, with the end-of-sequence ids of its generation_config and its tokenizer."""
    named = model.generation_config.eos_token_id if model.generation_config else None
    candidates = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id]
    eos_ids = tuple(sorted({token for token in candidates if token is not None}))
    if not eos_ids:
        raise ValueError("the model has no end-of-sequence token: neither generation_config nor tokenizer names one")
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos_ids[0]
    return HF(model, eos_ids, pad_id, batch_size)
