"""Rows of data sets on the Hugging Face hub, streamed by the library `datasets`; none of their code runs. No torch."""

from collections.abc import Iterator
from typing import Any

HUB = "hub:"


def hub_rows(address: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of `hub:owner/name@revision:config:split` with its place; all but the name may be left out.

    A data set with one split needs none named. ValueError, in a sentence, where `datasets` is not installed or cannot
    give the rows: no such data set, configuration or split, terms not agreed to, hub not reachable.
    """
    name, config, split, *rest = [*address.removeprefix(HUB).split(":"), "", ""]
    name, _, revision = name.partition("@")
    if not name or any(rest):
        raise ValueError(f"{address}: not an address; one is hub:owner/name or hub:owner/name@revision:config:split")
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(f"{address}: needs the library `datasets`; pip install 'secateurs[hub]' has it") from None
    try:
        found = load_dataset(name, config or None, revision=revision or None, streaming=True)
        splits = list(found)
        if not split and len(splits) == 1:
            split = splits[0]
        if split in splits:
            for number, row in enumerate(found[split], start=1):
                yield f"{address}, row {number}", dict(row)
    except Exception as error:  # of whatever kind: the library passes on those of half a dozen others
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(f"{address}: cannot be read ({type(error).__name__}: {reason})") from error
    if split not in splits:
        raise ValueError(
            f"{address}: {f'no split `{split}`' if split else 'name a split'}; there are {', '.join(splits)}"
        )
