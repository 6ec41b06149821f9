"""Servers over HTTP: every right answer once, whatever goes wrong on the way; nothing wrong ever."""

import random
import time
import tracemalloc
from itertools import islice
from types import SimpleNamespace

import pytest

from completions_server import FAULTS, CompletionsServer, answer_to
from secateurs import run
from secateurs.engines import Request, Sampling
from secateurs.engines.openai import OpenAI
from secateurs.models import load_tokenizer
from secateurs.questions.tiny import Tiny
from secateurs.traces import TraceStore

TOKENIZER = load_tokenizer("bundled")
SIZE = len(TOKENIZER)
SAMPLING = Sampling(temperature=0.6, top_p=0.95, top_k=20, max_new_tokens=32)


def engine(*servers, **options):
    defaults = {"pause": 0.005, "timeout": 5.0, "concurrency": 16}
    return OpenAI(
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


def right(completion):
    expected = answer_to(list(completion.request.prompt_ids), SIZE)[:32]
    assert completion.ids == tuple(expected)
    assert completion.finish == ("length" if len(expected) == 32 else "eos")
    return completion.request.question_id


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
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
    assert all(c.seconds >= 0 for c in found)


@pytest.mark.parametrize("fault", FAULTS)
def test_every_kind_of_wrong_answer_is_asked_again(fault):
    def once(prompt, attempt):
        return fault if attempt == 1 else ""

    with CompletionsServer(SIZE, fault=once) as server:
        found = list(engine(server, timeout=0.5).generate(requests(3), SAMPLING))
        assert sorted(map(right, found)) == ["0", "1", "2"]
        assert sorted(server.attempts.values()) == [2, 2, 2]


def test_two_thousand_requests_with_a_fifth_of_faults_are_stored_once_and_right(tmp_path):
    """Over run.sample, a store and two servers, one of which restarts in the middle; the store is opened twice."""
    quick = [fault for fault in FAULTS if fault not in ("slow", "endless")]

    def fault(prompt, attempt):
        r = random.Random(repr((prompt, attempt)))
        kinds = ["slow", "endless"] if r.random() < 0.01 else quick
        return r.choice(kinds) if r.random() < 0.2 else ""

    questions = Tiny()
    wanted = list(islice(questions.questions("calibration", 0), 2000))
    asked = [(question, 0) for question in wanted]
    with CompletionsServer(SIZE, fault=fault) as one, CompletionsServer(SIZE, "sglang", fault) as two:
        servers = engine(one, two, timeout=0.5)
        for stop in (700, 2000):  # a run that ends, and one that goes on
            with TraceStore(tmp_path / "store", {}) as store:

                def enough(store=store, stop=stop):
                    return len(store) >= stop

                if stop == 2000:
                    one.restart(0.3)
                run.sample(store, asked, servers, TOKENIZER, questions, SAMPLING, 0, 50, enough)
        with TraceStore(tmp_path / "store", {}) as store:
            assert len(store) == 2000
            for question in wanted:
                trace = store.get(question.id, 0)
                expected = answer_to(list(trace.prompt_ids), SIZE)[:32]
                assert trace.completion_ids == tuple(expected)
            budget = 20_000
            kept, complete = store.prefix(((question.id, 0) for question in wanted), budget)
            assert complete and budget <= sum(t.tokens for t in kept) < budget + kept[-1].tokens
        assert one.connections > 1 and two.connections > 1


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
    assert peak(600) < 1.5 * peak(150)


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
