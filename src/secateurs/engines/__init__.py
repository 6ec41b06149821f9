"""Who generates: requests of exact prompt ids in, completions of exact ids out, in any order. One table of engines."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol


@dataclass(frozen=True, kw_only=True)
class Request:
    """One completion to sample. `seed` fixes its random numbers whatever else is in the batch.

    `turns` are the (role, text) pairs that the prompt was made of, for servers that are spoken to by chat.
    """

    question_id: str
    sample: int
    prompt_ids: tuple[int, ...]
    seed: int
    turns: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn. temperature 0 is greedy; top_k 0 and top_p 1 are off."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 1024

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"sampling.temperature must be 0 or more, found {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p must be in (0, 1], found {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"sampling.top_k must be 0 (off) or more, found {self.top_k}")
        if self.max_new_tokens < 1:
            raise ValueError(f"sampling.max_new_tokens must be 1 or more, found {self.max_new_tokens}")


def default_sampling(generation_config: Any, **overrides: float | int | None) -> Sampling:
    """The model's own generation_config as Sampling; `overrides` that are not None win. do_sample = false is greedy."""
    asked = bool(generation_config.do_sample)
    own = {
        "temperature": (generation_config.temperature or 1.0) if asked else 0.0,
        "top_p": (generation_config.top_p or 1.0) if asked else 1.0,
        "top_k": (generation_config.top_k or 0) if asked else 0,
    }
    given = {name: value for name, value in overrides.items() if value is not None}
    return replace(Sampling(**own), **given)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What came back: the generated ids (eos included), why it ended, and its share of the wall-clock in seconds.

    `source` is the server that made it, "" for a model in this process.
    """

    request: Request
    ids: tuple[int, ...]
    finish: Literal["eos", "length"]
    seconds: float
    source: str = ""


class Engine(Protocol):
    """Anything that turns requests into completions."""

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        """Yield each completion as soon as it is finished; requests are drawn lazily, in order."""
        ...


ENGINES: dict[str, str] = {"hf": "secateurs.engines.hf:HF", "openai": "secateurs.engines.openai:OpenAI"}
