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
NUMBER = re.compile(r"(?:(?<!\w)-)?(?:\d[\d,]*(?:\.\d+)?|(?<!\w)\.\d+)")
STEP_BY_STEP = PromptFormat(
    system="You solve word problems. Think step by step, then write the final number in \\boxed{}."
)


def last_number(text: str) -> str | None:
    """The number a reference ends on, as in `#### 1,234` or `about .5 kg`; without commas or `.0`."""
    found = NUMBER.findall(text)
    if not found:
        return None
    value = float(found[-1].replace(",", ""))
    return str(int(value)) if value.is_integer() else str(value)


def file_questions(
    name: str,
    path: str,
    eval_path: str,
    read: Callable[[str, dict[str, Any]], Question],
    split: str,
    seed: int,
    evaluates: bool = True,
) -> Iterator[Question]:
    """Distinct questions of a `split` of the set `name`, in an order fixed by `seed`; `read` gets place and row.

    With an `eval_path` each split has its file, and a question in both evaluates; without a `path` there is nothing to
    calibrate on (ValueError); else the hash of a question's prompt decides: residue 0 to 6 of 10 calibrates, 7 to 9
    evaluates. A set that never `evaluates` calibrates with all of it (ValueError for its "eval").
    """
    if split == "eval" and not evaluates:
        raise ValueError(
            f"question set `{name}` has no answers; name another under evaluate.questions, or ask nothing: "
            "evaluate.num_questions = 0"
        )
    if split != "eval" and not path:
        raise ValueError(
            f"question set `{name}` is for evaluation only; trace another, such as gsm8k, and name this one "
            "under evaluate.questions"
        )

    def rows(file: str) -> dict[str, Question]:
        found: dict[str, Question] = {}
        for question in (read(place, row) for place, row in read_rows(file)):
            found.setdefault(question.id, question)
        return found

    if split == "eval" and eval_path:
        ordered = list(rows(eval_path).values())
    else:
        every = rows(path)
        held = rows(eval_path) if eval_path else {key for key, row in every.items() if evaluates and _held(row)}
        ordered = [row for key, row in every.items() if (key in held) == (split == "eval")]
    Random(seed).shuffle(ordered)
    yield from ordered


def _held(row: Question) -> bool:
    return int(sha256(row.prompt.encode()).hexdigest(), 16) % 10 >= 7


def stable_id(name: str, prompt: str) -> str:
    """The id of a question of the set `name`: its name and a hash of the text."""
    return f"{name}-{sha256(prompt.encode()).hexdigest()[:16]}"


@dataclass(frozen=True, kw_only=True)
class Jsonl(Asked):
    """One row (`rows.py`) with a question and an answer each, judged by math-verify (`math_judge`).

    With judge "number" the reference is the number that the answer ends on, with "math" it is the whole answer, LaTeX;
    with "none" there are no answers, so the questions only calibrate.
    The hash of a question decides its split. A set that comes with a test file of its own names it as `eval_path`, and
    then nothing is split; with no `path` it only evaluates (`file_questions`).
    """

    path: str
    eval_path: str = ""
    name: str = "jsonl"
    version: int = 2
    question_field: str = "question"
    answer_field: str = "answer"
    family_field: str = ""
    judge: Literal["number", "math", "none"] = "number"
    system: str = STEP_BY_STEP.system
    _math: MathJudge = field(default_factory=MathJudge, init=False, repr=False, compare=False)

    def questions(self, split: str, seed: int) -> Iterator[Question]:
        """Distinct questions of `split` in an order fixed by `seed`. ValueError names the line that is wrong."""
        answered = self.judge != "none"
        return file_questions(self.name, self.path, self.eval_path, self._question, split, seed, answered)

    def _question(self, place: str, row: dict[str, Any]) -> Question:
        try:
            prompt = str(row[self.question_field])
            answer = "" if self.judge == "none" else str(row[self.answer_field])
            family = str(row[self.family_field]) if self.family_field else ""
        except KeyError as error:
            needs = [self.question_field] + [self.answer_field] * (self.judge != "none")
            raise ValueError(
                f"{place}: no field {error}; a question needs {' and '.join(f'`{field}`' for field in needs)}"
            ) from None
        if self.judge == "number" and last_number(answer) is None:
            raise ValueError(f'{place}: no number in `{self.answer_field}`; for other answers there is judge = "math"')
        return Question(id=stable_id(self.name, prompt), prompt=prompt, answer=answer, family=family)

    def check(self, question: Question, answer: str) -> bool | None:
        """Whether the answer in the reply, in a box or the last one in it, is the reference; None without answers."""
        if self.judge == "none":
            return None
        reference = question.answer if self.judge == "math" else last_number(question.answer) or ""
        return self._math.same(reference, answer)


def prompts(path: str, **options: Any) -> Jsonl:
    """Your own prompts without answers, from a file or the hub, to calibrate on: the `text` of each row."""
    return Jsonl(
        **{"name": "prompts", "path": path, "question_field": "text", "judge": "none", "system": "", **options}
    )


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
    fixed: dict[str, Any] = {"path": "", "eval_path": path, "judge": "math", "family_field": "family"}
    system = "Think step by step, then write the final answer in \\boxed{}."
    return Jsonl(**{"name": "math500", "system": system, **fixed, **options})


def aime24(path: str = "", **options: Any) -> Jsonl:
    """AIME 2024, 30 problems that belong to the MAA and never ship: from a file or the hub, for evaluation only."""
    return _aime("aime24", "hub:HuggingFaceH4/aime_2024", path, options)


def aime25(path: str = "", **options: Any) -> Jsonl:
    """AIME 2025, 30 problems that belong to the MAA and never ship: from a file or the hub, for evaluation only."""
    return _aime("aime25", "hub:yentinglin/aime_2025", path, options)


def _aime(name: str, where: str, path: str, options: dict[str, Any]) -> Jsonl:
    """Answers are whole numbers from 0 to 999."""
    if not path:
        raise ValueError(
            f'question set `{name}` does not ship, its problems are the MAA\'s: give a `path`, as in path = "{where}", '
            "or a file with `problem` and `answer`"
        )
    fixed: dict[str, Any] = {"path": "", "eval_path": path, "question_field": "problem"}
    return Jsonl(**{"name": name, **fixed, **options})
