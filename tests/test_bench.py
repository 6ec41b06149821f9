"""Figures of a bench, exactly, by a clock that only moves where a model or an engine says so; and what is refused."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from families import make_model
from processes import fork_workers
from secateurs import bench as room
from secateurs.artifacts import write_json
from secateurs.bench import Quality, Row, Speed, _Bench, bench, load_any, path_and_type, short, table
from secateurs.engines import Completion
from secateurs.models import BUNDLED, load_tokenizer, model_path
from secateurs.packed import PackedMatrix
from secateurs.questions.tiny import Tiny
from secateurs.recipe import load_recipe
from secateurs.runtime import PackedEmbedding, PackedLinear
from test_cli import call


class Clock:
    """In the place of the module `time` in `bench`."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(room, "time", SimpleNamespace(perf_counter=lambda: self.now))


class Stub:
    """A model whose calls take the seconds that they are given, one after the other, and keep the ids they get."""

    def __init__(self, clock, seconds):
        self.config, self.clock, self.seconds, self.got = make_model("llama").config, clock, list(seconds), []

    def modules(self):
        return []

    def get_input_embeddings(self):
        return None

    def __call__(self, input_ids, past_key_values, use_cache, logits_to_keep):
        self.got.append(input_ids)
        self.clock.now += self.seconds.pop(0)
        return SimpleNamespace(logits=torch.eye(64)[None, : len(input_ids)].transpose(0, 1))


def test_a_turn_reads_the_whole_context_of_each_row_and_times_what_comes_after_the_first_step(monkeypatch):
    clock = Clock(monkeypatch)
    one = _Bench("a", "cpu")
    one.model = Stub(clock, [3.0, 100.0, 0.25, 0.5, 0.75, 0.5])
    assert one.decode(2, 40, 4) == (3.0, 0.5)
    first, *steps = one.model.got
    assert first.shape == (2, 40) and len(first.unique()) > 20 and not torch.equal(*first)
    assert [step.tolist() for step in steps] == [[[0], [1]]] * 5, "the likeliest token of each row, fed back"


def test_a_round_counts_by_its_median_and_all_rows_count():
    assert room._speed(4, 64, [(1.0, 0.5), (3.0, 0.25), (2.0, 0.125)]) == Speed(4, 64, 2.0, 16.0, 4.0)


def test_answers_are_right_or_not_and_take_the_seconds_of_sampling(monkeypatch):
    clock = Clock(monkeypatch)
    recipe = load_recipe("demo", ["evaluate.num_questions=3", "seed=5"])
    tokenizer, tiny = load_tokenizer(BUNDLED), Tiny()

    class Engine:
        def __init__(self, *made):
            assert made[1:] == (one.tokenizer, recipe.resources.batch_size)

        def generate(self, requests, sampling):
            assert sampling.max_new_tokens == recipe.traces.sampling.max_new_tokens
            for number, request in enumerate(requests):
                clock.now += 2.5
                text = tiny.solution(one.asked[request]) if number else "nothing"
                ids = (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)
                yield Completion(request=request, ids=ids[-number * 30 - 1 :], finish="eos", seconds=0.0)

    one = _Bench(BUNDLED, "cpu")
    one.load(recipe)
    monkeypatch.setattr(room, "hf_engine", Engine)
    found = one.answer(recipe)
    wanted = [question.id for _, question in zip(range(3), tiny.questions("eval", 5), strict=False)]
    assert found.right == dict(zip(wanted, [0.0, 1.0, 1.0], strict=True)) and found.times == [7.5]
    assert list(found.lengths.values()) == [1, 31, 61] and found.correct == 2 and found.seconds_per_correct == 3.75


def test_weights_count_once_where_they_are_tied(monkeypatch):
    table, other = torch.zeros(8, 4, dtype=torch.bfloat16), torch.zeros(2, 4, dtype=torch.bfloat16)
    layers = [PackedLinear(PackedMatrix(len(one), 4, {"weight": one}), None) for one in (table, other)]
    tied = torch.nn.ModuleList([PackedEmbedding(table, 1.0, torch.float32), *layers, torch.nn.Linear(2, 3)])
    monkeypatch.setattr(room, "load_any", lambda name, device: (tied, "float32"))
    assert _Bench("a", "cpu").load()["weight_bytes"] == 2 * (8 * 4 + 2 * 4) + 4 * (2 * 3 + 3)


@pytest.mark.parametrize(("system", "unit"), [("Linux", 1024), ("Darwin", 1)])
def test_memory_is_the_most_of_a_process_over_what_it_had_before_the_model(system, unit, monkeypatch):
    usage = SimpleNamespace(ru_maxrss=100)
    monkeypatch.setattr(room.resource, "getrusage", lambda who: usage)
    monkeypatch.setattr(room.platform, "system", lambda: system)
    one = _Bench("a", "cpu")
    assert one.peak() == 0
    usage.ru_maxrss = 350
    assert one.peak() == 250 * unit


def test_ratios_are_to_the_first_model_and_above_one_is_faster():
    speeds = {"a": (8.0, 30.0), "b": (16.0, 15.0), "c": (2.0, 60.0)}
    shapes = [(1, 8), (4, 8)]
    rows = [
        Row(name, "float32", 1, speeds=[Speed(*shape, 1.0, at, 1.0) for shape, at in zip(shapes, pair, strict=True)])
        for name, pair in speeds.items()
    ]
    ratios = [[speed["times_first"] for speed in row["speeds"]] for row in table(rows)]
    assert ratios == [[1.0, 1.0], [2.0, 0.5], [0.25, 2.0]]


def test_a_right_answer_costs_all_seconds_and_a_question_its_share_of_tokens():
    first = Quality({"x": 1.0, "y": 1.0, "z": 0.0, "w": 0.0}, dict.fromkeys("xyzw", 10), [9.0, 8.0, 7.0])
    mine = Quality({"x": 1.0, "y": 1.0, "z": 1.0, "w": 0.0}, {"x": 1, "y": 2, "z": 3, "w": 4}, [3.0, 1.0, 20.0])
    rows = [Row("a", "", 1, quality=first), Row("b", "", 1, quality=mine)]
    base, found = (row["quality"] for row in table(rows))
    assert mine.costs() == {"x": (0.3, 1.0), "y": (0.6, 1.0), "z": (pytest.approx(0.9), 1.0), "w": (1.2, 0.0)}
    assert (base["seconds_per_correct"], base["of_first"], base["tokens"]) == (4.0, 1.0, 40)
    assert (found["seconds_per_correct"], found["of_first"], found["tokens"]) == (1.0, 0.25, 10)
    assert (found["seconds"], found["spread"], found["correct"], found["points"]) == (3.0, 20.0, 3, 0.25)


class Told:
    """A model's process, in this one: it takes the seconds that it is given, and notes what it is asked."""

    def __init__(self, name, seconds, said):
        self.name, self.seconds, self.said = name, seconds, said
        self.rounds = self.bytes = 0

    def send(self, what):
        self.what = what

    def recv(self):
        what, *args = self.what
        if what != "peak":
            self.said.append((self.name, what, *args[:2]))
        return "done", getattr(self, what)(*args)

    def load(self, recipe):
        return {"computes": "float32", "weight_bytes": 7, "load_seconds": 0.5}

    def decode(self, batch, context, new_tokens):
        self.rounds += 1
        seconds = self.seconds[(self.rounds - 1) // 2] * batch
        return 10 * seconds, seconds

    def answer(self, recipe):
        self.rounds += 1
        return Quality({"x": float(self.name == "b" or self.rounds == 7)}, {"x": 3}, [float(self.rounds)])

    def peak(self):
        self.bytes += 1
        return self.bytes


def test_turns_go_round_and_medians_are_what_counts(monkeypatch):
    recipe, said, kept, done = load_recipe("demo"), [], [], []
    seconds = {"a": [2.0, 8.0, 4.0], "b": [1.0, 1.0, 2.0]}
    monkeypatch.setattr(room, "start", lambda stack, serve, name, *_: (Told(name, seconds[name], said), None))
    first, second = bench(
        ["a", "b"], batches=(1, 2), contexts=(16,), rounds=3, recipe=recipe, asked=3,
        keep=lambda rows: kept.append(table(rows)), progress=lambda *now: done.append(now),
    )  # fmt: skip
    turn = [(name, "decode", batch, 16) for batch in (1, 2) for name in "ab"]
    asked = [(name, "answer", recipe) for name in "ab"]
    assert said == [("a", "load", recipe), ("b", "load", recipe), *turn * 3, *asked * 3]
    assert first.speeds == [Speed(1, 16, 40.0, 0.25, 4.0), Speed(2, 16, 80.0, 0.25, 4.0)]
    assert second.speeds == [Speed(1, 16, 10.0, 1.0, 2.0), Speed(2, 16, 20.0, 1.0, 2.0)]
    assert first.quality == Quality({"x": 1.0}, {"x": 3}, [7.0, 8.0, 9.0]), "right as at first, all of the times"
    assert (first.peak_bytes, first.weight_bytes, first.load_seconds) == (6, 7, 0.5)
    assert [len(row["speeds"]) for rows in kept for row in rows] == [2] * 12
    assert [row["speeds"][0]["tokens_per_second"] for rows in kept[:3] for row in rows] == [0.5, 1, 0.2, 1, 0.25, 1]
    assert done[0] == (1, 32, "a") and done[-1] == (32, 32, "b")


def test_what_a_recipe_asks_is_made_ready_before_anything_is_timed(tmp_path, monkeypatch, capsys):
    fork_workers(monkeypatch)
    monkeypatch.setattr(_Bench, "decode", lambda *turn: 1 / 0)
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "What is 1 + 1?", "answer": "2"}\n')
    bare = shutil.copytree(model_path(BUNDLED), tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):  # without both transformers makes one up
        (bare / name).unlink()

    def said(*sets: str, models=("bundled",)) -> str:
        words = ["bench", *models, "--recipe", "demo", *(word for one in sets for word in ("--set", one))]
        assert call(monkeypatch, *words) == 2
        return " ".join(capsys.readouterr().err.split())

    questions = f"evaluate.questions={{name='jsonl', path='', eval_path='{file}'}}"
    assert "evaluate.num_questions is 50, the set has 1" in said("evaluate.num_questions=50", questions)
    file.write_text("")
    assert "evaluate.num_questions is 50, the set has 0" in said("evaluate.num_questions=50", questions)
    file.write_text('{"question": "What?", "answer": "nothing"}\n')
    assert "questions.jsonl:1: no number in `answer`" in said("evaluate.num_questions=1", questions)
    assert f"the tokenizer of `{bare}` cannot be loaded" in said(models=("bundled", str(bare)))
    assert "evaluate.samples is 4, but a bench asks for one answer a question" in said("evaluate.samples=4")


def test_what_was_measured_before_an_error_is_shown(monkeypatch, capsys):
    def stopped(models, keep, **_):
        keep([Row(name, "float32", 1, speeds=[Speed(1, 8, 0.1, 5.0, 1.0)]) for name in models])
        raise RuntimeError("the process of b ended")

    monkeypatch.setattr(room, "bench", stopped)
    assert call(monkeypatch, "bench", "a", "b", "--json") == 2
    said = capsys.readouterr()
    assert [row["model"] for row in json.loads(said.out)["rows"]] == ["a", "b"] and "b ended" in said.err
    assert call(monkeypatch, "bench", "a", "b") == 2
    assert "5.0" in capsys.readouterr().out


def test_a_folder_may_have_a_sign_of_its_own_in_its_name(tmp_path, monkeypatch):
    make_model("llama").save_pretrained(tmp_path / "a@b")
    monkeypatch.chdir(tmp_path)
    assert load_any("a@b")[1] == "float32" and load_any("a@b@bfloat16")[1] == "bfloat16"
    assert path_and_type("owner/name@float16") == ("owner/name", "float16") and path_and_type("name") == ("name", "")
    assert [short(name) for name in ("a@b", "a@b@float32", "x/model@float32")] == ["a@b", "a@b@float32", "x@float32"]
    with pytest.raises(ValueError, match="a@b/ is named twice"):
        bench(["a@b", "a@b/"])


def test_a_model_for_engines_is_no_model_to_time(tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", config | {"quantization_config": {"quant_method": "compressed-tensors"}})
    with pytest.raises(ValueError, match=r"is quantised \(compressed-tensors\), and secateurs reads dense weights"):
        load_any(str(tmp_path))
