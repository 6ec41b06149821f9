"""Whether evaluation questions were among those that calibrated: equal texts, and shared runs of words. No torch."""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

RUN = 8  # words
SHARE = 0.5
_HAN_KANA = "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(
    rf"(?!\W)[{_HAN_KANA}]|[^\W{_HAN_KANA}]+|[=+*/^<>×÷≤≥≠]"
    r"|-(?=\d)|(?<=\d)[ \t]*-[ \t]*(?=\w)|(?<=\w)[ \t]+-[ \t]*(?=\d)"  # a minus, not a hyphen or a dash
)
_ASCII = str.maketrans(dict.fromkeys("\u2010\u2012\u2013\u2212", "-") | {"\u2044": "/"})


@dataclass(frozen=True)
class Overlap:
    """Of `evaluation` questions, `equal` are also among `calibration` texts and `near` share half of their runs of
    `run` words with them; `examples` are some of those. Questions, and texts, are different ones."""

    evaluation: int
    calibration: int
    equal: int
    near: int
    run: int
    examples: list[str]


def words(text: str) -> tuple[str, ...]:
    """Words, numbers and operators in compatibility form and without case, so spacing and punctuation hide nothing.

    A minus is one that stands before a digit, or after one and before a letter. Every Chinese or Japanese character is
    a word.
    """
    plain = unicodedata.normalize("NFKC", text).translate(_ASCII).casefold()
    return tuple(found.strip() for found in _WORD.findall(plain))


def overlap(evaluation: Iterable[str], calibration: Iterable[str]) -> Overlap:
    """Compare normalised texts as a whole, and runs of RUN words with all calibration texts together.

    Texts that are equal so count once. Questions of one template with other numbers share runs; questions shorter than
    RUN words can only be equal. Memory: the calibration texts' words, and their runs as hashes.
    """
    whole: set[tuple[str, ...]] = set()
    runs: set[int] = set()
    for text in calibration:
        found = words(text)
        whole.add(found)
        runs.update(map(hash, _runs(found)))
    asked = {words(text): text for text in evaluation}
    equal, near = 0, 0
    examples: list[str] = []
    for found, text in asked.items():
        own = [hash(run) for run in _runs(found)]
        if found in whole:
            equal += 1
        elif own and sum(run in runs for run in own) >= SHARE * len(own):
            near += 1
        else:
            continue
        examples.append(text)
    return Overlap(len(asked), len(whole), equal, near, RUN, examples[:3])


def _runs(found: tuple[str, ...]) -> Iterable[tuple[str, ...]]:
    return (found[start : start + RUN] for start in range(len(found) - RUN + 1))
