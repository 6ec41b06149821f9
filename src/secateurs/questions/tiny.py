"""The questions of the bundled reasoner: arithmetic, loop programs and search, each with the thought that solves it."""

import gzip
import json
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from random import Random

from secateurs.questions import PromptFormat, Question, unknown_name

SPLITS = {"train": range(0, 7), "calibration": range(7, 9), "eval": range(9, 10)}
PLACES = "abcdefg"
POOL = 40_000  # draws per family, before duplicates go: a finite universe, so that every split ends
PLAIN = PromptFormat()
CORPUS = Path(__file__).parent / "data" / "c4_sample.jsonl.gz"


def columns(left: int, right: int, sign: str, width: int) -> str:
    """Digit by digit from the right: `7+5+0=2c1` is 7 plus 5 plus the old carry: 2, and 1 to carry (or borrow)."""
    steps, carry = [], 0
    for place in range(width):
        x, y = left // 10**place % 10, right // 10**place % 10
        total = x + y + carry if sign == "+" else x - y - carry
        steps.append(f"{x}{sign}{y}{sign}{carry}={total % 10}c{abs(total // 10)}")
        carry = abs(total // 10)
    return " ".join(steps)


def written_sum(left: int, right: int) -> str:
    """One line adding two numbers column by column."""
    width = max(len(str(left)), len(str(right)))
    return f"{left}+{right} {columns(left, right, '+', width)}={left + right}\n"


def written_product(left: int, digit: int) -> str:
    """One line multiplying a number by one digit: `6*7+0=2c4` is 6 times 7 plus the old carry."""
    steps, carry = [], 0
    for x in map(int, reversed(str(left))):
        total = x * digit + carry
        steps.append(f"{x}*{digit}+{carry}={total % 10}c{total // 10}")
        carry = total // 10
    return f"{left}*{digit} {' '.join(steps)}={left * digit}\n"


def draw_arith(rng: Random) -> str:
    """`4738+592`, `386*47` or `386*47+592`."""
    kind = rng.choice(("sum", "product", "product", "both"))
    if kind == "sum":
        return f"{rng.randint(100, 99999)}+{rng.randint(100, 99999)}"
    product = f"{rng.randint(100, 999)}*{rng.randint(2, 9)}{rng.randint(2, 9)}"
    return product if kind == "product" else f"{product}+{rng.randint(100, 9999)}"


def solve_arith(prompt: str) -> tuple[str, str]:
    """Long multiplication and addition, every column and carry written out."""
    first, *rest = prompt.split("+")
    thought = ""
    if "*" in first:
        left, right = first.split("*")
        units, tens = int(left) * int(right[1]), int(left) * int(right[0])
        thought = written_product(int(left), int(right[1])) + written_product(int(left), int(right[0]))
        thought += written_sum(units, tens * 10)
        first = str(units + tens * 10)
    total = int(first)
    for term in rest:
        thought += written_sum(total, int(term))
        total += int(term)
    return thought, str(total)


def draw_program(rng: Random) -> str:
    """`a37b05x3:a+b,b-4`: with a=37 and b=5, three times do a+=b then b-=4, all modulo 100."""
    body, rounds = rng.choice(((1, 5), (1, 6), (1, 7), (2, 3), (2, 3), (2, 4), (3, 2), (3, 2)))
    statements = [f"{x}{sign}{y}" for x in "ab" for sign in "+-" for y in "ab123456789" if (x, sign) != (y, "-")]
    return f"a{rng.randint(0, 99):02}b{rng.randint(0, 99):02}x{rounds}:{','.join(rng.sample(statements, body))}"


def solve_program(prompt: str) -> tuple[str, str]:
    """One line per statement run: rounds left, the state, the statement, its two columns."""
    head, body = prompt.split(":")
    state = {"a": int(head[1:3]), "b": int(head[4:6])}
    lines = []
    for left in range(int(head[7:]), 0, -1):
        for statement in body.split(","):
            target, sign, source = statement
            value = state[source] if source in state else int(source)
            steps = columns(state[target], value, sign, 2)
            lines.append(f"{left} a{state['a']:02}b{state['b']:02} {statement} {steps}\n")
            state[target] = (state[target] + (value if sign == "+" else -value)) % 100
    return "".join(lines) + f"0 a{state['a']:02}b{state['b']:02}\n", f"{state['a']:02}{state['b']:02}"


def draw_search(rng: Random) -> str:
    """`23:a9b7c5d8e3f6`: the first choice of these digits, in their order, that adds up to 23."""
    while True:
        digits = rng.sample(range(1, 10), rng.randint(5, 7))
        chosen = rng.sample(digits, rng.randint(2, len(digits) - 1))
        prompt = f"{sum(chosen):02}:{''.join(f'{place}{digit}' for place, digit in zip(PLACES, digits, strict=False))}"
        # Searches that end at once exercise no backtracking; the longest would not fit the sampler's budget.
        if 130 <= len(solve_search(prompt)[0]) <= 420:
            return prompt


def solve_search(prompt: str) -> tuple[str, str]:
    """Depth first: `a9/14` takes 9 leaving 14, `d8x` is too big, `<c` gives c back; a new line copies what is kept."""
    target, digits = int(prompt[:2]), [int(digit) for digit in prompt[4::2]]
    taken: list[tuple[int, int]] = []  # place, what is left to find
    thought, place = f"{target:02}", 0
    while True:
        rest = taken[-1][1] if taken else target
        if rest == 0:
            return thought + "\n", "".join(str(digits[kept]) for kept, _ in taken)
        if place < len(digits):
            fits = digits[place] <= rest
            if fits:
                taken.append((place, rest - digits[place]))
            thought += f" {PLACES[place]}{digits[place]}" + (f"/{taken[-1][1]:02}" if fits else "x")
            place += 1
        else:
            back, _ = taken.pop()
            kept = "".join(f" {PLACES[kept]}{digits[kept]}/{left:02}" for kept, left in taken)
            thought += f" <{PLACES[back]}\n{target:02}{kept}"
            place = back + 1


FAMILIES: dict[str, tuple[Callable[[Random], str], Callable[[str], tuple[str, str]]]] = {
    "arith": (draw_arith, solve_arith),
    "program": (draw_program, solve_program),
    "search": (draw_search, solve_search),
}


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """Short questions that take long thoughts, made by rule; split by the hash of the question's text."""

    name: str = "tiny"
    version: int = 2
    format: PromptFormat = PLAIN
    families: tuple[str, ...] = tuple(FAMILIES)

    def __post_init__(self) -> None:
        for family in self.families:
            if family not in FAMILIES:
                raise ValueError(unknown_name("family", family, list(FAMILIES)))

    def questions(self, split: str, seed: int) -> Iterator[Question]:
        """Distinct questions of `split`, families mixed, in an order fixed by `seed`; ends after some thousands."""
        residues = residues_of(split)
        seen = set()
        for place in _places(len(self.families), seed):
            family = self.families[place // POOL]
            prompt, digest = _drawn(family, place % POOL)
            if int(digest, 16) % 10 in residues and prompt not in seen:
                seen.add(prompt)
                answer = FAMILIES[family][1](prompt)[1]
                yield Question(id=f"{family}-{digest[:16]}", prompt=prompt, answer=answer, family=family)

    def solution(self, question: Question) -> str:
        """The completion a model is trained on: the thought between its tags, then the answer."""
        thought, answer = FAMILIES[question.family][1](question.prompt)
        return f"<think>{thought}</think>{answer}"

    def check(self, question: Question, answer: str) -> bool:
        """Whether `answer` is the right text and nothing else, white space at its ends aside."""
        return answer.strip() == question.answer

    def corpus(self, split: str, seed: int) -> Iterator[str]:
        """Plain English excerpts in the role of C4, of documents no other split has, in an order fixed by `seed`."""
        residues_of(split)
        with gzip.open(CORPUS, "rt", encoding="ascii") as lines:
            texts = [entry["text"] for entry in map(json.loads, lines) if entry["split"] == split]
        Random(seed).shuffle(texts)
        yield from texts


@lru_cache(maxsize=1)
def _places(count: int, seed: int) -> array:
    """The draws of so many families, in an order of its own for each seed. Kept: a run asks for the order often."""
    places = array("I", range(count * POOL))
    Random(seed).shuffle(places)
    return places


@lru_cache(maxsize=16_384)
def _drawn(family: str, number: int) -> tuple[str, str]:
    """A question's text, and its hash, which says the split."""
    prompt = FAMILIES[family][0](Random(f"{family} {number}"))
    return prompt, sha256(prompt.encode()).hexdigest()


def residues_of(split: str) -> range:
    """The hash residues modulo 10 that make up `split`. ValueError names the nearest split."""
    if split not in SPLITS:
        raise ValueError(unknown_name("split", split, list(SPLITS)))
    return SPLITS[split]
