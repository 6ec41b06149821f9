"""What a report says, shown: a headline, a table for the terminal, Markdown, one HTML page that needs no network."""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from rich.table import Table
from rich.text import Text

from secateurs.artifacts import atomic_write
from secateurs.report import (
    ARMS,
    Cell,
    Comparison,
    CurvePoint,
    LeakCheck,
    Model,
    Report,
    Setting,
    SummaryRow,
    TraceSummary,
    distinct,
    groups_of,
    keys_of,
    layer_error,
    mean_of,
    model_name,
    same_budget,
    setting_of,
    summarise,
    thinking_error,
    to_json,
)

# ---------------------------------------------------------------------------------------------------- the headline


class Contest(NamedTuple):
    """rac against the better of corpus and prompt-only calibration, in one setting, and their paired test.

    There is no test where they answered no question of one seed both.
    """

    rac: SummaryRow
    rival: SummaryRow
    test: Comparison | None

    @property
    def gap(self) -> float:
        return self.test.mean if self.test else self.rac.pass_at_1 - self.rival.pass_at_1

    @property
    def verdict(self) -> int:
        """1 when rac is ahead, -1 behind, 0 when that is not clear.

        It is clear if the paired test says so, corrected for all comparisons of the report, and the interval, which
        has in it what seeds differ by.
        """
        clear = self.test and self.test.p_holm < CLEAR and not _holds_0(self.test)
        return int(math.copysign(1, self.gap)) if clear else 0

    @property
    def doubt(self) -> str:
        """Why it is not clear, in words."""
        if self.test is None:
            return "a gap that is not tested (no question of one seed was answered by both)"
        if self.test.p_holm >= CLEAR:
            return f"a gap that chance may be all of ({_chance(self.test.p_holm)})"
        ends = " to ".join(_points(-100 * end) for end in self.test.interval)
        return f"a gap that {'seeds differ too much about' if self.test.seeds > 1 else 'may be 0'} ({ends} points)"


def _holds_0(test: Comparison) -> bool:
    return test.interval[0] <= 0 <= test.interval[1]


def _contests(report: Report) -> list[Contest]:
    """One a setting where rac has a rival of its budget, at the largest such budget."""
    rivals: dict[Setting, list[SummaryRow]] = defaultdict(list)
    for row in report.summary:
        if row.arm in ("corpus", "prompt"):
            rivals[setting_of(row)].append(row)
    contests: dict[Setting, Contest] = {}
    for rac in sorted((r for r in report.summary if r.arm == "rac"), key=lambda row: row.calibration_tokens):
        setting = setting_of(rac)
        beside = [row for row in rivals[setting] if same_budget(row.calibration_tokens, rac.calibration_tokens)]
        if beside:
            rival = max(beside, key=lambda row: row.pass_at_1)
            contests[setting] = Contest(rac, rival, _test_of(report, rac, rival))
    return list(contests.values())


def _test_of(report: Report, first: SummaryRow, second: SummaryRow) -> Comparison | None:
    """The comparison of two rows."""
    rows = [(setting_of(row), row.arm, row.calibration_tokens) for row in (first, second)]
    for one in report.comparisons:
        settings = [Setting(one.sparsity, one.question_set, one.pattern, solver) for solver in one.solvers]
        if list(zip(settings, one.arms, one.calibration_tokens, strict=True)) == rows:
            return one
    return None


def _focus(report: Report) -> SummaryRow | None:
    """A row of the setting to look at closely: where rac and its rival differ most, else the sparsest."""
    rows, contests = report.summary, _contests(report)
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
    others = [setting_of(r) for r in rows if r.arm != "dense"]
    extra = [value for i, value in enumerate(setting_of(row)) if i and len({other[i] for other in others}) > 1]
    return ", ".join([_percent(row.sparsity) + unit, *map(str, extra)])


def _chance(p: float) -> str:
    if p < 0.0001:
        return "p < .0001"
    return "p = " + f"{p:.{4 if p < 0.1 else 2}f}".removeprefix("0")


def headline(report: Report) -> str:
    """The result in one sentence, whichever way it went, and another on models that were asked nothing."""
    parts = [_result(report)] if report.summary or not report.unasked else []
    return " ".join([*parts, _without_questions(report.unasked)] if report.unasked else parts)


def _result(report: Report) -> str:
    """What the questions said.

    It looks at the setting where rac and the better of corpus and prompt-only calibration differ most, says when
    a gap is not clear, and lists the settings where rac is not clearly ahead. Only rows of one budget are compared.
    """
    rows = report.summary
    pruned = [row for row in rows if row.arm != "dense"]
    budgets = len(_budgets(row.calibration_tokens for row in pruned)) > 1

    def budget(row: SummaryRow) -> str:
        return f"{_budgets([row.calibration_tokens])[0]} tokens" if budgets else ""

    focus = _focus(report)
    if focus is None:
        dense = rows[0] if rows else None
        return f"Only the dense model was measured: it {_fate(dense)}." if dense else "Nothing was measured yet."
    contests = sorted(_contests(report), key=lambda contest: abs(contest.gap), reverse=True)
    if not contests:
        arms = [row for row in pruned if setting_of(row) == setting_of(focus)]
        who = [_arm_name(row.arm) + (f" on {budget(row)}" if budgets else "") for row in arms]
        fates = "; ".join(f"{name} {_fate(row, i == 0)}" for i, (name, row) in enumerate(zip(who, arms, strict=True)))
        if all(row.arm != "rac" for row in arms):
            missing = "rac was not measured"
        elif any(row.arm in _ARM_NAMES for row in arms):
            missing = "rac has no rival of its budget to be compared with"
        else:
            missing = "no corpus or prompt-only calibration was measured beside it"
        return f"At {_place(focus, rows, ' sparsity')} {fates}; {missing}."
    best = contests[0]
    rac, rival = best.rac, best.rival
    place = _place(rac, rows, " sparsity") + (f", {budget(rac)}" if budgets else "")
    pair = f"{_arm_name(rival.arm)} {_fate(rival)}; rac {_fate(rac, whole=False)}"
    if best.verdict > 0:
        text = f"At {place} {pair}"
    elif best.verdict < 0:
        text = f"rac does not help: at {place} {pair}"
    else:
        text = f"rac does not clearly help: at {place} {pair}, {best.doubt}"
    for verdict in (0, -1):
        others = sorted((c for c in contests[1:] if c.verdict == verdict), key=lambda c: setting_of(c.rac))
        if others:
            unclear = "not tested" if all(c.test is None for c in others) else "not clear"
            words = f"the gap is {unclear}" if verdict == 0 else "rac is behind"
            text += f"; at {' and '.join(_place(c.rac, rows) for c in others)} {words}"
    return text + "."


def _without_questions(models: Sequence[Model]) -> str:
    who = "1 model was" if len(models) == 1 else f"{len(models)} models were"
    errors = sorted(error for one in models if (error := layer_error(one)) is not None)
    if not errors:
        return f"{who} pruned and asked nothing."
    found = " to ".join(distinct(map(_short, (errors[0], errors[-1]))))
    return f"{who} pruned and asked nothing; the error of layers on held-out traces is {found}."


# ---------------------------------------------------------------------------------------------------- words and tables


def _percent(value: float, digits: int = 0) -> str:
    text = f"{100 * value:.{max(digits, 1)}f}"
    return (text.removesuffix(".0") if digits == 0 else text) + " %"


def _short(value: float) -> str:
    return f"{value:.3g}"


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


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, text) pairs."""
    if isinstance(value, dict) and value:
        return [pair for key, part in value.items() for pair in _flat(part, f"{name}.{key}" if name else key)]
    return [(name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))] if name else []


def console_table(report: Report) -> Table:
    """The result table for a terminal; of models that were asked nothing, where no other was asked anything."""
    table = Table(title=Text(report.title))
    if report.unasked and not report.summary:
        for head in ("arm", "sparsity", "layer error", "hidden error", "solver", "pattern", "seed"):
            left = head in ("arm", "solver", "pattern")
            table.add_column(head, justify="left" if left else "right", overflow="fold")
        for one in report.unasked:
            errors = [_maybe(_short)(error) for error in (layer_error(one), thinking_error(one))]
            cells = (one.arm, _percent(one.sparsity), *errors, one.solver, one.pattern, str(one.seed))
            table.add_row(*map(Text, cells))
        return table
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
        if previous is not None and setting_of(row) != setting_of(previous):
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
        if not kept or not same_budget(count, kept[-1]):
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
    regions = distinct(r for cells in arms.values() for c in cells for layer in c.layers for r in layer.error_by_region)
    means = {
        label: [mean_of(layer.error_by_region.get(r) for c in cells for layer in c.layers) for r in regions]
        for label, cells in arms.items()
    }
    return _profile(arms, means, regions, "Layer outputs, by region", "relative error, mean over layers")


def _trace_plots(arms: dict[str, list[Cell]]) -> list[dict[str, Any]]:
    """Error of the final hidden states, by part of the trace and by position."""
    parts = ("prompt", "early_think", "late_think", "answer")
    hidden = {label: [c.hidden_error for c in cells if c.hidden_error] for label, cells in arms.items()}
    means = {
        label: [mean_of(getattr(error, part) for error in errors) for part in parts] for label, errors in hidden.items()
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


@dataclass(frozen=True)
class Capped:
    """Mean pass@1 of an arm's models under caps on thinking tokens."""

    label: str
    arm: str
    at: dict[int, float]


def _capped(report: Report, focus: SummaryRow | None) -> list[Capped]:
    """Of the dense model and of one setting, from the first cap under which any answer is right."""
    arms = _beside_dense(report, focus, lambda cell: cell.evaluation.by_cap) if focus else {}
    first = min(
        (p.cap for cells in arms.values() for c in cells for p in c.evaluation.by_cap if p.pass_at_1), default=0
    )
    found = []
    for label, cells in arms.items():
        at: dict[int, list[float]] = defaultdict(list)
        for point in (point for cell in cells for point in cell.evaluation.by_cap if point.cap >= first):
            at[point.cap].append(point.pass_at_1)
        found.append(Capped(label, cells[0].arm, {cap: math.fsum(v) / len(v) for cap, v in sorted(at.items())}))
    return found


def _cap_table(capped: Sequence[Capped]) -> tuple[list[int], list[tuple[str, list[float]]]]:
    """The same in few numbers: caps that all have, evenly chosen from the first to the last, and each one's pass@1."""
    caps = sorted(set.intersection(*(set(one.at) for one in capped))) if capped else []
    few = distinct(caps[round(i * (len(caps) - 1) / (CAPS_SHOWN - 1))] for i in range(CAPS_SHOWN)) if caps else []
    return few, [(one.label, [one.at[cap] for cap in few]) for one in capped]


def _cap_plot(capped: Sequence[Capped]) -> list[dict[str, Any]]:
    """Accuracy against a cap on thinking tokens."""
    series = [
        Series(one.label, one.arm, [_point(math.log2(cap), y) for cap, y in one.at.items()], int(one.arm == "dense"))
        for one in capped
    ]
    if not series:
        return []
    return [
        _plot(
            series,
            title="Accuracy under a cap on thinking",
            x_label="most thinking tokens",
            y_label="pass@1, replies that think longer counted as wrong",
            x_text=lambda power: _count(2**power),
            y_text=_percent,
        )
    ]


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

CAPS_SHOWN = 6  # in a table
INTERVALS = (
    "If all was done again and again with other questions of this kind, about 95 in 100 intervals made this way would "
    "hold the value on all such questions; which ones do is not known. That of one seed is Wilson's, with fewer "
    "questions than were asked where several samples of one agree. Several seeds are other calibrations, and often "
    "other questions. Answers to one question count as one, and what seeds differ by beyond the chance in their "
    "answers is added (two-way clustered variance): a seed with its own questions narrows the interval, one with the "
    "same questions takes out no more than the chance in single answers. What two or three seeds differ by is a rough "
    "guess, so where they differ much the interval is too narrow. A paired difference has Agresti and Min's interval, "
    "with what seeds differ by added alike. A gap between two arms is called clear only when the paired test, "
    "corrected for the number of comparisons, has p below .05 and the interval of the difference does not hold 0."
)
TESTS = (
    "The same questions, answered by two pruned models: points of pass@1 the first is ahead, and the share of sign "
    "flips of the differences that come out as large (exact; for one answer a question, McNemar's test), as it is and "
    "corrected for all comparisons here (Holm). It asks whether these models differ on questions like these, and says "
    "nothing of other calibration sets; the interval of several seeds does."
)
CLEAR = 0.05

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
    "time": "Wall-clock time of the evaluation against the dense model's, at the same settings; not given where "
    "another number of models was asked at the same time on the machine.",
    "truncated": "Stopped by the token limit.",
    "loops": "Ends in a repeating loop.",
    "unclosed": "Never closes its chain of thought.",
    "tokens per correct": "All generated tokens divided by the correct answers: the price of one right answer.",
    "layer error": "Squared change of a layer's outputs over their squared size, on tokens kept from the solver.",
    "hidden error": "The same for the last hidden states of the whole model, on held-out traces of the dense model.",
}


def _arms_at(report: Report, focus: SummaryRow, has: Callable[[Cell], Any]) -> tuple[str, dict[str, list[Cell]]]:
    """Cells by arm in one setting, the focus if any cell there `has` the data, else the sparsest; and its name."""
    rows, groups = summarise(report.cells), groups_of(report.cells)
    found = [
        (row, group) for row, group in zip(rows, groups, strict=True) if row.arm != "dense" and any(map(has, group))
    ]
    if not found:
        return "", {}
    settings = [setting_of(row) for row, _ in found]
    setting = setting_of(focus) if setting_of(focus) in settings else max(settings)
    here = [(row, [cell for cell in group if has(cell)]) for row, group in found if setting_of(row) == setting]
    arms = {_label(row, [other for other, _ in here]): group for row, group in here}
    return _place(here[0][0], rows), arms


def _beside_dense(report: Report, focus: SummaryRow, has: Callable[[Cell], Any]) -> dict[str, list[Cell]]:
    """The dense model's cells and those of the focus setting, by label."""
    _, arms = _arms_at(report, focus, has)
    dense = [c for c in report.cells if c.arm == "dense" and c.evaluation.question_set == focus.question_set]
    return {"dense": dense, **arms} if dense else arms


def _families(report: Report, focus: SummaryRow | None) -> tuple[list[str], list[tuple[str, str, list[float | None]]]]:
    """pass@1 by question family of the dense model and of the focus setting: families, then (label, arm, values)."""
    if focus is None:
        return [], []
    arms = _beside_dense(report, focus, lambda cell: cell.evaluation.by_family)
    families = sorted({family for cells in arms.values() for c in cells for family in c.evaluation.by_family})
    if len(families) < 2:
        return [], []
    return families, [
        (label, cells[0].arm, [mean_of(c.evaluation.by_family.get(family) for c in cells) for family in families])
        for label, cells in arms.items()
    ]


def _tests(report: Report) -> list[tuple[str, str, Comparison]]:
    """Each comparison as who is compared, where, and the numbers; the clearest first."""
    pruned = [row for row in report.summary if row.arm != "dense"]
    budgets = len(_budgets(row.calibration_tokens for row in pruned)) > 1
    shown = []
    for test in sorted(report.comparisons, key=lambda test: (test.p, -abs(test.mean))):
        by_arm = test.solvers[0] == test.solvers[1]
        who = " over ".join(test.arms if by_arm else test.solvers)
        setting = Setting(test.sparsity, test.question_set, test.pattern, test.solvers[0])
        others = [setting_of(row) for row in pruned]
        where = [_percent(test.sparsity)]
        where += [str(v) for i, v in enumerate(setting) if 0 < i < 3 and len({other[i] for other in others}) > 1]
        if not by_arm:
            where.append(test.arms[0])
        elif len({other.solver for other in others}) > 1:
            where.append(test.solvers[0])
        if budgets:
            where.append(f"{_budgets(test.calibration_tokens[:1])[0]} tokens")
        shown.append((who, ", ".join(where), test))
    return shown


def _colours(report: Report) -> dict[str, int]:
    """A colour per arm, the same everywhere: 0 to 4 for the known arms, 5 to 7 in turn for the others."""
    others = sorted({cell.arm for cell in report.cells} - set(ARMS))
    return {arm: i for i, arm in enumerate(ARMS)} | {arm: len(ARMS) + i % 3 for i, arm in enumerate(others)}


def _facts(report: Report) -> list[tuple[str, str]]:
    """What the reader must know before the first number."""
    facts = [("model", model_name(report))]
    asked = [cell.evaluation for cell in report.cells]
    if asked:
        sets = distinct(f"{one.questions} × {one.samples} samples, {one.question_set}" for one in asked)
        facts.append(("questions", "; ".join(sets)))
    pruned = [*(cell for cell in report.cells if cell.arm != "dense"), *report.unasked]
    budgets = _budgets(one.calibration_tokens for one in pruned)
    if budgets:
        facts.append(("calibration", f"{' or '.join(budgets)} tokens per arm"))
    for name in ("solver", "pattern"):
        values = distinct(getattr(one, name) for one in pruned)
        if values:
            facts.append((name, ", ".join(values)))
    if seeds := {one.seed for one in (*report.cells, *report.unasked)}:
        facts.append(("seeds", str(len(seeds))))
    facts += _leak_facts(report)
    if report.reloaded is not None:
        models = "model" if len(pruned) == 1 else "models"
        off = f"off by at most {report.reloaded:.1g} of the largest" if report.reloaded else "the same to the bit"
        how = "with transformers alone"
        if report.reloaded_in_blocks:
            how = f"{report.reloaded_in_blocks} of them block by block, as the whole had no room"
        facts.append(("reloaded", f"{len(pruned)} {models}, {how}: logits are {off}"))
    facts.append(("written", report.created))
    return facts


def _leak_facts(report: Report) -> list[tuple[str, str]]:
    """Every run's check, and how many runs had one where some had none."""
    runs, checked = keys_of(report), {check.recipe_key for check in report.leaks}
    facts = []
    if report.cells and len(checked) < len(runs):
        facts.append(("leak check", f"{len(checked)} of {len(runs)} runs" if len(runs) > 1 else "not made"))
    for check in report.leaks:
        facts.append(("leak check" + (f", {check.recipe_key}" if len(runs) > 1 else ""), _leak_sentence(check)))
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
        ("ids", traces.ids),
        ("sampling", _duration(traces.seconds)),
    ]


def _context(report: Report) -> dict[str, Any]:
    """Everything the templates show, computed."""
    focus = _focus(report)
    layers_at, layer_arms = _arms_at(report, focus, lambda c: c.layers) if focus else ("", {})
    hidden_at, hidden_arms = _arms_at(report, focus, lambda c: c.hidden_error) if focus else ("", {})
    layer_plots = _layer_plots(layer_arms)
    capped = _capped(report, focus)
    caps, by_cap = _cap_table(capped)
    families, by_family = _families(report, focus)
    groups: list[tuple[str, list[tuple[str, SummaryRow]]]] = []
    for row in report.summary:
        pieces = (
            ["dense model"] if row.arm == "dense" else [f"{_percent(row.sparsity)} removed", row.pattern, row.solver]
        )
        name = ", ".join([*pieces, row.question_set] if len({r.question_set for r in report.summary}) > 1 else pieces)
        if not groups or groups[-1][0] != name:
            groups.append((name, []))
        label = _label(row, [other for other in report.summary if setting_of(other) == setting_of(row)])
        groups[-1][1].append((label, row))
    total = math.fsum(stage.seconds for stage in report.stages)
    return {
        "report": report,
        "headline": headline(report),
        "model_name": model_name(report),
        "facts": _facts(report),
        "groups": groups,
        "unasked": [(one, layer_error(one), thinking_error(one)) for one in report.unasked],
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
        "cap_plots": _cap_plot(capped),
        "caps": caps,
        "by_cap": by_cap,
        "tests": _tests(report),
        "tests_note": TESTS,
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
            (c, layer)
            for c in (*report.cells, *report.unasked)
            for layer in c.layers
            if layer.note or layer.zeros != layer.zeros_asked
        ],
        "intervals": INTERVALS,
        "glossary": GLOSSARY,
    }


_MARKDOWN = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"} | {mark: f"\\{mark}" for mark in "|`*_"})


def _markdown_text(value: Any) -> str:
    """Text that stays text inside a Markdown table."""
    return " ".join(str(value).split()).translate(_MARKDOWN)


def templates(autoescape: bool) -> jinja2.Environment:
    """The package's templates, with the filters that they use."""
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
        "chance": _chance,
        "times": _maybe(_times),
        "count": _maybe(_count),
        "number": _maybe(_short),
        "duration": _maybe(_duration),
        "md": _markdown_text,
    }
    return environment


def to_markdown(report: Report) -> str:
    """The result as Markdown: headline, tables, costs, provenance."""
    return templates(autoescape=False).get_template("report.md.j2").render(_context(report))


def to_html(report: Report) -> str:
    """The result as one HTML page that needs nothing else: no scripts, no fonts, no network."""
    return templates(autoescape=True).get_template("report.html.j2").render(_context(report))


def write(report: Report, folder: str | Path) -> None:
    """Writes report.html, report.md and, last, report.json into `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "report.html", to_html(report))
    atomic_write(folder / "report.md", to_markdown(report))
    atomic_write(folder / "report.json", to_json(report))
