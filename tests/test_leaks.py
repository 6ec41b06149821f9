"""Leaks are found whatever case and commas hide them, and only leaks."""

from secateurs.leaks import overlap

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
