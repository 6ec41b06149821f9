"""Traces survive kills, full disks and torn lines; which ones are kept depends on nothing but requests and budget.

Run as a program (`python tests/test_traces.py FOLDER STEP WHEN`) this file is a writer like those that the kill test
kills.
"""

import errno
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from secateurs.artifacts import read_json
from secateurs.traces import (
    FILTERS,
    Trace,
    TraceStore,
    apply_filters,
    looping,
    merge_stores,
    read_provenance,
    read_traces,
)

PROVENANCE: dict[str, Any] = {
    "model": "a" * 64,
    "tokenizer": "b" * 64,
    "questions": {"name": "tiny", "version": 1, "format": "c" * 64},
    "sampling": {"temperature": 0.6, "top_p": 0.95, "max_tokens": 4096},
    "seed": 0,
}
REQUESTS = [(f"q{number}", sample) for number in range(12) for sample in range(2)]


def make(question_id: str = "q0", sample: int = 0, completion: int = 20, **fields: Any) -> Trace:
    """A trace with ids that depend only on its key."""
    rng = random.Random(f"{question_id}/{sample}")
    values: dict[str, Any] = {
        "question_id": question_id,
        "sample": sample,
        "prompt_ids": tuple(rng.randrange(150_000) for _ in range(5)),
        "completion_ids": tuple(rng.randrange(150_000) for _ in range(completion)),
        "think_tokens": completion - 4,
        "think_closed": True,
        "finish": "eos",
        "reward": rng.choice([0.0, 1.0]),
        "seed": rng.randrange(2**63),
    }
    return Trace(**(values | fields))


def sealed_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


def fill(folder: Path, budget: int, order: int = 0, tell: Callable[[str], object] = print) -> None:
    """What an engine does: generate what is missing, finished in any order, until the budget is met; then seal."""
    rng = random.Random(order)
    with TraceStore(folder, PROVENANCE) as store:
        while not store.prefix(REQUESTS, budget)[1]:
            missing = [key for key in REQUESTS if key not in store][:6]
            batch = [make(*key, completion=20 + 10 * key[1]) for key in rng.sample(missing, min(2, len(missing)))]
            store.append(batch)
            tell(" ".join(f"{trace.question_id}/{trace.sample}" for trace in batch))
        tell(f"sealing {budget}")
        store.seal(store.prefix(REQUESTS, budget)[0])


BUDGETS = (300, 500)


def on_every_step(act: Callable[[Callable[..., Any], tuple[Any, ...]], Any]) -> None:
    """Replace the system calls that change a disk by `act(call, arguments)`."""
    for name in ("write", "fsync", "replace", "unlink"):
        call = getattr(os, name)
        setattr(os, name, lambda *arguments, call=call: act(call, arguments))


def main(folder: str, step: int, when: str) -> None:
    """Fill a store and kill this very process before, in or after the `step`-th system call; print the calls made."""
    steps = 0

    def act(call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        nonlocal steps
        steps += 1
        if steps == step and when == "after":
            if call.__name__ == "write":
                call(arguments[0], arguments[1][: len(arguments[1]) // 2])
            else:
                call(*arguments)
        if steps == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments)

    on_every_step(act)
    for budget in BUDGETS:
        fill(Path(folder), budget, 0, lambda line: print(line, flush=True))
    print(f"steps {steps}", flush=True)


def killed_writer(folder: Path, step: int, when: str) -> tuple[int | None, list[str]]:
    """How such a process ended, and the lines that it printed; forked, as to start one anew takes seconds."""
    said = folder.with_suffix(".said")

    def write() -> None:
        with said.open("w") as sys.stdout:
            main(str(folder), step, when)

    process = get_context("fork").Process(target=write, daemon=True)
    process.start()
    process.join(60)
    return process.exitcode, said.read_text().splitlines()


def test_regions_cover_prompt_and_completion() -> None:
    trace = make(completion=20, think_tokens=16)
    assert trace.tokens == 25
    assert trace.regions == (("prompt", 0, 5), ("think", 5, 21), ("answer", 21, 25))
    assert make(think_tokens=0).regions == (("prompt", 0, 5), ("answer", 5, 25))
    assert make(think_tokens=20, think_closed=False, finish="length").regions == (("prompt", 0, 5), ("think", 5, 25))


@pytest.mark.parametrize(
    "wrong",
    [
        {"question_id": ""},
        {"sample": -1},
        {"think_tokens": 21},
        {"prompt_ids": [1, 2]},
        {"prompt_ids": (1, True)},
        {"completion_ids": (1.0,), "think_tokens": 0},
        {"completion_ids": (2**31,), "think_tokens": 0},
        {"finish": "stop"},
        {"reward": float("nan")},
        {"seed": 2**63},
        {"think_closed": 1},
    ],
    ids=str,
)
def test_a_trace_that_cannot_be_right_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make(**wrong)


def test_round_trip_through_journal_shard_and_pandas(tmp_path: Path) -> None:
    traces = [
        make("q0", 0, reward=None),
        make("q0", 1, finish="length", think_tokens=20, think_closed=False),
        make("ü\n", 0, completion=300, seed=2**63 - 1),
        make("q1", 0, completion_ids=(), think_tokens=0, reward=0.1),
    ]
    with TraceStore(tmp_path, PROVENANCE) as store:
        store.append(traces[:2])
        store.append(iter(traces[2:]))
        assert list(store) == traces
    with TraceStore(tmp_path, PROVENANCE) as store:
        assert list(store) == read_traces(tmp_path) == traces
        assert read_traces(tmp_path, sealed_only=True) == []
        assert len(store) == 4
        assert store.num_tokens == sum(trace.tokens for trace in traces)
        assert store.get("q0", 1) == traces[1]
        assert store.get("q0", 2) is None
        assert ("q0", 1) in store
        assert list(store.keys()) == [trace.key for trace in traces]
        store.seal(traces)
        assert list(store) == traces
    assert not (tmp_path / "active.jsonl").exists()
    assert read_traces(tmp_path) == read_traces(tmp_path, sealed_only=True) == traces
    assert read_provenance(tmp_path) == PROVENANCE

    import pandas  # here, so that the killed writers start faster

    frame = pandas.read_parquet(tmp_path / "traces-00000.parquet")
    assert [tuple(ids) for ids in frame["completion_ids"]] == [trace.completion_ids for trace in traces]
    assert frame["completion_ids"][0].dtype == "int32"
    assert list(frame["question_id"]) == [trace.question_id for trace in traces]
    assert list(frame["seed"]) == [trace.seed for trace in traces]
    assert frame["reward"].isna().tolist() == [True, False, False, False]


def test_budget_takes_the_shortest_prefix_of_the_requests(tmp_path: Path) -> None:
    requests = REQUESTS[:6]
    with TraceStore(tmp_path, PROVENANCE) as store:
        # 25 tokens each; requests 4, 3, 1, 0 finish first, so request 2 is the gap.
        store.append(make(*requests[number]) for number in (4, 3, 1, 0))
        assert [trace.key for trace in store.prefix(requests, 50)[0]] == requests[:2]
        assert store.prefix(requests, 51) == (store.prefix(requests, 50)[0], False)
        store.append([make(*requests[2])])
        for budget, count, complete in ((0, 0, True), (1, 1, True), (25, 1, True), (26, 2, True), (125, 5, True)):
            traces, done = store.prefix(iter(requests), budget)
            assert ([trace.key for trace in traces], done) == (requests[:count], complete)
        traces, done = store.prefix(requests, 126)
        assert ([trace.key for trace in traces], done) == (requests[:5], False)
        assert store.prefix(requests[:2], 51)[1] is False  # the requests are used up
        with pytest.raises(ValueError, match="requested twice"):
            store.prefix([requests[0], requests[0]], 1000)


def test_a_larger_budget_continues_and_a_smaller_one_changes_nothing(tmp_path: Path) -> None:
    fill(tmp_path, 300)
    first = sealed_bytes(tmp_path)
    assert list(first) == ["traces-00000.parquet"]
    kept = read_traces(tmp_path, sealed_only=True)
    assert [trace.key for trace in kept] == REQUESTS[: len(kept)]
    assert sum(trace.tokens for trace in kept) >= 300 > sum(trace.tokens for trace in kept[:-1])
    fill(tmp_path, 500)
    second = sealed_bytes(tmp_path)
    assert list(second) == ["traces-00000.parquet", "traces-00001.parquet"]
    assert second["traces-00000.parquet"] == first["traces-00000.parquet"]
    kept = read_traces(tmp_path, sealed_only=True)
    assert [trace.key for trace in kept] == REQUESTS[: len(kept)]
    assert sum(trace.tokens for trace in kept) >= 500 > sum(trace.tokens for trace in kept[:-1])
    fill(tmp_path, 300)
    fill(tmp_path, 500)
    assert sealed_bytes(tmp_path) == second


def test_completion_order_changes_no_byte(tmp_path: Path) -> None:
    for order, run in enumerate("abc"):
        fill(tmp_path / run, 500, order)
    assert sealed_bytes(tmp_path / "a") == sealed_bytes(tmp_path / "b") == sealed_bytes(tmp_path / "c") != {}


def test_sealing_less_than_there_is_loses_nothing(tmp_path: Path) -> None:
    with TraceStore(tmp_path, PROVENANCE) as store:
        store.append(make(*key) for key in REQUESTS[:4])
        with pytest.raises(ValueError, match="not stored here"):
            store.seal([make(*REQUESTS[0]), make(*REQUESTS[5])])
        with pytest.raises(ValueError, match="not stored here"):
            store.seal([replace(make(*REQUESTS[0]), reward=0.5)])
        store.seal([make(*REQUESTS[1]), make(*REQUESTS[0])])
        assert list(store.keys()) == [REQUESTS[1], REQUESTS[0], REQUESTS[2], REQUESTS[3]]
        store.append([make(*REQUESTS[4])])
    expected = [REQUESTS[1], REQUESTS[0], REQUESTS[2], REQUESTS[3], REQUESTS[4]]
    assert [trace.key for trace in read_traces(tmp_path)] == expected
    assert [trace.key for trace in read_traces(tmp_path, sealed_only=True)] == expected[:2]
    with TraceStore(tmp_path, PROVENANCE) as store:
        store.seal(store)
    assert [trace.key for trace in read_traces(tmp_path, sealed_only=True)] == expected
    assert not (tmp_path / "active.jsonl").exists()


def test_killed_at_twenty_random_moments_the_result_is_the_same(tmp_path: Path) -> None:
    command = [sys.executable, __file__, tmp_path / "clean", "0", "never"]
    clean = subprocess.run(command, capture_output=True, text=True, check=False)
    assert clean.returncode == 0, clean.stderr
    total = int(clean.stdout.split()[-1])
    expected = sealed_bytes(tmp_path / "clean")
    assert len(expected) == 2

    rng = random.Random(0)
    moments = [(step, rng.choice(["before", "after"])) for step in sorted(rng.sample(range(1, total + 1), 20))]
    for step, when in moments:
        folder = tmp_path / f"{step}"
        code, said = killed_writer(folder, step, when)
        assert code == -signal.SIGKILL, said
        acknowledged: set[tuple[str, int]] = set()
        for line in said:
            if not line.startswith(("sealing", "steps")):
                acknowledged |= {(name, int(sample)) for name, sample in (key.split("/") for key in line.split())}
        if acknowledged:
            assert acknowledged <= {trace.key for trace in read_traces(folder)}, (step, when)
        for budget in BUDGETS:
            fill(folder, budget, order=step)  # goes on in another order
        assert sealed_bytes(folder) == expected, (step, when)
        assert acknowledged <= {trace.key for trace in read_traces(folder)}, (step, when)
        found = {path.name for path in folder.iterdir()} - {"active.jsonl"}  # which has what no budget takes
        assert found == {*expected, "manifest.json", "lock"}, (step, when)


def test_a_torn_last_line_is_cut_off_and_nothing_else(tmp_path: Path) -> None:
    with TraceStore(tmp_path, PROVENANCE) as store:
        store.append(make(*key) for key in REQUESTS[:3])
    journal = tmp_path / "active.jsonl"
    whole = journal.read_bytes()
    last = whole[:-1].rfind(b"\n") + 1
    for cut in (last + 1, (last + len(whole)) // 2, len(whole) - 1):
        journal.write_bytes(whole[:cut])
        assert [trace.key for trace in read_traces(tmp_path)] == REQUESTS[:2]
        assert journal.read_bytes() == whole[:cut]  # reading only reads
        with TraceStore(tmp_path, PROVENANCE) as store:
            assert list(store.keys()) == REQUESTS[:2]
            assert journal.read_bytes() == whole[:last]
            store.append([make(*REQUESTS[2])])
        assert journal.read_bytes() == whole


def test_a_trace_in_journal_and_shard_counts_once(tmp_path: Path) -> None:
    with TraceStore(tmp_path, PROVENANCE) as store:
        store.append(make(*key) for key in REQUESTS[:3])
        journal = (tmp_path / "active.jsonl").read_bytes()
        store.seal([make(*REQUESTS[1])])
    # As after a kill between the shard's rename and the removal of the journal.
    (tmp_path / "active.jsonl").write_bytes(journal)
    order = [REQUESTS[1], REQUESTS[0], REQUESTS[2]]
    assert [trace.key for trace in read_traces(tmp_path)] == order
    with TraceStore(tmp_path, PROVENANCE) as store:
        assert list(store.keys()) == order
        assert len(store) == 3
        store.seal(make(*key) for key in order)
    assert [trace.key for trace in read_traces(tmp_path, sealed_only=True)] == order


def test_a_second_trace_of_a_key_is_refused(tmp_path: Path) -> None:
    with TraceStore(tmp_path, PROVENANCE) as store:
        store.append([make("q0", 0)])
        for batch in ([make("q1", 0), make("q0", 0)], [make("q1", 0), make("q1", 0)]):
            with pytest.raises(ValueError, match="stored already"):
                store.append(batch)
        store.seal([make("q0", 0)])
        with pytest.raises(ValueError, match="stored already"):
            store.append([make("q0", 0)])
        assert len(store) == 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": "d"}, f"model: expected 'd', found '{'a' * 64}'"),
        ({"sampling": PROVENANCE["sampling"] | {"temperature": 0.7}}, "sampling.temperature: expected 0.7, found 0.6"),
        ({"tokenizer": None, "seed": 1}, "seed: expected 1, found 0; tokenizer: expected None, "),
        ({"dtype": "bfloat16"}, "dtype: expected 'bfloat16', found no such field"),
        ({"questions": {}}, "questions.version: expected no such field, found 1"),
    ],
)
def test_another_provenance_is_refused(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    TraceStore(tmp_path, PROVENANCE).close()
    with pytest.raises(ValueError, match=sentence):
        TraceStore(tmp_path, PROVENANCE | change)
    TraceStore(tmp_path, PROVENANCE).close()  # the refused one holds no lock


def test_equal_numbers_are_equal_settings(tmp_path: Path) -> None:
    with TraceStore(tmp_path, {"temperature": 1}) as store:
        store.append([make()])
        store.seal([make()])
    with TraceStore(tmp_path, {"temperature": 1.0}) as store:
        assert len(store) == 1


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    script = (
        "import sys; from secateurs.traces import TraceStore\n"
        "store = TraceStore(sys.argv[1], {}); print('open', flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, tmp_path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(ValueError, match=f"process {other.pid} is writing this trace store"):
            TraceStore(tmp_path, {})
        assert read_traces(tmp_path) == []
        other.kill()
    with TraceStore(tmp_path, {}), pytest.raises(ValueError, match=f"process {os.getpid()} is writing"):
        TraceStore(tmp_path, {})


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write

    def write_half(descriptor: int, content: memoryview) -> int:
        if len(content) < 200:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, content[: len(content) // 2])

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with TraceStore(tmp_path, PROVENANCE) as store:
        store.append([make("q0", 0)])
        before = (tmp_path / "active.jsonl").read_bytes()
        for name, broken in (("write", write_half), ("fsync", fail)):
            with monkeypatch.context() as patch:
                patch.setattr(os, name, broken)
                with pytest.raises(OSError, match="No space left"):
                    store.append([make("q1", 0), make("q2", 0)])
            assert (tmp_path / "active.jsonl").read_bytes() == before
            assert list(store.keys()) == [("q0", 0)]
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write_half)
            with pytest.raises(OSError, match="No space left"):
                store.seal([make("q0", 0)])
        assert sealed_bytes(tmp_path) == {}
        assert read_traces(tmp_path) == [make("q0", 0)]
        store.append([make("q1", 0)])  # and when there is room again, all goes on
        store.seal([make("q0", 0), make("q1", 0)])
    assert read_traces(tmp_path) == [make("q0", 0), make("q1", 0)]


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    """A store with two shards and two traces in the journal."""
    with TraceStore(tmp_path, PROVENANCE) as store:
        for number in range(2):
            batch = [make(*key) for key in REQUESTS[3 * number : 3 * number + 3]]
            store.append(batch)
            store.seal(batch)
        store.append(make(*key) for key in REQUESTS[6:8])
    return tmp_path


def assert_refused(folder: Path, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as read:
        read_traces(folder)
    assert "\n" not in str(read.value)
    with pytest.raises(ValueError, match=sentence):
        TraceStore(folder, PROVENANCE)


@pytest.mark.parametrize("line", [b"{", b"[1]", b"\xff", b"", b'{"question_id": "q"}'])
def test_a_bad_line_inside_the_journal_is_named(sealed: Path, line: bytes) -> None:
    journal = sealed / "active.jsonl"
    lines = journal.read_bytes().split(b"\n")
    journal.write_bytes(b"\n".join([lines[0], line, *lines[1:]]))
    assert_refused(sealed, r"active\.jsonl:2: not a trace")


def test_a_damaged_shard_is_named(sealed: Path) -> None:
    shard = sealed / "traces-00001.parquet"
    content = shard.read_bytes()
    flipped = bytearray(content)
    flipped[content.index(REQUESTS[3][0].encode())] ^= 4  # in a data page: only the checksum can tell
    for damaged in (content[: len(content) // 2], b"", bytes(flipped), b"PAR1" * 10):
        shard.write_bytes(damaged)
        assert_refused(sealed, r"traces-00001\.parquet: damaged")
    shard.write_bytes(content)
    (sealed / "traces-00000.parquet").unlink()
    assert_refused(sealed, r"traces-00000\.parquet: this shard is missing")


def test_a_shard_from_elsewhere_is_named(sealed: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    shard = sealed / "traces-00001.parquet"
    shard.write_bytes((sealed / "traces-00000.parquet").read_bytes())
    assert_refused(sealed, r"traces-00001\.parquet: question 'q0' sample 0 is in a shard before it")
    other = tmp_path_factory.mktemp("other")
    with TraceStore(other, PROVENANCE | {"seed": 1}) as store:
        store.append([make("q9", 0)])
        store.seal([make("q9", 0)])
    shard.write_bytes((other / "traces-00000.parquet").read_bytes())
    assert_refused(sealed, r"traces-00001\.parquet: this shard belongs to a store with other settings")

    import pandas

    pandas.DataFrame({"x": [1]}).to_parquet(shard)
    assert_refused(sealed, r"traces-00001\.parquet: the columns are not those")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, r"manifest\.json: no such file"),
        ('{"schema": 2, "provenance": {}}', r"manifest\.json: found schema 2"),
        ("[]", r"manifest\.json: a trace store's manifest"),
        ("{", r"manifest\.json:1: not valid JSON"),
    ],
)
def test_a_bad_manifest_is_named(sealed: Path, content: str | None, sentence: str) -> None:
    (sealed / "manifest.json").unlink()
    if content is not None:
        (sealed / "manifest.json").write_text(content)
    assert_refused(sealed, sentence)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a trace store"):
        read_traces(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="this is a file"):
        TraceStore(tmp_path / "file", PROVENANCE)


def test_seconds_add_up_over_runs(tmp_path: Path) -> None:
    for _ in range(2):
        with TraceStore(tmp_path, PROVENANCE) as store:
            store.add_seconds(1.5)
    assert store.seconds == 3.0
    assert read_json(tmp_path / "timing.json") == {"seconds": 3.0}


def shards_of(tmp_path: Path, count: int = 3) -> list[Path]:
    """What `count` machines leave that took every third request each."""
    folders = [tmp_path / f"shard-{number}" for number in range(count)]
    for number, folder in enumerate(folders):
        with TraceStore(folder, PROVENANCE) as store:
            store.append(make(*key, completion=20 + 10 * key[1]) for key in REQUESTS[number::count])
            store.add_seconds(2.0)
            if number == 1:  # one of them was used by itself
                store.seal(store)
    return folders


def test_merged_shards_are_the_store_of_one_machine(tmp_path: Path) -> None:
    fill(tmp_path / "alone", 500)
    shards = shards_of(tmp_path)
    merged = tmp_path / "merged"
    assert merge_stores(merged, shards[:1]) == {"added": len(REQUESTS) // 3, "already": 0}
    assert merge_stores(merged, shards) == {"added": 2 * len(REQUESTS) // 3, "already": len(REQUESTS) // 3}
    assert merge_stores(merged, shards[1:]) == {"added": 0, "already": 2 * len(REQUESTS) // 3}
    with TraceStore(merged, PROVENANCE) as store:
        assert store.seconds == 6.0
        store.seal(store.prefix(REQUESTS, 500)[0])
    assert sealed_bytes(merged) == sealed_bytes(tmp_path / "alone")


def test_a_shard_that_has_grown_brings_the_seconds_of_what_is_new(tmp_path: Path) -> None:
    (shard,) = shards_of(tmp_path, 1)
    merge_stores(tmp_path / "merged", [shard])
    with TraceStore(shard, PROVENANCE) as store:
        store.append([make("new", completion=sum(len(trace.completion_ids) for trace in store))])
        store.add_seconds(4.0)
    merge_stores(tmp_path / "merged", [shard])
    with TraceStore(tmp_path / "merged", PROVENANCE) as store:
        assert store.seconds == 2.0 + 6.0 / 2


def test_conflicts_and_other_settings_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    first, second, third = shards_of(tmp_path)
    other = make(*REQUESTS[0], completion=33)
    with TraceStore(second, PROVENANCE) as store:
        store.append([other])
    merged = tmp_path / "merged"
    with pytest.raises(
        ValueError, match=rf"1 requests .*question 'q0' sample 0 in {first} and in {second}.*--keep-first"
    ):
        merge_stores(merged, [first, second])
    assert not merged.exists()
    merge_stores(merged, [second, first], keep_first=True)
    assert other in read_traces(merged) and len(read_traces(merged)) == 2 * len(REQUESTS) // 3
    with TraceStore(tmp_path / "elsewhere", PROVENANCE | {"seed": 1}) as store:
        store.append([make("q9")])
    with pytest.raises(ValueError, match="seed: expected 0, found 1"):
        merge_stores(merged, [third, tmp_path / "elsewhere"])
    assert len(read_traces(merged)) == 2 * len(REQUESTS) // 3
    with pytest.raises(ValueError, match="not a trace store"):
        merge_stores(merged, [tmp_path / "nowhere"])


def loop_by_definition(ids: tuple[int, ...], max_period: int) -> bool:
    for period in range(1, max_period + 1):
        length = max(4 * period, 64)
        if length <= len(ids):
            start = len(ids) - length
            if all(ids[i] == ids[i + period] for i in range(start, len(ids) - period)):
                return True
    return False


def test_looping_is_as_defined() -> None:
    rng = random.Random(0)
    found = 0
    for _ in range(400):
        period = rng.randrange(1, 30)
        unit = tuple(rng.randrange(3) for _ in range(period))
        ids = tuple(rng.randrange(3) for _ in range(rng.randrange(40))) + unit * rng.randrange(1, 8)
        ids = ids[: len(ids) - rng.randrange(3)]
        assert looping(ids, 24) == loop_by_definition(ids, 24)
        found += looping(ids, 24)
    assert 50 < found < 350


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ((), False),
        ((7,) * 63, False),
        ((7,) * 64, True),
        (tuple(range(500)), False),
        (tuple(range(100)) * 4, True),
        (tuple(range(100)) * 3, False),
        (tuple(range(512)) * 4, True),
        (tuple(range(513)) * 5, False),
        ((7,) * 1000 + (8,), False),  # it got out of the loop
    ],
)
def test_looping_at_its_limits(ids: tuple[int, ...], expected: bool) -> None:
    assert looping(ids) is expected


def test_filters_count_what_each_dropped() -> None:
    loop = (1, 2, 3) * 30
    traces = [
        make("a", 0, reward=1.0),
        make("b", 0, reward=0.0),
        make("c", 0, reward=None),
        make("d", 0, completion=9, reward=1.0),
        make("e", 0, completion=101, reward=1.0),
        make("f", 0, finish="length", reward=1.0),
        make("g", 0, completion_ids=loop, reward=1.0),
        make("h", 0, completion_ids=(*loop, 99), reward=1.0),
        make("a", 1, reward=1.0, completion_ids=make("a", 0).completion_ids),
        make("z", 0, reward=1.0, completion_ids=make("a", 0).completion_ids),
        make("b", 1, reward=1.0, completion_ids=make("b", 0).completion_ids),  # its twin is not kept
    ]
    spec: dict[str, bool | int | float] = {
        "distinct": True,
        "max_solved": 1.0,
        "correct": True,
        "min_tokens": 10,
        "max_tokens": 100,
        "finished": True,
        "not_looping": True,
    }
    assert set(spec) == set(FILTERS)
    kept, dropped = apply_filters(traces, spec)
    assert [trace.key for trace in kept] == [("a", 0), ("z", 0), ("b", 1)]
    assert dropped == {
        "finished": 1,
        "min_tokens": 1,
        "max_tokens": 1,
        "max_solved": 0,
        "correct": 2,
        "not_looping": 2,
        "distinct": 1,
    }
    assert apply_filters(traces, dict(reversed(spec.items()))) == (kept, dropped)
    assert apply_filters(traces, {}) == (traces, {})
    assert apply_filters(traces, {"correct": False}) == (traces, {})
    assert apply_filters(traces, {"min_tokens": 0}) == (traces, {"min_tokens": 0})
    # A trace cut off in the middle is no end marker's business: the last id counts.
    cut = make("h", 0, completion_ids=(*loop, 99), finish="length")
    assert apply_filters([cut], {"not_looping": True}) == ([cut], {"not_looping": 0})


def test_hard_questions_that_were_solved_are_found_by_all_their_samples() -> None:
    """Question a is solved every time, b once in four, c never; one sample of d is all there is."""
    traces = [make("a", n, reward=1.0) for n in range(4)]
    traces += [make("b", n, reward=float(n == 2)) for n in range(4)]
    traces += [make("c", n, reward=0.0) for n in range(4)] + [make("d", 0, reward=1.0)]
    kept, dropped = apply_filters(traces, {"max_solved": 0.5, "correct": True})
    assert [trace.key for trace in kept] == [("b", 2)]
    assert dropped == {"max_solved": 5, "correct": 7}
    assert [t.question_id for t in apply_filters(traces, {"max_solved": 0.25})[0]] == ["b"] * 4 + ["c"] * 4
    assert len(apply_filters(traces, {"max_solved": 0.0})[0]) == 4


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ({"max_solved": 1}, "must be a share of a question's samples from 0.0 to 1.0"),
        ({"max_solved": 1.5}, "must be a share of a question's samples"),
        ({"corect": True}, "unknown trace filter `corect`.*`correct`"),
        ({"correct": 1}, "must be true or false"),
        ({"min_tokens": True}, "must be a number of completion tokens"),
        ({"max_tokens": -1}, "must be a number of completion tokens"),
        ({"min_tokens": 10, "max_tokens": 9}, "no trace can pass"),
    ],
)
def test_a_bad_filter_is_named(spec: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        apply_filters([], spec)


def test_no_torch_is_needed() -> None:
    script = "import sys; import secateurs.traces; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
