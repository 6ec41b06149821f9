"""What a prune was planned to hold, and what it held: families of random weights, a process each.

    python benchmarks/plans.py [--families llama,gpt_oss] [--solver NAME] [--propagate dense,block] [--goal residual]
        [--dtype bfloat16] [--tune 3] [--as-is]

`--tune` fine-tunes every block by so many steps. Memory that belongs to no file is sampled every two milliseconds, with
an allocator told to give back what is freed, or `--as-is`, as the command has it.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from typing import Any

import torch
import transformers

from peers import Meter
from secateurs.calibration import CODES, CalibrationSet, Document, batches, region_weights
from secateurs.checkpoint import Checkpoint, give_back
from secateurs.patterns import Unstructured
from secateurs.planner import needs
from secateurs.pruner import Plan, prune
from secateurs.recipe import build_solver
from secateurs.tune import Tune

LENGTH, BATCH = 1024, 2048
EVERY = {"vocab_size": 512, "num_hidden_layers": 2, "max_position_embeddings": 8192, "num_key_value_heads": 4}
LINEAR = {
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 16,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8}),
    "qwen2": ("Qwen2", {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}),
    "gemma3": ("Gemma3Text", {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "head_dim": 64,
        "sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"]}),
    "gpt_oss": ("GptOss", {"hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 16, "head_dim": 32,
        "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "mixtral": ("Mixtral", {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8,
        "num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3Moe", {"hidden_size": 512, "num_attention_heads": 8, "head_dim": 64, "num_experts": 64,
        "num_experts_per_tok": 4, "moe_intermediate_size": 256}),
    "qwen3_next": ("Qwen3Next", {"hidden_size": 1024, "num_attention_heads": 8, "head_dim": 64, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
        "layer_types": ["linear_attention", "full_attention"], **LINEAR}),
}  # fmt: skip


def documents(count: int, seed: int, length: int = LENGTH) -> tuple[Document, ...]:
    """Random ones, all thinking."""
    ids = torch.randint(0, EVERY["vocab_size"], (count, length), generator=torch.Generator().manual_seed(seed))
    return tuple(Document(tuple(row), (CODES["think"],) * length) for row in ids.tolist())


def measure(family: str, solver: str, propagate: str, goal: str, dtype: str, steps: int) -> tuple[int, int]:
    """Bytes that were planned and that were held at most, above what is held before the model is opened. Files have
    weights of type `dtype`, blocks compute in float32."""
    kind, shape = FAMILIES[family]
    torch.manual_seed(0)
    cls = transformers.Gemma3ForCausalLM if kind == "Gemma3Text" else getattr(transformers, f"{kind}ForCausalLM")
    pruned: Any = {"propagate": propagate, "goal": goal, "tune": Tune(steps=steps) if steps else None}
    plan = Plan(pattern=Unstructured(0.5, "layer"), solver=build_solver({"name": solver}), **pruned)
    with tempfile.TemporaryDirectory() as folder:
        made = cls(getattr(transformers, f"{kind}Config")(**EVERY | shape)).to(getattr(torch, dtype))
        made.save_pretrained(folder)
        del made
        for count, length, batch in ((1, 32, 64), (8, LENGTH, BATCH)):  # the first one warms up
            calibration = CalibrationSet(documents(count, 0, length), documents(2, 1, length), region_weights("rac"))
            give_back(torch.device("cpu"))
            with Meter(every=0.002) as meter:
                opened = Checkpoint(folder, compute_dtype="float32")
                every = (*calibration.documents, *calibration.held_out)
                planned = needs(
                    opened.model, plan, solver, tokens=sum(one.ids.numel() for one in batches(every, batch)),
                    held_out_tokens=2 * length, batch_tokens=batch, longest=length, stored=opened.stored,
                    in_file=opened.in_file,
                )  # fmt: skip
                prune(opened.model, calibration, plan, opened=opened.opened, batch_tokens=batch, stored=opened.stored)
    return planned.on_device + planned.hidden, meter.peak - meter.before


def main() -> None:
    """A table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--solver", default="sparsegpt+refit")
    parser.add_argument("--propagate", default="dense,block")
    parser.add_argument("--goal", default="own")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--tune", type=int, default=0, metavar="STEPS")
    parser.add_argument("--as-is", action="store_true")
    parser.add_argument("--one", nargs=2, metavar=("FAMILY", "PROPAGATE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        family, propagate = options.one
        print(*measure(family, options.solver, propagate, options.goal, options.dtype, options.tune))
        return
    print("| family | propagate | planned, MB | held, MB | planned / held |\n| --- | --- | --- | --- | --- |")
    for family in options.families.split(","):
        for propagate in options.propagate.split(","):
            how = ["--solver", options.solver, "--goal", options.goal, "--dtype", options.dtype]
            how += ["--tune", str(options.tune)]
            one = [sys.executable, __file__, *how, "--one", family, propagate]
            giving_back = {} if options.as_is else {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}
            done = subprocess.run(one, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | giving_back)
            planned, most = map(int, done.stdout.split())
            row = f"| {family} | {propagate} | {planned / 1e6:.0f} | {most / 1e6:.0f} | {planned / most:.2f} |"
            print(row, flush=True)


if __name__ == "__main__":
    main()
