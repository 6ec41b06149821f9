"""Which tokens count, and with what weight: whole documents at true positions, cut to one token budget, in batches."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from secateurs.questions import unknown_name
from secateurs.traces import Trace

REGIONS = ("corpus", "prompt", "think", "answer")
CODES = {region: code for code, region in enumerate(REGIONS, start=1)}  # 0 is padding: it belongs to no region

ARMS: dict[str, dict[str, float]] = {
    "corpus": {"corpus": 1.0},
    "prompt": {"prompt": 1.0},
    "rac": {"prompt": 1.0, "think": 1.0, "answer": 1.0},
    "think": {"think": 1.0},
}


@dataclass(frozen=True)
class Document:
    """One sequence the model sees on its own: ids, and the region code of every id (same length)."""

    ids: tuple[int, ...]
    codes: tuple[int, ...]

    def count(self, weights: Mapping[str, float]) -> int:
        """How many of its tokens have a positive weight."""
        counted = {CODES[region] for region, weight in weights.items() if weight > 0}
        return sum(code in counted for code in self.codes)


@dataclass(frozen=True, eq=False)
class Batch:
    """Documents side by side, padded on the right, where causal attention never looks; region 0 is padding."""

    ids: Int[Tensor, "batch seq"]
    regions: Int[Tensor, "batch seq"]

    @property
    def tokens(self) -> int:
        """Real tokens, without padding."""
        return int((self.regions > 0).sum())


def worth(regions: Tensor, weights: Mapping[str, float]) -> Tensor:
    """What each token counts for: the weight of its region, in the shape of `regions`; 0 for padding. float32."""
    return torch.tensor([0.0, *(weights.get(region, 0.0) for region in REGIONS)]).to(regions.device)[regions]


@dataclass(frozen=True)
class CalibrationSet:
    """The documents an arm calibrates on, the weight of each region, and the held-out documents that judge it."""

    documents: tuple[Document, ...]
    held_out: tuple[Document, ...]
    weights: Mapping[str, float]

    @property
    def tokens(self) -> int:
        """Tokens that count."""
        return sum(document.count(self.weights) for document in self.documents)


def region_weights(arm: str | Mapping[str, float]) -> dict[str, float]:
    """The weight of each region: of a named arm, or of a free mixture as it stands. ValueError for bad ones."""
    if isinstance(arm, str):
        if arm not in ARMS:
            raise ValueError(unknown_name("calibration arm", arm, list(ARMS)))
        return dict(ARMS[arm])
    for region, weight in arm.items():
        if region not in REGIONS:
            raise ValueError(unknown_name("region", region, list(REGIONS)))
        if not 0 <= weight < float("inf"):
            raise ValueError(f"the weight of region `{region}` must be 0 or more, found {weight}")
    if not any(arm.values()):
        raise ValueError("a calibration mixture needs a region with a positive weight")
    return dict(arm)


def trace_document(trace: Trace, first_tokens: int = 0) -> Document:
    """A trace as the model saw it while generating, or its prompt and the first `first_tokens` of its completion.

    The last completion id is left out: it was produced but never fed back, so no layer has ever seen it.
    """
    length = trace.tokens - 1
    if first_tokens:
        length = min(length, len(trace.prompt_ids) + first_tokens)
    ids = trace.prompt_ids + trace.completion_ids
    codes = [CODES[region] for region, start, stop in trace.regions for _ in range(start, stop)]
    return Document(ids[:length], tuple(codes[:length]))


def plain_document(ids: Sequence[int], region: str) -> Document:
    """A document that is all one region: a prompt on its own, or a piece of a corpus."""
    return Document(tuple(ids), (CODES[region],) * len(ids))


def take(documents: Iterable[Document], num_tokens: int, weights: Mapping[str, float], what: str) -> list[Document]:
    """Documents from the front until `num_tokens` tokens count: whole ones, so the budget is met within one document.

    ValueError if they run out first.
    """
    taken: list[Document] = []
    total = 0
    for document in documents:
        if total >= num_tokens:
            break
        counted = document.count(weights)
        if counted:
            taken.append(document)
            total += counted
    if total < num_tokens:
        raise ValueError(
            f"calibration.num_tokens asks for {num_tokens:,} tokens, but only {total:,} come from the {what}: "
            "lower it or add more"
        )
    return taken


def batches(documents: Iterable[Document], batch_tokens: int) -> Iterator[Batch]:
    """Documents of like length together, at most `batch_tokens` padded tokens a batch (one document at the least)."""
    ordered = sorted(documents, key=lambda document: len(document.ids))
    rows: list[Document] = []
    for document in ordered:
        if rows and (len(rows) + 1) * len(document.ids) > batch_tokens:
            yield _batch(rows)
            rows = []
        rows.append(document)
    if rows:
        yield _batch(rows)


def _batch(rows: Sequence[Document]) -> Batch:
    width = len(rows[-1].ids)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    regions = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        regions[index, : len(row.ids)] = torch.tensor(row.codes)
    return Batch(ids, regions)
