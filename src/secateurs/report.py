"""What was measured: one schema, written as JSON.

`Report` is the record. Everything shown (`page.py`) is computed from it, so a report can be merged, re-read and
re-drawn without the models. Numbers are finite; a quantity that was not measured is null.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from secateurs.statistics import difference_interval, holm, share_interval, sign_flip, spread

SCHEMA = "secateurs.report"
VERSION = 5
ARMS = ("dense", "corpus", "prompt", "rac", "think")
SAME_BUDGET = 1.25  # calibration token counts within this ratio are one budget: whole traces overshoot it a little

T = TypeVar("T")
M = TypeVar("M", bound="Model")

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
    tokens: TokenCount = Field(
        default=0, description="Calibration tokens that reached it: of an expert, those routed to it."
    )
    alpha: Fraction = Field(default=0.0, description="How far it was made to reproduce the dense model's output.")
    beta: Fraction = Field(default=0.0, description="How far it was made to make up for the residual stream.")
    block_error: Annotated[tuple[float, float], Field(strict=False), Unit("ratio of squared norms")] | None = Field(
        default=None, description="Held-out error of its block's output before and after the fine-tune."
    )


class Difference(_Model):
    """A paired difference to the dense model: same questions, mean over questions."""

    mean: Annotated[float, Unit("fraction, -1 to 1")] = Field(description="pass@1 minus the dense model's pass@1.")
    interval: Annotated[tuple[float, float], Field(strict=False), Unit("fraction, -1 to 1")] = Field(
        description="95 % interval of that mean, over questions (Agresti and Min's), so not centred at it."
    )


class CapPoint(_Model):
    """Accuracy if thinking had been cut off at one length."""

    cap: TokenCount = Field(description="The most thinking tokens.")
    pass_at_1: Fraction = Field(description="pass@1 where replies that thought longer count as wrong.")


class Evaluation(_Model):
    """What one model did on one question set."""

    question_set: str = Field(description="Name (and version) of the question set.")
    questions: Count = Field(description="Questions asked.")
    samples: Count = Field(description="Completions sampled per question.")
    pass_at_1: Fraction = Field(description="Mean over questions of the share of correct samples.")
    interval: Interval = Field(description="95 % interval of pass@1, over questions.")
    by_family: dict[str, Fraction] = Field(description="pass@1 by question family.")
    by_cap: list[CapPoint] = Field(description="pass@1 under caps on thinking tokens, all from these replies.")
    scores: dict[str, Fraction] = Field(min_length=1, description="Share of correct samples, by question.")
    difference: Difference | None = Field(description="Paired difference to the dense model.")
    prompt_tokens: Tokens = Field(description="Mean prompt length.")
    think_tokens: Tokens = Field(description="Mean length of the chain of thought.")
    answer_tokens: Tokens = Field(description="Mean length of what follows the chain of thought.")
    completion_tokens: Tokens = Field(description="Mean generated tokens per sample.")
    length_ratio: Ratio | None = Field(description="Completion tokens over the dense model's.")
    truncated: Fraction = Field(description="Share of samples stopped by the token limit.")
    looping: Fraction = Field(
        description="Share of samples that end in a repeating loop, whether or not an end marker follows it."
    )
    unclosed_think: Fraction = Field(description="Share of samples that never close the chain of thought.")
    tokens_per_correct: Tokens | None = Field(description="Generated tokens per correct answer; null when none is.")
    tokens: TokenCount = Field(description="All generated tokens.")
    seconds: Seconds = Field(description="Wall-clock time of the evaluation.")
    side_by_side: Count = Field(
        default=0, description="Other models that were asked at the same time on this machine, each with its threads."
    )
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


class Model(_Model):
    """One model of the study: pruned one way with one seed, or dense."""

    arm: str = Field(
        description="Which tokens calibrated it: `dense` (not pruned), `corpus`, `prompt`, `rac`, `think`, "
        "or the label of a mixture."
    )
    sparsity: Fraction = Field(description="Fraction of zeros asked for in the prunable weights.")
    pattern: str = Field(description="`unstructured`, `2:4`, ...")
    solver: str = Field(description="Solver that chose and refitted the weights.")
    seed: int = Field(description="Seed of the calibration.")
    calibration_tokens: TokenCount = Field(description="Tokens it was calibrated on; 0 for dense.")
    hidden_error: HiddenError | None = Field(description="Drift of the final hidden states.")
    layers: list[LayerReport] = Field(description="One entry per pruned matrix.")
    seconds: dict[str, Seconds] = Field(description="Wall-clock time by stage of this cell.")
    path: str = Field(description="Folder the cell's model lives in.")


class Cell(Model):
    """One model of the study that was asked questions."""

    evaluation: Evaluation = Field(description="What the model does on questions.")


class TraceSummary(_Model):
    """The dense model's own traces that calibrated the pruning."""

    traces: Count = Field(description="Traces kept.")
    tokens: TokenCount = Field(description="Their tokens.")
    by_region: dict[str, TokenCount] = Field(description="Their tokens by region.")
    pass_at_1: Fraction | None = Field(description="Share of correct traces; null when they were not checked.")
    mean_think_tokens: Tokens = Field(description="Mean length of the chain of thought.")
    truncated: Fraction = Field(description="Share of traces stopped by the token limit.")
    dropped: dict[str, Count] = Field(description="Traces left out, by reason.")
    ids: str = Field("sampled", description="`retokenised` where a server gave text, which is nearly on-policy.")
    seconds: Seconds = Field(description="Wall-clock time of the sampling.")


class LeakCheck(_Model):
    """Whether a run's evaluation questions were among its calibration texts (normalised text, shared runs of words)."""

    recipe_key: str = Field(description="Content key of the run's recipe.")
    evaluation: Count = Field(description="Different evaluation questions, of all seeds.")
    calibration: Count = Field(description="Different texts they were compared with, of all seeds and arms.")
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
        description="Dense pass@1 minus this pass@1, times 100, of the same seeds; negative is a gain."
    )
    completion_tokens: Tokens = Field(description="Mean generated tokens per sample.")
    length_ratio: Ratio | None = Field(description="Completion tokens over the dense model's of the same seeds.")
    seconds: Seconds = Field(description="Mean wall-clock time of the evaluation.")
    time_ratio: Ratio | None = Field(
        description="Those seconds over the dense model's of the same seeds; null unless each was asked beside as many "
        "others (`side_by_side`) as the dense model was."
    )
    truncated: Fraction = Field(description="Mean share stopped by the token limit.")
    looping: Fraction = Field(description="Mean share that ends in a loop.")
    unclosed_think: Fraction = Field(description="Mean share that never closes the chain of thought.")
    tokens_per_correct: Tokens | None = Field(description="All generated tokens over all correct answers.")
    held_out_error: RelativeError | None = Field(description="`error_held_out`, mean over layers.")
    hidden_error: RelativeError | None = Field(description="Mean of early and late think `HiddenError`.")


class Comparison(_Model):
    """Two ways of pruning on the same questions: those of `Setting` that differ in arm or solver alone."""

    sparsity: Fraction = Field(description="As in `Cell`.")
    pattern: str = Field(description="As in `Cell`.")
    question_set: str = Field(description="As in `Evaluation`.")
    arms: Annotated[tuple[str, str], Field(strict=False)] = Field(description="Arm of the first and of the second.")
    solvers: Annotated[tuple[str, str], Field(strict=False)] = Field(description="Their solvers.")
    calibration_tokens: Annotated[tuple[int, int], Field(strict=False), Unit("tokens")] = Field(
        description="Theirs, as in `SummaryRow`; within 25 % of each other."
    )
    seeds: Count = Field(description="Seeds both were pruned with, and have questions in common.")
    questions: Count = Field(description="Different questions both answered; several seeds' answers to one are one.")
    mean: Annotated[float, Unit("fraction, -1 to 1")] = Field(
        description="pass@1 of the first minus the second, on those questions, mean over seeds."
    )
    interval: Annotated[tuple[float, float], Field(strict=False), Unit("fraction, -1 to 1")] = Field(
        description="95 % interval of that mean, over questions, and over seeds where there are several (Agresti and "
        "Min's, so not centred at it)."
    )
    p: Fraction = Field(
        description="Exact two-sided sign-flip test over questions: how often chance alone would part the two as far."
    )
    p_holm: Fraction = Field(description="The same, corrected by Holm's method for all comparisons of the report.")


class Report(_Model):
    """The whole record of one run, or of several merged."""

    schema_: Literal["secateurs.report"] = Field(default=SCHEMA, alias="schema", description="Always this string.")
    version: Literal[5] = Field(default=VERSION, description="Version of this schema.")
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
    leaks: list[LeakCheck] = Field(
        default=[],
        description="The check for evaluation questions in calibration, one a run; none where none was made.",
    )
    cells: list[Cell] = Field(description="Every model that was asked questions.")
    unasked: list[Model] = Field(default=[], description="Models that were pruned and asked none.")
    reloaded: Fraction | None = Field(
        default=None,
        description="After all pruned models were loaded again in a clean process: the largest difference of their "
        "logits from those at export, over the largest logit. null when they were not.",
    )
    reloaded_in_blocks: int = Field(
        default=0,
        description="How many of them had no room as a whole, and were read block by block instead of by transformers "
        "alone.",
    )
    summary: list[SummaryRow] = Field(description="`summarise(cells)`.")
    comparisons: list[Comparison] = Field(description="`compare(cells)`.")


def schema_markdown() -> str:
    """docs/report-schema.md, made from the models above so that it cannot drift."""
    models = (
        Report,
        Stage,
        TraceSummary,
        LeakCheck,
        Model,
        Cell,
        Evaluation,
        CapPoint,
        Difference,
        LayerReport,
        HiddenError,
        CurvePoint,
        SummaryRow,
        Comparison,
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
        inherited = model.__base__.model_fields if model.__base__ is Model else {}
        if inherited:
            lines.append("| | | | All fields of [Model](#model), and: |")
        for name, field in model.model_fields.items():
            if name in inherited:
                continue
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


def setting_of(row: SummaryRow) -> Setting:
    return Setting(row.sparsity, row.question_set, row.pattern, row.solver)


def keys_of(report: Report) -> list[str]:
    """The recipe key of each of its runs."""
    return report.recipe_key.split(" + ")


def model_name(report: Report) -> str:
    return str(report.model.get("name", "model"))


def mean_of(values: Iterable[float | None]) -> float | None:
    """Mean of what was measured, None when nothing was."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _over(value: float, dense: float | None) -> float | None:
    return value / dense if dense else None


def _average(cells: Sequence[Cell], field: str) -> float:
    return math.fsum(getattr(cell.evaluation, field) for cell in cells) / len(cells)


def _tokens(cells: Sequence[Cell]) -> int:
    """Their mean calibration tokens."""
    return round(math.fsum(c.calibration_tokens for c in cells) / len(cells))


def same_budget(one: int, other: int) -> bool:
    """Whether two numbers of calibration tokens are one budget."""
    return max(one, other) <= SAME_BUDGET * min(one, other)


def _row(cells: Sequence[Cell], dense: Sequence[Cell]) -> SummaryRow:
    """One row from the cells of all seeds.

    Seeds may ask other questions, so each is compared with the dense model of its own seed; where none of these is
    here, with what the cells themselves say of it.
    """
    first = cells[0]
    correct = math.fsum(c.evaluation.pass_at_1 * c.evaluation.questions * c.evaluation.samples for c in cells)
    home = {cell.seed: cell for cell in dense}
    own = [cell for cell in cells if cell.seed in home]
    if own:
        base = [home[cell.seed] for cell in own]
        lost = 100 * (_average(base, "pass_at_1") - _average(own, "pass_at_1"))
        length_ratio = _over(_average(own, "completion_tokens"), _average(base, "completion_tokens"))
        alike = all(a.evaluation.side_by_side == b.evaluation.side_by_side for a, b in zip(own, base, strict=True))
        time_ratio = _over(_average(own, "seconds"), _average(base, "seconds")) if alike else None
    else:
        gain = mean_of(c.evaluation.difference.mean if c.evaluation.difference else None for c in cells)
        lost = None if gain is None else -100 * gain
        length_ratio, time_ratio = mean_of(c.evaluation.length_ratio for c in cells), None
    return SummaryRow(
        arm=first.arm,
        sparsity=first.sparsity,
        pattern=first.pattern,
        solver=first.solver,
        question_set=first.evaluation.question_set,
        calibration_tokens=_tokens(cells),
        seeds=len(cells),
        pass_at_1=_average(cells, "pass_at_1"),
        interval=share_interval([cell.evaluation.scores for cell in cells]),
        points_lost=lost,
        completion_tokens=_average(cells, "completion_tokens"),
        length_ratio=length_ratio,
        seconds=_average(cells, "seconds"),
        time_ratio=time_ratio,
        truncated=_average(cells, "truncated"),
        looping=_average(cells, "looping"),
        unclosed_think=_average(cells, "unclosed_think"),
        tokens_per_correct=_over(math.fsum(c.evaluation.tokens for c in cells), correct),
        held_out_error=mean_of(map(layer_error, cells)),
        hidden_error=mean_of(map(thinking_error, cells)),
    )


def _arm_rank(arm: str) -> tuple[int, str]:
    return (ARMS.index(arm) if arm in ARMS else len(ARMS), arm)


def setting_of_cell(cell: Cell) -> Setting:
    return Setting(cell.sparsity, cell.evaluation.question_set, cell.pattern, cell.solver)


def groups_of(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that differ only by seed, group by group, in the order of the table. Raises ValueError for a clash."""

    def key(cell: Cell) -> tuple[Any, ...]:
        if cell.arm == "dense":
            return (0, 0.0, cell.evaluation.question_set)
        return (1, *setting_of_cell(cell), _arm_rank(cell.arm))

    groups: list[list[Cell]] = []
    for cell in sorted(cells, key=lambda cell: (*key(cell), cell.calibration_tokens)):
        first = groups[-1][0] if groups else None
        if first and key(first) == key(cell) and same_budget(cell.calibration_tokens, first.calibration_tokens):
            groups[-1].append(cell)
        else:
            groups.append([cell])
    for group in groups:
        by_seed: dict[int, Cell] = {}
        for cell in group:
            other = by_seed.setdefault(cell.seed, cell)
            if other is not cell:
                raise ValueError(
                    f"two results for {cell.arm} at {100 * cell.sparsity:g} % with seed {cell.seed} ({other.path} and "
                    f"{cell.path}): keep one, or give each its own seed"
                )
    return groups


def summarise(cells: Sequence[Cell]) -> list[SummaryRow]:
    """One row per arm and setting: dense first, then by sparsity, then corpus, prompt, rac, think, others.

    The interval of one seed is the evaluation's own. That of several is Wilson's too, with the number of questions
    that the variance of the mean stands for (`statistics.share_interval`): between questions, and between seeds where
    they differ by more than the chance in their answers. Seeds that ask other questions narrow it; seeds that ask the
    same only take out the chance in one seed's answers.

    Raises ValueError when two cells claim the same arm, setting and seed.
    """
    groups = groups_of(cells)
    dense = {group[0].evaluation.question_set: group for group in groups if group[0].arm == "dense"}
    return [_row(group, dense.get(group[0].evaluation.question_set, [])) for group in groups]


def compare(cells: Sequence[Cell]) -> list[Comparison]:
    """rac against every other arm where all else is equal, and every two solvers of one arm, on the same questions.

    The test takes the pruned models as they are: it asks whether they differ on questions like these, and says nothing
    of other calibration sets. The interval of several seeds has in it what they differ by, as in `summarise`.
    """
    groups = [group for group in groups_of(cells) if group[0].arm != "dense"]
    found = []
    for one, other in combinations(groups, 2):
        a, b = setting_of_cell(one[0]), setting_of_cell(other[0])
        by_arm = a == b and one[0].arm != other[0].arm and "rac" in (one[0].arm, other[0].arm)
        by_solver = one[0].arm == other[0].arm and a != b and a._replace(solver="") == b._replace(solver="")
        if (by_arm or by_solver) and same_budget(_tokens(one), _tokens(other)):
            first, second = (other, one) if by_arm and other[0].arm == "rac" else (one, other)
            if compared := _compared(first, second):
                found.append(compared)
    corrected = holm([one.p for one in found])
    return [one.model_copy(update={"p_holm": p}) for one, p in zip(found, corrected, strict=True)]


def _compared(first: Sequence[Cell], second: Sequence[Cell]) -> Comparison | None:
    """None if no seed has a question that both answered."""
    by_seed = {cell.seed: cell.evaluation.scores for cell in second}
    pairs = [(cell.evaluation.scores, by_seed.get(cell.seed, {})) for cell in first]
    seeds = [paired for a, b in pairs if (paired := {q: a[q] - b[q] for q in a if q in b})]
    if not seeds:
        return None
    by_question: dict[str, float] = defaultdict(float)
    for question, difference in (item for paired in seeds for item in paired.items()):
        by_question[question] += difference
    p = sign_flip(list(by_question.values()))
    return Comparison(
        sparsity=first[0].sparsity,
        pattern=first[0].pattern,
        question_set=first[0].evaluation.question_set,
        arms=(first[0].arm, second[0].arm),
        solvers=(first[0].solver, second[0].solver),
        calibration_tokens=(_tokens(first), _tokens(second)),
        seeds=len(seeds),
        questions=len(by_question),
        mean=spread(seeds).mean,
        interval=difference_interval(seeds),
        p=p,
        p_holm=p,
    )


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
                f"reports of different models cannot be merged: {model_name(first)} and {model_name(other)}"
            )
    cells = _once(cell for report in reports for cell in report.cells)
    asked = {_identity(cell, without_answers=True) for cell in cells}
    reloaded = [report.reloaded for report in reports]
    stages: dict[str, list[Stage]] = defaultdict(list)
    for report in reports:
        for stage in report.stages:
            stages[stage.name].append(stage)
    return Report(
        title=" + ".join(distinct(r.title for r in reports)),
        created=max(r.created for r in reports),
        secateurs=", ".join(distinct(r.secateurs for r in reports)),
        versions={
            name: ", ".join(distinct(r.versions[name] for r in reports if name in r.versions))
            for name in distinct(name for r in reports for name in r.versions)
        },
        hardware=_same_or_keyed(reports, lambda r: r.hardware),
        model=first.model,
        recipe=_same_or_keyed(reports, lambda r: r.recipe),
        recipe_key=" + ".join(distinct(key for r in reports for key in keys_of(r))),
        stages=[
            Stage(
                name=name,
                seconds=math.fsum(s.seconds for s in same),
                detail="; ".join(distinct(s.detail for s in same if s.detail)),
            )
            for name, same in stages.items()
        ],
        traces=merge_traces(distinct(r.traces for r in reports if r.traces)),
        leaks=distinct(check for r in reports for check in r.leaks),
        cells=cells,
        unasked=[
            one for one in _once(one for report in reports for one in report.unasked) if _identity(one) not in asked
        ],
        reloaded=None if None in reloaded else max(one for one in reloaded if one is not None),
        reloaded_in_blocks=sum(report.reloaded_in_blocks for report in reports),
        summary=summarise(cells),
        comparisons=compare(cells),
    )


def _once(models: Iterable[M]) -> list[M]:
    """Each measurement once, whatever clocks and folders say."""
    unique: dict[str, M] = {}
    for one in models:
        unique.setdefault(_identity(one), one)
    return list(unique.values())


def _identity(one: Model, without_answers: bool = False) -> str:
    """All that was measured, but for clocks and folders."""
    answers: Any = True if without_answers else {"seconds", "side_by_side", "tokens_per_second"}
    skip = {"path": True, "seconds": True, "evaluation": answers, "layers": {"__all__": {"seconds"}}}
    return one.model_dump_json(exclude=skip)


def layer_error(one: Model) -> float | None:
    """Held-out error, mean over layers."""
    return mean_of(layer.error_held_out for layer in one.layers)


def thinking_error(one: Model) -> float | None:
    """Error of the final hidden states, mean of early and late thinking."""
    return mean_of((one.hidden_error.early_think, one.hidden_error.late_think)) if one.hidden_error else None


def distinct(values: Iterable[T]) -> list[T]:
    """Without repeats, in order."""
    kept: list[T] = []
    for value in values:
        if value not in kept:
            kept.append(value)
    return kept


def _same_or_keyed(reports: Sequence[Report], part: Callable[[Report], dict[str, JsonValue]]) -> dict[str, JsonValue]:
    if len(distinct(map(part, reports))) == 1:
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
        return {name: sum(part.get(name, 0) for part in parts) for name in distinct(n for part in parts for n in part)}

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
        ids=", ".join(sorted({store.ids for store in stores})),
        seconds=math.fsum(store.seconds for store in stores),
    )


# ---------------------------------------------------------------------------------------------------- reading, writing


def to_json(report: Report) -> str:
    """The record itself."""
    return report.model_dump_json(by_alias=True, indent=1) + "\n"


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
