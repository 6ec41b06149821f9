"""The stages of a run, each a function from a recipe to files: trace, prune (with export), evaluate, all of them.

    out/traces/KEY/          a trace store of the dense model
    out/dense/KEY/           the dense model's answers
    out/surveys/KEY.json     what an allocator wanted to know of the dense model
    out/cells/NAME-KEY/      one pruned model: model/, answers/, prune.json; until it is done blocks/, to go on from;
                             for a narrower stream directions and lift, and until it is done projected/
    out/report.json|md|html

KEY is the hash of everything that can change what is in the folder, so a changed recipe never meets old results and a
repeated command goes on where it stopped.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import cache, cached_property, partial
from glob import escape
from hashlib import sha256
from importlib.metadata import version
from itertools import count, islice
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from secateurs import evaluate, pruner
from secateurs.allocators import Layer
from secateurs.artifacts import (
    atomic_write,
    canonical_hash,
    folder_hash,
    model_hash,
    read_json,
    tokenizer_hash,
    write_json,
)
from secateurs.calibration import (
    Batch,
    CalibrationSet,
    Document,
    batches,
    plain_document,
    region_weights,
    take,
    trace_document,
)
from secateurs.checkpoint import Checkpoint
from secateurs.collect import Opened, logits_of
from secateurs.cuts import Cut, Depth, FewerExperts, Hidden, Width
from secateurs.engines import Completion, Engine, Request, Sampling, default_sampling
from secateurs.engines.hf import hf_engine
from secateurs.engines.openai import OpenAI
from secateurs.experts import ExpertScore, Verdict, drop_experts, keeping
from secateurs.export import export, rename_probe
from secateurs.hub import HUB
from secateurs.layer import Gram, LayerProblem
from secateurs.models import Matrix, load_model, load_tokenizer, model_path
from secateurs.narrow import Narrowed, Narrowing, narrow
from secateurs.parallel import Progress, silent
from secateurs.patterns import Pattern, Unstructured
from secateurs.planner import Needs, Shelf, Where, choose, needs
from secateurs.policy import Surprise, check_own
from secateurs.prompts import answer_text, render, think_split, trace_seed, turns
from secateurs.questions import Question, QuestionSet
from secateurs.questions.tiny import Tiny
from secateurs.ranks import ALONE, Elsewhere, Ranks
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
from secateurs.report import TraceSummary
from secateurs.rows import read_rows
from secateurs.solvers.masking import Masking
from secateurs.survey import blocks_to_drop, loss_roots, survey
from secateurs.traces import Trace, TraceStore, apply_filters, merge_stores, read_provenance, read_traces
from secateurs.trim import ExpertTrimmer, Smaller, StreamTrimmer, Trimmer

T = TypeVar("T")
CHECKED_TRACES = 8  # of a server's, before it is believed
CORPUS_ROWS = 20_000
Asked = tuple[Question, int]  # and which sample of its answer


@dataclass
class Dense:
    """The model a recipe starts from, with what names it, and the processes that prune it together."""

    recipe: Recipe
    ranks: Ranks = ALONE

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.recipe.model, trust_remote_code=self.recipe.resources.trust_remote_code)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The model block by block: to prune, and to know all about it but its weights."""
        r = self.recipe.resources
        options: dict[str, Any] = {"trust_remote_code": r.trust_remote_code, "compute_dtype": r.compute_dtype}
        return Checkpoint(self.recipe.model, device=r.device, **options)

    @cached_property
    def model(self) -> Any:
        """The whole model, to sample from, in what a prune computes in; not read before something asks for it."""
        return self.load(self.recipe.model)

    def forget(self) -> None:
        """Let go of the whole model, if it was read; it is read again when something asks for it."""
        vars(self).pop("model", None)

    def together(self, work: "Callable[[Dense, Progress], T]", progress: Progress = silent) -> T:
        """What some work, that every process does now, returns here. It is sent to them: a function, or a `partial`."""
        return self.ranks.tell(work)(self, progress)

    def load(self, name: str) -> Any:
        """A whole model, this one or what became of it, to sample from on the same terms."""
        r = self.recipe.resources
        model: Any = load_model(name, device=r.device, trust_remote_code=r.trust_remote_code)
        return model.to(self.checkpoint.dtype)

    @cached_property
    def key(self) -> dict[str, str]:
        """Hashes of model and tokenizer."""
        folder = model_path(self.recipe.model)
        if not Path(folder).is_dir():  # a hub id: its weights are pinned by the commit transformers resolved
            return {"model": f"{self.recipe.model}@{self.checkpoint.folder.name}", "tokenizer": ""}
        return {"model": model_hash(folder), "tokenizer": tokenizer_hash(folder)}

    @property
    def computed(self) -> dict[str, str]:
        """For a key: what the model computes in, where that is not what it is stored as."""
        computed = self.checkpoint.dtype
        return {} if computed == self.checkpoint.stored else {"computed": str(computed)}

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
    """What the trace stage leaves, in request order, and how it went."""

    held_out: tuple[Trace, ...]
    """What judges every arm: the model's traces as they come, whatever the filters keep for calibration."""
    traces: tuple[Trace, ...]
    """What may calibrate."""
    summary: TraceSummary
    key: str
    surprise: Surprise | None = None
    """What the model made of the first ones, where servers sampled them."""


def _sampling(dense: Dense, overrides: SamplingOverrides) -> Sampling:
    return default_sampling(dense.checkpoint.model.generation_config, **overrides.model_dump())


def _provenance(
    dense: Dense, questions: QuestionSet, spec: Any, split: str, sampling: Sampling, seed: int, engine: Any = "hf"
) -> dict[str, Any]:
    return {
        **dense.key,
        **dense.computed,
        "questions": {"name": questions.name, "version": questions.version, "options": spec, "split": split},
        "format": asdict(questions.format),
        "sampling": asdict(sampling),
        "seed": seed,
        "engine": engine,
    }


def sample(
    store: TraceStore,
    asked: Iterable[Asked],
    engine: Callable[[], Engine],
    tokenizer: Any,
    questions: QuestionSet,
    sampling: Sampling,
    seed: int,
    at_once: int,
    enough: Callable[[], bool],
) -> None:
    """Answer what is asked in order and store every trace as it is finished, until `enough` or all is answered.

    What the store holds already is not asked again, and no engine is made if nothing is missing. Traces go to disk
    every quarter of a second, or `at_once` together.
    """
    by_id: dict[str, Question] = {}

    def requests() -> Iterator[Request]:
        for question, number in asked:
            if (question.id, number) not in store:
                by_id[question.id] = question
                yield request_for(question, number, tokenizer, questions, seed)

    if enough():
        return
    spent = 0.0
    waiting: list[Trace] = []
    clock = time.monotonic()
    try:
        for completion in engine().generate(requests(), sampling):
            waiting.append(trace_of(completion, tokenizer, questions, by_id[completion.request.question_id]))
            spent += completion.seconds
            if time.monotonic() - clock > 0.25 or len(waiting) >= at_once:
                store.append(waiting)
                waiting = []  # at once: what ends this next must not store them twice
                store.add_seconds(spent)
                spent, clock = 0.0, time.monotonic()
                if enough():
                    return
    finally:  # also where an engine gives up: what it has answered stays
        store.append(waiting)
        store.add_seconds(spent)
    enough()


def request_for(question: Question, number: int, tokenizer: Any, questions: QuestionSet, seed: int) -> Request:
    """What an engine is asked for one sample of an answer."""
    return Request(
        question_id=question.id,
        sample=number,
        prompt_ids=render(tokenizer, questions.format, question),
        seed=trace_seed(seed, question.id, number),
        turns=turns(questions.format, question),
    )


def trace_of(completion: Completion, tokenizer: Any, questions: QuestionSet, question: Question) -> Trace:
    """A completion with what is known of it: where its thinking ends, and whether its answer is right."""
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
    embeddings: Any = dense.checkpoint.model.get_input_embeddings()
    vocab_size = embeddings.num_embeddings
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

    def first_ones(store: TraceStore) -> tuple[list[Trace], bool]:
        return store.prefix(((question.id, number) for question, number in asked), budget)

    whole = out / "traces" / key
    if shards == 1 and table.name == "hf":
        share = partial(_share_of_traces, recipe, seed)
        ask_together(share, whole, provenance, lambda store: first_ones(store)[1], dense, progress)
    with TraceStore(whole, provenance) as store:
        engine = cache(partial(trace_engine, recipe, dense))
        tokens, ahead = 0, iter(asked)
        following = next(ahead, None)
        surprise = None

        def trust() -> None:
            nonlocal surprise
            if table.name != "hf" and surprise is None:
                first = list(islice(store, CHECKED_TRACES))
                logits = logits_of(dense.checkpoint.model, _whole(first), dense.checkpoint.opened)
                surprise = check_own((each[0] for each in logits), first, sampling)

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
            run, complete = first_ones(store)
            held = _held_out(run, recipe.calibration.held_out_tokens)
            kept, dropped = apply_filters(run[len(held) :], recipe.traces.filters)
            pool = [trace_document(t, recipe.calibration.first_tokens) for t in kept]
            missing = max((n - sum(d.count(w) for d in pool) for w, n in rest), default=0)
            if shards > 1 or missing <= 0 or not complete:
                break
            budget += max(missing, 1)
        if shards == 1:
            store.seal(run)
        seconds = store.seconds
    if rest and not kept and shards == 1:
        raise ValueError(
            f"no trace passed the filters: {dropped}; loosen traces.filters or look at the model's answers"
        )
    return Traced(tuple(held), tuple(kept), _trace_summary([*held, *kept], dropped, seconds), key, surprise)


Share = Callable[[Path, Dense, tuple[int, int], Progress], object]
"""Answers a share (which, of how many) into a store under a folder, called as the whole one is. Goes through pickle."""


def _share_of_traces(
    recipe: Recipe, seed: int, out: Path, dense: Dense, which: tuple[int, int], progress: Progress
) -> None:
    trace(recipe, out.parent, seed, dense, progress, which)


def _answer_share(share: Share, whole: Path, dense: Dense, progress: Progress) -> None:
    """This process's share of the requests, in a store of its own beside the `whole` one.

    Nothing where not all see the first one's files.
    """
    ranks = dense.ranks
    if not all(ranks.gather(whole.parent.is_dir())):
        return

    def answer_share() -> None:
        out = _parts(whole) / f"{ranks.index + 1}-of-{ranks.count}" / whole.parent.name
        with TraceStore(out / whole.name, read_provenance(whole)) as part:  # what is there is not asked
            part.append(one for one in read_traces(whole) if one.key not in part)
        share(out, dense, (ranks.index, ranks.count), progress)
        if not ranks.first:
            dense.forget()

    ranks.together(answer_share)


def ask_together(
    share: Share,
    whole: Path,
    provenance: Mapping[str, Any],
    complete: Callable[[TraceStore], bool],
    dense: Dense,
    progress: Progress,
) -> None:
    """Have all processes, if there are several, answer their shares of what the store `whole` is going to hold.

    Afterwards it holds what they have; what is still missing the caller asks, as if it had been stopped on the way.
    Shares of a run that was killed are kept, whatever number of processes it had. Nothing is asked of a store that is
    `complete`.
    """
    _gather_parts(whole)
    if dense.ranks.count > 1:
        with TraceStore(whole, provenance) as store:
            if complete(store):
                return
        dense.together(partial(_answer_share, share, whole), progress)
        _gather_parts(whole)


def _parts(whole: Path) -> Path:
    return whole.parent / f".{whole.name}.parts"


def _gather_parts(whole: Path) -> None:
    """Move what is in shares of a store to the store."""
    if found := [manifest.parent for manifest in sorted(_parts(whole).glob("*/*/*/manifest.json"))]:
        for part in found:
            with TraceStore(part, read_provenance(part)):
                pass  # which cuts off what a kill has torn
        merge_stores(whole, found)
    shutil.rmtree(_parts(whole), ignore_errors=True)


def _whole(traces: Sequence[Trace]) -> list[Batch]:
    """Each trace as a batch of its own, the last token included."""
    every = [torch.tensor([trace.prompt_ids + trace.completion_ids]) for trace in traces]
    return [Batch(ids, torch.ones_like(ids)) for ids in every]


def _trace_summary(kept: Sequence[Trace], dropped: dict[str, int], seconds: float) -> TraceSummary:
    by_region: dict[str, int] = {"prompt": 0, "think": 0, "answer": 0}
    count = max(len(kept), 1)  # a shard may have none
    for one in kept:
        for region, start, stop in one.regions:
            by_region[region] += stop - start
    return TraceSummary(
        traces=len(kept),
        tokens=sum(by_region.values()),
        by_region=by_region,
        pass_at_1=sum(t.reward or 0.0 for t in kept) / count,
        mean_think_tokens=sum(t.think_tokens for t in kept) / count,
        truncated=sum(t.finish == "length" for t in kept) / count,
        dropped=dropped,
        seconds=seconds,
    )


def _held_out(traces: Sequence[Trace], num_tokens: int) -> list[Trace]:
    """Whole traces from the front until there are `num_tokens`, and the other samples of the last one's question."""
    total, at = 0, 0
    while at < len(traces) and (total < num_tokens or (at and traces[at].question_id == traces[at - 1].question_id)):
        total += traces[at].tokens - 1
        at += 1
    return list(traces[:at])


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


def corpus_documents(recipe: Recipe, seed: int, dense: Dense) -> tuple[int, list[Document]]:
    """How many tokens an arm takes from the corpus, and the pieces it takes. ValueError if there are too few."""
    size, weights = recipe.calibration.corpus_tokens, region_weights(recipe.calibration.arm)
    tokenized = (dense.tokenizer(text)["input_ids"] for text in corpus_texts(recipe, seed))
    pieces = (
        plain_document(ids[start : start + size], "corpus") for ids in tokenized for start in range(0, len(ids), size)
    )
    alone = {region for region, weight in weights.items() if weight} == {"corpus"}
    share = recipe.calibration.num_tokens // (1 if alone else 2)
    return share, take(pieces, share, weights, "corpus")


def calibration_set(recipe: Recipe, seed: int, traced: Traced, dense: Dense) -> CalibrationSet:
    """The documents of the recipe's arm, all arms with the same token budget and the same held-out traces.

    Prompts come from the traces' own question stream, distinct and never a held-out one; a corpus comes in the pieces
    it is stored in. A mixture with a corpus gives it half of the budget.
    """
    weights = region_weights(recipe.calibration.arm)
    budget = recipe.calibration.num_tokens
    documents: list[Document] = []
    if weights.get("corpus"):
        share, documents = corpus_documents(recipe, seed, dense)
        budget -= share
    if weights.get("think") or weights.get("answer"):
        pool = (trace_document(t, recipe.calibration.first_tokens) for t in traced.traces)
        documents += take(pool, budget, weights, "traces")
    elif weights.get("prompt"):
        held_ids = {t.question_id for t in traced.held_out}
        questions = build_questions(recipe.traces.questions)
        fresh = (q for q in questions.questions("calibration", seed) if q.id not in held_ids)
        prompts = (plain_document(render(dense.tokenizer, questions.format, q), "prompt") for q in fresh)
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


def arm_label(arm: Arm) -> str:
    """An arm's name, or a mixture spelled out."""
    return arm if isinstance(arm, str) else "+".join(f"{weight:g}{region}" for region, weight in arm.items() if weight)


def _calibrated_on(recipe: Recipe, seed: int, traced: Traced, dense: Dense) -> dict[str, Any]:
    """For a key: the model, and every token that it is calibrated and judged on, and how exactly."""
    return {
        **dense.computed, "traces": traced.key,
        "filters": {"of calibration": recipe.traces.filters} if recipe.traces.filters else {},
        "calibration": recipe.calibration.model_dump(), "seed": seed, **dense.key, "corpus": dense.corpus_hash,
    }  # fmt: skip


def cell_folder(recipe: Recipe, out: Path, seed: int, traced: Traced, dense: Dense) -> Path:
    """Where a cell's model, blocks and answers are kept."""
    built = build_pattern(recipe.prune.pattern)
    key = canonical_hash(
        {
            **_calibrated_on(recipe, seed, traced, dense), "prune": recipe.prune.model_dump(),
            "resolved": [  # defaults may change
                repr(build_solver(recipe.prune.solver)), repr(build_allocator(recipe.prune.allocator)),
                *([repr(built)] if isinstance(built, Cut) else []),
            ],
        }
    )[:12]  # fmt: skip
    pattern = str(built).replace("%", "pct").replace(":", "of").replace(" ", "-")
    return out / "cells" / f"{arm_label(recipe.calibration.arm)}-{pattern}-s{seed}-{key}"


def solve_alike(
    recipes: Sequence[Recipe], out: Path, seed: int, traced: Traced, dense: Dense, progress: Progress = silent
) -> None:
    """Solve the blocks of several cells on the same Grams, where `prune` finds them.

    The recipes differ in pattern and solver only, and their layers see what they see in the dense model.
    """
    folders = {cell_folder(recipe, out, seed, traced, dense): recipe for recipe in recipes}
    missing = {folder: recipe for folder, recipe in folders.items() if not (folder / "prune.json").exists()}
    if len(missing) < 2:
        return
    calibration = calibration_set(recipes[0], seed, traced, dense)
    plans = {}
    for folder, recipe in missing.items():
        patterns = allocate(recipe, out, seed, traced, dense, calibration, progress)
        plans[folder / "blocks"] = replace(plan_of(recipe, dense), patterns=patterns)
    stage = f"prune {arm_label(recipes[0].calibration.arm)}, {len(missing)} models at once"
    where = _where(recipes[0], calibration, dense)
    batch_tokens = recipes[0].calibration.batch_tokens
    dense.together(partial(_solve, calibration, plans, batch_tokens, where, out, stage), progress)


def prune(
    recipe: Recipe,
    out: Path,
    seed: int,
    traced: Traced,
    dense: Dense,
    reference: Callable[[], evaluate.Reference],
    progress: Progress = silent,
) -> Pruned:
    """Prune one cell and export it; a finished cell is read back, an unfinished one goes on after its last block."""
    label, pattern_spec = arm_label(recipe.calibration.arm), recipe.prune.pattern
    folder = cell_folder(recipe, out, seed, traced, dense)
    record = folder / "prune.json"
    if record.exists() and (folder / "model" / "secateurs.json").exists():
        _forget_the_way(folder)  # if it was killed before it could
        rename_probe(folder / "model")
        data: dict[str, Any] = read_json(record)
        return Pruned(folder, **data)
    states = reference()
    clock = time.perf_counter()
    calibration = calibration_set(recipe, seed, traced, dense)
    seconds = {"calibrate": time.perf_counter() - clock}
    clock = time.perf_counter()
    pattern = build_pattern(pattern_spec)
    stage = f"prune {label} {pattern}"
    if isinstance(pattern, FewerExperts):
        done = _without_experts(pattern, recipe, folder, dense, calibration, stage, progress)
    elif isinstance(pattern, Hidden):
        done = _narrower(pattern, recipe, folder, dense, calibration, stage, progress)
    else:
        patterns = allocate(recipe, out, seed, traced, dense, calibration, progress)
        roots = _loss_roots(recipe, out, seed, traced, dense, calibration, progress)
        plan = replace(plan_of(recipe, dense), patterns=patterns, loss_roots=roots)
        where = _where(recipe, calibration, dense)
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
        "arm": label,
        "pattern": "unstructured" if pattern_spec["name"] == "unstructured" else str(pattern),
        "sparsity": pattern_spec.get("sparsity", sparsity),
        "solver": solver_label(recipe.prune.solver),
        "seed": seed,
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
        probe_ids=(calibration.held_out or calibration.documents)[0].ids[:64],
        smaller=done.smaller,
    )  # fmt: skip
    seconds["export"] = time.perf_counter() - clock
    data = {**facts, "layers": layers, "hidden_error": hidden, "seconds": seconds}
    write_json(record, data)
    _forget_the_way(folder)
    return Pruned(folder, **data)


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
    cut: FewerExperts,
    recipe: Recipe,
    folder: Path,
    dense: Dense,
    calibration: CalibrationSet,
    stage: str,
    progress: Progress,
) -> _Solved:
    """A cell whose blocks lose experts."""
    where = _where(recipe, calibration, dense)
    verdicts = dense.together(partial(_choose_experts, cut, recipe, folder, calibration, where, stage), progress)
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
    with Shelf(where, folder) as place:
        return drop_experts(
            dense.checkpoint.model, calibration, cut, score, folder / "experts.json", propagate=recipe.prune.propagate,
            batch_tokens=recipe.calibration.batch_tokens, place=place, opened=dense.checkpoint.opened,
            progress=lambda done, total, what: progress(stage, done, total, "blocks"), ranks=dense.ranks,
        )  # fmt: skip


def _narrower(
    cut: Hidden,
    recipe: Recipe,
    folder: Path,
    dense: Dense,
    calibration: CalibrationSet,
    stage: str,
    progress: Progress,
) -> _Solved:
    """A cell with a narrower residual stream."""
    where = _where(recipe, calibration, dense)
    found = dense.together(partial(_narrow, cut, recipe, folder, calibration, where, stage), progress)
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
    with Shelf(where, folder) as place:
        return narrow(
            dense.checkpoint, calibration, cut, how, folder, batch_tokens=recipe.calibration.batch_tokens, place=place,
            progress=lambda done, total, what: progress(stage, done, total, "blocks"), ranks=dense.ranks,
        )  # fmt: skip


def _solve(
    calibration: CalibrationSet,
    plans: Mapping[Path, pruner.Plan],
    batch_tokens: int,
    where: Where,
    shelf: Path,
    stage: str,
    dense: Dense,
    progress: Progress,
) -> list[pruner.LayerResult]:
    """This process's part in a prune: several `plans`, by the folder of their blocks, at once on the same Grams, or one
    of any kind. The first process writes the blocks; results of one plan are returned."""
    dense.forget()  # blocks are read one at a time
    with Shelf(where, shelf) as place:
        options: dict[str, Any] = {
            "opened": dense.checkpoint.opened, "place": place, "batch_tokens": batch_tokens,
            "progress": lambda done, total, what: progress(stage, done, total, "layers"), "ranks": dense.ranks,
            "stored": dense.checkpoint.stored,
        }  # fmt: skip
        if len(plans) > 1:
            pruner.solve_alike(dense.checkpoint.model, calibration, plans, **options)
            return []
        ((folder, plan),) = plans.items()
        options["folder"] = folder if dense.ranks.first else None
        return pruner.prune(dense.checkpoint.model, calibration, plan, **options)


def follow(dense: Dense) -> None:
    """What every process but the first does: its part of all work, until the first says that there is no more."""
    while True:
        try:
            work = dense.ranks.tell(None)
        except RuntimeError:  # the first process is gone, and has said why
            raise SystemExit(2) from None
        if work is None:
            return
        try:
            work(dense, silent)
        except Elsewhere:  # the first process raises it
            continue


def _where(recipe: Recipe, calibration: CalibrationSet, dense: Dense) -> Where:
    """Where hidden states are to be kept while a cell is pruned."""
    if (where := recipe.resources.hidden_states) != "auto":
        return where
    documents = (*calibration.documents, *calibration.held_out)
    padded = sum(batch.ids.numel() for batch in batches(documents, recipe.calibration.batch_tokens))
    wanted = memory_needs(recipe, dense, padded, sum(len(document.ids) for document in calibration.held_out))
    return choose(wanted, dense.checkpoint.device, dense.ranks.nearby)


def memory_needs(recipe: Recipe, dense: Dense, tokens: int, held_out_tokens: int) -> Needs:
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
        stored=dense.checkpoint.stored,
        in_file=() if isinstance(pattern, Hidden) else dense.checkpoint.in_file,
    )
    if not isinstance(pattern, Hidden):
        return alone
    return replace(alone, around=3 * alone.around, block=2 * alone.block, hidden=2 * alone.hidden)  # a second model


def plan_of(recipe: Recipe, dense: Dense) -> pruner.Plan:
    """What the recipe says to do to the model, before anything is known of it but its shapes."""
    pattern = build_pattern(recipe.prune.pattern)
    patterns = pattern.patterns(dense.checkpoint.model) if isinstance(pattern, Cut) else {}
    solver = build_solver(recipe.prune.solver)
    return pruner.Plan(
        pattern=next(iter(patterns.values())) if isinstance(pattern, Cut) else pattern,
        patterns=patterns,
        solver=Masking(score="magnitude") if isinstance(solver, (ExpertScore, Narrowing)) else solver,  # not used
        propagate=recipe.prune.propagate,
        goal=recipe.prune.goal,
        tune=build_tune(recipe.prune.tune),
        targets=tuple(patterns or recipe.prune.targets),
        ignore=tuple(recipe.prune.ignore),
    )


def allocate(
    recipe: Recipe,
    out: Path,
    seed: int,
    traced: Traced,
    dense: Dense,
    calibration: CalibrationSet,
    progress: Progress = silent,
) -> dict[str, Pattern]:
    """The pattern of every matrix under the allocator's plan, with as many zeros as the uniform one; none for uniform.

    What the allocator, or a cut of blocks, wants to know of the dense model is measured once and kept in out/surveys.
    """
    allocator, plan = build_allocator(recipe.prune.allocator), plan_of(recipe, dense)
    cut = build_pattern(recipe.prune.pattern)
    if isinstance(cut, Depth):
        return _without_blocks(cut, recipe, out, seed, traced, dense, calibration, progress)
    if not allocator.needs_survey:
        return dict(plan.patterns)
    label, sparsity = f"{arm_label(recipe.calibration.arm)} {plan.pattern}", recipe.prune.pattern["sparsity"]
    selected = pruner.prunable(dense.checkpoint.model, plan)
    key = canonical_hash(
        {
            **_calibrated_on(recipe, seed, traced, dense), "sparsity": sparsity, "curves": allocator.needs_curves,
            "matrices": [matrix.name for block in selected for matrix in block],
        }
    )[:12]  # fmt: skip
    record = out / "surveys" / f"{key}.json"
    if record.exists():
        rows: Any = read_json(record)
        layers = [Layer(**(row | {"curve": tuple(map(tuple, row["curve"]))})) for row in rows]
    else:
        batch_tokens, curves = recipe.calibration.batch_tokens, allocator.needs_curves
        work = partial(_survey, plan, calibration, sparsity, curves, batch_tokens, f"survey {label}")
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


def _find_roots(
    calibration: CalibrationSet, names: Sequence[str], stage: str, dense: Dense, progress: Progress
) -> dict[str, Tensor]:
    """This process's part in what errors cost the model."""
    return loss_roots(
        dense.model, calibration, names, ranks=dense.ranks,
        progress=lambda done, total, what: progress(stage, done, total, "batches"),
    )  # fmt: skip


def _without_blocks(
    cut: Depth,
    recipe: Recipe,
    out: Path,
    seed: int,
    traced: Traced,
    dense: Dense,
    calibration: CalibrationSet,
    progress: Progress,
) -> dict[str, Pattern]:
    """Which blocks go, which a survey of the dense model says, as the patterns of every block's matrices."""
    key = canonical_hash({**_calibrated_on(recipe, seed, traced, dense), "blocks": repr(cut)})[:12]
    record = out / "surveys" / f"{key}.json"
    if not record.exists():
        stage = f"survey {arm_label(recipe.calibration.arm)} {cut}"
        work = partial(_choose_blocks, calibration, cut, stage)  # angles need one pass: nothing to share
        dropped = work(dense, progress) if cut.score == "angle" else dense.together(work, progress)
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, {"dropped": dropped})
    found: Any = read_json(record)
    return {**cut.patterns(dense.checkpoint.model, found["dropped"])}


def _loss_roots(
    recipe: Recipe,
    out: Path,
    seed: int,
    traced: Traced,
    dense: Dense,
    calibration: CalibrationSet,
    progress: Progress,
) -> dict[str, Tensor]:
    """What errors of the matrices that a cut prunes cost the model, if the cut goes by that; kept in out/surveys."""
    cut = build_pattern(recipe.prune.pattern)
    if not isinstance(cut, Width) or cut.score != "loss":
        return {}
    names = list(cut.patterns(dense.checkpoint.model))
    key = canonical_hash({**_calibrated_on(recipe, seed, traced, dense), "loss roots": names})[:12]
    record = out / "surveys" / f"{key}.safetensors"
    if not record.exists():
        stage = f"survey {arm_label(recipe.calibration.arm)} {cut}"
        roots = dense.together(partial(_find_roots, calibration, names, stage), progress)
        record.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(record, save(roots))
    return load_file(record)


@dataclass(frozen=True)
class Answers:
    """A model's scored answers, with what paired comparison needs."""

    traces: tuple[Trace, ...]
    families: dict[str, str]
    question_set: str
    seconds: float
    max_new_tokens: int


def _share_of_answers(
    recipe: Recipe, model: Path | None, model_key: str, seed: int, stage: str,
    out: Path, dense: Dense, which: tuple[int, int], progress: Progress,
) -> None:  # fmt: skip
    answer(recipe, out, model, model_key, seed, dense, stage, progress, which)


def answer(
    recipe: Recipe,
    folder: Path,
    model: Path | None,
    model_key: str,
    seed: int,
    dense: Dense,
    stage: str,
    progress: Progress,
    shard: tuple[int, int] = (0, 1),
) -> Answers:
    """Ask the model in a folder, or the dense one, the recipe's evaluation questions; what is answered is not asked.

    `shard` (which, of how many) asks one of so many, and leaves the store unsealed.
    """
    spec = recipe.evaluate.questions or recipe.traces.questions
    questions = build_questions(spec)
    sampling = _sampling(dense, recipe.evaluate.sampling or recipe.traces.sampling)
    provenance = _provenance(dense, questions, spec, "eval", sampling, seed)
    provenance |= {"samples": recipe.evaluate.samples, "weights": model_key}
    wanted = list(islice(questions.questions("eval", seed), recipe.evaluate.num_questions))
    which, shards = shard
    asked = [(question, number) for question in wanted for number in range(recipe.evaluate.samples)][which::shards]
    whole = folder / canonical_hash(provenance)[:12]
    if shards == 1:
        share = partial(_share_of_answers, recipe, model, model_key, seed, stage)
        ask_together(share, whole, provenance, lambda store: all((q.id, n) in store for q, n in asked), dense, progress)
    with TraceStore(whole, provenance) as store:

        def enough() -> bool:
            progress(stage, sum((q.id, n) in store for q, n in asked), len(asked), "answers")
            return all((q.id, n) in store for q, n in asked)

        def engine() -> Engine:
            loaded = dense.load(str(model)) if model else dense.model
            return hf_engine(loaded, dense.tokenizer, recipe.resources.batch_size)

        sample(store, asked, engine, dense.tokenizer, questions, sampling, seed, recipe.resources.batch_size, enough)
        traces = [found for q, n in asked if (found := store.get(q.id, n))]
        if shards == 1:
            store.seal(traces)
        seconds = store.seconds
    families = {question.id: question.family for question in wanted}
    return Answers(tuple(traces), families, f"{questions.name} v{questions.version}", seconds, sampling.max_new_tokens)


def plan_check(recipe: Recipe, dense: Dense) -> dict[str, Any]:
    """What a run will do, without doing it: sizes, tokens, memory. ValueError for what cannot work."""
    counts: dict[str, Any] = {}
    for cell in recipe.grid:
        plan = plan_of(cell, dense)
        matrices = [matrix for block in pruner.prunable(dense.checkpoint.model, plan) for matrix in block]
        shapes = [tuple(matrix.weight.shape) for matrix in matrices]
        zeros = sum(plan.pattern_of(matrix).num_zeros(*matrix.weight.shape) for matrix in matrices)
        counts[str(build_pattern(cell.prune.pattern))] = zeros
    for cell in {arm_label(cell.calibration.arm): cell for cell in recipe.grid}.values():
        if region_weights(cell.calibration.arm).get("corpus"):
            corpus_documents(cell, recipe.seeds[0], dense)  # says what is wrong with it before anything is sampled
    questions = build_questions(recipe.evaluate.questions or recipe.traces.questions)
    found = sum(1 for _ in islice(questions.questions("eval", recipe.seeds[0]), recipe.evaluate.num_questions))
    if found < recipe.evaluate.num_questions:
        raise ValueError(f"evaluate.num_questions is {recipe.evaluate.num_questions:,}, the set has {found:,}")
    models = len(recipe.grid)
    model = dense.checkpoint.model
    parameters = model.num_parameters()
    held_out = recipe.calibration.held_out_tokens
    tokens = recipe.calibration.num_tokens + held_out
    wanted = max((memory_needs(cell, dense, tokens, held_out) for cell in recipe.grid), key=lambda one: one.on_device)
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
        "computes_in": str(dense.checkpoint.dtype).removeprefix("torch."),
        "memory_bytes": asdict(wanted) | {"on_device": wanted.on_device},
        "hidden_states": choose(wanted, dense.checkpoint.device, dense.ranks.nearby),
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
    evaluate.reference_states(dense.checkpoint.model, [batch], dense.checkpoint.opened)
    forward = (time.perf_counter() - clock) / batch.tokens
    plan_ = plan_of(recipe.grid[0], dense)
    matrices = [matrix for block in pruner.prunable(dense.model, plan_) for matrix in block]
    median = sorted(matrices, key=lambda matrix: matrix.weight.numel())[len(matrices) // 2]
    weight, pattern = median.weight, plan_.pattern_of(median)
    gram = Gram(torch.eye(weight.shape[1], device=weight.device), 1e6, 10**6)
    clock = time.perf_counter()
    for solver in map(build_solver, recipe.solvers):
        if not isinstance(solver, (ExpertScore, Narrowing)):
            solver.solve(LayerProblem(name="probe", weight=weight, gram=gram, pattern=pattern))
    solve = (time.perf_counter() - clock) * len(matrices) / len(recipe.solvers)
    tokens = recipe.calibration.num_tokens + recipe.calibration.held_out_tokens
    length = (recipe.evaluate.sampling or recipe.traces.sampling).max_new_tokens / 2
    return {
        "trace": plan["trace_tokens_per_seed"] * len(recipe.seeds) * per_token,
        "prune": plan["cells"] * (3 * tokens * forward + solve),
        "evaluate": plan["answers"] * length * per_token,
    }
