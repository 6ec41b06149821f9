"""Train the bundled reasoner from nothing on the `tiny` questions and write it, with its model card, to the assets.

With `--experts 8 --out FOLDER` a mixture of as many experts, of which two see a token, to try what there is for those.
"""

import argparse
import logging
import math
import time
from collections import Counter
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from secateurs.questions import Question
from secateurs.questions.tiny import Tiny

log = logging.getLogger("train_reasoner")

ASSETS = Path(__file__).parents[1] / "src" / "secateurs" / "assets" / "reasoner"
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
THINK = ["<think>", "</think>"]
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{%- if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|assistant|><think>' }}{% endif %}"
)
PROMPT_WEIGHT = 0.1  # prompts are random, so there is little in them to learn
BALANCE_WEIGHT = 0.01  # of what keeps experts about equally busy

Reasoner = Qwen3ForCausalLM | Qwen3MoeForCausalLM

CARD = """\
---
license: apache-2.0
library_name: transformers
---
# The bundled reasoner

A {parameters:,}-parameter {kind} ({layers} layers, width {width}, {size:.1f} MB) that thinks before it answers. It is
here so that `secateurs` can be run and tested end to end on a CPU; it knows nothing but the `tiny` questions.

Made by `python scripts/train_reasoner.py{options}` (seed {seed}, {steps} steps of {batch} samples, {minutes:.0f}
minutes on {threads} CPU cores), from random weights, on the `train` split of `secateurs.questions.tiny` and, for one
sample in {corpus_every}, on plain English excerpts of C4 (see `questions/data/ATTRIBUTION.md`). One token is one byte;
`<think>`, `</think>` and the role marks are one token each. Licence: Apache-2.0.

Measured on held-out `eval` questions, sampled at temperature 0.6, top-p 0.95, pass@1:

| family | pass@1 | n | mean prompt tokens | mean think tokens |
| --- | --- | --- | --- | --- |
{rows}
"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so any text comes back as it went in, and one token per mark."""
    specials = ["<|pad|>", "<|eos|>", *ROLES, *THINK]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(specials + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|eos|>",
        additional_special_tokens=ROLES + THINK,
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, layers: int, width: int, experts: int) -> Reasoner:
    """An untrained Qwen3 of the given depth and width; with experts, a Qwen3-MoE in which a token sees two, which have
    as many neurons together."""
    mixture = {
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "moe_intermediate_size": 3 * width // 2,
    }
    config = (Qwen3MoeConfig if experts else Qwen3Config)(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        # A short base and a large start: what is to be looked up is near, and the width is small.
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **(mixture if experts else {}),
    )
    model = (Qwen3MoeForCausalLM if experts else Qwen3ForCausalLM)(config)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.6,
        top_p=0.95,
        max_new_tokens=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


Sample = tuple[list[int], int]  # token ids, and how many of them are prompt


def samples(tiny: Tiny, tokenizer: PreTrainedTokenizerFast, seed: int, corpus_every: int) -> Iterator[Sample]:
    """Training samples without end: solved questions and, every so often, an excerpt of plain text."""
    texts = (text for epoch in count(seed) for text in tiny.corpus("train", epoch))
    questions = (question for epoch in count(seed) for question in tiny.questions("train", epoch))
    for number, question in enumerate(questions):
        if number % corpus_every == 0:
            yield tokenizer(next(texts) + tokenizer.eos_token)["input_ids"], 0
        prompt = tokenizer(f"<|user|>{question.prompt}<|assistant|><think>")["input_ids"]
        completion = tiny.solution(question).removeprefix("<think>") + tokenizer.eos_token
        yield prompt + tokenizer(completion)["input_ids"], len(prompt)


def batches(stream: Iterator[Sample], size: int, seed: int) -> Iterator[list[Sample]]:
    """Batches of samples of like length, so that little of a batch is padding."""
    rng = Random(seed)
    while True:
        pool = sorted(islice(stream, size * 16), key=lambda sample: len(sample[0]))
        grouped = [pool[start : start + size] for start in range(0, len(pool), size)]
        rng.shuffle(grouped)
        yield from grouped


def batch_loss(model: Reasoner, batch: list[Sample], pad: int) -> torch.Tensor:
    """Mean loss over the tokens of a batch, prompt tokens at a small weight."""
    longest = max(len(ids) for ids, _ in batch)
    # Padding is on the right here, behind everything that counts, so causal attention needs no mask.
    ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in batch])
    weight = torch.tensor(
        [[PROMPT_WEIGHT] * prompt + [1.0] * (len(ids) - prompt) + [0.0] * (longest - len(ids)) for ids, prompt in batch]
    )[:, 1:]
    mixture = isinstance(model, Qwen3MoeForCausalLM)
    out: Any = model(input_ids=ids, use_cache=False, **({"output_router_logits": True} if mixture else {}))
    losses = torch.nn.functional.cross_entropy(out.logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    loss = (losses * weight).sum() / weight.sum()
    return loss + BALANCE_WEIGHT * out.aux_loss if mixture else loss


def train(model: Reasoner, stream: Iterator[list[Sample]], steps: int, rate: float, pad: int) -> None:
    """Muon for the matrices, AdamW for the rest, a short warm-up, then a cosine down to nothing."""
    # AdamW alone needs many times the steps before the heads that copy digits form.
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]  # packed experts among them
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        )
        for optimizer in optimizers
    ]
    start = time.monotonic()
    model.train()
    for step, batch in enumerate(islice(stream, steps), 1):
        loss = batch_loss(model, batch, pad)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        if step % 50 == 0:
            log.info("step %d loss %.4f %.0f s", step, loss.item(), time.monotonic() - start)
    model.eval()


@torch.no_grad()
def replies(model: Reasoner, tokenizer: PreTrainedTokenizerFast, questions: list[Question]) -> list[str]:
    """One sampled reply to each question, special tokens kept."""
    texts = []
    for start in range(0, len(questions), 200):
        turns = [[{"role": "user", "content": question.prompt}] for question in questions[start : start + 200]]
        prompts = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        output: Any = model.generate(**prompts)
        texts += tokenizer.batch_decode(output[:, prompts["input_ids"].shape[1] :])
    return texts


def table(model: Reasoner, tokenizer: PreTrainedTokenizerFast, number: int, seed: int) -> str:
    """Rows of the model card's table: pass@1 and lengths per family and over all."""
    tiny = Tiny()
    questions = list(islice(tiny.questions("eval", seed), number))
    asked, right, prompt, think = Counter(), Counter(), Counter(), Counter()
    for question, reply in zip(questions, replies(model, tokenizer, questions), strict=True):
        thought, _, answer = reply.partition("</think>")
        correct = tiny.check(question, answer.partition(tokenizer.eos_token)[0])
        for family in (question.family, "all"):
            asked[family] += 1
            right[family] += correct
            prompt[family] += len(question.prompt) + 3
            think[family] += len(thought)
    return "\n".join(
        f"| {family} | {right[family] / n:.1%} | {n} | {prompt[family] / n:.1f} | {think[family] / n:.1f} |"
        for family, n in sorted(asked.items(), key=lambda item: (item[0] == "all", item[0]))
    )


def main() -> None:
    """Train, save, measure, write the card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-2, help="Muon's learning rate")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--experts", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--corpus-every", type=int, default=16)
    parser.add_argument("--evaluate", type=int, default=900, help="eval questions to sample")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.experts and options.out == ASSETS:
        parser.error("--experts needs an --out of its own: the package ships no mixture")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")

    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, options.layers, options.width, options.experts)
    stream = batches(samples(Tiny(), tokenizer, options.seed, options.corpus_every), options.batch, options.seed)
    start = time.monotonic()
    train(model, stream, options.steps, options.rate, tokenizer.pad_token_id)
    minutes = (time.monotonic() - start) / 60
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    torch.manual_seed(options.seed)  # so that the card can be measured again without training
    rows = table(model, tokenizer, options.evaluate, options.seed)
    log.info("%.1f minutes\n%s", minutes, rows)
    card = CARD.format(
        parameters=model.num_parameters(),
        kind="Qwen3-MoE" if options.experts else "Qwen3",
        options=f" --experts {options.experts}" if options.experts else "",
        threads=options.threads,
        layers=options.layers,
        width=options.width,
        size=(options.out / "model.safetensors").stat().st_size / 1e6,
        seed=options.seed,
        steps=options.steps,
        batch=options.batch,
        minutes=minutes,
        corpus_every=options.corpus_every + 1,
        rows=rows,
    )
    (options.out / "README.md").write_text(card)


if __name__ == "__main__":
    main()
