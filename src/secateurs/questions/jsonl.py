"""Questions from the rows of a file, answered by a number or mathematics, and the public sets of that kind."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any, Literal

from secateurs.questions import Asked, PromptFormat, Question
from secateurs.questions.math_judge import MathJudge
from secateurs.rows import read_rows

DATA = Path(__file__).parent / "data"
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
STEP_BY_STEP = PromptFormat(
    system="You solve word problems. Think step by step, then write the final number in \\boxed{}."
)


def last_number(text: str) -> str | None:
    """The number a reply ends on: the last in a `\\boxed{}`, else the last of all; without commas or `.0`."""
    boxed = re.findall(r"\\boxed\{([^{}]*)\}", text)
    found = NUMBER.findall(boxed[-1] if boxed else text)
    if not found:
        return None
    value = float(found[-1].replace(",", ""))
    return str(int(value)) if value.is_integer() else str(value)


def file_questions(
    name: str, path: str, eval_path: str, read: Callable[[str, dict[str, Any]], Question], split: str, seed: int
) -> Iterator[Question]:
    """Distinct questions of a `split` of the set `name`, in an order fixed by `seed`; `read` gets place and row.

    With an `eval_path` each split has its file, without a `path` there is nothing to calibrate on (ValueError), else
    the hash of a question's prompt decides: residue 0 to 6 of 10 calibrates, 7 to 9 evaluates.
    """
    if split != "eval" and not path:
        raise ValueError(
            f"question set `{name}` is for evaluation only; trace another, such as gsm8k, and name this one "
            "under evaluate.questions"
        )
    rows: dict[str, Question] = {}
    for place, row in read_rows(eval_path if split == "eval" and eval_path else path):
        question = read(place, row)
        rows.setdefault(question.id, question)
    ordered = list(rows.values())
    if not eval_path:
        evaluated = {row.id for row in ordered if int(sha256(row.prompt.encode()).hexdigest(), 16) % 10 >= 7}
        ordered = [row for row in ordered if (row.id in evaluated) == (split == "eval")]
    Random(seed).shuffle(ordered)
    yield from ordered


def stable_id(name: str, prompt: str) -> str:
    """The id of a question of the set `name`: its name and a hash of the text."""
    return f"{name}-{sha256(prompt.encode()).hexdigest()[:16]}"


@dataclass(frozen=True, kw_only=True)
class Jsonl(Asked):
    """One row (`rows.py`) with a question and an answer each, compared as numbers or as mathematics (`math_judge`).

    The hash of a question decides its split. A set that comes with a test file of its own names it as `eval_path`, and
    then nothing is split; with no `path` it only evaluates (`file_questions`).
    """

    path: str
    eval_path: str = ""
    name: str = "jsonl"
    version: int = 1
    question_field: str = "question"
    answer_field: str = "answer"
    family_field: str = ""
    judge: Literal["number", "math"] = "number"
    system: str = STEP_BY_STEP.system
    _math: MathJudge = field(default_factory=MathJudge, init=False, repr=False, compare=False)

    def questions(self, split: str, seed: int) -> Iterator[Question]:
        """Distinct questions of `split` in an order fixed by `seed`. ValueError names the line that is wrong."""
        return file_questions(self.name, self.path, self.eval_path, self._question, split, seed)

    def _question(self, place: str, row: dict[str, Any]) -> Question:
        try:
            prompt, answer = str(row[self.question_field]), str(row[self.answer_field])
            family = str(row[self.family_field]) if self.family_field else ""
        except KeyError as error:
            raise ValueError(
                f"{place}: no field {error}; a question needs `{self.question_field}` and `{self.answer_field}`"
            ) from None
        if self.judge == "number" and last_number(answer) is None:
            raise ValueError(f'{place}: no number in `{self.answer_field}`; for other answers there is judge = "math"')
        return Question(id=stable_id(self.name, prompt), prompt=prompt, answer=answer, family=family)

    def check(self, question: Question, answer: str) -> bool:
        """Whether the number the reply ends on is the reference's; or, judged as mathematics, the same expression."""
        if self.judge == "math":
            return self._math.same(question.answer, answer)
        found = last_number(answer)
        return found is not None and found == last_number(question.answer)


def gsm8k(**options: Any) -> Jsonl:
    """Grade School Math 8K (OpenAI, MIT): 2,000 training problems calibrate, the 1,319 test problems evaluate."""
    paths: dict[str, Any] = {"path": str(DATA / "gsm8k_train.jsonl.gz"), "eval_path": str(DATA / "gsm8k_test.jsonl.gz")}
    return Jsonl(**{"name": "gsm8k", **paths, **options})


def svamp(**options: Any) -> Jsonl:
    """SVAMP (MIT): 1,000 one-step word problems, split by hash."""
    return Jsonl(**{"name": "svamp", "path": str(DATA / "svamp.jsonl.gz"), **options})


def math500(**options: Any) -> Jsonl:
    """MATH-500 (Hendrycks et al. 2021, the split of Lightman et al. 2023; MIT): 500 problems, for evaluation only."""
    path = str(DATA / "math500.jsonl.gz")
    fixed: dict[str, Any] = {"path": "", "eval_path": path, "judge": "math", "family_field": "family", "version": 2}
    system = "Think step by step, then write the final answer in \\boxed{}."
    return Jsonl(**{"name": "math500", "system": system, **fixed, **options})


def aime24(path: str = "", **options: Any) -> Jsonl:
    """AIME 2024, 30 problems that belong to the MAA and never ship: from a file or the hub, for evaluation only."""
    return _aime("aime24", "hub:HuggingFaceH4/aime_2024", path, options)


def aime25(path: str = "", **options: Any) -> Jsonl:
    """AIME 2025, 30 problems that belong to the MAA and never ship: from a file or the hub, for evaluation only."""
    return _aime("aime25", "hub:yentinglin/aime_2025", path, options)


def _aime(name: str, where: str, path: str, options: dict[str, Any]) -> Jsonl:
    """Answers are whole numbers from 0 to 999, compared as numbers."""
    if not path:
        raise ValueError(
            f'question set `{name}` does not ship, its problems are the MAA\'s: give a `path`, as in path = "{where}", '
            "or a file with `problem` and `answer`"
        )
    fixed: dict[str, Any] = {"path": "", "eval_path": path, "question_field": "problem"}
    return Jsonl(**{"name": name, **fixed, **options})
