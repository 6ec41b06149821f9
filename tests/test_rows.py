"""Rows come out of every kind of file as they went in; what is wrong is named with its place."""

import gzip
import json

import pandas as pd
import pytest

from secateurs import ask, cell, corpus, preview
from secateurs.dense import Dense
from secateurs.questions.jsonl import Jsonl
from secateurs.recipe import load_recipe
from secateurs.rows import read_rows

ROWS = [{"text": f"Sentence number {i} is long enough. " * 3, "other": i} for i in range(40)]


@pytest.fixture
def files(tmp_path):
    lines = "\n".join(map(json.dumps, ROWS)) + "\n\n"
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "lines.json").write_text(lines)
    (tmp_path / "array.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pd.DataFrame(ROWS).to_parquet(tmp_path / "a.parquet")
    pd.DataFrame(ROWS).to_csv(tmp_path / "a.csv", index=False)
    (tmp_path / "a.txt").write_text("\n\n\n".join(row["text"].strip().replace(". ", ".\n") for row in ROWS))
    return tmp_path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "lines.json", "array.json", "a.csv", "a.parquet", "a.txt"])
def test_every_kind_of_file_gives_its_rows_with_their_places(files, name):
    found = list(read_rows(files / name))
    assert [" ".join(row["text"].split()) for _, row in found] == [row["text"].strip() for row in ROWS]
    places = {"a.csv": ":3", "a.parquet": ", row 2", "array.json": ", row 2", "a.txt": ":6"}
    assert found[1][0] == f"{files / name}" + places.get(name, ":2")
    recipe = load_recipe("demo", [f'calibration.corpus="{files / name}"'])
    texts = list(corpus.corpus_texts(recipe, 0))
    assert sorted(" ".join(t.split()) for t in texts) == sorted(row["text"].strip() for row in ROWS)
    assert texts != list(corpus.corpus_texts(recipe, 1)) and texts == list(corpus.corpus_texts(recipe, 0))


@pytest.mark.parametrize(
    ("name", "content", "lesson"),
    [
        ("a.xlsx", b"x", "a.xlsx: not a known kind of file; known are .jsonl"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', r"a.jsonl:2: not a JSON object"),
        ("a.json", b'\n[{"text": "x"}, 1]', r"a.json, row 2: not a JSON object"),
        ("a.json", b'[{"text": "x"}', r"a.json: not a JSON array \(Expecting ',' delimiter"),
        ("a.jsonl", b"\xff\xfe{}", "a.jsonl: damaged, or not UTF-8"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz: damaged"),
        ("a.jsonl.gz", gzip.compress(b"{}", mtime=0)[:10] + b"\xff" * 40, "a.jsonl.gz: damaged"),
        ("a.csv", b"text,other\nx\n", "a.csv:2: not as many fields as the first line names"),
        ("a.csv", b"text\nx,y\n", "a.csv:2: not as many fields as the first line names"),
        ("a.csv", b'text\n"' + b"x" * 200_000, "a.csv: damaged, or not UTF-8 text .field larger than"),
        ("a.csv", b"body\nx\n", "a.csv:2: no text in field `text`; there are body"),
        ("a.parquet", b"PAR1 not really", "a.parquet: damaged or not a Parquet file"),
        ("a.jsonl", b'{"body": "x", "id": 1}', "a.jsonl:1: no text in field `text`; there are body, id"),
        ("a.jsonl", b'{"text": "x x x"}', "asks for 30,000 tokens, but only [1-9] come from the corpus: lower it"),
    ],
)
def test_what_is_wrong_with_a_corpus_is_said_before_anything_runs(tmp_path, name, content, lesson):
    (tmp_path / name).write_bytes(content)
    recipe = load_recipe("demo", [f'calibration.corpus="{tmp_path / name}"'])
    with pytest.raises(ValueError, match=lesson):
        preview.plan_check(recipe, Dense(recipe))


def test_a_corpus_calibrates_in_pieces_and_its_content_is_in_the_key(files):
    def documents(size):
        options = [f'calibration.corpus="{files / "a.jsonl"}"', f"calibration.corpus_tokens={size}"]
        recipe = load_recipe(
            "demo",
            [*options, "calibration.arm=corpus", "calibration.num_tokens=500", "calibration.held_out_tokens=100"],
        )
        traced = ask.Traced((), (), None, "")
        return recipe, cell.calibration_set(cell.Case(recipe, files, 0, traced, Dense(recipe))).documents

    recipe, small = documents(16)
    assert max(len(d.ids) for d in small) == 16 and 500 <= sum(len(d.ids) for d in small) < 516
    assert max(len(d.ids) for d in documents(2048)[1]) > 16
    before = Dense(recipe).corpus_hash
    (files / "a.jsonl").write_text(json.dumps({"text": "other"}))
    assert Dense(recipe).corpus_hash != before


def test_questions_come_from_parquet_too(files):
    path = files / "q.parquet"
    pd.DataFrame([{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(30)]).to_parquet(path)
    found = [q for split in ("calibration", "eval") for q in Jsonl(path=str(path)).questions(split, 0)]
    assert sorted(q.prompt for q in found) == sorted(f"{i} + 1?" for i in range(30))
