"""Multiple choice: which letter a reply decides for, an order that hides the right one, and rows that are wrong."""

import csv
import json
from collections import Counter

import pytest

from secateurs.questions import question_set
from secateurs.questions.choices import Choices, chosen

GPQA = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        # a box decides, the last one, and nothing else beside it
        (r"So \boxed{C}.", "C"),
        (r"\boxed{A} no wait \boxed{B}", "B"),
        (r"\boxed{B} although the answer is (A)", "B"),
        (r"\boxed{\text{D}}", "D"),
        (r"$\boxed{\mathrm{(D)}}$", "D"),
        (r"\boxed{c}", "C"),
        (r"\boxed{(B) a mall}", "B"),
        (r"\boxed{B. a mall}", "B"),
        (r"\boxed{C) vitamin A}", "C"),
        (r"\boxed{A, C}", None),
        (r"\boxed{A or C}", None),
        (r"\boxed{A and C}", None),
        (r"\boxed{A) bank, C) mall}", None),
        (r"\boxed{AC}", None),
        (r"\boxed{Z}", None),
        (r"\boxed{}", None),
        (r"\boxed{a mall} so the answer is A", None),
        # a mention, the last one
        ("The answer is (C).", "C"),
        ("The answer is C", "C"),
        ("the correct answer is: **B**", "B"),
        ("**Answer:** D", "D"),
        ("**Answer: D) department store**", "D"),
        ("Answer: $B$", "B"),
        ("The answer is A? No. The answer is B, because C is worse.", "B"),
        ("The answer is not A. The answer must be E.", "E"),
        ("The answer is option (d), as A and B are wrong.", "D"),
        ("The correct choice is A because B fails.", "A"),
        ("The answer is A or B.", None),
        ("The answer is (A) and (C).", None),
        ("The answer is A, B.", None),
        ("The answer is A/B.", None),
        ("Answer: A) bank, or C) mall", None),
        ("The answer is not A.", None),
        ("The answer is a mall.", None),
        ("Is the answer a mall? I think so.", None),
        ("The answer is Canada.", None),
        ("The answer is F.", None),
        # a letter alone on the last line
        ("I looked at all of them.\n\nC", "C"),
        ("I looked at all of them.\n**(C)**\n", "C"),
        ("Thinking of doors:\nD) mall", "D"),
        ("C.", "C"),
        ("A\nB", None),
        ("A, B", None),
        ("A) bank\nB) library", "B"),
        ("I like vitamin C", None),
        ("A bank is a place.", None),
        ("", None),
        ("I do not know.", None),
    ],
)
def test_the_letter_a_reply_decides_for(reply, letter):
    assert chosen(reply, "ABCDE") == letter


def test_a_hostile_reply_ends():
    for reply in ("\\boxed{" * 50_000, "answer is " * 20_000, "(A" * 50_000, "answer is A " * 20_000 + "\n" * 50_000):
        assert chosen(reply, "ABCD") in (None, "A")


def test_commonsenseqa_is_split_and_no_letter_is_always_right():
    questions = question_set("commonsenseqa")
    asked, held = list(questions.questions("calibration", 0)), list(questions.questions("eval", 0))
    assert (len(asked), len(held)) == (850, 371) and not {q.id for q in asked} & {q.id for q in held}
    counts = Counter(q.answer for q in asked + held)
    assert set(counts) == set("ABCDE") and all(200 < count < 290 for count in counts.values())
    door = next(q for q in asked + held if q.prompt.startswith("A revolving door is convenient"))
    assert sorted(line[3:] for line in door.prompt.split("\n\n")[1].splitlines()) == [
        "bank", "department store", "library", "mall", "new york",
    ]  # fmt: skip
    assert f"\n{door.answer}) bank" in door.prompt
    assert questions.check(door, f"\\boxed{{{door.answer}}}")
    others = set("ABCDE") - {door.answer}
    assert not any(questions.check(door, f"\\boxed{{{letter}}}") for letter in others)
    assert not questions.check(door, "A, B, C, D, E") and not questions.check(door, "")
    assert [q.prompt for q in asked] == [q.prompt for q in question_set("commonsenseqa").questions("calibration", 0)]


def test_the_layouts_of_the_public_sets_mean_the_same(tmp_path):
    texts = ["north", "south", "east", "west"]
    rows = {
        "list": {"question": "Where?", "choices": texts, "answer": "C"},
        "place": {"question": "Where?", "choices": texts, "answer": 2},
        "labels": {"question": "Where?", "choices": {"text": texts, "label": list("1234")}, "answer": "3"},
        "gpqa": {"Question": "Where?"} | dict(zip(GPQA, ["east", "north", "south", "west"], strict=True)),
    }
    found = {}
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
        path = str(tmp_path / f"{name}.jsonl")
        questions = question_set("gpqa", path=path) if name == "gpqa" else Choices(path="", eval_path=path)
        (found[name],) = questions.questions("eval", 0)
        assert f"{found[name].answer}) east" in found[name].prompt
    assert {q.answer for q in found.values()} == {found["gpqa"].answer}
    with (tmp_path / "gpqa.csv").open("w", newline="") as file:  # as GPQA is handed out
        table = csv.DictWriter(file, list(rows["gpqa"]))
        table.writeheader()
        table.writerow(rows["gpqa"])
    assert list(question_set("gpqa", path=str(tmp_path / "gpqa.csv")).questions("eval", 0)) == [found["gpqa"]]
    with pytest.raises(ValueError, match="`gpqa` is for evaluation only"):
        next(question_set("gpqa", path=path).questions("calibration", 0))


@pytest.mark.parametrize(
    ("row", "lesson"),
    [
        ({"question": "x", "choices": ["a", "b"]}, "no field 'answer'; there are question, choices"),
        ({"question": "x", "choices": ["a", "b"], "answer": "C"}, "the key in `answer` is none of the choices"),
        ({"question": "x", "choices": ["a", "b"], "answer": 2}, "the key in `answer` is none of the choices"),
        ({"question": "x", "choices": 3, "answer": 2}, "the key in `answer` is none of the choices"),
        ({"question": "x", "choices": {"text": ["a", "b"]}, "answer": "A"}, "no field 'label'"),
        ({"question": "x", "choices": ["a", " a "], "answer": "A"}, "needs 2 to 26 different choices"),
        ({"question": "x", "choices": ["a"], "answer": "A"}, "needs 2 to 26 different choices"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, row, lesson):
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=rf"q\.jsonl:1: .*{lesson}"):
        list(Choices(path="", eval_path=str(tmp_path / "q.jsonl")).questions("eval", 0))


@pytest.mark.parametrize(
    ("name", "options", "lesson"),
    [
        ("gpqa", {}, "question set `gpqa` needs a `path`.*https://huggingface.co/datasets/Idavidrein/gpqa"),
        ("choices", {"path": "x", "right_field": "a"}, "right_field and wrong_fields go together"),
        ("choices", {"pth": "x"}, "unknown option of question set `choices` `pth`. Did you mean `path`?"),
        ("commonsenseqa", {"prefil": "x"}, "unknown option of question set `commonsenseqa` `prefil`. Did you mean"),
        ("comonsenseqa", {}, "Did you mean `commonsenseqa`?"),
    ],
)
def test_wrong_options_teach(name, options, lesson):
    with pytest.raises(ValueError, match=lesson):
        question_set(name, **options)
