"""Whether traces are a model's own: its samples are, another model's are not, and the numbers are those of theory."""

from dataclasses import replace
from itertools import islice

import pytest
import torch

from families import damaged
from secateurs import policy
from secateurs.engines import Request, Sampling
from secateurs.engines.hf import hf_engine
from secateurs.models import load_model, load_tokenizer
from secateurs.prompts import render
from secateurs.questions.tiny import Tiny


@pytest.fixture(scope="module")
def bundled():
    return load_model("bundled"), load_tokenizer("bundled")


def said_by(model, tokenizer, sampling, count=8):
    questions = Tiny()
    asked = [
        Request(question_id=q.id, sample=0, prompt_ids=render(tokenizer, questions.format, q), seed=i)
        for i, q in enumerate(islice(questions.questions("calibration", 0), count))
    ]
    return list(hf_engine(model, tokenizer, count).generate(asked, sampling))


@torch.inference_mode()
def logits(model, said):
    return model(torch.tensor([said.request.prompt_ids + said.ids])).logits[0]


def surprise(model, said, sampling):
    return policy.surprise((logits(model, one) for one in said), said, sampling)


def check_own(model, said, sampling):
    return policy.check_own((logits(model, one) for one in said), said, sampling, "http://here")


@pytest.mark.parametrize("sampling", [Sampling(max_new_tokens=96), Sampling(temperature=0, max_new_tokens=96)])
def test_own_samples_are_no_surprise_and_those_of_a_damaged_model_are(bundled, sampling):
    model, tokenizer = bundled
    own = said_by(model, tokenizer, sampling)
    found = check_own(model, own, sampling)
    assert abs(found.gap) < 0.02 and found.num_tokens == sum(len(one.ids) for one in own)
    assert sampling.temperature == 0 or abs(found.z) < 4
    other = damaged(load_model("bundled"))
    lesson = r"^http://here does not serve the model to be pruned: over [\d,]+ tokens.* nats a token"
    with pytest.raises(ValueError, match=lesson):
        check_own(model, said_by(other, tokenizer, sampling), sampling)


@pytest.mark.parametrize("cut", [{"top_p": 0.7}, {"top_k": 3}, {"top_k": 5, "top_p": 0.8}], ids=str)
def test_what_top_p_and_top_k_leave_is_what_is_expected(bundled, cut):
    model, tokenizer = bundled
    hot = Sampling(temperature=3.0, max_new_tokens=64, **cut)
    found = surprise(model, said_by(model, tokenizer, hot), hot)
    assert abs(found.z) < 4
    uncut = surprise(model, said_by(model, tokenizer, hot), Sampling(temperature=3.0))
    assert uncut.z < -4, "or else the test shows nothing"


def test_samples_that_are_too_likely_are_found_out(bundled):
    """As from a server that is asked for a temperature and answers greedily."""
    model, tokenizer = bundled
    cold = said_by(model, tokenizer, Sampling(temperature=0, max_new_tokens=64))
    with pytest.raises(ValueError, match=r"does not sample as it was asked to: .* nats a token less surprised"):
        check_own(model, cold, Sampling(temperature=3.0, top_p=0.95))


def test_rare_tokens_within_top_p_are_counted(bundled, monkeypatch):
    model, tokenizer = bundled
    hot = Sampling(temperature=2.0, top_p=0.99, max_new_tokens=32)
    said = said_by(model, tokenizer, hot, 4)
    whole = surprise(model, said, hot)
    monkeypatch.setattr(policy, "LIKELY", 4)
    monkeypatch.setattr(policy, "ROWS", 7)
    again = surprise(model, said, hot)
    assert again.gap == pytest.approx(whole.gap, abs=1e-5) and again.z == pytest.approx(whole.z, abs=1e-3)


def test_the_gap_is_the_divergence_of_the_two_models(bundled):
    """Text of the model at temperature 1.5, judged at 1: the mean of KL(1.5 || 1) plus the difference of entropies."""
    model, tokenizer = bundled
    hot = Sampling(temperature=1.5, max_new_tokens=64)
    texts = said_by(model, tokenizer, hot, 24)
    found = surprise(model, texts, replace(hot, temperature=1.0))
    expected = variance = count = 0.0
    for text in texts:
        before = logits(model, text)[len(text.request.prompt_ids) - 1 : -1]
        cool, warm = before.log_softmax(-1), (before / 1.5).log_softmax(-1)
        mean = (warm.exp() * cool).sum(-1)
        expected += float(((cool.exp() * cool).sum(-1) - mean).sum())
        variance += float(((warm.exp() * cool**2).sum(-1) - mean**2).sum())
        count += len(before)
    assert abs(found.gap * count - expected) < 4 * variance**0.5
    assert expected > 0.02 * count and found.num_tokens == count
