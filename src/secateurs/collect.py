"""What runs through the blocks and what is summed on the way: streams of documents, groups of matrices, their sums.

The only file with hooks. Matrices that receive the same tensor (q/k/v, gate/up) are one group with one Gram.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import reduce
from itertools import combinations
from operator import add
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateurs.calibration import CODES, REGIONS, Batch, CalibrationSet, batches, worth
from secateurs.goals import Drift
from secateurs.layer import Gram, gram_energy, token_energies
from secateurs.models import Matrix, decoder, decoder_blocks, linears, packed_experts
from secateurs.ranks import ALONE, Ranks

Call = tuple[tuple[Any, ...], dict[str, Any]]
Place = Callable[[Tensor], Tensor]  # where hidden states are kept
Opened = Callable[[int], AbstractContextManager[object]]  # a block's weights are there while it is open
POOLED = 0.3  # of an expert's inputs: how many tokens of all experts its own Gram gets
CALL_BYTES = 64 << 20  # of masks and positions that are remembered
WATCHED_TOKENS = 16  # enough to see which linears receive the same tensor


@dataclass(frozen=True)
class Group:
    """Matrices that receive the same input. An expert's are one each."""

    matrices: tuple[Matrix, ...]

    @property
    def name(self) -> str:
        """That of the first one."""
        return self.matrices[0].name

    @property
    def module(self) -> nn.Module:
        """The module whose input it is."""
        return self.matrices[0].module

    @property
    def expert(self) -> int | None:
        """Which expert's input it is, if it is one's."""
        return self.matrices[0].expert

    @property
    def part(self) -> Literal["up", "down"]:
        """Which of an expert's two inputs it is."""
        return "down" if self.matrices[0].attribute == "down_proj" else "up"

    @property
    def d_in(self) -> int:
        """Inputs."""
        return self.matrices[0].weight.shape[1]

    @property
    def cost(self) -> float:
        """Of a solve (`solve_cost`)."""
        return solve_cost(sum(matrix.weight.shape[0] for matrix in self.matrices), self.d_in)


def solve_cost(rows: int, d_in: int) -> float:
    """In about the right proportion: a factorisation of the Gram, and a sweep over every row."""
    return float(d_in**3 + rows * d_in**2)


class UnknownFamily(ValueError):
    """A model whose blocks cannot be run one by one."""


class Shell:
    """A decoder around its blocks: what it hands to each of them for some ids, and what it makes of their result."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self._blocks = decoder_blocks(model)[1]
        self._calls = WeakKeyDictionary[Batch, tuple[int, list[Call]]]()  # of batches in use, and their bytes
        self._last: tuple[Batch, list[Call]] | None = None
        self._tuples = False  # whether this decoder takes tuples from its blocks
        self._strange = f"{type(model).__name__} calls its blocks in a way that secateurs does not know"

    @property
    def device(self) -> torch.device:
        """Where blocks run."""
        return self.model.device

    def enter(self, batch: Batch) -> Tensor:
        """The hidden states before the first block [batch, seq, d_model]; what else blocks get is remembered."""
        try:
            hidden, calls = self._watched(batch)
        except UnknownFamily:
            if self._tuples:
                raise
            self._tuples = True
            hidden, calls = self._watched(batch)
        rest = [(args[1:], kwargs) for args, kwargs in calls]
        self._last = batch, rest
        size = sum({tensor.data_ptr(): tensor.nbytes for call in rest for tensor in _tensors(call)}.values())
        if sum(held for held, _ in self._calls.values()) + size <= CALL_BYTES:
            self._calls[batch] = size, rest
        return hidden

    def call(self, batch: Batch, index: int) -> Call:
        """What block `index` gets besides hidden states: its own mask and positions.

        Remembered up to CALL_BYTES for all batches: the mask of a long one is large, and then made anew at every block.
        """
        if batch in self._calls:
            return self._calls[batch][1][index]
        if self._last is None or self._last[0] is not batch:
            self.enter(batch)
        assert self._last is not None
        return self._last[1][index]

    def leave(self, batch: Batch, hidden: Tensor, *, logits: bool = False) -> Tensor:
        """What follows the last block: the final norm [batch, seq, d_model], or with `logits` [batch, seq, vocab]."""
        self.call(batch, 0)
        with self._bypassed(hidden.to(self.device)):
            run: Any = self.model if logits else decoder(self.model)
            out = run(input_ids=batch.ids.to(self.device), use_cache=False)
        return out.logits if logits else out.last_hidden_state

    def _watched(self, batch: Batch) -> tuple[Tensor, list[Call]]:
        with self._bypassed() as calls:
            out: Any = decoder(self.model)(input_ids=batch.ids.to(self.device), use_cache=False)
        hidden = calls[0][0][0]
        if out.last_hidden_state.ndim != hidden.ndim:
            raise UnknownFamily(self._strange)
        return hidden, calls

    @contextmanager
    def _bypassed(self, result: Tensor | None = None) -> Iterator[list[Call]]:
        """While open, blocks note what they are called with and pass it on; the last one gives `result`, if any."""
        calls: list[Call] = []

        def pass_on(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            if calls and hidden.shape != calls[0][0][0].shape:  # a state without its tuple loses a dimension
                raise UnknownFamily(self._strange)
            calls.append(((hidden, *args[1:]), rest))
            given = hidden if result is None or len(calls) < len(self._blocks) else result
            return (given,) if self._tuples else given

        with ExitStack() as stack:
            for block in self._blocks:
                block.forward = pass_on
                stack.callback(delattr, block, "forward")
            yield calls


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


@dataclass
class Stream:
    """One batch on its way through the blocks: its hidden states now, which each block overwrites in their place.

    `dense` is the same in the dense model, where a goal needs it; `goal` what a fine-tune aims at. They lie where
    `place` puts them, which may be another device than the one that blocks run on.
    """

    batch: Batch
    held_out: bool
    shell: Shell
    hidden: Tensor
    dense: Tensor | None = None
    goal: Tensor | None = None
    number: int = 0
    """Its place among those of all processes."""
    place: Place = lambda hidden: hidden

    def run(self, block: nn.Module, index: int, hidden: Tensor | None = None) -> Tensor:
        """What the block makes of the hidden states, or of others."""
        args, kwargs = self.shell.call(self.batch, index)
        out = block((self.hidden if hidden is None else hidden).to(self.shell.device), *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def start(self, tokens: int) -> "Stream":
        """The first tokens of its first document: enough to watch a block with."""
        batch = Batch(self.batch.ids[:1, :tokens], self.batch.regions[:1, :tokens])
        return Stream(batch, self.held_out, self.shell, self.hidden[:1, :tokens])


def capture(
    model: PreTrainedModel,
    calibration: CalibrationSet,
    batch_tokens: int,
    *,
    twin: bool = False,
    place: Place = lambda hidden: hidden,
    ranks: Ranks = ALONE,
) -> list[Stream]:
    """This process's batches before the first block; with `twin`, twice. `place` says where hidden states are kept."""
    shell = Shell(model)
    sets = ((False, calibration.documents), (True, calibration.held_out))
    every = [(held_out, batch) for held_out, documents in sets for batch in batches(documents, batch_tokens)]
    takers = ranks.shares([batch.ids.numel() for _, batch in every])
    streams: list[Stream] = []
    for number, ((held_out, batch), taker) in enumerate(zip(every, takers, strict=True)):
        if taker == ranks.index:
            hidden = shell.enter(batch)
            twin_hidden = place(hidden.clone()) if twin else None
            streams.append(Stream(batch, held_out, shell, place(hidden), twin_hidden, number=number, place=place))
    return streams


@torch.no_grad()
def final_states(model: PreTrainedModel, batches: Sequence[Batch], opened: Opened = nullcontext) -> list[Tensor]:
    """Final hidden states [batch, seq, d_model] on the CPU, block by block: a block's weights are needed once."""
    return [stream.shell.leave(stream.batch, stream.hidden).cpu() for stream in _through(model, batches, opened)]


@torch.no_grad()
def logits_of(model: PreTrainedModel, batches: Sequence[Batch], opened: Opened = nullcontext) -> list["Logits"]:
    """The logits of batches of one sequence each: all blocks now, the rest as it is looked at."""
    return [Logits(stream) for stream in _through(model, batches, opened)]


@dataclass(frozen=True)
class Logits:
    """Of one sequence: `[start:stop]` makes those of some tokens [tokens, vocab], as all are large."""

    stream: Stream

    def __getitem__(self, tokens: slice) -> Tensor:
        ids = self.stream.batch.ids[:, tokens]
        some = Batch(ids, torch.ones_like(ids))
        return self.stream.shell.leave(some, self.stream.hidden[:, tokens], logits=True)[0]


def _through(model: PreTrainedModel, batches: Sequence[Batch], opened: Opened) -> list[Stream]:
    shell = Shell(model)
    streams = [Stream(batch, False, shell, shell.enter(batch)) for batch in batches]
    for index, block in enumerate(decoder_blocks(model)[1]):
        with opened(index):
            for stream in streams:
                stream.hidden = stream.run(block, index)
    return streams


@dataclass
class Seen:
    """Inputs of some tokens as they were, and the codes of their regions.

    `off` and `stream_off` say how far from the dense model's they and the residual stream are, where a goal needs it.
    """

    x: Tensor
    codes: Tensor
    weight: Tensor | None
    off: Tensor | None = None
    stream_off: Tensor | None = None

    def __getitem__(self, which: Tensor) -> "Seen":
        """Some of the tokens; not where a goal needs more of them."""
        assert self.off is None
        if bool(which.all()):
            return self
        return Seen(self.x[which], self.codes[which], None if self.weight is None else self.weight[which])


@dataclass
class Held:
    """Inputs of held-out tokens to a group, to judge solutions on: as they were, but of a region (by code) with so many
    that their Gram is smaller, that. Where a goal needs how far off they are, all as they were."""

    seen: list[Seen] = field(default_factory=list)
    grams: dict[int, Gram] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)

    def add(self, new: Seen) -> None:
        """Some more tokens."""
        self.seen.append(new)
        if new.off is not None:
            return
        d_in = new.x.shape[1]
        for code, count in enumerate(torch.bincount(new.codes).tolist()):
            self.counts[code] = self.counts.get(code, 0) + count
            if count and self.counts[code] * new.x.element_size() > 4 * d_in:  # bytes of a row of either
                gram = self.grams.setdefault(code, Gram.zeros(d_in, new.x.device))
                for seen in self.seen:
                    of_region = seen[seen.codes == code]
                    gram.update(of_region.x, of_region.weight)
                rest = (seen[seen.codes != code] for seen in self.seen)
                self.seen = [seen for seen in rest if len(seen.x)]

    def gram(self, like: Gram) -> Gram:
        """Of all of them, of the size and on the device of another one."""
        total = reduce(Gram.__add__, self.grams.values(), Gram.zeros(like.d_in, like.xtx.device))
        for seen in self.seen:
            total.update(seen.x, seen.weight)
        return total


@dataclass
class Sums:
    """What this process saw of every group's inputs: sums over its calibration tokens, and its held-out inputs."""

    train: dict[str, Gram]
    train_drift: dict[str, Drift]
    held: dict[str, Held]


@dataclass
class Inputs:
    """What a solve knows of a group's inputs, from all processes; the drifts only where a goal needs them."""

    gram: Gram
    note: str = ""
    drift: Drift | None = None
    held_gram: Gram | None = None
    held_drift: Drift | None = None

    def of_some_tokens(self, group: Group) -> Gram:
        """The Gram; ValueError if there is nothing in it."""
        if not self.gram.weight_sum:
            name = group.name
            raise ValueError(f"{name}: no calibration token with a positive weight reached it; use more documents")
        return self.gram


def collect(
    block: nn.Module,
    index: int,
    groups: Sequence[Group],
    streams: Sequence[Stream],
    weights: Mapping[str, float],
    *,
    imitate: bool = False,
    writers: Sequence[nn.Module] = (),
    dense: Mapping[Matrix, Tensor] | None = None,
    move: bool = False,
    keep_goal: bool = False,
) -> Sums:
    """Everything a solve of `groups` needs, in one pass; in two, one of them through the dense model, to `imitate` it.

    `weights` are those of the regions; `dense` holds the weights from before the solve of what is pruned in this block
    already. What the dense block gives is kept as the streams' goals, or the streams `move` on to it.
    """
    sums = Sums({}, {}, {group.name: Held() for group in groups})

    def one(stream: Stream) -> None:  # what it makes goes when it returns, before the next one makes as much
        watch = _Watch(groups, writers, sums, stream, weights)
        wanted = None
        if imitate:
            assert stream.dense is not None
            with swapped(dense or {}), watch.dense():
                wanted = stream.run(block, index, stream.dense)
            watch.drift = stream.dense.to(wanted.device) - stream.hidden.to(wanted.device)
        if wanted is None and (keep_goal or move):
            with watch.inputs():
                wanted = stream.run(block, index)
        else:
            with watch.inputs(stop=True), suppress(Enough):
                stream.run(block, index)
        if keep_goal:
            assert wanted is not None
            stream.goal = stream.place(wanted)
        if move:
            assert wanted is not None
            (stream.dense if imitate and stream.dense is not None else stream.hidden).copy_(wanted)

    for stream in streams:
        one(stream)
    return sums


class Enough(Exception):
    """Raised by a hook: all that was wanted of a block at work has been seen."""


class _Watch:
    """Hooks for one batch on its way through a block: what groups receive goes to sums. Padding is never looked at."""

    def __init__(
        self,
        groups: Sequence[Group],
        writers: Sequence[nn.Module],
        sums: Sums,
        stream: Stream,
        weights: Mapping[str, float],
    ):
        self.groups, self.writers, self.sums, self.held_out = groups, writers, sums, stream.held_out
        codes = stream.batch.regions.flatten().to(stream.shell.device)
        self.counts = worth(codes, dict.fromkeys(REGIONS, 1.0) if stream.held_out else weights)
        self.codes = codes
        self.rows = None if bool((self.counts > 0).all()) else (self.counts > 0).nonzero().squeeze(-1)
        counted = self._of_rows(self.counts)
        self.each = None if bool((counted == 1).all()) else counted
        routed = {group.module for group in groups if group.expert is not None}
        self.experts = {module: packed_experts(module)[""] for module in routed}
        self.dense_inputs: dict[str, Tensor] = {}
        self.dense_outputs: dict[nn.Module, Tensor] = {}
        self.drift: Tensor | None = None
        """How far the residual stream is off where the block is now."""

    @contextmanager
    def dense(self) -> Iterator[None]:
        """While open, inputs of groups (experts apart: their tokens differ) and outputs of writers are noted."""

        def note_input(group: Group) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                self.dense_inputs[group.name] = args[0]

            return hook

        def note_output(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            self.dense_outputs[module] = out

        with ExitStack() as stack:
            for group in self.groups:
                if group.expert is None:
                    stack.callback(group.module.register_forward_pre_hook(note_input(group)).remove)
            for module in self.writers:
                stack.callback(module.register_forward_hook(note_output).remove)
            yield

    @contextmanager
    def inputs(self, stop: bool = False) -> Iterator[None]:
        """While open, inputs of groups are added up, and how far they are from the dense ones. With `stop`, the last
        of the modules raises Enough instead of running."""
        left = {group.module for group in self.groups}

        def seen(module: nn.Module) -> None:
            left.discard(module)
            if stop and not left:
                raise Enough

        def linear_hook(group: Group) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                self._linear(group, args[0].reshape(-1, args[0].shape[-1]))
                seen(module)

            return hook

        def experts_hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            self._experts(module, args, kwargs)
            seen(module)

        def writer_hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            assert self.drift is not None
            self.drift = self.drift + self.dense_outputs[module] - out

        with ExitStack() as stack:
            for group in self.groups:
                if group.expert is None:
                    stack.callback(group.module.register_forward_pre_hook(linear_hook(group)).remove)
            for module in self.experts:
                stack.callback(module.register_forward_pre_hook(experts_hook, with_kwargs=True).remove)
            for module in self.writers:
                stack.callback(module.register_forward_hook(writer_hook).remove)
            yield

    def _of_rows(self, values: Tensor) -> Tensor:
        return values if self.rows is None else values[self.rows]

    def _linear(self, group: Group, x: Tensor) -> None:
        off = stream_off = None
        now = self._of_rows(x)
        if group.name in self.dense_inputs:
            off = self._of_rows(self.dense_inputs[group.name].reshape(x.shape)).float() - now.float()
            if self.drift is not None and group.module in self.writers:
                stream_off = self._of_rows(self.drift.reshape(len(x), -1))
        self._add(group.name, Seen(now, self._of_rows(self.codes), self.each, off, stream_off))

    def _experts(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        hidden, index, probability = (*args, *kwargs.values())[:3]
        hidden = hidden.reshape(-1, hidden.shape[-1])
        for group in self.groups:
            if group.module is not module or group.expert is None:
                continue
            token, slot = torch.where((index == group.expert) & (self.counts > 0)[:, None])
            x = hidden[token]
            if group.part == "down":
                x = self.experts[module].inner(group.expert, x)
            # An expert's output is scaled by its routing probability p, so its error counts with p².
            weight = probability[token, slot].float() ** 2 * self.counts[token]
            self._add(group.name, Seen(x, self.codes[token], weight))

    def _add(self, name: str, seen: Seen) -> None:
        if not len(seen.x):
            return
        if self.held_out:
            self.sums.held[name].add(seen)
            return
        gram = self.sums.train.setdefault(name, Gram.zeros(seen.x.shape[-1], seen.x.device))
        gram.update(seen.x, seen.weight)
        if seen.off is not None:
            new, old = drift_of(seen), self.sums.train_drift.get(name)
            self.sums.train_drift[name] = new if old is None else old + new


def drift_of(seen: Seen) -> Drift:
    """The sums over tokens that tell how far off they are; `seen` must know it."""
    assert seen.off is not None
    x = seen.x.float() if seen.weight is None else seen.x.float() * seen.weight[:, None]
    return Drift(seen.off.T @ x, None if seen.stream_off is None else seen.stream_off.float().T @ x)


def pools_of(groups: Sequence[Group], sums: Sums, ranks: Ranks = ALONE) -> dict[nn.Module, Gram]:
    """What all experts of a module receive together, by module. What `down_proj`s receive is not for adding: their
    inputs are neurons of one expert each."""
    pools: dict[nn.Module, Gram] = {}
    for group in groups:
        if group.expert is not None and group.part == "up":
            pool, own = pools.get(group.module) or _empty(group), sums.train.get(group.name)
            pools[group.module] = pool + own if own else pool
    return {module: added(pool, ranks) for module, pool in pools.items()}


def inputs_of(
    group: Group,
    sums: Sums,
    pools: Mapping[nn.Module, Gram],
    *,
    imitate: bool = False,
    writers: Sequence[nn.Module] = (),
    ranks: Ranks = ALONE,
    to: int = 0,
) -> Inputs:
    """The sums of all processes over a group's tokens, for process `to`, taken out of `sums`.

    An expert's Gram gets a little of what its siblings saw together (`shrunk`), and all of it, with a note, where no
    token reached it; a `down_proj` that no token reached has all its inputs count alike.
    """
    gram = added(sums.train.pop(group.name, None) or _empty(group), ranks, to)
    if group.expert is not None:
        pool = pools[group.module] if group.part == "up" else None
        if not gram.tokens and pool is not None and pool.tokens:
            reason = "no calibration token reached this expert; the Gram of all experts was used"
            return Inputs(Gram(pool.xtx, pool.weight_sum), reason)
        if not gram.tokens:
            reason = "no calibration token reached this expert; all its inputs counted alike"
            return Inputs(Gram(torch.eye(group.d_in, device=gram.xtx.device), 1.0), reason)
        return Inputs(gram if pool is None or to != ranks.index else shrunk(gram, pool))
    if not gram.tokens or not imitate:
        return Inputs(gram)
    held = [seen for seen in sums.held[group.name].seen if seen.off is not None]
    held_gram = added(Held(held).gram(gram), ranks, to)
    drift = sums.train_drift.pop(group.name, None) or _no_drift(group, writers)
    held_drift = reduce(add, map(drift_of, held)) if held else _no_drift(group, writers)
    for tensor in (drift.inputs, drift.stream, held_drift.inputs, held_drift.stream):
        if tensor is not None:
            ranks.add(tensor, to)
    return Inputs(gram, "", drift, held_gram, held_drift) if held_gram.tokens else Inputs(gram)


def shrunk(gram: Gram, pool: Gram) -> Gram:
    """The Gram of an expert and, as if they were its own, of `POOLED` d_in tokens that are like those of all experts.

    Fades as its own tokens become many. Routers starve some experts on any calibration set, and a Gram of fewer tokens
    than inputs says that whole directions do not matter, which the siblings' inputs deny. Tokens count as they were.
    """
    scale = POOLED * gram.d_in / gram.tokens * gram.weight_sum / pool.weight_sum
    return Gram(gram.xtx + scale * pool.xtx, gram.weight_sum, gram.tokens)


def _empty(group: Group) -> Gram:
    return Gram.zeros(group.d_in, group.matrices[0].weight.device)


def _no_drift(group: Group, writers: Sequence[nn.Module]) -> Drift:
    weight = group.matrices[0].weight
    stream = torch.zeros(weight.shape, device=weight.device) if group.module in writers else None
    return Drift(torch.zeros(group.d_in, group.d_in, device=weight.device), stream)


def added(gram: Gram, ranks: Ranks, to: int | None = None) -> Gram:
    """A Gram of all processes' tokens: its matrix where `to` says, how many they are everywhere."""
    counts = torch.tensor([gram.weight_sum, gram.tokens], dtype=torch.float64, device=gram.xtx.device)
    ranks.add(counts)
    ranks.add(gram.xtx, to)
    return Gram(gram.xtx, float(counts[0]), int(counts[1]))


def held_out_energies(weight: Tensor, dense: Tensor, held: Held) -> Tensor:
    """Sums over held-out tokens, by region code [3, codes], float64: w |(W - What) x|^2, w |W x|^2, and the tokens."""
    sums = torch.zeros(3, len(REGIONS) + 1, dtype=torch.float64, device=weight.device)
    delta = dense.float() - weight.float()
    for code, gram in held.grams.items():
        for row, matrix in enumerate((delta, dense)):
            sums[row, code] += gram_energy(matrix, gram)
        sums[2, code] += gram.tokens
    for seen in held.seen:
        sums[2] += torch.bincount(seen.codes, minlength=sums.shape[1])
        for row, matrix in enumerate((delta, dense)):
            energies = token_energies(matrix, seen.x)
            energies = energies if seen.weight is None else energies * seen.weight
            sums[row] += torch.bincount(seen.codes, energies.double(), minlength=sums.shape[1])
    return sums


def held_out_errors(energies: Tensor) -> tuple[float | None, dict[str, float]]:
    """sum w |(W - What) x|^2 / sum w |W x|^2 over held-out tokens: of all of them, None of none, and by region."""
    lost, total, tokens = energies.cpu()

    def ratio(a: float, b: float) -> float:
        return a / b if b else (0.0 if a == 0 else float("inf"))

    by_region = {region: ratio(float(lost[code]), float(total[code])) for region, code in CODES.items() if tokens[code]}
    return (ratio(float(lost.sum()), float(total.sum())) if by_region else None), by_region


@contextmanager
def swapped(dense: Mapping[Matrix, Tensor]) -> Iterator[None]:
    """While open, matrices have the weights in `dense`."""
    pruned = {matrix: matrix.weight.clone() for matrix in dense}
    try:
        for matrix, weight in dense.items():
            matrix.weight.copy_(weight)
        yield
    finally:
        for matrix, weight in pruned.items():
            matrix.weight.copy_(weight)


def writers_of(block: nn.Module, index: int, stream: Stream) -> tuple[nn.Module, ...]:
    """The two linears whose outputs the block adds to its input, in the order they run; none if it does otherwise.

    Watched, not listed: out = hidden + first(...) + second(...) must hold, which norms after the linears (Gemma) or
    routed experts break.
    """
    given: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        given[module] = out

    with ExitStack() as stack:
        for module in linears(block).values():
            stack.callback(module.register_forward_hook(note).remove)
        hidden = stream.hidden.to(stream.shell.device)
        added = (stream.run(block, index) - hidden).float()
    rows = stream.batch.regions.to(hidden.device) > 0
    same = [module for module in given if given[module].shape == added.shape]
    missing = {
        pair: float((added - given[pair[0]].float() - given[pair[1]].float())[rows].norm())
        for pair in combinations(same, 2)
    }
    best = min(missing, key=lambda pair: missing[pair], default=())
    rounding = torch.finfo(hidden.dtype).eps * float(hidden[rows].norm())
    return best if best and missing[best] < 0.01 * float(added[rows].norm()) + rounding else ()


def matrices_of(block: nn.Module, prefix: str, *, routers: bool = False) -> Iterator[Matrix]:
    """Every prunable weight of a block under its full name; with `routers` what is never pruned today too."""
    for name, module in linears(block, routers=routers).items():
        yield Matrix(f"{prefix}.{name}", module)
    for name, experts in packed_experts(block).items():
        for expert in range(experts.count):
            for attribute in (experts.up, "down_proj"):
                full = f"{prefix}.{name}.{expert}.{attribute}"
                yield Matrix(full, experts.module, attribute, expert, experts.transposed)


def groups_of(block: nn.Module, index: int, matrices: Sequence[Matrix], stream: Stream) -> list[Group]:
    """Matrices by shared input, in the order the block uses them: found by watching which tensors the linears receive.

    ValueError for a chosen linear that the block never calls: there is nothing to calibrate it on.
    """
    by_module: dict[nn.Module, list[Matrix]] = {}
    for matrix in matrices:
        by_module.setdefault(matrix.module, []).append(matrix)
    order: list[tuple[nn.Module, Tensor]] = []  # the tensors are kept so that no two share an id

    def note(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        order.append((module, args[0] if args else next(iter(kwargs.values()))))

    with ExitStack() as stack:
        for module in by_module:
            stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        for some in (stream.start(WATCHED_TOKENS), stream):  # few tokens may leave an expert without any
            order.clear()
            some.run(block, index)
            called = {module for module, _ in order}
            if called == set(by_module):
                break
    if missing := [matrix.name for module, found in by_module.items() if module not in called for matrix in found]:
        raise ValueError(f"{missing[0]} is never called by its block; leave it out with `prune.ignore`")
    shared: dict[int, list[Matrix]] = {}
    alone: dict[Matrix, Group] = {}
    for module, x in order:
        if by_module[module][0].expert is None:
            shared.setdefault(id(x), []).extend(by_module[module])
        else:
            alone |= {matrix: Group((matrix,)) for matrix in by_module[module]}
    return [*(Group(tuple(matrices)) for matrices in shared.values()), *alone.values()]


def same_groups(
    block: nn.Module, index: int, matrices: Sequence[Matrix], streams: Sequence[Stream], ranks: Ranks
) -> list[Group]:
    """The groups of a block, the same in every process: the first one finds them by watching (`groups_of`)."""
    by_name = {matrix.name: matrix for matrix in matrices}
    found = ranks.decide(
        lambda: [[m.name for m in group.matrices] for group in groups_of(block, index, matrices, streams[0])]
    )
    return [Group(tuple(by_name[name] for name in names)) for names in found]
