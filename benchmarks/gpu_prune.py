"""A whole prune on a GPU: time and memory against a bare forward pass of its tokens, and where the time goes.

    python benchmarks/gpu_prune.py OUT [--shape 1.5b] [--tokens 65536] [--solvers NAME,...] [--propagate block,dense]
        [--pattern unstructured] [--device cuda] [--layers 28] [--once]

A Qwen2 of a known model's shapes (a small vocabulary) with random weights in bfloat16, written to OUT and read from
there block by block; documents of 1,024 random tokens, and 8,192 held-out tokens. 50 %, over the layer or 2:4.

Seconds are from reading the checkpoint to the last block on disk, after a warm-up. The bare pass is `final_states` of
the same documents, and reads the checkpoint too. Shares are of a second run, which waits for the GPU around each part.
"Files" is what a prune waits for: blocks are written behind it. TFLOP/s of Gram updates count 2 d_in² operations a
token, of which a little more than half are done: symmetry.
"""

import argparse
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from secateurs import pruner
from secateurs.calibration import CalibrationSet, batches, plain_document, region_weights
from secateurs.checkpoint import Checkpoint
from secateurs.collect import Stream, final_states
from secateurs.layer import Gram
from secateurs.recipe import build_pattern, build_solver

LENGTH = 1024
HELD_OUT = 8192
VOCABULARY = 32000
BATCH_TOKENS = 8192
PARTS = ("forward", "Gram", "solve", "errors", "files")
SHAPES = {  # hidden and intermediate size, heads, heads of keys and values
    "tiny": (48, 96, 4, 2),
    "1.5b": (1536, 8960, 12, 2),
    "7b": (3584, 18944, 28, 4),
    "32b": (5120, 27648, 40, 8),
}
PATTERNS = {
    "unstructured": {"name": "unstructured", "sparsity": 0.5, "scope": "layer"},
    "2:4": {"name": "nm", "n": 2, "m": 4},
}


class Clock:
    """Seconds of each part of the work, those of the parts inside it taken out, and operations of Gram updates."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait, self.seconds, self.inside, self.operations = wait, Counter[str](), ["other"], 0
        self.last = time.perf_counter()

    def turn(self) -> None:
        """What went by since the last turn belongs to the part that is inside now."""
        self.wait()
        now = time.perf_counter()
        self.seconds[self.inside[-1]] += now - self.last
        self.last = now

    def part(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed as a part."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if name == "Gram":
                self.operations += 2 * args[1].numel() * args[1].shape[-1]
            self.turn()
            self.inside.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                self.turn()
                self.inside.pop()

        return timed

    @contextmanager
    def watching(self, solver: Any) -> Iterator[None]:
        """While open, every part of a prune is timed."""
        places = (
            ("forward", Stream, "run"), ("Gram", Gram, "update"), ("solve", type(solver), "solve"),
            ("errors", pruner, "_results"), ("files", Checkpoint, "_fill"), ("files", pruner, "save_block"),
        )  # fmt: skip
        with ExitStack() as stack:
            for name, owner, attribute in places:
                stack.enter_context(patch.object(owner, attribute, self.part(name, getattr(owner, attribute))))
            yield


def make_model(folder: Path, layers: int, device: str, shape: str) -> int:
    """A checkpoint of random weights; how many there are."""
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    sizes: dict[str, Any] = dict(zip(names, SHAPES[shape], strict=True))
    config = Qwen2Config(**sizes, vocab_size=VOCABULARY, num_hidden_layers=layers, tie_word_embeddings=True)
    config.dtype = torch.bfloat16
    with torch.device(device):
        model: Any = Qwen2ForCausalLM._from_config(config)
    model.save_pretrained(folder, max_shard_size="4GB")
    return model.num_parameters()


def calibration(tokens: int) -> CalibrationSet:
    """Documents of random tokens."""

    def documents(count: int) -> tuple[Any, ...]:
        rows = torch.randint(VOCABULARY, (count // LENGTH, LENGTH)).tolist()
        return tuple(plain_document(row, "think") for row in rows)

    return CalibrationSet(documents(tokens), documents(HELD_OUT), region_weights("rac"))


def prune(
    model: Path, data: CalibrationSet, solver: Any, device: str, pattern_name: str, propagate: Any, **more: Any
) -> None:
    """From the checkpoint to the last block on disk."""
    blocks = model.parent / "blocks"
    shutil.rmtree(blocks, ignore_errors=True)
    pattern: Any = build_pattern(PATTERNS[pattern_name])
    checkpoint = Checkpoint(str(model), device=device)
    plan = pruner.Plan(pattern=pattern, solver=solver, propagate=propagate, **more)
    settings: dict[str, Any] = {"folder": blocks, "opened": checkpoint.opened, "batch_tokens": BATCH_TOKENS}
    pruner.prune(checkpoint.model, data, plan, **settings)


def main() -> None:
    """A line a solver and way to propagate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--solvers", default="sparsegpt,sparsegpt+refit,admm")
    parser.add_argument("--propagate", default="block")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--shape", default="1.5b", choices=SHAPES)
    parser.add_argument("--once", action="store_true", help="no second run for the shares")
    parser.add_argument("--pattern", default="unstructured", choices=PATTERNS)
    options = parser.parse_args()
    torch.manual_seed(0)
    gpu = options.device.startswith("cuda")
    wait = torch.cuda.synchronize if gpu else lambda: None

    def seconds(work: Callable[[], Any]) -> float:
        wait()
        started = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - started

    model = options.out / "model"
    weights = make_model(model, options.layers, options.device, options.shape)
    data, few = calibration(options.tokens), calibration(LENGTH)
    tokens = len(data.documents) * LENGTH

    def forward(documents: Any) -> None:
        checkpoint = Checkpoint(str(model), device=options.device)
        final_states(checkpoint.model, list(batches(documents, BATCH_TOKENS)), checkpoint.opened)

    forward(few.held_out)
    base = seconds(lambda: forward((*data.documents, *data.held_out)))
    name = torch.cuda.get_device_name() if gpu else options.device
    print(f"{name}, torch {torch.__version__}: {weights / 1e9:.2f}B weights, {tokens:,} tokens, bare pass {base:.2f} s")
    shown = ("solver", "propagate", "seconds", "tokens/s", "x forward", "peak GB", *PARTS, "other", "Gram TFLOP/s")
    print(f"\n| {' | '.join(shown)} |\n|{' --- |' * len(shown)}")
    for text, propagate in product(options.solvers.split(","), options.propagate.split(",")):
        solver: Any = build_solver({"name": text})
        how = (options.device, options.pattern, propagate)
        prune(model, few, solver, *how, targets=("*.0.*",))
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        took = seconds(lambda solver=solver, how=how: prune(model, data, solver, *how))
        peak = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if gpu else "-"
        shown = (text, propagate, f"{took:.1f}", f"{tokens / took:,.0f}", f"{took / base:.1f}", peak)
        if not options.once:
            clock = Clock(wait)
            with clock.watching(solver):
                prune(model, data, solver, *how)
            clock.turn()
            shown += tuple(f"{clock.seconds[part] / clock.seconds.total():.0%}" for part in (*PARTS, "other"))
            shown += (f"{clock.operations / clock.seconds['Gram'] / 1e12:.1f}",)
        print(f"| {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
