"""Countdown: puzzles that can be solved, splits that share none, and a judge that computes and never evaluates."""

import json
from fractions import Fraction
from itertools import islice

import pytest

from secateurs.questions import Question, question_set
from secateurs.questions.countdown import COUNTS, Countdown, value_of, written

PUZZLE = Question(
    id="x", prompt="", answer=json.dumps({"numbers": [3, 7, 7, 50], "target": 378, "solution": "7 * (50 + 7 - 3)"})
)


@pytest.mark.parametrize("use_all", [True, False])
def test_every_puzzle_is_solved_by_its_solution(use_all):
    for count in COUNTS:
        questions = Countdown(counts=(count,), use_all=use_all)
        for question in islice(questions.questions("eval", 0), 60):
            known = json.loads(question.answer)
            assert len(known["numbers"]) == count and str(known["target"]) in question.prompt
            assert questions.check(question, f"\\boxed{{{known['solution']}}}"), known
            assert not questions.check(question, f"\\boxed{{{known['solution']} + 1}}")
            assert not questions.check(question, f"\\boxed{{{known['target']}}}") and not questions.check(question, "")


def test_splits_are_fixed_share_nothing_and_end():
    questions = question_set("countdown", counts=(4, 3))
    asked, held = list(questions.questions("calibration", 0)), list(questions.questions("eval", 0))
    ids = [q.id for q in asked + held]
    assert len(ids) == len(set(ids)) and len(asked) > 12_000 and len(held) > 5_000
    other = list(question_set("countdown", counts=(3, 4), use_all=False).questions("eval", 1))
    assert {q.id for q in other} == {q.id for q in held}, "neither seed nor rule moves a puzzle to the other split"
    assert [q.id for q in other] != [q.id for q in held]
    assert {q.family for q in held} == {"3 numbers", "4 numbers"}
    assert held[0].prompt == "Using the numbers 12, 14, 65, each once, write an expression that equals 233."


@pytest.mark.parametrize(
    ("reply", "right", "right_if_any"),
    [
        (r"\boxed{7 * (50 + 7 - 3)}", True, True),
        (r"\boxed{7 \times (50 + 7 - 3) = 378}", True, True),
        (r"$$\boxed{7 \cdot \left(50 - 3 + 7\right)}$$", True, True),
        ("So it is\n7*(7+50-3) = 378", True, True),
        ("Answer: `(7 + 50 - 3) * 7`", True, True),
        ("**378 = 7 × (50 − 3 + 7)**.", True, True),
        (r"\boxed{-7 * (3 - 50 - 7)}", True, True),
        (r"\boxed{\frac{7 * (50 + 7 - 3)}{1}}", False, False),
        (r"\boxed{7 * (50 + 7 - 3)} is wrong: \boxed{7 * 50}", False, False),
        (r"\boxed{7 * (50 + 3) + 7}", True, True),
        (r"\boxed{7 * 50 + 28}", False, False),
        (r"\boxed{378}", False, False),
        (r"\boxed{50 * 7 + 7 * 3 + 7}", False, False),
        (r"\boxed{7 * 7 * 7 + 50 - 3 * 5}", False, False),
        (r"\boxed{7 ** 2 + 50 * 7}", False, False),
        ("I cannot find it.", False, False),
        ("", False, False),
    ],
)
def test_verdicts(reply, right, right_if_any):
    assert Countdown().check(PUZZLE, reply) is right
    assert Countdown(use_all=False).check(PUZZLE, reply) is right_if_any


def test_fewer_numbers_are_enough_only_where_the_prompt_says_so():
    puzzle = Question(id="x", prompt="", answer=json.dumps({"numbers": [2, 10, 40], "target": 400}))
    assert Countdown(use_all=False).check(puzzle, r"\boxed{10 * 40}")
    assert not Countdown().check(puzzle, r"\boxed{10 * 40}")
    assert not Countdown(use_all=False).check(puzzle, r"\boxed{10 * 40 * 2 / 2}")


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1/3 + 1/3 + 1/3", Fraction(1)), ("2 - -3", Fraction(5)), ("10/4", Fraction(5, 2)),
        ("9**9**9", None), ("9^9", None), ("2//1", None), ("7 % 3", None), ("1e9", None), ("3.0", None), ("0x10", None),
        ("1/0", None), ("1/(2-2)", None), ("(" * 150 + "1" + ")" * 150, None), ("(" * 99 + "1" + ")" * 99, Fraction(1)),
        ("-" * 199 + "1", Fraction(-1)), ("9" * 199, Fraction(int("9" * 199))), ("9" * 201, None), ("1," * 50, None),
        ("__import__('os')", None), ("(lambda: 1)()", None), ("1 if 1 else 2", None), ("[1]", None), ("007", None),
        ("1 < 2", None), ("True", None), ("x", None), ("1 2", None), ("", None), ("١", None), ("2\n+3", None),
    ],
)  # fmt: skip
def test_expressions_are_computed_exactly_or_not_at_all(expression, value):
    found = value_of(expression)
    assert (found and found[0]) == value


def test_a_hostile_reply_ends():
    for reply in ("\\frac{" * 10**5, "=" * 10**6, "\\boxed{" + "\\frac{1}{1}" * 10**5 + "}", "(" * 10**6, "\n" * 10**6):
        assert value_of(written(reply)) is None


@pytest.mark.parametrize(
    ("options", "lesson"),
    [
        ({"counts": (1,)}, "counts is [1], but a puzzle has 2 to 8 numbers"),
        ({"counts": ()}, "counts is [], but"),
        ({"count": (3,)}, "Did you mean `counts`?"),
    ],
)
def test_wrong_options_teach(options, lesson):
    with pytest.raises(ValueError) as error:
        question_set("countdown", **options)
    assert lesson in str(error.value)
    with pytest.raises(ValueError, match="unknown split `evil`. Did you mean `eval`?"):
        next(Countdown().questions("evil", 0))
