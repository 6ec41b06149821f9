"""Answers are the same when they mean the same; what cannot be judged is wrong, counted, and does no harm."""

import signal

import pytest
from math_verify import parse, verify

from secateurs.questions import question_set
from secateurs.questions.math_judge import MathJudge

JUDGE = MathJudge()


PAIRS = [
    (r"\frac{1}{2}", r"so the answer is \boxed{0.5}", True),
    (r"\frac{1}{2}", r"\boxed{\frac{2}{4}}", True),
    (r"\frac{1}{2}", r"\boxed{\frac12}", True),
    (r"\frac{1}{2}", r"\boxed{2}", False),
    (r"\left( 3, \frac{\pi}{2} \right)", r"The point is $\boxed{(3,\pi/2)}$.", True),
    (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(\pi/2, 3)}", False),
    ("p - q", r"\boxed{-q+p}", True),
    ("p - q", r"\boxed{q-p}", False),
    ("12", "First I get 3, then 12.", True),
    ("12", "First I get 12, then 3.", False),
    ("12", r"It is 12, no: \boxed{13}", False),
    ("5", r"\boxed{x=5}", True),
    (r"\text{Evelyn}", r"\boxed{Evelyn}", True),
    (r"\text{Evelyn}", r"\boxed{Briana}", False),
    ("10,080", r"\boxed{10080}", True),
    ("10080", r"\boxed{10\,080}", True),
    (r"70^\circ", r"\boxed{70}", True),
    (r"3\sqrt{13}", r"\boxed{\sqrt{117}}", True),
    (r"\{-2, 1\}", r"\boxed{\{1,-2\}}", True),
    (r"[-2,7]", r"\boxed{[-2, 7]}", True),
    (r"[-2,7]", r"\boxed{(-2, 7)}", False),
    ("11.5", r"\boxed{\$11.50}", True),
    ("18", r"First \boxed{17}, but it is \boxed{18}.", True),
    ("18", r"First \boxed{18}, but it is \boxed{17}.", False),
    ("18", r"$\boxed{17}$? No. $$\boxed{18}$$", True),
    (r"\frac{1}{2}", r"\[\boxed{\frac{1}{3}}\] is wrong, so \(\boxed{\frac{1}{2}}\)", True),
    ("3, 5", r"They are $\boxed{3}$ and $\boxed{5}$.", True),
    ("3, 5", r"\boxed{3}, \boxed{5}", True),
    ("3, 5", r"They are $\boxed{3}$, or maybe $\boxed{5}$.", False),
    ("42", "", False),
    ("42", r"\boxed{}", False),
    ("42", "I do not know", False),
    ("42", "\\boxed{" * 2000, False),
    ("42", "}{\x00\ud83d" + "[" * 300, False),
]


@pytest.mark.parametrize(("reference", "reply", "same"), PAIRS)
def test_verdicts(reference, reply, same):
    assert JUDGE.same(reference, reply.encode("utf-8", "replace").decode()) is same


def test_only_what_is_taken_back_and_thin_spaces_are_judged_otherwise_than_by_math_verify_itself():
    plain = [pair for pair in PAIRS if "\x00" not in pair[1] and len(pair[1]) < 1000]
    assert len(plain) > 30
    other = [pair for pair in plain if verify(parse(f"${pair[0]}$"), parse(pair[1])) is not pair[2]]
    assert other == [("10080", r"\boxed{10\,080}", True), ("18", r"First \boxed{17}, but it is \boxed{18}.", True)]


def test_a_judge_that_cannot_start_says_why_and_judges_nothing(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('of all things')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="judges mathematics does not start: ImportError: of all things"):
        MathJudge().same("2", r"\boxed{2}")


def test_what_hangs_or_dies_is_wrong_and_the_next_one_is_judged():
    judge = MathJudge()
    assert judge.same("2", r"\boxed{2}")
    judge.seconds = 0.0
    judge._process.send_signal(signal.SIGSTOP)  # or it may answer in no time
    assert not judge.same("2", r"\boxed{2}") and judge.unjudged == 1
    judge.seconds = 10.0
    assert judge.same("2", r"\boxed{1+1}")
    judge._process.kill()
    judge._process.wait()
    assert not judge.same("2", r"\boxed{2}") and judge.unjudged == 2
    assert judge.same("2", r"\boxed{2}")


def test_a_power_tower_ends_in_time():
    judge = MathJudge(seconds=8.0)
    assert not judge.same("2", r"\boxed{9^{9^{9^{9}}}}")
    assert judge.same("2", r"\boxed{2}")


def test_math500_is_for_evaluation_only_and_judged_as_mathematics():
    questions = question_set("math500")
    found = list(questions.questions("eval", 0))
    assert len(found) == len({q.id for q in found}) == 500
    polar = next(q for q in found if q.prompt.startswith("Convert the point $(0,3)$"))
    assert questions.check(polar, r"\boxed{(3, \pi/2)}") and not questions.check(polar, r"\boxed{(3, \pi)}")
    with pytest.raises(ValueError, match="`math500` is for evaluation only"):
        list(questions.questions("calibration", 0))
    assert [q.id for q in questions.questions("eval", 0)] == [q.id for q in found]
