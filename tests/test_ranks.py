"""Several processes prune as one: who does what, equal results, errors of others, resume with fewer or more."""

import multiprocessing
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import distributed

from families import lively, make_model
from processes import METHOD
from secateurs import ask, cell, pruner
from secateurs import survey as surveys
from secateurs.checkpoint import Checkpoint
from secateurs.cuts import Depth, FewerExperts, Hidden
from secateurs.dense import Dense, follow
from secateurs.experts import EXPERT_SCORES, drop_experts
from secateurs.narrow import NARROWINGS, narrow
from secateurs.patterns import Columns, Unstructured
from secateurs.ranks import Elsewhere, Ranks, joined
from secateurs.recipe import load_recipe
from secateurs.solvers.masking import Masking
from test_pruner import CALIBRATION, EVERYTHING, PLAN

PLANS = {
    "block": ("qwen3", PLAN, 100),
    "more processes than batches": ("llama", EVERYTHING, 10_000),
    "dense, tune": ("qwen3", replace(PLAN, propagate="dense", tune=replace(EVERYTHING.tune, steps=5)), 100),
    "everything": ("llama", EVERYTHING, 100),
    "experts": ("mixtral", replace(PLAN, goal="dense"), 100),
    "transposed experts": ("gpt_oss", PLAN, 100),
}

OUTPUT, REFIT = EXPERT_SCORES["output"](), NARROWINGS["pca+refit"]()


def _enter(index: int, count: int, meeting: str, function, args, pipe) -> None:
    """A process' life."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=index, world_size=count)
    try:
        pipe.send(function(Ranks(index, count, count), *args))
    except BaseException:
        pipe.send(RuntimeError(traceback.format_exc()))


def in_processes(count: int, folder: Path, function, *args) -> list:
    """What `function(ranks, *args)` returns in each of some processes that talk to each other."""
    context = multiprocessing.get_context(METHOD)
    pipes, workers = [], []
    for index in range(count):
        ours, theirs = context.Pipe()
        worker = context.Process(
            target=_enter, args=(index, count, str(folder / f"meeting-{count}"), function, args, theirs), daemon=True
        )
        worker.start()
        theirs.close()
        pipes.append(ours)
        workers.append(worker)
    results = [pipe.recv() if pipe.poll(120) else RuntimeError("nothing heard") for pipe in pipes]
    for worker in workers:
        worker.kill()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


@dataclass
class Ended:
    """How a prune ended."""

    masks: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    results: list[pruner.LayerResult]


def pruned(ranks: Ranks, name: str, plan: pruner.Plan, batch_tokens: int, folder: Path | None = None) -> Ended:
    torch.manual_seed(0)
    model = make_model(name)
    results = pruner.prune(model, CALIBRATION, plan, batch_tokens=batch_tokens, folder=folder, ranks=ranks)
    matrices = [matrix for block in pruner.prunable(model, plan) for matrix in block]
    weights = {matrix.name: matrix.weight.numpy().copy() for matrix in matrices}  # numpy: no shared memory to keep open
    return Ended({name: weight != 0 for name, weight in weights.items()}, weights, results)


def every_plan(ranks: Ranks) -> dict[str, Ended]:
    return {kind: pruned(ranks, *how) for kind, how in PLANS.items()}


@pytest.fixture(scope="module")
def alone() -> dict[str, Ended]:
    return every_plan(Ranks())


def assert_equal(found: Ended, expected: Ended) -> None:
    for name, mask in expected.masks.items():
        assert (found.masks[name] == mask).mean() > 0.995, name
        assert abs(found.weights[name] - expected.weights[name]).max() < 0.05 * abs(expected.weights[name]).max()
    for one, other in zip(found.results, expected.results, strict=True):
        for field in ("name", "block", "shape", "zeros", "zeros_asked", "tokens", "outcome", "note"):
            assert getattr(one, field) == getattr(other, field), field
        for field in ("error_train", "error_held_out", "error_by_region", "alpha", "beta", "damp"):
            assert getattr(one, field) == pytest.approx(getattr(other, field), rel=1e-3), (one.name, field)
        assert (one.block_error or ()) == pytest.approx(other.block_error or (), rel=1e-3)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_end_with_what_one_would_end_with(tmp_path, alone, count):
    for ended in in_processes(count, tmp_path, every_plan):  # and every process with the same
        for kind, expected in alone.items():
            assert_equal(ended[kind], expected)


def every_survey(ranks: Ranks, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What processes find of a model together, exactly and in numbers: surveys, what goes, a narrower stream."""
    dense, exact, numbers = Checkpoint(str(folder / "dense")), {}, {}
    names = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"]
    columns = {names[0]: Columns(30), names[1]: Columns(3, size=8)}
    some: dict[str, Any] = {"batch_tokens": 100, "ranks": ranks}
    with patch.multiple(surveys, PROBE_BATCH=60, REACH=1):
        for model in (lively("llama"), lively("mixtral")):
            layers = surveys.survey(model, CALIBRATION, pruner.prunable(model, PLAN), 0.5, curves=True, **some)
            exact[f"survey of {type(model)}"] = [(layer.name, layer.block, layer.size) for layer in layers]
            numbers[f"outliers of {type(model)}"] = [layer.outliers for layer in layers]
            numbers[f"curves of {type(model)}"] = [loss for layer in layers for _, loss in layer.curve]
        model = lively("llama")
        exact["blocks"] = surveys.blocks_to_drop(model, CALIBRATION, Depth(0.5), ranks=ranks)
        roots = surveys.loss_roots(model, CALIBRATION, columns, ranks=ranks)
        costs = surveys.taylor_costs(model, CALIBRATION, columns, ranks=ranks)
    numbers["taylor"] = torch.cat([costs[name] for name in names]).numpy()
    if ranks.first:  # it alone is told
        numbers["loss"] = torch.stack([roots[name].T @ roots[name] for name in names]).numpy()
    mixture, record = make_model("mixtral"), folder / f"{ranks.count}.json"
    verdicts = drop_experts(mixture, CALIBRATION, FewerExperts(0.5), OUTPUT, record, **some)
    exact["experts"] = [verdict.kept for verdict in verdicts]
    numbers["experts"] = [e for v in verdicts for one in v.results for e in (one.error_train, one.error_held_out)]
    for time in ("at first", "read back"):
        found = narrow(dense, CALIBRATION, Hidden(0.25, 4), REFIT, folder / f"narrow-{ranks.count}", **some)
        exact[f"narrow {time}"] = [(one.name, one.zeros, one.tokens) for one in found.results]
        rows = [(one.error_train, one.error_held_out, one.beta) for one in found.results]
        numbers[f"narrow {time}"] = torch.tensor(rows).numpy()
        numbers[f"head {time}"] = (found.lift @ found.lift.T).numpy()  # as directions have no sign
    return exact, numbers


def test_processes_find_together_what_one_would_find(tmp_path):
    make_model("llama").save_pretrained(tmp_path / "dense")
    exact, numbers = every_survey(Ranks(), tmp_path)
    for rank, (found_exact, found_numbers) in enumerate(in_processes(3, tmp_path, every_survey, tmp_path)):
        assert found_exact == exact
        assert numbers.keys() - found_numbers.keys() == ({"loss"} if rank else set())
        for kind, found in found_numbers.items():
            assert found == pytest.approx(numbers[kind], rel=1e-3, abs=1e-6), kind


class Killed(BaseException):
    pass


def half(ranks: Ranks, folder: Path) -> None:
    """A prune that ends in all processes after its first block."""
    name, plan, batch_tokens = PLANS["block"]

    def kill(done: int, total: int, what: str) -> None:
        if done > total // 2:
            raise Killed

    with pytest.raises(Killed):
        pruner.prune(
            make_model(name), CALIBRATION, plan, batch_tokens=batch_tokens, folder=folder, progress=kill, ranks=ranks
        )


def rest(ranks: Ranks, folder: Path) -> Ended:
    return pruned(ranks, *PLANS["block"], folder if ranks.first else None)  # others need not see the folder


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3)])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, alone, before, after):
    torch.manual_seed(0)
    folder = tmp_path / "blocks"
    in_processes(before, tmp_path, half, folder)
    assert [path.name for path in sorted(folder.glob("*.json"))] == ["block-00000.json"]
    written = (folder / "block-00000.json").stat().st_mtime_ns
    for ended in in_processes(after, tmp_path, rest, folder):
        assert_equal(ended, alone["block"])
    assert (folder / "block-00000.json").stat().st_mtime_ns == written and len(list(folder.glob("*.json"))) == 2


@dataclass(frozen=True)
class Broken:
    """A solver that fails in the second process."""

    by_rows = True

    def solve(self, problem):
        if distributed.get_rank() == 1:
            raise ValueError(f"{problem.name}: not in here")
        return Masking(score="wanda").solve(problem)


def failing(ranks: Ranks, file: Path) -> list[str]:
    """What a process hears of failures in the second process and in the first; that all still work afterwards."""
    heard = []
    never_called = make_model("qwen3")
    never_called.model.layers[0].unused = torch.nn.Linear(32, 32)
    for model, plan, folder in (
        (make_model("qwen3"), replace(PLAN, solver=Broken()), None), (never_called, PLAN, None),
        (make_model("qwen3"), PLAN, file if ranks.first else None),
    ):  # fmt: skip
        try:
            pruner.prune(model, CALIBRATION, plan, batch_tokens=100, folder=folder, ranks=ranks)
        except (RuntimeError, ValueError, OSError, Elsewhere) as error:
            heard.append(f"{type(error).__name__}: {error}")
    try:
        dense, seen = Checkpoint(str(file.parent / "dense")), file.parent / ("first" if ranks.first else "second")
        narrow(dense, CALIBRATION, Hidden(0.25, 4), REFIT, seen, ranks=ranks)
    except (RuntimeError, Elsewhere) as error:
        heard.append(f"{type(error).__name__}: {error}")
    return [*heard, ranks.tell(f"{ranks.index} is well")]


def test_what_fails_in_one_process_fails_in_all_of_them(tmp_path):
    file = tmp_path / "a file, and no folder"
    file.touch()
    make_model("llama").save_pretrained(tmp_path / "dense")
    first, second = in_processes(2, tmp_path, failing, file)
    kinds_of_first = ("RuntimeError", "ValueError", "FileExistsError", "RuntimeError")
    for heard, kinds in ((first, kinds_of_first), (second, ("Elsewhere",) * 4)):
        assert heard[0].startswith(f"{kinds[0]}: model.layers.0.") and heard[0].endswith(": not in here")
        assert heard[1] == (
            f"{kinds[1]}: model.layers.0.unused is never called by its block; leave it out with `prune.ignore`"
        )
        assert heard[2].startswith(f"{kinds[2]}: ") and "a file, and no folder" in heard[2]
        assert heard[3].startswith(f"{kinds[3]}: {tmp_path / 'second'} is not there on every machine")
        assert heard[4] == "0 is well"


def several(ranks: Ranks, folder: Path) -> None:
    torch.manual_seed(0)
    plans = {folder / kind: plan for kind, plan in alike().items()}
    pruner.solve_alike(make_model("mixtral"), CALIBRATION, plans, batch_tokens=100, ranks=ranks)


def alike() -> dict[str, pruner.Plan]:
    plan = replace(PLAN, propagate="dense")
    return {"half": plan, "third": replace(plan, pattern=Unstructured(0.3), solver=Masking(score="wanda"))}


def test_plans_on_the_same_grams_are_solved_by_several_processes(tmp_path):
    in_processes(2, tmp_path, several, tmp_path)
    for kind, plan in alike().items():
        expected = pruned(Ranks(), "mixtral", plan, 100)
        assert_equal(pruned(Ranks(), "mixtral", plan, 100, tmp_path / kind), expected)


@patch.object(surveys, "REACH", 1)
def surveyed(ranks: Ranks, out: Path) -> dict[str, Any] | None:
    """What surveys of the bundled reasoner lead to, where the first process asks and the others follow."""
    small = ["traces.sampling.max_new_tokens=48", "calibration.num_tokens=300", "calibration.held_out_tokens=150"]
    layer, cut = "prune.pattern={name='unstructured',sparsity=0.5,scope='layer'}", "prune.solver={name='obs'}"
    asked = {
        "owl": (layer, "prune.allocator={name='owl'}"),
        "curves": (layer, "prune.allocator={name='curves'}"),
        "depth": (cut, "prune.pattern={name='depth',sparsity=0.5}"),
        "loss": (cut, "prune.pattern={name='width',sparsity=0.25,score='loss'}"),
        "taylor": (cut, "prune.pattern={name='width',sparsity=0.25,score='taylor'}"),
    }
    recipes = {name: load_recipe("demo", [*small, "sweep.sparsity=[]", *sets]) for name, sets in asked.items()}
    dense = Dense(recipes["owl"], ranks)
    if not ranks.first:
        return follow(dense)
    traced = ask.trace(recipes["owl"], out, 0, dense)
    found: dict[str, Any] = {}
    for name, recipe in recipes.items():
        case = cell.Case(recipe.grid[0], out, 0, traced, dense)
        calibration = cell.calibration_set(case)
        if name in surveys.BY_GRADIENTS:
            ((_, known),) = cell._by_gradients(case, calibration, lambda *_: None).items()
            found[name] = {matrix: float(one.square().sum()) for matrix, one in known.items()}
        else:
            found[name] = {matrix: str(pattern) for matrix, pattern in cell.allocate(case, calibration).items()}
    if ranks.count > 1:
        ranks.tell(None)
    return found


def test_surveys_go_to_the_processes_that_follow(tmp_path):
    found, nothing = in_processes(2, tmp_path, surveyed, tmp_path / "two")
    expected = surveyed(Ranks(), tmp_path / "one")
    assert nothing is None and expected is not None
    for score in surveys.BY_GRADIENTS:
        assert found.pop(score) == pytest.approx(expected.pop(score), rel=1e-3)
    assert found == expected and all(expected.values())


def test_shares_are_alike_and_rounds_start_with_what_is_costly():
    ranks = Ranks(0, 3)
    takers = ranks.shares([5, 1, 9, 2, 3, 4])
    loads = [sum(cost for cost, taker in zip([5, 1, 9, 2, 3, 4], takers, strict=True) if taker == n) for n in range(3)]
    assert sorted(loads) == [7, 8, 9] and takers[2] == 0, "the first process always has something"
    assert Ranks(0, 4).shares([7]) == [0]
    assert ranks.rounds("abcd", [1, 4, 2, 3]) == [["b", "d", "c"], ["a"]]
    assert Ranks().rounds("abc", [1, 3, 2]) == [["b"], ["c"], ["a"]]


def test_one_process_is_alone_and_some_devices_are_for_one_only(monkeypatch):
    with joined("mps") as ranks:
        assert ranks == Ranks()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="resources.device is mps: several processes"), joined("mps"):
        pass
