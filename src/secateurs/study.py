"""The whole grid of a recipe, one cell after the other or in parallel processes, and the report of it.

What is kept in a run's folder is said where it is made: traces and answers in `ask`, pruned models in `cell`; the
report (report.json, .md, .html) is written by `page`.
"""

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from importlib.metadata import version
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch

from secateurs import evaluate
from secateurs.artifacts import canonical_hash
from secateurs.ask import Answers, Traced, answer, trace
from secateurs.calibration import batches, region_weights, trace_document
from secateurs.cell import Case, Pruned, prune, solve_alike
from secateurs.corpus import corpus_texts
from secateurs.cuts import Cut
from secateurs.dense import Dense
from secateurs.leaks import overlap
from secateurs.parallel import Progress, Task, Workers, silent
from secateurs.preview import plan_check
from secateurs.prompts import render
from secateurs.ranks import ALONE, Ranks
from secateurs.recipe import Recipe, build_pattern, build_questions
from secateurs.reload import verify
from secateurs.report import (
    Cell,
    Evaluation,
    LeakCheck,
    Model,
    Report,
    Stage,
    compare,
    merge_traces,
    summarise,
)


def study(
    recipe: Recipe,
    out: Path,
    progress: Progress = silent,
    jobs: int = 1,
    ranks: Ranks = ALONE,
    planned: Callable[[dict[str, Any]], None] = lambda plan: None,
) -> Report:
    """Every stage, for every seed and every cell of the recipe's grid; then the report, built but not written.

    `jobs` processes share the work: first the seeds (traces, and the dense model's answers), then what shares Grams,
    then the cells. Or there is one job, and other processes (`ranks`) that `dense.follow`, to prune with it. What is on
    disk is not done again, so a study that was stopped goes on. `planned` is told the plan (`preview`) before anything
    is done. ValueError if `jobs` is below 1, or above with other ranks.
    """
    ranks = side_by_side(jobs, ranks)
    dense = Dense(recipe, ranks)
    out.mkdir(parents=True, exist_ok=True)
    planned(plan_check(recipe, dense))
    bench = partial(_Bench, recipe, out, given=dense if jobs == 1 else None, ranks=ranks)
    with Workers(bench, jobs, progress) as workers:
        seeds: list[_Seed] = workers.run([(_ask_dense, (seed,)) for seed in recipe.seeds])
        traced = {seed: found.traced for seed, found in zip(recipe.seeds, seeds, strict=True)}
        workers.run([(_prune_alike, (seed, traced[seed], one)) for seed in traced for one in _alike(recipe.grid)])
        todo = [(seed, traced[seed], cell) for seed in traced for cell in recipe.grid]
        tasks: list[Task] = [(_do_cell, (*one, f"{at}/{len(todo)}")) for at, one in enumerate(todo, start=1)]
        done: list[_Done] = workers.run(tasks)
    cells: list[Cell] = []
    unasked: list[Model] = []
    dense_beside, beside = (min(jobs, len(each)) - 1 for each in (seeds, tasks))
    for seed, found in zip(recipe.seeds, seeds, strict=True):
        if found.answers:
            cells.append(_dense_cell(found.answers, seed, out / "dense", dense_beside))
        for one in (one for one, (of, _, _) in zip(done, todo, strict=True) if of == seed):
            if one.answers and found.answers:
                cells.append(_cell(one.pruned, one.answers, found.answers, beside))
            else:
                unasked.append(Model.model_validate(_facts(one.pruned)))
    seconds = {"trace": sum(one.summary.seconds for one in traced.values())}
    for cell in (*cells, *unasked):
        for name, spent in cell.seconds.items():
            seconds[name] = seconds.get(name, 0.0) + spent
    model = dense.checkpoint.model
    recipe_key = canonical_hash(recipe.model_dump(exclude={"resources", "title"}))
    return Report(
        title=recipe.title or f"{recipe.model} pruned on its own chain of thought",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        secateurs=version("secateurs"),
        versions={name: version(name) for name in ("torch", "transformers", "safetensors")},
        hardware=hardware(recipe.resources.device)
        | {"jobs": jobs, "processes": ranks.count, "computes in": str(dense.checkpoint.dtype).removeprefix("torch.")},
        model={"name": recipe.model, "parameters": model.num_parameters(), **dense.key},
        recipe=recipe.model_dump(),
        recipe_key=recipe_key,
        stages=[Stage(name=name, seconds=spent) for name, spent in seconds.items()],
        traces=merge_traces([one.summary for one in traced.values()]),
        leaks=[leak_check(recipe, recipe_key, traced, dense)] if recipe.evaluate.num_questions else [],
        cells=cells,
        unasked=unasked,
        summary=summarise(cells),
        comparisons=compare(cells),
    )


def side_by_side(jobs: int, ranks: Ranks) -> Ranks:
    """These processes, or one of so many `jobs`. ValueError if there are both, or fewer than one job."""
    if jobs < 1 or (jobs > 1 and ranks.count > 1):
        raise ValueError(f"--jobs is {jobs}; it must be {'1 or more' if jobs < 1 else '1 under torchrun'}")
    return ranks if jobs == 1 else Ranks(nearby=jobs)


def reload(report: Report, progress: Progress = silent, *, trust_remote_code: bool = False) -> Report:
    """The report, with how its pruned models did when loaded again, in a clean process. RuntimeError if one does
    not load, or says other."""
    progress("reload models", 0, 0, "")
    made = [*report.unasked, *(cell for cell in report.cells if cell.arm != "dense")]
    found = verify([Path(one.path) / "model" for one in made], trust_remote_code=trust_remote_code).values()
    off, in_blocks = max((one.off for one in found), default=None), sum(not one.whole for one in found)
    return report.model_copy(update={"reloaded": off, "reloaded_in_blocks": in_blocks})


@dataclass
class _Bench:
    """What a process works with."""

    recipe: Recipe
    out: Path
    progress: Progress
    given: Dense | None = None
    ranks: Ranks = ALONE
    states: tuple[str, evaluate.Reference] | None = None

    @cached_property
    def dense(self) -> Dense:
        """This process's own: one that was sent here would bring its weights, in memory that all of them share."""
        return self.given or Dense(self.recipe, self.ranks)

    def reference(self, traced: Traced) -> evaluate.Reference:
        """The dense model's hidden states on what is held out of some traces; the last ones are remembered."""
        if self.states is None or self.states[0] != traced.key:
            held = batches(map(trace_document, traced.held_out), self.recipe.calibration.batch_tokens)
            checkpoint = self.dense.checkpoint
            states = evaluate.reference_states(checkpoint.model, list(held), checkpoint.opened)
            self.states = traced.key, states
        return self.states[1]


@dataclass(frozen=True)
class _Seed:
    """What the cells of a seed share."""

    traced: Traced
    answers: Answers | None


@dataclass(frozen=True)
class _Done:
    pruned: Pruned
    answers: Answers | None


def _ask_dense(bench: _Bench, seed: int) -> _Seed:
    """The dense model's traces of a seed and its answers."""
    recipe, dense = bench.recipe, bench.dense
    traced = trace(recipe, bench.out, seed, dense, bench.progress)
    answers = None
    if recipe.evaluate.num_questions:
        stage = "evaluate dense"
        answers = answer(recipe, bench.out / "dense", None, "dense", seed, dense, stage, bench.progress)
    dense.forget()
    return _Seed(traced, answers)


def _alike(grid: Sequence[Recipe]) -> list[list[Recipe]]:
    """Cells that can share Grams, where there are some."""
    cut = any(isinstance(build_pattern(cell.prune.pattern), Cut) for cell in grid)
    if cut or grid[0].prune.propagate != "dense" or grid[0].prune.tune.steps:
        return []
    by_arm = sorted(grid, key=lambda cell: repr(cell.calibration.arm))
    return [list(cells) for _, cells in groupby(by_arm, key=lambda cell: repr(cell.calibration.arm))]


def _prune_alike(bench: _Bench, seed: int, traced: Traced, cells: Sequence[Recipe]) -> None:
    """Prune some cells of a seed on the same Grams, and export them."""
    cases = [Case(recipe, bench.out, seed, traced, bench.dense) for recipe in cells]
    shared = solve_alike(cases, bench.progress)
    for case in cases:
        if case.folder in shared:
            prune(case, partial(bench.reference, traced), bench.progress, shared[case.folder])


def _do_cell(bench: _Bench, seed: int, traced: Traced, recipe: Recipe, number: str) -> _Done:
    """Prune, export and evaluate a cell of a seed; one that is pruned is only evaluated."""
    dense, progress = bench.dense, bench.progress
    pruned = prune(Case(recipe, bench.out, seed, traced, dense), partial(bench.reference, traced), progress)
    if not recipe.evaluate.num_questions:
        return _Done(pruned, None)
    stage = f"evaluate {pruned.arm} {pruned.solver} {build_pattern(recipe.prune.pattern)} ({number})"
    model, key = pruned.folder / "model", pruned.folder.name
    return _Done(pruned, answer(recipe, pruned.folder / "answers", model, key, seed, dense, stage, progress))


def leak_check(recipe: Recipe, recipe_key: str, traced: Mapping[int, Traced], dense: Dense) -> LeakCheck:
    """The evaluation questions of all seeds against every text that any arm of any seed may have calibrated on.

    `traced` has each seed's traces.
    """
    questions = build_questions(recipe.evaluate.questions or recipe.traces.questions)
    asked: list[str] = []
    texts: list[str] = []
    if any(region_weights(arm).get("corpus") for arm in recipe.arms):
        texts += corpus_texts(recipe, min(traced))  # the same ones whatever the seed
    for seed, one in traced.items():
        asked += [q.prompt for q in islice(questions.questions("eval", seed), recipe.evaluate.num_questions)]
        texts += _calibration_prompts(recipe, seed, one, dense)
    return LeakCheck(recipe_key=recipe_key, **asdict(overlap(asked, texts)))


def _calibration_prompts(recipe: Recipe, seed: int, traced: Traced, dense: Dense) -> list[str]:
    """Every question that any arm of a seed may have calibrated on."""
    texts: list[str] = []
    weights = [region_weights(arm) for arm in recipe.arms]
    source = build_questions(recipe.traces.questions)
    prompts_only = any(w.get("prompt") and not (w.get("think") or w.get("answer")) for w in weights)
    missing = {t.question_id for t in (*traced.held_out, *traced.traces)}
    tokens = 0 if prompts_only else recipe.calibration.num_tokens
    for question in source.questions("calibration", seed):
        if not missing and tokens >= recipe.calibration.num_tokens:
            break
        if question.id not in missing and tokens < recipe.calibration.num_tokens:
            tokens += len(render(dense.tokenizer, source.format, question))
        missing.discard(question.id)
        texts.append(question.prompt)
    return texts


def _dense_cell(answers: Answers, seed: int, folder: Path, beside: int) -> Cell:
    return Cell(
        arm="dense",
        sparsity=0.0,
        pattern="dense",
        solver="none",
        seed=seed,
        calibration_tokens=0,
        evaluation=_measured(answers, None, beside),
        hidden_error=None,
        layers=[],
        seconds={"evaluate": answers.seconds},
        path=str(folder),
    )


def _cell(pruned: Pruned, answers: Answers, baseline: Answers, beside: int) -> Cell:
    facts = _facts(pruned)
    facts["seconds"] = {"evaluate": answers.seconds} | facts["seconds"]
    return Cell.model_validate(facts | {"evaluation": _measured(answers, baseline, beside)})


def _facts(pruned: Pruned) -> dict[str, Any]:
    facts = asdict(pruned)
    return facts | {"path": str(facts.pop("folder"))}


def _measured(answers: Answers, baseline: Answers | None, beside: int) -> Evaluation:
    measured = evaluate.measure(
        answers.traces,
        answers.families,
        question_set=answers.question_set,
        seconds=answers.seconds,
        max_new_tokens=answers.max_new_tokens,
        dense=baseline.traces if baseline else None,
    )
    return Evaluation.model_validate(measured | {"side_by_side": beside})


def hardware(device: str) -> dict[str, Any]:
    """The machine, as far as it matters for the figures."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    return {
        "device": name,
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }
