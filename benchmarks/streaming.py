"""Prune a random model several times larger than the memory it may use; what was planned for, and what was used.

    python benchmarks/streaming.py OUT [--layers 128] [--width 1024] [--tokens 4096] [--limit 1000] [--solver NAME]

The model has Llama's shapes and bfloat16 weights, a shard a block. A process of its own prunes and exports it, within
`--limit` megabytes (a memory control group, which needs root; without one the run says so), and has the result read
again: as a whole where that has room, else block by block. Peak is of anonymous memory, sampled every 10 ms: pages of
files do not count, as the system takes them back when it needs to.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from peers import SPARSITY, Meter, write
from secateurs import pruner
from secateurs.calibration import CODES, CalibrationSet, Document, batches, region_weights
from secateurs.checkpoint import INDEX, Checkpoint
from secateurs.models import model_path
from secateurs.planner import needs, shelf
from secateurs.recipe import build_pattern, build_solver
from secateurs.reload import verify

VOCABULARY = 512
BATCH_TOKENS = 4096


def make(folder: Path, layers: int, width: int) -> int:
    """Write the model a block at a time; its size in bytes."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 256, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, list[str]] = {}
    for name in shapes:
        place = name.split(".")[2] if ".layers." in name else "around"
        shards.setdefault(f"model-{place}.safetensors", []).append(name)
    total = 0
    for file, names in shards.items():
        tensors = {}
        for name in names:
            value = torch.randn(shapes[name], generator=generator) * shapes[name][-1] ** -0.5
            tensors[name] = (torch.ones(shapes[name]) if "norm" in name else value).bfloat16()
        total += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, names in shards.items() for name in names}}
    (folder / INDEX).write_text(json.dumps(index | {"metadata": {"total_size": total}}))
    return total


def documents(tokens: int, seed: int) -> tuple[Document, ...]:
    """Random ids in documents of 256."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randint(0, VOCABULARY, (max(tokens // 256, 1), 256), generator=generator).tolist()
    codes = (CODES["prompt"],) * 32 + (CODES["think"],) * 208 + (CODES["answer"],) * 16
    return tuple(Document(tuple(ids), codes) for ids in made)


def prune(folder: Path, out: Path, tokens: int, solver: str, where: Any) -> dict[str, Any]:
    """The work, in this process."""
    calibration = CalibrationSet(documents(tokens, 0), documents(1024, 1), region_weights("rac"))
    pattern = build_pattern({"name": "unstructured", "sparsity": SPARSITY, "scope": "layer"})
    plan = pruner.Plan(pattern=pattern, solver=build_solver({"name": solver}), propagate="dense")
    with Meter() as both:
        with Meter() as pruning:
            checkpoint = Checkpoint(str(folder))
            every = (*calibration.documents, *calibration.held_out)
            padded = sum(batch.ids.numel() for batch in batches(every, BATCH_TOKENS))
            sizes: dict[str, Any] = {
                "tokens": padded,
                "held_out_tokens": 1024,
                "batch_tokens": BATCH_TOKENS,
                "in_file": checkpoint.in_file,
            }
            wanted = needs(checkpoint.model, plan, solver, **sizes)
            print(f"planned: {wanted}", file=sys.stderr)
            results = pruner.prune(
                checkpoint.model, calibration, plan, folder=out / "blocks", batch_tokens=BATCH_TOKENS,
                place=shelf(where, out), opened=checkpoint.opened,
                progress=lambda done, total, what: print(done, total, file=sys.stderr),
            )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(model_path("bundled"))
        write(checkpoint, tokenizer, plan, results, out, calibration.held_out[0].ids[:64])
    started = time.perf_counter()
    (again,) = verify([out / "model"]).values()
    planned = wanted.on_device + (wanted.hidden if where != "disk" else 0)
    zeros = sum(result.zeros for result in results) / sum(a * b for a, b in (result.shape for result in results))
    return {
        "planned_MB": planned / 1e6, "used_MB": both.megabytes, "before_MB": both.before / 1e6, "sparsity": zeros,
        "seconds": pruning.seconds, "export_seconds": both.seconds - pruning.seconds,
        "reload_seconds": time.perf_counter() - started, "reloaded_whole": again.whole, "reloaded_off": again.off,
    }  # fmt: skip


@contextmanager
def limited(megabytes: int):
    """A control group with so much memory, as a file that takes process ids; None where none can be made."""
    old = Path("/sys/fs/cgroup/memory")
    root, limit = (old, "memory.limit_in_bytes") if old.is_dir() else (old.parent, "memory.max")
    group = root / f"secateurs-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text(str(megabytes * 10**6))
    except OSError as error:
        print(f"no control group can be made ({error}): nothing limits the memory")
        yield None
        return
    try:
        yield group / "cgroup.procs"
    finally:
        time.sleep(1)
        group.rmdir()


def main() -> None:
    """Make the model, prune it in a process of its own, print one line of figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=128)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--solver", default="sparsegpt+refit")
    parser.add_argument("--hidden-states", default="device", choices=["device", "disk"])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    model = options.out / f"model-{options.layers}x{options.width}"
    if options.child:
        print(json.dumps(prune(model, options.out, options.tokens, options.solver, options.hidden_states)))
        return
    size = sum(file.stat().st_size for file in model.glob("*.safetensors")) if model.exists() else 0
    size = size or make(model, options.layers, options.width)
    shutil.rmtree(options.out / "blocks", ignore_errors=True)  # of an earlier run, which this one would go on with
    with limited(options.limit) as group:
        command = [sys.executable, __file__, *sys.argv[1:], "--child"]

        def enter() -> None:
            if group is not None:
                group.write_text(str(os.getpid()))

        giving_back = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, preexec_fn=enter, env=giving_back)
    if done.returncode:
        sys.exit(f"the run ended with {done.returncode}; the limit was {options.limit} MB")
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"model {size / 1e6:,.0f} MB, limit {options.limit:,} MB: {size / 1e6 / options.limit:.1f} times as large")
    print(json.dumps({key: round(value, 2) for key, value in found.items()}))


if __name__ == "__main__":
    main()
