"""The stages of a run, each a function from a recipe to files: trace, prune (with export), evaluate, all of them.

    out/traces/KEY/          a trace store of the dense model
    out/dense/KEY/           the dense model's answers
    out/surveys/KEY.json     what an allocator wanted to know of the dense model
    out/cells/NAME-KEY/      one pruned model: blocks/ (to resume from), model/ (the result), answers/, cell.json
    out/report.json|md|html

KEY is the hash of everything that can change what is in the folder, so a changed recipe never meets old results and a
repeated command goes on where it stopped.
"""

import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from fractions import Fraction
from functools import cached_property
from glob import escape
from hashlib import sha256
from importlib.metadata import version
from itertools import count, islice, product
from pathlib import Path
from random import Random
from typing import Any, Protocol

import torch

from secateurs import evaluate, pruner
from secateurs.allocators import Layer
from secateurs.artifacts import canonical_hash, folder_hash, model_hash, read_json, tokenizer_hash, write_json
from secateurs.calibration import (
    CalibrationSet,
    Document,
    batches,
    plain_document,
    region_weights,
    take,
    trace_document,
)
from secateurs.engines import Completion, Engine, Request, Sampling, default_sampling
from secateurs.engines.hf import hf_engine
from secateurs.engines.openai import OpenAI
from secateurs.export import export, verify
from secateurs.hub import HUB
from secateurs.layer import Gram, LayerProblem
from secateurs.leaks import overlap
from secateurs.models import load_model, load_tokenizer, model_path
from secateurs.patterns import Pattern, Unstructured
from secateurs.policy import check_own
from secateurs.prompts import answer_text, render, think_split, trace_seed
from secateurs.questions import Question, QuestionSet
from secateurs.questions.tiny import Tiny
from secateurs.recipe import (
    Arm,
    Recipe,
    build_allocator,
    build_pattern,
    build_questions,
    build_solver,
    build_tune,
    solver_label,
)
from secateurs.recipe import Sampling as SamplingOverrides
from secateurs.report import (
    Cell,
    Evaluation,
    HiddenError,
    LayerReport,
    LeakCheck,
    Report,
    Stage,
    TraceSummary,
    merge_leaks,
    merge_traces,
    summarise,
)
from secateurs.rows import read_rows
from secateurs.survey import survey
from secateurs.traces import Trace, TraceStore, apply_filters

CHECKED_TRACES = 8  # of a server's, before it is believed
CORPUS_ROWS = 20_000
Asked = tuple[Question, int]  # and which sample of its answer


class Progress(Protocol):
    """Where a stage says how far it is; total 0 means unknown."""

    def __call__(self, stage: str, done: float, total: float, unit: str) -> None: ...


def silent(stage: str, done: float, total: float, unit: str) -> None:
    """No progress shown."""


@dataclass
class Dense:
    """The model a recipe starts from, with what names it."""

    recipe: Recipe

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.recipe.model, trust_remote_code=self.recipe.resources.trust_remote_code)

    @cached_property
    def model(self) -> Any:
        return self.fresh()

    def fresh(self) -> Any:
        """Another copy of the weights, to prune."""
        r = self.recipe.resources
        return load_model(self.recipe.model, device=r.device, trust_remote_code=r.trust_remote_code)

    @cached_property
    def key(self) -> dict[str, str]:
        """Hashes of model and tokenizer."""
        folder = model_path(self.recipe.model)
        if not Path(folder).is_dir():  # a hub id: its weights are pinned by the commit transformers resolved
            return {"model": f"{self.recipe.model}@{getattr(self.model.config, '_commit_hash', None)}", "tokenizer": ""}
        return {"model": model_hash(folder), "tokenizer": tokenizer_hash(folder)}

    @cached_property
    def corpus_hash(self) -> str:
        """Of the content of the recipe's corpus, as a file may change under its name; "" for the one that ships.

        Of a corpus on the hub: of the texts that are used, which are read once more for it.
        """
        if self.recipe.calibration.corpus.startswith(HUB):
            digest = sha256()
            for text in corpus_texts(self.recipe, 0):
                digest.update(f"{len(text)} {text}".encode("utf-8", "surrogatepass"))
            return digest.hexdigest()
        path = Path(self.recipe.calibration.corpus)
        return folder_hash(path.parent, [escape(path.name)]) if self.recipe.calibration.corpus else ""


@dataclass(frozen=True)
class Traced:
    """What the trace stage leaves: kept traces in request order, and how it went."""

    traces: tuple[Trace, ...]
    summary: TraceSummary
    key: str


def _sampling(dense: Dense, overrides: SamplingOverrides) -> Sampling:
    return default_sampling(dense.model.generation_config, **overrides.model_dump())


def _provenance(
    dense: Dense, questions: QuestionSet, spec: Any, split: str, sampling: Sampling, seed: int, engine: Any = "hf"
) -> dict[str, Any]:
    return {
        **dense.key,
        "questions": {"name": questions.name, "version": questions.version, "options": spec, "split": split},
        "format": asdict(questions.format),
        "sampling": asdict(sampling),
        "seed": seed,
        "engine": engine,
    }


def sample(
    store: TraceStore,
    asked: Iterable[Asked],
    engine: Engine,
    tokenizer: Any,
    questions: QuestionSet,
    sampling: Sampling,
    seed: int,
    at_once: int,
    enough: Callable[[], bool],
) -> None:
    """Answer what is asked in order and store every trace as it is finished, until `enough` or all is answered.

    What the store holds already is not asked again. Traces go to disk every quarter of a second, or `at_once` together.
    """
    by_id: dict[str, Question] = {}

    def requests() -> Iterator[Request]:
        for question, number in asked:
            if (question.id, number) not in store:
                by_id[question.id] = question
                ids = render(tokenizer, questions.format, question)
                yield Request(
                    question_id=question.id, sample=number, prompt_ids=ids, seed=trace_seed(seed, question.id, number)
                )

    if enough():
        return
    spent = 0.0
    waiting: list[Trace] = []
    clock = time.monotonic()
    try:
        for completion in engine.generate(requests(), sampling):
            waiting.append(_trace(completion, tokenizer, questions, by_id[completion.request.question_id]))
            spent += completion.seconds
            if time.monotonic() - clock > 0.25 or len(waiting) >= at_once:
                store.append(waiting)
                store.add_seconds(spent)
                waiting, spent, clock = [], 0.0, time.monotonic()
                if enough():
                    return
    finally:  # also where an engine gives up: what it has answered stays
        store.append(waiting)
        store.add_seconds(spent)
    enough()


def _trace(completion: Completion, tokenizer: Any, questions: QuestionSet, question: Question) -> Trace:
    request = completion.request
    think, closed = think_split(tokenizer, request.prompt_ids, completion.ids)
    answer = answer_text(tokenizer, completion.ids, think, closed)
    return Trace(
        question_id=request.question_id,
        sample=request.sample,
        prompt_ids=request.prompt_ids,
        completion_ids=completion.ids,
        think_tokens=think,
        think_closed=closed,
        finish=completion.finish,
        reward=float(questions.check(question, answer)),
        seed=request.seed,
    )


class _Replayed:
    """Something to go through again from the start, drawn once and only as far as anyone has gone."""

    def __init__(self, source: Iterator[Asked]):
        self.source = source
        self.drawn: list[Asked] = []

    def __iter__(self) -> Iterator[Asked]:
        for index in count():
            if index == len(self.drawn):
                try:
                    self.drawn.append(next(self.source))
                except StopIteration:
                    return
            yield self.drawn[index]


def trace_engine(recipe: Recipe, dense: Dense) -> Engine:
    """Who samples the traces: the model in this process, or servers that hold it."""
    table = recipe.traces.engine
    if table.name == "hf":
        return hf_engine(dense.model, dense.tokenizer, recipe.resources.batch_size)
    options: dict[str, Any] = table.model_dump(exclude={"name", "servers"})
    vocab_size = dense.model.get_input_embeddings().num_embeddings
    return OpenAI(servers=tuple(table.servers), tokenizer=dense.tokenizer, vocab_size=vocab_size, **options)


def trace(
    recipe: Recipe,
    out: Path,
    seed: int,
    dense: Dense,
    progress: Progress = silent,
    shard: tuple[int, int] = (0, 1),
) -> Traced:
    """Sample the dense model's own chains of thought until every arm has its tokens, held-out ones included.

    `shard` (which, of how many) takes one request of so many and its share of the tokens, and leaves them unsealed:
    `traces.merge_stores` brings shards together, and a run on the merged store samples only what is then missing.
    """
    which, shards = shard
    questions = build_questions(recipe.traces.questions)
    sampling = _sampling(dense, recipe.traces.sampling)
    table = recipe.traces.engine
    provenance = _provenance(dense, questions, recipe.traces.questions, "calibration", sampling, seed, table.identity)
    provenance["samples"] = recipe.traces.samples
    key = canonical_hash(provenance)[:12]
    drawn = questions.questions("calibration", seed)
    stream = ((question, number) for question in drawn for number in range(recipe.traces.samples))
    asked = _Replayed(islice(stream, which, None, shards))
    needs = [(region_weights(arm), recipe.calibration.num_tokens) for arm in recipe.arms]
    rest = [(w, n // 2 if w.get("corpus") else n) for w, n in needs if w.get("think") or w.get("answer")]
    budget = -(-(recipe.calibration.held_out_tokens + max((n for _, n in rest), default=0)) // shards)
    with TraceStore(out / "traces" / key, provenance) as store:
        engine = trace_engine(recipe, dense)
        tokens, ahead = 0, iter(asked)
        following = next(ahead, None)
        trusted = table.name == "hf"

        def trust() -> None:
            nonlocal trusted
            if not trusted:
                check_own(dense.model, list(islice(store, CHECKED_TRACES)), sampling)
                trusted = True

        def enough() -> bool:
            nonlocal tokens, following
            if len(store) >= CHECKED_TRACES:
                trust()
            while following and tokens < budget and (found := store.get(following[0].id, following[1])):
                tokens += found.tokens
                following = next(ahead, None)
            progress("trace", min(tokens, budget), budget, "tokens")
            return tokens >= budget

        while True:
            sample(
                store,
                asked,
                engine,
                dense.tokenizer,
                questions,
                sampling,
                seed,
                recipe.resources.batch_size,
                enough,
            )
            trust()  # also where there are only a few
            run, complete = store.prefix(((question.id, number) for question, number in asked), budget)
            kept, dropped = apply_filters(run, recipe.traces.filters)
            documents = [trace_document(t) for t in kept]
            _, pool = _split(documents, recipe.calibration.held_out_tokens)
            missing = max((n - sum(d.count(w) for d in pool) for w, n in rest), default=0)
            if not kept:
                missing = max(missing, 1)
            if shards > 1 or missing <= 0 or not complete:
                break
            budget += max(missing, 1)
        if shards == 1:
            store.seal(run)
        seconds = store.seconds
    if not kept:
        raise ValueError(
            f"no trace passed the filters: {dropped}; loosen traces.filters or look at the model's answers"
        )
    return Traced(tuple(kept), _trace_summary(kept, dropped, seconds), key)


def _trace_summary(kept: Sequence[Trace], dropped: dict[str, int], seconds: float) -> TraceSummary:
    by_region: dict[str, int] = {"prompt": 0, "think": 0, "answer": 0}
    for one in kept:
        for region, start, stop in one.regions:
            by_region[region] += stop - start
    return TraceSummary(
        traces=len(kept),
        tokens=sum(by_region.values()),
        by_region=by_region,
        pass_at_1=sum(t.reward or 0.0 for t in kept) / len(kept),
        mean_think_tokens=sum(t.think_tokens for t in kept) / len(kept),
        truncated=sum(t.finish == "length" for t in kept) / len(kept),
        dropped=dropped,
        seconds=seconds,
    )


def _split(documents: Sequence[Document], held_out_tokens: int) -> tuple[list[Document], list[Document]]:
    """Whole traces from the front until `held_out_tokens` are held out; the rest calibrates."""
    total, at = 0, 0
    while at < len(documents) and total < held_out_tokens:
        total += len(documents[at].ids)
        at += 1
    return list(documents[:at]), list(documents[at:])


def corpus_texts(recipe: Recipe, seed: int) -> Iterator[str]:
    """The texts of the recipe's corpus in an order fixed by `seed`; of a large file the first CORPUS_ROWS."""
    table = recipe.calibration
    if not table.corpus:
        yield from Tiny().corpus("calibration", seed)
        return
    texts: list[str] = []
    for place, row in islice(read_rows(table.corpus), CORPUS_ROWS):
        if not isinstance(row.get(table.corpus_field), str):
            raise ValueError(f"{place}: no text in field `{table.corpus_field}`; there are {', '.join(row) or 'none'}")
        texts.append(row[table.corpus_field])
    Random(seed).shuffle(texts)
    yield from texts


def calibration_set(recipe: Recipe, arm: Arm, seed: int, traced: Traced, dense: Dense) -> CalibrationSet:
    """The documents of one arm, all arms with the same token budget and the same held-out traces.

    Prompts come from the traces' own question stream, distinct and never a held-out one; a corpus comes in the pieces
    it is stored in. A mixture with a corpus gives it half of the budget.
    """
    weights = region_weights(arm)
    budget = recipe.calibration.num_tokens
    held, pool = _split([trace_document(t) for t in traced.traces], recipe.calibration.held_out_tokens)
    documents: list[Document] = []
    if weights.get("corpus"):
        size = recipe.calibration.corpus_tokens
        tokenized = (dense.tokenizer(text)["input_ids"] for text in corpus_texts(recipe, seed))
        pieces = (
            plain_document(ids[start : start + size], "corpus")
            for ids in tokenized
            for start in range(0, len(ids), size)
        )
        share = budget if set(w for w in weights if weights[w]) == {"corpus"} else budget // 2
        documents += take(pieces, share, weights, "corpus")
        budget -= share
    if weights.get("think") or weights.get("answer"):
        documents += take(pool, budget, weights, "traces")
    elif weights.get("prompt"):
        held_ids = {t.question_id for t in traced.traces[: len(held)]}
        questions = build_questions(recipe.traces.questions)
        fresh = (q for q in questions.questions("calibration", seed) if q.id not in held_ids)
        prompts = (plain_document(render(dense.tokenizer, questions.format, q), "prompt") for q in fresh)
        documents += take(prompts, budget, weights, "prompts")
    return CalibrationSet(tuple(documents), tuple(held), weights)


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


def arm_label(arm: Arm) -> str:
    """An arm's name, or a mixture spelled out."""
    return arm if isinstance(arm, str) else "+".join(f"{weight:g}{region}" for region, weight in arm.items() if weight)


def prune(
    recipe: Recipe,
    out: Path,
    arm: Arm,
    pattern_spec: dict[str, Any],
    seed: int,
    traced: Traced,
    dense: Dense,
    reference: evaluate.Reference,
    progress: Progress = silent,
) -> Pruned:
    """Prune one cell and export it; a finished cell is read back, an unfinished one goes on after its last block."""
    plan = plan_of(recipe, pattern_spec)
    label = arm_label(arm)
    key = canonical_hash(
        {
            "traces": traced.key, "filters": recipe.traces.filters,
            "calibration": recipe.calibration.model_dump() | {"arm": arm},
            "prune": recipe.prune.model_dump() | {"pattern": pattern_spec}, "seed": seed, **dense.key,
            "corpus": dense.corpus_hash,
            "resolved": [repr(plan.solver), repr(build_allocator(recipe.prune.allocator))],  # defaults may change
        }
    )[:12]  # fmt: skip
    name = f"{label}-{str(plan.pattern).replace('%', 'pct').replace(':', 'of')}-s{seed}-{key}"
    folder = out / "cells" / name
    record = folder / "prune.json"
    if record.exists() and (folder / "model" / "secateurs.json").exists():
        data: dict[str, Any] = read_json(record)
        return Pruned(folder, **data)
    clock = time.perf_counter()
    calibration = calibration_set(recipe, arm, seed, traced, dense)
    seconds = {"calibrate": time.perf_counter() - clock}
    clock = time.perf_counter()
    model = dense.fresh()
    plan = replace(
        plan, patterns=allocate(recipe, out, arm, pattern_spec, seed, traced, dense, plan, model, calibration, progress)
    )
    results = pruner.prune(
        model,
        calibration,
        plan,
        folder=folder / "blocks",
        batch_tokens=recipe.calibration.batch_tokens,
        progress=lambda done, total, what: progress(f"prune {label} {plan.pattern}", done, total, "layers"),
    )
    seconds["prune"] = time.perf_counter() - clock
    clock = time.perf_counter()
    hidden = evaluate.drift(model, reference)
    seconds["hidden error"] = time.perf_counter() - clock
    clock = time.perf_counter()
    layers = [asdict(result) | {"shape": list(result.shape)} for result in results]
    shapes = [result.shape for result in results]
    sparsity = sum(result.zeros for result in results) / sum(d_out * d_in for d_out, d_in in shapes)
    facts = {
        "arm": label,
        "pattern": "unstructured" if pattern_spec["name"] == "unstructured" else str(plan.pattern),
        "sparsity": pattern_spec.get("sparsity", sparsity),
        "solver": solver_label(recipe.prune.solver),
        "seed": seed,
        "calibration_tokens": calibration.tokens,
    }
    export(
        model,
        dense.tokenizer,
        [matrix for block in pruner.prunable(model, plan) for matrix in block],
        folder / "model",
        provenance={
            **facts, "model": recipe.model, "hashes": dense.key, "key": key, "secateurs": version("secateurs"),
            "recipe": recipe.model_dump(exclude={"resources"}), "held_out": hidden,
        },
        layers=layers,
        probe_ids=(calibration.held_out or calibration.documents)[0].ids[:64],
    )  # fmt: skip
    seconds["export"] = time.perf_counter() - clock
    data = {**facts, "layers": layers, "hidden_error": hidden, "seconds": seconds}
    write_json(record, data)
    return Pruned(folder, **data)


def plan_of(recipe: Recipe, pattern_spec: dict[str, Any]) -> pruner.Plan:
    """What the recipe says to do to the model, with one pattern for all matrices."""
    return pruner.Plan(
        pattern=build_pattern(pattern_spec),
        solver=build_solver(recipe.prune.solver),
        propagate=recipe.prune.propagate,
        goal=recipe.prune.goal,
        tune=build_tune(recipe.prune.tune),
        targets=tuple(recipe.prune.targets),
        ignore=tuple(recipe.prune.ignore),
    )


def allocate(
    recipe: Recipe,
    out: Path,
    arm: Arm,
    pattern_spec: dict[str, Any],
    seed: int,
    traced: Traced,
    dense: Dense,
    plan: pruner.Plan,
    model: Any,
    calibration: CalibrationSet,
    progress: Progress = silent,
) -> dict[str, Pattern]:
    """The pattern of every matrix under the allocator's plan, with as many zeros as the uniform one; none for uniform.

    What the allocator wants to know of the dense model is measured once and kept in out/surveys.
    """
    allocator, label = build_allocator(recipe.prune.allocator), f"{arm_label(arm)} {plan.pattern}"
    if not allocator.needs_survey:
        return {}
    selected = pruner.prunable(model, plan)
    key = canonical_hash(
        {
            "traces": traced.key, "filters": recipe.traces.filters,
            "calibration": recipe.calibration.model_dump() | {"arm": arm}, "seed": seed, **dense.key,
            "corpus": dense.corpus_hash, "sparsity": pattern_spec["sparsity"], "curves": allocator.needs_curves,
            "matrices": [matrix.name for block in selected for matrix in block],
        }
    )[:12]  # fmt: skip
    record = out / "surveys" / f"{key}.json"
    if record.exists():
        rows: Any = read_json(record)
        layers = [Layer(**(row | {"curve": tuple(map(tuple, row["curve"]))})) for row in rows]
    else:
        layers = survey(
            model,
            calibration,
            selected,
            pattern_spec["sparsity"],
            curves=allocator.needs_curves,
            batch_tokens=recipe.calibration.batch_tokens,
            progress=lambda done, total, what: progress(f"survey {label}", done, total, "layers"),
        )
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, [asdict(layer) for layer in layers])
    zeros = sum(plan.pattern.num_zeros(*matrix.weight.shape) for block in selected for matrix in block)
    counts = allocator.allocate(layers, zeros)
    return {
        layer.name: Unstructured(Fraction(count, layer.size), "layer")
        for layer, count in zip(layers, counts, strict=True)
    }


@dataclass(frozen=True)
class Answers:
    """A model's scored answers, with what paired comparison needs."""

    traces: tuple[Trace, ...]
    families: dict[str, str]
    question_set: str
    seconds: float


def answer(
    recipe: Recipe, folder: Path, model: Any, model_key: str, seed: int, dense: Dense, stage: str, progress: Progress
) -> Answers:
    """Ask a model the recipe's evaluation questions; a rerun asks only what is missing."""
    spec = recipe.evaluate.questions or recipe.traces.questions
    questions = build_questions(spec)
    sampling = _sampling(dense, recipe.evaluate.sampling or recipe.traces.sampling)
    provenance = _provenance(dense, questions, spec, "eval", sampling, seed)
    provenance |= {"samples": recipe.evaluate.samples, "weights": model_key}
    wanted = list(islice(questions.questions("eval", seed), recipe.evaluate.num_questions))
    asked = [(question, number) for question in wanted for number in range(recipe.evaluate.samples)]
    with TraceStore(folder / canonical_hash(provenance)[:12], provenance) as store:

        def enough() -> bool:
            progress(stage, sum((q.id, n) in store for q, n in asked), len(asked), "answers")
            return all((q.id, n) in store for q, n in asked)

        engine = hf_engine(model, dense.tokenizer, recipe.resources.batch_size)
        sample(store, asked, engine, dense.tokenizer, questions, sampling, seed, recipe.resources.batch_size, enough)
        traces = [found for q, n in asked if (found := store.get(q.id, n))]
        store.seal(traces)
        seconds = store.seconds
    families = {question.id: question.family for question in wanted}
    return Answers(tuple(traces), families, f"{questions.name} v{questions.version}", seconds)


def run(recipe: Recipe, out: Path, progress: Progress = silent) -> Report:
    """Every stage, for every arm, pattern and seed of the recipe; then the report, built but not written."""
    dense = Dense(recipe)
    out.mkdir(parents=True, exist_ok=True)
    plan_check(recipe, dense)
    cells: list[Cell] = []
    stages: dict[str, float] = {}
    traced = None
    summaries: list[TraceSummary] = []
    leaks: list[LeakCheck] = []
    folders: list[Path] = []
    variants = [recipe.with_solver(solver) for solver in recipe.solvers]
    total = len(recipe.seeds) * len(recipe.arms) * len(recipe.patterns) * len(variants)
    for seed in recipe.seeds:
        traced = trace(recipe, out, seed, dense, progress)
        summaries.append(traced.summary)
        stages["trace"] = stages.get("trace", 0.0) + traced.summary.seconds
        held, _ = _split([trace_document(t) for t in traced.traces], recipe.calibration.held_out_tokens)
        reference = evaluate.reference_states(dense.model, list(batches(held, recipe.calibration.batch_tokens)))
        baseline = None
        if recipe.evaluate.num_questions:
            baseline = answer(recipe, out / "dense", dense.model, "dense", seed, dense, "evaluate dense", progress)
            cells.append(_cell(None, baseline, baseline, seed, out / "dense"))
            leaks.append(leak_check(recipe, seed, traced, dense))
        for pattern in recipe.patterns:
            for variant, arm in product(variants, recipe.arms):
                pruned = prune(variant, out, arm, pattern, seed, traced, dense, reference, progress)
                folders.append(pruned.folder / "model")
                if baseline is not None:
                    number = f"{len(folders)}/{total}"
                    stage = f"evaluate {pruned.arm} {pruned.solver} {build_pattern(pattern)} ({number})"
                    model = load_model(str(pruned.folder / "model"), device=recipe.resources.device)
                    key = pruned.folder.name
                    answers = answer(recipe, pruned.folder / "answers", model, key, seed, dense, stage, progress)
                    cells.append(_cell(pruned, answers, baseline, seed, pruned.folder))
    clock = time.perf_counter()
    progress("verify exported models", 0, 0, "")
    verify([folder for folder in folders])
    stages["verify"] = time.perf_counter() - clock
    for cell in cells:
        for name, seconds in cell.seconds.items():
            stages[name] = stages.get(name, 0.0) + seconds
    model = dense.model
    return Report(
        title=recipe.title or f"{recipe.model} pruned on its own chain of thought",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        secateurs=version("secateurs"),
        versions={name: version(name) for name in ("torch", "transformers", "safetensors")},
        hardware=hardware(recipe.resources.device),
        model={"name": recipe.model, "parameters": model.num_parameters(), **dense.key},
        recipe=recipe.model_dump(),
        recipe_key=canonical_hash(recipe.model_dump(exclude={"resources", "title"})),
        stages=[Stage(name=name, seconds=seconds) for name, seconds in stages.items()],
        traces=merge_traces(summaries),
        leaks=merge_leaks(leaks),
        cells=cells,
        summary=summarise(cells),
    )


def leak_check(recipe: Recipe, seed: int, traced: Traced, dense: Dense) -> LeakCheck:
    """The evaluation questions of a seed against every text that any arm may have calibrated on."""
    questions = build_questions(recipe.evaluate.questions or recipe.traces.questions)
    asked = [q.prompt for q in islice(questions.questions("eval", seed), recipe.evaluate.num_questions)]
    texts: list[str] = []
    weights = [region_weights(arm) for arm in recipe.arms]
    if any(w.get("corpus") for w in weights):
        texts += corpus_texts(recipe, seed)
    source = build_questions(recipe.traces.questions)
    prompts_only = any(w.get("prompt") and not (w.get("think") or w.get("answer")) for w in weights)
    missing = {t.question_id for t in traced.traces}
    tokens = 0 if prompts_only else recipe.calibration.num_tokens
    for question in source.questions("calibration", seed):
        if not missing and tokens >= recipe.calibration.num_tokens:
            break
        if question.id not in missing and tokens < recipe.calibration.num_tokens:
            tokens += len(render(dense.tokenizer, source.format, question))
        missing.discard(question.id)
        texts.append(question.prompt)
    return LeakCheck.model_validate(asdict(overlap(asked, texts)))


def _cell(pruned: Pruned | None, answers: Answers, baseline: Answers, seed: int, folder: Path) -> Cell:
    measured = evaluate.measure(
        answers.traces,
        answers.families,
        question_set=answers.question_set,
        seconds=answers.seconds,
        dense=None if pruned is None else baseline.traces,
    )
    seconds = {"evaluate": answers.seconds} | (pruned.seconds if pruned else {})
    return Cell(
        arm=pruned.arm if pruned else "dense",
        sparsity=pruned.sparsity if pruned else 0.0,
        pattern=pruned.pattern if pruned else "dense",
        solver=pruned.solver if pruned else "none",
        seed=seed,
        calibration_tokens=pruned.calibration_tokens if pruned else 0,
        evaluation=Evaluation.model_validate(measured),
        hidden_error=HiddenError.model_validate(pruned.hidden_error) if pruned else None,
        layers=[LayerReport.model_validate(layer) for layer in pruned.layers] if pruned else [],
        seconds=seconds,
        path=str(folder),
    )


def plan_check(recipe: Recipe, dense: Dense) -> dict[str, Any]:
    """What a run will do, without doing it: sizes, tokens, memory. ValueError for what cannot work."""
    counts: dict[str, Any] = {}
    for spec in recipe.patterns:
        plan = plan_of(recipe, spec)
        matrices = [matrix for block in pruner.prunable(dense.model, plan) for matrix in block]
        shapes = [tuple(matrix.weight.shape) for matrix in matrices]
        counts[str(plan.pattern)] = sum(plan.pattern.num_zeros(*shape) for shape in shapes)
    if any(region_weights(arm).get("corpus") for arm in recipe.arms):
        next(corpus_texts(recipe, recipe.seeds[0]), None)  # says what is wrong with the file
    questions = build_questions(recipe.evaluate.questions or recipe.traces.questions)
    found = sum(1 for _ in islice(questions.questions("eval", recipe.seeds[0]), recipe.evaluate.num_questions))
    if found < recipe.evaluate.num_questions:
        raise ValueError(f"evaluate.num_questions is {recipe.evaluate.num_questions:,}, the set has {found:,}")
    models = len(recipe.arms) * len(recipe.patterns) * len(recipe.solvers)
    parameters = dense.model.num_parameters()
    tokens = recipe.calibration.num_tokens + recipe.calibration.held_out_tokens
    hidden = dense.model.config.get_text_config(decoder=True).hidden_size
    size = dense.model.dtype.itemsize
    grams = sum(4 * d_in**2 for d_in in {d_in for _, d_in in shapes}) * 2 * 3
    traced = any(w.get("think") or w.get("answer") for w in map(region_weights, recipe.arms))
    return {
        "model": recipe.model,
        "parameters": parameters,
        "prunable_parameters": sum(a * b for a, b in shapes),
        "matrices": len(shapes),
        "zeros": counts,
        "cells": len(recipe.seeds) * models,
        "trace_tokens_per_seed": tokens if traced else recipe.calibration.held_out_tokens,
        "answers": recipe.evaluate.num_questions * recipe.evaluate.samples
        * len(recipe.seeds) * (1 + models),
        "memory_bytes": 2 * parameters * size + tokens * hidden * size + grams,
    }  # fmt: skip


def estimate(recipe: Recipe, dense: Dense, plan: dict[str, Any]) -> dict[str, float]:
    """Seconds a run will take, by stage, from short probes here: a batch of short replies, a forward pass and a
    solve with each solver. Assumes that replies are half as long as they may be; rambling takes up to twice as long."""
    questions = build_questions(recipe.traces.questions)
    size = recipe.resources.batch_size
    asked = list(islice(questions.questions("calibration", recipe.seeds[0]), size))
    prompts = [render(dense.tokenizer, questions.format, question) for question in asked]
    requests = [Request(question_id=str(i), sample=0, prompt_ids=ids, seed=i) for i, ids in enumerate(prompts)]
    sampling = Sampling(max_new_tokens=16)
    made = list(hf_engine(dense.model, dense.tokenizer, size).generate(requests, sampling))
    per_token = sum(completion.seconds for completion in made) / sum(len(completion.ids) for completion in made)
    batch = next(batches([plain_document(ids, "prompt") for ids in prompts], recipe.calibration.batch_tokens))
    clock = time.perf_counter()
    evaluate.reference_states(dense.model, [batch])
    forward = (time.perf_counter() - clock) / batch.tokens
    spec = plan_of(recipe, recipe.patterns[0])
    matrices = [matrix for block in pruner.prunable(dense.model, spec) for matrix in block]
    weight = sorted((matrix.weight for matrix in matrices), key=lambda w: w.numel())[len(matrices) // 2]
    gram = Gram(torch.eye(weight.shape[1], device=weight.device), 1e6, 10**6)
    clock = time.perf_counter()
    for solver in recipe.solvers:
        build_solver(solver).solve(LayerProblem(name="probe", weight=weight, gram=gram, pattern=spec.pattern))
    solve = (time.perf_counter() - clock) * len(matrices) / len(recipe.solvers)
    tokens = recipe.calibration.num_tokens + recipe.calibration.held_out_tokens
    length = (recipe.evaluate.sampling or recipe.traces.sampling).max_new_tokens / 2
    return {
        "trace": plan["trace_tokens_per_seed"] * len(recipe.seeds) * per_token,
        "prune": plan["cells"] * (3 * tokens * forward + solve),
        "evaluate": plan["answers"] * length * per_token,
    }


def hardware(device: str) -> dict[str, Any]:
    """The machine, as far as it matters for the figures."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    return {
        "device": name,
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }
