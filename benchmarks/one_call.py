"""A packed model's tokens with all blocks in one call of C, and block by block as transformers has them.

    python benchmarks/one_call.py FOLDER... [--contexts 64,1024,4096] [--batch 1,4] [--tokens 20] [--rounds 3]

The same weights and kernels for products in one process; turns go round, and what is shown are medians of all tokens,
in milliseconds. What they gave is in docs/faster.md, "The rest of a token".
"""

import argparse
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from transformers.cache_utils import DynamicCache

from cpu_kernel import numbers
from secateurs.bench import machine, short
from secateurs.runtime import FAST, load_packed


@torch.inference_mode()
def seconds(model, batch: int, context: int, tokens: int) -> list[float]:
    """Of each token after a context of random ones, greedily."""
    cache, taken = DynamicCache(config=model.config), []
    ids = torch.randint(0, model.config.vocab_size, (batch, context), generator=torch.Generator().manual_seed(0))
    for _ in range(tokens + 2):
        start = time.perf_counter()
        ids = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        taken.append(time.perf_counter() - start)
    return taken[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--contexts", type=numbers, default=[64, 1024, 4096])
    parser.add_argument("--batch", type=numbers, default=[1, 4])
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    shown = Table("model", "rows", "context", "transformers' blocks", "one call", "times as fast")
    families = {fast: family for family, fast in FAST.items()}
    for folder in options.folders:
        model = load_packed(folder)
        fast = type(model.base_model)
        if fast not in families:
            raise SystemExit(f"{folder}: {fast.__name__} has no way of its own, or there are no kernels")
        for batch in options.batch:
            for context in options.contexts:
                taken: dict[type, list[float]] = {families[fast]: [], fast: []}
                for _ in range(options.rounds):
                    for way, times in taken.items():
                        model.base_model.__class__ = way
                        times += seconds(model, batch, context, options.tokens)
                theirs, ours = (1000 * statistics.median(times) for times in taken.values())
                row = (str(batch), str(context), f"{theirs:.1f}", f"{ours:.1f}", f"{theirs / ours:.2f}")
                shown.add_row(short(folder), *row)
    Console().print(shown)
    print(machine())


if __name__ == "__main__":
    main()
