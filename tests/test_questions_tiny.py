"""The `tiny` set: splits that share nothing, answers that are right by another route, thoughts worth their prompts."""

import re
from itertools import combinations, islice
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import secateurs
from secateurs.questions import Question, question_set
from secateurs.questions.tiny import FAMILIES, SPLITS, Tiny

REASONER = Path(secateurs.__file__).parent / "assets" / "reasoner"
# A changed question or id means a new `Tiny.version`: stored traces name questions by id.
KNOWN = [("arith-49e5c664d45d45b6", "40988+55726", "96714"), ("arith-bc160fb7f0cf2d47", "651*75", "48825")]


def first(split: str, number: int, seed: int = 0, **options) -> list[Question]:
    return list(islice(Tiny(**options).questions(split, seed), number))


def right_answer(question: Question) -> str:
    """The answer computed without the thought: by Python's own arithmetic or by trying every subset."""
    prompt = question.prompt
    if question.family == "arith":
        return str(eval(prompt))
    if question.family == "program":
        a, b, rounds, body = re.fullmatch(r"a(\d\d)b(\d\d)x(\d):(.+)", prompt).groups()
        state = {"a": int(a), "b": int(b)}
        for _ in range(int(rounds)):
            for target, sign, source in body.split(","):
                exec(f"{target} = ({target} {sign} {source}) % 100", {}, state)
        return f"{state['a']:02}{state['b']:02}"
    target, places = prompt.split(":")
    assert places[::2] == "abcdefg"[: len(places) // 2]
    digits = places[1::2]
    fits = [
        places
        for size in range(len(digits) + 1)
        for places in combinations(range(len(digits)), size)
        if sum(int(digits[place]) for place in places) == int(target)
    ]
    return "".join(digits[place] for place in min(fits))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(REASONER)


def test_registered():
    assert question_set("tiny") == Tiny()


def test_splits_share_no_question():
    prompts = {split: {question.prompt for question in first(split, 600)} for split in SPLITS}
    assert all(not prompts[one] & prompts[other] for one, other in combinations(SPLITS, 2))


def test_calibration_is_large_distinct_and_ends():
    questions = list(Tiny(families=("arith",)).questions("calibration", 0))
    assert len(questions) > 5000
    assert len({question.prompt for question in questions}) == len({question.id for question in questions})
    assert len({question.id for question in questions}) == len(questions)


def test_order_is_fixed_by_seed():
    assert first("eval", 50, seed=3) == first("eval", 50, seed=3)
    assert first("eval", 50, seed=3) != first("eval", 50, seed=4)


def test_ids_do_not_depend_on_seed_or_families():
    ids = {question.prompt: question.id for question in Tiny(families=("arith",)).questions("eval", 1)}
    assert all(ids[question.prompt] == question.id for question in first("eval", 90) if question.family == "arith")


def test_first_questions_are_known():
    assert [(question.id, question.prompt, question.answer) for question in first("eval", 2)] == KNOWN


@pytest.mark.parametrize("family", FAMILIES)
def test_solutions_are_right_and_wrong_answers_are_not(family):
    tiny = Tiny()
    for question in first("train", 150, families=(family,)):
        opening, thought, answer = re.fullmatch(r"(<think>)(.*)</think>(.*)", tiny.solution(question), re.S).groups()
        assert opening and 30 < len(thought) <= 450
        assert answer == question.answer == right_answer(question)
        assert tiny.check(question, f" {answer}\n")
        for wrong in (
            "",
            answer[:-1],
            answer + "0",
            f"{answer} {answer}",
            answer[:-1] + str((int(answer[-1]) + 1) % 10),
        ):
            assert not tiny.check(question, wrong)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_written_column_is_true(family):
    for question in first("train", 100, families=(family,)):
        for x, sign, y, carry, digit, out in re.findall(
            r"(\d)([-+*])(\d)[-+](\d)=(\d)c(\d)", Tiny().solution(question)
        ):
            total = eval(f"{x}{sign}{y}{'-' if sign == '-' else '+'}{carry}")
            assert total == (int(digit) - 10 * int(out) if sign == "-" else int(digit) + 10 * int(out))


@pytest.mark.parametrize("family", FAMILIES)
def test_thoughts_are_at_least_eight_times_their_prompts(family, tokenizer):
    prompt_tokens = think_tokens = 0
    for question in first("calibration", 200, families=(family,)):
        turns = [{"role": "user", "content": question.prompt}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        thought = Tiny().solution(question).removeprefix("<think>").partition("</think>")[0]
        prompt_tokens += len(tokenizer(prompt)["input_ids"])
        think_tokens += len(tokenizer(thought)["input_ids"])
    assert think_tokens >= 8 * prompt_tokens


def test_tokenizer_gives_back_any_text(tokenizer):
    text = "".join(map(chr, range(128))) + "  naïve ’quotes’ \n\n x ,y .z don 't"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_marks_are_one_token_each(tokenizer):
    for mark in ("<think>", "</think>", "<|user|>", "<|assistant|>", "<|system|>", "<|eos|>", "<|pad|>"):
        assert len(tokenizer(mark)["input_ids"]) == 1
    ids = tokenizer("<think>1</think>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "1"


def test_chat_template(tokenizer):
    turns = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2"},
    ]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert text == "<|system|>S<|user|>1+1<|assistant|>2<|eos|><|user|>2+2<|assistant|><think>"


def test_corpus_is_plain_ample_and_disjoint():
    texts = {split: list(Tiny().corpus(split, 0)) for split in SPLITS}
    assert all(text.isascii() and 300 <= len(text) <= 600 for split in SPLITS for text in texts[split])
    assert len(texts["calibration"]) >= 300 and sum(map(len, texts["calibration"])) >= 60_000
    assert all(not set(texts[one]) & set(texts[other]) for one, other in combinations(SPLITS, 2))
    assert list(Tiny().corpus("train", 1)) != texts["train"] == list(Tiny().corpus("train", 0))


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="`calibration`"):
        next(Tiny().questions("calibratoin", 0))
    with pytest.raises(ValueError, match="`eval`"):
        next(Tiny().corpus("evl", 0))
    with pytest.raises(ValueError, match="`search`"):
        question_set("tiny", families=("serch",))
