"""The stages that ask a model questions: its own chains of thought to calibrate on, and answers that are scored.

    out/traces/KEY/          a trace store of the dense model
    out/dense/KEY/           the dense model's answers; a pruned one's are in its cell

KEY is the hash of everything that can change what is in the folder, so a changed recipe never meets old results and a
repeated command goes on where it stopped.
"""

import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch

from secateurs.artifacts import canonical_hash, file_hash
from secateurs.calibration import Batch, region_weights, trace_document
from secateurs.checkpoint import Checkpoint
from secateurs.collect import logits_of
from secateurs.dense import Dense
from secateurs.engines import Completion, Engine, Request, Sampling, default_sampling
from secateurs.engines.hf import hf_engine
from secateurs.engines.openai import OpenAI
from secateurs.parallel import Progress, silent
from secateurs.policy import Surprise, check_own
from secateurs.prompts import answer_text, render, think_split, trace_seed, turns
from secateurs.questions import Question, QuestionSet
from secateurs.recipe import Recipe, build_questions
from secateurs.recipe import Sampling as SamplingOverrides
from secateurs.report import TraceSummary
from secateurs.traces import Trace, TraceStore, apply_filters, merge_stores, read_provenance, read_traces

FILES = ("path", "eval_path")  # options of question sets that name one
CHECKED_TRACES = 8  # of a server's, before it is believed
NONE_OF, NONE_IN = 100, 8  # filters that pass none of so many traces, and so many times what calibrates, pass none
Asked = tuple[Question, int]  # and which sample of its answer


@dataclass(frozen=True)
class Traced:
    """What the trace stage leaves, in request order, and how it went."""

    held_out: tuple[Trace, ...]
    """What judges every arm: the model's traces as they come, whatever the filters keep for calibration."""
    traces: tuple[Trace, ...]
    """What may calibrate."""
    summary: TraceSummary
    key: str
    surprises: Mapping[str, Surprise] = field(default_factory=dict)
    """What the model made of the first ones of each server that was asked now."""


def _sampling(dense: Dense, overrides: SamplingOverrides) -> Sampling:
    return default_sampling(dense.checkpoint.model.generation_config, **overrides.model_dump())


def _provenance(
    dense: Dense, questions: QuestionSet, spec: Any, split: str, sampling: Sampling, seed: int, engine: Any = "hf"
) -> dict[str, Any]:
    return {
        **dense.key,
        **(dense.computed if engine == "hf" else {}),  # servers compute in what they like
        "questions": {"name": questions.name, "version": questions.version, "options": keyed(spec), "split": split},
        "format": asdict(questions.format),
        "sampling": asdict(sampling),
        "seed": seed,
        "engine": engine,
    }


def keyed(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What a table says of questions, with what is in its files instead of their names, as that may change.

    A data set of the hub goes by its name, so pin a revision.
    """
    return {
        option: {"content": file_hash(value)} if option in FILES and Path(value).is_file() else value
        for option, value in spec.items()
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
    tokens: float = math.inf,
) -> None:
    """Answer what is asked in order and store every trace as it is finished, until `enough` or all is answered.

    What the store holds already is not asked again, and no engine is made if nothing is missing. Nothing more is asked
    while what is on its way should come to `tokens`, from the start of what is asked, if it gets as long as what has
    come back. Traces go to disk with the first that is finished a quarter of a second later, or `at_once` together.
    """
    flying: dict[tuple[str, int], tuple[Question, int]] = {}  # the question, and the length of the prompt
    known = asked_for = done = written = 0

    def enough_flies() -> bool:
        mean = written / done if done else sampling.max_new_tokens / 4
        least = len(flying) - math.sqrt(len(flying))  # of so many, as lengths vary
        return known + sum(prompt for _, prompt in flying.values()) + least * mean >= tokens

    def requests() -> Iterator[Request]:
        nonlocal known, asked_for
        for question, number in asked:
            if enough_flies():
                return
            if found := store.get(question.id, number):
                known += found.tokens
                continue
            request = request_for(question, number, tokenizer, questions, seed)
            flying[question.id, number] = question, len(request.prompt_ids)
            asked_for += 1
            yield request

    while not enough():
        known = asked_for = 0
        flying.clear()
        spent = 0.0
        waiting: list[Trace] = []
        clock = time.monotonic()
        try:
            for completion in engine().generate(requests(), sampling):
                question, _ = flying.pop((completion.request.question_id, completion.request.sample))
                trace = trace_of(completion, tokenizer, questions, question)
                known, done, written = known + trace.tokens, done + 1, written + len(trace.completion_ids)
                waiting.append(trace)
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
        if not asked_for:
            return


def evaluation_questions(recipe: Recipe, seed: int) -> tuple[QuestionSet, list[Question]]:
    """The set that evaluates, and what of it is asked. ValueError where it has fewer than the recipe asks for."""
    questions, wanted = build_questions(recipe.evaluate.questions or recipe.traces.questions), recipe.evaluate
    found = list(islice(questions.questions("eval", seed), wanted.num_questions))
    if len(found) < wanted.num_questions:
        raise ValueError(f"evaluate.num_questions is {wanted.num_questions:,}, the set has {len(found):,}")
    return questions, found


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
    think, closed = think_split(tokenizer, request.prompt_ids, completion.ids, questions.format.prefill)
    right = questions.check(question, answer_text(tokenizer, completion.ids, think, closed))
    return Trace(
        question_id=request.question_id,
        sample=request.sample,
        prompt_ids=request.prompt_ids,
        completion_ids=completion.ids,
        think_tokens=think,
        think_closed=closed,
        finish=completion.finish,
        reward=None if right is None else float(right),
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


@dataclass(frozen=True)
class _Believed:
    """An engine of servers, of each of which nothing goes on before its first CHECKED_TRACES are the model's own."""

    engine: Engine
    checkpoint: Checkpoint
    surprises: dict[str, Surprise]
    """Of the servers that are believed."""

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        held: dict[str, list[Completion]] = {}
        failure = None

        def believed(source: str) -> list[Completion]:
            said = held.pop(source)
            if source not in self.surprises:
                every = [torch.tensor([one.request.prompt_ids + one.ids]) for one in said]
                batches = [Batch(ids, torch.ones_like(ids)) for ids in every]
                logits = logits_of(self.checkpoint.model, batches, self.checkpoint.opened)
                self.surprises[source] = check_own(logits, said, sampling, source)
            return said

        try:
            for completion in self.engine.generate(requests, sampling):
                source = completion.source
                held.setdefault(source, []).append(completion)
                if source in self.surprises or len(held[source]) == CHECKED_TRACES:
                    yield from believed(source)
        except ValueError as error:  # after which what others have said stays
            failure = error
        for source in list(held):
            yield from believed(source)
        if failure:
            raise failure


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
    wanted = budget = -(-(recipe.calibration.held_out_tokens + max((n for _, n in rest), default=0)) // shards)

    def first_ones(store: TraceStore) -> tuple[list[Trace], bool]:
        return store.prefix(((question.id, number) for question, number in asked), budget)

    whole = out / "traces" / key
    if shards == 1 and table.name == "hf":
        share = partial(_share_of_traces, recipe, seed)
        ask_together(share, whole, provenance, lambda store: first_ones(store)[1], dense, progress)
    with TraceStore(whole, provenance) as store:
        surprises: dict[str, Surprise] = {}
        tokens, ahead = 0, iter(asked)
        following = next(ahead, None)

        @cache
        def engine() -> Engine:
            made = trace_engine(recipe, dense)
            return made if table.name == "hf" else _Believed(made, dense.checkpoint, surprises)

        def enough() -> bool:
            nonlocal tokens, following
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
                budget,
            )
            run, complete = first_ones(store)
            held = _held_out(run, recipe.calibration.held_out_tokens)
            kept, dropped = apply_filters(run[len(held) :], recipe.traces.filters)
            pool = [trace_document(t, recipe.calibration.first_tokens) for t in kept]
            found = [sum(d.count(w) for d in pool) for w, _ in rest]
            missing, of = max(((n - have, have) for (_, n), have in zip(rest, found, strict=True)), default=(0, 0))
            hopeless = not kept and len(run) >= NONE_OF and budget >= NONE_IN * wanted
            if shards > 1 or missing <= 0 or not complete or hopeless:
                break
            share = of / max(sum(t.tokens for t in run[len(held) :]), 1)  # that passes the filters
            budget += math.ceil(missing * min(1 / max(share, 1e-9), 4))
        if shards == 1:
            store.seal(run)
        seconds = store.seconds
    if rest and not kept and shards == 1:
        raise ValueError(
            f"no trace passed the filters: {dropped}; loosen traces.filters or look at the model's answers"
        )
    summary = _trace_summary([*held, *kept], dropped, table.ids, seconds)
    return Traced(tuple(held), tuple(kept), summary, key, surprises)


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


def _trace_summary(kept: Sequence[Trace], dropped: dict[str, int], ids: str, seconds: float) -> TraceSummary:
    by_region: dict[str, int] = {"prompt": 0, "think": 0, "answer": 0}
    count = max(len(kept), 1)  # a shard may have none
    for one in kept:
        for region, start, stop in one.regions:
            by_region[region] += stop - start
    return TraceSummary(
        traces=len(kept),
        tokens=sum(by_region.values()),
        by_region=by_region,
        pass_at_1=None if any(t.reward is None for t in kept) else sum(t.reward or 0.0 for t in kept) / count,
        mean_think_tokens=sum(t.think_tokens for t in kept) / count,
        truncated=sum(t.finish == "length" for t in kept) / count,
        dropped=dropped,
        ids=ids,
        seconds=seconds,
    )


def _held_out(traces: Sequence[Trace], num_tokens: int) -> list[Trace]:
    """Whole traces from the front until there are `num_tokens`, and the other samples of the last one's question."""
    total, at = 0, 0
    while at < len(traces) and (total < num_tokens or (at and traces[at].question_id == traces[at - 1].question_id)):
        total += traces[at].tokens - 1
        at += 1
    return list(traces[:at])


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
    questions, wanted = evaluation_questions(recipe, seed)
    sampling = _sampling(dense, recipe.evaluate.sampling or recipe.traces.sampling)
    provenance = _provenance(dense, questions, spec, "eval", sampling, seed)
    provenance |= {"samples": recipe.evaluate.samples, "weights": model_key}
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
