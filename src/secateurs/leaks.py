"""Whether evaluation questions were among those that calibrated: equal texts, and shared runs of words. No torch."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

RUN = 8  # words
SHARE = 0.5


@dataclass(frozen=True)
class Overlap:
    """Of `evaluation` questions, `equal` are also among `calibration` texts and `near` share half of their runs of
    `run` words with them; `examples` are some of those."""

    evaluation: int
    calibration: int
    equal: int
    near: int
    run: int
    examples: list[str]


def words(text: str) -> tuple[str, ...]:
    """Words and numbers in compatibility form and without case, so that spacing and punctuation hide nothing."""
    return tuple(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def overlap(evaluation: Sequence[str], calibration: Iterable[str]) -> Overlap:
    """Compare normalised texts as a whole, and runs of RUN words with all calibration texts together.

    Questions of one template with other numbers share runs; questions shorter than RUN words can only be equal.
    Memory: the calibration texts' runs, as hashes.
    """
    whole: set[tuple[str, ...]] = set()
    runs: set[int] = set()
    count = 0
    for text in calibration:
        found = words(text)
        whole.add(found)
        runs.update(map(hash, _runs(found)))
        count += 1
    equal, near = 0, 0
    examples: list[str] = []
    for text in evaluation:
        found = words(text)
        own = [hash(run) for run in _runs(found)]
        if found in whole:
            equal += 1
        elif own and sum(run in runs for run in own) >= SHARE * len(own):
            near += 1
        else:
            continue
        examples.append(text)
    return Overlap(len(evaluation), count, equal, near, RUN, examples[:3])


def _runs(found: tuple[str, ...]) -> Iterable[tuple[str, ...]]:
    return (found[start : start + RUN] for start in range(len(found) - RUN + 1))
