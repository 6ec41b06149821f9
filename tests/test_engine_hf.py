"""Continuous batching: neighbours never change a trace, greedy equals generate, sampling follows the distribution."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from families import make_model
from secateurs.calibration import batches, trace_document
from secateurs.collect import final_states
from secateurs.engines import Request, Sampling, default_sampling
from secateurs.engines.hf import HF, NUCLEUS, REFILL, _Batch, sample_tokens
from secateurs.traces import Trace


def requests(count: int) -> list[Request]:
    r = random.Random(0)
    return [
        Request(
            question_id=str(i),
            sample=0,
            prompt_ids=tuple(r.randrange(3, 64) for _ in range(r.randrange(3, 30))),
            seed=i,
        )
        for i in range(count)
    ]


def generate(model, asked, batch_size, sampling):
    return {c.request.question_id: c for c in HF(model, (1, 2), 0, batch_size).generate(asked, sampling)}


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "mistral", "phi3", "qwen3_next"], indirect=True)
def test_traces_do_not_depend_on_the_batch(tiny_model):
    sampling = Sampling(temperature=0.7, top_p=0.95, top_k=20, max_new_tokens=24)
    alone = generate(tiny_model, requests(14), 1, sampling)
    for batch_size in (3, 14):
        together = generate(tiny_model, requests(14), batch_size, sampling)
        assert {k: c.ids for k, c in together.items()} == {k: c.ids for k, c in alone.items()}
    assert len({len(c.ids) for c in alone.values()}) > 1, "lengths must vary for this to mean anything"


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "qwen3_next"], indirect=True)
def test_greedy_equals_transformers_generate(tiny_model):
    for c in generate(tiny_model, requests(5), 5, Sampling(temperature=0, max_new_tokens=20)).values():
        prompt = torch.tensor([c.request.prompt_ids])
        expected = tiny_model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=[1, 2],
            pad_token_id=0,
        )
        assert list(c.ids) == expected[0, prompt.shape[1] :].tolist()


def test_finish_reasons_and_time_are_true():
    done = generate(make_model("qwen3"), requests(12), 4, Sampling(max_new_tokens=40)).values()
    for c in done:
        assert (c.finish == "eos") == (c.ids[-1] in (1, 2)) and len(c.ids) <= 40 and c.seconds > 0
        assert not set(c.ids[:-1]) & {1, 2}
    assert {c.finish for c in done} == {"eos", "length"}


def test_requests_are_drawn_lazily():
    drawn = []

    def asked():
        for request in requests(20):
            drawn.append(request)
            yield request

    next(HF(make_model("qwen3"), (1, 2), 0, 4).generate(asked(), Sampling(max_new_tokens=8)))
    assert len(drawn) <= 8


@pytest.mark.parametrize("family", ["qwen3", "qwen3_next"], indirect=True)
def test_slots_that_are_free_are_filled_together(tiny_model, monkeypatch):
    calls: list[int] = []  # how many rows a prefill had; 0 for a step
    admit, step = _Batch.admit, _Batch.step

    def counted_admit(self, rows, sampling):
        calls.append(len(rows))
        return admit(self, rows, sampling)

    def counted_step(self, sampling):
        calls.append(0)
        return step(self, sampling)

    sampling = Sampling(max_new_tokens=40)
    alone = generate(tiny_model, requests(60), 1, sampling)
    monkeypatch.setattr(_Batch, "admit", counted_admit)
    monkeypatch.setattr(_Batch, "step", counted_step)
    together = generate(tiny_model, requests(60), 32, sampling)
    assert {k: c.ids for k, c in together.items()} == {k: c.ids for k, c in alone.items()}
    assert len({len(c.ids) for c in alone.values()}) > 10, "lengths must vary for this to mean anything"
    prefills = [place for place, rows in enumerate(calls) if rows]
    for before, place in pairwise(prefills[:-1]):
        assert place - before > REFILL or calls[place] >= 4, "early only for an eighth of the slots"
    assert 3 < len(prefills) < 30


def test_sampling_follows_the_filtered_distribution():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    uniforms = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000

    def shares(sampling):
        tokens = sample_tokens(logits.expand(4000, 4), uniforms, sampling)
        return (torch.bincount(tokens, minlength=4) / 4000).tolist()

    assert shares(Sampling()) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=1e-3)
    assert shares(Sampling(top_p=0.8)) == pytest.approx([0.625, 0.375, 0, 0], abs=1e-3)
    assert shares(Sampling(top_p=0.81)) == pytest.approx([0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], abs=1e-3)
    assert shares(Sampling(top_k=1)) == [1, 0, 0, 0]
    half = torch.tensor([0.5, 0.3, 0.15, 0.05]).square()
    assert shares(Sampling(temperature=0.5)) == pytest.approx((half / half.sum()).tolist(), abs=1e-3)
    assert shares(Sampling(temperature=0)) == [1, 0, 0, 0]


@pytest.mark.parametrize("spread", [0.1, 0.5, 2.0, 8.0])
@pytest.mark.parametrize("top_p", [0.3, 0.95, 1 - 1e-12])
def test_tokens_are_drawn_from_the_smallest_set_that_reaches_p(top_p, spread):
    """Of flat rows that is most of the vocabulary, of steep ones a few tokens."""
    generator = torch.Generator().manual_seed(0)
    logits = spread * torch.randn(40, 3 * NUCLEUS, generator=generator)
    logits[:, 7] += torch.linspace(0, 12, 40)
    uniforms = torch.rand(40, generator=generator, dtype=torch.float64)
    found = sample_tokens(logits, uniforms, Sampling(top_p=top_p, temperature=0.6))
    for row, uniform, token in zip(logits, uniforms, found.tolist(), strict=True):
        probs, order = (row.double() / 0.6).softmax(-1).sort(descending=True)
        size = int((probs.cumsum(0) < top_p).sum()) + 1
        share = probs[:size].cumsum(0) / probs[:size].sum()
        assert token == order[int((share <= uniform).sum())]


def test_the_models_own_settings_are_the_default():
    config = make_model("qwen3").generation_config
    config.do_sample, config.temperature, config.top_p, config.top_k = True, 0.6, 0.95, 20
    assert default_sampling(config) == Sampling(temperature=0.6, top_p=0.95, top_k=20)
    assert default_sampling(config, top_k=5, temperature=None).top_k == 5
    config.do_sample = False
    assert default_sampling(config).temperature == 0
    with pytest.raises(ValueError, match="top_p must be in"):
        Sampling(top_p=0)


@pytest.mark.parametrize("family", ["qwen3", "gemma3"], indirect=True)
def test_a_stored_trace_reproduces_the_activations_of_its_generation(tiny_model):
    """Teacher-forced final hidden states equal those seen token by token, in the batch, while generating."""
    seen: dict[int, list[torch.Tensor]] = {}
    engine = HF(tiny_model, (1, 2), 0, 4)
    norm = tiny_model.get_decoder().norm
    handle = norm.register_forward_hook(lambda m, args, out: last.append(out[:, -1].clone()))
    last: list[torch.Tensor] = []
    asked = requests(4)
    done = {c.request.question_id: c for c in engine.generate(asked, Sampling(max_new_tokens=6))}
    handle.remove()
    rows = [a for a in asked]  # all four are admitted at once; a row leaves the batch when it is done
    for step in last:
        for row, request in enumerate(list(rows)):
            seen.setdefault(int(request.question_id), []).append(step[row])
        rows = [r for r in rows if len(seen[int(r.question_id)]) < len(done[r.question_id].ids)]
    for request in asked:
        completion = done[request.question_id].ids
        trace = Trace(question_id="q", sample=0, prompt_ids=request.prompt_ids, completion_ids=completion,
                      think_tokens=len(completion), think_closed=True, finish="eos", reward=None, seed=0)  # fmt: skip
        (batch,) = batches([trace_document(trace)], 1024)
        states = final_states(tiny_model, [batch])[0][0]
        generated = torch.stack(seen[int(request.question_id)])
        assert torch.allclose(states[len(request.prompt_ids) - 1 :], generated, atol=1e-5)


def test_what_cannot_be_sampled_is_one_sentence():
    model = make_model("qwen3")
    strange = Request(question_id="q", sample=0, prompt_ids=(3, 64), seed=0)
    with pytest.raises(
        ValueError, match="the tokenizer gives the id 64, and the model knows 64: it is another model's"
    ):
        generate(model, [strange], 1, Sampling(max_new_tokens=4))
    model.get_input_embeddings().weight.data[5] = torch.nan
    with pytest.raises(ValueError, match="the model's logits are not finite"):
        generate(model, [replace(strange, prompt_ids=(3, 5))], 1, Sampling(max_new_tokens=4))
    sizes = {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    learned = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=32, max_position_embeddings=32))
    asked = [replace(strange, prompt_ids=(3, 5))]
    with pytest.raises(ValueError, match="OPTForCausalLM has 32 positions, and a prompt with its answer takes 33"):
        list(HF(learned, (), 0, 1).generate(asked, Sampling(max_new_tokens=32)))
    (whole,) = HF(learned, (), 0, 1).generate(asked, Sampling(max_new_tokens=31))
    assert len(whole.ids) == 31, "the last one is never read"
    ends = tuple({*whole.ids[:3]})
    assert list(HF(learned, ends, 0, 1).generate(asked, Sampling(max_new_tokens=1000))), (
        "what ends in time is no mistake"
    )
