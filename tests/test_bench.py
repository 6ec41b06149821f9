"""Figures of a bench, exactly, by a clock that only moves where a model or an engine says so; and what is refused."""

import json
import shutil

import pytest

from families import make_model
from processes import fork_workers
from secateurs import bench as room
from secateurs.artifacts import write_json
from secateurs.bench import Row, Speed, _Bench, bench, load_any, path_and_type, short
from secateurs.models import BUNDLED, model_path
from test_cli import call


def test_what_a_recipe_asks_is_made_ready_before_anything_is_timed(tmp_path, monkeypatch, capsys):
    fork_workers(monkeypatch)
    monkeypatch.setattr(_Bench, "decode", lambda *turn: 1 / 0)
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "What is 1 + 1?", "answer": "2"}\n')
    bare = shutil.copytree(model_path(BUNDLED), tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):  # without both transformers makes one up
        (bare / name).unlink()

    def said(*sets: str, models=("bundled",)) -> str:
        words = ["bench", *models, "--recipe", "demo", *(word for one in sets for word in ("--set", one))]
        assert call(monkeypatch, *words) == 2
        return " ".join(capsys.readouterr().err.split())

    questions = f"evaluate.questions={{name='jsonl', path='', eval_path='{file}'}}"
    assert "evaluate.num_questions is 50, the set has 1" in said("evaluate.num_questions=50", questions)
    file.write_text("")
    assert "evaluate.num_questions is 50, the set has 0" in said("evaluate.num_questions=50", questions)
    file.write_text('{"question": "What?", "answer": "nothing"}\n')
    assert "questions.jsonl:1: no number in `answer`" in said("evaluate.num_questions=1", questions)
    assert f"the tokenizer of `{bare}` cannot be loaded" in said(models=("bundled", str(bare)))
    assert "evaluate.samples is 4, but a bench asks for one answer a question" in said("evaluate.samples=4")


def test_what_was_measured_before_an_error_is_shown(monkeypatch, capsys):
    def stopped(models, keep, **_):
        keep([Row(name, "float32", 1, speeds=[Speed(1, 8, 0.1, 5.0, 1.0)]) for name in models])
        raise RuntimeError("the process of b ended")

    monkeypatch.setattr(room, "bench", stopped)
    assert call(monkeypatch, "bench", "a", "b", "--json") == 2
    said = capsys.readouterr()
    assert [row["model"] for row in json.loads(said.out)["rows"]] == ["a", "b"] and "b ended" in said.err
    assert call(monkeypatch, "bench", "a", "b") == 2
    assert "5.0" in capsys.readouterr().out


def test_a_folder_may_have_a_sign_of_its_own_in_its_name(tmp_path, monkeypatch):
    make_model("llama").save_pretrained(tmp_path / "a@b")
    monkeypatch.chdir(tmp_path)
    assert load_any("a@b")[1] == "float32" and load_any("a@b@bfloat16")[1] == "bfloat16"
    assert path_and_type("owner/name@float16") == ("owner/name", "float16") and path_and_type("name") == ("name", "")
    assert [short(name) for name in ("a@b", "a@b@float32", "x/model@float32")] == ["a@b", "a@b@float32", "x@float32"]
    with pytest.raises(ValueError, match="a@b/ is named twice"):
        bench(["a@b", "a@b/"])


def test_a_model_for_engines_is_no_model_to_time(tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", config | {"quantization_config": {"quant_method": "compressed-tensors"}})
    with pytest.raises(
        ValueError, match=r"is quantised \(compressed-tensors\), and secateurs reads dense weights: use"
    ):
        load_any(str(tmp_path))
