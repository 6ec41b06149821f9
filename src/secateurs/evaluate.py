"""Evidence: what a set of sampled answers says about a model, with intervals, and how far its hidden states drifted."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateurs.calibration import CODES, Batch
from secateurs.collect import Opened, final_states
from secateurs.statistics import difference_interval, share_interval
from secateurs.traces import Trace, ends_in_loop

CURVE_BUCKETS = 20
CAPS = 24


def by_question(traces: Sequence[Trace], cap: float = math.inf) -> dict[str, float]:
    """Share of correct samples for every question. One nobody scored, or that thought beyond `cap`, counts as wrong."""
    rewards: dict[str, list[float]] = defaultdict(list)
    for trace in traces:
        rewards[trace.question_id].append((trace.reward or 0.0) if trace.think_tokens <= cap else 0.0)
    return {question: sum(values) / len(values) for question, values in rewards.items()}


def by_cap(traces: Sequence[Trace], most: int) -> list[dict[str, Any]]:
    """pass@1 if thinking had been cut off, from replies that were not: those that thought longer count as wrong.

    Caps are `most` tokens and as much divided by the fourth root of 2 again and again, to a fiftieth. What a model
    would do if it were made to answer at the cap is another question, which would need another run.
    """
    caps = sorted({round(most / 2 ** (step / 4)) for step in range(CAPS)} - {0})
    scores = {cap: by_question(traces, cap).values() for cap in caps}
    return [{"cap": cap, "pass_at_1": sum(values) / len(values)} for cap, values in scores.items()]


def measure(
    traces: Sequence[Trace],
    families: Mapping[str, str],
    *,
    question_set: str,
    seconds: float,
    max_new_tokens: int,
    dense: Sequence[Trace] | None = None,
) -> dict[str, Any]:
    """The fields of a report's `Evaluation` from scored traces.

    `families` maps question ids to their family. `dense` holds the dense model's traces on the same questions, for the
    paired difference and the length ratio. ValueError if it answered other questions: then nothing is paired.
    """
    scores = by_question(traces)
    values = list(scores.values())
    per_family: dict[str, list[float]] = defaultdict(list)
    for question, score in scores.items():
        per_family[families.get(question, "")].append(score)
    count = len(traces)
    tokens = sum(len(trace.completion_ids) for trace in traces)
    correct = sum(trace.reward or 0.0 for trace in traces)

    def mean(values: Sequence[float]) -> float:
        return sum(values) / count

    difference = ratio = None
    if dense is not None:
        reference = by_question(dense)
        if set(reference) != set(scores):
            raise ValueError("the dense model answered other questions: evaluate both with the same recipe")
        deltas = {question: score - reference[question] for question, score in scores.items()}
        difference = {"mean": sum(deltas.values()) / len(deltas), "interval": difference_interval([deltas])}
        ratio = (tokens / count) / (sum(len(trace.completion_ids) for trace in dense) / len(dense))
    return {
        "question_set": question_set,
        "questions": len(scores),
        "samples": round(count / len(scores)),
        "pass_at_1": sum(values) / len(values),
        "interval": share_interval([scores]),
        "by_family": {name: sum(v) / len(v) for name, v in sorted(per_family.items())},
        "by_cap": by_cap(traces, max_new_tokens),
        "scores": scores,
        "difference": difference,
        "prompt_tokens": mean([len(trace.prompt_ids) for trace in traces]),
        "think_tokens": mean([trace.think_tokens for trace in traces]),
        "answer_tokens": mean([len(trace.completion_ids) - trace.think_tokens for trace in traces]),
        "completion_tokens": tokens / count,
        "length_ratio": ratio,
        "truncated": mean([trace.finish == "length" for trace in traces]),
        "looping": mean([ends_in_loop(trace) for trace in traces]),
        "unclosed_think": mean([not trace.think_closed for trace in traces]),
        "tokens_per_correct": tokens / correct if correct else None,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else 0.0,
    }


@dataclass(frozen=True)
class Reference:
    """The dense model's final hidden states on held-out documents: what `drift` compares a pruned model with."""

    batches: tuple[Batch, ...]
    states: tuple[Tensor, ...]


def reference_states(model: PreTrainedModel, batches: Sequence[Batch], opened: Opened = nullcontext) -> Reference:
    """Run the dense model over `batches` once and keep its final hidden states (on the CPU, in the model's dtype)."""
    return Reference(tuple(batches), tuple(final_states(model, batches, opened)))


def drift(
    model: PreTrainedModel, reference: Reference, opened: Opened = nullcontext, lift: Tensor | None = None
) -> dict[str, Any]:
    """The fields of a report's `HiddenError`: Σ‖h - h_dense‖² / Σ‖h_dense‖² by place in the trace.

    The cheap proxy of the RAC paper's figure 2: no generation, the same documents for every arm. `curve` is by the
    relative position within the thinking, in twenty buckets. `lift` [d_model, k] turns a narrower model's states
    into the dense model's.
    """
    error, size, count = (torch.zeros(3 + CURVE_BUCKETS, dtype=torch.float64) for _ in range(3))
    prompt, answer = 0, 1  # then the curve's buckets
    states = final_states(model, reference.batches, opened)
    for batch, dense, pruned in zip(reference.batches, reference.states, states, strict=True):
        now = pruned.double() if lift is None else pruned.double() @ lift.double().T
        think = batch.regions == CODES["think"]
        place = (think.cumsum(-1) - 1).clamp(min=0) / think.sum(-1, keepdim=True).clamp(min=1)
        slot = 2 + (place * CURVE_BUCKETS).long().clamp(max=CURVE_BUCKETS - 1)
        slot = torch.where(batch.regions == CODES["prompt"], prompt, slot)
        slot = torch.where(batch.regions == CODES["answer"], answer, slot)
        real = batch.regions > 0
        for total, values in (
            (error, (now - dense.double()).square().sum(-1)),
            (size, dense.double().square().sum(-1)),
            (count, torch.ones_like(slot, dtype=torch.float64)),
        ):
            total.index_add_(0, slot[real], values[real])

    def share(start: int, stop: int) -> float | None:
        return float(error[start:stop].sum() / size[start:stop].sum()) if count[start:stop].sum() else None

    half = 2 + CURVE_BUCKETS // 2
    curve = [
        {"position": (k + 0.5) / CURVE_BUCKETS, "error": share(2 + k, 3 + k), "tokens": int(count[2 + k])}
        for k in range(CURVE_BUCKETS)
        if count[2 + k]
    ]
    return {
        "prompt": share(prompt, prompt + 1),
        "early_think": share(2, half),
        "late_think": share(half, 2 + CURVE_BUCKETS),
        "answer": share(answer, answer + 1),
        "curve": curve,
    }
