"""Questions from files: the shipped sets, disjoint splits, the number a reply ends on, and lines that are wrong."""

import json
from itertools import islice

import pytest

from secateurs.questions import Question, question_set
from secateurs.questions.jsonl import Jsonl, last_number

NUMBERS = Jsonl(path="")


@pytest.mark.parametrize(
    ("reply", "number"),
    [
        ("so 3 + 4 = 7", "7"),
        ("it costs $2.50.", "2.5"),
        ("51.0", "51"),
        ("-3", "-3"),
        ("3-5", "5"),
        (".5 kg", "0.5"),
        ("#### 70,000", "70000"),
        ("no number", None),
        ("", None),
    ],
)
def test_the_number_a_reference_ends_on(reply, number):
    assert last_number(reply) == number


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        (r"\boxed{70{,}000}", True),
        (r"\boxed{70\,000}", True),
        (r"\boxed{70,\!000\text{ dollars}} for 2 days", True),
        (r"\boxed{7}. So \boxed{70000\text{ dollars}}", True),
        ("It is 70,000.0", True),
        (r"\boxed{\frac{1}{70000}}", False),
        (r"\boxed{L - 70000}", False),
        (r"\boxed{-70000}", False),
        ("between 3 and 7", False),
        ("", False),
    ],
)
def test_a_number_is_judged_as_mathematics(reply, right):
    assert NUMBERS.check(Question(id="q", prompt="?", answer="60,000 + 10,000\n#### 70,000"), reply) is right


@pytest.mark.parametrize(("name", "calibration", "evaluation"), [("gsm8k", 2000, 1319), ("svamp", 600, 250)])
def test_shipped_sets_are_disjoint_and_score_their_own_answers(name, calibration, evaluation):
    questions = question_set(name)
    asked, held = list(questions.questions("calibration", 0)), list(questions.questions("eval", 0))
    assert len(asked) >= calibration and len(held) >= evaluation
    assert not {q.id for q in asked} & {q.id for q in held}
    for question in islice(held, 20):
        assert questions.check(question, question.answer)
        assert not questions.check(question, "\\boxed{-99999}") and not questions.check(question, "")
    assert [q.id for q in asked] == [q.id for q in questions.questions("calibration", 0)]
    assert [q.id for q in asked] != [q.id for q in questions.questions("calibration", 1)]


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "q.jsonl"
    rows = [{"ask": f"What is {n} + {n}?", "say": 2 * n} for n in range(60)]
    path.write_text("\n".join(map(json.dumps, [*rows, rows[0]])) + "\n\n")
    questions = Jsonl(path=str(path), question_field="ask", answer_field="say", prefill="<think>\n")
    both = [*questions.questions("calibration", 0), *questions.questions("eval", 0)]
    assert len({q.id for q in both}) == len(both) == 60
    assert questions.format.prefill == "<think>\n"


def test_a_question_of_the_evaluation_file_never_calibrates(tmp_path):
    for name, numbers in (("train", range(30)), ("test", range(25, 40))):
        rows = [{"question": f"What is {n} + {n}?", "answer": 2 * n} for n in numbers]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    questions = Jsonl(path=str(tmp_path / "train.jsonl"), eval_path=str(tmp_path / "test.jsonl"))
    asked, held = ({q.prompt for q in questions.questions(split, 0)} for split in ("calibration", "eval"))
    assert len(asked) == 25 and len(held) == 15 and not asked & held


def test_prompts_without_answers_calibrate_and_nothing_else(tmp_path):
    (tmp_path / "mine.txt").write_text("".join(f"Why is {n} odd?\n\n" for n in range(1, 41, 2)))
    questions = question_set("prompts", path=str(tmp_path / "mine.txt"))
    asked = list(questions.questions("calibration", 0))
    assert {q.prompt for q in asked} == {f"Why is {n} odd?" for n in range(1, 41, 2)}
    assert questions.check(asked[0], "Because.") is None
    with pytest.raises(ValueError, match="`prompts` has no answers; name another under evaluate.questions"):
        next(questions.questions("eval", 0))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [("{", r"q\.jsonl:1: not a JSON object"), ('{"question": "x"}', r"q\.jsonl:1: no field 'answer'")],
)
def test_a_wrong_line_is_named(tmp_path, line, sentence):
    (tmp_path / "q.jsonl").write_text(line)
    with pytest.raises(ValueError, match=sentence):
        list(Jsonl(path=str(tmp_path / "q.jsonl")).questions("eval", 0))


def test_a_missing_file_and_a_wrong_option():
    with pytest.raises(ValueError, match="nowhere: no such file"):
        next(Jsonl(path="nowhere").questions("eval", 0))
    for options, lesson in (
        ({"pth": "x"}, "unknown option of question set `jsonl` `pth`. Did you mean `path`?"),
        ({"path": 3}, "question set `jsonl`: path: input should be a valid string, found 3"),
        ({"path": "x", "judge": "numbr"}, "judge: input should be 'number', 'math' or 'none', found 'numbr'"),
        ({}, "question set `jsonl`: .*'path'"),
    ):
        with pytest.raises(ValueError, match=lesson):
            question_set("jsonl", **options)
