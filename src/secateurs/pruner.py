"""The block loop, where the two lanes meet: collect, solve, fine-tune, write down, go on.

For every decoder block: run the calibration documents through it and add up x xᵀ for each group of matrices that
receive the same tensor (q/k/v, gate/up); solve each matrix; write the block's result down; pass on.

Several processes (`ranks`) each run a share of the documents; their sums meet where a group is solved, each group in
one process; the solutions go to all. Only the first process reads and writes files.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateurs.artifacts import Behind, atomic_file, read_json, write_json
from secateurs.calibration import REGIONS, CalibrationSet, worth
from secateurs.checkpoint import give_back, save
from secateurs.collect import (
    Group,
    Held,
    Inputs,
    Opened,
    Place,
    Stream,
    Sums,
    capture,
    collect,
    held_out_energies,
    held_out_errors,
    inputs_of,
    matrices_of,
    pools_of,
    same_groups,
    writers_of,
)
from secateurs.goals import Goal, Propagate, check_goal, imitate
from secateurs.layer import Gram, LayerProblem, LayerSolution, Outcome, relative_error
from secateurs.models import Matrix, chosen, computes_in, decoder_blocks
from secateurs.patterns import Pattern, stack
from secateurs.ranks import ALONE, Ranks
from secateurs.solvers import Solver
from secateurs.tune import Example, Tune, tune


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to do to the model. `propagate` says which inputs later layers see: of the dense model, of the pruned blocks
    before, or (group) of the pruned matrices before within the block too. `goal` says what a layer reproduces: its own
    output on those inputs, the dense model's, or that and what the stream lacks. `tune` comes after a block."""

    pattern: Pattern
    solver: Solver
    patterns: Mapping[str, Pattern] = field(default_factory=dict)
    """For matrices that get another one than `pattern`: what an allocator decided, by name."""
    loss_roots: Mapping[str, Tensor] = field(default_factory=dict)
    """What errors of a matrix's outputs cost the model, where that decides what goes, by name."""
    costs: Mapping[str, Tensor] = field(default_factory=dict)
    """What groups of a matrix's inputs are to the model, where that decides what goes, by name."""
    propagate: Propagate = "block"
    goal: Goal = "own"
    tune: Tune | None = None
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def __post_init__(self):
        check_goal(self.goal, self.propagate)

    def pattern_of(self, matrix: Matrix) -> Pattern:
        """The pattern of a matrix."""
        return self.patterns.get(matrix.name, self.pattern)


@dataclass(frozen=True, kw_only=True)
class LayerResult:
    """What happened to one matrix. Errors are relative: tr(D G Dᵀ) / tr(W G Wᵀ), on the weights as stored.

    `alpha` and `beta` say how far its goal went beyond its own weights (`goals.imitate`); `block_error` is the held-out
    error of its block's output before and after the fine-tune, where there was one (`tune.tune`). Of a narrower stream
    the errors are of what its matrices are fitted to (`narrow`).
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
    tokens: int = 0
    alpha: float = 0.0
    beta: float = 0.0
    block_error: tuple[float, float] | None = None


def prunable(model: PreTrainedModel, plan: Plan) -> list[list[Matrix]]:
    """The matrices the plan touches, by block, each checked against the pattern. ValueError if there are none."""
    prefix, blocks = decoder_blocks(model)
    per_block = [list(matrices_of(block, f"{prefix}.{i}")) for i, block in enumerate(blocks)]
    names = [matrix.name for block in per_block for matrix in block]
    if not names:
        raise ValueError(f"{type(model).__name__} has no linear layer in its decoder blocks; secateurs cannot prune it")
    wanted = set(chosen(names, plan.targets, plan.ignore))
    selected = [[matrix for matrix in block if matrix.name in wanted] for block in per_block]
    if not wanted:
        raise ValueError("prune.ignore leaves nothing that could be pruned")
    for matrix in (matrix for block in selected for matrix in block):
        try:
            plan.pattern_of(matrix).check(*matrix.weight.shape)
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
    batch_tokens: int = 2048,
    place: Place = lambda hidden: hidden,
    opened: Opened = nullcontext,
    stored: torch.dtype | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    ranks: Ranks = ALONE,
) -> list[LayerResult]:
    """Prune `model` in place and return one result a matrix, in the model's order.

    Every finished block is written to `folder`; a second call with the same folder takes those blocks from there and
    goes on (the folder must belong to this model, calibration and plan: `cell` names it by their hash). `batch_tokens`
    bounds the padded tokens a forward pass sees and changes results by float rounding only, as `ranks` does: all of
    them call this with the same model, calibration and plan. Hidden states are kept where `place` puts them. A block's
    weights need to be there only while `opened(index)` is. They end as numbers of type `stored`, in whatever `model`
    computes (its own type, if there is none).
    """
    stored = stored or computes_in(model)
    selected = prunable(model, plan)
    total = sum(map(len, selected))
    _, blocks = decoder_blocks(model)
    saved = ranks.tell([is_saved(folder, index) for index in range(len(blocks))])
    twin = plan.goal != "own"
    streams = [] if all(saved) else capture(model, calibration, batch_tokens, twin=twin, place=place, ranks=ranks)
    results: list[LayerResult] = []
    behind = Behind()

    def so_far(solved: int, what: str) -> None:
        progress(len(results) + solved, total, what)

    for index, block in enumerate(blocks):
        with opened(index):
            if saved[index]:
                for stream in streams:
                    if stream.dense is not None:
                        stream.dense.copy_(stream.run(block, index, stream.dense))
                    if plan.propagate == "dense":
                        stream.hidden.copy_(stream.run(block, index))
                solved = _restore(folder, index, selected[index], ranks)
                for stream in streams:
                    if plan.propagate != "dense":
                        stream.hidden.copy_(stream.run(block, index))
            else:
                solved = _solve_block(
                    block, index, selected[index], streams, calibration.weights, plan, stored, so_far, ranks
                )
                give_back(next(block.parameters()).device)  # all that solving took
                _move_on(block, index, streams, plan)
                save_block(folder, index, selected[index], solved, stored, ranks, behind)
        results += solved
        progress(len(results), total, f"block {index + 1} of {len(blocks)}")
    ranks.decide(behind.wait)
    return results


def _restore(folder: Path | None, index: int, matrices: Sequence[Matrix], ranks: Ranks) -> list[LayerResult]:
    """Put the weights that the first process finds in `folder` in their places everywhere."""

    def load() -> list[LayerResult]:
        found = load_block(folder, index, matrices)
        assert found is not None, f"{folder} has no block {index}"
        for matrix in matrices:
            matrix.weight.copy_(found[0][matrix.name])
        return found[1]

    results = ranks.decide(load)
    for matrix in matrices:
        ranks.spread(matrix.weight)
    return results


@torch.no_grad()
def solve_alike(
    model: PreTrainedModel,
    calibration: CalibrationSet,
    plans: Mapping[Path, Plan],
    *,
    batch_tokens: int = 2048,
    place: Place = lambda hidden: hidden,
    opened: Opened = nullcontext,
    stored: torch.dtype | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    ranks: Ranks = ALONE,
) -> None:
    """Solve several plans on the same Grams, and write the blocks of each to its folder, where `prune` finds them.

    The plans differ in pattern and solver only, and see the inputs of the dense model, which stays as it is: then a
    block's Grams are the same for all of them. ValueError for other plans. Blocks that are there are not solved again.
    """
    stored = stored or computes_in(model)
    first, *others = plans.values()
    alike = all((p.propagate, p.goal, p.tune) == ("dense", "own", None) for p in plans.values())
    if not alike or any((p.targets, p.ignore) != (first.targets, first.ignore) for p in others):
        raise ValueError(
            'only plans with propagate = "dense", the goal "own", no tune and the same targets share Grams'
        )
    per_plan = [prunable(model, plan) for plan in plans.values()]
    selected, total = per_plan[0], len(plans) * sum(map(len, per_plan[0]))
    _, blocks = decoder_blocks(model)
    saved = ranks.tell({folder: [is_saved(folder, index) for index in range(len(blocks))] for folder in plans})
    if all(map(all, saved.values())):
        return
    streams = capture(model, calibration, batch_tokens, place=place, ranks=ranks)
    done, behind = 0, Behind()
    for index, block in enumerate(blocks):
        matrices = selected[index]
        missing = {folder: plan for folder, plan in plans.items() if not saved[folder][index]}
        done += len(matrices) * (len(plans) - len(missing))
        with opened(index):
            if not missing:
                for stream in streams:
                    stream.hidden.copy_(stream.run(block, index))
                continue
            groups = same_groups(block, index, matrices, streams, ranks)
            sums = collect(block, index, groups, streams, calibration.weights, move=True)
            turns = list(_turns(groups, sums, first, (), ranks))
            for folder, plan in missing.items():
                solved: list[_Solved] = []
                for turn in turns:
                    solved += _solve(turn, sums, plan, stored, ranks)
                    progress(done + len(solved), total, turn[0][0].name)
                results = _results(solved, index, matrices, plan, None, ranks)
                save_block(folder, index, matrices, results, stored, ranks, behind)
                for one in solved:
                    one.matrix.weight.copy_(one.dense)
                done += len(solved)
    ranks.decide(behind.wait)


def results_in(folder: Path, selected: Sequence[Sequence[Matrix]], opened: Opened = nullcontext) -> Opened:
    """`opened`, but every block has the weights that were written to `folder` for it."""

    @contextmanager
    def with_results(index: int) -> Iterator[None]:
        with opened(index):
            saved = load_block(folder, index, selected[index])
            assert saved is not None, f"{folder} has no block {index}"
            for matrix in selected[index]:
                matrix.weight.copy_(saved[0][matrix.name])
            yield

    return with_results


def _solve_block(
    block: nn.Module,
    index: int,
    matrices: Sequence[Matrix],
    streams: Sequence[Stream],
    weights: Mapping[str, float],
    plan: Plan,
    stored: torch.dtype,
    progress: Callable[[int, str], None],
    ranks: Ranks,
) -> list[LayerResult]:
    """Collect, solve and fine-tune one block. The streams are moved behind it where that takes no pass of its own."""
    device = next(block.parameters()).device
    groups = same_groups(block, index, matrices, streams, ranks)
    writers = _writers(block, index, streams, ranks) if plan.goal == "residual" else ()
    solved: list[_Solved] = []
    imitate = plan.goal != "own"
    in_turn = _one_after_the_other(groups) if plan.propagate == "group" else [groups]
    for batch in in_turn:
        sums = collect(
            block, index, batch, streams, weights, imitate=imitate, writers=writers,
            dense={one.matrix: one.dense for one in solved},
            move=batch is in_turn[-1] and plan.tune is None and (imitate or plan.propagate == "dense"),
            keep_goal=batch is in_turn[0] and plan.tune is not None,
        )  # fmt: skip
        for turn in _turns(batch, sums, plan, writers, ranks):
            give_back(device)  # what forward passes took, or the last solve
            solved += _solve(turn, sums, plan, stored, ranks)
            progress(len(solved), turn[0][0].name)
    errors = _tune_block(block, index, solved, streams, weights, plan.tune, stored, ranks) if plan.tune else None
    give_back(device)
    return _results(solved, index, matrices, plan, errors, ranks)


def _move_on(block: nn.Module, index: int, streams: Sequence[Stream], plan: Plan) -> None:
    """Move the streams behind a block that was solved."""
    for stream in streams:
        if plan.propagate != "dense":
            stream.hidden.copy_(stream.run(block, index))
        if stream.goal is not None:  # what the dense block gave, kept for the fine-tune
            if stream.dense is not None:
                stream.dense.copy_(stream.goal)
            elif plan.propagate == "dense":
                stream.hidden.copy_(stream.goal)
            stream.goal = None


def _one_after_the_other(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups that see what those before them did; experts of a module side by side, as none sees another."""
    batches: dict[Any, list[Group]] = {}
    for group in groups:
        key = group.name if group.expert is None else (group.module, group.part)
        batches.setdefault(key, []).append(group)
    return list(batches.values())


def _writers(block: nn.Module, index: int, streams: Sequence[Stream], ranks: Ranks) -> tuple[nn.Module, ...]:
    """The linears that write to the residual stream, which the first process finds by watching."""
    names = {module: name for name, module in block.named_modules()}
    found = ranks.decide(lambda: [names[module] for module in writers_of(block, index, streams[0])])
    return tuple(block.get_submodule(name) for name in found)


Turn = list[tuple[Group, Inputs | None]]  # solved at the same time, each in the process of its place, which has inputs


def _turns(
    groups: Sequence[Group], sums: Sums, plan: Plan, writers: Sequence[nn.Module], ranks: Ranks
) -> Iterator[Turn]:
    """Groups to solve at the same time, the costliest first, with their inputs."""
    pools = pools_of(groups, sums, ranks)
    imitate = plan.goal != "own"
    for together in ranks.rounds(groups, [group.cost for group in groups]):
        turn: Turn = []
        for to, group in enumerate(together):
            inputs = inputs_of(group, sums, pools, imitate=imitate, writers=writers, ranks=ranks, to=to)
            turn.append((group, inputs if to == ranks.index else None))
        yield turn


@dataclass(frozen=True)
class _Aim:
    """A matrix, its dense weights, and what to reproduce in their place, if anything (`goals.imitate`)."""

    matrix: Matrix
    dense: Tensor
    target: Tensor | None = None
    alpha: float = 0.0
    beta: float = 0.0


@dataclass(frozen=True)
class _Solved:
    """A matrix, its dense weights, which of them are kept, and the held-out inputs here that judge it."""

    matrix: Matrix
    dense: Tensor
    mask: Tensor
    held: Held
    found: tuple[_Aim, Inputs, LayerSolution] | None
    """What was aimed at, on which inputs, and the solution; only in the process that solved it."""


def _solve(turn: Turn, sums: Sums, plan: Plan, stored: torch.dtype, ranks: Ranks) -> list[_Solved]:
    """Solve the matrices of each group in the process of its place, and put the solutions in their places in all."""
    dense = {matrix: matrix.weight.to(stored, copy=True) for group, _ in turn for matrix in group.matrices}
    mine = turn[ranks.index : ranks.index + 1]
    found: dict[Matrix, tuple[_Aim, Inputs, LayerSolution]] = {}

    def solve() -> None:
        for group, inputs in mine:
            assert inputs is not None
            aims = _aims([dense[matrix] for matrix in group.matrices], group, inputs)
            for aim, solution in zip(aims, _solutions(aims, inputs.of_some_tokens(group), plan), strict=True):
                aim.matrix.weight.copy_(solution.weight)
                found[aim.matrix] = aim, inputs, replace(solution, weight=aim.matrix.weight)  # not twice

    ranks.together(solve)
    solved = []
    for source, (group, _) in enumerate(turn):
        for matrix in group.matrices:
            ranks.spread(matrix.weight, source)
            one = found.get(matrix)
            mask = torch.empty_like(dense[matrix], dtype=torch.bool) if one is None else one[2].mask
            ranks.spread(mask, source)
            solved.append(_Solved(matrix, dense[matrix], mask, sums.held[group.name], one))
    return solved


def _aims(dense: Sequence[Tensor], group: Group, inputs: Inputs) -> list[_Aim]:
    if inputs.drift is None or inputs.held_gram is None or inputs.held_drift is None:
        return [_Aim(matrix, weight) for matrix, weight in zip(group.matrices, dense, strict=True)]
    goals = [imitate(weight, inputs.gram, inputs.drift, inputs.held_gram, inputs.held_drift) for weight in dense]
    return [
        _Aim(matrix, weight, goal.target, goal.alpha, goal.beta)
        for matrix, weight, goal in zip(group.matrices, dense, goals, strict=True)
    ]


def _solutions(aims: Sequence[_Aim], gram: Gram, plan: Plan) -> list[LayerSolution]:
    """A solution for each of some matrices with the same inputs: solved as one where that changes nothing but time."""
    rows = [len(aim.dense) for aim in aims]
    patterns = [plan.pattern_of(aim.matrix) for aim in aims]
    together = stack(patterns, rows) if len(aims) > 1 and plan.solver.by_rows else None
    if together is None:
        return [
            plan.solver.solve(
                LayerProblem(
                    name=aim.matrix.name,
                    weight=aim.dense,
                    gram=gram,
                    pattern=pattern,
                    target=aim.target,
                    loss_root=plan.loss_roots.get(aim.matrix.name),
                    costs=plan.costs.get(aim.matrix.name),
                )
            )
            for aim, pattern in zip(aims, patterns, strict=True)
        ]
    targets = [aim.dense if aim.target is None else aim.target for aim in aims]
    target = None if all(aim.target is None for aim in aims) else torch.cat(targets)
    weight = torch.cat([aim.dense for aim in aims])
    name = " + ".join(aim.matrix.name for aim in aims)
    solution = plan.solver.solve(LayerProblem(name=name, weight=weight, gram=gram, pattern=together, target=target))
    parts = zip(solution.weight.split(rows), solution.mask.split(rows), rows, strict=True)
    seconds = solution.stats.get("seconds", 0.0)
    return [
        replace(solution, weight=part, mask=mask, stats=solution.stats | {"seconds": seconds * count / len(weight)})
        for part, mask, count in parts
    ]


def _results(
    solved: Sequence[_Solved],
    index: int,
    matrices: Sequence[Matrix],
    plan: Plan,
    block_error: tuple[float, float] | None,
    ranks: Ranks,
) -> list[LayerResult]:
    """What is reported of a block's matrices, their errors measured on their weights as they are now."""
    if not solved:
        return []
    energies = torch.stack([held_out_energies(one.matrix.weight, one.dense, one.held) for one in solved])
    ranks.add(energies)
    here = {one.matrix.name: _facts(one.matrix, *one.found) for one in solved if one.found}
    facts = {name: row for rows in ranks.gather(here) for name, row in rows.items()}
    results = {}
    for one, sums in zip(solved, energies, strict=True):
        d_out, d_in = one.dense.shape
        pattern = plan.pattern_of(one.matrix)
        error_held_out, by_region = held_out_errors(sums)
        results[one.matrix.name] = LayerResult(
            name=one.matrix.name,
            block=index,
            shape=(d_out, d_in),
            pattern=str(pattern),
            zeros_asked=pattern.num_zeros(d_out, d_in),
            zeros=int((~one.mask).count_nonzero()),
            error_held_out=error_held_out,
            error_by_region=by_region,
            block_error=block_error,
            **facts[one.matrix.name],
        )
    return [results[matrix.name] for matrix in matrices]


def _facts(matrix: Matrix, aim: _Aim, inputs: Inputs, solution: LayerSolution) -> dict[str, Any]:
    """What only the process knows that solved a matrix."""
    return {
        "error_train": relative_error(matrix.weight, aim.dense, inputs.gram),
        "damp": solution.stats.get("damp", 0.0),
        "seconds": solution.stats.get("seconds", 0.0),
        "outcome": solution.outcome.value,
        "note": inputs.note or ("" if solution.outcome == Outcome.OK else solution.outcome.text),
        "tokens": inputs.gram.tokens,
        "alpha": aim.alpha,
        "beta": aim.beta,
    }


def _tune_block(
    block: nn.Module,
    index: int,
    solved: Sequence[_Solved],
    streams: Sequence[Stream],
    weights: Mapping[str, float],
    how: Tune,
    stored: torch.dtype,
    ranks: Ranks,
) -> tuple[float, float] | None:
    """Fine-tune the kept weights of all matrices together; None if there is nothing held out to judge it by."""
    kept: dict[nn.Parameter, Tensor] = {}
    for one in solved:
        parameter = one.matrix.parameter
        mask = kept.setdefault(parameter, torch.zeros_like(parameter, dtype=torch.bool))
        one.matrix.part_of(mask).copy_(one.mask)

    def parts(stream: Stream, weights: Mapping[str, float]) -> list[Example]:
        assert stream.goal is not None
        args, kwargs = stream.shell.call(stream.batch, index)
        weight = worth(stream.batch.regions, weights)
        example = Example(stream.hidden, args, kwargs, stream.goal, weight)
        return list(example.parts(how.tokens))

    held = [part for stream in streams if stream.held_out for part in parts(stream, dict.fromkeys(REGIONS, 1.0))]
    mine = {stream.number: parts(stream, weights) for stream in streams if not stream.held_out}
    if not kept or not any(ranks.gather(bool(held))):
        return None
    counts = sorted(item for each in ranks.gather({n: len(p) for n, p in mine.items()}) for item in each.items())
    train = [mine[number][at] if number in mine else None for number, count in counts for at in range(count)]
    errors = tune(block, kept, train, held, how, stored=stored, ranks=ranks)
    for parameter in kept:
        ranks.spread(parameter.data)
    for one in solved:
        assert not bool(one.matrix.weight[~one.mask].any()), f"{one.matrix.name}: a pruned weight moved"
    return errors


def _block_path(folder: Path, index: int) -> Path:
    return folder / f"block-{index:05d}"


def is_saved(folder: Path | None, index: int) -> bool:
    """Whether a block's result is in `folder`."""
    return folder is not None and _block_path(folder, index).with_suffix(".json").exists()


def save_block(
    folder: Path | None,
    index: int,
    matrices: Sequence[Matrix],
    results: Sequence[LayerResult],
    stored: torch.dtype,
    ranks: Ranks = ALONE,
    behind: Behind | None = None,
) -> None:
    """Weights first, results last: the results file says that the block is complete. The first process writes.

    With `behind` weights on a GPU are copied from it here and written while the next block is at work.
    """

    def write() -> None:
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {matrix.name: matrix.weight.to("cpu", stored).contiguous() for matrix in matrices}
        path = _block_path(folder, index)

        def to_disk() -> None:
            with atomic_file(path.with_suffix(".safetensors")) as file:
                save(tensors, file)
            write_json(path.with_suffix(".json"), [asdict(result) for result in results])

        if behind is not None and any(matrix.weight.is_cuda for matrix in matrices):
            behind.do(to_disk)
        else:
            to_disk()

    ranks.decide(write)


def load_block(
    folder: Path | None, index: int, matrices: Sequence[Matrix]
) -> tuple[dict[str, Tensor], list[LayerResult]] | None:
    """A block's weights and results from `folder`, if they are there."""
    if folder is None or not is_saved(folder, index):
        return None
    rows = read_json(_block_path(folder, index).with_suffix(".json"))
    pairs = ("shape", "block_error")
    results = [LayerResult(**(row | {key: row[key] and tuple(row[key]) for key in pairs})) for row in rows]
    tensors = load_file(_block_path(folder, index).with_suffix(".safetensors"))
    assert set(tensors) == {matrix.name for matrix in matrices}, f"{folder} belongs to another plan"
    return tensors, results
