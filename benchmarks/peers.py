"""A whole prune against a bare forward pass of its tokens and against llm-compressor: time, memory, what is lost.

    python benchmarks/peers.py MODEL OUT [--peer PYTHON] [--tokens 16384] [--solvers sparsegpt,sparsegpt+refit]
                              [--how dense,block,lean] [--layers N] [--dtype float32]

One model, the same token ids (C4 documents of 512 tokens, the text that ships), the same sparsity (50 %, unstructured),
as many threads as torch takes. PYTHON is that of an environment with llm-compressor, which is left out without one.
secateurs computes in what it takes for the fastest type (`compute_dtype = "auto"`), so the bare pass is shown in
float32 and as the checkpoint is stored. `lean` is `dense` with hidden states in files and a document a batch, which is
how llm-compressor batches. With --layers or --dtype the model is first written to OUT/model, with its first N blocks
and in that type, and everything runs on that.

Every line is a process of its own. Seconds are of the work without imports: for secateurs with reading the checkpoint
and writing blocks, for llm-compressor without either. Memory is the peak of anonymous memory above that after imports,
with what of the model is held. The error is of the final hidden states, in float32, on 8 other documents.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

LENGTH = 512
HELD_OUT = 8
SPARSITY = 0.5


def anonymous() -> int:
    """Bytes of this process that belong to no file."""
    status = Path("/proc/self/status").read_text()
    return 1024 * sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))


class Meter:
    """Seconds and peak memory of what is done while it is open, looked at as often as said, in seconds."""

    def __init__(self, every: float = 0.01) -> None:
        self.every = every

    def __enter__(self) -> "Meter":
        self.before = self.peak = anonymous()
        self.done = threading.Event()
        self.watcher = threading.Thread(target=self._watch)
        self.watcher.start()
        self.clock = time.perf_counter()
        return self

    def _watch(self) -> None:
        while not self.done.wait(self.every):
            self.peak = max(self.peak, anonymous())

    def __exit__(self, *exception: object) -> None:
        self.seconds = time.perf_counter() - self.clock
        self.done.set()
        self.watcher.join()
        self.megabytes = (self.peak - self.before) / 1e6

    def show(self, all_along: "Meter | None" = None) -> None:
        """For the process that reads it; memory may be that of a longer stretch."""
        print(json.dumps({"seconds": self.seconds, "megabytes": (all_along or self).megabytes}))


def part_of(model: str, out: Path, layers: int | None, dtype: str | None) -> str:
    """The model to run on: the one named, or a folder in `out` with its first blocks, in another type."""
    if layers is None and dtype is None:
        return model
    from transformers import AutoConfig, AutoModelForCausalLM

    from secateurs.models import load_tokenizer, model_path

    folder = out / "model"
    if folder.resolve() == Path(model).resolve():
        sys.exit(f"{folder} would be written over: name another folder for what is made")
    config = AutoConfig.from_pretrained(model_path(model))
    text = config.get_text_config(decoder=True)
    if layers is not None:
        if not 0 < layers <= text.num_hidden_layers:
            sys.exit(f"--layers is {layers}; {model} has {text.num_hidden_layers} blocks")
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
        text.num_hidden_layers = layers
    loaded = AutoModelForCausalLM.from_pretrained(model_path(model), config=config, dtype=dtype or "auto")
    loaded.save_pretrained(folder)
    load_tokenizer(model).save_pretrained(folder)
    return str(folder)


def prepare(model: str, out: Path, tokens: int) -> None:
    """Token ids for everyone."""
    from secateurs.corpus import corpus_texts
    from secateurs.models import load_tokenizer
    from secateurs.recipe import parse_recipe

    tokenizer, ids = load_tokenizer(model), []
    for text in corpus_texts(parse_recipe({"model": model}, "benchmark"), 0):
        ids += tokenizer(text)["input_ids"]
        if len(ids) >= tokens + HELD_OUT * LENGTH:
            break
    documents = [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH + 1, LENGTH)]
    out.mkdir(parents=True, exist_ok=True)
    (out / "ids.json").write_text(json.dumps({"held_out": documents[:HELD_OUT], "train": documents[HELD_OUT:]}))


def forward(model: str, ids: dict[str, Any], dtype: str) -> None:
    """The calibration tokens once through the model in batches, no cache, no logits, in its own type or another."""
    from secateurs.models import decoder, load_model

    rows = torch.tensor(ids["train"])
    with torch.inference_mode(), Meter() as all_along:
        loaded = load_model(model)
        loaded = loaded.float() if dtype == "float32" else loaded
        decoder(loaded)(input_ids=rows[:1], use_cache=False)
        with Meter() as meter:
            for batch in rows.split(16):
                decoder(loaded)(input_ids=batch, use_cache=False)
    meter.show(all_along)


def task(ids: dict[str, Any], solver: str, propagate: Any) -> tuple[Any, Any]:
    """What to calibrate on, and what to do: for `pruner.prune`."""
    from secateurs.calibration import CalibrationSet, plain_document
    from secateurs.pruner import Plan
    from secateurs.recipe import build_pattern, build_solver

    train, held = ([plain_document(row, "corpus") for row in ids[part]] for part in ("train", "held_out"))
    calibration = CalibrationSet(tuple(train), tuple(held), {"corpus": 1.0})
    pattern = build_pattern({"name": "unstructured", "sparsity": SPARSITY, "scope": "layer"})
    return calibration, Plan(pattern=pattern, solver=build_solver({"name": solver}), propagate=propagate)


def secateurs(model: str, ids: dict[str, Any], out: Path, solver: str, how: Any) -> None:
    """A prune of the checkpoint, and its blocks on disk; then, not timed, the exported folder."""
    from transformers import AutoTokenizer

    from secateurs import pruner
    from secateurs.checkpoint import Checkpoint
    from secateurs.planner import shelf

    lean = how == "lean"
    calibration, plan = task(ids, solver, "dense" if lean else how)
    with Meter() as meter:
        checkpoint = Checkpoint(model, compute_dtype="auto")
        results = pruner.prune(
            checkpoint.model, calibration, plan, folder=out / "blocks", opened=checkpoint.opened,
            stored=checkpoint.stored, place=shelf("disk" if lean else "device", out),
            batch_tokens=LENGTH if lean else 2048,
        )  # fmt: skip
    meter.show()
    write(checkpoint, AutoTokenizer.from_pretrained(model), plan, results, out, ids["held_out"][0][:64])


def write(checkpoint: Any, tokenizer: Any, plan: Any, results: Any, out: Path, probe: Any) -> None:
    """The folder out/model of what was pruned to out/blocks; of its provenance only what the model card needs."""
    from secateurs import pruner
    from secateurs.export import export

    selected = pruner.prunable(checkpoint.model, plan)
    opened = pruner.results_in(out / "blocks", selected, checkpoint.opened)
    layers = [vars(result) | {"shape": list(result.shape)} for result in results]
    facts = {
        "arm": "", "pattern": str(plan.pattern), "sparsity": SPARSITY, "solver": str(plan.solver), "seed": 0, "key": "",
        "model": checkpoint.name, "calibration_tokens": 0, "hashes": {}, "recipe": {}, "held_out": {},
    }  # fmt: skip
    export(
        checkpoint, tokenizer, selected, opened, out / "model", provenance=facts, layers=layers, probe_ids=probe
    )  # fmt: skip


def llm_compressor(model: str, ids: dict[str, Any], out: Path) -> None:
    """SparseGPT as the peer runs it, with its own defaults; in its own environment."""
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]
    from llmcompressor.modifiers.pruning import SparseGPTModifier  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = Dataset.from_dict({"input_ids": ids["train"], "attention_mask": [[1] * LENGTH for _ in ids["train"]]})
    recipe = SparseGPTModifier(sparsity=SPARSITY, mask_structure="0:0", targets=["Linear"], ignore=["re:.*lm_head"])
    with Meter() as all_along:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
        with Meter() as meter:
            oneshot(
                model=loaded, processor=AutoTokenizer.from_pretrained(model), dataset=rows, recipe=[recipe],
                max_seq_length=LENGTH, num_calibration_samples=len(rows),
            )  # fmt: skip
    meter.show(all_along)
    loaded.save_pretrained(out / "model", save_compressed=False)
    AutoTokenizer.from_pretrained(model).save_pretrained(out / "model")


def lost(model: str, pruned: Path, ids: dict[str, Any]) -> tuple[float, float]:
    """The relative error of the final hidden states on the held-out documents, and the share of zeros in the blocks."""
    from secateurs.calibration import Batch
    from secateurs.checkpoint import Checkpoint
    from secateurs.collect import final_states, matrices_of

    rows = torch.tensor(ids["held_out"])
    batch, states = Batch(rows, torch.ones_like(rows)), []
    zeros = total = 0
    for folder in (model, str(pruned)):
        checkpoint = Checkpoint(folder, compute_dtype="float32")
        states.append(final_states(checkpoint.model, [batch], checkpoint.opened)[0].double())
    for index, block in enumerate(checkpoint.blocks):
        with checkpoint.opened(index):
            for matrix in matrices_of(block, str(index)):
                zeros, total = zeros + int((matrix.weight == 0).sum()), total + matrix.weight.numel()
    dense, now = states
    return float((now - dense).square().sum() / dense.square().sum()), zeros / total


def main() -> None:
    """A table, every line a ratio to the bare forward pass in float32 of the same run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--peer", help="the Python of an environment with llm-compressor")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--solvers", default="sparsegpt,sparsegpt+refit")
    parser.add_argument("--how", default="dense,block,lean", help="propagate = dense or block, or lean")
    parser.add_argument("--layers", type=int, help="only the first N blocks")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="the type to store the model in")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        ids = json.loads((options.out.parent / "ids.json").read_text())
        kind, *rest = options.work.split()
        if kind == "forward":
            forward(options.model, ids, *rest)
        elif kind == "llm-compressor":
            llm_compressor(options.model, ids, options.out)
        else:
            secateurs(options.model, ids, options.out, *rest)
        return
    model = part_of(options.model, options.out, options.layers, options.dtype)
    prepare(model, options.out, options.tokens)
    ids = json.loads((options.out / "ids.json").read_text())
    tokens = sum(map(len, ids["train"]))
    lines = [(f"forward {dtype}", sys.executable) for dtype in ("float32", "stored")]
    lines += [
        (f"secateurs {solver} {how}", sys.executable)
        for solver in options.solvers.split(",")
        for how in options.how.split(",")
    ]
    lines += [("llm-compressor", options.peer)] if options.peer else []
    print(f"{tokens:,} tokens, {torch.get_num_threads()} threads\n")
    print("| | seconds | x forward | MB | hidden error | zeros |\n| --- | --- | --- | --- | --- | --- |")
    base = None
    for work, python in lines:
        out = options.out / work.replace(" ", "-")
        command = [python, __file__, model, str(out), "--work", work]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{work} ended with {done.returncode}")
        found = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"seconds"'))
        base = base or found["seconds"]
        error, zeros = (0.0, 0.0) if work.startswith("forward") else lost(model, out / "model", ids)
        shown = (
            f"{found['seconds']:.0f}",
            f"{found['seconds'] / base:.2f}",
            f"{found['megabytes']:.0f}",
            f"{error:.4f}",
            f"{zeros:.1%}",
        )
        print(f"| {work} | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
