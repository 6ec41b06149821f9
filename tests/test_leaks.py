"""Leaks are found whatever case and commas hide them, and only leaks; a run has one check, of all its seeds."""

from types import SimpleNamespace

import pytest

from secateurs import study
from secateurs.leaks import overlap, words
from secateurs.questions import Question
from secateurs.recipe import load_recipe

TRAIN = "A baker has 12 trays with 7 rolls each and sells 30 rolls before noon. How many are left?"
OTHER = "Two trains leave at nine from towns that lie 300 miles apart, at 40 and 60 miles an hour. When do they meet?"


def test_equal_texts_are_found_in_any_dress():
    found = overlap([TRAIN.upper().replace(" ", "  ").replace("?", " ?!"), OTHER], [TRAIN, "something else"])
    assert (found.evaluation, found.calibration, found.equal, found.near) == (2, 2, 1, 0)
    assert len(found.examples) == 1 and found.examples[0].startswith("A  BAKER")


def test_near_copies_share_most_of_their_runs():
    longer = TRAIN + " Show every step."
    assert overlap([longer], [TRAIN]).near == 1
    assert overlap([TRAIN.replace("12 trays", "9 boxes").replace("rolls", "buns")], [TRAIN]).near == 0
    assert overlap([OTHER], [TRAIN, " ".join(OTHER.split()[:12])]).near == 0


def test_short_questions_can_only_be_equal():
    assert overlap(["12+7=", "13+7="], ["12 + 7 ="]).equal == 1
    assert overlap(["12+7="], []).equal == overlap(["12+7="], []).near == 0


def test_texts_that_repeat_count_once():
    found = overlap([TRAIN, TRAIN, OTHER], [TRAIN, "Something else.", "something else"])
    assert (found.evaluation, found.calibration, found.equal, found.near, found.examples) == (2, 2, 1, 0, [TRAIN])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x+1=5", "x-1=5"), ("a+b-c", "a-b+c"), ("3-5", "3 5"), ("2*3", "2/3"), ("2^3", "2 3"), ("x < 1", "x > 1"),
        ("x = -5", "x = 5"), ("4 × 2", "4 ÷ 2"), ("x - 1", "x 1"), ("x \u2212 1", "x + 1"), ("5 - x", "5 x"),
    ],
)  # fmt: skip
def test_what_operators_tell_apart_is_not_equal(one, other):
    found = overlap([one], [other])
    assert (found.equal, found.near) == (0, 0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("two-thirds", "Two thirds"), ("12+7=", "12 + 7 ="), ("12-7=", "12 \u2212 7 ="), ("3-5", "3 \u2013 5"),
        ("a train - a fast one", "A train, a fast one"), ("Buy:\n- 2 rolls", "Buy: 2 rolls"), ("x - 1", "x-1"),
    ],
)  # fmt: skip
def test_hyphens_dashes_and_spaces_hide_nothing(one, other):
    assert overlap([one], [other]).equal == 1


def test_every_chinese_or_japanese_character_is_a_word():
    question = "小林さんは毎朝リンゴを三個買います。七日で何個買いますか。"
    assert words("リンゴ3個、AB") == ("リ", "ン", "ゴ", "3", "個", "ab")
    assert overlap(["問題：" + question], [question]).near == 1
    assert overlap(["一辆汽车每小时行驶六十公里，三小时行驶多少公里？"], [question]).near == 0


class Asked:
    """Question i of a split is the i-th from `first`; seeds draw them in turn."""

    format = None

    def questions(self, split, seed):
        for i in range(4):
            text = f"How many sheep are in {['Dover', 'Paris', 'Rome', 'Oslo', 'Bonn'][(i + seed) % 5]}, {split}?"
            yield Question(id=f"{split}-{(i + seed) % 5}", prompt=text, answer="1")


def test_a_run_has_one_check_of_all_seeds_and_the_same_question_counts_once(monkeypatch):
    monkeypatch.setattr(study, "build_questions", lambda _: Asked())
    monkeypatch.setattr(study, "render", lambda *_: [0] * 10)
    recipe = load_recipe("demo", ["sweep.arm=['prompt', 'rac']", "calibration.num_tokens=30",
                                  "evaluate.num_questions=4", "sweep.seed=[0, 1]"])  # fmt: skip
    nothing = SimpleNamespace(held_out=(), traces=())
    dense = SimpleNamespace(tokenizer=None)
    check = study.leak_check(recipe, "key", {0: nothing, 1: nothing}, dense)  # pyright: ignore
    assert check.recipe_key == "key" and check.equal == 0
    assert check.evaluation == 5, "two seeds of four questions have three in common"
    assert check.calibration == 4, "and of the three that each calibrates on, two"
