"""Whether traces are a model's own: how much more, or less, they surprise it than what it would have said itself."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from secateurs.engines import Completion, Sampling

LIMIT = 0.1  # nats a token; rounding and 8-bit weights cost a hundredth of it, another model several times it
DOUBT = 6.0  # standard errors
ROWS = 256  # tokens at a time: a row is as long as the vocabulary
LIKELY = 1024  # tokens that top-p looks at before it sorts the whole vocabulary


@dataclass(frozen=True)
class Surprise:
    """`gap`: nats a token that traces surprise a model by, over what its own samples would. `z`: in standard errors.

    Near 0 for the model's own traces, below where a server draws more from the likely tokens. `num_tokens` were seen.
    """

    gap: float
    z: float
    num_tokens: int


class Rows(Protocol):
    """Logits of one sequence [seq, vocab], whole or made as they are looked at."""

    def __getitem__(self, tokens: slice, /) -> Tensor:
        """[tokens, vocab]"""
        ...


@torch.inference_mode()
def surprise(logits: Iterable[Rows], said: Sequence[Completion], sampling: Sampling) -> Surprise:
    """Teacher-forced: the mean of E[log p] - log p(token) over all completion tokens, p at the sampling temperature.

    E and Var are over what top-k and top-p leave of p. For samples of the model itself every term has mean 0 and
    variance Var[log p], whatever the text; for another model's the mean is the KL divergence and more. Greedy traces
    are measured against the best token at temperature 1, with z = infinity, as there is nothing random in them.
    `logits` are the model's for each one, prompt and completion; ROWS of them are looked at together.
    """
    total = variance = 0.0
    count = 0
    for one, given in zip(said, logits, strict=True):
        first = len(one.request.prompt_ids) - 1
        last = first + len(one.ids)
        for start in range(first, last, ROWS):
            log_p = (given[start : min(start + ROWS, last)].float() / (sampling.temperature or 1.0)).log_softmax(-1)
            drawn = torch.tensor(one.ids[start - first :][: len(log_p)], device=log_p.device)
            of_drawn = log_p.gather(1, drawn[:, None])[:, 0]
            if sampling.temperature == 0:
                total += float((log_p.amax(-1) - of_drawn).sum(dtype=torch.float64))
            else:
                log_p, p = _kept(log_p, sampling)
                mean = (p * log_p).sum(-1)
                total += float((mean - of_drawn).sum(dtype=torch.float64))
                variance += float(((p * log_p**2).sum(-1) - mean**2).clamp_min(0).sum(dtype=torch.float64))
        count += len(one.ids)
    z = total / variance**0.5 if variance > 0 else float("inf") if total > 0 else 0.0
    return Surprise(total / max(count, 1), z, count)


def _kept(log_p: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """log p of the tokens that top-k and top-p may leave, and the probabilities they are drawn with, row by row."""
    vocab = log_p.shape[-1]
    most = min(sampling.top_k or vocab, vocab)
    if most == vocab and sampling.top_p == 1:
        return log_p, log_p.exp()
    top = log_p.topk(min(most, LIKELY)).values
    if most > LIKELY and bool((top.exp().sum(-1) < sampling.top_p).any()):
        top = log_p.topk(most).values
    p = top.exp()
    if sampling.top_k:
        p = p / p.sum(-1, keepdim=True)
    p = p.masked_fill(p.cumsum(-1) - p >= sampling.top_p, 0.0)
    return top, p / p.sum(-1, keepdim=True)


def check_own(logits: Iterable[Rows], said: Sequence[Completion], sampling: Sampling, source: str) -> Surprise:
    """ValueError, with the numbers, if what `source` said is not what the model says: over LIMIT off, beyond doubt."""
    found = surprise(logits, said, sampling)
    if found.gap < -LIMIT and found.z < -DOUBT:
        raise ValueError(
            f"{source} does not sample as it was asked to: over {found.num_tokens:,} tokens of its first "
            f"{len(said)} traces the local weights are {-found.gap:.2f} nats a token less surprised than by what "
            f"they would say ({-found.z:.0f} standard errors; {LIMIT:g} nats are allowed), so it takes likely tokens "
            "too often. Look for a temperature, top-k or do_sample of its own. None of these traces was stored."
        )
    if found.gap > LIMIT and found.z > DOUBT:
        raise ValueError(
            f"{source} does not serve the model to be pruned: over {found.num_tokens:,} tokens of its first "
            f"{len(said)} traces the local weights are {found.gap:.2f} nats a token more surprised than by what they "
            f"would say ({found.z:.0f} standard errors; {LIMIT:g} nats are allowed). Serve the same weights at the "
            "temperature that is asked for. None of these traces was stored."
        )
    return found
