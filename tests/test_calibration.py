"""What of a trace calibrates, and what judges."""

from pathlib import Path
from typing import Any

from secateurs import ask, cell
from secateurs.calibration import CODES, trace_document
from secateurs.dense import Dense
from secateurs.engines import Completion, Sampling
from secateurs.recipe import build_questions, load_recipe
from secateurs.report import TraceSummary
from secateurs.traces import Trace, TraceStore


def trace(number: int, length: int = 40) -> Trace:
    ids = tuple(range(10, 10 + length))
    return Trace(question_id=f"q{number}", sample=0, prompt_ids=(1, 2, 3), completion_ids=ids,
                 think_tokens=length - 5, think_closed=True, finish="eos", reward=1.0, seed=0)  # fmt: skip


def test_a_document_ends_where_the_model_stopped_looking_or_earlier():
    whole = trace_document(trace(0))
    assert whole.ids == (1, 2, 3, *range(10, 49)) and len(whole.codes) == 42
    assert [whole.codes.count(CODES[region]) for region in ("prompt", "think", "answer")] == [3, 35, 4]
    start = trace_document(trace(0), first_tokens=8)
    assert start.ids == whole.ids[:11] and start.codes == whole.codes[:11]
    assert trace_document(trace(0), first_tokens=40) == trace_document(trace(0), first_tokens=1000) == whole


def test_the_first_tokens_calibrate_and_whole_traces_judge(tmp_path):
    sets = ["calibration.first_tokens=8", "calibration.num_tokens=50", "calibration.held_out_tokens=50"]
    recipe = load_recipe("demo", ["calibration.arm=rac", *sets])
    summary = TraceSummary(traces=9, tokens=0, by_region={}, pass_at_1=None, mean_think_tokens=0.0, truncated=0.0,
                           dropped={}, seconds=0.0)  # fmt: skip
    traces = tuple(map(trace, range(9)))
    traced = ask.Traced(traces[:2], traces[2:], summary, "")
    found = cell.calibration_set(cell.Case(recipe, tmp_path, 0, traced, Dense(recipe)))
    assert [len(d.ids) for d in found.held_out] == [42, 42] and [len(d.ids) for d in found.documents] == [11] * 5


def test_fewer_tokens_a_batch_go_on_with_a_cell_and_with_a_fine_tune_begin_another(tmp_path):
    summary: Any = None

    def folder(*sets: str) -> Path:
        recipe = load_recipe("demo", list(sets))
        return cell.Case(recipe, tmp_path, 0, ask.Traced((), (), summary, ""), Dense(recipe)).folder

    fewer, tuned = "calibration.batch_tokens=512", "prune.tune={steps=9}"
    assert folder() == folder(fewer) != folder("calibration.num_tokens=512")
    experts = ("sweep.sparsity=[]", "prune.pattern={name='experts', sparsity=0.5}", "prune.solver={name='output'}")
    for by_batch in ((tuned,), experts):
        assert folder(*by_batch) != folder(fewer, *by_batch)


def test_what_is_in_a_question_file_is_in_the_key_and_its_name_is_not(tmp_path):
    specs = []
    for folder, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "q.txt").write_text(text)
        specs.append(ask.keyed({"name": "prompts", "path": str(tmp_path / folder / "q.txt")}))
    assert specs[0] == specs[1] != specs[2] and specs[0]["name"] == "prompts"
    assert ask.keyed({"name": "gpqa", "path": "hub:a/b"}) == {"name": "gpqa", "path": "hub:a/b"}


class Slow:
    """An engine that answers the first request last."""

    def __init__(self):
        self.drawn = 0

    def generate(self, requests, sampling):
        waiting = []
        for request in requests:
            self.drawn += 1
            waiting.append(request)
            if len(waiting) == 3:
                yield Completion(request=waiting.pop(), ids=(5,) * 20, finish="length", seconds=0.0)
        for request in reversed(waiting):
            yield Completion(request=request, ids=(5,) * 20, finish="length", seconds=0.0)


def test_no_more_is_asked_than_should_fill_the_budget(tmp_path):
    """However late the first request is; and what nobody can judge is stored as that."""
    (tmp_path / "mine.txt").write_text("\n\n".join(f"compute {n} plus 1" for n in range(300)))
    path = {"name": "prompts", "path": str(tmp_path / "mine.txt")}
    recipe = load_recipe("demo", ["traces.sampling.max_new_tokens=40"])
    dense, questions, engine = Dense(recipe), build_questions(path), Slow()
    asked = [(question, 0) for question in questions.questions("calibration", 0)]
    with TraceStore(tmp_path / "store", {}) as store:

        def enough():
            return store.prefix([(question.id, 0) for question, _ in asked], 1000)[1]

        sampling = Sampling(max_new_tokens=40)
        ask.sample(store, asked, lambda: engine, dense.tokenizer, questions, sampling, 0, 10, enough, 1000)
        assert enough() and len(store) == engine.drawn < 1.3 * 1000 / (20 + 20)
        assert all(found.reward is None for found in store)


def test_filters_choose_what_calibrates_and_not_what_judges(tmp_path):
    """And no sample of a question that judges calibrates."""
    sets = ["calibration.num_tokens=900", "calibration.held_out_tokens=900", "traces.samples=2", "sweep.arm=['rac']"]
    sets += ["traces.sampling.max_new_tokens=160"]
    plain = load_recipe("demo", sets)
    picky = load_recipe("demo", [*sets, "traces.filters={finished=true, max_tokens=150}"])
    dense = Dense(plain)
    whole, chosen = ask.trace(plain, tmp_path, 0, dense), ask.trace(picky, tmp_path, 0, dense)
    assert whole.held_out == chosen.held_out and any(t.finish == "length" for t in whole.held_out)
    assert all(t.finish == "eos" for t in chosen.traces) and any(t.finish == "length" for t in whole.traces)
    assert not {t.question_id for t in whole.held_out} & {t.question_id for t in (*whole.traces, *chosen.traces)}
    assert sum(len(trace_document(t).ids) for t in chosen.traces) >= 900
