"""The report: a strict schema, summaries by hand, a page that loads nothing and escapes all, an honest headline."""

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from secateurs import page as pages
from secateurs import report as reports
from secateurs import study
from secateurs.artifacts import read_json, write_json
from secateurs.cell import Pruned
from secateurs.parallel import silent
from secateurs.recipe import load_recipe
from secateurs.report import (
    Cell,
    Evaluation,
    HiddenError,
    LayerReport,
    LeakCheck,
    Model,
    Report,
    Stage,
    TraceSummary,
    compare,
    merge,
    summarise,
)
from secateurs.statistics import difference_interval, share_interval


def cell(arm, sparsity, seed, correct, tokens, budget=1000, scores=None, solver="sparsegpt") -> Cell:
    """A made-up cell: 100 questions, of which a share `correct` is right (the first ones), `tokens` each."""
    scores = scores or {f"q{i}": float(i < round(100 * correct)) for i in range(100)}
    evaluation = Evaluation(
        question_set="made up", questions=100, samples=1, pass_at_1=correct,
        interval=share_interval([scores]), by_family={"all": correct},
        by_cap=[{"cap": 50, "pass_at_1": correct / 2}, {"cap": 100, "pass_at_1": correct}], scores=scores,
        difference=None if arm == "dense" else {"mean": correct - 0.9, "interval": (correct - 1.0, correct - 0.8)},
        prompt_tokens=10.0, think_tokens=tokens - 5.0, answer_tokens=5.0, completion_tokens=tokens,
        length_ratio=None if arm == "dense" else tokens / 100, truncated=0.0, looping=0.0, unclosed_think=0.0,
        tokens_per_correct=tokens / correct if correct else None, tokens=int(100 * tokens), seconds=tokens / 10,
        tokens_per_second=1000.0,
    )  # fmt: skip
    layer = LayerReport(
        name="layer.0", block=0, shape=(4, 4), pattern="unstructured", zeros_asked=8, zeros=8, error_train=0.01,
        error_held_out=0.02, error_by_region={"think": 0.02}, damp=0.01, seconds=0.1, outcome="ok",
    )  # fmt: skip
    hidden = HiddenError(
        prompt=0.1, early_think=0.2, late_think=0.3, answer=None,
        curve=[{"position": 10.0, "error": 0.2, "tokens": 50}, {"position": 30.0, "error": 0.3, "tokens": 40}],
    )  # fmt: skip
    pruned = arm != "dense"
    return Cell(
        arm=arm, sparsity=sparsity, pattern="unstructured" if pruned else "dense",
        solver=solver if pruned else "none",
        seed=seed, calibration_tokens=budget if pruned else 0, evaluation=evaluation,
        hidden_error=hidden if pruned else None, layers=[layer] if pruned else [], seconds={"evaluate": 1.0}, path="x",
    )  # fmt: skip


def report_of(cells, name="made up", **parts) -> Report:
    return Report(**{
        "title": "Made up", "created": "2026-01-01T00:00:00+00:00", "secateurs": "0", "versions": {}, "hardware": {},
        "model": {"name": name}, "recipe": {}, "recipe_key": "0", "stages": [], "traces": None, "cells": cells,
        "summary": summarise(cells), "comparisons": compare(cells),
    } | parts)  # fmt: skip


STAGES = [Stage(name="trace", seconds=30.0, detail="made up"), Stage(name="evaluate", seconds=90.0)]
TRACES = TraceSummary(
    traces=10, tokens=900, by_region={"prompt": 100, "think": 800}, pass_at_1=0.9, mean_think_tokens=80.0,
    truncated=0.1, dropped={"truncated": 1}, seconds=30.0,
)  # fmt: skip


HELPS = [
    cell("dense", 0.0, 0, 0.9, 100.0), cell("dense", 0.0, 1, 0.9, 100.0),
    cell("prompt", 0.5, 0, 0.1, 300.0), cell("prompt", 0.5, 1, 0.3, 500.0),
    cell("rac", 0.5, 0, 0.85, 110.0), cell("rac", 0.5, 1, 0.85, 110.0),
]  # fmt: skip


def test_summary_by_hand():
    rows = {row.arm: row for row in summarise(HELPS)}
    assert list(rows) == ["dense", "prompt", "rac"]
    prompt = rows["prompt"]
    assert prompt.seeds == 2 and prompt.pass_at_1 == pytest.approx(0.2)
    assert prompt.points_lost == pytest.approx(70) and prompt.length_ratio == pytest.approx(4)
    assert prompt.time_ratio == pytest.approx(4) and prompt.held_out_error == pytest.approx(0.02)
    assert prompt.hidden_error == pytest.approx(0.25)
    assert prompt.tokens_per_correct == pytest.approx(80_000 / 40)
    # The same questions: 10 right by both seeds, 20 by one, 70 by none. Squares about .2: 10 * .8^2 + 20 * .3^2 +
    # 70 * .2^2 = 11, so 11 / 99 / 100 = .001111 between questions; between seeds .02 / 2 = .01; all 200 answers as
    # independent 200 / 199 * .16 / 200 = .000804. Together .010307, worth .16 / .010307 = 15.52 questions to Wilson.
    assert prompt.interval == pytest.approx((0.0717, 0.4473), abs=1e-4)
    same = rows["rac"]  # seeds that agree exactly: the question-level interval, no narrower
    assert same.interval == pytest.approx(HELPS[4].evaluation.interval)
    assert summarise(HELPS[2:3])[0].interval == HELPS[2].evaluation.interval


def test_rows_come_dense_first_then_by_sparsity_then_arm():
    arms = ["mixture", "think", "rac", "prompt", "corpus"]
    cells = [cell(arm, s, 0, 0.5, 100.0) for s in (0.6, 0.4) for arm in arms] + [cell("dense", 0.0, 0, 0.9, 100.0)]
    order = [(row.sparsity, row.arm) for row in summarise(cells)]
    assert order == [(0.0, "dense")] + [(s, arm) for s in (0.4, 0.6) for arm in reversed(arms)]


def scored(arm, seed, right, **options) -> Cell:
    """A cell whose first `right` of 20 questions are right."""
    scores = {f"q{i}": float(i < right) for i in range(20)}
    return cell(arm, 0.5, seed, right / 20, 100.0, scores=scores, **options)


def test_arms_and_solvers_are_compared_on_the_same_questions():
    cells = [scored("dense", 0, 20), scored("rac", 0, 16), scored("prompt", 0, 10), scored("corpus", 0, 15),
             scored("rac", 0, 18, solver="admm"), scored("prompt", 0, 2, solver="admm", budget=9000)]  # fmt: skip
    found = {(*test.arms, *test.solvers): test for test in compare(cells)}
    assert set(found) == {
        ("rac", "prompt", "sparsegpt", "sparsegpt"), ("rac", "corpus", "sparsegpt", "sparsegpt"),
        ("rac", "rac", "admm", "sparsegpt"),
    }, "nothing is compared with another budget or in two respects"  # fmt: skip
    best = found["rac", "prompt", "sparsegpt", "sparsegpt"]
    assert (best.questions, best.seeds, best.mean) == (20, 1, pytest.approx(0.3))
    assert best.p == pytest.approx(2 / 2**6) and best.p_holm == pytest.approx(3 * 2 / 2**6)
    half = 1.959964 * (6 + 1 - 6**2 / 22) ** 0.5 / 22
    assert best.interval == pytest.approx((6 / 22 - half, 6 / 22 + half))
    assert best.calibration_tokens == (1000, 1000)
    assert found["rac", "corpus", "sparsegpt", "sparsegpt"].p == 1.0
    page, text = pages.to_html(report_of(cells)), pages.to_markdown(report_of(cells))
    assert "Is it chance?" in page and "rac over prompt" in text and "admm over sparsegpt" in text


def test_several_seeds_answers_to_a_question_count_once_and_their_spread_widens_the_interval():
    cells = [scored("rac", 0, 16), scored("prompt", 0, 10), scored("rac", 1, 20), scored("prompt", 1, 10)]
    (test,) = compare(cells)
    assert (test.questions, test.seeds, test.mean) == (20, 2, pytest.approx(0.4))
    (alone,) = compare([scored("rac", 0, 18), scored("prompt", 0, 10)])
    assert test.interval[1] - test.interval[0] > alone.interval[1] - alone.interval[0]
    assert test.p == pytest.approx(2 / 2**10), "six whole and four half differences: no other choice of signs is as far"
    assert compare([scored("rac", 0, 16), scored("prompt", 1, 10)]) == []


def other_questions(one: Cell, first=100) -> Cell:
    """The same cell, asked others."""
    scores = {f"q{first + i}": score for i, score in enumerate(one.evaluation.scores.values())}
    return one.model_copy(update={"evaluation": one.evaluation.model_copy(update={"scores": scores})})


def test_seeds_that_asked_other_questions_narrow_rows_and_differences():
    same = [cell(arm, 0.5, seed, right, 100.0) for arm, right in (("rac", 0.6), ("prompt", 0.5)) for seed in (0, 1)]
    more = [other_questions(one) if one.seed else one for one in same]
    for found, questions in ((same, 100), (more, 200)):
        for row, share in zip(summarise(found), (0.5, 0.6), strict=True):
            pooled = {str(i): float(i < share * questions) for i in range(questions)}
            assert row.interval == pytest.approx(share_interval([pooled]), abs=2e-3)
        (test,) = compare(found)
        assert (test.questions, test.mean) == (questions, pytest.approx(0.1))
        alone = difference_interval([{str(i): float(i < questions // 10) for i in range(questions)}])
        assert test.interval == pytest.approx(alone, abs=2e-3)


def test_losses_and_ratios_are_to_the_dense_model_of_the_same_seeds():
    """Seeds ask other questions, easier ones in seed 0, which the pruned model alone was asked."""
    dense = [cell("dense", 0.0, 0, 0.95, 100.0), other_questions(cell("dense", 0.0, 1, 0.55, 300.0))]
    rows = {row.arm: row for row in summarise([*dense, cell("rac", 0.5, 0, 0.9, 120.0)])}
    assert rows["dense"].pass_at_1 == pytest.approx(0.75) and rows["dense"].points_lost == 0
    assert rows["rac"].points_lost == pytest.approx(5)
    assert rows["rac"].length_ratio == rows["rac"].time_ratio == pytest.approx(1.2)
    alone = summarise([dense[1], cell("rac", 0.5, 0, 0.85, 120.0)])[1]
    assert alone.points_lost == pytest.approx(5), "what it says itself, as the dense model of its seed is not here"
    assert alone.time_ratio is None


def beside(one: Cell, others: int) -> Cell:
    return one.model_copy(update={"evaluation": one.evaluation.model_copy(update={"side_by_side": others})})


def test_time_is_compared_only_where_as_many_models_were_asked_at_the_same_time():
    dense, rac = cell("dense", 0.0, 0, 0.9, 100.0), cell("rac", 0.5, 0, 0.9, 100.0)
    assert summarise([dense, beside(rac, 1)])[1].time_ratio is None
    assert summarise([dense, beside(rac, 1)])[1].length_ratio == 1
    assert summarise([beside(dense, 1), beside(rac, 1)])[1].time_ratio == 1
    merged = merge([report_of([dense, rac]), report_of([beside(dense, 1), beside(rac, 1)])])
    assert len(merged.cells) == 2, "a matter of clocks, not of what was measured"


def test_the_headline_goes_by_the_paired_test():
    def sentence(rac):
        return pages.headline(report_of([scored("dense", 0, 20), scored("rac", 0, rac), scored("prompt", 0, 5)]))

    assert sentence(12).startswith("At 50 %"), (
        "unpaired intervals overlap, but seven of seven differences point one way"
    )
    assert "does not clearly help" in sentence(9) and "chance may be all of (p = .12)" in sentence(9)


def test_a_gap_on_which_seeds_differ_is_not_clear_however_small_p_is():
    cells = [*HELPS[:2], cell("rac", 0.5, 0, 0.8, 100.0), cell("rac", 0.5, 1, 0.4, 100.0),
             cell("prompt", 0.5, 0, 0.4, 100.0), cell("prompt", 0.5, 1, 0.45, 100.0)]  # fmt: skip
    (test,) = compare(cells)
    assert test.p_holm < 0.001 and test.interval[0] < -0.2 and test.interval[1] > 0.6
    sentence = pages.headline(report_of(cells))
    assert sentence.startswith("rac does not clearly help: at 50 % sparsity prompt-only calibration loses 47.5 points")
    assert "a gap that seeds differ too much about (−2" in sentence


def test_the_headline_compares_one_budget_only():
    """rac with ten times the tokens is ahead of everything; on as many tokens as the others it is behind."""
    cells = [
        cell("dense", 0.0, 0, 0.9, 100.0), cell("rac", 0.5, 0, 0.85, 100.0, 10_000), cell("rac", 0.5, 0, 0.2, 100.0),
        cell("prompt", 0.5, 0, 0.5, 100.0), cell("corpus", 0.5, 0, 0.4, 100.0, 1100),
        cell("prompt", 0.5, 0, 0.8, 100.0, 100_000),
    ]  # fmt: skip
    sentence = pages.headline(report_of(cells))
    assert sentence.startswith("rac does not help: at 50 % sparsity, 1000 tokens prompt-only calibration loses 40.0")
    assert "rac loses 70.0 points" in sentence
    more = [*cells, cell("corpus", 0.5, 0, 0.3, 100.0, 10_300)]
    sentence = pages.headline(report_of(more))
    assert sentence.startswith("At 50 % sparsity, 10k tokens corpus calibration loses 60.0"), "the largest with a rival"
    assert "rac loses 5.0 points" in sentence
    text = pages.to_markdown(report_of(more))
    assert "| rac over corpus | 50 %, 10k tokens |" in text and "| rac over corpus | 50 %, 1000 tokens |" in text
    apart = pages.headline(report_of([cells[0], cells[1], cells[3]]))
    assert "rac on 10k tokens loses 5.0 points" in apart and "prompt-only calibration on 1000 tokens" in apart
    assert apart.endswith("rac has no rival of its budget to be compared with.")


def test_a_gap_without_a_question_in_common_is_not_tested():
    sentence = pages.headline(report_of([*HELPS[:2], HELPS[2], HELPS[5]]))
    assert sentence.startswith("rac does not clearly help") and "a gap that is not tested (no question" in sentence
    lower = [cell("prompt", 0.2, 0, 0.5, 100.0), cell("rac", 0.2, 1, 0.6, 100.0)]
    assert pages.headline(report_of([*HELPS, *lower])).endswith("at 20 % the gap is not tested.")


def test_accuracy_under_a_cap_is_on_the_page():
    page = pages.to_html(report_of(HELPS))
    assert "Accuracy under a cap on thinking" in page and "dense, 50: 45 %" in page and "rac, 100: 85 %" in page
    text = pages.to_markdown(report_of(HELPS))
    for line in ("## Accuracy under a cap on thinking, 50 %", "| most thinking tokens | 50 | 100 |",
                 "| dense | 45.0 % | 90.0 % |", "| rac | 42.5 % | 85.0 % |"):  # fmt: skip
        assert line in text
    caps = [{"cap": cap, "pass_at_1": cap / 200} for cap in range(10, 101, 10)]
    many = [c.model_copy(update={"evaluation": Evaluation(**{**dict(c.evaluation), "by_cap": caps})}) for c in HELPS]
    assert "| most thinking tokens | 10 | 30 | 50 | 60 | 80 | 100 |" in pages.to_markdown(report_of(many))


def test_a_little_overshoot_is_one_budget_and_a_double_is_another():
    cells = [cell("rac", 0.5, 0, 0.8, 100.0, 30_002), cell("rac", 0.5, 1, 0.8, 100.0, 30_367)]
    assert [row.seeds for row in summarise(cells)] == [2]
    rows = summarise([*cells, cell("rac", 0.5, 0, 0.8, 100.0, 60_010)])
    assert [(row.seeds, row.calibration_tokens) for row in rows] == [(2, 30_184), (1, 60_010)]
    page = pages.to_html(report_of([*cells, cell("rac", 0.5, 0, 0.8, 100.0, 60_010)]))
    assert "rac, 30k tokens" in page and "rac, 60k tokens" in page


def test_two_results_for_one_seed_are_refused():
    with pytest.raises(ValueError, match=r"two results for rac at 50 % with seed 0"):
        summarise([cell("rac", 0.5, 0, 0.8, 100.0), cell("rac", 0.5, 0, 0.7, 100.0)])


def test_without_the_dense_model_the_paired_difference_speaks():
    row = summarise(HELPS[2:3])[0]
    assert row.points_lost == pytest.approx(80) and row.length_ratio == pytest.approx(3) and row.time_ratio is None


def test_the_files_read_back_and_the_schema_is_strict(tmp_path):
    report = report_of(HELPS)
    pages.write(report, tmp_path)
    assert reports.read(tmp_path / "report.json") == report
    data = json.loads((tmp_path / "report.json").read_text())
    for change, sentence in (({"version": 1}, "version"), ({"extra": 1}, "extra"), ({"cells": 3}, "cells")):
        (tmp_path / "bad.json").write_text(json.dumps(data | change))
        with pytest.raises(ValueError, match=sentence):
            reports.read(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad\.json"):
        reports.read(tmp_path / "bad.json")
    with pytest.raises(ValueError, match=r"nothing\.json"):
        reports.read(tmp_path / "nothing.json")


def test_a_report_of_another_version_is_named(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps({"schema": "secateurs.report", "version": 7}))
    with pytest.raises(ValueError, match=r"report version 7 found, this secateurs reads version 5"):
        reports.read(tmp_path)
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a secateurs report"):
        reports.read(tmp_path)


def test_what_is_not_a_number_is_refused():
    with pytest.raises(ValueError, match="finite"):
        Stage(name="trace", seconds=float("nan"))


PARTS = {
    "all": (HELPS, {"stages": STAGES, "traces": TRACES}),
    "nothing": ([], {}),
    "dense": (HELPS[:1], {}),
    "one cell": (HELPS[2:3], {}),
    "one arm": (HELPS[:4], {"stages": STAGES}),
    "no hidden error": ([c.model_copy(update={"hidden_error": None}) for c in HELPS], {}),
    "no layers": ([c.model_copy(update={"layers": []}) for c in HELPS], {"traces": TRACES}),
    "two patterns": ([*HELPS, HELPS[4].model_copy(update={"pattern": "2:4"})], {}),
    "no time": (HELPS, {"stages": [Stage(name="trace", seconds=0.0)]}),
}


@pytest.mark.parametrize("part", PARTS)
def test_the_page_is_whole_loads_nothing_and_escapes_everything(part):
    cells, extra = PARTS[part]
    evil = "<script>alert('1')</script>|`x`"
    cells = [c if c.arm in reports.ARMS[:4] and c.seed == 0 else c.model_copy(update={"path": evil}) for c in cells]
    report = report_of(cells, name=evil, title=evil, recipe={"deep": {evil: [evil]}}, **extra)
    page, text = pages.to_html(report), pages.to_markdown(report)
    assert "<script" not in page and "<script" not in text and "&lt;script&gt;" in page
    loads = r"(?:src|href|xlink:href|srcset|action|data)\s*=|url\(|@import|<(?:link|iframe|img|object|embed)"
    assert not re.findall(loads, page, re.IGNORECASE), "the page must open offline"
    assert _open_tags(page) == [], "every tag is closed"
    assert all("aria-label=" in svg or "aria-hidden=" in svg for svg in re.findall(r"<svg[^>]*>", page))
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def _open_tags(page: str) -> list[str]:
    """Tags still open at the end of the page, or the first one closed out of turn."""
    void, stack = {"meta", "path", "rect", "circle", "br"}, []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in void:
                stack.append(tag)

        def handle_endtag(self, tag):
            if tag not in void and stack and stack[-1] == tag:
                stack.pop()

    Parser().feed(page)
    return stack


def test_what_was_measured_is_on_the_page():
    page = pages.to_html(report_of(HELPS, stages=STAGES, traces=TRACES))
    for words in ("Accuracy", "Length of an answer", "Along the chain of thought", "Layer outputs, by region",
                  "What it cost: 2.0 min", "Calibration traces", "How the intervals are computed"):  # fmt: skip
        assert words in page
    assert "prefers-color-scheme: dark" in page and "rac, 50 %: 85 % (" in page


def test_small_plots_of_layers_share_one_scale():
    layers = [HELPS[4].layers[0].model_copy(update={"name": f"layer.{i}.k{i}", "error_held_out": e})
              for i, e in enumerate((0.001, 0.1))]  # fmt: skip
    small, large = pages._layer_plots({"rac": [HELPS[4].model_copy(update={"layers": layers})]})
    assert small["y_ticks"] == large["y_ticks"]
    assert small["lines"][0]["marks"][0]["y"] > large["lines"][0]["marks"][0]["y"]


def test_the_terminal_gets_the_same_numbers():
    screen = Console(width=140, file=io.StringIO(), color_system=None)
    screen.print(pages.console_table(report_of(HELPS)))
    line = next(line for line in screen.file.getvalue().splitlines() if "prompt" in line)  # pyright: ignore
    assert [part.strip() for part in line.strip("│").split("│")][:8] == [
        "prompt", "50 %", "20.0 %", "7.2–44.7", "−70.0", "400", "4.00×", "4.00×",
    ]  # fmt: skip


def test_the_headline_says_what_rac_saves():
    assert pages.headline(report_of(HELPS)) == (
        "At 50 % sparsity prompt-only calibration loses 70.0 points and writes 4.0x the dense model's tokens; "
        "rac loses 5.0 points at 1.1x."
    )


def test_the_headline_says_when_rac_does_not_help():
    worse = [*HELPS[:2], cell("prompt", 0.5, 0, 0.8, 100.0), cell("rac", 0.5, 0, 0.05, 600.0)]
    assert pages.headline(report_of(worse)).startswith("rac does not help: at 50 % sparsity prompt-only calibration")
    close = [*HELPS[:2], cell("prompt", 0.5, 0, 0.82, 100.0), cell("rac", 0.5, 0, 0.85, 100.0)]
    sentence = pages.headline(report_of(close))
    assert sentence.startswith("rac does not clearly help") and "chance may be all of (p = .25)" in sentence


def test_the_headline_takes_the_better_rival_and_names_the_settings_rac_does_not_win():
    cells = [
        *HELPS, cell("corpus", 0.5, 0, 0.4, 100.0),
        cell("prompt", 0.2, 0, 0.89, 100.0), cell("rac", 0.2, 0, 0.9, 100.0),
        cell("prompt", 0.3, 0, 0.9, 100.0), cell("rac", 0.3, 0, 0.6, 100.0),
    ]  # fmt: skip
    sentence = pages.headline(report_of(cells))
    assert sentence.startswith("At 50 % sparsity corpus calibration loses 50.0 points")
    assert sentence.endswith("at 20 % the gap is not clear; at 30 % rac is behind.")


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ([], "Nothing was measured yet."),
        (HELPS[:1], "Only the dense model was measured: it scores 90.0 %."),
        (HELPS[:4], "rac was not measured"),
        ([*HELPS[:2], *HELPS[4:]], "no corpus or prompt-only calibration was measured beside it"),
    ],
)
def test_the_headline_says_what_is_missing(cells, words):
    assert words in pages.headline(report_of(cells))


def unasked(cells) -> list[Model]:
    return [
        Model.model_validate(one.model_dump(exclude={"evaluation"}) | {"path": f"runs/[red]<i>{index}"})
        for index, one in enumerate(cells)
    ]


def test_models_that_were_asked_nothing_are_shown_with_their_errors_and_folders():
    report = report_of([], unasked=unasked(HELPS[2:]))
    said = "4 models were pruned and asked nothing; the error of layers on held-out traces is 0.02."
    assert pages.headline(report) == said
    screen = io.StringIO()
    Console(width=120, file=screen).print(pages.console_table(report))
    for text in (screen.getvalue(), pages.to_markdown(report), pages.to_html(report)):
        assert text.count("prompt") >= 2 and text.count("sparsegpt") >= 4
        assert text.count("0.02") >= 4 and text.count("0.25") >= 4, "errors of layers and of hidden states"
    for index in range(4):
        assert f"runs/[red]&lt;i&gt;{index}" in pages.to_html(report)
        assert f"runs/[red]&lt;i&gt;{index}" in pages.to_markdown(report)
    assert ("calibration", "1000 tokens per arm") in pages._facts(report)


def test_what_was_asked_and_what_was_not_are_told_apart():
    mixed = report_of(HELPS[:4], unasked=unasked(HELPS[4:]))
    assert pages.headline(mixed).startswith(pages.headline(report_of(HELPS[:4])))
    assert pages.headline(mixed).endswith(
        "2 models were pruned and asked nothing; the error of layers on held-out traces is 0.02."
    )
    merged = merge([report_of(HELPS), report_of([], unasked=unasked(HELPS[2:]))])
    assert len(merged.cells) == 6 and not merged.unasked, "the same models, asked in the other run"
    assert len(merge([mixed, mixed]).unasked) == 2
    again = [mixed.model_copy(update={"reloaded": off}) for off in (0.0, 0.002, None)]
    assert [merge(again[:count]).reloaded for count in (1, 2, 3)] == [0, 0.002, None]
    assert "reloaded: 4 models, with transformers alone: logits are off by at most 0.002" in pages.to_markdown(again[1])
    assert "asked nothing" not in pages.to_html(report_of(HELPS)) + pages.to_markdown(report_of(HELPS))


def test_runs_merge():
    other = [cell("dense", 0.0, 2, 0.9, 100.0), cell("rac", 0.5, 2, 0.8, 120.0)]
    merged = reports.merge([report_of(HELPS), report_of(other)])
    assert len(merged.cells) == 8
    assert {row.arm: row.seeds for row in merged.summary}["rac"] == 3
    assert reports.merge([report_of(HELPS)]) == report_of(HELPS)


def test_a_cell_two_runs_share_counts_once_and_times_add_up():
    again = HELPS[0].model_copy(update={"path": "elsewhere", "seconds": {"evaluate": 9.0}})
    runs = [
        report_of(HELPS, stages=STAGES, traces=TRACES, recipe={"a": 1}),
        report_of([again], stages=STAGES, traces=TRACES.model_copy(update={"seconds": 50.0}), recipe={"a": 2},
                  recipe_key="1"),
    ]  # fmt: skip
    merged = reports.merge(runs)
    assert merged.cells == HELPS
    assert [stage.seconds for stage in merged.stages] == [60.0, 180.0]
    assert merged.traces and merged.traces.traces == 20 and merged.traces.pass_at_1 == pytest.approx(0.9)
    assert merged.recipe == {"run 1, 0": {"a": 1}, "run 2, 1": {"a": 2}}


def checked(key, equal=0) -> LeakCheck:
    return LeakCheck(recipe_key=key, evaluation=1319, calibration=7473, equal=equal, near=0, run=8, examples=[])


def test_every_run_has_its_own_leak_check_and_a_run_without_one_is_seen():
    one = report_of(HELPS, leaks=[checked("a")], recipe_key="a")
    other = report_of(HELPS, leaks=[checked("b", equal=2)], recipe_key="b")
    bare = report_of(HELPS, recipe_key="c")
    assert merge([one, one]).leaks == one.leaks, "the same run twice"
    both = merge([one, other])
    assert both.leaks == [*one.leaks, *other.leaks]
    assert merge([both, bare, one]).recipe_key == "a + b + c"
    for show in (pages.to_markdown, pages.to_html):
        assert "1,319 evaluation questions against 7,473 calibration texts: none equal" in show(one)
        text = show(merge([both, bare]))
        assert "none equal" in text and ": 2 equal" in text and "2 of 3 runs" in text
        assert "of 2 runs" not in show(both)
    assert ("leak check", "not made") in pages._facts(bare)
    assert not any(name.startswith("leak") for name, _ in pages._facts(report_of([], unasked=unasked(HELPS[2:]))))


def test_all_question_sets_are_named():
    evaluation = HELPS[0].evaluation.model_copy(update={"question_set": "another", "samples": 4})
    report = report_of([*HELPS, HELPS[0].model_copy(update={"evaluation": evaluation})])
    assert ("questions", "100 × 1 samples, made up; 100 × 4 samples, another") in pages._facts(report)


def test_a_study_says_how_many_models_were_asked_side_by_side(tmp_path, monkeypatch):
    """One seed, two cells that are done apart, and two or three jobs: the dense model has the machine to itself."""
    checkpoint = SimpleNamespace(model=SimpleNamespace(num_parameters=lambda: 1), dtype="torch.float32")
    dense = SimpleNamespace(checkpoint=checkpoint, key={})
    answers: Any = "answers"

    def run(_, tasks):
        if tasks and tasks[0][0] is study._ask_dense:
            return [study._Seed(SimpleNamespace(summary=TRACES), answers) for _ in tasks]  # pyright: ignore
        return [study._Done(arm, answers) for arm in ("prompt", "rac")] if tasks else []  # pyright: ignore

    monkeypatch.setattr(study, "Dense", lambda *_: dense)
    monkeypatch.setattr(study, "plan_check", lambda *_: None)
    monkeypatch.setattr(study.Workers, "run", run)
    monkeypatch.setattr(study, "leak_check", lambda _, key, *__: checked(key))
    monkeypatch.setattr(study, "_dense_cell", lambda _, seed, __, others: beside(HELPS[0], others))
    monkeypatch.setattr(study, "_cell", lambda arm, _, __, others: beside(cell(arm, 0.5, 0, 0.8, 100.0), others))
    recipe = load_recipe("demo", ["sweep.arm=['prompt', 'rac']", "sweep.sparsity=[0.5]", "sweep.seed=[0]"])
    for jobs, expected in ((1, [0, 0, 0]), (2, [0, 1, 1]), (3, [0, 1, 1])):
        report = study.study(recipe, tmp_path, jobs=jobs)
        assert [one.evaluation.side_by_side for one in report.cells] == expected
        assert [row.time_ratio is None for row in report.summary] == [False, *[jobs > 1] * 2]
        assert report.leaks == [checked(report.recipe_key)]


def test_a_solve_that_cells_share_is_in_their_seconds_and_stays_there(tmp_path, monkeypatch):
    asking = SimpleNamespace(num_questions=0)
    cases = [SimpleNamespace(folder=tmp_path / name, evaluate=asking) for name in ("old", "one", "two")]
    old = {"arm": "rac", "pattern": "2:4", "sparsity": 0.5, "solver": "s", "seed": 0, "calibration_tokens": 9,
           "layers": [], "hidden_error": {}, "seconds": {"prune": 1.0}}  # fmt: skip

    def prune(case, _=None, __=None, shared=0.0):
        record = case.folder / "prune.json"
        if not record.exists():
            write_json(record, old | {"seconds": old["seconds"] | ({"prune, shared": shared} if shared else {})})
        return Pruned(case.folder, **read_json(record))

    for case in cases:
        case.folder.mkdir()
    prune(cases[0])
    monkeypatch.setattr(study, "Case", lambda recipe, *_: recipe)
    left = [case.folder for case in cases[1:]]
    monkeypatch.setattr(study, "solve_alike", lambda *_: {left.pop(): 0.2 for _ in range(len(left))})
    monkeypatch.setattr(study, "prune", prune)
    bench = study._Bench(None, tmp_path, silent, given=SimpleNamespace())  # pyright: ignore
    for _ in range(2):  # the second finds all done
        study._prune_alike(bench, 0, None, cases)  # pyright: ignore
        done = [study._do_cell(bench, 0, None, case, "1/3") for case in cases]  # pyright: ignore
        seconds = [one.pruned.seconds for one in done]
        assert seconds[0] == {"prune": 1.0} and seconds[1] == seconds[2]
        assert seconds[1]["prune"] == 1.0 and 0.1 <= seconds[1]["prune, shared"] < 1.0


def test_runs_that_cannot_be_compared_do_not_merge():
    with pytest.raises(ValueError, match="different models cannot be merged: a and b"):
        reports.merge([report_of(HELPS, name="a"), report_of(HELPS, name="b")])
    with pytest.raises(ValueError, match="no report"):
        reports.merge([])


def test_the_schema_page_is_what_the_code_says():
    page = Path(__file__).parents[1] / "docs" / "report-schema.md"
    assert page.read_text() == reports.schema_markdown()
