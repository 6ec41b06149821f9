"""How fast models run here, side by side: decoding, first token, memory, and seconds per correct answer.

Every model has a process of its own and the turns go round, so that a disturbance meets all of them; what is compared
are medians. A name is a folder, a packed folder or a hub id, with `@float32` or `@bfloat16` to compute in that type.
"""

import math
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from secateurs import kernels
from secateurs.ask import evaluation_questions, request_for, trace_of
from secateurs.engines import default_sampling
from secateurs.engines.hf import hf_engine, learned_positions
from secateurs.models import load_model, load_tokenizer
from secateurs.packed import RECORD
from secateurs.page import templates
from secateurs.parallel import MISTAKES, portable, settle, start
from secateurs.recipe import Recipe
from secateurs.runtime import PackedEmbedding, PackedLinear, load_packed
from secateurs.statistics import cost_ratio_interval, difference_interval, share_interval, sign_flip

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Speed:
    """Medians over the rounds, of one batch size and length of context. Tokens a second count those of all rows."""

    batch: int
    context: int
    first_token: float
    """Seconds to read the context and give a token for each row."""
    tokens_per_second: float
    """After that."""
    spread: float
    """Largest over smallest time of a round."""


@dataclass
class Quality:
    """Answers to a recipe's evaluation questions, one batch after the other, once or several times."""

    right: dict[str, float]
    """By question, of the first time; 1 for a right answer."""
    lengths: dict[str, int]
    """Tokens of these answers."""
    times: list[float]
    """Seconds of sampling, each time."""

    @property
    def correct(self) -> int:
        """Right answers."""
        return sum(score == 1 for score in self.right.values())

    @property
    def seconds(self) -> float:
        """The median."""
        return statistics.median(self.times)

    @property
    def seconds_per_correct(self) -> float | None:
        """What a right answer takes; None where there is none."""
        return self.seconds / self.correct if self.correct else None

    def costs(self) -> dict[str, tuple[float, float]]:
        """Seconds and right answers of every question, where the time is shared out by tokens."""
        each = self.seconds / max(sum(self.lengths.values()), 1)
        return {name: (each * self.lengths[name], score) for name, score in self.right.items()}

    def table(self, first: "Quality") -> dict[str, Any]:
        """What is shown of it beside the first model's, with 95 % intervals; None where no answer was right, or an
        interval has no end."""
        mine, base = self.seconds_per_correct, first.seconds_per_correct
        differences = {name: score - first.right[name] for name, score in self.right.items()}
        ends = cost_ratio_interval(first.costs(), self.costs())
        return {
            "questions": len(self.right), "correct": self.correct, "tokens": sum(self.lengths.values()),
            "seconds": self.seconds, "spread": max(self.times) / min(self.times),
            "interval": share_interval([self.right]),
            "points": sum(differences.values()) / len(differences),
            "points_interval": difference_interval([differences]), "p": sign_flip(list(differences.values())),
            "seconds_per_correct": mine, "of_first": mine / base if mine and base else None,
            "of_first_interval": [end if math.isfinite(end) else None for end in ends],
        }  # fmt: skip


@dataclass
class Row:
    """What was measured of one model."""

    model: str
    computes: str
    """The type of its arithmetic, and the kernels if it is packed."""
    weight_bytes: int
    peak_bytes: int = 0
    """Of its process, over what it had before it loaded the model."""
    load_seconds: float = 0.0
    speeds: list[Speed] = field(default_factory=list)
    quality: Quality | None = None


def path_and_type(name: str) -> tuple[str, str]:
    """What a model's name is made of; the type is "" where none is named, as in a folder that has an `@` itself."""
    path, mark, dtype = name.rpartition("@")
    return (path, dtype) if mark and not Path(name).is_dir() else (name, "")


def load_any(name: str, device: str = "cpu") -> tuple[PreTrainedModel, str]:
    """A model by its name on a device, and what it computes in. ValueError for an unknown type."""
    path, dtype = path_and_type(name)
    if dtype and dtype not in DTYPES:
        raise ValueError(f"{name}: unknown type `{dtype}`; there are {', '.join(DTYPES)}")
    if (Path(path) / RECORD).is_file():
        if dtype:
            raise ValueError(f"{name}: a packed model computes in the type of its kernels; leave out `@{dtype}`")
        model = load_packed(path, device)
        if any(isinstance(module, PackedLinear) for module in model.modules()):
            return model, f"{_type(model)}, {kernels.level_name(kernels.best_level())}"
        return model, f"{_type(model)}, made dense" + (", no compiled kernels" if model.device.type == "cpu" else "")
    model: Any = load_model(path, device=device)
    model = model.to(DTYPES[dtype]) if dtype else model
    return model, _type(model)


def _type(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def bench(
    models: Sequence[str],
    *,
    batches: Sequence[int] = (1, 4),
    contexts: Sequence[int] = (128,),
    new_tokens: int = 32,
    rounds: int = 3,
    threads: int = 0,
    device: str = "cpu",
    recipe: Recipe | None = None,
    asked: int = 1,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    keep: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Measure every model in turns, `rounds` times; with a recipe, ask each its evaluation questions, `asked` times.

    What a recipe asks is made ready before anything is timed, and each question is answered once a time.
    `threads` 0 is as many as torch takes. `keep` gets what is known after every round, as a bench may be stopped.
    ValueError for a model that cannot be loaded; RuntimeError if its process dies.
    """
    plain = map(path_and_type, models)
    named = [(os.path.abspath(path) if Path(path).exists() else path, dtype) for path, dtype in plain]
    if repeated := [models[at] for at, name in enumerate(named) if name in named[:at]]:
        raise ValueError(f"{repeated[0]} is named twice; to see the noise, name a copy (or a link) of it")
    if recipe and not recipe.evaluate.num_questions:
        raise ValueError("the recipe asks no questions (evaluate.num_questions is 0): leave it out, or ask some")
    if recipe and recipe.evaluate.samples > 1:
        raise ValueError(
            f"evaluate.samples is {recipe.evaluate.samples}, but a bench asks for one answer a question: set it to 1 "
            "(`asked` repeats them all)"
        )
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device is {device}, but there is no GPU that torch can use")
    threads = threads or torch.get_num_threads()
    shapes = list(dict.fromkeys((batch, context) for batch in batches for context in contexts))
    total = len(models) * (1 + rounds * (len(shapes) + 1) + 2 * asked * (recipe is not None))
    done = 0

    with ExitStack() as stack:
        workers: dict[str, Connection] = {}

        def ask(name: str, *what: Any) -> Any:
            nonlocal done
            workers[name].send(what)
            try:
                kind, content = workers[name].recv()
            except (EOFError, ConnectionResetError):
                raise RuntimeError(f"the process of {name} ended, perhaps for want of memory") from None
            if kind == "failed":
                raise content
            done += 1
            progress(done, total, name)
            return content

        rows: dict[str, Row] = {}
        taken: dict[tuple[str, int, int], list[tuple[float, float]]] = {}

        def known() -> list[Row]:
            for name, row in rows.items():
                row.speeds = [_speed(*shape, taken[name, *shape]) for shape in shapes]
                row.peak_bytes = ask(name, "peak")
            return list(rows.values())

        for name in models:
            workers[name], _ = start(stack, _serve, name, device, threads)
            rows[name] = Row(model=name, **ask(name, "load", recipe))
        for _ in range(rounds):
            for batch, context in shapes:
                for name in models:
                    times = ask(name, "decode", batch, context, new_tokens)
                    taken.setdefault((name, batch, context), []).append(times)
            keep(known())
        for _ in range(asked if recipe else 0):
            for name in models:
                found = ask(name, "answer", recipe)
                before = rows[name].quality
                rows[name].quality = (
                    Quality(before.right, before.lengths, before.times + found.times) if before else found
                )
            keep(known())
    return list(rows.values())


def _speed(batch: int, context: int, times: Sequence[tuple[float, float]]) -> Speed:
    """Medians of some rounds' seconds (to the first token, for one step)."""
    first, each = (statistics.median(column) for column in zip(*times, strict=True))
    steps = [step for _, step in times]
    return Speed(batch, context, first, batch / each, max(steps) / min(steps))


def machine(threads: int = 0, device: str = "cpu") -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.startswith("cuda") else {}
    return {
        **gpu, "cpu": cpu, "cores": os.cpu_count() or 1, "threads": threads or torch.get_num_threads(),
        "kernels": kernels.level_name(kernels.best_level()) if kernels.library() else "none",
        "torch": torch.__version__, "system": platform.system(),
    }  # fmt: skip


def table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as they are stored, with ratios to the first model: above 1 is faster. None: no answer was right."""
    first, found = rows[0], []
    for row in rows:
        data = asdict(row)
        for speed, mine, base in zip(data["speeds"], row.speeds, first.speeds, strict=True):
            speed["times_first"] = mine.tokens_per_second / base.tokens_per_second
        if row.quality and first.quality:
            data["quality"] = row.quality.table(first.quality)
        found.append(data)
    return found


def short(name: str) -> str:
    """A model's name for a narrow column: its folder, and not the one of all cells alike."""
    path, dtype = path_and_type(name)
    folder = Path(path)
    return (folder.parent.name if folder.name == "model" else folder.name) + (f"@{dtype}" if dtype else "")


def figure(value: float | None, digits: int = 2) -> str:
    """A number as it is shown; a dash for none."""
    return "-" if value is None else f"{value:.{digits}f}"


def span(ends: Sequence[float | None], times: float = 1, digits: int = 2) -> str:
    """An interval as it is shown."""
    shown = ["" if end is None else f"{times * end:.{digits}f}" for end in ends]
    return " to ".join(shown) if all(shown) else f"above {shown[0]}" if shown[0] else "-"


def to_html(result: dict[str, Any]) -> str:
    """What was measured (`table`, `machine`) as one page that needs nothing else."""
    rows, where = result["rows"], result["machine"]
    names = [{"name": short(row["model"]), "computes": row["computes"]} for row in rows]

    def bars(values: Sequence[float | None], ratios: Sequence[float | None], texts: Sequence[str]) -> list[Any]:
        longest = max((value for value in values if value), default=1.0)
        return [
            {**name, "share": round((value or 0) / longest, 3), "ratio": figure(ratio), "text": text}
            for name, value, ratio, text in zip(names, values, ratios, texts, strict=True)
        ]

    shapes = []
    for place, first in enumerate(rows[0]["speeds"]):
        every = [row["speeds"][place] for row in rows]
        speeds, ratios = [one["tokens_per_second"] for one in every], [one["times_first"] for one in every]
        title = f"{first['batch']} row{'s' if first['batch'] > 1 else ''} after {first['context']} tokens"
        spread = f"{max(one['spread'] for one in every):.2f}"
        shown = bars(speeds, ratios, [f"{speed:.1f}" for speed in speeds])
        shapes.append({"title": title, "spread": spread, "rows": shown})
    quality, note = [], ""
    if all(row["quality"] for row in rows):
        found = [row["quality"] for row in rows]
        texts = [
            f"{figure(one['seconds_per_correct'])} s ({one['correct']} of {one['questions']}: "
            f"{span(one['interval'], 100, 0)} %" + (f"; ratio {span(one['of_first_interval'])})" if place else ")")
            for place, one in enumerate(found)
        ]
        quality = bars([one["seconds_per_correct"] for one in found], [one["of_first"] for one in found], texts)
        questions = found[0]["questions"]
        note = f"{questions} questions. In brackets 95 %: of accuracy, and of the ratio, by resampling questions."
    fastest = max(rows, key=lambda row: row["speeds"][0]["tokens_per_second"])
    best = fastest["speeds"][0]
    headline = (
        f"{short(fastest['model'])} decodes fastest: {best['tokens_per_second']:.1f} tokens a second with "
        f"{shapes[0]['title']}, {best['times_first']:.2f} times as fast as {names[0]['name']}"
    )
    memory = [
        {
            "name": name["name"],
            "texts": [
                f"{row['weight_bytes'] / 1e6:,.0f} MB", f"{row['peak_bytes'] / 1e6:,.0f} MB",
                f"{row['load_seconds']:.1f} s", *(f"{one['first_token']:.2f} s" for one in row["speeds"]),
            ],
        }
        for name, row in zip(names, rows, strict=True)
    ]  # fmt: skip
    machine = f"{where.get('gpu', where['cpu'])}, {where['threads']} threads, torch {where['torch']}"
    return templates(autoescape=True).get_template("bench.html.j2").render(
        headline=headline, machine=machine, shapes=shapes, quality=quality, quality_note=note, memory=memory
    )  # fmt: skip


def _serve(pipe: Connection, name: str, device: str, threads: int, parent: int) -> None:
    """A process' life: what is asked of its model, until the parent is gone."""
    settle(threads, parent)
    bench = _Bench(name, device)
    while True:
        try:
            what, *args = pipe.recv()
        except EOFError:
            return
        try:
            with torch.inference_mode():
                pipe.send(("done", getattr(bench, what)(*args)))
        except MISTAKES as error:
            pipe.send(("failed", portable(error)))
        except Exception as error:  # whatever a family's code does here, the others' figures are kept, and it is named
            pipe.send(("failed", RuntimeError(f"{name}: {type(error).__name__}: {error}")))


class _Bench:
    """One model and what can be measured of it."""

    def __init__(self, name: str, device: str) -> None:
        self.name, self.device, self.before = name, device, _peak(device)
        self.model: Any = None

    def load(self, recipe: Recipe | None = None) -> dict[str, Any]:
        """Load it, and say what it is; before that, make ready what a recipe asks."""
        if recipe:
            self.tokenizer = load_tokenizer(path_and_type(self.name)[0])
            self.questions, asked = evaluation_questions(recipe, recipe.seed)
            self.asked = {request_for(one, 0, self.tokenizer, self.questions, recipe.seed): one for one in asked}
        clock = time.perf_counter()
        self.model, computes = load_any(self.name, self.device)
        self._wait()
        seconds = time.perf_counter() - clock
        stored = {tensor.data_ptr(): tensor.nbytes for tensor in _weights(self.model)}  # tied ones are one
        return {"computes": computes, "weight_bytes": sum(stored.values()), "load_seconds": seconds}

    def decode(self, batch: int, context: int, new_tokens: int) -> tuple[float, float]:
        """Seconds to the first token, and for each one after it, greedily, after random ids."""
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
        ids = torch.randint(0, vocabulary, (batch, context), generator=generator).to(self.device)
        most = learned_positions(self.model)
        if most is not None and context + new_tokens + 2 > most:
            raise ValueError(
                f"{self.name} has {most} positions: too few for {context} tokens and {new_tokens + 2} after them"
            )
        cache = DynamicCache(config=self.model.config)  # so that a window, or a linear attention, is what it is
        clock = time.perf_counter()
        ids = self._next(ids, cache)
        self._wait()
        first = time.perf_counter() - clock
        ids = self._next(ids, cache)  # whatever is slow once
        self._wait()
        clock = time.perf_counter()
        for _ in range(new_tokens):
            ids = self._next(ids, cache)
        self._wait()
        return first, (time.perf_counter() - clock) / new_tokens

    def _wait(self) -> None:
        """Until a GPU has done what it was given."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)

    def _next(self, ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    def answer(self, recipe: Recipe) -> Quality:
        """Ask the evaluation questions of the recipe that it was loaded with."""
        overrides = (recipe.evaluate.sampling or recipe.traces.sampling).model_dump()
        sampling = default_sampling(self.model.generation_config, **overrides)
        engine = hf_engine(self.model, self.tokenizer, recipe.resources.batch_size)
        clock = time.perf_counter()
        done = list(engine.generate(self.asked, sampling))
        seconds = time.perf_counter() - clock
        traces = [trace_of(one, self.tokenizer, self.questions, self.asked[one.request]) for one in done]
        return Quality(
            {trace.question_id: float(trace.reward == 1) for trace in traces},
            {trace.question_id: len(trace.completion_ids) for trace in traces},
            [seconds],
        )

    def peak(self) -> int:
        """Memory at its highest, above what there was before the model."""
        return max(_peak(self.device) - self.before, 0)


def _weights(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from (*model.parameters(), *model.buffers())
    for module in model.modules():
        if isinstance(module, PackedLinear):
            yield from module.matrix.tensors.values()
        elif isinstance(module, PackedEmbedding):
            yield module.table


def _peak(device: str) -> int:
    """Bytes of this process at its highest, in the memory of the device."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
