"""Programs in replies: which one is meant, what it is joined to, and that the sets' own solutions pass."""

import gzip
import json
from dataclasses import asdict

import pytest

from secateurs.questions import question_set
from secateurs.questions.jsonl import DATA
from secateurs.questions.programs import LAYOUTS, Task, program_of

GIVEN = 'from typing import List\n\n\ndef total(numbers: List[int]) -> int:\n    """Their sum."""\n'
WHOLE = "def total(numbers):\n    return sum(numbers)\n"
TASK = Task(tests="assert total([1, 2]) == 3", names=("total",), setup=GIVEN, given=GIVEN)


@pytest.mark.parametrize(
    "reply",
    [
        f"Here it is.\n```python\n{WHOLE}```\nDone.",
        f"```\n{WHOLE}```",
        f"```Python\n{WHOLE}\n",  # cut off
        f"```python\n{GIVEN}    return sum(numbers)\n```",
        "1. As follows:\n   ```python\n   def total(numbers):\n       return sum(numbers)\n   ```\n",
        f"```python\ndef total(numbers):\n    return 0\n```\nBetter:\n```python\n{WHOLE}```",
        f"```python\n{WHOLE}```\nExample:\n```python\nprint(total([1, 2]))\n```",
        f"```python\n{WHOLE}```\nRun it:\n```bash\npython total.py\n```",
        "```python\n    return sum(numbers)\n```",
        "    result = 0\n    for number in numbers:\n        result += number\n    return result\n",
        WHOLE,
    ],
)  # fmt: skip
def test_the_program_of_a_reply_is_found_and_completes_what_was_given(reply):
    scope: dict = {}
    exec(program_of(reply, TASK), scope)
    assert scope["total"]([1, 2]) == 3


def test_a_hostile_reply_ends():
    for reply in ("```" * 50_000, "```python\n" * 20_000, "    " * 50_000, "def total" * 20_000, ""):
        assert len(program_of(reply, TASK)) < 10**6


def solutions(name: str) -> dict[str, str]:
    """The reference program of every prompt of a shipped set."""
    found = {}
    for path in DATA.glob(f"{name}*.jsonl.gz"):
        for row in map(json.loads, gzip.decompress(path.read_bytes()).splitlines()):
            found[LAYOUTS[name](row)[0]] = row.get("code") or row["prompt"] + row["canonical_solution"]
    return found


@pytest.mark.parametrize(
    ("name", "sizes", "some"),
    [
        ("humaneval", (0, 164), 6), ("mbpp", (369, 499), 4),
        pytest.param("humaneval", (0, 164), None, marks=pytest.mark.slow),
        pytest.param("mbpp", (369, 499), None, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_the_sets_own_solutions_pass_and_nothing_else_does(name, sizes, some):
    questions = question_set(name)
    held = list(questions.questions("eval", 0))
    asked = list(questions.questions("calibration", 0)) if sizes[0] else []
    assert (len(asked), len(held)) == sizes
    assert not {q.prompt.split("\n\nThe program")[0] for q in asked} & {
        q.prompt.split("\n\nThe program")[0] for q in held
    }
    program = solutions(name)
    tried = held[:some] + asked[:some]
    wrong = [q.prompt for q in tried if not questions.check(q, f"So:\n```python\n{program[q.prompt]}\n```")]
    assert not wrong
    for question in tried[:2]:
        assert not questions.check(question, "") and not questions.check(
            question, "```python\nimport os\nos._exit(0)\n```"
        )
        names = json.loads(question.answer)["names"]
        assert not questions.check(question, f"```python\ndef {names[0]}(*args): return ...\n```")


def test_humaneval_is_for_evaluation_only():
    with pytest.raises(ValueError, match="`humaneval` is for evaluation only"):
        list(question_set("humaneval").questions("calibration", 0))


@pytest.mark.parametrize(
    ("options", "lesson"),
    [
        ({"layout": "humanevil"}, "unknown layout `humanevil`. Did you mean `humaneval`?"),
        ({"seconds": 0}, "question set `code`: a program needs 1 second"),
        ({"memory": 5}, "question set `code`: a program needs 1 second and 134,217,728 bytes at least"),
        ({"isolate": False}, "Did you mean `isolated`?"),
        ({"isolated": "no"}, "isolated: input should be a valid boolean, found 'no'"),
    ],
)
def test_wrong_options_teach(options, lesson):
    with pytest.raises(ValueError, match=lesson):
        question_set("code", path="x", **options)


@pytest.mark.parametrize(
    ("layout", "row", "lesson"),
    [
        ("humaneval", {"prompt": "x"}, "not a row of humaneval .KeyError: 'entry_point'"),
        ("mbpp", {"text": "x", "code": "def", "test_list": ["f()"]}, "not a row of mbpp .SyntaxError"),
        ("mbpp", {"text": "x", "code": "x = 1", "test_list": ["f()"]}, "its tests call nothing that its reference"),
        ("mbpp", {"text": None, "code": "x = 1", "test_list": [3]}, "not a row of mbpp .TypeError"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, layout, row, lesson):
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=rf"q\.jsonl:1: {lesson}"):
        list(question_set("code", path="", eval_path=str(tmp_path / "q.jsonl"), layout=layout).questions("eval", 0))


def test_programs_that_cannot_be_locked_in_are_refused_before_anything_is_asked(monkeypatch):
    monkeypatch.setattr("secateurs.questions.sandbox._line", lambda *args: b"no filter for plan9 on vax\n")
    with pytest.raises(ValueError, match=r"cannot be locked in: no filter for plan9 on vax; .*isolated = false"):
        question_set("mbpp").questions("calibration", 0)


def test_a_task_survives_the_way_through_a_question():
    assert Task(**json.loads(json.dumps(asdict(TASK)))).tests == TASK.tests
