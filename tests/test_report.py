"""The report: a strict schema, summaries by hand, a page that loads nothing and escapes everything, an honest headline."""

import json
from pathlib import Path

import pytest

from secateurs import report as reports
from secateurs.report import Cell, Evaluation, HiddenError, LayerReport, Report, summarise


def cell(arm, sparsity, seed, correct, tokens) -> Cell:
    """A made-up cell: 100 questions, of which a share `correct` is right, `tokens` each."""
    half = 1.96 * (correct * (1 - correct) / 100) ** 0.5
    evaluation = Evaluation(
        question_set="made up", questions=100, samples=1, pass_at_1=correct,
        interval=(max(0.0, correct - half), min(1.0, correct + half)), by_family={"all": correct},
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
    hidden = HiddenError(prompt=0.1, early_think=0.2, late_think=0.3, answer=0.2, curve=[])
    pruned = arm != "dense"
    return Cell(
        arm=arm, sparsity=sparsity, pattern="unstructured" if pruned else "dense", solver="sparsegpt" if pruned else "none",
        seed=seed, calibration_tokens=1000 if pruned else 0, evaluation=evaluation,
        hidden_error=hidden if pruned else None, layers=[layer] if pruned else [], seconds={"evaluate": 1.0}, path="x",
    )  # fmt: skip


def report_of(cells, name="made up") -> Report:
    return Report(
        title="Made up", created="2026-01-01T00:00:00+00:00", secateurs="0", versions={}, hardware={},
        model={"name": name}, recipe={}, recipe_key="0", stages=[], traces=None, cells=cells, summary=summarise(cells),
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
    assert prompt.interval[0] < 0.1 + 0.1 and prompt.interval[1] > 0.2


def test_the_files_read_back_and_the_schema_is_strict(tmp_path):
    report = report_of(HELPS)
    reports.write(report, tmp_path)
    assert reports.read(tmp_path / "report.json") == report
    data = json.loads((tmp_path / "report.json").read_text())
    for change, sentence in (({"version": 2}, "version"), ({"extra": 1}, "extra"), ({"cells": 3}, "cells")):
        (tmp_path / "bad.json").write_text(json.dumps(data | change))
        with pytest.raises(ValueError, match=sentence):
            reports.read(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad\.json"):
        reports.read(tmp_path / "bad.json")
    with pytest.raises(ValueError, match=r"nothing\.json"):
        reports.read(tmp_path / "nothing.json")


@pytest.mark.parametrize("cells", [HELPS, HELPS[:1], HELPS[2:3], HELPS[:4]], ids=["all", "dense", "one", "one arm"])
def test_the_page_loads_nothing_and_escapes_everything(cells):
    page = reports.to_html(report_of(cells, name="<script>alert(1)</script>"))
    assert "<script>alert(1)" not in page and "<html" in page
    assert not [
        part for part in page.split('"') if part.startswith(("http://", "https://")) and part.endswith((".js", ".css"))
    ]
    assert 'src="http' not in page and "@import" not in page
    assert "Made up" in reports.to_markdown(report_of(cells))


def test_the_headline_is_honest_in_both_directions():
    assert "70.0 points" in reports.headline(report_of(HELPS))
    worse = [*HELPS[:4], cell("rac", 0.5, 0, 0.05, 600.0), cell("rac", 0.5, 1, 0.05, 600.0)]
    sentence = reports.headline(report_of(worse))
    assert "not" in sentence and "rac" in sentence.lower()


def test_runs_merge():
    other = [cell("dense", 0.0, 2, 0.9, 100.0), cell("rac", 0.5, 2, 0.8, 120.0)]
    merged = reports.merge([report_of(HELPS), report_of(other)])
    assert len(merged.cells) == 8
    assert {row.arm: row.seeds for row in merged.summary}["rac"] == 3


def test_the_schema_page_is_what_the_code_says():
    page = Path(__file__).parents[1] / "docs" / "report-schema.md"
    assert page.read_text() == reports.schema_markdown()
