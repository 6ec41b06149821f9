"""What a model generated, as exact ids, in a store that survives `kill -9` and stops at a token budget. No torch.

A store is a folder:

    manifest.json           schema and provenance (model, tokenizer, question set, sampling, seed); written first
    traces-00000.parquet    sealed shards: the traces a budget keeps, in request order; they never change again
    active.jsonl            journal of traces not sealed yet, in the order they were finished
    timing.json             seconds spent generating; no part of the result
    lock                    held by the one process that writes

The journal is text lines because an append of whole lines plus fsync loses nothing that was acknowledged: a kill can
only tear the last line, and that is cut off on the next open. Parquet cannot be appended to, but it is right for what
is finished: ids stay exact int32, zstd makes them a third of the JSON or less, pages carry checksums, and pandas,
datasets and duckdb read it without this package. A shard appears by one rename and the journal goes only afterwards;
a kill in between leaves traces in both, and then the sealed copy counts.

Which traces are kept depends on the order of the requests and on the budget, never on which request finished first,
so an interrupted run and an uninterrupted one seal the same bytes (with one version of pyarrow, which signs its
files).
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, KeysView, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from secateurs.artifacts import (
    atomic_write,
    canonical_hash,
    canonical_json,
    fsync_path,
    lock,
    read_json,
    sweep_temp,
    write_all,
    write_json,
)
from secateurs.questions import unknown_name

SCHEMA_VERSION = 1
Key = tuple[str, int]

_IDS = pa.list_(pa.field("element", pa.int32(), nullable=False))
_SCHEMA = pa.schema(
    [
        pa.field("question_id", pa.string(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("prompt_ids", _IDS, nullable=False),
        pa.field("completion_ids", _IDS, nullable=False),
        pa.field("think_tokens", pa.int32(), nullable=False),
        pa.field("think_closed", pa.bool_(), nullable=False),
        pa.field("finish", pa.string(), nullable=False),
        pa.field("reward", pa.float64(), nullable=True),
        pa.field("seed", pa.int64(), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """One generated record: the exact ids that went in and came out, and where the thinking ends.

    `completion_ids[:think_tokens]` is the think region, with its closing marker; the rest is the answer.
    `think_closed` says whether that marker was produced (True for a model without markers). `finish` is "length" for
    a trace cut off at the token limit. `reward` is None until someone scores it. ValueError if a field cannot be
    right.
    """

    question_id: str
    sample: int
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    think_tokens: int
    think_closed: bool
    finish: Literal["eos", "length"]
    reward: float | None
    seed: int

    def __post_init__(self) -> None:
        if type(self.question_id) is not str or not self.question_id:
            raise ValueError(f"question_id is {self.question_id!r}; it must be text")
        for name, limit in (("sample", 2**31), ("think_tokens", len(self.completion_ids) + 1), ("seed", 2**63)):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < limit:
                raise ValueError(f"{name} is {value!r}; it must be a whole number from 0 to {limit - 1}")
        for name in ("prompt_ids", "completion_ids"):
            ids = getattr(self, name)
            # Plain ints only: a tensor element or numpy integer compares equal but cannot be written down.
            if type(ids) is not tuple or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
                raise ValueError(f"{name} must be a tuple of token ids, ints from 0 to {2**31 - 1}")
        if type(self.think_closed) is not bool:
            raise ValueError(f"think_closed is {self.think_closed!r}; it must be True or False")
        if self.finish not in ("eos", "length"):
            raise ValueError(f"finish is {self.finish!r}; it must be 'eos' or 'length'")
        if self.reward is not None and (type(self.reward) not in (int, float) or not math.isfinite(self.reward)):
            raise ValueError(f"reward is {self.reward!r}; it must be a finite number or None")

    @property
    def key(self) -> Key:
        """(question_id, sample): what a store knows a trace by."""
        return self.question_id, self.sample

    @property
    def tokens(self) -> int:
        """Prompt and completion together: what counts against a token budget."""
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def regions(self) -> tuple[tuple[str, int, int], ...]:
        """(region, start, stop) over prompt + completion, in order, without empty regions."""
        prompt = len(self.prompt_ids)
        cuts = (0, prompt, prompt + self.think_tokens, self.tokens)
        spans = zip(("prompt", "think", "answer"), cuts[:-1], cuts[1:], strict=True)
        return tuple((region, start, stop) for region, start, stop in spans if start < stop)


class TraceStore:
    """The traces of one run in a folder, each (question_id, sample) once; the module docstring says what is on disk.

    ValueError if another process writes the folder, if it was made with another provenance, or if a file in it is
    damaged. `provenance` is any `canonical_json` value of nested dicts. Use it as a context manager, or call `close`.
    All traces are held in memory, about 40 bytes a token. One thread at a time.
    """

    def __init__(self, folder: Path | str, provenance: Mapping[str, object]) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder}: this is a file; a trace store is a folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._journal: int | None = None  # descriptor of active.jsonl, open from the first append to the next seal
        self._lock: int | None = lock(self.folder, "trace store")
        try:
            sweep_temp(self.folder)
            expected = json.loads(canonical_json(dict(provenance)))
            if not _manifest_path(self.folder).exists() and not _has_traces(self.folder):
                write_json(_manifest_path(self.folder), {"schema": SCHEMA_VERSION, "provenance": expected})
            self.provenance = read_provenance(self.folder)
            _check_provenance(self.folder, expected=expected, found=self.provenance)
            _cut_torn_line(_journal_path(self.folder))
            self._active = _read_journal(_journal_path(self.folder))
            self._sealed, self._num_shards = _read_shards(self.folder, self.provenance)
            for key in self._sealed:
                self._active.pop(key, None)
            self.seconds: float = _read_seconds(self.folder)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the folder. What was appended is on disk already."""
        if self._journal is not None:
            os.close(self._journal)
            self._journal = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> "TraceStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._sealed) + len(self._active)

    def __iter__(self) -> Iterator[Trace]:
        yield from self._sealed.values()
        yield from self._active.values()

    def __contains__(self, key: Key) -> bool:
        return key in self._sealed or key in self._active

    def keys(self) -> KeysView[Key]:
        """(question_id, sample) of every stored trace, sealed ones first."""
        return (self._sealed | self._active).keys()

    def get(self, question_id: str, sample: int) -> Trace | None:
        """The stored trace, or None."""
        key = (question_id, sample)
        return self._sealed.get(key) or self._active.get(key)

    @property
    def num_tokens(self) -> int:
        """Tokens of all stored traces, sealed or not."""
        return sum(trace.tokens for trace in self)

    def append(self, traces: Iterable[Trace]) -> None:
        """Add a batch; it is on disk when this returns. ValueError, and nothing is added, if one is stored already.

        If the disk is full the OSError goes on to the caller and the journal is cut back to what it held before.
        """
        assert self._lock is not None, "the store is closed"
        batch: dict[Key, Trace] = {}
        for trace in traces:
            if trace.key in self or trace.key in batch:
                raise ValueError(
                    f"{self.folder}: question {trace.question_id!r} sample {trace.sample} is stored already"
                )
            batch[trace.key] = trace
        path = _journal_path(self.folder)
        if self._journal is None:
            self._journal = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            fsync_path(self.folder)
        size = os.fstat(self._journal).st_size
        try:
            write_all(self._journal, b"".join(_to_line(trace) for trace in batch.values()))
            os.fsync(self._journal)
        except BaseException:
            os.ftruncate(self._journal, size)
            raise
        self._active |= batch

    def prefix(self, requests: Iterable[Key], num_tokens: int) -> tuple[list[Trace], bool]:
        """The fewest stored traces from the start of `requests` with at least `num_tokens`, and whether it got there.

        It ends early, with False, at the first request that is not stored or when the requests are used up. At most
        the last trace overshoots the budget. ValueError if a request comes twice.
        """
        kept: dict[Key, Trace] = {}
        total = 0
        for question_id, sample in requests:
            if total >= num_tokens:
                break
            if (question_id, sample) in kept:
                raise ValueError(f"question {question_id!r} sample {sample} is requested twice")
            trace = self.get(question_id, sample)
            if trace is None:
                break
            kept[trace.key] = trace
            total += trace.tokens
        return list(kept.values()), total >= num_tokens

    def seal(self, keep: Iterable[Trace]) -> None:
        """Write those of `keep` not sealed yet, in this order, as the next shard; the others stay in the journal.

        `keep` comes from `prefix`. A later, larger budget seals a further shard, also of what is in the journal now.
        ValueError if a trace is not in the store.
        """
        assert self._lock is not None, "the store is closed"
        shard: dict[Key, Trace] = {}
        for trace in keep:
            if self.get(*trace.key) != trace:
                raise ValueError(
                    f"{self.folder}: question {trace.question_id!r} sample {trace.sample} is not stored here"
                )
            if trace.key not in self._sealed:
                shard[trace.key] = trace
        if shard:
            atomic_write(_shard_path(self.folder, self._num_shards), _to_parquet(shard.values(), self.provenance))
            self._num_shards += 1
            self._sealed |= shard
        if self._journal is not None:
            os.close(self._journal)
            self._journal = None
        self._active = {key: trace for key, trace in self._active.items() if key not in shard}
        if self._active:
            atomic_write(_journal_path(self.folder), b"".join(map(_to_line, self._active.values())))
        else:
            _journal_path(self.folder).unlink(missing_ok=True)
            fsync_path(self.folder)

    def add_seconds(self, seconds: float) -> None:
        """Add to the time spent generating, over all runs of this store."""
        assert self._lock is not None, "the store is closed"
        write_json(_timing_path(self.folder), {"seconds": self.seconds + seconds})
        self.seconds += seconds


def merge_stores(into: Path | str, shards: Sequence[Path | str], *, keep_first: bool = False) -> dict[str, int]:
    """Bring the traces of `shards`, stores of one provenance that several machines wrote, into one store, unsealed.

    Returns how many were "added" and how many were there "already". ValueError, and nothing is written, if a shard was
    made with other settings, or if two stores answer one request differently, with the first five named; `keep_first`
    lets the store that is named first win, `into` before all. Merging twice changes nothing. A store's seconds come
    along by the share of its tokens that is added.
    """
    if not shards:
        raise ValueError("no trace store to merge: name at least one")
    provenance = read_provenance(shards[0])
    for shard in shards[1:]:
        _check_provenance(Path(shard), expected=provenance, found=read_provenance(shard))
    there = read_traces(into) if _manifest_path(Path(into)).exists() else []
    holder = {trace.key: (Path(into), trace) for trace in there}
    fresh: dict[Key, Trace] = {}
    conflicts: list[str] = []
    already, seconds = 0, 0.0
    for shard in shards:
        tokens = added = 0
        for trace in read_traces(shard):
            tokens += len(trace.completion_ids)
            where, held = holder.setdefault(trace.key, (Path(shard), trace))
            if held is trace:
                fresh[trace.key] = trace
                added += len(trace.completion_ids)
            elif held == trace or keep_first:
                already += 1
            else:
                conflicts.append(f"question {trace.question_id!r} sample {trace.sample} in {where} and in {shard}")
        seconds += _read_seconds(Path(shard)) * added / max(tokens, 1)
    if conflicts:
        raise ValueError(
            f"{len(conflicts)} requests are answered differently: {'; '.join(conflicts[:5])}"
            f"{', ...' if len(conflicts) > 5 else ''}. Leave a store out, or let the first named win: --keep-first"
        )
    with TraceStore(into, provenance) as store:
        store.append(fresh.values())
        store.add_seconds(seconds)
    return {"added": len(fresh), "already": already}


def read_traces(folder: Path | str, *, sealed_only: bool = False) -> list[Trace]:
    """Every trace in a store, sealed ones first in request order; needs no lock, also while another process writes.

    `sealed_only` leaves out what is still in the journal, whose order and extent depend on timing. ValueError names
    the file, and in the journal the line, that is missing or damaged.
    """
    folder = Path(folder)
    # Journal before shards: a seal between the two then shows traces in both, and not in neither.
    active = {} if sealed_only else _read_journal(_journal_path(folder))
    sealed, _ = _read_shards(folder, read_provenance(folder))
    return [*sealed.values(), *(trace for key, trace in active.items() if key not in sealed)]


def read_provenance(folder: Path | str) -> dict[str, Any]:
    """What a store says it was made with. ValueError if there is no manifest, or one this version cannot read."""
    path = _manifest_path(Path(folder))
    try:
        manifest = read_json(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file, so {folder} is not a trace store or has lost its manifest") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("provenance"), dict):
        raise ValueError(f"{path}: a trace store's manifest has `schema` and `provenance`")
    if manifest.get("schema") != SCHEMA_VERSION:
        found = manifest.get("schema")
        raise ValueError(f"{path}: found schema {found!r}, this version of secateurs reads {SCHEMA_VERSION}")
    return manifest["provenance"]


def _manifest_path(folder: Path) -> Path:
    return folder / "manifest.json"


def _journal_path(folder: Path) -> Path:
    return folder / "active.jsonl"


def _timing_path(folder: Path) -> Path:
    return folder / "timing.json"


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"traces-{number:05d}.parquet"


def _shard_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("traces-*.parquet"))


def _has_traces(folder: Path) -> bool:
    return _journal_path(folder).exists() or bool(_shard_paths(folder))


def _check_provenance(folder: Path, *, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    wanted, stored = _flat(expected), _flat(found)
    changes = "; ".join(
        f"{name}: expected {repr(wanted[name]) if name in wanted else 'no such field'}, "
        f"found {repr(stored[name]) if name in stored else 'no such field'}"
        for name in wanted | stored
        if name not in wanted or name not in stored or wanted[name] != stored[name]
    )
    if changes:
        raise ValueError(f"{folder}: this trace store was made with other settings ({changes}); use another folder")


def _flat(value: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested dicts as one with dotted names, so that a difference can be named."""
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= _flat(item, f"{above}{name}.") if isinstance(item, dict) and item else {f"{above}{name}": item}
    return flat


def _read_seconds(folder: Path) -> float:
    path = _timing_path(folder)
    if not path.exists():
        return 0.0
    timing = read_json(path)
    if not isinstance(timing, dict) or type(timing.get("seconds")) not in (int, float):
        raise ValueError(f"{path}: expected a number called `seconds`; delete the file to count from 0")
    return float(timing["seconds"])


def _to_line(trace: Trace) -> bytes:
    record = {field.name: getattr(trace, field.name) for field in fields(Trace)}
    return json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _from_record(record: object) -> Trace:
    """The Trace in a decoded row or line; ValueError if it is none."""
    if not isinstance(record, dict) or set(record) != set(_SCHEMA.names):
        raise ValueError(f"a trace has the fields {', '.join(_SCHEMA.names)}")
    if not isinstance(record["prompt_ids"], list) or not isinstance(record["completion_ids"], list):
        raise ValueError("prompt_ids and completion_ids must be lists")
    record["prompt_ids"], record["completion_ids"] = tuple(record["prompt_ids"]), tuple(record["completion_ids"])
    return Trace(**record)


def _cut_torn_line(path: Path) -> None:
    """Remove what follows the last newline: a line whose writer was killed, and which nobody was told is stored."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
        fsync_path(path)


def _read_journal(path: Path) -> dict[Key, Trace]:
    if not path.exists():
        return {}
    traces: dict[Key, Trace] = {}
    *lines, _torn = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            trace = _from_record(json.loads(line))
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors too
            raise ValueError(
                f"{path}:{number}: not a trace ({error}); delete this line and the trace is generated anew"
            ) from None
        traces.setdefault(trace.key, trace)
    return traces


def _shard_metadata(provenance: Mapping[str, Any]) -> dict[str, str]:
    return {"secateurs": canonical_json({"schema": SCHEMA_VERSION, "provenance": canonical_hash(dict(provenance))})}


def _to_parquet(traces: Iterable[Trace], provenance: Mapping[str, Any]) -> bytes:
    """The bytes of a shard; equal traces and provenance give equal bytes, so every writer option is fixed here."""
    rows = [{name: getattr(trace, name) for name in _SCHEMA.names} for trace in traces]
    table = pa.Table.from_pylist(rows, schema=_SCHEMA.with_metadata(_shard_metadata(provenance)))
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=1024,
        version="2.6",
        data_page_version="1.0",
        compression="zstd",
        compression_level=3,
        use_dictionary=True,
        write_page_checksum=True,
    )
    return sink.getvalue().to_pybytes()


def _read_shards(folder: Path, provenance: Mapping[str, Any]) -> tuple[dict[Key, Trace], int]:
    """Sealed traces in order, and the number of shards."""
    traces: dict[Key, Trace] = {}
    paths = _shard_paths(folder)
    for number, path in enumerate(paths):
        if path != _shard_path(folder, number):
            raise ValueError(f"{_shard_path(folder, number)}: this shard is missing, but {path.name} is there")
        for trace in _read_shard(path, provenance):
            if trace.key in traces:
                raise ValueError(
                    f"{path}: question {trace.question_id!r} sample {trace.sample} is in a shard before it too"
                )
            traces[trace.key] = trace
    return traces, len(paths)


def _read_shard(path: Path, provenance: Mapping[str, Any]) -> list[Trace]:
    content = path.read_bytes()
    try:
        table = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True).read(use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: damaged or not a Parquet file ({str(error).splitlines()[0]}); restore it from a copy, "
            "or delete it and all later shards and their traces are generated anew"
        ) from None
    if not table.schema.equals(_SCHEMA):
        raise ValueError(f"{path}: the columns are not those of a trace shard, which has {', '.join(_SCHEMA.names)}")
    if table.schema.metadata != _SCHEMA.with_metadata(_shard_metadata(provenance)).metadata:
        raise ValueError(f"{path}: this shard belongs to a store with other settings than {path.parent}")
    try:
        return [_from_record(row) for row in table.to_pylist()]
    except ValueError as error:
        raise ValueError(f"{path}: holds a row that is no trace ({error})") from None


Predicate = Callable[[Trace], bool]


def looping(ids: Sequence[int], max_period: int = 512) -> bool:
    """Whether `ids` ends in a loop: some period p <= `max_period` fills the last max(4 p, 64) ids, so 4 times or more.

    The default reaches loops of a whole paragraph, which reasoning models fall into more often than into short ones;
    a loop with a counter in it is not found. Cost: O(n p) at worst with n <= 4 `max_period`; most periods fail at the
    last id.
    """
    for period in range(1, max_period + 1):
        length = max(4 * period, 64)
        if length > len(ids):
            # `length` never shrinks as the period grows.
            return False
        if ids[-1] == ids[-1 - period]:
            tail = ids[-length:]
            if tail[period:] == tail[:-period]:
                return True
    return False


def ends_in_loop(trace: Trace) -> bool:
    """`looping`, whether or not the end marker, which is no part of the loop, stands behind it."""
    ids = trace.completion_ids
    return looping(ids) or (trace.finish == "eos" and looping(ids[:-1]))


@dataclass(frozen=True)
class Filter:
    """A reason to drop traces. `takes` is what its value must be, `allowed` says so in words.

    `keep(value, traces)` makes the test each of `traces` must pass. It may remember the traces it passed, so make a
    new one for each run.
    """

    takes: type[bool] | type[int] | type[float]
    allowed: str
    keep: Callable[[float, Sequence[Trace]], Predicate]


def _is_correct(trace: Trace) -> bool:
    return trace.reward is not None and trace.reward > 0


def _is_first_of_its_kind() -> Predicate:
    seen: set[tuple[str, tuple[int, ...]]] = set()

    def is_first(trace: Trace) -> bool:
        completion = (trace.question_id, trace.completion_ids)
        first = completion not in seen
        seen.add(completion)
        return first

    return is_first


def _is_hard(most: float, traces: Sequence[Trace]) -> Predicate:
    solved: dict[str, list[bool]] = {}
    for trace in traces:
        solved.setdefault(trace.question_id, []).append(_is_correct(trace))
    return lambda trace: sum(solved[trace.question_id]) <= most * len(solved[trace.question_id])


_SWITCH, _TOKENS = "true or false", "a number of completion tokens, 0 or more"

# In the order they are applied: a trace counts as dropped by the first it fails. `distinct` is last, so that it
# compares only with traces that are kept. `correct` drops unscored traces. `max_solved` needs several samples of a
# question; with `correct`, it keeps the right answers to questions that are hard for the model.
FILTERS: Mapping[str, Filter] = {
    "finished": Filter(bool, _SWITCH, lambda _, __: lambda trace: trace.finish == "eos"),
    "min_tokens": Filter(int, _TOKENS, lambda least, _: lambda trace: len(trace.completion_ids) >= least),
    "max_tokens": Filter(int, _TOKENS, lambda most, _: lambda trace: len(trace.completion_ids) <= most),
    "max_solved": Filter(float, "a share of a question's samples from 0.0 to 1.0", _is_hard),
    "correct": Filter(bool, _SWITCH, lambda _, __: _is_correct),
    "not_looping": Filter(bool, _SWITCH, lambda _, __: lambda trace: not ends_in_loop(trace)),
    "distinct": Filter(bool, _SWITCH, lambda _, __: _is_first_of_its_kind()),
}


def apply_filters(
    traces: Iterable[Trace], spec: Mapping[str, bool | int | float]
) -> tuple[list[Trace], dict[str, int]]:
    """The traces that pass, in order, and how many each filter of `spec` dropped.

    `spec` is for example {"correct": True, "max_tokens": 8192}; False switches a filter off, and the order of its
    names does not matter (see FILTERS). ValueError for an unknown name or a value of the wrong kind.
    """
    for name, value in spec.items():
        if name not in FILTERS:
            raise ValueError(unknown_name("trace filter", name, list(FILTERS)))
        takes = FILTERS[name].takes
        if type(value) is not takes or value < 0 or (takes is float and value > 1):
            raise ValueError(f"trace filter `{name}` is {value!r}; it must be {FILTERS[name].allowed}")
    if "min_tokens" in spec and "max_tokens" in spec and spec["min_tokens"] > spec["max_tokens"]:
        raise ValueError(
            f"min_tokens is {spec['min_tokens']}, above max_tokens {spec['max_tokens']}: no trace can pass"
        )
    traces = list(traces)
    tests = {name: FILTERS[name].keep(spec[name], traces) for name in FILTERS if spec.get(name, False) is not False}
    kept: list[Trace] = []
    dropped = dict.fromkeys(tests, 0)
    for trace in traces:
        failed = next((name for name, passes in tests.items() if not passes(trace)), None)
        if failed is None:
            kept.append(trace)
        else:
            dropped[failed] += 1
    return kept, dropped
