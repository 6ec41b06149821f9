"""Servers over HTTP: every right answer once, whatever goes wrong on the way; nothing wrong ever."""

import json
import random
import time
import tracemalloc
from collections import Counter
from dataclasses import replace
from email.utils import formatdate
from functools import cache
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from completions_server import FAULTS, CompletionsServer, answer_to
from families import damaged
from secateurs import ask, cli
from secateurs.dense import Dense
from secateurs.engines import Request, Sampling, default_sampling
from secateurs.engines.hf import hf_engine
from secateurs.engines.openai import OpenAI, _retry_after
from secateurs.models import load_model, load_tokenizer
from secateurs.prompts import render, turns
from secateurs.questions import PromptFormat
from secateurs.questions.tiny import Tiny
from secateurs.recipe import Recipe, load_recipe
from secateurs.traces import TraceStore, read_provenance, read_traces

TOKENIZER = load_tokenizer("bundled")
SIZE = len(TOKENIZER)
SAMPLING = Sampling(temperature=0.6, top_p=0.95, top_k=20, max_new_tokens=32)


def engine(*servers, kind: Any = OpenAI, **options: Any):
    defaults = {"pause": 0.005, "timeout": 5.0, "concurrency": 16}
    return kind(
        servers=tuple(server.url for server in servers),
        model="m",
        tokenizer=TOKENIZER,
        vocab_size=SIZE,
        **(defaults | options),
    )


def requests(count):
    for i in range(count):
        r = random.Random(i)
        ids = (i % SIZE, i // SIZE, *(r.randrange(SIZE) for _ in range(r.randrange(1, 30))))
        yield Request(question_id=str(i), sample=0, prompt_ids=ids, seed=2**61 + i)


def first(fault):
    """Goes wrong so at the first attempt of every prompt."""
    return lambda prompt, attempt: fault if attempt == 1 else ""


def right(completion):
    expected = answer_to(list(completion.request.prompt_ids), SIZE)[:32]
    assert completion.ids == tuple(expected)
    assert completion.finish == ("length" if len(expected) == 32 else "eos")
    return completion.request.question_id


@pytest.mark.parametrize("dialect", ["vllm", "sglang", "llama.cpp"])
def test_ids_go_out_and_come_back_as_they_are(dialect):
    with CompletionsServer(SIZE, dialect) as server:
        found = list(engine(server).generate(requests(60), SAMPLING))
        assert sorted(map(right, found)) == sorted(str(i) for i in range(60))
        assert server.connections <= 16, "connections are used again"
        body = next(body for body in server.bodies if body["prompt"] == list(next(requests(1)).prompt_ids))
    assert {k: body[k] for k in ("model", "max_tokens", "temperature", "top_p", "top_k", "return_token_ids")} == {
        "model": "m", "max_tokens": 32, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "return_token_ids": True
    }  # fmt: skip
    assert body["seed"] == 2**61 % 2**31
    assert body["min_p"] == 0 and body["repetition_penalty"] == 1, "a server's own defaults are not what was asked for"
    assert body["samplers"] == ["temperature", "top_k", "top_p"]
    assert all(c.seconds >= 0 for c in found)


@pytest.mark.parametrize(
    ("endpoint", "fault"),
    [("completions", fault) for fault in FAULTS] + [("chat", fault) for fault in FAULTS if fault != "another prompt"],
)
def test_every_kind_of_wrong_answer_is_asked_again(endpoint, fault):
    wanted = chats(3) if endpoint == "chat" else requests(3)
    with CompletionsServer(SIZE, fault=first(fault), tokenizer=TOKENIZER) as server:
        found = list(engine(server, timeout=0.5, endpoint=endpoint).generate(wanted, SAMPLING))
        assert sorted(map(right, found)) == ["0", "1", "2"]
        assert sorted(server.attempts.values()) == [2, 2, 2]


@pytest.mark.parametrize("status", [501, 520, 524, 529])
def test_every_5xx_is_asked_again(status):
    with CompletionsServer(SIZE, fault=first(f"status {status}")) as server:
        assert [*map(right, engine(server).generate(requests(1), SAMPLING))] == ["0"]


@pytest.mark.parametrize("dialect", ["vllm", "llama.cpp"])
def test_an_answer_to_an_earlier_request_is_not_taken_for_this_ones(dialect):
    """Of equal length, as the counts of the tokens would tell it otherwise."""

    def alike(count):
        for number, request in enumerate(requests(count)):
            yield replace(request, prompt_ids=(*request.prompt_ids[:2], 40, 40 + number))

    def twice(prompt, attempt):
        return "sent twice" if prompt[-1] % 3 == 0 else ""

    with CompletionsServer(SIZE, dialect, fault=twice, tokenizer=TOKENIZER) as server:
        found = list(engine(server, concurrency=1).generate(alike(30), SAMPLING))
    assert len({right(completion) for completion in found}) == 30


@pytest.mark.parametrize("before", ["", " ", "\n  "])
def test_an_answer_of_llama_cpp_to_another_prompt_is_asked_again(before):
    class Spaced(CompletionsServer):
        def _answer(self, body, fault):
            answer = super()._answer(body, fault)
            answer["__verbose"]["prompt"] = before + answer["__verbose"]["prompt"]
            return answer

    with Spaced(SIZE, "llama.cpp", fault=first("another prompt"), tokenizer=TOKENIZER) as server:
        found = list(engine(server).generate(requests(3), SAMPLING))
        assert sorted(map(right, found)) == ["0", "1", "2"]
        assert sorted(server.attempts.values()) == [2, 2, 2]


def test_two_thousand_requests_with_a_fifth_of_faults_are_stored_once_and_right(tmp_path):
    """Over ask.sample, a store and two servers, one of which restarts amid requests; the store is opened twice."""
    quick = [fault for fault in FAULTS if fault not in ("slow", "endless")] + ["sent twice"]

    def faults(server):
        def fault(prompt, attempt):
            if server == 1:
                one.delay = 0.05 if 600 <= len(one.bodies) <= 612 else 0.0
                if len(one.bodies) == 612:
                    one.restart(0.3)
            r = random.Random(repr((server, prompt, attempt)))
            kinds = ["slow", "endless"] if r.random() < 0.01 else quick
            return r.choice(kinds) if r.random() < 0.2 else ""

        return fault

    questions = Tiny()
    wanted = list(islice(questions.questions("calibration", 0), 2000))
    asked = [(question, 0) for question in wanted]
    with CompletionsServer(SIZE, "vllm", faults(1)) as one, CompletionsServer(SIZE, "sglang", faults(2)) as two:
        servers = engine(one, two, timeout=0.5, pause=0.02)
        for stop in (700, 2000):  # a run that ends, and one that goes on
            with TraceStore(tmp_path / "store", {}) as store:

                def enough(store=store, stop=stop):
                    return len(store) >= stop

                ask.sample(store, asked, lambda: servers, TOKENIZER, questions, SAMPLING, 0, 50, enough)
        with TraceStore(tmp_path / "store", {}) as store:
            assert len(store) == 2000
            for question in wanted:
                trace = store.get(question.id, 0)
                expected = answer_to(list(trace.prompt_ids), SIZE)[:32]
                assert trace.completion_ids == tuple(expected)
            budget = 20_000
            kept, complete = store.prefix(((question.id, 0) for question in wanted), budget)
            assert complete and budget <= sum(t.tokens for t in kept) < budget + kept[-1].tokens
        assert one.broken >= 1 and two.connections > 1


def test_memory_does_not_grow_with_the_number_of_requests():
    def peak(count):
        with CompletionsServer(SIZE) as server:
            server.bodies = SimpleNamespace(append=lambda body: None)
            tracemalloc.start()
            for completion in engine(server).generate(requests(count), SAMPLING):
                right(completion)
            found = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            return found - 200 * len(server.attempts)  # the server's own book

    peak(50)
    # How many answers lie in sockets at once is chance, on a busy machine a large one; growth would show every time.
    assert any(peak(400) < 1.5 * peak(100) for _ in range(3))


def test_no_more_are_drawn_ahead_than_are_in_flight():
    drawn = 0

    def counted():
        nonlocal drawn
        for request in requests(100):
            drawn += 1
            yield request

    with CompletionsServer(SIZE, delay=0.01) as server:
        stream = engine(server, concurrency=8).generate(counted(), SAMPLING)
        for number, _ in enumerate(stream, start=1):
            assert drawn <= number + 8
            if number == 40:
                break
        stream.close()
        assert drawn < 60 and server.most_in_flight <= 8


def test_what_will_not_pass_is_said_at_once_and_what_is_done_comes_out_first():
    bad = list(next(islice(requests(6), 5, None)).prompt_ids)
    with CompletionsServer(SIZE, fault=lambda prompt, attempt: "status 400" if prompt == bad else "") as server:
        found = []
        with pytest.raises(ValueError, match="status 400, which asking again will not mend.*as asked"):
            for completion in engine(server, concurrency=3).generate(requests(50), SAMPLING):
                found.append(right(completion))
        assert server.attempts[repr(bad)] == 1 and len(found) >= 3


def test_a_server_that_never_answers_right_is_named():
    with (
        CompletionsServer(SIZE, fault=lambda prompt, attempt: "wrong count") as server,
        pytest.raises(
            ValueError, match=rf"{server.url}: question '0' sample 0 failed 3 times.*where the server counts"
        ),
    ):
        list(engine(server, attempts=3).generate(requests(1), SAMPLING))
    with pytest.raises(ValueError, match="no connection"):
        list(engine(server, attempts=2).generate(requests(1), SAMPLING))


def test_a_server_asks_for_time_and_gets_it():
    with CompletionsServer(SIZE, fault=lambda prompt, attempt: "status 429" if attempt == 1 else "") as server:
        clock = time.monotonic()
        list(engine(server, pause=1e-6).generate(requests(1), SAMPLING))
        assert time.monotonic() - clock >= 0.05


def test_more_than_a_thousand_failures_are_no_overflow():
    with CompletionsServer(SIZE) as server:
        pass
    with pytest.raises(ValueError, match="no connection.*again and again"):
        list(engine(server, attempts=1100, pause=0.0, concurrency=1).generate(requests(1), SAMPLING))


def test_a_server_gets_no_more_than_its_share_and_one_request_at_a_time_while_it_is_gone():
    asking, tries, most, most_later = Counter(), Counter(), Counter(), Counter()

    class Watched(OpenAI):
        async def _ask(self, client, url, request, sampling):
            asking[url] += 1
            most[url] = max(most[url], asking[url])
            if tries[url] > 4:
                most_later[url] = max(most_later[url], asking[url])
            try:
                return await super()._ask(client, url, request, sampling)
            finally:
                asking[url] -= 1
                tries[url] += 1

    with CompletionsServer(SIZE) as dead, CompletionsServer(SIZE) as gone:
        pass
    with CompletionsServer(SIZE, delay=0.02) as live:
        found = list(engine(dead, live, gone, kind=Watched, concurrency=4).generate(requests(60), SAMPLING))
        assert len({right(completion) for completion in found}) == 60
        assert live.most_in_flight == most[live.url] == 4
    assert [most_later[server.url] for server in (dead, gone)] == [1, 1]


def test_a_server_that_admits_few_is_waited_for():
    """Two attempts a request, and a request every 20 ms, where 64 are waiting."""
    admitted = [0.0]

    def full(prompt, attempt):
        if time.monotonic() - admitted[-1] < 0.02:
            return "status 429"
        admitted.append(time.monotonic())
        return ""

    with CompletionsServer(SIZE, fault=full) as server:
        found = list(engine(server, attempts=2, concurrency=64).generate(requests(40), SAMPLING))
        assert len({right(completion) for completion in found}) == 40
        assert len(server.bodies) < 40 * 8, "it is not besieged"


def test_a_server_that_is_still_loading_is_waited_for_but_not_for_ever(monkeypatch):
    start = time.monotonic()

    def loading(prompt, attempt):
        return "status 503" if time.monotonic() - start < 0.5 else ""

    with CompletionsServer(SIZE, fault=loading) as server:
        server.retry_after = ""
        assert len(list(engine(server, attempts=1).generate(requests(20), SAMPLING))) == 20
        server.fault = lambda prompt, attempt: "status 503"
        monkeypatch.setattr("secateurs.engines.openai.PATIENCE", 0.1)
        with pytest.raises(ValueError, match=rf"{server.url}: status 503, again and again, and no server answers"):
            list(engine(server).generate(requests(20), SAMPLING))


def test_who_waits_takes_whichever_server_is_free_first():
    """The first is back after .4 s. The second seems to be sooner, but then wants to be left alone for 6."""

    def longer(prompt, attempt):
        if len(two.bodies) > 16:
            two.retry_after = "6"
        return "status 429"

    def closed(prompt, attempt):
        return "status 429" if len(one.bodies) <= 16 else ""

    with CompletionsServer(SIZE, fault=closed) as one, CompletionsServer(SIZE, fault=longer) as two:
        one.retry_after, two.retry_after = "0.4", "0.2"
        clock = time.monotonic()
        assert len(list(engine(one, two).generate(requests(32), SAMPLING))) == 32
        assert time.monotonic() - clock < 4
        assert len(two.bodies) > 16


def test_a_server_that_fails_at_once_does_not_eat_the_attempts_of_one_that_is_busy():
    with (
        CompletionsServer(SIZE, fault=lambda prompt, attempt: "status 500") as broken,
        CompletionsServer(SIZE, delay=0.02) as busy,
    ):
        found = list(engine(broken, busy, attempts=2, concurrency=4).generate(requests(40), SAMPLING))
    assert len({right(completion) for completion in found}) == 40


@pytest.mark.parametrize(
    ("words", "seconds"),
    [
        ("1.5", 1.5), ("-3", 0), ("1e9", 600), ("nan", 0), ("soon", 0), ("a:b", 0), ("", 0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("Wed, 21 Oct 2815 07:28:00 GMT", 600),
        ("Wed, 21 Oct 99999 07:28:00 GMT", 0), ("Wed, 21 Oct 0001 07:28:00 -0000", 0),
    ],
)  # fmt: skip
def test_the_time_a_server_asks_for_is_seconds_or_a_date(words, seconds):
    assert _retry_after(httpx.Response(429, headers={"Retry-After": words})) == seconds
    soon = formatdate(time.time() + 300, usegmt=True)
    assert 200 < _retry_after(httpx.Response(429, headers={"Retry-After": soon})) <= 300


def test_a_key_is_cleaned_sent_and_never_shown(monkeypatch):
    options = {"api_key_env": "SOME_KEY"}
    monkeypatch.setenv("SOME_KEY", " sk-secret\n")
    with CompletionsServer(SIZE) as server:
        assert len(list(engine(server, **options).generate(requests(1), SAMPLING))) == 1
        assert server.keys == {"Bearer sk-secret"}
        server.fault, server.words = (lambda prompt, attempt: "status 401"), "no such key: sk-secret"
        with pytest.raises(ValueError, match=r"status 401.*no such key: \(the key\)$"):
            list(engine(server, **options).generate(requests(1), SAMPLING))
        for key, lesson in (
            ("sk-\nsecret", "the key in SOME_KEY"),
            ("sk-secr\u00e9t", "the key in"),
            ("\n", "is set to"),
        ):
            monkeypatch.setenv("SOME_KEY", key)
            with pytest.raises(ValueError, match=lesson) as error:
                engine(server, **options)
            assert "secr" not in str(error.value)


@pytest.mark.parametrize(
    ("status", "words", "options", "hinted"),
    [
        (422, "Unexpected keys in the request: {'return_token_ids'}", {}, True),
        (400, "Unrecognized request argument supplied: top_k", {}, True),
        (422, "Unexpected keys in the request: {'top_k'}", {"allow_retokenised": True}, False),
        (400, "This model's maximum context length is 4096 tokens", {}, False),
        (401, "top_k needs a key", {}, False),
        (404, "The model `m` does not exist", {}, False),
    ],
)
def test_text_is_offered_only_where_a_server_does_not_know_what_ids_need(status, words, options, hinted):
    with CompletionsServer(SIZE, "text", lambda prompt, attempt: f"status {status}", tokenizer=TOKENIZER) as server:
        server.words = words
        with pytest.raises(ValueError, match=f"status {status}") as error:
            list(engine(server, **options).generate(chats(1), SAMPLING))
    assert words in str(error.value) and ("allow_retokenised" in str(error.value)) == hinted


def served(model):
    """A server's answers: those of a transformers model in this process, with the request's own sampling."""

    def answer(body):
        sampling = Sampling(temperature=body["temperature"], top_p=body["top_p"], max_new_tokens=body["max_tokens"])
        request = Request(question_id="q", sample=0, prompt_ids=tuple(body["prompt"]), seed=body["seed"])
        (completion,) = hf_engine(model, TOKENIZER, 1).generate([request], sampling)
        return list(completion.ids)

    return answer


@cache
def bundled():
    """What the bundled model answers, remembered: one test asks what another did, and each answer takes long."""
    answer = served(load_model("bundled"))
    known: dict[str, list[int]] = {}

    def remembered(body):
        asked = json.dumps([body[key] for key in ("prompt", "seed", "temperature", "top_p", "max_tokens")])
        if asked not in known:
            known[asked] = answer(body)
        return list(known[asked])

    return remembered


def traced(servers, folder, tokens=400, at_once=64, **engine_options):
    urls = [server.url for server in (servers if isinstance(servers, list) else [servers])]
    recipe = Recipe.model_validate(
        {
            "traces": {
                "engine": {"name": "openai", "servers": urls, "model": "bundled", "concurrency": 8} | engine_options,
                "sampling": {"max_new_tokens": 32},
            },
            "resources": {"batch_size": at_once},
            "calibration": {"num_tokens": tokens, "held_out_tokens": tokens // 4},
        }
    )
    return ask.trace(recipe, folder, 0, Dense(recipe))


def test_a_run_traces_on_a_server_as_in_process_and_goes_on_where_it_stopped(tmp_path):
    with CompletionsServer(SIZE, answer=bundled()) as server:
        first = traced(server, tmp_path, concurrency=1)  # nothing is on its way when enough is known
        asked = len(server.bodies)
        assert sum(t.tokens for t in (*first.held_out, *first.traces)) >= 500
        again = traced(server, tmp_path)
        assert (again.held_out, again.traces) == (first.held_out, first.traces) and len(server.bodies) == asked
    provenance = read_provenance(next((tmp_path / "traces").iterdir()))
    assert provenance["engine"] == {"name": "openai", "model": "bundled", "ids": "sampled"}


def test_a_server_with_another_model_is_found_out_after_a_few_traces(tmp_path):
    other = damaged(load_model("bundled"))
    with (
        CompletionsServer(SIZE, answer=served(other)) as server,
        pytest.raises(ValueError, match="does not serve the model to be pruned"),
    ):
        traced(server, tmp_path, concurrency=4)
    assert len(server.bodies) <= 8 + 2 * 4
    with (
        CompletionsServer(SIZE, answer=served(other)) as server,
        pytest.raises(ValueError, match=r"tokens of its first [1-7] traces"),
    ):
        traced(server, tmp_path / "few", tokens=30, at_once=1, concurrency=1)
    assert not [trace for store in tmp_path.glob("*/traces/*") for trace in read_traces(store)]


def test_a_wrong_server_beside_a_right_one_or_later_is_found_out_and_nothing_it_said_is_kept(tmp_path):
    model = load_model("bundled")
    with (
        CompletionsServer(SIZE, answer=bundled()) as right,
        CompletionsServer(SIZE, answer=served(damaged(load_model("bundled")))) as wrong,
    ):
        first = traced(right, tmp_path / "later", tokens=100, concurrency=4)
        assert set(first.surprises) == {right.url} and abs(first.surprises[right.url].gap) < 0.1
        again = traced(wrong, tmp_path / "later", tokens=100)
        assert again.surprises == {}, "nothing was missing, so nothing was asked"
        for folder, servers in (("later", wrong), ("beside", [right, wrong])):
            with pytest.raises(ValueError, match=f"^{wrong.url} does not serve the model to be pruned: .* stored"):
                traced(servers, tmp_path / folder, tokens=500)
    stores = [next((tmp_path / folder / "traces").iterdir()) for folder in ("later", "beside")]
    assert {trace.key for trace in (*first.held_out, *first.traces)} <= {trace.key for trace in read_traces(stores[0])}
    questions, asked = Tiny(), {trace.question_id: trace for store in stores for trace in read_traces(store)}
    known = [one for one in islice(questions.questions("calibration", 0), 200) if one.id in asked]
    again = [ask.request_for(question, 0, TOKENIZER, questions, 0) for question in known]
    sampling = default_sampling(model.generation_config, max_new_tokens=32)
    own = {one.request.question_id: one.ids for one in hf_engine(model, TOKENIZER, 32).generate(again, sampling)}
    assert own == {question: trace.completion_ids for question, trace in asked.items()}


def test_what_servers_said_before_one_failed_is_judged_and_kept(tmp_path):
    """Fewer than are judged together, and the run ends."""
    said = bundled()
    ends = lambda prompt, attempt: "status 400" if len(server.attempts) > 3 else ""  # noqa: E731
    with CompletionsServer(SIZE, answer=said, fault=ends) as server, pytest.raises(ValueError, match="status 400"):
        traced(server, tmp_path, concurrency=1)
    (store,) = (tmp_path / "traces").iterdir()
    assert len(read_traces(store)) == 3


def test_text_is_refused_unless_it_is_asked_for_and_then_it_is_marked(tmp_path):
    options = {"answer": bundled(), "tokenizer": TOKENIZER}
    with (
        CompletionsServer(SIZE, "bare", **options) as server,
        pytest.raises(ValueError, match="holds no token ids.*accept it: traces.engine.allow_retokenised"),
    ):
        traced(server, tmp_path / "refused")
    with CompletionsServer(SIZE, "text", **options) as server:
        found = traced(server, tmp_path / "marked", allow_retokenised=True)
        assert all(t.completion_ids[-1] == TOKENIZER.eos_token_id for t in found.traces if t.finish == "eos")
    provenance = read_provenance(next((tmp_path / "marked" / "traces").iterdir()))
    assert provenance["engine"]["ids"] == "retokenised"


def test_a_prompt_that_no_text_stands_for_is_refused():
    with (
        CompletionsServer(SIZE, "text", tokenizer=TOKENIZER) as server,
        pytest.raises(ValueError, match="only .* as ids"),
    ):
        odd = Request(question_id="q", sample=0, prompt_ids=(SIZE - 1, 0, SIZE - 1, 3, 3), seed=0)
        list(engine(server, allow_retokenised=True).generate([odd], SAMPLING))
    assert not server.bodies


def test_a_prompt_that_the_server_reads_otherwise_is_no_silent_success():
    class WithBos:
        def __call__(self, text):
            return {"input_ids": [1, 1, *TOKENIZER(text)["input_ids"]]}

        decode = staticmethod(TOKENIZER.decode)

    with (
        CompletionsServer(SIZE, "text", tokenizer=WithBos()) as server,
        pytest.raises(ValueError, match=r"counts \d+ prompt tokens, we sent \d+: .*BOS"),
    ):
        words = Request(question_id="q", sample=0, prompt_ids=tuple(TOKENIZER("12+34=")["input_ids"]), seed=0)
        list(engine(server, allow_retokenised=True).generate([words], SAMPLING))


def test_two_machines_trace_a_half_each_and_a_run_on_the_merged_store_asks_no_more(tmp_path):
    with CompletionsServer(SIZE, answer=bundled()) as server:
        options = [
            f'traces.engine={{name="openai", servers=["{server.url}"], model="bundled", concurrency=8}}',
            "traces.sampling.max_new_tokens=32", "calibration.num_tokens=240", "calibration.held_out_tokens=60",
        ]  # fmt: skip
        sets = [part for option in options for part in ("--set", option)]

        def command(*words):
            result = CliRunner().invoke(cli.app, words, catch_exceptions=False)
            return json.loads(result.stdout)

        sets += ["--set", "sweep.seed=[0]", "--json"]
        stores = [
            command("trace", "demo", *sets, "--shard", f"{k}/2", "--out", f"{tmp_path}/{k}")["store"] for k in (1, 2)
        ]
        merged = Path(stores[0]).name
        assert command("merge", *stores, "--into", f"{tmp_path}/all/traces/{merged}")["already"] == 0
        asked = len(server.bodies)
        whole = traced(server, tmp_path / "all", tokens=240)
        assert len(server.bodies) - asked <= 2, "only what the halves overshot differently"
        assert whole.traces == traced(server, tmp_path / "alone", tokens=240).traces


@pytest.mark.parametrize(
    ("options", "lesson"),
    [
        ({"name": "openai"}, 'engine "openai" needs `servers`'),
        ({"servers": ["http://localhost:1/v1"]}, 'did you mean name = "openai"'),
        ({"name": "openai", "servers": ["localhost:1"], "model": "m"}, "server 'localhost:1' is no URL"),
        ({"name": "openai", "servers": ["http://:x"], "model": "m"}, "is no URL"),
        ({"name": "openai", "servers": ["http://a"], "model": "m", "api_key_env": "NO_SUCH"}, "names NO_SUCH"),
        ({"endpoint": "chat"}, 'did you mean name = "openai"'),
        ({"name": "openai", "servers": ["http://a"], "model": "m", "endpoint": "chats"}, "'completions' or 'chat'"),
        ({"name": "vllm"}, "should be 'hf' or 'openai'"),
    ],
)
def test_mistakes_in_the_table_teach(options, lesson, tmp_path):
    with pytest.raises(ValueError, match=lesson):
        recipe = load_recipe("demo", [f"traces.engine={toml(options)}"])
        ask.trace_engine(recipe, Dense(recipe))


def chats(count):
    for i, question in enumerate(islice(Tiny().questions("calibration", 0), count)):
        said = turns(Tiny().format, question)
        ids = render(TOKENIZER, Tiny().format, question)
        yield Request(question_id=str(i), sample=0, prompt_ids=ids, seed=i, turns=said)


def chat_engine(*servers, **options):
    return engine(*servers, endpoint="chat", **options)


@pytest.mark.parametrize("dialect", ["vllm", "sglang", "llama.cpp"])
def test_turns_go_out_by_chat_and_ids_come_back_as_they_are(dialect):
    with CompletionsServer(SIZE, dialect, tokenizer=TOKENIZER) as server:
        found = list(chat_engine(server).generate(chats(20), Sampling(max_new_tokens=32)))
        assert sorted(map(right, found)) == sorted(map(str, range(20)))
        assert server.paths == {"/v1/chat/completions"}
        body = server.bodies[0]
    assert "prompt" not in body and body["top_k"] == -1
    assert [list(message) for message in body["messages"]] == [["role", "content"]]


@pytest.mark.parametrize("dialect", ["vllm", "sglang", "llama.cpp"])
@pytest.mark.parametrize(
    ("template", "lesson"),
    [
        ("<|system|>be kind{}", r"counts \d+ prompt tokens, we sent \d+: its chat template is another one"),
        ("<|system|>{}", r"the server's prompt has other ids than ours: its chat template is another one"),
    ],
    ids=["longer", "as long"],
)
def test_another_chat_template_is_found_out_by_the_first_answer(dialect, template, lesson):
    other = load_tokenizer("bundled")
    words = "{{ messages[0].content }}<|assistant|><think>"
    other.chat_template = template.format(words)
    with CompletionsServer(SIZE, dialect, tokenizer=other) as server, pytest.raises(ValueError, match=lesson):
        list(chat_engine(server, concurrency=1).generate(chats(3), SAMPLING))
    assert len(server.bodies) == 1


def test_exact_ids_by_chat_need_the_prompts_ids_to_compare():
    class Mute(CompletionsServer):
        def _answer(self, body, fault):
            return {k: v for k, v in super()._answer(body, fault).items() if k != "prompt_token_ids"}

    with Mute(SIZE, tokenizer=TOKENIZER) as server, pytest.raises(ValueError, match="does not hold the prompt's ids"):
        list(chat_engine(server).generate(chats(1), SAMPLING))


@pytest.mark.parametrize("options", [{"prefill": "\nfirst"}, {"examples": [["1+1", "2"]], "prefill": "So "}])
def test_a_prefill_that_chat_cannot_send_is_refused_before_anything_is_sent(options):
    form = PromptFormat(**options)
    (question,) = islice(Tiny().questions("calibration", 0), 1)
    request = Request(
        question_id="q", sample=0, prompt_ids=render(TOKENIZER, form, question), seed=0, turns=turns(form, question)
    )
    with (
        CompletionsServer(SIZE, tokenizer=TOKENIZER) as server,
        pytest.raises(ValueError, match="question 'q': .* a prefill cannot be sent by chat: leave `prefill` out"),
    ):
        list(chat_engine(server).generate([request], SAMPLING))
    assert not server.bodies


@pytest.mark.parametrize(
    ("parser", "said", "understood"),
    [
        ("", "12+3</think>15<|eos|>", "12+3</think>15<|eos|>"),
        ("reasoning", "\n12+3\n</think> 15<|eos|>", "\n12+3\n</think> 15<|eos|>"),
        ("reasoning_content", "\n12+3\n</think>\n\n15<|eos|>", "\n12+3\n</think>\n\n15<|eos|>"),
        ("reasoning_content", "\n12+3 and so on", "\n12+3 and so on"),
        ("reasoning", "12+3 and so on", "12+3 and so on"),
        ("reasoning", "12+3</think>15<|eos|>", "12+3</think>15<|eos|>"),
    ],
)
def test_thinking_that_a_parser_took_out_is_put_back(parser, said, understood):
    ids = TOKENIZER(said)["input_ids"]
    options = {"answer": lambda body: ids, "tokenizer": TOKENIZER, "parser": parser}
    with CompletionsServer(SIZE, "text", **options) as server:
        sampling = Sampling(max_new_tokens=64 if said.endswith("<|eos|>") else len(ids))
        (found,) = chat_engine(server, allow_retokenised=True).generate(chats(1), sampling)
    assert TOKENIZER.decode(found.ids) == understood
    assert found.finish == ("eos" if said.endswith("<|eos|>") else "length")


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
@pytest.mark.parametrize("parser", ["", "reasoning"])
def test_an_empty_answer_is_an_answer_if_nothing_more_was_counted(endpoint, parser):
    class Silent(CompletionsServer):
        def _answer(self, body, fault):
            answer = super()._answer(body, fault)
            answer["choices"][0] |= {"text": ""}
            answer["usage"]["completion_tokens"] = counted
            return answer

    options = {"answer": lambda body: [TOKENIZER.eos_token_id], "tokenizer": TOKENIZER, "parser": parser}
    with Silent(SIZE, "text", **options) as server:
        asking = engine(server, endpoint=endpoint, allow_retokenised=True, attempts=2)
        counted = 1
        (found,) = asking.generate(chats(1), SAMPLING)
        assert (found.ids, found.finish) == ((TOKENIZER.eos_token_id,), "eos") and len(server.bodies) == 1
        counted = 5
        with pytest.raises(ValueError, match="failed 2 times.*no text, where the server counts 5 tokens"):
            list(asking.generate(chats(1), SAMPLING))


def test_text_with_more_tokens_than_were_asked_for_is_cut_and_says_so():
    options = {"answer": lambda body: TOKENIZER("12+3</think>15<|eos|>")["input_ids"], "tokenizer": TOKENIZER}
    with CompletionsServer(SIZE, "text", **options) as server:
        (found,) = chat_engine(server, allow_retokenised=True).generate(chats(1), Sampling(max_new_tokens=7))
    assert TOKENIZER.decode(found.ids) == "12+3</think>15" and found.finish == "length"


def test_a_server_that_keeps_the_thinking_to_itself_is_found_out():
    ids = TOKENIZER("1+2=3 and 3+4=7</think>10<|eos|>")["input_ids"]
    options = {"answer": lambda body: ids, "tokenizer": TOKENIZER, "parser": "secret"}
    with (
        CompletionsServer(SIZE, "text", **options) as server,
        pytest.raises(ValueError, match=rf"counts {len(ids)} tokens in an answer whose text has 3, so it keeps a part"),
    ):
        list(chat_engine(server, allow_retokenised=True).generate(chats(1), SAMPLING))


def test_a_run_by_chat_keeps_the_traces_of_one_by_completions_and_says_how_they_were_made(tmp_path):
    with CompletionsServer(SIZE, answer=bundled(), tokenizer=TOKENIZER) as server:
        small = {"tokens": 150, "at_once": 1, "concurrency": 4}
        plain = traced(server, tmp_path / "plain", **small)
        again = traced(server, tmp_path / "plain", endpoint="chat", **small)
        assert (again.key, again.held_out, again.traces) == (plain.key, plain.held_out, plain.traces)
        assert server.paths == {"/v1/completions"}, "nothing was asked again"
        assert traced(server, tmp_path / "chat", endpoint="chat", **small).traces == plain.traces
        assert server.paths == {"/v1/completions", "/v1/chat/completions"}
        assert abs(plain.surprises[server.url].gap) < 0.1
        assert plain.surprises[server.url].num_tokens >= 8


@pytest.mark.parametrize("parser", ["", "reasoning"])
def test_text_by_chat_is_refused_unless_it_is_asked_for_and_then_it_is_marked(parser, tmp_path):
    options = {"answer": bundled(), "tokenizer": TOKENIZER, "parser": parser}
    small = {"tokens": 150, "at_once": 1, "endpoint": "chat", "concurrency": 4}
    with (
        CompletionsServer(SIZE, "text", **options) as server,
        pytest.raises(ValueError, match="holds no token ids.*accept it: traces.engine.allow_retokenised"),
    ):
        traced(server, tmp_path / "refused", **small | {"concurrency": 1})
    with CompletionsServer(SIZE, **options) as server:
        exact = traced(server, tmp_path / "exact", **small)
    with CompletionsServer(SIZE, "text", **options) as server:
        found = traced(server, tmp_path / "marked", allow_retokenised=True, **small)
    assert found.traces == exact.traces, "this model's samples are the shortest way to write them"
    engine_of = read_provenance(next((tmp_path / "marked" / "traces").iterdir()))["engine"]
    assert engine_of == {"name": "openai", "model": "bundled", "ids": "retokenised", "endpoint": "chat"}


def test_the_trace_command_shows_how_surprised_the_model_was(tmp_path):
    with CompletionsServer(SIZE, answer=bundled()) as server:
        table = f'traces.engine={{name="openai", servers=["{server.url}"], model="bundled", concurrency=8}}'
        words = ["trace", "demo", "--set", table, "--set", "traces.sampling.max_new_tokens=32", "--json"]
        words += ["--set", "calibration.num_tokens=100", "--set", "calibration.held_out_tokens=50"]
        words += ["--set", "sweep.seed=[0]", "--out", str(tmp_path)]
        shown = json.loads(CliRunner().invoke(cli.app, words, catch_exceptions=False).stdout)
    (found,) = shown["surprise"].values()
    assert found["tokens"] > 50 and abs(found["gap"]) < 0.1


def toml(options):
    return "{" + ", ".join(f"{key}={value!r}".replace("'", '"') for key, value in options.items()) + "}"


@pytest.mark.parametrize("dialect", ["text", "llama.cpp"])
def test_half_a_character_is_asked_for_again(dialect):
    """JSON can hold what no text can (a lone surrogate), and a tokenizer takes none."""

    class Halved(CompletionsServer):
        def _answer(self, body, fault):
            answer = super()._answer(body, "")
            if fault and dialect == "text":
                answer["choices"][0]["text"] = "a\ud800b"
            elif fault:
                answer["__verbose"]["prompt"] = "\udfff"
            return answer

    asked = Request(question_id="q", sample=0, prompt_ids=tuple(TOKENIZER("What is 1 + 1?")["input_ids"]), seed=0)
    with Halved(SIZE, dialect, fault=first("half"), tokenizer=TOKENIZER) as server:
        (found,) = engine(server, allow_retokenised=dialect == "text").generate([asked], SAMPLING)
        assert len(server.bodies) == 2 and found.ids
