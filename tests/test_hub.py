"""Rows of the hub: by a stand-in for `datasets`, and by the library itself, where installed, on a local folder."""

import json
import sys
from types import SimpleNamespace

import pytest

from secateurs import corpus
from secateurs.dense import Dense
from secateurs.questions import question_set
from secateurs.recipe import load_recipe
from secateurs.rows import read_rows

ROWS = [{"text": f"Row {i}.", "problem": f"What is {i} + {i}?", "answer": 2 * i} for i in range(20)]


@pytest.fixture
def hub(monkeypatch):
    """A hub with one data set of two splits, and what it was asked."""
    asked = []

    def load_dataset(name, config, *, revision, streaming):
        asked.append((name, config, revision))
        assert streaming
        if name != "owner/name":
            raise FileNotFoundError(f"Dataset '{name}' doesn't exist on the Hub\nor cannot be accessed.")
        return {"train": iter(ROWS), "test": iter(ROWS[:3])} if config == "two" else {"train": iter(ROWS)}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


@pytest.mark.parametrize(
    ("address", "asked", "rows"),
    [
        ("hub:owner/name", ("owner/name", None, None), 20),
        ("hub:owner/name::train", ("owner/name", None, None), 20),
        ("hub:owner/name:two:test", ("owner/name", "two", None), 3),
        ("hub:owner/name@0123abc:two:train", ("owner/name", "two", "0123abc"), 20),
    ],
)
def test_an_address_names_data_set_revision_configuration_and_split(hub, address, asked, rows):
    found = list(read_rows(address))
    assert [row for _, row in found] == ROWS[:rows] and found[1][0] == f"{address}, row 2"
    assert hub == [asked]


@pytest.mark.parametrize(
    ("address", "lesson"),
    [
        ("hub:owner/name:two", "hub:owner/name:two: name a split; there are train, test"),
        ("hub:owner/name:two:tset", "no split `tset`; there are train, test"),
        ("hub:owner/other", "cannot be read (FileNotFoundError: Dataset 'owner/other' doesn't exist on the Hub)"),
        ("hub:", "hub:: not an address; one is hub:owner/name or hub:owner/name@revision:config:split"),
        ("hub:a:b:c:d", "hub:a:b:c:d: not an address"),
    ],
)
def test_what_is_wrong_is_one_sentence(hub, address, lesson):
    with pytest.raises(ValueError) as error:
        list(read_rows(address))
    assert lesson in str(error.value) and "\n" not in str(error.value)


def test_without_the_library_the_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs the library `datasets`; pip install 'secateurs\[hub\]' has it"):
        next(read_rows("hub:owner/name"))


def test_questions_and_a_corpus_come_from_the_hub_and_its_texts_are_in_the_key(hub, monkeypatch):
    questions = question_set("aime24", path="hub:owner/name")
    found = list(questions.questions("eval", 0))
    assert sorted(q.prompt for q in found) == sorted(row["problem"] for row in ROWS)
    recipe = load_recipe("demo", ['calibration.corpus="hub:owner/name"'])
    assert sorted(corpus.corpus_texts(recipe, 0)) == sorted(row["text"] for row in ROWS)
    before = Dense(recipe).corpus_hash
    assert Dense(recipe).corpus_hash == before
    monkeypatch.setitem(ROWS[7], "text", "Changed.")
    assert Dense(recipe).corpus_hash != before


def test_the_library_itself_reads_a_folder(tmp_path):
    pytest.importorskip("datasets")
    for name, rows in (("train", ROWS), ("test", ROWS[:3])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [row for _, row in read_rows(f"hub:{tmp_path}::train")] == ROWS
    assert [row for _, row in read_rows(f"hub:{tmp_path}:default:test")] == ROWS[:3]
    for wrong, lesson in (
        (f"hub:{tmp_path}", "name a split; there are train, test"),
        (f"hub:{tmp_path}:other:test", "cannot be read .ValueError: BuilderConfig 'other' not found"),
        (f"hub:{tmp_path}/nowhere", "cannot be read"),
    ):
        with pytest.raises(ValueError, match=lesson):
            list(read_rows(wrong))


@pytest.mark.parametrize("name", ["aime24", "aime25"])
def test_aime_does_not_ship_and_is_judged_as_numbers(tmp_path, name):
    with pytest.raises(
        ValueError, match=rf"`{name}` does not ship, .*MAA's: give a `path`, as in path = \"hub:\w+/aime"
    ):
        question_set(name)
    path = tmp_path / "aime.jsonl"
    path.write_text("\n".join(json.dumps({"problem": f"Find {n}.", "answer": f"{n:03}"}) for n in (0, 25, 113, 999)))
    questions = question_set(name, path=str(path))
    found = {q.prompt: q for q in questions.questions("eval", 0)}
    assert len(found) == 4 and questions.name == name
    for reply, right in ((r"\boxed{25}", True), (r"\boxed{025}", True), (r"\boxed{26}", False), ("25 or 26", False)):
        assert questions.check(found["Find 25."], reply) is right
    assert questions.check(found["Find 0."], r"\boxed{0}") and not questions.check(found["Find 0."], "")
    with pytest.raises(ValueError, match=f"`{name}` is for evaluation only"):
        list(questions.questions("calibration", 0))
    path.write_text(json.dumps({"problem": "x", "answer": "none"}))
    with pytest.raises(ValueError, match=r"aime\.jsonl:1: no number in `answer`; for other answers there is judge = "):
        list(questions.questions("eval", 0))
