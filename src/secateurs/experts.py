"""Experts that go as a whole: how much each does for its block, and blocks that have only some of theirs.

Nothing is solved: what stays is as it was, and the router chooses among it. Block by block, each is scored on what
reaches it behind the blocks that have lost theirs, as in the block loop.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateurs.artifacts import read_json, write_json
from secateurs.calibration import CalibrationSet, worth
from secateurs.collect import Opened, Place, Stream, capture
from secateurs.cuts import FewerExperts
from secateurs.goals import Propagate
from secateurs.layer import Outcome
from secateurs.models import Mixture, decoder_blocks, mixtures
from secateurs.pruner import LayerResult


@dataclass(frozen=True)
class ExpertScore:
    """What an expert is worth: the sum over the tokens routed to it of (routing weight x norm of its output)^power,
    or the mean (`per_token`). Power 0 counts tokens."""

    power: Literal[0, 1, 2]
    per_token: bool


# The best one first (docs/faster.md). "output" is the squared error of a block's output without the expert, if nothing
# took its place; "reap" is the mean of Lasby et al. 2025 (arXiv 2510.13999); "frequency" is how many tokens it sees.
EXPERT_SCORES: dict[str, Callable[..., ExpertScore]] = {
    "output": partial(ExpertScore, power=2, per_token=False),
    "reap": partial(ExpertScore, power=1, per_token=True),
    "frequency": partial(ExpertScore, power=0, per_token=False),
}


@contextmanager
def only(mixture: Mixture, kept: Sequence[int]) -> Iterator[None]:
    """While open, the mixture has these of its experts and no other."""
    count, whole = mixture.experts.count, mixture.parts
    with ExitStack() as stack:
        for holder, parts in whole:
            for name, tensor in parts.items():
                some = tensor[torch.tensor(kept, device=tensor.device)]
                is_parameter = isinstance(tensor, nn.Parameter)
                setattr(holder, name, nn.Parameter(some, requires_grad=False) if is_parameter else some)
                stack.callback(setattr, holder, name, tensor)
            if getattr(holder, "num_experts", 0) == count:
                vars(holder)["num_experts"] = len(kept)
                stack.callback(vars(holder).update, num_experts=count)
        yield


@dataclass(frozen=True)
class Verdict:
    """What became of a block: which experts every mixture of it keeps, by name, and what that costs."""

    kept: dict[str, list[int]]
    results: list[LayerResult]


def keeping(verdicts: Sequence[Verdict], model: PreTrainedModel, opened: Opened = nullcontext) -> Opened:
    """`opened`, but every block has only the experts that it keeps."""
    blocks = decoder_blocks(model)[1]

    @contextmanager
    def with_some(index: int) -> Iterator[None]:
        with opened(index), _only(mixtures(blocks[index]), verdicts[index].kept):
            yield

    return with_some


@torch.no_grad()
def drop_experts(
    model: PreTrainedModel,
    calibration: CalibrationSet,
    cut: FewerExperts,
    score: ExpertScore,
    record: Path,
    *,
    propagate: Propagate = "block",
    batch_tokens: int = 2048,
    place: Place = lambda hidden: hidden,
    opened: Opened = nullcontext,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> list[Verdict]:
    """Which experts every block keeps: those worth most on the calibration tokens. The model is as it was afterwards.

    Written to `record` after every block; called again, it goes on from there. Errors are those of a mixture's output,
    relative, on the held-out tokens and on about as many that calibrate. A block's weights need to be there only while
    `opened(index)` is. ValueError for a model without experts, or a router that is not known.
    """
    prefix, blocks = decoder_blocks(model)
    cut.check(model)
    found = _read(record)
    streams = capture(model, calibration, batch_tokens, place=place) if len(found) < len(blocks) else []
    for index, block in enumerate(blocks if streams else ()):
        with opened(index):
            every = mixtures(block)
            if index == len(found):
                clock = perf_counter()
                meters = _score(block, index, every, streams, calibration.weights)
                kept = {meter.mixture.name: meter.best(cut, score) for meter in meters}
                errors = _judge(block, index, every, kept, _judged(streams))
                seconds = (perf_counter() - clock) / max(len(every), 1)
                results = [
                    _result(f"{prefix}.{index}.{meter.mixture.name}", index, meter, kept, cut, error, seconds)
                    for meter, error in zip(meters, errors, strict=True)
                ]
                found.append(Verdict(kept, results))
                record.parent.mkdir(parents=True, exist_ok=True)
                write_json(record, [asdict(one) for one in found])
            with nullcontext() if propagate == "dense" else _only(every, found[index].kept):
                for stream in streams:
                    stream.hidden.copy_(stream.run(block, index))
        progress(index + 1, len(blocks), f"block {index + 1} of {len(blocks)}")
    return found


def _read(record: Path) -> list[Verdict]:
    """What was found before."""
    entries: Any = read_json(record) if record.exists() else []
    return [
        Verdict(one["kept"], [LayerResult(**(result | {"shape": tuple(result["shape"])})) for result in one["results"]])
        for one in entries
    ]


@contextmanager
def _only(every: Sequence[Mixture], kept: Mapping[str, Sequence[int]]) -> Iterator[None]:
    with ExitStack() as stack:
        for mixture in every:
            stack.enter_context(only(mixture, kept[mixture.name]))
        yield


class _Meter:
    """Sums over the calibration tokens of a mixture, for each of its experts [E]."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture
        self.tokens, self.norms, self.squares = torch.zeros(3, mixture.experts.count, dtype=torch.float64)
        self.counts = torch.zeros(0)
        """What each token of the batch counts for that is on its way [tokens]."""

    def hook(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        """Before the experts: hidden states, which experts each token goes to, and with what weight."""
        hidden, index, weight = (*args, *kwargs.values())[:3]
        hidden = hidden.reshape(-1, hidden.shape[-1])
        for expert in index.unique().tolist():
            token, slot = torch.where((index == expert) & (self.counts > 0)[:, None])
            size = weight[token, slot].float() * self.mixture.experts.run(expert, hidden[token]).float().norm(dim=1)
            counts = self.counts[token]
            self.tokens[expert] += float(counts.sum())
            self.norms[expert] += float((counts * size).sum())
            self.squares[expert] += float((counts * size**2).sum())

    def best(self, cut: FewerExperts, score: ExpertScore) -> list[int]:
        """The experts that stay, as many of each group, in order."""
        worth = (self.tokens, self.norms, self.squares)[score.power]
        worth = worth / self.tokens.clamp(min=1e-9) if score.per_token else worth
        by_group = worth.view(self.mixture.groups, -1)
        stay = by_group.topk(cut.kept(self.mixture.of_group), dim=1).indices
        first = torch.arange(self.mixture.groups)[:, None] * self.mixture.of_group
        return sorted((first + stay).flatten().tolist())


def _score(
    block: nn.Module, index: int, every: Sequence[Mixture], streams: Sequence[Stream], weights: Mapping[str, float]
) -> list[_Meter]:
    """What the calibration tokens say of every expert of a block."""
    meters = [_Meter(mixture) for mixture in every]
    for stream in streams if meters else ():
        if stream.held_out:
            continue
        counts = worth(stream.batch.regions.flatten().to(stream.shell.device), weights)
        with ExitStack() as stack:
            for meter in meters:
                meter.counts = counts
                handle = meter.mixture.experts.module.register_forward_pre_hook(meter.hook, with_kwargs=True)
                stack.callback(handle.remove)
            stream.run(block, index)
    return meters


def _judged(streams: Sequence[Stream]) -> list[Stream]:
    """Those that are held out, and the first others, about as many tokens."""
    held = [stream for stream in streams if stream.held_out]
    wanted, some = sum(stream.batch.tokens for stream in held), []
    for stream in streams:
        if not stream.held_out and sum(one.batch.tokens for one in some) < max(wanted, 1):
            some.append(stream)
    return held + some


def _judge(
    block: nn.Module, index: int, every: Sequence[Mixture], kept: Mapping[str, Sequence[int]], streams: Sequence[Stream]
) -> list[dict[bool, float]]:
    """How far off each mixture's output is with what it keeps, squared, relative; by whether tokens are held out."""
    lost: list[dict[bool, float]] = [{} for _ in every]
    size: list[dict[bool, float]] = [{} for _ in every]
    for stream in streams if every else ():
        real = stream.batch.regions.flatten().to(stream.shell.device) > 0
        before = _outputs(block, index, every, stream)
        with _only(every, kept):
            after = _outputs(block, index, every, stream)
        for place, (wanted, found) in enumerate(zip(before, after, strict=True)):
            for sums, what in ((lost, found - wanted), (size, wanted)):
                more = float(what.reshape(len(real), -1)[real].float().square().sum())
                sums[place][stream.held_out] = sums[place].get(stream.held_out, 0.0) + more
    return [{which: one[which] / all_[which] for which in one} for one, all_ in zip(lost, size, strict=True)]


def _outputs(block: nn.Module, index: int, every: Sequence[Mixture], stream: Stream) -> list[Tensor]:
    """What each mixture gives for a batch that arrives at its block."""
    found: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, args: Any, out: Any) -> None:
        found[module] = out[0] if isinstance(out, tuple) else out

    with ExitStack() as stack:
        for mixture in every:
            stack.callback(mixture.module.register_forward_hook(note).remove)
        stream.run(block, index)
    return [found[mixture.module] for mixture in every]


def _result(
    name: str, index: int, meter: _Meter, kept: Mapping[str, Sequence[int]], cut: FewerExperts,
    error: Mapping[bool, float], seconds: float,
) -> LayerResult:  # fmt: skip
    mixture = meter.mixture
    zeros = (mixture.experts.count - len(kept[mixture.name])) * mixture.size
    unseen = int((meter.tokens == 0).sum())
    return LayerResult(
        name=name, block=index, shape=(mixture.experts.count, mixture.size), pattern=str(cut), zeros_asked=zeros,
        zeros=zeros, error_train=error[False], error_held_out=error.get(True), error_by_region={}, damp=0.0,
        seconds=seconds, outcome=str(Outcome.OK), tokens=round(float(meter.tokens.sum())),
        note=f"{unseen} of {mixture.experts.count} experts saw no calibration token" if unseen else "",
    )  # fmt: skip
