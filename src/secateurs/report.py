"""What was measured: one schema, written as JSON, Markdown and a self-contained HTML page.

`Report` is the record. Everything shown (table, plots, headline) is computed from it, so a report can be merged,
re-read and re-drawn without the models. Numbers are finite; a quantity that was not measured is null.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin

import jinja2
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from rich.table import Table
from rich.text import Text

from secateurs.artifacts import atomic_write

SCHEMA = "secateurs.report"
VERSION = 1
ARMS = ("dense", "corpus", "prompt", "rac", "think")
Z95 = 1.959964
SAME_BUDGET = 1.25  # calibration token counts within this ratio are one budget: whole traces overshoot it a little

T = TypeVar("T")

# ---------------------------------------------------------------------------------------------------- the schema


class Unit(str):
    """The unit of a field, carried in its type and printed in docs/report-schema.md."""


Count = Annotated[int, Field(ge=0), Unit("count")]
Fraction = Annotated[float, Field(ge=0, le=1), Unit("fraction, 0 to 1")]
Tokens = Annotated[float, Field(ge=0), Unit("tokens")]
TokenCount = Annotated[int, Field(ge=0), Unit("tokens")]
Seconds = Annotated[float, Field(ge=0), Unit("s")]
Ratio = Annotated[float, Field(ge=0), Unit("ratio")]
RelativeError = Annotated[float, Unit("ratio of squared norms")]
Interval = Annotated[tuple[float, float], Field(strict=False), Unit("fraction, 0 to 1")]


class _Model(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, populate_by_name=True, protected_namespaces=()
    )


class LayerReport(_Model):
    """One pruned matrix."""

    name: str = Field(description="Module name in the model, for example `model.layers.3.mlp.up_proj`.")
    block: int = Field(description="Decoder block the matrix sits in, from 0.")
    shape: Annotated[tuple[int, int], Field(strict=False)] = Field(description="`[d_out, d_in]`.")
    pattern: str = Field(description="Pattern asked for, for example `unstructured` or `2:4`.")
    zeros_asked: Count = Field(description="Zeros the pattern asks for.")
    zeros: Count = Field(description="Zeros achieved.")
    error_train: RelativeError = Field(description="tr(ΔGΔᵀ)/tr(WGWᵀ) on the calibration tokens.")
    error_held_out: RelativeError | None = Field(
        description="The same on tokens the solver never saw. A layer that makes up for what came before it, or was "
        "fine-tuned with its block, is further from its own weights while the model is better: see `hidden_error`."
    )
    error_by_region: dict[str, RelativeError] = Field(
        description="Held-out error on the tokens of one region: `prompt`, `think`, `answer`."
    )
    damp: float = Field(description="Damping the solver ended with, relative to the mean diagonal of the Gram.")
    seconds: Seconds = Field(description="Wall-clock time of the solve.")
    outcome: str = Field(description="How the solve ended, in one word.")
    note: str = Field(default="", description="Cause and remedy when the outcome is not the usual one.")
    alpha: Fraction = Field(default=0.0, description="How far it was made to reproduce the dense model's output.")
    beta: Fraction = Field(default=0.0, description="How far it was made to make up for the residual stream.")
    block_error: Annotated[tuple[float, float], Field(strict=False), Unit("ratio of squared norms")] | None = Field(
        default=None, description="Held-out error of its block's output before and after the fine-tune."
    )


class Difference(_Model):
    """A paired difference to the dense model: same questions, mean over questions."""

    mean: Annotated[float, Unit("fraction, -1 to 1")] = Field(description="pass@1 minus the dense model's pass@1.")
    interval: Annotated[tuple[float, float], Field(strict=False), Unit("fraction, -1 to 1")] = Field(
        description="95 % interval of that mean, over questions."
    )


class Evaluation(_Model):
    """What one model did on one question set."""

    question_set: str = Field(description="Name (and version) of the question set.")
    questions: Count = Field(description="Questions asked.")
    samples: Count = Field(description="Completions sampled per question.")
    pass_at_1: Fraction = Field(description="Mean over questions of the share of correct samples.")
    interval: Interval = Field(description="95 % interval of pass@1, over questions.")
    by_family: dict[str, Fraction] = Field(description="pass@1 by question family.")
    difference: Difference | None = Field(description="Paired difference to the dense model.")
    prompt_tokens: Tokens = Field(description="Mean prompt length.")
    think_tokens: Tokens = Field(description="Mean length of the chain of thought.")
    answer_tokens: Tokens = Field(description="Mean length of what follows the chain of thought.")
    completion_tokens: Tokens = Field(description="Mean generated tokens per sample.")
    length_ratio: Ratio | None = Field(description="Completion tokens over the dense model's.")
    truncated: Fraction = Field(description="Share of samples stopped by the token limit.")
    looping: Fraction = Field(description="Share of samples that end in a repeating loop.")
    unclosed_think: Fraction = Field(description="Share of samples that never close the chain of thought.")
    tokens_per_correct: Tokens | None = Field(description="Generated tokens per correct answer; null when none is.")
    tokens: TokenCount = Field(description="All generated tokens.")
    seconds: Seconds = Field(description="Wall-clock time of the evaluation.")
    tokens_per_second: Annotated[float, Field(ge=0), Unit("tokens/s")] = Field(description="Generation throughput.")


class CurvePoint(_Model):
    """Error at one place of the chain of thought."""

    position: Annotated[float, Unit("tokens, or fraction when all are at most 1")] = Field(
        description="Centre of a bucket of think-token positions, absolute or relative to the trace's length."
    )
    error: RelativeError = Field(description="Relative squared error of the final hidden states in the bucket.")
    tokens: TokenCount = Field(description="Tokens in the bucket.")


class HiddenError(_Model):
    """Relative squared error of the final hidden states on held-out dense traces."""

    prompt: RelativeError | None = Field(description="On prompt tokens.")
    early_think: RelativeError | None = Field(description="On the first half of the chain of thought.")
    late_think: RelativeError | None = Field(description="On the second half of the chain of thought.")
    answer: RelativeError | None = Field(description="On answer tokens; null when no trace has any.")
    curve: list[CurvePoint] = Field(description="Error by position in the chain of thought.")


class Cell(_Model):
    """One model of the study: dense, or pruned one way with one seed."""

    arm: str = Field(
        description="Which tokens calibrated it: `dense` (not pruned), `corpus`, `prompt`, `rac`, `think`, "
        "or the label of a mixture."
    )
    sparsity: Fraction = Field(description="Fraction of zeros asked for in the prunable weights.")
    pattern: str = Field(description="`unstructured`, `2:4`, ...")
    solver: str = Field(description="Solver that chose and refitted the weights.")
    seed: int = Field(description="Seed of the calibration.")
    calibration_tokens: TokenCount = Field(description="Tokens it was calibrated on; 0 for dense.")
    evaluation: Evaluation = Field(description="What the model does on questions.")
    hidden_error: HiddenError | None = Field(description="Drift of the final hidden states.")
    layers: list[LayerReport] = Field(description="One entry per pruned matrix.")
    seconds: dict[str, Seconds] = Field(description="Wall-clock time by stage of this cell.")
    path: str = Field(description="Folder the cell's model lives in.")


class TraceSummary(_Model):
    """The dense model's own traces that calibrated the pruning."""

    traces: Count = Field(description="Traces kept.")
    tokens: TokenCount = Field(description="Their tokens.")
    by_region: dict[str, TokenCount] = Field(description="Their tokens by region.")
    pass_at_1: Fraction | None = Field(description="Share of correct traces; null when they were not checked.")
    mean_think_tokens: Tokens = Field(description="Mean length of the chain of thought.")
    truncated: Fraction = Field(description="Share of traces stopped by the token limit.")
    dropped: dict[str, Count] = Field(description="Traces left out, by reason.")
    seconds: Seconds = Field(description="Wall-clock time of the sampling.")


class LeakCheck(_Model):
    """Whether evaluation questions were among the texts that calibrated (normalised text, shared runs of words)."""

    evaluation: Count = Field(description="Evaluation questions looked at.")
    calibration: Count = Field(description="Calibration texts they were compared with, of all arms.")
    equal: Count = Field(description="Evaluation questions equal to a calibration text but for case and punctuation.")
    near: Count = Field(description="Others that share at least half of their runs of words with calibration texts.")
    run: Count = Field(description="Words in a run.")
    examples: list[str] = Field(description="Some of those found.")


class Stage(_Model):
    """One stage of the run."""

    name: str = Field(description="Name of the stage.")
    seconds: Seconds = Field(description="Wall-clock time.")
    detail: str = Field(default="", description="What it did, in a few words.")


class SummaryRow(_Model):
    """All cells that differ only by seed, in one row of the result table."""

    arm: str = Field(description="As in `Cell`.")
    sparsity: Fraction = Field(description="As in `Cell`.")
    pattern: str = Field(description="As in `Cell`.")
    solver: str = Field(description="As in `Cell`.")
    question_set: str = Field(description="As in `Evaluation`.")
    calibration_tokens: TokenCount = Field(description="Mean over the cells; counts within 25 % share a row.")
    seeds: Count = Field(description="Cells (one a seed) in this row; every mean below is over them.")
    pass_at_1: Fraction = Field(description="Mean pass@1.")
    interval: Interval = Field(description="95 % interval, see `summarise`.")
    points_lost: Annotated[float, Unit("percentage points")] | None = Field(
        description="Dense pass@1 minus this pass@1, times 100; negative is a gain."
    )
    completion_tokens: Tokens = Field(description="Mean generated tokens per sample.")
    length_ratio: Ratio | None = Field(description="Completion tokens over the dense model's.")
    seconds: Seconds = Field(description="Mean wall-clock time of the evaluation.")
    time_ratio: Ratio | None = Field(description="Those seconds over the dense model's.")
    truncated: Fraction = Field(description="Mean share stopped by the token limit.")
    looping: Fraction = Field(description="Mean share that ends in a loop.")
    unclosed_think: Fraction = Field(description="Mean share that never closes the chain of thought.")
    tokens_per_correct: Tokens | None = Field(description="All generated tokens over all correct answers.")
    held_out_error: RelativeError | None = Field(description="`error_held_out`, mean over layers.")
    hidden_error: RelativeError | None = Field(description="Mean of early and late think `HiddenError`.")


class Report(_Model):
    """The whole record of one run, or of several merged."""

    schema_: Literal["secateurs.report"] = Field(default=SCHEMA, alias="schema", description="Always this string.")
    version: Literal[1] = Field(default=VERSION, description="Version of this schema.")
    title: str = Field(description="Shown on top.")
    created: str = Field(description="ISO 8601 time of writing.")
    secateurs: str = Field(description="Version of this package.")
    versions: dict[str, str] = Field(description="Versions of what the numbers depend on.")
    hardware: dict[str, JsonValue] = Field(description="Machine the run used.")
    model: dict[str, JsonValue] = Field(description="Dense model: `name`, revision, size, ...")
    recipe: dict[str, JsonValue] = Field(description="The recipe as run, defaults filled in.")
    recipe_key: str = Field(description="Content key of the recipe.")
    stages: list[Stage] = Field(description="Where the time went, in order.")
    traces: TraceSummary | None = Field(description="The calibration traces.")
    leaks: LeakCheck | None = Field(default=None, description="The check for evaluation questions in calibration.")
    cells: list[Cell] = Field(description="Every model measured.")
    summary: list[SummaryRow] = Field(description="`summarise(cells)`.")


def schema_markdown() -> str:
    """docs/report-schema.md, made from the models above so that it cannot drift."""
    models = (
        Report,
        Stage,
        TraceSummary,
        LeakCheck,
        Cell,
        Evaluation,
        Difference,
        LayerReport,
        HiddenError,
        CurvePoint,
        SummaryRow,
    )
    lines = [
        "# The report schema",
        "",
        f"`report.json` is one JSON object, `{SCHEMA}` version {VERSION}. Unknown keys are refused, numbers finite,",
        "and what was not measured is `null`. `secateurs.report.read` checks all of it.",
        "",
        "**Versioning.** Any change to a field (added, removed, renamed, new meaning or unit) raises `version` by one;",
        "`read` accepts only its own version and says which one it found. This page is generated by",
        "`secateurs.report.schema_markdown()` and a test compares the two.",
    ]
    for model in models:
        lines += ["", f"## {model.__name__}", "", model.__doc__ or "", ""]
        lines += ["| field | type | unit | meaning |", "|---|---|---|---|"]
        for name, field in model.model_fields.items():
            unit = next((u for u in (*field.metadata, *_walk(field.annotation)) if isinstance(u, Unit)), "")
            kind = _type_name(field.annotation).replace("|", "\\|")
            lines.append(f"| `{field.alias or name}` | {kind} | {unit} | {field.description} |")
    return "\n".join(lines) + "\n"


def _walk(annotation: Any) -> Iterable[Any]:
    """Every part of a type, depth first."""
    yield annotation
    for part in get_args(annotation):
        yield from _walk(part)


def _type_name(annotation: Any) -> str:
    """A type the way a reader of JSON thinks of it."""
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is JsonValue:
        return "any JSON"
    if origin is Annotated:
        return _type_name(args[0])
    if origin is Literal:
        return json.dumps(args[0])
    if origin is list:
        return f"list of {_type_name(args[0])}"
    if origin is dict:
        return f"object of {_type_name(args[1])}"
    if origin is tuple:
        return f"[{', '.join(map(_type_name, args))}]"
    if args:
        return " | ".join("null" if part is type(None) else _type_name(part) for part in args)
    names = {str: "string", int: "integer", float: "number"}
    return names.get(annotation) or f"[{annotation.__name__}](#{annotation.__name__.lower()})"


# ---------------------------------------------------------------------------------------------------- arithmetic


class Setting(NamedTuple):
    """What two arms must share to be compared."""

    sparsity: float
    question_set: str
    pattern: str
    solver: str


def _setting(row: SummaryRow) -> Setting:
    return Setting(row.sparsity, row.question_set, row.pattern, row.solver)


def _mean(values: Iterable[float | None]) -> float | None:
    """Mean of what was measured, None when nothing was."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _over(value: float, dense: float | None) -> float | None:
    return value / dense if dense else None


def _average(cells: Sequence[Cell], field: str) -> float:
    return math.fsum(getattr(cell.evaluation, field) for cell in cells) / len(cells)


def _interval(cells: Sequence[Cell]) -> tuple[float, float]:
    """95 % interval of the mean pass@1; the formula is in `summarise`."""
    scores = [cell.evaluation.pass_at_1 for cell in cells]
    if len(cells) == 1:
        return cells[0].evaluation.interval
    mean = math.fsum(scores) / len(scores)
    between = math.fsum((score - mean) ** 2 for score in scores) / (len(scores) - 1) / len(scores)

    def reach(side: int) -> float:
        squares = [(cell.evaluation.interval[side] - cell.evaluation.pass_at_1) ** 2 for cell in cells]
        return math.sqrt(math.fsum(squares) / len(squares) + Z95**2 * between)

    return max(0.0, mean - reach(0)), min(1.0, mean + reach(1))


def _row(cells: Sequence[Cell], dense: Sequence[Cell]) -> SummaryRow:
    """One row from the cells of all seeds; ratios are to `dense`, or the ones in the cells where no dense is here."""
    first = cells[0]
    score, length, seconds = (_average(cells, name) for name in ("pass_at_1", "completion_tokens", "seconds"))
    correct = math.fsum(c.evaluation.pass_at_1 * c.evaluation.questions * c.evaluation.samples for c in cells)
    if dense:
        lost = 100 * (_average(dense, "pass_at_1") - score)
        length_ratio = _over(length, _average(dense, "completion_tokens"))
        time_ratio = _over(seconds, _average(dense, "seconds"))
    else:
        gain = _mean(c.evaluation.difference.mean if c.evaluation.difference else None for c in cells)
        lost = None if gain is None else -100 * gain
        length_ratio, time_ratio = _mean(c.evaluation.length_ratio for c in cells), None
    return SummaryRow(
        arm=first.arm,
        sparsity=first.sparsity,
        pattern=first.pattern,
        solver=first.solver,
        question_set=first.evaluation.question_set,
        calibration_tokens=round(math.fsum(c.calibration_tokens for c in cells) / len(cells)),
        seeds=len(cells),
        pass_at_1=score,
        interval=_interval(cells),
        points_lost=lost,
        completion_tokens=length,
        length_ratio=length_ratio,
        seconds=seconds,
        time_ratio=time_ratio,
        truncated=_average(cells, "truncated"),
        looping=_average(cells, "looping"),
        unclosed_think=_average(cells, "unclosed_think"),
        tokens_per_correct=_over(math.fsum(c.evaluation.tokens for c in cells), correct),
        held_out_error=_mean(layer.error_held_out for cell in cells for layer in cell.layers),
        hidden_error=_mean(
            error for c in cells if c.hidden_error for error in (c.hidden_error.early_think, c.hidden_error.late_think)
        ),
    )


def _arm_rank(arm: str) -> tuple[int, str]:
    return (ARMS.index(arm) if arm in ARMS else len(ARMS), arm)


def _cell_setting(cell: Cell) -> Setting:
    return Setting(cell.sparsity, cell.evaluation.question_set, cell.pattern, cell.solver)


def _groups(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that differ only by seed, group by group, in the order of the table. Raises ValueError for a clash."""

    def key(cell: Cell) -> tuple[Any, ...]:
        if cell.arm == "dense":
            return (0, 0.0, cell.evaluation.question_set)
        return (1, *_cell_setting(cell), _arm_rank(cell.arm))

    groups: list[list[Cell]] = []
    for cell in sorted(cells, key=lambda cell: (*key(cell), cell.calibration_tokens)):
        first = groups[-1][0] if groups else None
        if first and key(first) == key(cell) and cell.calibration_tokens <= SAME_BUDGET * first.calibration_tokens:
            groups[-1].append(cell)
        else:
            groups.append([cell])
    for group in groups:
        by_seed: dict[int, Cell] = {}
        for cell in group:
            other = by_seed.setdefault(cell.seed, cell)
            if other is not cell:
                raise ValueError(
                    f"two results for {cell.arm} at {_percent(cell.sparsity)} with seed {cell.seed} ({other.path} and "
                    f"{cell.path}): keep one, or give each its own seed"
                )
    return groups


def summarise(cells: Sequence[Cell]) -> list[SummaryRow]:
    """One row per arm and setting: dense first, then by sparsity, then corpus, prompt, rac, think, others.

    The interval of one seed is the evaluation's own. With n seeds, each side reaches
    sqrt(mean(reach_i^2) + z^2 s^2 / n) from the mean, where reach_i is how far seed i's own interval goes on that
    side, s^2 the variance between the seeds' pass@1 and z = 1.96. The first term does not shrink with n because all
    seeds answer the same questions, so the result is never narrower than the pooled question-level interval.

    Raises ValueError when two cells claim the same arm, setting and seed.
    """
    groups = _groups(cells)
    dense = {group[0].evaluation.question_set: group for group in groups if group[0].arm == "dense"}
    return [_row(group, dense.get(group[0].evaluation.question_set, [])) for group in groups]


def merge(reports: Sequence[Report]) -> Report:
    """Several runs of one dense model in one report.

    A cell that two runs share (equal but for time and place, as the dense model is) counts once. Recipes and machines
    that differ are all kept, by recipe key. Raises ValueError for no report, different models, or clashing cells.
    """
    if not reports:
        raise ValueError("there is no report to merge")
    first = reports[0]
    for other in reports[1:]:
        if other.model != first.model:
            raise ValueError(
                f"reports of different models cannot be merged: {_model_name(first)} and {_model_name(other)}"
            )
    unique: dict[str, Cell] = {}
    for cell in (cell for report in reports for cell in report.cells):
        unique.setdefault(_measured(cell), cell)
    cells = list(unique.values())
    stages: dict[str, list[Stage]] = defaultdict(list)
    for report in reports:
        for stage in report.stages:
            stages[stage.name].append(stage)
    return Report(
        title=" + ".join(_unique(r.title for r in reports)),
        created=max(r.created for r in reports),
        secateurs=", ".join(_unique(r.secateurs for r in reports)),
        versions={
            name: ", ".join(_unique(r.versions[name] for r in reports if name in r.versions))
            for name in _unique(name for r in reports for name in r.versions)
        },
        hardware=_same_or_keyed(reports, lambda r: r.hardware),
        model=first.model,
        recipe=_same_or_keyed(reports, lambda r: r.recipe),
        recipe_key=" + ".join(_unique(r.recipe_key for r in reports)),
        stages=[
            Stage(
                name=name,
                seconds=math.fsum(s.seconds for s in same),
                detail="; ".join(_unique(s.detail for s in same if s.detail)),
            )
            for name, same in stages.items()
        ],
        traces=merge_traces(_unique(r.traces for r in reports if r.traces)),
        leaks=merge_leaks([r.leaks for r in reports if r.leaks]),
        cells=cells,
        summary=summarise(cells),
    )


def _measured(cell: Cell) -> str:
    """What identifies a measurement: everything but clocks and folders."""
    clocks = {"seconds", "tokens_per_second"}
    skip = {"path": True, "seconds": True, "evaluation": clocks, "layers": {"__all__": {"seconds"}}}
    return cell.model_dump_json(exclude=skip)


def _unique(values: Iterable[T]) -> list[T]:
    """Without repeats, in order."""
    kept: list[T] = []
    for value in values:
        if value not in kept:
            kept.append(value)
    return kept


def _same_or_keyed(reports: Sequence[Report], part: Callable[[Report], dict[str, JsonValue]]) -> dict[str, JsonValue]:
    if len(_unique(map(part, reports))) == 1:
        return part(reports[0])
    return {f"run {i}, {report.recipe_key}": part(report) for i, report in enumerate(reports, 1)}


def merge_traces(stores: Sequence[TraceSummary]) -> TraceSummary | None:
    """The traces of several seeds or runs as one."""
    if len(stores) < 2:
        return stores[0] if stores else None

    def weighted(values: Sequence[float]) -> float:
        total = sum(store.traces for store in stores) or 1
        return math.fsum(v * store.traces for v, store in zip(values, stores, strict=True)) / total

    def added(parts: Sequence[dict[str, int]]) -> dict[str, int]:
        return {name: sum(part.get(name, 0) for part in parts) for name in _unique(n for part in parts for n in part)}

    scores = [store.pass_at_1 for store in stores]
    known = [score for score in scores if score is not None]
    return TraceSummary(
        traces=sum(store.traces for store in stores),
        tokens=sum(store.tokens for store in stores),
        by_region=added([store.by_region for store in stores]),
        pass_at_1=weighted(known) if len(known) == len(scores) else None,
        mean_think_tokens=weighted([store.mean_think_tokens for store in stores]),
        truncated=weighted([store.truncated for store in stores]),
        dropped=added([store.dropped for store in stores]),
        seconds=math.fsum(store.seconds for store in stores),
    )


def merge_leaks(checks: Sequence[LeakCheck]) -> LeakCheck | None:
    """Several checks, of several seeds or runs, as one."""
    if not checks:
        return None
    return LeakCheck(
        evaluation=sum(check.evaluation for check in checks),
        calibration=sum(check.calibration for check in checks),
        equal=sum(check.equal for check in checks),
        near=sum(check.near for check in checks),
        run=checks[0].run,
        examples=[text for check in checks for text in check.examples][:3],
    )


# ---------------------------------------------------------------------------------------------------- the headline


class Contest(NamedTuple):
    """rac against the better of corpus and prompt-only calibration, in one setting."""

    rac: SummaryRow
    rival: SummaryRow

    @property
    def gap(self) -> float:
        return self.rac.pass_at_1 - self.rival.pass_at_1

    @property
    def verdict(self) -> int:
        """1 when rac is ahead, -1 behind, 0 when the gap is inside the 95 % interval of an unpaired difference."""
        reach = math.hypot(*((row.interval[1] - row.interval[0]) / 2 for row in self))
        return 0 if abs(self.gap) <= reach else int(math.copysign(1, self.gap))


def _contests(rows: Sequence[SummaryRow]) -> list[Contest]:
    by_setting: dict[Setting, dict[str, list[SummaryRow]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        by_setting[_setting(row)][row.arm].append(row)
    contests = []
    for arms in by_setting.values():
        rivals = arms["corpus"] + arms["prompt"]
        if arms["rac"] and rivals:
            rac = max(arms["rac"], key=lambda row: row.calibration_tokens)
            contests.append(Contest(rac, max(rivals, key=lambda row: row.pass_at_1)))
    return contests


def _focus(rows: Sequence[SummaryRow]) -> SummaryRow | None:
    """A row of the setting to look at closely: where rac and its rival differ most, else the sparsest."""
    contests = _contests(rows)
    if contests:
        return max(contests, key=lambda contest: abs(contest.gap)).rac
    return max((row for row in rows if row.arm != "dense"), key=lambda row: row.sparsity, default=None)


_ARM_NAMES = {"corpus": "corpus calibration", "prompt": "prompt-only calibration"}


def _arm_name(arm: str) -> str:
    return _ARM_NAMES.get(arm, arm)


def _fate(row: SummaryRow, whole: bool = True) -> str:
    """What became of one arm, in words."""
    if row.points_lost is None or row.arm == "dense":
        return f"scores {_percent(row.pass_at_1, 1)}"
    verb = "gains" if round(row.points_lost, 1) < 0 else "loses"
    words = f"{verb} {abs(row.points_lost):.1f} points"
    if row.length_ratio is None:
        return words
    if whole:
        return f"{words} and writes {row.length_ratio:.1f}x the dense model's tokens"
    return f"{words} at {row.length_ratio:.1f}x"


def _place(row: SummaryRow, rows: Sequence[SummaryRow], unit: str = "") -> str:
    """The sparsity, and the rest of the setting where it would be ambiguous."""
    others = [_setting(r) for r in rows if r.arm != "dense"]
    extra = [value for i, value in enumerate(_setting(row)) if i and len({other[i] for other in others}) > 1]
    return ", ".join([_percent(row.sparsity) + unit, *map(str, extra)])


def headline(report: Report) -> str:
    """The result in one sentence, whichever way it went.

    It looks at the setting where rac and the better of corpus and prompt-only calibration differ most, calls a gap
    within its 95 % interval by its name, and lists the settings where rac is not clearly ahead.
    """
    rows = report.summary
    focus = _focus(rows)
    if focus is None:
        dense = rows[0] if rows else None
        return f"Only the dense model was measured: it {_fate(dense)}." if dense else "Nothing was measured yet."
    place = _place(focus, rows, " sparsity")
    contests = sorted(_contests(rows), key=lambda contest: abs(contest.gap), reverse=True)
    if not contests:
        arms = [row for row in rows if _setting(row) == _setting(focus) and row.arm != "dense"]
        fates = "; ".join(f"{_arm_name(row.arm)} {_fate(row, i == 0)}" for i, row in enumerate(arms))
        lonely = any(row.arm == "rac" for row in arms)
        missing = "no corpus or prompt-only calibration was measured beside it" if lonely else "rac was not measured"
        return f"At {place} {fates}; {missing}."
    rac, rival = best = contests[0]
    pair = f"{_arm_name(rival.arm)} {_fate(rival)}; rac {_fate(rac, whole=False)}"
    if best.verdict > 0:
        text = f"At {place} {pair}"
    elif best.verdict < 0:
        text = f"rac does not help: at {place} {pair}"
    else:
        text = f"rac does not clearly help: at {place} {pair}, a gap within its 95 % interval"
    for verdict, words in ((0, "the gap is within its 95 % interval"), (-1, "rac is behind")):
        others = sorted((c.rac for c in contests[1:] if c.verdict == verdict), key=_setting)
        if others:
            text += f"; at {' and '.join(_place(row, rows) for row in others)} {words}"
    return text + "."


# ---------------------------------------------------------------------------------------------------- reading, writing


def to_json(report: Report) -> str:
    """The record itself."""
    return report.model_dump_json(by_alias=True, indent=1) + "\n"


def write(report: Report, folder: str | Path) -> None:
    """Writes report.html, report.md and, last, report.json into `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "report.html", to_html(report))
    atomic_write(folder / "report.md", to_markdown(report))
    atomic_write(folder / "report.json", to_json(report))


def read(path: str | Path) -> Report:
    """The report in a JSON file, or in a run folder. Raises ValueError with one sentence for anything else."""
    path = Path(path)
    path = path / "report.json" if path.is_dir() else path
    try:
        record = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot read the report ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{path}: is not a whole JSON file ({error})") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise ValueError(f'{path}: is not a secateurs report (it lacks "schema": "{SCHEMA}")')
    if record.get("version") != VERSION:
        found = json.dumps(record.get("version"))
        raise ValueError(f"{path}: report version {found} found, this secateurs reads version {VERSION}")
    try:
        return Report.model_validate_json(json.dumps(record))
    except ValidationError as error:
        problem, more = error.errors()[0], error.error_count() - 1
        where = ".".join(map(str, problem["loc"]))
        tail = f" (and {more} more)" if more else ""
        raise ValueError(f"{path}: {where}: {problem['msg']}{tail}") from error


# ---------------------------------------------------------------------------------------------------- words and tables


def _percent(value: float, digits: int = 0) -> str:
    text = f"{100 * value:.{max(digits, 1)}f}"
    return (text.removesuffix(".0") if digits == 0 else text) + " %"


def _count(value: float) -> str:
    """A number of things: 950, 12.3k, 1.20M."""
    if value < 10_000:
        return f"{value:.0f}"
    return f"{value / 1e3:.1f}".removesuffix(".0") + "k" if value < 999_950 else f"{value / 1e6:.2f}M"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _points(lost: float) -> str:
    """Change to dense in points, with its sign."""
    text = f"{-lost:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def _times(ratio: float) -> str:
    return f"{ratio:.2f}×" if ratio < 10 else f"{ratio:.0f}×"


def _maybe(show: Callable[[float], str]) -> Callable[[float | None], str]:
    return lambda value: "–" if value is None else show(value)


def _model_name(report: Report) -> str:
    return str(report.model.get("name", "model"))


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, text) pairs."""
    if isinstance(value, dict) and value:
        return [pair for key, part in value.items() for pair in _flat(part, f"{name}.{key}" if name else key)]
    return [(name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))] if name else []


def console_table(report: Report) -> Table:
    """The result table for a terminal."""
    table = Table(title=Text(report.title))
    for head in ("arm", "sparsity", "pass@1", "95 %", "vs dense", "tokens", "× dense", "time", "truncated", "loops"):
        table.add_column(head, justify="left" if head == "arm" else "right", no_wrap=True)
    previous = None
    for row in report.summary:
        table.add_row(
            Text(_label(row, report.summary)),
            _percent(row.sparsity),
            _percent(row.pass_at_1, 1),
            f"{100 * row.interval[0]:.1f}–{100 * row.interval[1]:.1f}",
            _maybe(_points)(row.points_lost),
            _count(row.completion_tokens),
            _maybe(_times)(row.length_ratio),
            _maybe(_times)(row.time_ratio),
            _percent(row.truncated, 1),
            _percent(row.looping, 1),
        )
        if previous is not None and _setting(row) != _setting(previous):
            table.rows[-2].end_section = True
        previous = row
    return table


def _label(row: SummaryRow, rows: Sequence[SummaryRow]) -> str:
    """The arm, and whatever else tells its rows of one sparsity apart."""
    same = [other for other in rows if other.arm == row.arm]
    names = ("question_set", "pattern", "solver")
    extra = [getattr(row, name) for name in names if len({getattr(other, name) for other in same}) > 1]
    if len(_budgets(other.calibration_tokens for other in same)) > 1:
        extra.append(f"{_budgets([row.calibration_tokens])[0]} tokens")
    return ", ".join([row.arm, *extra])


def _budgets(tokens: Iterable[int]) -> list[str]:
    """The different budgets behind these token counts, to two digits."""
    kept: list[int] = []
    for count in sorted(tokens):
        if not kept or count > SAME_BUDGET * kept[-1]:
            kept.append(count)
    return [_count(float(f"{count:.2g}")) for count in kept]


# ---------------------------------------------------------------------------------------------------- plots


Point = tuple[float, float, float, float]  # x, y, and the ends of its error bar, both y where there is none


@dataclass(frozen=True)
class Series:
    """One line of a plot."""

    label: str
    arm: str
    points: list[Point]
    dash: int = 0


def _point(x: float, y: float) -> Point:
    return x, y, y, y


@dataclass(frozen=True)
class Axis:
    """Data to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self, most: int = 6) -> list[float]:
        """Round numbers inside the axis: 1-2-5 steps, or whole decades and their 2 and 5 when logarithmic."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1, 2, 5), (1, 3), (1,)):
                marks = [d * 10.0**e for e in decades for d in digits if self.low <= d * 10.0**e <= self.high]
                if len(marks) <= most:
                    break
            return marks
        raw = (self.high - self.low) / (most - 1)
        power = 10.0 ** math.floor(math.log10(raw))
        step = power * next(step for step in (1, 2, 2.5, 5, 10) if step * power >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 10_000 else _count(value)


def _spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Label positions near `wanted`, at least `gap` apart and inside [low, high] as long as they fit."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [min(max(wanted[i], low), high) for i in order]
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap)
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], (placed[i + 1] - gap) if i + 1 < len(placed) else high)
    return [place for _, place in sorted(zip(order, placed, strict=True))]


def _plot(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_text: Callable[[float], str] = _number,
    y_text: Callable[[float], str] = _number,
    y_range: tuple[float, float] | None = None,
    log: bool = False,
    names: Sequence[str] = (),
    reference: tuple[float, float, float] | None = None,
    size: tuple[int, int] = (420, 296),
    direct: bool = True,
) -> dict[str, Any]:
    """Pixel geometry of a line plot, drawn by the `plot` macro of report.html.j2.

    `y_range` fixes the y axis, which otherwise runs from 0 to the largest value, and is needed where it is `log`;
    `names` makes x categorical; `reference` is (value, low, high) of a horizontal line for the dense model; `direct`
    writes each series' name at its end.
    """
    width, height = size
    xs = sorted({p[0] for s in series for p in s.points})
    ys = [v for s in series for p in s.points for v in p[1:]] + list(reference or ())
    labels = [s.label if len(s.label) <= 20 else s.label[:19] + "…" for s in series]
    right = 14 + (7 * max(map(len, labels), default=0) if direct else 0)
    pad = 0.5 if len(xs) == 1 else (xs[-1] - xs[0]) * 0.05
    x = Axis(xs[0] - pad, xs[-1] + pad, 46 if direct else 40, width - right)
    y_low, y_high = y_range or (0, max(ys) * 1.06 or 1)
    y = Axis(y_low, y_high, height - 42, 36 if direct else 24, log)
    lines = []
    for i, s in enumerate(series):
        shift = (i - (len(series) - 1) / 2) * (14 if len(xs) == 1 else 3 if direct and not names else 0)
        marks = [
            {
                "x": round(x(px) + shift, 1),
                "y": y(max(py, y_low)),
                "low": y(max(low, y_low)),
                "high": y(max(high, y_low)),
                "title": f"{s.label}, {names[int(px)] if names else x_text(px)}: {y_text(py)}"
                + (f" ({y_text(low)} to {y_text(high)})" if low < high else ""),
            }
            for px, py, low, high in s.points
        ]
        path = "M" + "L".join(f"{m['x']},{m['y']}" for m in marks)
        lines.append({"marks": marks, "path": path, "arm": s.arm, "dash": s.dash, "label": labels[i]})
    if direct:
        for line, place in zip(lines, _spread([s["marks"][-1]["y"] for s in lines], 15, 40, height - 46), strict=True):
            line["at"] = round(place, 1)
    spaced = len(xs) <= 6 and all(not 0 < b - a < pad for a, b in pairwise(xs))
    x_marks = xs if names or spaced else x.ticks(5 if direct else 4)
    return {
        "title": title,
        "x_label": x_label,
        "y_label": y_label,
        "width": width,
        "height": height,
        "left": x.start,
        "right": x.end,
        "top": y.end,
        "bottom": y.start,
        "x_ticks": [(x(v), names[int(v)] if names else x_text(v)) for v in x_marks],
        "y_ticks": [(y(v), y_text(v)) for v in y.ticks(6 if direct else 4)],
        "lines": lines,
        "reference": reference and [y(v) for v in reference],
        "crowd_above": bool(reference)
        and sum(p[1] > reference[0] for s in series for p in s.points) * 2 > sum(len(s.points) for s in series),
        "direct": direct,
        "log": log,
    }


def _by_sparsity(rows: Sequence[SummaryRow], point: Callable[[SummaryRow], Point | None]) -> list[Series]:
    """One series per arm and variant over sparsity."""
    series: dict[str, Series] = {}
    variants: dict[str, int] = defaultdict(int)
    for row in rows:
        shown = point(row)
        if row.arm == "dense" or shown is None:
            continue
        label = _label(row, rows)
        if label not in series:
            series[label] = Series(label, row.arm, [], variants[row.arm])
            variants[row.arm] += 1
        series[label].points.append(shown)
    return list(series.values())


def _sparsity_plots(rows: Sequence[SummaryRow]) -> list[dict[str, Any]]:
    dense = [row for row in rows if row.arm == "dense"]
    reference = (dense[0].pass_at_1, *dense[0].interval) if len(dense) == 1 else None
    plots = []
    if score := _by_sparsity(rows, lambda r: (r.sparsity, r.pass_at_1, *r.interval)):
        plots.append(
            _plot(
                score,
                title="Accuracy",
                x_label="weights removed",
                y_label="pass@1, with 95 % interval",
                x_text=_percent,
                y_text=_percent,
                y_range=(0, 1.1),  # room above 100 % for the name of the dense line
                reference=reference,
            )
        )
    if length := _by_sparsity(rows, lambda r: _point(r.sparsity, r.length_ratio) if r.length_ratio else None):
        plots.append(
            _plot(
                length,
                title="Length of an answer",
                x_label="weights removed",
                y_label="generated tokens, as a multiple of the dense model's",
                x_text=_percent,
                y_text=lambda v: f"{v:.3g}×",
                reference=(1.0, 1.0, 1.0),
            )
        )
    return plots


def _layer_plots(arms: dict[str, list[Cell]]) -> list[dict[str, Any]]:
    """Held-out error by block, one small plot per kind of layer, one scale for all."""
    errors: dict[str, dict[str, dict[int, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for label, cells in arms.items():
        for layer in (layer for cell in cells for layer in cell.layers):
            if layer.error_held_out is not None and layer.error_held_out > 0:
                errors[layer.name.rsplit(".", 1)[-1]][label][layer.block].append(layer.error_held_out)
    means = {
        kind: [
            Series(label, arms[label][0].arm, [_point(b, math.fsum(v) / len(v)) for b, v in sorted(blocks.items())])
            for label, blocks in by_arm.items()
        ]
        for kind, by_arm in errors.items()
    }
    every = [p[1] for series in means.values() for s in series for p in s.points]
    log = bool(every) and max(every) > 8 * min(every)
    return [
        _plot(
            series,
            title=kind,
            x_label="block",
            y_label="relative error",
            log=log,
            y_range=(min(every) / 1.2, max(every) * 1.2) if log else (0, max(every) * 1.06),
            size=(230, 180),
            direct=False,
        )
        for kind, series in means.items()
    ]


def _region_plot(arms: dict[str, list[Cell]]) -> list[dict[str, Any]]:
    """Held-out layer error by region, mean over layers."""
    regions = _unique(r for cells in arms.values() for c in cells for layer in c.layers for r in layer.error_by_region)
    means = {
        label: [_mean(layer.error_by_region.get(r) for c in cells for layer in c.layers) for r in regions]
        for label, cells in arms.items()
    }
    return _profile(arms, means, regions, "Layer outputs, by region", "relative error, mean over layers")


def _trace_plots(arms: dict[str, list[Cell]]) -> list[dict[str, Any]]:
    """Error of the final hidden states, by part of the trace and by position."""
    parts = ("prompt", "early_think", "late_think", "answer")
    hidden = {label: [c.hidden_error for c in cells if c.hidden_error] for label, cells in arms.items()}
    means = {
        label: [_mean(getattr(error, part) for error in errors) for part in parts] for label, errors in hidden.items()
    }
    names = ("prompt", "early think", "late think", "answer")
    plots = _profile(arms, means, names, "Final hidden states, by part of the trace", "relative squared error")
    curves = []
    for label, errors in hidden.items():
        buckets: dict[float, list[CurvePoint]] = defaultdict(list)
        for point in (point for error in errors for point in error.curve if point.tokens):
            buckets[point.position].append(point)
        points = [
            _point(position, math.fsum(p.error * p.tokens for p in same) / sum(p.tokens for p in same))
            for position, same in sorted(buckets.items())
        ]
        if points:
            curves.append(Series(label, arms[label][0].arm, points))
    if curves:
        relative = all(point[0] <= 1 for curve in curves for point in curve.points)
        plots.append(
            _plot(
                curves,
                title="Along the chain of thought",
                x_label="position in the chain of thought" if relative else "think token",
                y_label="relative squared error",
                x_text=_percent if relative else _count,
            )
        )
    return plots


def _profile(
    arms: dict[str, list[Cell]],
    means: dict[str, list[float | None]],
    names: Sequence[str],
    title: str,
    y_label: str,
) -> list[dict[str, Any]]:
    """A plot over named places, in a list; empty when no arm has a value."""
    series = []
    for label, values in means.items():
        points = [_point(i, v) for i, v in enumerate(values) if v is not None]
        if points:
            series.append(Series(label, arms[label][0].arm, points))
    return [_plot(series, title=title, x_label="", y_label=y_label, names=names)] if series else []


# ---------------------------------------------------------------------------------------------------- pages

INTERVALS = (
    "The interval of one run is over questions: another draw of questions of this kind would land in it 95 times in "
    "100. Where a row averages several seeds, the variance between seeds, divided by their number, is added to the "
    "question-level variance, which does not shrink because all seeds answer the same questions. A gap between two "
    "arms is called clear only when it exceeds the 95 % interval of an unpaired difference, which is the cautious "
    "choice for arms that answered the same questions."
)

GLOSSARY = {
    "arm": "Which tokens decided what to prune; everything else is equal between arms.",
    "dense": "The model before pruning.",
    "corpus": "Calibrated on general web text.",
    "prompt": "Calibrated on the prompts alone.",
    "rac": "Calibrated on prompts and the dense model's own chain of thought and answer.",
    "think": "Calibrated on the chain of thought alone.",
    "sparsity": "Share of the prunable weights set to zero.",
    "pass@1": "Chance that one sampled answer is correct, averaged over questions.",
    "points": "Percentage points of pass@1 against the dense model.",
    "tokens": "Generated tokens per answer, chain of thought included.",
    "time": "Wall-clock time of the evaluation against the dense model's, at the same settings.",
    "truncated": "Stopped by the token limit.",
    "loops": "Ends in a repeating loop.",
    "unclosed": "Never closes its chain of thought.",
    "tokens per correct": "All generated tokens divided by the correct answers: the price of one right answer.",
    "layer error": "Squared change of a layer's outputs over their squared size, on tokens kept from the solver.",
    "hidden error": "The same for the last hidden states of the whole model, on held-out traces of the dense model.",
}


def _arms_at(report: Report, focus: SummaryRow, has: Callable[[Cell], Any]) -> tuple[str, dict[str, list[Cell]]]:
    """Cells by arm in one setting, the focus if any cell there `has` the data, else the sparsest; and its name."""
    rows, groups = summarise(report.cells), _groups(report.cells)
    found = [
        (row, group) for row, group in zip(rows, groups, strict=True) if row.arm != "dense" and any(map(has, group))
    ]
    if not found:
        return "", {}
    settings = [_setting(row) for row, _ in found]
    setting = _setting(focus) if _setting(focus) in settings else max(settings)
    here = [(row, [cell for cell in group if has(cell)]) for row, group in found if _setting(row) == setting]
    arms = {_label(row, [other for other, _ in here]): group for row, group in here}
    return _place(here[0][0], rows), arms


def _families(report: Report, focus: SummaryRow | None) -> tuple[list[str], list[tuple[str, str, list[float | None]]]]:
    """pass@1 by question family of the dense model and of the focus setting: families, then (label, arm, values)."""
    if focus is None:
        return [], []
    _, arms = _arms_at(report, focus, lambda cell: cell.evaluation.by_family)
    dense = [c for c in report.cells if c.arm == "dense" and c.evaluation.question_set == focus.question_set]
    arms = {"dense": dense, **arms} if dense else arms
    families = sorted({family for cells in arms.values() for c in cells for family in c.evaluation.by_family})
    return families, [
        (label, cells[0].arm, [_mean(c.evaluation.by_family.get(family) for c in cells) for family in families])
        for label, cells in arms.items()
    ]


def _colours(report: Report) -> dict[str, int]:
    """A colour per arm, the same everywhere: 0 to 4 for the known arms, 5 to 7 in turn for the others."""
    others = sorted({cell.arm for cell in report.cells} - set(ARMS))
    return {arm: i for i, arm in enumerate(ARMS)} | {arm: len(ARMS) + i % 3 for i, arm in enumerate(others)}


def _facts(report: Report) -> list[tuple[str, str]]:
    """What the reader must know before the first number."""
    first = report.cells[0].evaluation if report.cells else None
    facts = [("model", _model_name(report))]
    if first:
        facts.append(("questions", f"{first.questions} × {first.samples} samples, {first.question_set}"))
    budgets = _budgets(cell.calibration_tokens for cell in report.cells if cell.arm != "dense")
    if budgets:
        facts.append(("calibration", f"{' or '.join(budgets)} tokens per arm"))
    for name in ("solver", "pattern"):
        values = _unique(getattr(cell, name) for cell in report.cells if cell.arm != "dense")
        if values:
            facts.append((name, ", ".join(values)))
    if report.cells:
        facts.append(("seeds", str(len({cell.seed for cell in report.cells}))))
    if report.leaks:
        facts.append(("leak check", _leak_sentence(report.leaks)))
    facts.append(("written", report.created))
    return facts


def _leak_sentence(check: LeakCheck) -> str:
    """What was compared with what, and what was found."""
    compared = f"{check.evaluation:,} evaluation questions against {check.calibration:,} calibration texts"
    equal = f"{check.equal or 'none'} equal to one but for case and punctuation"
    return f"{compared}: {equal}, {check.near or 'none'} sharing half of their {check.run}-word runs with them"


def _trace_facts(traces: TraceSummary) -> list[tuple[str, str]]:
    total = sum(traces.by_region.values()) or 1
    return [
        ("traces", str(traces.traces)),
        ("tokens", _count(traces.tokens)),
        *((f"of which {name}", f"{_count(n)} ({_percent(n / total, 1)})") for name, n in traces.by_region.items()),
        ("correct", _maybe(lambda value: _percent(value, 1))(traces.pass_at_1)),
        ("mean chain of thought", f"{_count(traces.mean_think_tokens)} tokens"),
        ("truncated", _percent(traces.truncated, 1)),
        *((f"dropped, {reason}", str(n)) for reason, n in traces.dropped.items()),
        ("sampling", _duration(traces.seconds)),
    ]


def _context(report: Report) -> dict[str, Any]:
    """Everything the templates show, computed."""
    focus = _focus(report.summary)
    layers_at, layer_arms = _arms_at(report, focus, lambda c: c.layers) if focus else ("", {})
    hidden_at, hidden_arms = _arms_at(report, focus, lambda c: c.hidden_error) if focus else ("", {})
    layer_plots = _layer_plots(layer_arms)
    families, by_family = _families(report, focus)
    groups: list[tuple[str, list[tuple[str, SummaryRow]]]] = []
    for row in report.summary:
        pieces = (
            ["dense model"] if row.arm == "dense" else [f"{_percent(row.sparsity)} removed", row.pattern, row.solver]
        )
        name = ", ".join([*pieces, row.question_set] if len({r.question_set for r in report.summary}) > 1 else pieces)
        if not groups or groups[-1][0] != name:
            groups.append((name, []))
        label = _label(row, [other for other in report.summary if _setting(other) == _setting(row)])
        groups[-1][1].append((label, row))
    total = math.fsum(stage.seconds for stage in report.stages)
    return {
        "report": report,
        "headline": headline(report),
        "model_name": _model_name(report),
        "facts": _facts(report),
        "groups": groups,
        "colour": _colours(report),
        "dense_of": {row.question_set: None for row in report.summary}
        | {row.question_set: row.pass_at_1 for row in report.summary if row.arm == "dense"},
        "sparsity_plots": _sparsity_plots(report.summary),
        "layers_at": layers_at,
        "layer_arms": [(label, cells[0].arm) for label, cells in layer_arms.items()],
        "layer_plots": layer_plots,
        "layers_log": any(plot["log"] for plot in layer_plots),
        "region_plots": _region_plot(layer_arms),
        "hidden_at": hidden_at,
        "trace_plots": _trace_plots(hidden_arms),
        "families": families,
        "by_family": by_family,
        "focus_at": _place(focus, report.summary) if focus else "",
        "total_seconds": total,
        "shares": [stage.seconds / total if total else 0.0 for stage in report.stages],
        "trace_facts": _trace_facts(report.traces) if report.traces else [],
        "details": [
            (name, _flat(part))
            for name, part in (
                ("Recipe", report.recipe),
                ("Model", report.model),
                ("Hardware", report.hardware),
                ("Versions", {"secateurs": report.secateurs, **report.versions}),
            )
            if part
        ],
        "odd_layers": [
            (c, layer) for c in report.cells for layer in c.layers if layer.note or layer.zeros != layer.zeros_asked
        ],
        "intervals": INTERVALS,
        "glossary": GLOSSARY,
    }


def _markdown_text(value: Any) -> str:
    """Text that stays text inside a Markdown table."""
    text = " ".join(str(value).split())
    for plain, safe in (
        ("&", "&amp;"),
        ("<", "&lt;"),
        (">", "&gt;"),
        ("|", "\\|"),
        ("`", "\\`"),
        ("*", "\\*"),
        ("_", "\\_"),
    ):
        text = text.replace(plain, safe)
    return text


def _templates(autoescape: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("secateurs"),
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "percent": _maybe(_percent),
        "percent1": _maybe(lambda value: _percent(value, 1)),
        "points": _maybe(_points),
        "times": _maybe(_times),
        "count": _maybe(_count),
        "number": _maybe(lambda value: f"{value:.3g}"),
        "duration": _maybe(_duration),
        "md": _markdown_text,
    }
    return environment


def to_markdown(report: Report) -> str:
    """The result as Markdown: headline, tables, costs, provenance."""
    return _templates(autoescape=False).get_template("report.md.j2").render(_context(report))


def to_html(report: Report) -> str:
    """The result as one HTML page that needs nothing else: no scripts, no fonts, no network."""
    return _templates(autoescape=True).get_template("report.html.j2").render(_context(report))
