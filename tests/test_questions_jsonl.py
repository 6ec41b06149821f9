"""Questions from files: the shipped sets, disjoint splits, the number a reply ends on, and lines that are wrong."""

import json
from itertools import islice

import pytest

from secateurs.questions import question_set
from secateurs.questions.jsonl import Jsonl, last_number


@pytest.mark.parametrize(
    ("reply", "number"),
    [
        ("so 3 + 4 = 7", "7"),
        ("\\boxed{1,234} apples, not 5", "1234"),
        ("\\boxed{2} no, \\boxed{18}", "18"),
        ("it costs $2.50.", "2.5"),
        ("51.0", "51"),
        ("-3", "-3"),
        ("no number", None),
        ("", None),
    ],
)
def test_the_number_a_reply_ends_on(reply, number):
    assert last_number(reply) == number


@pytest.mark.parametrize(("name", "calibration", "evaluation"), [("gsm8k", 2000, 1319), ("svamp", 600, 250)])
def test_shipped_sets_are_disjoint_and_score_their_own_answers(name, calibration, evaluation):
    questions = question_set(name)
    asked, held = list(questions.questions("calibration", 0)), list(questions.questions("eval", 0))
    assert len(asked) >= calibration and len(held) >= evaluation
    assert not {q.id for q in asked} & {q.id for q in held}
    for question in islice(held, 50):
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
        ({"path": "x", "judge": "numbr"}, "judge: input should be 'number' or 'math', found 'numbr'"),
        ({}, "question set `jsonl`: .*'path'"),
    ):
        with pytest.raises(ValueError, match=lesson):
            question_set("jsonl", **options)
