"""Programs to write: HumanEval and MBPP. A reply is right when its program passes the set's tests (`sandbox.py`)."""

import ast
import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from textwrap import dedent, indent
from typing import Any

from secateurs.questions import Asked, PromptFormat, Question, unknown_name
from secateurs.questions.jsonl import DATA, file_questions, stable_id
from secateurs.questions.sandbox import Sandbox

WRITE_IT = PromptFormat(
    system="You write Python. Think step by step, then give the whole program in one ```python block."
)
LONGEST = 100_000  # characters; the program stands at the end
BLOCK = re.compile(
    r"^[ \t]*```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL | re.IGNORECASE
)


@dataclass(frozen=True)
class Task:
    """What judges a program: `tests` that call `names`, beside what `setup` defines; `given` opens the program."""

    tests: str
    names: tuple[str, ...]
    setup: str = ""
    given: str = ""


def humaneval_task(row: dict[str, Any]) -> tuple[str, Task]:
    """What is asked and how it is judged, of a row of HumanEval: a signature to go on from, a `check` to pass."""
    given, name = row["prompt"], row["entry_point"]
    prompt = f"Complete this function. Write all of it, with its imports.\n\n```python\n{given.rstrip()}\n```"
    return prompt, Task(tests=f"{row['test']}\ncheck({name})\n", names=(name,), setup=given, given=given)


def mbpp_task(row: dict[str, Any]) -> tuple[str, Task]:
    """What is asked and how it is judged, of a row of MBPP: a sentence, and assertions that are shown."""
    tests = "\n".join(row["test_list"])
    prompt = f"{row['text'].strip()}\n\nThe program must pass these tests:\n\n```python\n{tests}\n```"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about backslashes in the reference programs
        body = ast.parse(row["code"]).body
    imports = [ast.unparse(node) for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    defined = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    called = {node.id for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Name)}
    setup = "\n".join([*imports, row.get("test_setup_code", "")])
    return prompt, Task(tests=tests, names=tuple(sorted(defined & called)), setup=setup)


LAYOUTS: dict[str, Callable[[dict[str, Any]], tuple[str, Task]]] = {"humaneval": humaneval_task, "mbpp": mbpp_task}


def program_of(reply: str, task: Task) -> str:
    """The program in a reply: of its fenced blocks the last that defines what is tested, else the last, else the text.

    Where a signature was given, the reply may repeat it or go on from it; a reply that is cut off keeps what it has.
    """
    blocks = BLOCK.findall(reply[-LONGEST:]) or [reply[-LONGEST:]]
    wanted = re.compile(rf"^[ \t]*(?:def|class)[ \t]+(?:{'|'.join(map(re.escape, task.names))})\b", re.MULTILINE)
    defining = [block for block in blocks if wanted.search(block)]
    code = dedent((defining or blocks)[-1])
    return f"{task.given}\n{code if defining or not task.given else indent(code, '    ')}"


@dataclass(frozen=True, kw_only=True)
class Code(Asked):
    """One row (`rows.py`) with a task and its tests each, in the `layout` of HumanEval or MBPP; split as `Jsonl` is.

    Model-written programs run only where the kernel can lock them in; `isolated = false` lets them run elsewhere, with
    limits but unlocked. `seconds` of CPU, three times as many by the clock, and `memory` bytes are for each program.
    """

    path: str
    eval_path: str = ""
    name: str = "code"
    version: int = 1
    layout: str = "humaneval"
    seconds: int = Sandbox.seconds
    memory: int = Sandbox.memory
    isolated: bool = True
    system: str = WRITE_IT.system

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(unknown_name("layout", self.layout, list(LAYOUTS)))
        if self.seconds < 1 or self.memory < 1 << 27:
            raise ValueError(f"question set `{self.name}`: a program needs 1 second and {1 << 27:,} bytes at least")

    @property
    def sandbox(self) -> Sandbox:
        """Where its programs run."""
        return Sandbox(seconds=self.seconds, clock=3 * self.seconds, memory=self.memory, isolated=self.isolated)

    def questions(self, split: str, seed: int) -> Iterator[Question]:
        """Distinct questions of `split` in an order fixed by `seed`. ValueError where programs cannot be locked in."""
        self.sandbox.prove()
        return file_questions(self.name, self.path, self.eval_path, self._question, split, seed)

    def _question(self, place: str, row: dict[str, Any]) -> Question:
        try:
            prompt, task = LAYOUTS[self.layout](row)
        except (KeyError, TypeError, AttributeError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"{place}: not a row of {self.layout} ({type(error).__name__}: {error})") from None
        if not task.names:
            raise ValueError(f"{place}: its tests call nothing that its reference program defines")
        return Question(id=stable_id(self.name, prompt), prompt=prompt, answer=json.dumps(asdict(task)))

    def check(self, question: Question, answer: str) -> bool:
        """Whether the program in the reply passes the tests."""
        task = Task(**json.loads(question.answer))
        return self.sandbox.passes(program_of(answer, task), task.tests, tuple(task.names), task.setup)


def humaneval(**options: Any) -> Code:
    """HumanEval (Chen et al. 2021, MIT): 164 functions to write from signature and examples, for evaluation only."""
    paths: dict[str, Any] = {"path": "", "eval_path": str(DATA / "humaneval.jsonl.gz")}
    return Code(**{"name": "humaneval", "layout": "humaneval", **paths, **options})


def mbpp(**options: Any) -> Code:
    """MBPP (Austin et al. 2021, CC BY 4.0): 369 training tasks calibrate, 499 of the 500 test tasks evaluate."""
    paths: dict[str, Any] = {"path": str(DATA / "mbpp_train.jsonl.gz"), "eval_path": str(DATA / "mbpp_test.jsonl.gz")}
    return Code(**{"name": "mbpp", "layout": "mbpp", **paths, **options})
