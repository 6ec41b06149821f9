"""What a model is asked: question sets with stable ids, disjoint splits, a prompt format, an answer check. No torch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from difflib import get_close_matches
from importlib import import_module
from typing import Protocol, get_type_hints

from pydantic import TypeAdapter, ValidationError


@dataclass(frozen=True, kw_only=True)
class Question:
    """One thing to ask. `id` is stable and unique in its set; `answer` is what `QuestionSet.check` compares with."""

    id: str
    prompt: str
    answer: str
    family: str = ""


@dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """How a set is put to a model: system text, worked examples as (user, assistant) turns, start of the reply."""

    system: str = ""
    examples: tuple[tuple[str, str], ...] = ()
    prefill: str = ""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A set whose recipe says how it is put."""

    system: str = ""
    prefill: str = ""
    examples: tuple[tuple[str, str], ...] = ()

    @property
    def format(self) -> PromptFormat:
        """The recipe's own prompt format."""
        return PromptFormat(system=self.system, examples=self.examples, prefill=self.prefill)


class QuestionSet(Protocol):
    """A named, versioned source of questions. Splits `calibration` and `eval` never share a question."""

    name: str
    version: int
    format: PromptFormat

    def questions(self, split: str, seed: int) -> Iterator[Question]:
        """Distinct questions of `split` in an order fixed by `seed`; ends when the split is exhausted."""
        ...

    def check(self, question: Question, answer: str) -> bool | None:
        """Whether `answer` (the text after the thinking, special tokens removed) is right; None if nobody can tell."""
        ...


QUESTION_SETS: dict[str, str] = {
    "tiny": "secateurs.questions.tiny:Tiny",
    "gsm8k": "secateurs.questions.jsonl:gsm8k",
    "svamp": "secateurs.questions.jsonl:svamp",
    "math500": "secateurs.questions.jsonl:math500",
    "aime24": "secateurs.questions.jsonl:aime24",
    "aime25": "secateurs.questions.jsonl:aime25",
    "jsonl": "secateurs.questions.jsonl:Jsonl",
    "prompts": "secateurs.questions.jsonl:prompts",
    "commonsenseqa": "secateurs.questions.choices:commonsenseqa",
    "gpqa": "secateurs.questions.choices:gpqa",
    "choices": "secateurs.questions.choices:Choices",
    "humaneval": "secateurs.questions.programs:humaneval",
    "mbpp": "secateurs.questions.programs:mbpp",
    "code": "secateurs.questions.programs:Code",
    "countdown": "secateurs.questions.countdown:Countdown",
}


def unknown_name(kind: str, name: str, known: list[str]) -> str:
    """One sentence for a name that is in no table: what was found, the nearest name, what is allowed."""
    near = get_close_matches(name, known, n=1)
    hint = f" Did you mean `{near[0]}`?" if near else ""
    return f"unknown {kind} `{name}`.{hint} Known: {', '.join(sorted(known))}."


def question_set(name: str, **options) -> QuestionSet:
    """The set called `name`, built with `options`. ValueError names the nearest set or option, or what fits."""
    if name not in QUESTION_SETS:
        raise ValueError(unknown_name("question set", name, list(QUESTION_SETS)))
    module, attribute = QUESTION_SETS[name].split(":")
    factory: Callable[..., QuestionSet] = getattr(import_module(module), attribute)
    kind = factory if isinstance(factory, type) else get_type_hints(factory)["return"]
    known = [entry.name for entry in fields(kind) if entry.init]
    hints = get_type_hints(kind)
    for option, value in options.items():
        if option not in known:
            raise ValueError(unknown_name(f"option of question set `{name}`", option, known))
        try:
            TypeAdapter(hints[option]).validate_python(value, strict=True)
        except ValidationError as error:
            message = error.errors()[0]["msg"].lower()
            raise ValueError(f"question set `{name}`: {option}: {message}, found {value!r}") from None
    try:
        return factory(**options)
    except TypeError as error:
        raise ValueError(f"question set `{name}`: {error}") from None
