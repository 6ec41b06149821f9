"""The table of question sets in the documentation names every set, and its counts are what the sets give."""

import re
from pathlib import Path

from secateurs.questions import QUESTION_SETS, question_set

ROWS = [
    [cell.strip() for cell in line.strip("|\n").split("|")]
    for line in (Path(__file__).parents[1] / "docs" / "questions.md").read_text().splitlines()
    if line.startswith("| `")
]


def test_every_set_is_in_the_table():
    assert sorted(name for row in ROWS for name in re.findall(r"`(\w+)`", row[0])) == sorted(QUESTION_SETS)


def test_what_ships_has_as_many_questions_as_the_table_says():
    shipped = [row for row in ROWS if row[5] == "yes" and row[0] != "`tiny`"]  # whose questions take long to draw
    assert len(shipped) == 7
    for name, *_, counts, _, _ in shipped:
        questions = question_set(name.strip("`"))
        for split, count in zip(("calibration", "eval"), counts.split(" / "), strict=True):
            if count != "none":
                assert sum(1 for _ in questions.questions(split, 0)) == int(count.replace(",", "")), (name, split)
