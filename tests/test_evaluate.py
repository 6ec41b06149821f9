"""Figures computed by hand, intervals that behave, and the drift of hidden states."""

from dataclasses import replace

import pytest
import torch

from families import make_model
from secateurs.calibration import CODES, Document, batches
from secateurs.evaluate import by_cap, drift, measure, reference_states
from secateurs.traces import Trace


def trace(question, sample, reward, length, think, finish="eos", closed=True):
    ids = tuple(range(10, 10 + length))
    return Trace(question_id=question, sample=sample, prompt_ids=(1, 2, 3), completion_ids=ids,
                 think_tokens=think, think_closed=closed, finish=finish, reward=reward, seed=0)  # fmt: skip


DENSE = [trace("a", 0, 1.0, 10, 8), trace("a", 1, 1.0, 10, 8), trace("b", 0, 1.0, 20, 18), trace("b", 1, 0.0, 20, 18)]
PRUNED = [
    trace("a", 0, 1.0, 20, 18),
    trace("a", 1, 0.0, 40, 40, "length", False),
    trace("b", 0, 0.0, 40, 38),
    trace("b", 1, 0.0, 20, 18),
]


def test_figures_by_hand():
    m = measure(PRUNED, {"a": "sum", "b": "loop"}, question_set="q", seconds=4.0, max_new_tokens=40, dense=DENSE)
    assert (m["questions"], m["samples"], m["pass_at_1"]) == (2, 2, 0.25)
    assert m["by_family"] == {"sum": 0.5, "loop": 0.0}
    assert m["difference"]["mean"] == -0.5
    assert m["completion_tokens"] == 30 and m["length_ratio"] == 2.0
    assert m["think_tokens"] == 28.5 and m["answer_tokens"] == 1.5
    assert m["truncated"] == 0.25 and m["unclosed_think"] == 0.25 and m["looping"] == 0
    assert m["tokens_per_correct"] == 120 and m["tokens"] == 120 and m["tokens_per_second"] == 30
    nothing = measure([trace("a", 0, 0.0, 5, 5)], {}, question_set="q", seconds=0.0, max_new_tokens=8)
    assert nothing["tokens_per_correct"] is None and nothing["difference"] is None


def test_the_interval_of_the_difference_to_dense_is_agresti_and_mins():
    m = measure(PRUNED, {}, question_set="q", seconds=1.0, max_new_tokens=40, dense=DENSE)
    half = 1.959964 * (0.5 + 1 - 1 / 4) ** 0.5 / 4  # both questions are half an answer worse
    assert m["difference"]["interval"] == pytest.approx((-1 / 4 - half, -1 / 4 + half))
    same = measure(DENSE, {}, question_set="q", seconds=1.0, max_new_tokens=40, dense=DENSE)
    assert same["difference"]["mean"] == 0 and same["difference"]["interval"][1] > 0.3


def test_a_loop_is_one_whether_or_not_an_end_marker_follows_it():
    loop, one = (5, 6) * 40, trace("a", 0, 0.0, 80, 80)
    for finish, ids in (("length", loop), ("eos", loop), ("eos", (*loop, 2))):
        ended = measure([replace(one, completion_ids=ids, finish=finish)], {}, question_set="q", seconds=1.0,
                        max_new_tokens=99)  # fmt: skip
        assert ended["looping"] == 1.0
    assert measure([one], {}, question_set="q", seconds=1.0, max_new_tokens=99)["looping"] == 0.0


def test_accuracy_under_a_cap_is_what_was_right_within_it():
    at = {point["cap"]: point["pass_at_1"] for point in by_cap([*DENSE, trace("c", 0, 1.0, 64, 33)], 64)}
    assert list(at) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 13, 16, 19, 23, 27, 32, 38, 45, 54, 64]
    assert at[7] == 0 and at[8] == at[16] == pytest.approx(1 / 3), "both samples of a think 8 tokens"
    assert at[19] == at[32] == pytest.approx((1 + 0.5) / 3) and at[38] == at[64] == pytest.approx((1 + 0.5 + 1) / 3)
    assert measure(PRUNED, {}, question_set="q", seconds=1.0, max_new_tokens=40)["scores"] == {"a": 0.5, "b": 0.0}


def test_unpaired_questions_are_refused():
    with pytest.raises(ValueError, match="the dense model answered other questions"):
        measure(PRUNED, {}, question_set="q", seconds=1.0, max_new_tokens=40, dense=DENSE[:2])


def test_drift_is_zero_for_the_same_model_and_placed_where_the_damage_is():
    codes = (CODES["prompt"],) * 3 + (CODES["think"],) * 10 + (CODES["answer"],) * 2
    documents = [Document(tuple(range(3 + k, 18 + k)), codes) for k in range(4)]
    model = make_model("qwen3")
    reference = reference_states(model, list(batches(documents, 40)))
    same = drift(model, reference)
    assert same["prompt"] == same["early_think"] == same["answer"] == 0
    assert sum(point["tokens"] for point in same["curve"]) == 40
    with torch.no_grad():  # damage only what id 5, a prompt token of some documents, embeds to
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.embed_tokens.weight[3] += 1.0
    damaged = drift(model, reference)
    assert damaged["prompt"] > 0 and damaged["late_think"] > 0
