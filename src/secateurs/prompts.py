"""Between text and ids: a question becomes exact prompt ids, a completion splits into thinking and answer. No torch."""

import hashlib
from bisect import bisect_left
from typing import Any

from secateurs.questions import PromptFormat, Question

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


def render(tokenizer: Any, form: PromptFormat, question: Question) -> tuple[int, ...]:
    """The prompt ids of `question`: chat template where the tokenizer has one, else plain turns; then the prefill.

    A prefill that the template has already written (Qwen3 and R1 distills open `<think>` themselves) is not repeated.
    Templates that write their own BOS get no second one.
    """
    turns: list[dict[str, str]] = [{"role": "system", "content": form.system}] if form.system else []
    for asked, replied in form.examples:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": replied}]
    turns.append({"role": "user", "content": question.prompt})
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        special = False
    else:
        text = "\n\n".join(turn["content"] for turn in turns) + "\n"
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


def think_split(tokenizer: Any, prompt_ids: tuple[int, ...], completion_ids: tuple[int, ...]) -> tuple[int, bool]:
    """How many completion ids belong to the thinking (closing marker included), and whether the thinking was closed.

    Without markers in the prompt's last turn or the completion, the whole completion counts as thinking and as closed.
    Markers are looked for in text, so they need not be single tokens.
    """
    text = tokenizer.decode(completion_ids)
    opened = THINK_OPEN in text or tokenizer.decode(prompt_ids[-8:]).rstrip().endswith(THINK_OPEN)
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
