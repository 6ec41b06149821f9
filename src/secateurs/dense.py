"""The model a recipe starts from: read when something asks for it, named for keys, shared by processes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from secateurs.artifacts import model_hash, tokenizer_hash
from secateurs.checkpoint import Checkpoint
from secateurs.corpus import corpus_hash
from secateurs.models import load_model, load_tokenizer, model_path
from secateurs.parallel import Progress, silent
from secateurs.ranks import ALONE, Elsewhere, Ranks
from secateurs.recipe import Recipe

T = TypeVar("T")


@dataclass
class Dense:
    """The model a recipe starts from, with what names it, and the processes that prune it together."""

    recipe: Recipe
    ranks: Ranks = ALONE

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.recipe.model, trust_remote_code=self.recipe.resources.trust_remote_code)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The model block by block: to prune, and to know all about it but its weights."""
        r = self.recipe.resources
        options: dict[str, Any] = {"trust_remote_code": r.trust_remote_code, "compute_dtype": r.compute_dtype}
        return Checkpoint(self.recipe.model, device=r.device, **options)

    @cached_property
    def model(self) -> Any:
        """The whole model, to sample from, in what a prune computes in; not read before something asks for it."""
        return self.load(self.recipe.model)

    def forget(self) -> None:
        """Let go of the whole model, if it was read; it is read again when something asks for it."""
        vars(self).pop("model", None)

    def together(self, work: "Callable[[Dense, Progress], T]", progress: Progress = silent) -> T:
        """What some work, that every process does now, returns here. It is sent to them: a function, or a `partial`."""
        return self.ranks.tell(work)(self, progress)

    def load(self, name: str) -> Any:
        """A whole model, this one or what became of it, to sample from on the same terms."""
        r = self.recipe.resources
        model: Any = load_model(name, device=r.device, trust_remote_code=r.trust_remote_code)
        return model.to(self.checkpoint.dtype)

    @cached_property
    def key(self) -> dict[str, str]:
        """Hashes of model and tokenizer."""
        folder = model_path(self.recipe.model)
        if not Path(folder).is_dir():  # a hub id: its weights are pinned by the commit transformers resolved
            return {"model": f"{self.recipe.model}@{self.checkpoint.folder.name}", "tokenizer": ""}
        return {"model": model_hash(folder), "tokenizer": tokenizer_hash(folder)}

    @property
    def computed(self) -> dict[str, str]:
        """For a key: what the model computes in, where that is not what it is stored as."""
        computed = self.checkpoint.dtype
        return {} if computed == self.checkpoint.declared else {"computed": str(computed)}

    @cached_property
    def corpus_hash(self) -> str:
        """What is in the recipe's corpus."""
        return corpus_hash(self.recipe)


def follow(dense: Dense) -> None:
    """What every process but the first does: its part of all work, until the first says that there is no more."""
    while True:
        try:
            work = dense.ranks.tell(None)
        except RuntimeError:  # the first process is gone, and has said why
            raise SystemExit(2) from None
        if work is None:
            return
        try:
            work(dense, silent)
        except Elsewhere:  # the first process raises it
            continue
