"""Countdown, made by rule: numbers and a target; any expression of those numbers that equals it is right."""

import ast
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from hashlib import sha256
from random import Random

from secateurs.questions import Asked, PromptFormat, Question, unknown_name
from secateurs.questions.choices import BOX

SPLITS = {"calibration": range(0, 7), "eval": range(7, 10)}
POOL = 10_000  # draws for each count of numbers, before duplicates go: a finite universe, so that every split ends
COUNTS = range(2, 9)
TARGETS = range(10, 1000)
LONGEST = 200  # characters of an expression; eight numbers with brackets need 60
EXPRESSION = PromptFormat(
    system="Think step by step, then write the expression, and nothing else, in \\boxed{}. Use +, -, *, / and brackets."
)
SIGNS = {
    "\\times": "*",
    "\\cdot": "*",
    "\\div": "/",
    "\\left": "",
    "\\right": "",
    "×": "*",
    "·": "*",
    "÷": "/",
    "−": "-",
}
FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
PLAIN = re.compile(r"[0-9\s()+*/-]+")
OPERATIONS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: lambda a, b: a + b, ast.Sub: lambda a, b: a - b, ast.Mult: lambda a, b: a * b, ast.Div: lambda a, b: a / b,
}  # fmt: skip


def draw(rng: Random, count: int) -> tuple[list[int], int, str]:
    """`count` numbers from 1 to 99 in order, a target they can make, each used once, and an expression that does."""
    while True:
        numbers = sorted(rng.randint(1, rng.choice((12, 99))) for _ in range(count))
        parts = [(number, str(number)) for number in numbers]
        while len(parts) > 1:
            (left, before), (right, after) = (parts.pop(rng.randrange(len(parts))) for _ in range(2))
            whole = right != 0 and left % right == 0
            sign = rng.choice("+-*/" if whole else "+-*")
            value = {"+": left + right, "-": left - right, "*": left * right, "/": left // (right or 1)}[sign]
            parts.append((value, f"({before} {sign} {after})"))
        target, expression = parts[0]
        if target in TARGETS and target not in numbers:
            return numbers, target, expression[1:-1]


def written(reply: str) -> str:
    """The expression a reply ends on, in plain signs: its last box, else its last line; without `= 682`."""
    reply = reply[-20 * LONGEST :]
    boxes = BOX.findall(reply)
    lines = [line for line in reply.splitlines() if line.strip()]
    text = boxes[-1] if boxes else lines[-1].rpartition(":")[2] if lines else ""
    for sign, plain in SIGNS.items():
        text = text.replace(sign, plain)
    while FRACTION.search(text):
        text = FRACTION.sub(r"((\1)/(\2))", text)
    sides = [side for side in re.sub(r"[$`\\]|\*\*", " ", text).strip(" .").split("=") if not side.strip().isdigit()]
    return sides[0].strip() if len(sides) == 1 else ""


def value_of(expression: str) -> tuple[Fraction, Counter[int]] | None:
    """What an expression of whole numbers, + - * / and brackets is worth, exactly, and the numbers in it.

    None for anything else, also for one longer than LONGEST or that divides by zero. Nothing is evaluated as Python.
    """
    if len(expression) > LONGEST or not PLAIN.fullmatch(expression):
        return None
    used: Counter[int] = Counter()

    def worth(node: ast.AST) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            used[node.value] += 1
            return Fraction(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -worth(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
            return OPERATIONS[type(node.op)](worth(node.left), worth(node.right))
        raise ValueError(f"{type(node).__name__} is no arithmetic")

    try:
        return worth(ast.parse(expression.strip(), mode="eval").body), used
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


@dataclass(frozen=True, kw_only=True)
class Countdown(Asked):
    """Puzzles that are solvable by construction, split by the hash of numbers and target; difficulty is the count."""

    name: str = "countdown"
    version: int = 1
    counts: tuple[int, ...] = (3, 4)
    """How many numbers a puzzle has; several are mixed."""
    use_all: bool = True
    """Each number exactly once; otherwise at most once."""
    system: str = EXPRESSION.system

    def __post_init__(self) -> None:
        if not self.counts or any(count not in COUNTS for count in self.counts):
            raise ValueError(f"countdown: counts is {list(self.counts)}, but a puzzle has 2 to {COUNTS[-1]} numbers")

    def questions(self, split: str, seed: int) -> Iterator[Question]:
        """Distinct questions of `split`, counts mixed, in an order fixed by `seed`; ends after some thousands."""
        if split not in SPLITS:
            raise ValueError(unknown_name("split", split, list(SPLITS)))
        places = [(count, place) for count in sorted(set(self.counts)) for place in range(POOL)]
        Random(seed).shuffle(places)
        seen = set()
        for count, place in places:
            numbers, target, expression = draw(Random(f"countdown {count} {place}"), count)
            listed = ", ".join(map(str, numbers))
            digest = sha256(f"{listed} -> {target}".encode()).hexdigest()
            if int(digest, 16) % 10 not in SPLITS[split] or digest in seen:
                continue
            seen.add(digest)
            how = "each once" if self.use_all else "each at most once"
            prompt = f"Using the numbers {listed}, {how}, write an expression that equals {target}."
            answer = json.dumps({"numbers": numbers, "target": target, "solution": expression})
            yield Question(id=f"countdown-{digest[:16]}", prompt=prompt, answer=answer, family=f"{count} numbers")

    def check(self, question: Question, answer: str) -> bool:
        """Whether the expression the reply ends on equals the target and uses the numbers as the question says."""
        asked, found = json.loads(question.answer), value_of(written(answer))
        if found is None:
            return False
        value, used = found
        given = Counter(asked["numbers"])
        return value == asked["target"] and (used == given if self.use_all else used <= given)
