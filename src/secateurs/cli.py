"""The command line: parsing, progress bars and error sentences. Each command is one call elsewhere."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table

app = typer.Typer(
    help="Prune reasoning language models on their own chain of thought.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(stderr=True)
EVERY = 60.0  # seconds between lines of progress where there is no terminal
INTERRUPTED = 130  # the exit code, 128 + SIGINT as shells have it

RecipeName = Annotated[
    str, typer.Argument(help="A TOML file, or the name of a shipped recipe (`secateurs list recipes`).")
]
Out = Annotated[Path, typer.Option("--out", help="Folder for everything this command writes.")]
Set = Annotated[list[str], typer.Option("--set", help="Override a recipe value: key.sub=value, any number of times.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable result on standard output.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan with its estimates and stop.")]


class Bars:
    """A run's progress: one line a stage at work, with an estimate of what is left; in a log at most one a minute."""

    def __init__(self, bars: Progress, lines: int) -> None:
        self.bars, self.lines = bars, lines
        self.said = time.monotonic()
        self.tasks: dict[str, Task] = {}  # in the order they last moved

    def __call__(self, stage: str, done: float, total: float, unit: str) -> None:
        """Move a stage's bar; a new stage beyond `lines` takes the place of the one that moved longest ago, and one
        that goes back has begun anew, with another speed."""
        if stage in self.tasks and done < self.tasks[stage].completed:
            self.bars.remove_task(self.tasks.pop(stage).id)
        if stage not in self.tasks and len(self.tasks) == self.lines:
            self.bars.remove_task(self.tasks.pop(next(iter(self.tasks))).id)
        if stage not in self.tasks:
            new = self.bars.add_task(stage, total=total or None)
            (self.tasks[stage],) = (one for one in self.bars.tasks if one.id == new)
        mine = self.tasks[stage] = self.tasks.pop(stage)
        self.bars.update(mine.id, completed=done, total=total or None)
        if self.bars.disable and time.monotonic() - self.said >= EVERY:
            self.said = time.monotonic()
            left = "" if mine.time_remaining is None else f", {timedelta(seconds=int(mine.time_remaining))} left"
            of = f" of {total:,.0f}" if total else ""
            console.print(f"{stage}: {done:,.0f}{of} {unit}{left}", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _bars(lines: int = 1) -> Iterator[Bars]:
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    log = not console.is_terminal  # where a bar moves once in a long while, and what is left goes by all of them
    with Progress(
        *columns, console=console, transient=True, disable=log, speed_estimate_period=10**5 if log else 30
    ) as bars:
        yield Bars(bars, lines)


def _words(value: Any) -> str:
    """A value of a plan, for people."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(one)}" for name, one in value.items())
    return f"{value:,}" if isinstance(value, (int, float)) else str(value)


def _plan(dense: Any, as_json: bool) -> None:
    from secateurs.preview import estimate, plan_check

    plan = plan_check(dense.recipe, dense)
    times = estimate(dense.recipe, dense, plan)
    plan["seconds_estimate"] = {stage: round(seconds, 1) for stage, seconds in times.items()} or None
    if as_json:
        print(json.dumps(plan, indent=2))
        return
    plan["seconds_estimate"] = plan["seconds_estimate"] or "none, as the whole model has no room here"
    table = Table(show_header=False, title="plan (nothing was run)")
    memory = _megabytes(plan.pop("memory_bytes"))
    for name, value in plan.items():
        table.add_row(name.replace("_", " "), _words(value))
    table.add_row("memory of a prune, MB (estimate)", _words(memory))
    Console().print(table)


def _megabytes(memory: dict[str, int]) -> dict[str, int]:
    return {name.replace("_", " "): round(size / 1e6) for name, size in memory.items()}


def _memory(plan: dict[str, Any]) -> None:
    """Print what pruning will hold, before it begins."""
    memory = _megabytes(plan["memory_bytes"])
    hidden, taken, free = (memory.pop(name) for name in ("hidden", "on device", "free"))
    processes = plan["processes"]
    each = f" in each of {processes} processes" if processes > 1 else ""
    place = {"device": "beside it", "cpu": "on the CPU", "disk": "on disk"}[plan["hidden_states"]]
    said = (
        f"memory of a prune, estimated: {taken:,} MB{each} ({_words(memory)}), {hidden:,} MB of hidden states {place}"
    )
    console.print(f"{said}; {free:,} MB are free", highlight=False, soft_wrap=True)
    if (taken + (hidden if plan["hidden_states"] == "device" else 0)) * processes > free:
        console.print("[bold red]that is more than is free[/]: docs/scale.md says what takes less", highlight=False)


def _show(report: Any, out: Path, as_json: bool) -> None:
    from secateurs import page
    from secateurs.report import to_json

    if as_json:
        print(to_json(report))
        return
    screen = Console(width=None if sys.stdout.isatty() else 120)  # a pipe or a log has no width of its own
    screen.print(page.console_table(report))
    screen.print(page.headline(report))
    for one in report.unasked:
        screen.print(f"model: {Path(one.path) / 'model'}", highlight=False, markup=False, soft_wrap=True)
    screen.print(f"report: {out / 'report.html'}")


def _run(name: str, out: Path, overrides: list[str], as_json: bool, dry_run: bool, jobs: int | None = 1) -> None:
    from secateurs import page
    from secateurs.dense import Dense, follow
    from secateurs.ranks import joined
    from secateurs.recipe import load_recipe
    from secateurs.study import reload, side_by_side, study

    recipe = load_recipe(name, overrides)
    with joined(recipe.resources.device) as ranks:
        jobs = (2 if ranks.count == 1 else 1) if jobs is None else jobs
        if dry_run:
            if ranks.first:
                _plan(Dense(recipe, side_by_side(jobs, ranks)), as_json)
        elif ranks.first:
            with _bars(jobs) as progress:
                report = study(recipe, out, progress, jobs, ranks, _memory)
            ranks.tell(None)  # the others follow until then
            page.write(report, out)
            try:
                with _bars() as progress:
                    report = reload(report, progress, trust_remote_code=recipe.resources.trust_remote_code)
                page.write(report, out)
            finally:  # a model that does not load loses nothing of what was measured
                _show(report, out, as_json)
        else:
            follow(Dense(recipe, ranks))


@app.command()
def demo(out: Out = Path("runs/demo"), overrides: Set = [], as_json: Json = False, dry_run: DryRun = False) -> None:
    """Reproduce the paper's finding on the bundled reasoner: dense against corpus, prompt and rac. No network."""
    clock = time.monotonic()
    _run("demo", out, overrides, as_json, dry_run)
    console.print(f"{time.monotonic() - clock:.0f} s")


@app.command(name="run")
def run_(
    recipe: RecipeName, out: Out = Path("runs/run"), overrides: Set = [], as_json: Json = False, dry_run: DryRun = False
) -> None:
    """Everything a recipe asks for: trace, prune, export, evaluate, report. Run it again to go on after a stop."""
    _run(recipe, out, overrides, as_json, dry_run)


@app.command(name="study")
def study_(
    recipe: RecipeName,
    out: Out = Path("runs/study"),
    overrides: Set = [],
    as_json: Json = False,
    dry_run: DryRun = False,
    jobs: Annotated[
        int | None,
        typer.Option(help="Processes that share the cells and the cores: 2 if not given, and 1 under torchrun."),
    ] = None,
) -> None:
    """The grid of `[sweep]` (arm x solver x pattern x seed) in parallel processes. Run it again after a stop."""
    _run(recipe, out, overrides, as_json, dry_run, jobs)


def _shard(text: str) -> tuple[int, int]:
    """`2/4` as (1, 4): which of how many. ValueError for anything else."""
    number, _, total = text.partition("/")
    if not (number.isdecimal() and total.isdecimal() and 1 <= int(number) <= int(total)):
        raise ValueError(f"--shard is {text!r}; it should look like 2/4, the second of four machines")
    return int(number) - 1, int(total)


@app.command()
def trace(
    recipe: RecipeName,
    out: Out = Path("runs/run"),
    overrides: Set = [],
    as_json: Json = False,
    dry_run: DryRun = False,
    shard: Annotated[str, typer.Option(help="Which of how many machines this is, as in 2/4.")] = "1/1",
) -> None:
    """Only sample the dense model's chains of thought. With --shard 2/4, the second quarter of them: see `merge`."""
    from secateurs.ask import trace as stage
    from secateurs.dense import Dense, follow
    from secateurs.ranks import joined
    from secateurs.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    part = _shard(shard)
    with joined(loaded.resources.device) as ranks:
        dense = Dense(loaded, ranks)
        if not ranks.first:
            follow(dense)
            return
        if dry_run:
            _plan(dense, as_json)
            ranks.tell(None)
            return
        with _bars() as progress:
            done = {seed: stage(loaded, out, seed, dense, progress, part) for seed in loaded.seeds}
        ranks.tell(None)
    for seed, traced in done.items():
        result = {"seed": seed, "store": str(out / "traces" / traced.key), **traced.summary.model_dump()}
        if traced.surprises:
            found = traced.surprises.items()
            result["surprise"] = {server: {"gap": one.gap, "tokens": one.num_tokens} for server, one in found}
        print(json.dumps(result, indent=None if as_json else 2))


@app.command()
def merge(
    shards: Annotated[list[Path], typer.Argument(help="Trace stores, as `trace` prints them.")],
    into: Annotated[Path, typer.Option(help="The store they are brought together in.")],
    keep_first: Annotated[bool, typer.Option(help="Of two answers to one request, keep the one named first.")] = False,
) -> None:
    """Bring together the traces that several machines sampled with one recipe (`trace --shard 1/4` and so on)."""
    from secateurs.traces import merge_stores

    print(json.dumps(merge_stores(into, shards, keep_first=keep_first)))


@app.command()
def prune(
    recipe: RecipeName, out: Out = Path("runs/run"), overrides: Set = [], as_json: Json = False, dry_run: DryRun = False
) -> None:
    """Trace, prune and export, without asking any question."""
    _run(recipe, out, [*overrides, "evaluate.num_questions=0"], as_json, dry_run)


@app.command(name="eval")
def eval_(
    recipe: RecipeName, out: Out = Path("runs/run"), overrides: Set = [], as_json: Json = False, dry_run: DryRun = False
) -> None:
    """Evaluate dense and pruned models of a recipe; stages that are missing are done first."""
    _run(recipe, out, overrides, as_json, dry_run)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or report.json files.")],
    out: Out = Path("runs/report"),
    as_json: Json = False,
) -> None:
    """One report over several runs: JSON, Markdown and an HTML page that opens offline."""
    from secateurs import page
    from secateurs import report as reports

    found = [reports.read(path / "report.json" if path.is_dir() else path) for path in runs]
    merged = reports.merge(found) if len(found) > 1 else found[0]
    page.write(merged, out)
    _show(merged, out, as_json)


@app.command()
def pack(
    model: Annotated[str, typer.Argument(help="A pruned model's folder, or a hub id.")],
    out: Annotated[Path, typer.Option(help="A new folder for the packed model.")],
    weights: Annotated[
        str, typer.Option(help="What kept weights are stored as: bf16, int8, or int4 (all of them, zeros too).")
    ] = "bf16",
    format: Annotated[
        str, typer.Option(help="secateurs, for this runtime; compressed-tensors, for engines, with int4.")
    ] = "secateurs",
    as_json: Json = False,
) -> None:
    """Store a pruned model without its zeros, for the CPU runtime (`load_packed`), or in int4 for serving engines."""
    from rich.markup import escape

    from secateurs.compressed import compress
    from secateurs.packed import WEIGHTS
    from secateurs.packing import pack as store

    if weights not in WEIGHTS:
        raise ValueError(f"--weights is {weights!r}; it must be {', '.join(WEIGHTS[:-1])} or {WEIGHTS[-1]}")
    if format not in ("secateurs", "compressed-tensors"):
        raise ValueError(f"--format is {format!r}; it must be secateurs or compressed-tensors")
    for_engines = format == "compressed-tensors"
    if for_engines and weights != "int4":
        raise ValueError(f"--format compressed-tensors stores int4: add --weights int4 (found {weights})")
    found = compress(model, out) if for_engines else store(model, out, weights)
    if as_json:
        print(json.dumps(found))
        return
    before, after = found["dense_bytes"] / 1e6, found["bytes"] / 1e6
    what = (
        f"{found['matrices']} matrices in int4"
        if for_engines
        else f"{found['packed']} of {found['matrices']} matrices packed, {100 * found['density']:.1f} % of weights kept"
    )
    console.print(f"{what}: {before:,.1f} MB as bf16, {after:,.1f} MB now ({after / before:.2f})")
    off = found["rounded_off"]
    if weights != "int4":
        if off:
            console.print(f"its weights are rounded to {weights}: off by {100 * off:.2g} % of their size")
    elif off:
        console.print(
            f"the weights of its blocks are off by {100 * off:.2g} % of their size: a solver with weights of int4 "
            "rounds them on traces, which changes outputs less and is stored exactly",
            soft_wrap=True,
        )
    else:
        console.print("the weights of its blocks are int4 numbers: stored exactly")
    if why := found.get("why_unchecked"):
        console.print(f"[yellow]not checked[/]: {escape(why)}", soft_wrap=True)
    if found["moved"]:
        console.print(
            f"[bold red]in {found['moved']} matrices zeros are not where they were when it was pruned[/]: "
            "`secateurs mask apply` puts them back",
            soft_wrap=True,
        )


def _numbers(text: str, option: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{option} is {text!r}; it should look like 1,4,8")
    return [int(part) for part in parts]


@app.command(name="bench")
def bench_(
    models: Annotated[list[str], typer.Argument(help="Folders or hub ids, packed or not; @float32 sets the type.")],
    batch: Annotated[str, typer.Option(help="Rows that are decoded together.")] = "1,4",
    context: Annotated[str, typer.Option(help="Tokens before the first one that is timed.")] = "128",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that are timed.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every model; medians count.")] = 3,
    threads: Annotated[int, typer.Option(min=0, help="0: as many as torch takes.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, or cuda where there is a GPU.")] = "cpu",
    recipe: Annotated[
        str, typer.Option(help="Also ask this recipe's evaluation questions: seconds per right answer.")
    ] = "",
    asked: Annotated[int, typer.Option(min=1, help="How often each is asked them, in turns; the median counts.")] = 1,
    overrides: Set = [],
    out: Annotated[
        Path | None, typer.Option(help="A JSON file for all figures, kept every round; a page beside it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Time models side by side on this machine: decoding, first token, memory, seconds per correct answer."""
    from secateurs import bench
    from secateurs.artifacts import atomic_write, write_json
    from secateurs.recipe import load_recipe

    shapes = {"batches": _numbers(batch, "--batch"), "contexts": _numbers(context, "--context")}
    loaded = load_recipe(recipe, overrides) if recipe else None
    if out:
        if out.suffix != ".json":
            raise ValueError(f"--out is {out}; it should end in .json, and a page is written beside it")
        out.parent.mkdir(parents=True, exist_ok=True)
    where = bench.machine(threads, device)
    found: dict[str, Any] = {}

    def keep(rows: list[bench.Row]) -> None:
        nonlocal found
        found = {"machine": where, "rows": bench.table(rows)}
        if out:
            write_json(out, found)
            atomic_write(out.with_suffix(".html"), bench.to_html(found))

    try:
        with _bars() as progress:
            bench.bench(
                models, **shapes, new_tokens=tokens, rounds=rounds, threads=threads, device=device,
                recipe=loaded, asked=asked, keep=keep,
                progress=lambda done, total, what: progress("bench", done, total, "turns"),
            )  # fmt: skip
    finally:  # also of a bench that was stopped
        if found and as_json:
            print(json.dumps(found))
        elif found:
            _show_bench(found)


def _show_bench(result: dict[str, Any]) -> None:
    from secateurs.bench import figure, short, span

    screen = Console(width=None if sys.stdout.isatty() else 160)
    where = result["machine"]
    rows = result["rows"]
    speeds = Table(
        "model", "computes in", "weights MB", "peak MB", "batch", "context", "first token s", "tokens/s", "x first",
        "spread", title=f"{where.get('gpu', where['cpu'])}, {where['threads']} threads, torch {where['torch']}",
    )  # fmt: skip
    for row in rows:
        for number, one in enumerate(row["speeds"]):
            named = [
                short(row["model"]),
                row["computes"],
                f"{row['weight_bytes'] / 1e6:,.0f}",
                f"{row['peak_bytes'] / 1e6:,.0f}",
            ]
            speeds.add_row(
                *(named if number == 0 else [""] * 4), str(one["batch"]), str(one["context"]),
                f"{one['first_token']:.3f}", f"{one['tokens_per_second']:.1f}",
                f"{one['times_first']:.2f}", f"{one['spread']:.2f}",
            )  # fmt: skip
    screen.print(speeds)
    if rows[0]["quality"]:
        answers = Table(
            "model", "right", "95 %", "points of first", "p", "tokens", "seconds", "spread", "seconds per right answer",
            "of first", "95 %",
        )  # fmt: skip
        for row in rows:
            one = row["quality"]
            points = f"{100 * one['points']:+.1f} ({span(one['points_interval'], 100, 0)})"
            answers.add_row(
                short(row["model"]), f"{one['correct']} of {one['questions']}", span(one["interval"], 100, 0),
                *(("", "") if row is rows[0] else (points, f"{one['p']:.2g}")), f"{one['tokens']:,}",
                f"{one['seconds']:.1f}", f"{one['spread']:.2f}", figure(one["seconds_per_correct"], 3),
                figure(one["of_first"]), "" if row is rows[0] else span(one["of_first_interval"]),
            )  # fmt: skip
        screen.print(answers)


mask = typer.Typer(help="Whether a pruned model's zeros are still there after more training, and putting them back.")
app.add_typer(mask, name="mask")
Of = Annotated[str, typer.Option("--of", help="The pruned model it was made from.")]


@mask.command(name="check")
def mask_check(
    model: Annotated[str, typer.Argument(help="Folder of a model, as it is or as `pack` writes it.")],
    of: Of = "",
    as_json: Json = False,
) -> None:
    """Compare a model's zeros with those of the pruned model it was made from, or of its own export.

    Exit code 1: some are lost.
    """
    from secateurs.masks import check

    _show_masks(check(model, of or None), as_json)


@mask.command(name="apply")
def mask_apply(
    model: Annotated[str, typer.Argument(help="Folder of a model.")],
    of: Of,
    out: Annotated[Path, typer.Option(help="A new folder for the model with its zeros put back.")],
    as_json: Json = False,
) -> None:
    """Write a fine-tuned or merged model anew, with the zeros of the pruned model it was made from."""
    from secateurs.masks import apply

    _show_masks(apply(model, of, out), as_json, mended=True)


def _show_masks(found: Sequence[Any], as_json: bool, mended: bool = False) -> None:
    broken = [one for one in found if one.lost != 0]
    if as_json:
        print(json.dumps([vars(one) for one in found]))
    else:
        table = Table("matrix", "zeros", "lost")
        for one in broken:
            table.add_row(one.name, f"{one.zeros:,}", "?" if one.lost is None else f"{one.lost:,}")
        screen = Console(width=None if sys.stdout.isatty() else 120)
        if broken:
            screen.print(table)
        ending = ", and have them back now" if mended else ""
        said = f"{len(broken)} of {len(found)} matrices lost zeros{ending}" if broken else "every zero is kept"
        screen.print(said)
    if broken and not mended:
        raise typer.Exit(1)


@app.command(name="list")
def list_(
    kind: Annotated[
        str, typer.Argument(help="recipes, solvers, allocators, patterns, questions, arms, filters or engines.")
    ] = "recipes",
    as_json: Json = False,
) -> None:
    """What can be named in a recipe."""
    from secateurs.allocators import ALLOCATORS
    from secateurs.calibration import ARMS
    from secateurs.cuts import CUTS
    from secateurs.engines import ENGINES
    from secateurs.experts import EXPERT_SCORES
    from secateurs.narrow import NARROWINGS
    from secateurs.patterns import PATTERNS
    from secateurs.questions import QUESTION_SETS, unknown_name
    from secateurs.solvers import CUT_SOLVERS, SOLVERS
    from secateurs.traces import FILTERS

    tables = {
        "recipes": [Path(entry.name).stem for entry in (files("secateurs") / "recipes").iterdir()],
        "solvers": list(dict.fromkeys([*SOLVERS, *CUT_SOLVERS, *EXPERT_SCORES, *NARROWINGS])),
        "allocators": list(ALLOCATORS), "patterns": [*PATTERNS, *CUTS, "2:4", "4:8"],
        "questions": list(QUESTION_SETS), "arms": list(ARMS), "filters": list(FILTERS), "engines": list(ENGINES),
    }  # fmt: skip
    if kind not in tables:
        raise ValueError(unknown_name("list", kind, list(tables)))
    print(json.dumps(sorted(tables[kind])) if as_json else "\n".join(sorted(tables[kind])))


@app.command()
def show(recipe: RecipeName, overrides: Set = [], as_json: Json = False) -> None:
    """A recipe with every default filled in, and which engines will gain from what it makes."""
    from secateurs.gains import gains
    from secateurs.recipe import build_pattern, load_recipe

    loaded = load_recipe(recipe, overrides)
    print(json.dumps(loaded.model_dump(), indent=None if as_json else 2))
    if not as_json:
        rounded = any("weights" in solver for solver in loaded.solvers)
        for said, patterns in groupby(map(build_pattern, loaded.patterns), key=partial(gains, rounded=rounded)):
            shown = Table("engine", "what it gains", title=", ".join(map(str, patterns)))
            for row in said:
                shown.add_row(*row)
            console.print(shown)


def main() -> None:
    """Entry point. 0 done, 2 a user's mistake or a machine's limit (one sentence), 130 interrupted."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    pressed: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        """Prints nothing itself: it may run in the middle of a line of progress, and writing is not re-entrant."""
        pressed.append(number)
        raise SystemExit(INTERRUPTED)

    signal.signal(signal.SIGINT, interrupt)
    try:
        app()
    except BaseException as error:
        if pressed:  # and whatever went wrong on the way out of it
            if not _is_follower():
                console.print("interrupted; run the same command again to go on", highlight=False)
            sys.exit(INTERRUPTED)
        if not isinstance(error, (ValueError, OSError, RuntimeError, ArithmeticError)):
            raise
        who = "".join(f"{note}: " for note in getattr(error, "__notes__", []))
        if who or not _is_follower():  # before processes meet, all of them make the same mistakes
            console.print(f"[bold red]error:[/] {who}{_sentence(error)}", highlight=False, soft_wrap=True)
        sys.exit(2)


def _is_follower() -> bool:
    """Whether torchrun started this process, and another one speaks for it."""
    return os.environ.get("RANK", "0") != "0"


def _sentence(error: BaseException) -> str:
    from rich.markup import escape

    if isinstance(error, OSError) and error.strerror:
        return escape(f"{error.filename2 or error.filename or 'writing'}: {error.strerror.lower()}")
    return escape(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
