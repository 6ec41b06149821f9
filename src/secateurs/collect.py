"""What runs through the blocks and what is summed on the way: streams of documents, groups of matrices, their sums.

The only file with hooks. Matrices that receive the same tensor (q/k/v, gate/up) are one group with one Gram a region.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateurs.calibration import CODES, REGIONS, Batch, CalibrationSet, batches
from secateurs.goals import Drift
from secateurs.layer import Gram
from secateurs.models import Matrix, decoder, decoder_blocks, linears, packed_experts

Sum = TypeVar("Sum", Gram, Drift)
Grams = dict[str, Gram]  # one a region
EQUALLY = {"prompt": 1.0, "think": 1.0, "answer": 1.0}  # every arm is judged on the same tokens of the same documents


@dataclass(frozen=True)
class Group:
    """Matrices that receive the same input, and the module whose input it is; for experts, which one and part."""

    name: str
    matrices: tuple[Matrix, ...]
    module: nn.Module
    expert: int | None = None
    part: Literal["gate_up", "down"] | None = None


@dataclass
class Stream:
    """One batch on its way through the blocks: its hidden states now, and what each block is called with besides.

    `out` is what the dense block makes of `hidden`; `dense` and `dense_out` are the same in the dense model.
    """

    batch: Batch
    held_out: bool
    hidden: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    dense: Tensor
    out: Tensor | None = None
    dense_out: Tensor | None = None

    def run(self, block: nn.Module, index: int, hidden: Tensor | None = None) -> Tensor:
        args, kwargs = self.calls[index]
        out = block(self.hidden if hidden is None else hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out


def capture(model: PreTrainedModel, calibration: CalibrationSet, batch_tokens: int) -> list[Stream]:
    """Run every batch through the dense decoder once and note what each block receives: its own masks and positions."""
    _, blocks = decoder_blocks(model)
    streams: list[Stream] = []
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        calls.append(((hidden, *args[1:]), rest))

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(note, with_kwargs=True).remove)
        for held_out, documents in ((False, calibration.documents), (True, calibration.held_out)):
            for batch in batches(documents, batch_tokens):
                calls.clear()
                decoder(model)(input_ids=batch.ids.to(model.device), use_cache=False)
                hidden = calls[0][0][0]
                received = [(args[1:], kwargs) for args, kwargs in calls]
                streams.append(Stream(batch, held_out, hidden, received, hidden))
    return streams


@dataclass
class Sums:
    """For every group the Grams by region, over the calibration and over the held-out documents; Drifts likewise."""

    train: dict[str, Grams]
    held: dict[str, Grams]
    train_drift: dict[str, dict[str, Drift]]
    held_drift: dict[str, dict[str, Drift]]


def collect(
    block: nn.Module,
    index: int,
    groups: Sequence[Group],
    streams: Sequence[Stream],
    *,
    keep_out: bool = False,
    imitate: bool = False,
    writers: Sequence[nn.Module] = (),
    dense: Mapping[Matrix, Tensor] | None = None,
) -> Sums:
    """Everything a solve of `groups` needs, in one pass; in two, one of them through the dense model, to `imitate` it.

    `dense` holds the weights from before the solve of what is pruned in this block already. With `keep_out` the streams
    remember what comes out.
    """
    sums = Sums(*({group.name: {} for group in groups} for _ in range(4)))
    for stream in streams:
        grams, drifts = (sums.held, sums.held_drift) if stream.held_out else (sums.train, sums.train_drift)
        regions = stream.batch.regions.flatten().to(stream.hidden.device)
        seen = _Seen()
        if imitate:
            with swapped(dense or {}), _watch(groups, writers, seen):
                stream.dense_out = stream.run(block, index, stream.dense)
            seen.drift = stream.dense - stream.hidden
        with _hooks(groups, regions, grams, writers, seen, drifts):
            out = stream.run(block, index)
        if keep_out:
            stream.out = out
    return sums


@dataclass
class _Seen:
    """Of one batch in the dense model: what groups received and writers gave; and how far the stream is off now."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[nn.Module, Tensor] = field(default_factory=dict)
    drift: Tensor | None = None


@contextmanager
def _watch(groups: Sequence[Group], writers: Sequence[nn.Module], seen: _Seen) -> Iterator[None]:
    """While open, the inputs of `groups` (experts apart: their tokens differ) and outputs of `writers` go to `seen`."""

    def note_input(group: Group) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.inputs[group.name] = args[0]

        return hook

    def note_output(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        seen.outputs[module] = out

    with ExitStack() as stack:
        for group in groups:
            if group.expert is None:
                stack.callback(group.module.register_forward_pre_hook(note_input(group)).remove)
        for module in writers:
            stack.callback(module.register_forward_hook(note_output).remove)
        yield


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
        added = (stream.run(block, index) - stream.hidden).float()
    rows = stream.batch.regions > 0
    same = [module for module in given if given[module].shape == added.shape]
    missing = {
        pair: float((added - given[pair[0]].float() - given[pair[1]].float())[rows].norm())
        for pair in combinations(same, 2)
    }
    best = min(missing, key=lambda pair: missing[pair], default=())
    rounding = torch.finfo(stream.hidden.dtype).eps * float(stream.hidden[rows].norm())
    return best if best and missing[best] < 0.01 * float(added[rows].norm()) + rounding else ()


@contextmanager
def _hooks(
    groups: Sequence[Group],
    regions: Tensor,
    sums: dict[str, Grams],
    writers: Sequence[nn.Module],
    seen: _Seen,
    drifts: dict[str, dict[str, Drift]],
) -> Iterator[None]:
    """While open, the inputs of `groups` are added to `sums`, and how far they are from those in `seen` to `drifts`.

    Padding (region 0) is never looked at.
    """

    def add(name: str, x: Tensor, codes: Tensor, weight: Tensor | None = None) -> None:
        for region, code in CODES.items():
            rows = (codes == code).nonzero().squeeze(-1)
            if len(rows):
                gram = sums[name].setdefault(region, Gram.zeros(x.shape[-1], x.device))
                gram.update(x[rows], None if weight is None else weight[rows])

    def add_drift(group: Group, x: Tensor) -> None:
        dense = seen.inputs[group.name].reshape(-1, x.shape[-1])
        off = None if seen.drift is None or group.module not in writers else seen.drift.reshape(len(x), -1)
        for region, code in CODES.items():
            rows = (regions == code).nonzero().squeeze(-1)
            if len(rows):
                now = x[rows].float()
                inputs = (dense[rows].float() - now).T @ now
                new = Drift(inputs, None if off is None else off[rows].float().T @ now)
                old = drifts[group.name].get(region)
                drifts[group.name][region] = new if old is None else old + new

    def linear_hook(group: Group) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            add(group.name, x, regions)
            if group.name in seen.inputs:
                add_drift(group, x)

        return hook

    def writer_hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        assert seen.drift is not None
        seen.drift = seen.drift + seen.outputs[module] - out

    def experts_hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        hidden, index, probability = (*args, *kwargs.values())[:3]
        hidden = hidden.reshape(-1, hidden.shape[-1])
        for group in groups:
            if group.module is not module:
                continue
            token, slot = torch.where(index == group.expert)
            x = hidden[token]
            if group.part == "down":
                packed: Any = module
                gate, up = nn.functional.linear(x, packed.gate_up_proj[group.expert]).chunk(2, dim=-1)
                x = packed.act_fn(gate) * up
            # An expert's output is scaled by its routing probability p, so its error counts with p².
            add(group.name, x, regions[token], probability[token, slot].float() ** 2)

    with ExitStack() as stack:
        for group in groups:
            if group.expert is None:
                stack.callback(group.module.register_forward_pre_hook(linear_hook(group)).remove)
        for module in {group.module for group in groups if group.expert is not None}:
            stack.callback(module.register_forward_pre_hook(experts_hook, with_kwargs=True).remove)
        for module in writers:
            stack.callback(module.register_forward_hook(writer_hook).remove)
        yield


def matrices_of(block: nn.Module, prefix: str) -> Iterator[tuple[nn.Module, list[Matrix]]]:
    """Every module of a block with prunable weights, and those weights under their full names."""
    for name, module in linears(block).items():
        yield module, [Matrix(f"{prefix}.{name}", cast(nn.Parameter, module.weight))]
    for name, module in packed_experts(block).items():
        packed: Any = module
        for expert in range(packed.down_proj.shape[0]):
            yield (
                module,
                [
                    Matrix(f"{prefix}.{name}.{expert}.gate_up_proj", packed.gate_up_proj, expert),
                    Matrix(f"{prefix}.{name}.{expert}.down_proj", packed.down_proj, expert),
                ],
            )


def groups_of(block: nn.Module, index: int, matrices: Sequence[Matrix], stream: Stream) -> list[Group]:
    """Matrices by shared input, in the order the block uses them: found by watching which tensors the linears receive.

    ValueError for a chosen linear that the block never calls: there is nothing to calibrate it on.
    """
    by_module: dict[nn.Module, list[Matrix]] = {}
    for matrix in matrices:
        for module in block.modules():
            if any(parameter is matrix.parameter for parameter in module.parameters(recurse=False)):
                by_module.setdefault(module, []).append(matrix)
    order: list[tuple[nn.Module, Tensor]] = []  # the tensors are kept so that no two share an id

    def note(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        order.append((module, args[0] if args else next(iter(kwargs.values()))))

    with ExitStack() as stack:
        for module in by_module:
            stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        stream.run(block, index)
    groups: dict[int, list[Matrix]] = {}
    modules: dict[int, nn.Module] = {}
    result: list[Group] = []
    called = {module for module, _ in order}
    if missing := [matrix.name for module, found in by_module.items() if module not in called for matrix in found]:
        raise ValueError(f"{missing[0]} is never called by its block; leave it out with `prune.ignore`")
    for module, x in order:
        if by_module[module][0].expert is None:
            groups.setdefault(id(x), []).extend(by_module[module])
            modules.setdefault(id(x), module)
    for key, found in groups.items():
        result.append(Group(found[0].name, tuple(found), modules[key]))
    for module in dict.fromkeys(module for module, _ in order):
        for matrix in by_module[module]:
            if matrix.expert is not None:
                part = "down" if matrix.name.endswith("down_proj") else "gate_up"
                result.append(Group(matrix.name, (matrix,), module, matrix.expert, part))
    return result


def train_gram(
    group: Group, groups: Sequence[Group], sums: Mapping[str, Grams], weights: Mapping[str, float]
) -> tuple[Gram, str]:
    """The weighted Gram of a group, and a note when an expert saw no token and the pool of its siblings stands in."""
    gram = mix(sums[group.name], weights)
    if gram is not None:
        return gram, ""
    siblings = [g for g in groups if g.module is group.module and g.part == group.part and g.name in sums]
    pooled = [mixed for g in siblings if (mixed := mix(sums[g.name], weights)) is not None]
    if group.expert is None or not pooled:
        raise ValueError(f"{group.name}: no calibration token with a positive weight reached it; use more documents")
    return sum(pooled[1:], pooled[0]), "no calibration token reached this expert; the Gram of all experts was used"


def mix(parts: Mapping[str, Sum], weights: Mapping[str, float]) -> Sum | None:
    """Σ weight · part over the regions that have tokens and a positive weight; None if there is none."""
    found = [part * weights[region] for region in REGIONS if weights.get(region) and (part := parts.get(region))]
    return sum(found[1:], found[0]) if found else None
