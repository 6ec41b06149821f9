"""The block loop, where the two lanes meet: hooks, devices, one Gram per distinct input and region, solve, go on.

For every decoder block: run the calibration documents through it and add up x xᵀ for each group of matrices that
receive the same tensor (q/k/v, gate/up), one Gram a region; solve each matrix; write the block's result down; pass on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateurs.artifacts import atomic_write, read_json, write_json
from secateurs.calibration import CODES, REGIONS, Batch, CalibrationSet, batches
from secateurs.goals import Drift, Goal, Propagate, check_goal, imitate
from secateurs.layer import Gram, LayerProblem, LayerSolution, Outcome, relative_error
from secateurs.models import Matrix, chosen, decoder, decoder_blocks, linears, packed_experts
from secateurs.patterns import Pattern
from secateurs.solvers import Solver
from secateurs.tune import Example, Tune, tune

Sum = TypeVar("Sum", Gram, Drift)
Value = TypeVar("Value")
Grams = dict[str, Gram]  # one a region
EQUALLY = {"prompt": 1.0, "think": 1.0, "answer": 1.0}  # every arm is judged on the same tokens of the same documents


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to do to the model. `propagate` says which inputs later layers see: of the dense model, of the pruned blocks
    before, or (group) of the pruned matrices before within the block too. `goal` says what a layer reproduces: its own
    output on those inputs, the dense model's, or that and what the stream lacks. `tune` comes after a block."""

    pattern: Pattern
    solver: Solver
    propagate: Propagate = "block"
    goal: Goal = "own"
    tune: Tune | None = None
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def __post_init__(self):
        check_goal(self.goal, self.propagate)


@dataclass(frozen=True, kw_only=True)
class LayerResult:
    """What happened to one matrix. Errors are relative: tr(D G Dᵀ) / tr(W G Wᵀ), on the weights as stored.

    `alpha` and `beta` say how far its goal went beyond its own weights (`goals.imitate`); `block_error` is the held-out
    error of its block's output before and after the fine-tune, where there was one (`tune.tune`).
    """

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
    alpha: float = 0.0
    beta: float = 0.0
    block_error: tuple[float, float] | None = None


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


@torch.no_grad()  # not inference_mode: a fine-tune needs gradients through what is computed here
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
            if plan.propagate == "dense" or plan.goal != "own":
                for stream in streams:
                    stream.dense = stream.run(block, index, stream.dense)
            for matrix in selected[index]:
                matrix.weight.copy_(tensors[matrix.name])
            for stream in streams:
                stream.hidden = stream.dense if plan.propagate == "dense" else stream.run(block, index)
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
    """Collect, solve, fine-tune and write back one block, and move the streams behind it."""
    groups = _groups(block, index, matrices, streams[0])
    writers = _writers(block, index, streams[0]) if plan.goal == "residual" else ()
    solved: list[_Solved] = []

    def solve(batch: Sequence[_Group]) -> None:
        dense = {one.matrix: one.dense for one in solved}
        sums = _collect(block, index, batch, streams, plan, writers, dense)
        for group in batch:
            gram, note = _train_gram(group, groups, sums.train, weights)
            for matrix in group.matrices:
                one = _solve(matrix, group, gram, sums, weights, plan, note)
                solved.append(one)
                matrix.weight.copy_(one.solution.weight)
                progress(done + len(solved), total, matrix.name)

    for batch in [[group] for group in groups] if plan.propagate == "group" else [groups]:
        solve(batch)
    errors = _tune_block(block, index, solved, streams, weights, plan.tune) if plan.tune else None
    for stream in streams:
        stream.hidden = _known(stream.out) if plan.propagate == "dense" else stream.run(block, index)
        stream.dense = stream.dense if stream.dense_out is None else stream.dense_out
        stream.out = stream.dense_out = None
    return [_result(one, index, plan.pattern, errors) for one in solved]


@dataclass(frozen=True)
class _Solved:
    """A matrix with its dense weights, what it was solved on and judged on, and the solution."""

    matrix: Matrix
    dense: Tensor
    gram: Gram
    held: Grams
    solution: LayerSolution
    note: str
    alpha: float
    beta: float


def _solve(
    matrix: Matrix, group: _Group, gram: Gram, sums: "_Sums", weights: Mapping[str, float], plan: Plan, note: str
) -> _Solved:
    dense = matrix.weight.clone()
    target, alpha, beta = None, 0.0, 0.0
    drift = _mix(sums.train_drift[group.name], weights)
    held_gram, held_drift = _mix(sums.held[group.name], EQUALLY), _mix(sums.held_drift[group.name], EQUALLY)
    if drift and held_gram and held_drift:
        imitation = imitate(dense, gram, drift, held_gram, held_drift)
        target, alpha, beta = imitation.target, imitation.alpha, imitation.beta
    problem = LayerProblem(name=matrix.name, weight=dense, gram=gram, pattern=plan.pattern, target=target)
    return _Solved(matrix, dense, gram, sums.held[group.name], plan.solver.solve(problem), note, alpha, beta)


def _result(one: _Solved, index: int, pattern: Pattern, block_error: tuple[float, float] | None) -> LayerResult:
    """What is reported of a matrix, its errors measured on its weights as they are now."""
    d_out, d_in = one.dense.shape
    weight, solution = one.matrix.weight, one.solution
    held_gram = _mix(one.held, EQUALLY)
    return LayerResult(
        name=one.matrix.name,
        block=index,
        shape=(d_out, d_in),
        pattern=str(pattern),
        zeros_asked=pattern.num_zeros(d_out, d_in),
        zeros=int((~solution.mask).sum()),
        error_train=relative_error(weight, one.dense, one.gram),
        error_held_out=relative_error(weight, one.dense, held_gram) if held_gram else None,
        error_by_region={
            region: relative_error(weight, one.dense, gram) for region, gram in one.held.items() if gram.tokens
        },
        damp=solution.stats.get("damp", 0.0),
        seconds=solution.stats.get("seconds", 0.0),
        outcome=solution.outcome.value,
        note=one.note or ("" if solution.outcome == Outcome.OK else solution.outcome.text),
        alpha=one.alpha,
        beta=one.beta,
        block_error=block_error,
    )


def _tune_block(
    block: nn.Module,
    index: int,
    solved: Sequence[_Solved],
    streams: Sequence[_Stream],
    weights: Mapping[str, float],
    how: Tune,
) -> tuple[float, float] | None:
    """Fine-tune the kept weights of all matrices together; None if there is nothing held out to judge it by."""
    kept: dict[nn.Parameter, Tensor] = {}
    for one in solved:
        parameter = one.matrix.parameter
        mask = kept.setdefault(parameter, torch.zeros_like(parameter, dtype=torch.bool))
        (mask if one.matrix.expert is None else mask[one.matrix.expert]).copy_(one.solution.mask)

    def example(stream: _Stream, worth: Mapping[str, float]) -> Example:
        of_code = torch.tensor([0.0, *(worth.get(region, 0.0) for region in REGIONS)])
        weight = of_code[stream.batch.regions].to(stream.hidden.device)
        goal = _known(stream.out) if stream.dense_out is None else stream.dense_out
        return Example(stream.hidden, *stream.calls[index], goal, weight)

    train = [example(stream, weights) for stream in streams if not stream.held_out]
    held = [example(stream, EQUALLY) for stream in streams if stream.held_out]
    if not kept or not held:
        return None
    errors = tune(block, kept, train, held, how)
    for one in solved:
        assert not bool(one.matrix.weight[~one.solution.mask].any()), f"{one.matrix.name}: a pruned weight moved"
    return errors


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
                received = [(args[1:], kwargs) for args, kwargs in calls]
                streams.append(_Stream(batch, held_out, hidden, received, hidden))
    return streams


@dataclass
class _Sums:
    """For every group the Grams by region, over the calibration and over the held-out documents; Drifts likewise."""

    train: dict[str, Grams]
    held: dict[str, Grams]
    train_drift: dict[str, dict[str, Drift]]
    held_drift: dict[str, dict[str, Drift]]


def _collect(
    block: nn.Module,
    index: int,
    groups: Sequence[_Group],
    streams: Sequence[_Stream],
    plan: Plan,
    writers: Sequence[nn.Module] = (),
    dense: Mapping[Matrix, Tensor] | None = None,
) -> _Sums:
    """Everything a solve of `groups` needs, in one pass; in two, one of them through the dense model, where the goal is
    the dense model's. `dense` holds the weights from before the solve of what is pruned in this block already."""
    sums = _Sums(*({group.name: {} for group in groups} for _ in range(4)))
    keep_out = not dense and (plan.tune is not None or plan.propagate == "dense")
    for stream in streams:
        grams, drifts = (sums.held, sums.held_drift) if stream.held_out else (sums.train, sums.train_drift)
        regions = stream.batch.regions.flatten().to(stream.hidden.device)
        seen = _Seen()
        if plan.goal != "own":
            with _swapped(dense or {}), _watch(groups, writers, seen):
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
def _watch(groups: Sequence[_Group], writers: Sequence[nn.Module], seen: _Seen) -> Iterator[None]:
    """While open, the inputs of `groups` (experts apart: their tokens differ) and outputs of `writers` go to `seen`."""

    def note_input(group: _Group) -> Callable[..., None]:
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
def _swapped(dense: Mapping[Matrix, Tensor]) -> Iterator[None]:
    """While open, matrices have the weights in `dense`."""
    pruned = {matrix: matrix.weight.clone() for matrix in dense}
    try:
        for matrix, weight in dense.items():
            matrix.weight.copy_(weight)
        yield
    finally:
        for matrix, weight in pruned.items():
            matrix.weight.copy_(weight)


def _writers(block: nn.Module, index: int, stream: _Stream) -> tuple[nn.Module, ...]:
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
    groups: Sequence[_Group],
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

    def add_drift(group: _Group, x: Tensor) -> None:
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

    def linear_hook(group: _Group) -> Callable[..., None]:
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


def _mix(parts: Mapping[str, Sum], weights: Mapping[str, float]) -> Sum | None:
    """Σ weight · part over the regions that have tokens and a positive weight; None if there is none."""
    found = [part * weights[region] for region in REGIONS if weights.get(region) and (part := parts.get(region))]
    return sum(found[1:], found[0]) if found else None


def _known(value: Value | None) -> Value:
    assert value is not None
    return value


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
    pairs = ("shape", "block_error")
    results = [LayerResult(**(row | {key: row[key] and tuple(row[key]) for key in pairs})) for row in rows]
    tensors = load_file(_block_path(folder, index).with_suffix(".safetensors"))
    assert set(tensors) == {matrix.name for matrix in matrices}, f"{folder} belongs to another plan"
    return tensors, results
