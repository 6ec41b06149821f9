"""Exact prompt ids and the split of a completion, with a small tokenizer made here."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from secateurs.prompts import answer_text, chat_text, rejoin, render, think_split, trace_seed, turns
from secateurs.questions import PromptFormat, Question

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|a|>{% endif %}"
)


def tokenizer(specials, template=None):
    vocabulary = {t: i for i, t in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|eos|>", additional_special_tokens=specials[1:]
    )
    made.chat_template = template
    return made


MARKED = ["<|eos|>", "<think>", "</think>", "<|a|>"]
QUESTION = Question(id="q", prompt="1+1?", answer="2")


@pytest.mark.parametrize("specials", [MARKED, ["<|eos|>", "<|a|>"]], ids=["one token", "many tokens"])
def test_thinking_ends_with_its_marker_however_it_is_cut_into_tokens(specials):
    t = tokenizer(specials, TEMPLATE)
    prompt = render(t, PromptFormat(prefill="<think>"), QUESTION)
    assert t.decode(prompt).endswith("<|a|><think>")
    done = tuple(t("one and one</think>2<|eos|>")["input_ids"])
    think, closed = think_split(t, prompt, done)
    assert closed and t.decode(done[:think]) == "one and one</think>"
    assert answer_text(t, done, think, closed) == "2"
    open_end = tuple(t("one and one and")["input_ids"])
    assert think_split(t, prompt, open_end) == (len(open_end), False)
    assert answer_text(t, open_end, len(open_end), False) == ""


def test_a_model_without_markers_thinks_in_all_of_its_reply():
    t = tokenizer(MARKED, TEMPLATE)
    prompt, reply = render(t, PromptFormat(), QUESTION), tuple(t("it is 2<|eos|>")["input_ids"])
    assert think_split(t, prompt, reply) == (len(reply), True)
    assert answer_text(t, reply, len(reply), True) == "it is 2"


def test_a_prefill_the_template_wrote_is_not_repeated_and_examples_become_turns():
    t = tokenizer(MARKED, TEMPLATE.replace("<|a|>", "<|a|><think>"))
    form = PromptFormat(system="be brief", examples=(("0+0?", "0"),), prefill="<think>\n")
    text = t.decode(render(t, form, QUESTION))
    assert text == "<|system|>be brief<|user|>0+0?<|assistant|>0<|user|>1+1?<|a|><think>"


QWEN3 = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>"
    "\n\n{% endif %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|a|>{% endif %}"
)
GLM = QWEN3.replace("<think>\n", "<think>").replace("\n</think>\n\n", "</think>\n")


@pytest.mark.parametrize(
    ("template", "reasoning", "content", "reply"),
    [
        (QWEN3, "one and one", "2", "<think>\none and one\n</think>\n\n2"),  # SGLang strips
        (QWEN3, "\none and one\n", "\n\n2", "<think>\none and one\n</think>\n\n2"),  # vLLM does not
        (QWEN3, " one", "2", "<think> one</think>2"),
        (GLM, "one and one", "2", "<think>one and one</think>\n2"),
        (TEMPLATE, "one and one", "2", "<think>\none and one\n</think>\n\n2"),
        (TEMPLATE + "<think>", "one and one", "2", "\none and one\n</think>\n\n2"),
        (TEMPLATE + "{{ '<think>\n' }}", "one and one", "2", "one and one\n</think>\n\n2"),
        (TEMPLATE + "<think>", "one and", "", "\none and"),
        (TEMPLATE, "", "it is 2", "it is 2"),
        (TEMPLATE, "one", "<think>one</think>2", "<think>one</think>2"),
    ],
)
def test_a_reply_cut_in_two_is_joined_as_the_model_wrote_it(template, reasoning, content, reply):
    t = tokenizer(MARKED, template)
    possible = rejoin(t, render(t, PromptFormat(), QUESTION), reasoning, content)
    assert possible[0] == reply
    if reasoning.strip() == reasoning and content == "2" and template == TEMPLATE:
        assert possible == (reply, "<think>one and one</think>2"), "or the model writes no line breaks"
    elif reasoning.strip() != reasoning:
        assert len(possible) == 1


def test_the_turns_are_what_the_prompt_is_made_of():
    form = PromptFormat(system="be brief", examples=(("0+0?", "0"),))
    said = turns(form, QUESTION)
    assert said == (("system", "be brief"), ("user", "0+0?"), ("assistant", "0"), ("user", "1+1?"))
    t = tokenizer(MARKED, TEMPLATE)
    assert tuple(t(chat_text(t, said))["input_ids"]) == render(t, form, QUESTION)


def test_seeds_depend_on_question_and_sample_only():
    assert trace_seed(0, "q", 1) == trace_seed(0, "q", 1)
    assert len({trace_seed(s, q, n) for s in (0, 1) for q in ("q", "r") for n in (0, 1)}) == 8
    assert 0 <= trace_seed(0, "q", 0) < 2**62


def test_thinking_that_the_prefill_has_begun_is_open_until_it_ends():
    t = tokenizer(MARKED, TEMPLATE)
    begun = PromptFormat(prefill="<think>\nOkay, the sum")
    prompt, reply = render(t, begun, QUESTION), tuple(t("it is 2")["input_ids"])
    assert think_split(t, prompt, reply, begun.prefill) == (len(reply), False)
    assert think_split(t, prompt, reply, "<think>short</think>So") == (len(reply), True)


def test_a_template_that_fails_is_one_sentence():
    with pytest.raises(ValueError, match="the tokenizer's chat template fails on 1 turns: .*endfor"):
        render(tokenizer(MARKED, "{% for m in messages %}"), PromptFormat(), QUESTION)
