"""Multiple choice: a question, choices under letters, a letter as the answer. In the layout of GPQA, or with a key."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from random import Random
from string import ascii_uppercase
from typing import Any

from secateurs.questions import Asked, PromptFormat, Question
from secateurs.questions.jsonl import DATA, file_questions, stable_id

PICK_ONE = PromptFormat(system="Think step by step, then write the letter of the right answer in \\boxed{}.")
LONGEST = 20_000  # characters; an answer stands at the end
BOX = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
STYLE = re.compile(r"\\(?:text|textbf|mathrm|mathbf|textit)\s*\{([^{}]*)\}|[*_$`]+")
MENTION = re.compile(
    r"\b(?:answer|choice|option)\s*(?:is|:|=|(?:must|should|would|will)\s+be)\s*:?\s*(?:the\s+)?(?:choice|option|letter)?\s*"
    r"(?P<rest>\(?[A-Za-z]\b.*)",
    re.IGNORECASE,
)
HEAD = re.compile(r"\(([A-Za-z])\)|([A-Z])(?![\w'’])")
ANOTHER = re.compile(r"\s*(?:[,/&+]|,?\s*(?:and|or)\b)\s*(?:(?:and|or)\s+)?(?:\([A-Za-z]\)|[A-Z](?![\w'’]))")
LABELLED = re.compile(r"(?:^|[\s,;])(?:\(([A-Z])\)|([A-Z])[).:])(?=\s|$)")


def _letter(text: str, letters: str) -> str | None:
    """The one letter that `text` opens with: `C`, `(C)`, `C) a mall`; None for none of `letters`, or for several."""
    head = HEAD.match(text)
    if head is None or ANOTHER.match(text, head.end()):
        return None
    letter = (head[1] or head[2]).upper()
    others = {(found[1] or found[2]) for found in LABELLED.finditer(text)} & set(letters)
    return letter if letter in letters and others <= {letter} else None


def chosen(reply: str, letters: str) -> str | None:
    """The letter a reply decides for: in its last box, else its last `answer is (C)`, else alone on its last line.

    The first of the three that is there decides, so a box that names two letters, or none, is no answer.
    """
    reply = reply[-LONGEST:]
    boxes = BOX.findall(reply)
    if boxes:
        inside = STYLE.sub(r"\1", boxes[-1]).strip()
        return _letter(inside.upper() if len(inside) == 1 else inside, letters)
    plain = STYLE.sub(r"\1", reply)
    mentions = [found["rest"] for line in plain.splitlines() for found in _mentions(line)]
    if mentions:
        return _letter(mentions[-1], letters)
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    lone = [line for line in lines if re.fullmatch(r"\(?[A-Z]\)?[.:]?", line)]
    if not lines or (set(lone) - {lines[-1]}):
        return None
    labelled = lines[-1] in lone or re.match(r"\([A-Z]\)|[A-Z][).:]\s", lines[-1])
    return _letter(lines[-1], letters) if labelled else None


def _mentions(line: str) -> Iterator[re.Match[str]]:
    """Every `answer is C` of a line, also those inside what follows another; words (`answer is a mall`) are none."""
    start = 0
    while found := MENTION.search(line, start):
        if HEAD.match(found["rest"]):
            yield found
        start = found.start("rest")


@dataclass(frozen=True, kw_only=True)
class Choices(Asked):
    """One row (`rows.py`) with a question, its choices and which of them is right; split as `Jsonl` is.

    Either `right_field` and `wrong_fields` name the texts, or `choices_field` holds them (a list, or {"text": [...],
    "label": [...]}) and `answer_field` the key: a label, a letter or a place from 0. The order in which choices are
    shown is fixed by the hash of the question, so that the right one is as often B as A.
    """

    path: str
    eval_path: str = ""
    name: str = "choices"
    version: int = 1
    question_field: str = "question"
    choices_field: str = "choices"
    answer_field: str = "answer"
    right_field: str = ""
    wrong_fields: tuple[str, ...] = ()
    family_field: str = ""
    system: str = PICK_ONE.system

    def __post_init__(self) -> None:
        if bool(self.right_field) != bool(self.wrong_fields):
            raise ValueError(f"question set `{self.name}`: right_field and wrong_fields go together")

    def questions(self, split: str, seed: int) -> Iterator[Question]:
        """Distinct questions of `split` in an order fixed by `seed`. ValueError names the line that is wrong."""
        return file_questions(self.name, self.path, self.eval_path, self._question, split, seed)

    def _question(self, place: str, row: dict[str, Any]) -> Question:
        try:
            asked, (right, *wrong) = str(row[self.question_field]), self._texts(row)
            family = str(row[self.family_field]) if self.family_field else ""
        except KeyError as error:
            raise ValueError(f"{place}: no field {error}; there are {', '.join(map(str, row)) or 'none'}") from None
        except (TypeError, ValueError, IndexError):
            raise ValueError(
                f"{place}: the key in `{self.answer_field}` is none of the choices in `{self.choices_field}`"
            ) from None
        texts = list(dict.fromkeys(" ".join(text.split()) for text in (right, *wrong)))  # equal ones are one choice
        if not 2 <= len(texts) <= len(ascii_uppercase):
            raise ValueError(f"{place}: a question needs 2 to {len(ascii_uppercase)} different choices, found {texts}")
        shown = list(texts)
        Random(sha256(asked.encode()).hexdigest()).shuffle(shown)
        lines = (f"{letter}) {text}" for letter, text in zip(ascii_uppercase, shown, strict=False))
        prompt = f"{asked.strip()}\n\n" + "\n".join(lines)
        answer = ascii_uppercase[shown.index(texts[0])]
        return Question(id=stable_id(self.name, prompt), prompt=prompt, answer=answer, family=family)

    def _texts(self, row: dict[str, Any]) -> list[str]:
        """The texts of a row's choices, the right one first."""
        if self.right_field:
            return [str(row[field]) for field in (self.right_field, *self.wrong_fields)]
        choices, key = row[self.choices_field], row[self.answer_field]
        texts = choices["text"] if isinstance(choices, dict) else choices
        labels = list(choices["label"]) if isinstance(choices, dict) else list(ascii_uppercase[: len(texts)])
        place = range(len(texts))[key] if isinstance(key, int) else labels.index(key)
        return [str(texts[place]), *(str(text) for at, text in enumerate(texts) if at != place)]

    def check(self, question: Question, answer: str) -> bool:
        """Whether the reply decides for the right letter, and for no other beside it (`chosen`)."""
        letters = ascii_uppercase[: len(question.prompt.rpartition("\n\n")[2].splitlines())]
        return chosen(answer, letters) == question.answer


def commonsenseqa(**options: Any) -> Choices:
    """CommonsenseQA (Talmor et al. 2019, MIT): the 1,221 questions of its development split, split by hash."""
    return Choices(**{"name": "commonsenseqa", "path": str(DATA / "commonsenseqa.jsonl.gz"), **options})


def gpqa(path: str = "", **options: Any) -> Choices:
    """GPQA (Rein et al. 2023), which its authors ask nobody to republish: from a file or the hub, to evaluate."""
    if not path:
        raise ValueError(
            "question set `gpqa` needs a `path`: a file of its rows, or hub:Idavidrein/gpqa:gpqa_diamond:train after "
            "agreeing to its terms at https://huggingface.co/datasets/Idavidrein/gpqa"
        )
    fixed: dict[str, Any] = {"path": "", "eval_path": path, "question_field": "Question"}
    fixed |= {"right_field": "Correct Answer", "wrong_fields": tuple(f"Incorrect Answer {n}" for n in (1, 2, 3))}
    return Choices(**{"name": "gpqa", **fixed, **options})
