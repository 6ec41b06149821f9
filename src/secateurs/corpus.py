"""The ordinary text that a recipe may calibrate on: which, in what order, and what it is known by."""

from collections.abc import Iterator
from glob import escape
from hashlib import sha256
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from secateurs.artifacts import folder_hash
from secateurs.calibration import Document, plain_document, region_weights, take
from secateurs.hub import HUB
from secateurs.questions.tiny import Tiny
from secateurs.recipe import Recipe
from secateurs.rows import read_rows

CORPUS_ROWS = 20_000


def corpus_texts(recipe: Recipe, seed: int) -> Iterator[str]:
    """The texts of the recipe's corpus in an order fixed by `seed`; of a large file the first CORPUS_ROWS."""
    table = recipe.calibration
    if not table.corpus:
        yield from Tiny().corpus("calibration", seed)
        return
    texts: list[str] = []
    for place, row in islice(read_rows(table.corpus), CORPUS_ROWS):
        if not isinstance(row.get(table.corpus_field), str):
            raise ValueError(f"{place}: no text in field `{table.corpus_field}`; there are {', '.join(row) or 'none'}")
        texts.append(row[table.corpus_field])
    Random(seed).shuffle(texts)
    yield from texts


def corpus_hash(recipe: Recipe) -> str:
    """Of the content of the recipe's corpus, as a file may change under its name; "" for the one that ships.

    Of a corpus on the hub: of the texts that are used, which are read once more for it.
    """
    if recipe.calibration.corpus.startswith(HUB):
        digest = sha256()
        for text in corpus_texts(recipe, 0):
            digest.update(f"{len(text)} {text}".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()
    path = Path(recipe.calibration.corpus)
    return folder_hash(path.parent, [escape(path.name)]) if recipe.calibration.corpus else ""


def corpus_documents(recipe: Recipe, seed: int, tokenizer: Any) -> tuple[int, list[Document]]:
    """How many tokens an arm takes from the corpus, and the pieces it takes. ValueError if there are too few."""
    size, weights = recipe.calibration.corpus_tokens, region_weights(recipe.calibration.arm)
    tokenized = (tokenizer(text)["input_ids"] for text in corpus_texts(recipe, seed))
    pieces = (
        plain_document(ids[start : start + size], "corpus") for ids in tokenized for start in range(0, len(ids), size)
    )
    alone = {region for region, weight in weights.items() if weight} == {"corpus"}
    share = recipe.calibration.num_tokens // (1 if alone else 2)
    return share, take(pieces, share, weights, "corpus")
