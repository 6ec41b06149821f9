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
from secateurs.ranks import ALONE, Ranks


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
    ranks: Ranks = ALONE,
) -> list[Verdict]:
    """Which experts every block keeps: those worth most on the calibration tokens. The model is as it was afterwards.

    Written to `record` after every block; called again, it goes on from there. Errors are those of a mixture's output,
    relative, on the held-out tokens and on about as many that calibrate. A block's weights need to be there only while
    `opened(index)` is. ValueError for a model without experts, or a router that is not known. All `ranks` call this
    together, each for its share of the tokens; only the first one needs to see the record.
    """
    prefix, blocks = decoder_blocks(model)
    cut.check(model)
    found = ranks.decide(lambda: _read(record))
    if len(found) == len(blocks):
        return found
    streams = capture(model, calibration, batch_tokens, place=place, ranks=ranks)
    judged = _judged(streams, ranks)
    for index, block in enumerate(blocks):
        with opened(index):
            every = mixtures(block)
            if index == len(found):
                clock = perf_counter()
                meters = _score(block, index, every, streams, calibration.weights, ranks)
                kept = {meter.mixture.name: meter.best(cut, score) for meter in meters}
                errors = _judge(block, index, every, kept, judged, ranks)
                seconds = (perf_counter() - clock) / max(len(every), 1)
                results = [
                    _result(f"{prefix}.{index}.{meter.mixture.name}", index, meter, kept, cut, error, seconds)
                    for meter, error in zip(meters, errors, strict=True)
                ]
                found.append(ranks.tell(Verdict(kept, results)))
                ranks.decide(lambda: _write(record, found))
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


def _write(record: Path, found: Sequence[Verdict]) -> None:
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, [asdict(one) for one in found])


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
        self.sums = torch.zeros(3, mixture.experts.count, dtype=torch.float64)
        self.tokens, self.norms, self.squares = self.sums
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
    block: nn.Module,
    index: int,
    every: Sequence[Mixture],
    streams: Sequence[Stream],
    weights: Mapping[str, float],
    ranks: Ranks,
) -> list[_Meter]:
    """What the calibration tokens of all processes say of every expert of a block."""
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
    for meter in meters:
        ranks.add(meter.sums)
    return meters


def _judged(streams: Sequence[Stream], ranks: Ranks) -> list[Stream]:
    """Those that are held out, and the first others of all processes, about as many tokens."""
    here = [(stream.number, stream.held_out, stream.batch.tokens) for stream in streams]
    everywhere = sorted(one for each in ranks.gather(here) for one in each)
    wanted = max(sum(tokens for _, held_out, tokens in everywhere if held_out), 1)
    chosen = set[int]()
    for number, held_out, tokens in everywhere:
        if held_out or wanted > 0:
            chosen.add(number)
            wanted -= 0 if held_out else tokens
    return [stream for stream in streams if stream.number in chosen]


def _judge(
    block: nn.Module,
    index: int,
    every: Sequence[Mixture],
    kept: Mapping[str, Sequence[int]],
    streams: Sequence[Stream],
    ranks: Ranks,
) -> list[dict[bool, float]]:
    """How far off each mixture's output is with what it keeps, squared, relative; by whether tokens are held out."""
    sums = torch.zeros(2, len(every), 2, dtype=torch.float64)  # how far off, of how much; mixture; held out or not
    for stream in streams if every else ():
        real = stream.batch.regions.flatten().to(stream.shell.device) > 0
        before = _outputs(block, index, every, stream)
        with _only(every, kept):
            after = _outputs(block, index, every, stream)
        for place, (wanted, found) in enumerate(zip(before, after, strict=True)):
            for row, what in enumerate((found - wanted, wanted)):
                size = what.reshape(len(real), -1)[real].float().square().sum()
                sums[row, place, int(stream.held_out)] += size.cpu()
    ranks.add(sums)
    lost, size = sums.tolist()
    return [
        {bool(which): lost[place][which] / size[place][which] for which in (0, 1) if size[place][which]}
        for place in range(len(every))
    ]


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
        zeros=zeros, error_train=error.get(False, 0.0), error_held_out=error.get(True), error_by_region={}, damp=0.0,
        seconds=seconds, outcome=str(Outcome.OK), tokens=round(float(meter.tokens.sum())),
        note=f"{unseen} of {mixture.experts.count} experts saw no calibration token" if unseen else "",
    )  # fmt: skip
