"""The block loop, where the two lanes meet: hooks, devices, one Gram per distinct input and region, solve, go on.

For every decoder block: run the calibration documents through it and add up x xᵀ for each group of matrices that
receive the same tensor (q/k/v, gate/up), one Gram a region; solve each matrix; write the block's result down; pass on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateurs.artifacts import atomic_write, read_json, write_json
from secateurs.calibration import CODES, REGIONS, Batch, CalibrationSet, batches
from secateurs.layer import Gram, LayerProblem, Outcome, relative_error
from secateurs.models import Matrix, chosen, decoder, decoder_blocks, linears, packed_experts
from secateurs.patterns import Pattern
from secateurs.solvers import Solver

Propagate = Literal["dense", "block", "group"]
Grams = dict[str, Gram]  # one a region
HELD_OUT_REGIONS = ("prompt", "think", "answer")  # every arm is judged on the same regions of the same documents


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to do to the model. `propagate` says which inputs later layers see: of the dense model, of the pruned blocks
    before, or (group) of the pruned matrices before within the block too."""

    pattern: Pattern
    solver: Solver
    propagate: Propagate = "block"
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LayerResult:
    """What happened to one matrix. Errors are relative: tr(D G Dᵀ) / tr(W G Wᵀ), on the weights as stored."""

    name: str
    block: int
    shape: tuple[int, int]
    pattern: str
    zeros_asked: int
    zeros: int
    error_train: float
    error_held_out: float | None
    error_by_region: dict[str, float]
    damp: float
    seconds: float
    outcome: str
    note: str = ""


@dataclass(frozen=True)
class _Group:
    """Matrices that receive the same input, and the module whose input it is; for experts, which one and part."""

    name: str
    matrices: tuple[Matrix, ...]
    module: nn.Module
    expert: int | None = None
    part: Literal["gate_up", "down"] | None = None


@dataclass
class _Stream:
    """One batch on its way through the blocks: its hidden states now, and what each block is called with besides."""

    batch: Batch
    held_out: bool
    hidden: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def run(self, block: nn.Module, index: int) -> Tensor:
        args, kwargs = self.calls[index]
        out = block(self.hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out


def prunable(model: PreTrainedModel, plan: Plan) -> list[list[Matrix]]:
    """The matrices the plan touches, by block, each checked against the pattern. ValueError if there are none."""
    prefix, blocks = decoder_blocks(model)
    per_block = [
        [matrix for _, found in _matrices(block, f"{prefix}.{i}") for matrix in found] for i, block in enumerate(blocks)
    ]
    names = [matrix.name for block in per_block for matrix in block]
    if not names:
        raise ValueError(f"{type(model).__name__} has no linear layer in its decoder blocks; secateurs cannot prune it")
    wanted = set(chosen(names, plan.targets, plan.ignore))
    selected = [[matrix for matrix in block if matrix.name in wanted] for block in per_block]
    for matrix in (matrix for block in selected for matrix in block):
        try:
            plan.pattern.check(*matrix.weight.shape)
        except ValueError as error:
            raise ValueError(f"{matrix.name}: {error}") from None
    return selected


@torch.inference_mode()
def prune(
    model: PreTrainedModel,
    calibration: CalibrationSet,
    plan: Plan,
    *,
    folder: Path | None = None,
    batch_tokens: int = 8192,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> list[LayerResult]:
    """Prune `model` in place and return one result a matrix, in the order they were solved.

    Every finished block is written to `folder`; a second call with the same folder takes those blocks from there and
    goes on (the folder must belong to this model, calibration and plan: `run` names it by their hash). `batch_tokens`
    bounds the padded tokens a forward pass sees and changes results by float rounding only.
    """
    selected = prunable(model, plan)
    total = sum(map(len, selected))
    _, blocks = decoder_blocks(model)
    streams = _capture(model, calibration, batch_tokens)
    results: list[LayerResult] = []
    for index, block in enumerate(blocks):
        saved = _load_block(folder, index, selected[index])
        if saved is None:
            solved = _prune_block(
                block, index, selected[index], streams, calibration.weights, plan, progress, len(results), total
            )
            _save_block(folder, index, selected[index], solved)
        else:
            tensors, solved = saved
            if plan.propagate == "dense":
                _advance(streams, block, index)
            for matrix in selected[index]:
                matrix.weight.copy_(tensors[matrix.name])
            if plan.propagate != "dense":
                _advance(streams, block, index)
        results += solved
        progress(len(results), total, f"block {index + 1} of {len(blocks)}")
    return results


def _prune_block(
    block: nn.Module,
    index: int,
    matrices: Sequence[Matrix],
    streams: Sequence[_Stream],
    weights: Mapping[str, float],
    plan: Plan,
    progress: Callable[[int, int, str], None],
    done: int,
    total: int,
) -> list[LayerResult]:
    """Collect, solve and write back one block, and move the streams behind it."""
    groups = _groups(block, index, matrices, streams[0])
    results: list[LayerResult] = []

    def solve(group: _Group, train: Mapping[str, Grams], held: Mapping[str, Grams]) -> None:
        gram, note = _train_gram(group, groups, train, weights)
        held_gram = _mix(held[group.name], dict.fromkeys(HELD_OUT_REGIONS, 1.0))
        for matrix in group.matrices:
            dense = matrix.weight.clone()
            solution = plan.solver.solve(LayerProblem(name=matrix.name, weight=dense, gram=gram, pattern=plan.pattern))
            matrix.weight.copy_(solution.weight)
            d_out, d_in = dense.shape
            results.append(
                LayerResult(
                    name=matrix.name,
                    block=index,
                    shape=(d_out, d_in),
                    pattern=str(plan.pattern),
                    zeros_asked=plan.pattern.num_zeros(d_out, d_in),
                    zeros=int((~solution.mask).sum()),
                    error_train=relative_error(matrix.weight, dense, gram),
                    error_held_out=relative_error(matrix.weight, dense, held_gram) if held_gram else None,
                    error_by_region={
                        region: relative_error(matrix.weight, dense, one)
                        for region, one in held[group.name].items()
                        if one.tokens
                    },
                    damp=solution.stats.get("damp", 0.0),
                    seconds=solution.stats.get("seconds", 0.0),
                    outcome=solution.outcome.value,
                    note=note or ("" if solution.outcome == Outcome.OK else solution.outcome.text),
                )
            )
            progress(done + len(results), total, matrix.name)

    if plan.propagate == "group":
        for group in groups:
            solve(group, *_collect(block, index, [group], streams))
        _advance(streams, block, index)
        return results
    train, held = _collect(block, index, groups, streams, advance=plan.propagate == "dense")
    for group in groups:
        solve(group, train, held)
    if plan.propagate == "block":
        _advance(streams, block, index)
    return results


def _capture(model: PreTrainedModel, calibration: CalibrationSet, batch_tokens: int) -> list[_Stream]:
    """Run every batch through the dense decoder once and note what each block receives: its own masks and positions."""
    _, blocks = decoder_blocks(model)
    streams: list[_Stream] = []
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
                streams.append(_Stream(batch, held_out, hidden, [(args[1:], kwargs) for args, kwargs in calls]))
    return streams


def _advance(streams: Sequence[_Stream], block: nn.Module, index: int) -> None:
    for stream in streams:
        stream.hidden = stream.run(block, index)


def _collect(
    block: nn.Module, index: int, groups: Sequence[_Group], streams: Sequence[_Stream], *, advance: bool = False
) -> tuple[dict[str, Grams], dict[str, Grams]]:
    """The Grams of every group by region, over the calibration and over the held-out documents, in one pass."""
    sums: tuple[dict[str, Grams], dict[str, Grams]] = ({g.name: {} for g in groups}, {g.name: {} for g in groups})
    for stream in streams:
        regions = stream.batch.regions.flatten().to(stream.hidden.device)
        with _hooks(groups, regions, sums[stream.held_out]):
            out = stream.run(block, index)
        if advance:
            stream.hidden = out
    return sums


@contextmanager
def _hooks(groups: Sequence[_Group], regions: Tensor, sums: dict[str, Grams]) -> Iterator[None]:
    """While open, the inputs of `groups` are added to `sums`. Padding (region 0) is never looked at."""

    def add(name: str, x: Tensor, codes: Tensor, weight: Tensor | None = None) -> None:
        for region, code in CODES.items():
            rows = (codes == code).nonzero().squeeze(-1)
            if len(rows):
                gram = sums[name].setdefault(region, Gram.zeros(x.shape[-1], x.device))
                gram.update(x[rows], None if weight is None else weight[rows])

    def linear_hook(group: _Group) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            add(group.name, args[0].reshape(-1, args[0].shape[-1]), regions)

        return hook

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
        yield


def _matrices(block: nn.Module, prefix: str) -> Iterator[tuple[nn.Module, list[Matrix]]]:
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


def _groups(block: nn.Module, index: int, matrices: Sequence[Matrix], stream: _Stream) -> list[_Group]:
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
    result: list[_Group] = []
    called = {module for module, _ in order}
    if missing := [matrix.name for module, found in by_module.items() if module not in called for matrix in found]:
        raise ValueError(f"{missing[0]} is never called by its block; leave it out with `prune.ignore`")
    for module, x in order:
        if by_module[module][0].expert is None:
            groups.setdefault(id(x), []).extend(by_module[module])
            modules.setdefault(id(x), module)
    for key, found in groups.items():
        result.append(_Group(found[0].name, tuple(found), modules[key]))
    for module in dict.fromkeys(module for module, _ in order):
        for matrix in by_module[module]:
            if matrix.expert is not None:
                part = "down" if matrix.name.endswith("down_proj") else "gate_up"
                result.append(_Group(matrix.name, (matrix,), module, matrix.expert, part))
    return result


def _train_gram(
    group: _Group, groups: Sequence[_Group], sums: Mapping[str, Grams], weights: Mapping[str, float]
) -> tuple[Gram, str]:
    """The weighted Gram of a group, and a note when an expert saw no token and the pool of its siblings stands in."""
    gram = _mix(sums[group.name], weights)
    if gram is not None:
        return gram, ""
    siblings = [g for g in groups if g.module is group.module and g.part == group.part and g.name in sums]
    pooled = [mixed for g in siblings if (mixed := _mix(sums[g.name], weights)) is not None]
    if group.expert is None or not pooled:
        raise ValueError(f"{group.name}: no calibration token with a positive weight reached it; use more documents")
    return sum(pooled[1:], pooled[0]), "no calibration token reached this expert; the Gram of all experts was used"


def _mix(grams: Grams, weights: Mapping[str, float]) -> Gram | None:
    """Σ weight · Gram over the regions that have tokens and a positive weight; None if there is none."""
    parts = [gram * weights[region] for region in REGIONS if weights.get(region) and (gram := grams.get(region))]
    return sum(parts[1:], parts[0]) if parts else None


def _block_path(folder: Path, index: int) -> Path:
    return folder / f"block-{index:05d}"


def _save_block(folder: Path | None, index: int, matrices: Sequence[Matrix], results: Sequence[LayerResult]) -> None:
    """Weights first, results last: the results file says that the block is complete."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {matrix.name: matrix.weight.cpu().contiguous() for matrix in matrices}
    atomic_write(_block_path(folder, index).with_suffix(".safetensors"), save(tensors))
    write_json(_block_path(folder, index).with_suffix(".json"), [asdict(result) for result in results])


def _load_block(
    folder: Path | None, index: int, matrices: Sequence[Matrix]
) -> tuple[dict[str, Tensor], list[LayerResult]] | None:
    if folder is None or not _block_path(folder, index).with_suffix(".json").exists():
        return None
    rows = read_json(_block_path(folder, index).with_suffix(".json"))
    results = [LayerResult(**(row | {"shape": tuple(row["shape"])})) for row in rows]
    tensors = load_file(_block_path(folder, index).with_suffix(".safetensors"))
    assert set(tensors) == {matrix.name for matrix in matrices}, f"{folder} belongs to another plan"
    return tensors, results
