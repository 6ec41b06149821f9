"""Engine `hf`: batched sampling with transformers that keeps the batch full (continuous batching).

Rows share one write column. A finished row gives its slot to the next request, whose prompt is prefilled on its own
and laid left of the write column; positions and masks are each row's own, so neighbours never change a trace beyond
float rounding. Works for every decoder with an ordinary key-value cache.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from secateurs.engines import Completion, Request, Sampling

GROW = 256  # spare columns after each move of the buffers


def sample_tokens(
    logits: Float[Tensor, "batch vocab"], uniforms: Float[Tensor, " batch"], sampling: Sampling
) -> Int[Tensor, " batch"]:
    """Draw one token a row by inverting the cumulative distribution at `uniforms` in [0, 1).

    Filters in the order temperature, top-k, top-p (the smallest set whose mass reaches p), as transformers does. One
    uniform number a token makes a trace a function of its seed alone. Float64, so that equal logits draw equal tokens.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    scaled = logits.double() / sampling.temperature
    if sampling.top_k == 0 and sampling.top_p == 1:
        probs = scaled.softmax(dim=-1)
        order = None
    else:
        count = min(sampling.top_k or scaled.shape[-1], scaled.shape[-1])
        top, order = scaled.topk(count, dim=-1)
        probs = top.softmax(dim=-1)
        before = probs.cumsum(dim=-1) - probs
        probs = probs.masked_fill(before >= sampling.top_p, 0.0)
    cumulative = probs.cumsum(dim=-1)
    drawn = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
    last = (probs > 0).sum(dim=-1, keepdim=True) - 1 if order is not None else probs.shape[-1] - 1
    drawn = torch.minimum(drawn, torch.as_tensor(last, device=drawn.device))
    return (drawn if order is None else order.gather(-1, drawn)).squeeze(-1)


class _Buffer(DynamicLayer):
    """One layer's keys and values in a buffer that is written in place instead of concatenated at every token."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def get_seq_length(self) -> int:
        return self.length

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        end = self.length + key_states.shape[-2]
        assert self.keys is not None and self.values is not None
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def resize(self, rows: Tensor, extra: int, shift: int, columns: int, like: tuple[Tensor, Tensor]) -> None:
        """Keep `rows`, add `extra` empty ones, drop `shift` columns at the left (negative: add), hold `columns`."""
        resized = []
        for old, shape in zip((self.keys, self.values), like, strict=True):
            new = shape.new_zeros(len(rows) + extra, shape.shape[1], columns, shape.shape[3])
            if len(rows):
                assert old is not None
                kept = old[rows, :, max(shift, 0) : self.length]
                new[: len(rows), :, max(-shift, 0) : max(-shift, 0) + kept.shape[2]] = kept
            resized.append(new)
        self.keys, self.values = resized
        self.is_initialized = True


@dataclass
class _Row:
    request: Request
    uniforms: Tensor
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
        """Yield completions as they finish; at most `batch_size` requests are drawn ahead."""
        self.model.eval()
        queue = iter(requests)
        batch = _Batch(self.model, self.pad_id)
        while True:
            clock = time.perf_counter()
            fresh = list(islice(queue, self.batch_size - len(batch.rows)))
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


def _uniforms(seed: int, sampling: Sampling) -> Tensor:
    return torch.rand(sampling.max_new_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class _Batch:
    """The rows in flight: row i occupies the columns [starts[i], column) of the buffers."""

    def __init__(self, model: PreTrainedModel, pad_id: int) -> None:
        self.model, self.pad_id, self.device = model, pad_id, model.device
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        self.buffers = [_Buffer() for _ in range(layers)]
        self.cache = Cache(layers=[*self.buffers])
        self.rows: list[_Row] = []
        self.starts = torch.zeros(0, dtype=torch.long, device=self.device)
        self.last = torch.zeros(0, dtype=torch.long, device=self.device)
        self.column = 0
        self.capacity = 0

    def admit(self, rows: list[_Row], sampling: Sampling) -> list[int | None]:
        """Prefill new rows and lay them left of the write column; returns a first token for each new row only."""
        lengths = torch.tensor([len(row.request.prompt_ids) for row in rows], device=self.device)
        width = int(lengths.max())
        ids = torch.full((len(rows), width), self.pad_id, device=self.device)
        for index, row in enumerate(rows):
            ids[index, width - len(row.request.prompt_ids) :] = torch.tensor(row.request.prompt_ids)
        mask = torch.arange(width, device=self.device) >= (width - lengths)[:, None]
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
        prefill = DynamicCache()
        out = self.model(
            input_ids=ids, attention_mask=mask.long(), position_ids=positions, past_key_values=prefill, logits_to_keep=1
        )
        old = len(self.rows)
        filled: Any = prefill.layers  # a prefill leaves keys and values in every layer
        self._resize(torch.arange(old), len(rows), min(self.column - width, 0), filled)
        column = self.column
        for buffer, layer in zip(self.buffers, filled, strict=True):
            assert buffer.keys is not None and buffer.values is not None
            buffer.keys[old:, :, column - width : column] = layer.keys
            buffer.values[old:, :, column - width : column] = layer.values
        self.rows += rows
        self.starts = torch.cat([self.starts, column - lengths])
        tokens = self._draw(out.logits[:, -1], rows, sampling)
        self.last = torch.cat([self.last, tokens])
        return [*([None] * old), *tokens.tolist()]

    def step(self, sampling: Sampling) -> list[int | None]:
        """One token for every row."""
        if self.column == self.capacity:
            self._resize(torch.arange(len(self.rows)), 0, int(self.starts.min()), self.buffers)
        columns = torch.arange(self.column + 1, device=self.device)
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
        """Take the rows `done` out of the batch and return them."""
        if not done:
            return []
        gone = [self.rows[index] for index in done]
        keep = [index for index in range(len(self.rows)) if index not in set(done)]
        kept = torch.tensor(keep, dtype=torch.long, device=self.device)
        self.rows = [self.rows[index] for index in keep]
        self.starts, self.last = self.starts[kept], self.last[kept]
        if keep:
            self._resize(kept, 0, int(self.starts.min()), self.buffers)
        else:
            self.column = 0
        return gone

    def _draw(self, logits: Tensor, rows: list[_Row], sampling: Sampling) -> Tensor:
        uniforms = torch.stack([row.uniforms[len(row.ids)] for row in rows]).to(logits.device)
        return sample_tokens(logits.float(), uniforms, sampling)

    def _resize(self, rows: Tensor, extra: int, shift: int, like: Sequence[CacheLayerMixin]) -> None:
        """Move every buffer to the kept `rows` plus `extra` empty ones, `shift` columns to the left."""
        self.column -= shift
        self.starts = self.starts - shift
        self.capacity = self.column + GROW
        for buffer, layer in zip(self.buffers, like, strict=True):
            assert layer.keys is not None and layer.values is not None
            buffer.resize(rows, extra, shift, self.capacity, (layer.keys, layer.values))
            buffer.length = self.column


def hf_engine(model: PreTrainedModel, tokenizer: Any, batch_size: int) -> HF:
    """The engine for `model`, with the end-of-sequence ids of its generation_config and its tokenizer."""
    named = model.generation_config.eos_token_id if model.generation_config else None
    candidates = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id]
    eos_ids = tuple(sorted({token for token in candidates if token is not None}))
    if not eos_ids:
        raise ValueError("the model has no end-of-sequence token: neither generation_config nor tokenizer names one")
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos_ids[0]
    return HF(model, eos_ids, pad_id, batch_size)
