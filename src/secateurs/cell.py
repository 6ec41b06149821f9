"""The stage that prunes: one cell of the grid, from traces to an exported model.

    out/surveys/KEY.*        what an allocator or a cut wanted to know of the dense model
    out/cells/NAME-KEY/      one pruned model: model/, answers/, prune.json; until it is done blocks/, to go on from;
                             for a narrower stream directions and lift, and until it is done projected/

KEY is the hash of everything that can change what is in the folder, as in `ask`. One process at a time writes a cell:
it holds the folder's `lock`.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import partial
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from secateurs import evaluate, pruner
from secateurs.allocators import Layer
from secateurs.artifacts import atomic_write, canonical_hash, locked, read_json, write_json
from secateurs.ask import Traced
from secateurs.calibration import (
    CalibrationSet,
    Document,
    batches,
    plain_document,
    region_weights,
    take,
    trace_document,
)
from secateurs.checkpoint import Checkpoint
from secateurs.collect import Opened, matrices_of
from secateurs.corpus import corpus_documents
from secateurs.cuts import Cut, Depth, FewerExperts, Hidden, Width
from secateurs.dense import Dense
from secateurs.experts import ExpertScore, Verdict, drop_experts, keeping
from secateurs.export import PROBE_TOKENS, export, rename_probe
from secateurs.models import Matrix, decoder_blocks, window
from secateurs.narrow import Narrowed, Narrowing, narrow
from secateurs.parallel import Progress, silent
from secateurs.patterns import Pattern, Unstructured
from secateurs.planner import Needs, Where, choose, needs, shelf
from secateurs.prompts import render
from secateurs.recipe import (
    Recipe,
    arm_label,
    build_allocator,
    build_pattern,
    build_questions,
    build_solver,
    build_tune,
    pattern_label,
    solver_label,
)
from secateurs.solvers.masking import Masking
from secateurs.solvers.rounded import Rounded
from secateurs.survey import BY_GRADIENTS, blocks_to_drop, survey
from secateurs.trim import ExpertTrimmer, Smaller, StreamTrimmer, Trimmer

PROBED_WINDOW = 8192  # tokens; a forward pass of more takes long


@dataclass(frozen=True)
class Case:
    """A cell of the grid before it is pruned: a recipe without a sweep, a seed, and what they start from."""

    recipe: Recipe
    out: Path
    seed: int
    traced: Traced
    dense: Dense

    @property
    def label(self) -> str:
        """Its arm."""
        return arm_label(self.recipe.calibration.arm)

    @property
    def calibrated_on(self) -> dict[str, Any]:
        """For a key: the model, and every token that it is calibrated and judged on, and how exactly."""
        filters, dense = self.recipe.traces.filters, self.dense
        table = self.recipe.prune  # a step of a fine-tune is a batch, and experts are judged on whole ones
        by_batch = table.tune.steps or isinstance(build_pattern(table.pattern), FewerExperts)
        rounds_only = set() if by_batch else {"batch_tokens"}
        return {
            **dense.computed, "traces": self.traced.key, "filters": {"of calibration": filters} if filters else {},
            "calibration": self.recipe.calibration.model_dump(exclude=rounds_only), "seed": self.seed, **dense.key,
            "corpus": dense.corpus_hash,
        }  # fmt: skip

    @property
    def folder(self) -> Path:
        """Where its model, blocks and answers are kept."""
        table = self.recipe.prune
        built = build_pattern(table.pattern)
        resolved = [  # defaults may change
            repr(build_solver(table.solver)), repr(build_allocator(table.allocator)),
            *([repr(built)] if isinstance(built, Cut) else []),
        ]  # fmt: skip
        key = canonical_hash({**self.calibrated_on, "prune": table.model_dump(), "resolved": resolved})[:12]
        pattern = str(built).replace("%", "pct").replace(":", "of").replace(" ", "-")
        return self.out / "cells" / f"{self.label}-{pattern}-s{self.seed}-{key}"

    def survey_file(self, suffix: str, wanted: dict[str, Any]) -> Path:
        """Where something that is wanted to know of the dense model is kept."""
        return self.out / "surveys" / f"{canonical_hash(self.calibrated_on | wanted)[:12]}{suffix}"


def calibration_set(case: Case) -> CalibrationSet:
    """The documents of a case's arm, all arms with the same token budget and the same held-out traces.

    Prompts come from the traces' own question stream, distinct and never a held-out one; a corpus comes in the pieces
    it is stored in. A mixture with a corpus gives it half of the budget.
    """
    recipe, traced, tokenizer = case.recipe, case.traced, case.dense.tokenizer
    weights = region_weights(recipe.calibration.arm)
    budget = recipe.calibration.num_tokens
    documents: list[Document] = []
    if weights.get("corpus"):
        share, documents = corpus_documents(recipe, case.seed, tokenizer)
        budget -= share
    if weights.get("think") or weights.get("answer"):
        pool = (trace_document(t, recipe.calibration.first_tokens) for t in traced.traces)
        documents += take(pool, budget, weights, "traces")
    elif weights.get("prompt"):
        held_ids = {t.question_id for t in traced.held_out}
        questions = build_questions(recipe.traces.questions)
        fresh = (q for q in questions.questions("calibration", case.seed) if q.id not in held_ids)
        prompts = (plain_document(render(tokenizer, questions.format, q), "prompt") for q in fresh)
        documents += take(prompts, budget, weights, "prompts")
    return CalibrationSet(tuple(documents), tuple(map(trace_document, traced.held_out)), weights)


@dataclass(frozen=True)
class Pruned:
    """One pruned model on disk and what is known about it."""

    folder: Path
    arm: str
    pattern: str
    sparsity: float
    solver: str
    seed: int
    calibration_tokens: int
    layers: list[dict[str, Any]]
    hidden_error: dict[str, Any]
    seconds: dict[str, float]


def solve_alike(cases: Sequence[Case], progress: Progress = silent) -> dict[Path, float]:
    """Solve the blocks of several cells on the same Grams, where `prune` finds them; each one's share of the seconds,
    by folder. Nothing where fewer than two are missing.

    The cases differ in pattern and solver only, and their layers see what they see in the dense model.
    """
    folders = {case.folder: case for case in cases}
    with ExitStack() as stack:
        for folder in folders:
            if not (folder / "prune.json").exists():
                stack.enter_context(locked(folder, "cell"))
        missing = {folder: case for folder, case in folders.items() if not (folder / "prune.json").exists()}
        return _solve_alike(missing, progress) if len(missing) > 1 else {}


def _solve_alike(missing: Mapping[Path, Case], progress: Progress) -> dict[Path, float]:
    clock = time.perf_counter()
    first = next(iter(missing.values()))
    calibration = calibration_set(first)
    plans = {}
    for folder, case in missing.items():
        patterns = allocate(case, calibration, progress)
        plans[folder / "blocks"] = replace(plan_of(case.recipe, case.dense), patterns=patterns)
    stage = f"prune {first.label} s{first.seed}, {len(missing)} models at once"
    where = _where(first, calibration)
    batch_tokens = first.recipe.calibration.batch_tokens
    first.dense.together(partial(_solve, calibration, plans, batch_tokens, where, first.out, stage), progress)
    return dict.fromkeys(missing, (time.perf_counter() - clock) / len(missing))


def prune(
    case: Case, reference: Callable[[], evaluate.Reference], progress: Progress = silent, shared: float = 0.0
) -> Pruned:
    """Prune one cell and export it; a finished cell is read back, an unfinished one goes on after its last block.

    `shared` are the seconds that solving it together with others (`solve_alike`) took; those of a run that is killed
    before the cell is finished are lost.
    """
    if found := _finished(case.folder):
        return found
    with locked(case.folder, "cell"):
        return _finished(case.folder) or _prune(case, reference, progress, shared)


def _finished(folder: Path) -> Pruned | None:
    """A cell as it is on disk; None for one that is not complete. ValueError if its record is damaged."""
    record = folder / "prune.json"
    if not (record.exists() and (folder / "model" / "secateurs.json").exists()):
        return None
    _forget_the_way(folder)  # if it was killed before it could
    rename_probe(folder / "model")
    data: Any = read_json(record)
    try:
        return Pruned(folder, **data)
    except TypeError:
        raise ValueError(f"{record} is damaged: remove it, and the cell is pruned again") from None


def _prune(case: Case, reference: Callable[[], evaluate.Reference], progress: Progress, shared: float) -> Pruned:
    recipe, dense, folder = case.recipe, case.dense, case.folder
    pattern_spec = recipe.prune.pattern
    states = reference()
    clock = time.perf_counter()
    calibration = calibration_set(case)
    seconds = {"prune, shared": shared} if shared else {}
    seconds["calibrate"] = time.perf_counter() - clock
    clock = time.perf_counter()
    pattern = build_pattern(pattern_spec)
    stage = f"prune {case.label} {solver_label(recipe.prune.solver)} {pattern} s{case.seed}"
    if isinstance(pattern, FewerExperts):
        done = _without_experts(pattern, case, calibration, stage, progress)
    elif isinstance(pattern, Hidden):
        done = _narrower(pattern, case, calibration, stage, progress)
    else:
        patterns = allocate(case, calibration, progress)
        plan = replace(plan_of(recipe, dense), patterns=patterns, **_by_gradients(case, calibration, progress))
        where = _where(case, calibration)
        batch_tokens, plans = recipe.calibration.batch_tokens, {folder / "blocks": plan}
        work = partial(_solve, calibration, plans, batch_tokens, where, folder, stage)
        results = dense.together(work, progress)
        selected = pruner.prunable(dense.checkpoint.model, plan)
        pruned = pruner.results_in(folder / "blocks", selected, dense.checkpoint.opened)
        done = _Solved(dense.checkpoint, results, selected, pruned, Trimmer if isinstance(pattern, Cut) else None)
    seconds["prune"] = time.perf_counter() - clock
    clock = time.perf_counter()
    hidden = evaluate.drift(done.checkpoint.model, states, done.opened, done.lift)
    seconds["hidden error"] = time.perf_counter() - clock
    clock = time.perf_counter()
    layers = [asdict(result) | {"shape": list(result.shape)} for result in done.results]
    shapes = [result.shape for result in done.results]
    sparsity = sum(result.zeros for result in done.results) / sum(d_out * d_in for d_out, d_in in shapes)
    facts = {
        "arm": case.label,
        "pattern": pattern_label(pattern_spec),
        "sparsity": pattern_spec.get("sparsity", sparsity),
        "solver": solver_label(recipe.prune.solver),
        "seed": case.seed,
        "calibration_tokens": calibration.tokens,
    }
    export(
        done.checkpoint,
        dense.tokenizer,
        done.selected,
        done.opened,
        folder / "model",
        provenance={
            **facts, "model": recipe.model, "hashes": dense.key, "key": folder.name.rsplit("-", 1)[1],
            "secateurs": version("secateurs"),
            "recipe": recipe.model_dump(exclude={"resources"}), "held_out": hidden,
        },
        layers=layers,
        probe_ids=_probe(calibration, window(done.checkpoint.model)),
        smaller=done.smaller,
    )  # fmt: skip
    seconds["export"] = time.perf_counter() - clock
    data = {**facts, "layers": layers, "hidden_error": hidden, "seconds": seconds}
    write_json(folder / "prune.json", data)
    _forget_the_way(folder)
    return Pruned(folder, **data)


def _probe(calibration: CalibrationSet, beyond: int) -> list[int]:
    """Some tokens of held-out documents, and of others; more than `beyond`, if there are so many and it is no more than
    PROBED_WINDOW."""
    documents = (*calibration.held_out, *calibration.documents)
    ids = list(islice(chain.from_iterable(one.ids for one in documents), min(beyond, PROBED_WINDOW) + PROBE_TOKENS))
    return ids if len(ids) == beyond + PROBE_TOKENS else ids[:PROBE_TOKENS]


def _forget_the_way(folder: Path) -> None:
    """Remove what an unfinished cell would have gone on from."""
    for temporary in ("blocks", "projected"):
        shutil.rmtree(folder / temporary, ignore_errors=True)


@dataclass(frozen=True)
class _Solved:
    """What a prune found, and how its blocks are seen and written."""

    checkpoint: Checkpoint
    results: list[pruner.LayerResult]
    selected: Sequence[Sequence[Matrix]]
    opened: Opened
    smaller: Callable[[Checkpoint, Path], Smaller] | None
    lift: Tensor | None = None


def _without_experts(
    cut: FewerExperts, case: Case, calibration: CalibrationSet, stage: str, progress: Progress
) -> _Solved:
    """A cell whose blocks lose experts."""
    dense, where = case.dense, _where(case, calibration)
    work = partial(_choose_experts, cut, case.recipe, case.folder, calibration, where, stage)
    verdicts = dense.together(work, progress)
    results = [result for verdict in verdicts for result in verdict.results]
    seen = keeping(verdicts, dense.checkpoint.model, dense.checkpoint.opened)
    return _Solved(dense.checkpoint, results, [[] for _ in verdicts], seen, ExpertTrimmer)


def _choose_experts(
    cut: FewerExperts, recipe: Recipe, folder: Path, calibration: CalibrationSet, where: Where, stage: str,
    dense: Dense, progress: Progress,
) -> list[Verdict]:  # fmt: skip
    """This process's part in what becomes of every block."""
    score: Any = build_solver(recipe.prune.solver)
    dense.forget()
    return drop_experts(
        dense.checkpoint.model, calibration, cut, score, folder / "experts.json", propagate=recipe.prune.propagate,
        batch_tokens=recipe.calibration.batch_tokens, place=shelf(where, folder), opened=dense.checkpoint.opened,
        progress=lambda done, total, what: progress(stage, done, total, "blocks"), ranks=dense.ranks,
    )  # fmt: skip


def _narrower(cut: Hidden, case: Case, calibration: CalibrationSet, stage: str, progress: Progress) -> _Solved:
    """A cell with a narrower residual stream."""
    folder, where = case.folder, _where(case, calibration)
    found = case.dense.together(partial(_narrow, cut, case.recipe, folder, calibration, where, stage), progress)
    seen = pruner.results_in(folder / "blocks", found.selected, found.checkpoint.opened)
    smaller = partial(StreamTrimmer, before=len(found.lift))
    return _Solved(found.checkpoint, found.results, found.selected, seen, smaller, found.lift)


def _narrow(
    cut: Hidden, recipe: Recipe, folder: Path, calibration: CalibrationSet, where: Where, stage: str,
    dense: Dense, progress: Progress,
) -> Narrowed:  # fmt: skip
    """This process's part in the narrower model."""
    how: Any = build_solver(recipe.prune.solver)
    dense.forget()
    return narrow(
        dense.checkpoint, calibration, cut, how, folder,
        batch_tokens=recipe.calibration.batch_tokens, place=shelf(where, folder),
        progress=lambda done, total, what: progress(stage, done, total, "blocks"), ranks=dense.ranks,
    )  # fmt: skip


def _solve(
    calibration: CalibrationSet,
    plans: Mapping[Path, pruner.Plan],
    batch_tokens: int,
    where: Where,
    beside: Path,
    stage: str,
    dense: Dense,
    progress: Progress,
) -> list[pruner.LayerResult]:
    """This process's part in a prune: several `plans`, by the folder of their blocks, at once on the same Grams, or one
    of any kind. The first process writes the blocks; results of one plan are returned."""
    dense.forget()  # blocks are read one at a time
    options: dict[str, Any] = {
        "opened": dense.checkpoint.opened, "place": shelf(where, beside), "batch_tokens": batch_tokens,
        "progress": lambda done, total, what: progress(stage, done, total, "layers"), "ranks": dense.ranks,
        "stored": dense.checkpoint.stored,
    }  # fmt: skip
    if len(plans) > 1:
        pruner.solve_alike(dense.checkpoint.model, calibration, plans, **options)
        return []
    ((folder, plan),) = plans.items()
    options["folder"] = folder if dense.ranks.first else None
    return pruner.prune(dense.checkpoint.model, calibration, plan, **options)


def _where(case: Case, calibration: CalibrationSet) -> Where:
    """Where hidden states are to be kept while a cell is pruned."""
    recipe = case.recipe
    documents = (*calibration.documents, *calibration.held_out)
    padded = sum(batch.ids.numel() for batch in batches(documents, recipe.calibration.batch_tokens))
    longest = max(len(document.ids) for document in documents)
    held_out_tokens = sum(len(one.ids) for one in calibration.held_out)
    return hidden_states(recipe, case.dense, memory_needs(recipe, case.dense, padded, held_out_tokens, longest))


def hidden_states(recipe: Recipe, dense: Dense, wanted: Needs) -> Where:
    """Where hidden states are to be kept: where the recipe says, or where they fit."""
    where, device = recipe.resources.hidden_states, dense.checkpoint.device
    if where == "cpu" == device.type:
        return "device"
    return choose(wanted, device, dense.ranks) if where == "auto" else where


def memory_needs(recipe: Recipe, dense: Dense, tokens: int, held_out_tokens: int, longest: int) -> Needs:
    """What each process will hold that prunes a cell, for so many tokens, padding and held-out ones included."""
    pattern = build_pattern(recipe.prune.pattern)
    count = dense.ranks.count
    alone = needs(
        dense.checkpoint.model,
        plan_of(recipe, dense),
        recipe.prune.solver["name"],
        tokens=-(-tokens // count),
        held_out_tokens=-(-held_out_tokens // count),
        batch_tokens=recipe.calibration.batch_tokens,
        longest=longest,
        stored=dense.checkpoint.stored,
        in_file=() if isinstance(pattern, Hidden) else dense.checkpoint.in_file,
    )
    if not isinstance(pattern, Hidden):
        return alone
    return replace(alone, around=3 * alone.around, block=2 * alone.block, hidden=2 * alone.hidden)  # a second model


def plan_of(recipe: Recipe, dense: Dense) -> pruner.Plan:
    """What the recipe says to do to the model, before anything is known of it but its shapes."""
    pattern, solver = build_pattern(recipe.prune.pattern), build_solver(recipe.prune.solver)
    patterns: dict[str, Pattern] = {}
    if isinstance(pattern, Cut):
        patterns = {**pattern.patterns(dense.checkpoint.model)}
        pattern = next(iter(patterns.values()))
        if isinstance(solver, Rounded):
            patterns = _kept_whole(dense) | patterns
    return pruner.Plan(
        pattern=pattern,
        patterns=patterns,
        solver=Masking(score="magnitude") if isinstance(solver, (ExpertScore, Narrowing)) else solver,  # not used
        propagate=recipe.prune.propagate,
        goal=recipe.prune.goal,
        tune=build_tune(recipe.prune.tune),
        targets=tuple(patterns or recipe.prune.targets),
        ignore=tuple(recipe.prune.ignore),
    )


def _kept_whole(dense: Dense) -> dict[str, Pattern]:
    """A pattern without zeros for every matrix of the decoder blocks."""
    prefix, blocks = decoder_blocks(dense.checkpoint.model)
    matrices = (matrix for index, block in enumerate(blocks) for matrix in matrices_of(block, f"{prefix}.{index}"))
    return {matrix.name: Unstructured(0.0) for matrix in matrices}


def allocate(case: Case, calibration: CalibrationSet, progress: Progress = silent) -> dict[str, Pattern]:
    """The pattern of every matrix under the allocator's plan, with as many zeros as the uniform one; none for uniform.

    What the allocator, or a cut of blocks, wants to know of the dense model is measured once and kept in out/surveys.
    """
    table, dense = case.recipe.prune, case.dense
    allocator, plan, cut = build_allocator(table.allocator), plan_of(case.recipe, dense), build_pattern(table.pattern)
    if isinstance(cut, Depth):
        return {**plan.patterns, **_without_blocks(cut, case, calibration, progress)}
    if not allocator.needs_survey:
        return dict(plan.patterns)
    sparsity, curves = table.pattern["sparsity"], allocator.needs_curves
    selected = pruner.prunable(dense.checkpoint.model, plan)
    names = [matrix.name for block in selected for matrix in block]
    record = case.survey_file(".json", {"sparsity": sparsity, "curves": curves, "matrices": names})
    if record.exists():
        rows: Any = read_json(record)
        layers = [Layer(**(row | {"curve": tuple(map(tuple, row["curve"]))})) for row in rows]
    else:
        stage = f"survey {case.label} {plan.pattern} s{case.seed}"
        work = partial(_survey, plan, calibration, sparsity, curves, case.recipe.calibration.batch_tokens, stage)
        layers = dense.together(work, progress)
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, [asdict(layer) for layer in layers])
    zeros = sum(plan.pattern_of(matrix).num_zeros(*matrix.weight.shape) for block in selected for matrix in block)
    counts = allocator.allocate(layers, zeros)
    return {
        layer.name: Unstructured(Fraction(count, layer.size), "layer")
        for layer, count in zip(layers, counts, strict=True)
    }


def _survey(
    plan: pruner.Plan, calibration: CalibrationSet, sparsity: float, curves: bool, batch_tokens: int, stage: str,
    dense: Dense, progress: Progress,
) -> list[Layer]:  # fmt: skip
    """This process's part in what an allocator wants to know; with `curves` the whole model runs, for every matrix."""
    model, opened = (dense.model, nullcontext) if curves else (dense.checkpoint.model, dense.checkpoint.opened)
    return survey(
        model, calibration, pruner.prunable(model, plan), sparsity, curves=curves, opened=opened,
        batch_tokens=batch_tokens, progress=lambda done, total, what: progress(stage, done, total, "layers"),
        ranks=dense.ranks,
    )  # fmt: skip


def _choose_blocks(calibration: CalibrationSet, cut: Depth, stage: str, dense: Dense, progress: Progress) -> list[int]:
    """This process's part in which blocks go."""
    return blocks_to_drop(
        dense.model, calibration, cut, ranks=dense.ranks,
        progress=lambda done, total, what: progress(stage, done, total, "blocks"),
    )  # fmt: skip


def _ask_gradients(
    calibration: CalibrationSet, cut: Width, stage: str, dense: Dense, progress: Progress
) -> dict[str, Tensor]:
    """This process's part in what its gradients say of the model."""
    _, ask = BY_GRADIENTS[cut.score]
    return ask(
        dense.model, calibration, cut.patterns(dense.model), ranks=dense.ranks,
        progress=lambda done, total, what: progress(stage, done, total, "batches"),
    )  # fmt: skip


def _without_blocks(cut: Depth, case: Case, calibration: CalibrationSet, progress: Progress) -> dict[str, Pattern]:
    """Which blocks go, which a survey of the dense model says, as the patterns of every block's matrices."""
    record = case.survey_file(".json", {"blocks": repr(cut)})
    if not record.exists():
        work = partial(_choose_blocks, calibration, cut, f"survey {case.label} {cut} s{case.seed}")
        alone = cut.score == "angle"  # one pass: nothing to share
        dropped = work(case.dense, progress) if alone else case.dense.together(work, progress)
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, {"dropped": dropped})
    found: Any = read_json(record)
    return {**cut.patterns(case.dense.checkpoint.model, found["dropped"])}


def _by_gradients(case: Case, calibration: CalibrationSet, progress: Progress) -> dict[str, dict[str, Tensor]]:
    """What a plan has to know of the model's loss, if its cut goes by that; kept in out/surveys."""
    cut = build_pattern(case.recipe.prune.pattern)
    if not isinstance(cut, Width) or cut.score not in BY_GRADIENTS:
        return {}
    what, _ = BY_GRADIENTS[cut.score]
    names = list(cut.patterns(case.dense.checkpoint.model))
    record = case.survey_file(".safetensors", {what: [names, cut.attention]})
    if not record.exists():
        work = partial(_ask_gradients, calibration, cut, f"survey {case.label} {cut} s{case.seed}")
        found = case.dense.together(work, progress)
        record.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(record, save(found))
    return {what: load_file(record)}
