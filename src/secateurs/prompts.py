"""Between text and ids: a question becomes exact prompt ids, a completion splits into thinking and answer. No torch."""

import hashlib
import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Any

from jinja2 import TemplateError

from secateurs.questions import PromptFormat, Question

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
LINE_BREAKS = ("\n", "\n", "\n\n")  # inside the two markers and after them, as Qwen3 and DeepSeek-R1 write them


def turns(form: PromptFormat, question: Question) -> tuple[tuple[str, str], ...]:
    """What is said before the reply, as (role, text): the system's words, the worked examples, the question."""
    said = [("system", form.system)] if form.system else []
    for asked, replied in form.examples:
        said += [("user", asked), ("assistant", replied)]
    return (*said, ("user", question.prompt))


def messages(said: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """Turns as chat templates and chat servers want them."""
    return [{"role": role, "content": text} for role, text in said]


def chat_text(tokenizer: Any, said: Sequence[tuple[str, str]]) -> str:
    """What the tokenizer's chat template, which it must have, makes of the turns, up to where the reply begins."""
    try:
        return tokenizer.apply_chat_template(messages(said), tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(f"the tokenizer's chat template fails on {len(said)} turns: {error}") from None


def render(tokenizer: Any, form: PromptFormat, question: Question) -> tuple[int, ...]:
    """The prompt ids of `question`: chat template where the tokenizer has one, else plain turns; then the prefill.

    A prefill that the template has already written (Qwen3 and R1 distills open `<think>` themselves) is not repeated.
    Templates that write their own BOS get no second one.
    """
    said = turns(form, question)
    if tokenizer.chat_template:
        text = chat_text(tokenizer, said)
        special = False
    else:
        text = "\n\n".join(words for _, words in said) + "\n"
        special = True
    if form.prefill and not text.rstrip().endswith(form.prefill.strip()):
        text += form.prefill
    return tuple(tokenizer(text, add_special_tokens=special)["input_ids"])


def trace_seed(seed: int, question_id: str, sample: int) -> int:
    """The sampling seed of one trace: a 62-bit hash of the run's seed, the question and the sample number.

    It depends on nothing else, so the order and size of batches never change what is sampled.
    """
    digest = hashlib.sha256(f"{seed}/{question_id}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def rejoin(tokenizer: Any, prompt_ids: tuple[int, ...], reasoning: str, content: str) -> tuple[str, ...]:
    """What the reply may have been that a server's reasoning parser cut in two, the likeliest first.

    `<think>` is put back unless the prompt ends in it, and `</think>` where an answer follows; thinking without an
    answer may have been cut off, so nothing closes it. Content that holds `</think>` is the whole reply already. White
    space around the markers is kept where the server left any (vLLM). Where there is none, it was stripped (SGLang), so
    that of the tokenizer's chat template, or else LINE_BREAKS, is put back; or the model wrote none.
    """
    if not reasoning or THINK_CLOSE in content:
        return (content,)
    tail = tokenizer.decode(prompt_ids[-8:])
    opening = "" if tail.rstrip().endswith(THINK_OPEN) else THINK_OPEN
    possible = [("", "", "")]
    if reasoning == reasoning.strip() and content == content.lstrip():
        first, second, third = _line_breaks(tokenizer)
        possible.insert(0, ("" if not opening and tail != tail.rstrip() else first, second, third))
    return tuple(
        opening + first + reasoning + (second + THINK_CLOSE + third + content if content else "")
        for first, second, third in possible
    )


def _line_breaks(tokenizer: Any) -> tuple[str, str, str]:
    """The white space before a chain of thought, after it, and before the answer, if the chat template shows it."""
    reply = {"role": "assistant", "reasoning_content": "R", "content": "C"}
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Q"}, reply], tokenize=False)
    found = re.search(rf"{THINK_OPEN}(\s*)R(\s*){THINK_CLOSE}(\s*)C", text)
    return (found[1], found[2], found[3]) if found else LINE_BREAKS


def think_split(
    tokenizer: Any, prompt_ids: tuple[int, ...], completion_ids: tuple[int, ...], prefill: str = ""
) -> tuple[int, bool]:
    """How many completion ids belong to the thinking (closing marker included), and whether the thinking was closed.

    It was opened by the `prefill`, by the end of the prompt, as some chat templates do, or by the completion. Else,
    and without a closing marker, the whole completion counts as thinking and as closed. Markers are looked for in text,
    so they need not be single tokens.
    """
    text = tokenizer.decode(completion_ids)
    begun = tokenizer.decode(prompt_ids[-8:]).rstrip().endswith(THINK_OPEN)
    opened = begun or THINK_OPEN in text or THINK_OPEN in prefill.rpartition(THINK_CLOSE)[2]
    if not opened and THINK_CLOSE not in text:
        return len(completion_ids), True
    if THINK_CLOSE not in text:
        return len(completion_ids), False
    cut = bisect_left(
        range(len(completion_ids)), True, key=lambda count: THINK_CLOSE in tokenizer.decode(completion_ids[:count])
    )
    return cut, True


def answer_text(tokenizer: Any, completion_ids: tuple[int, ...], think_tokens: int, think_closed: bool) -> str:
    """What is checked: the text after the thinking; the whole completion of a model without markers; else nothing."""
    if not think_closed:
        return ""
    rest = completion_ids[think_tokens:]
    if not rest:  # a model without markers; one that stops right at its closing marker has said no answer
        text = tokenizer.decode(completion_ids, skip_special_tokens=True)
        return "" if THINK_CLOSE in tokenizer.decode(completion_ids[-8:]) else text
    return tokenizer.decode(rest, skip_special_tokens=True)
