"""One prune by 1, 2, 4 ... processes: time, memory, how much of it is solving, and whether the result is the same.

    python benchmarks/processes.py MODEL OUT [--counts 1,2,4] [--tokens 16384] [--solver NAME] [--device cpu]
                                  [--layers N] [--dtype float32]

Every line is torchrun with so many processes of one thread each (or one GPU each). The same token ids as in peers.py.
Seconds are those of the first process, from the checkpoint to the last block on disk; memory is the first one's too.
With --layers or --dtype the model is first written to OUT/model, as in peers.py, and everything runs on that.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from peers import Meter, part_of, prepare, task
from secateurs import pruner
from secateurs.checkpoint import Checkpoint
from secateurs.ranks import joined

BATCH_TOKENS = 1024


def work(options: argparse.Namespace) -> None:
    """This process's part; the first one prints what it took."""
    ids = json.loads((options.out / "ids.json").read_text())
    calibration, plan = task(ids, options.solver, options.propagate)
    with joined(options.device) as ranks:
        torch.set_num_threads(1)
        with Meter() as meter:
            checkpoint = Checkpoint(options.work, device=options.device)
            settings: dict[str, Any] = {
                "folder": options.out / f"blocks-{ranks.count}" if ranks.first else None,
                "opened": checkpoint.opened, "batch_tokens": BATCH_TOKENS, "ranks": ranks,
            }  # fmt: skip
            results = pruner.prune(checkpoint.model, calibration, plan, **settings)
        if ranks.first:
            errors = [result.error_held_out for result in results]
            solve = sum(result.seconds for result in results)
            print(json.dumps({"seconds": meter.seconds, "MB": meter.megabytes, "solve": solve, "errors": errors}))


def main() -> None:
    """A table, every line a ratio to one process in the same run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--counts", default="1,2,4")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--solver", default="sparsegpt+refit")
    parser.add_argument("--propagate", default="block", choices=["dense", "block", "group"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, help="only the first N blocks")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="the type to store the model in")
    parser.add_argument("--work", metavar="MODEL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options)
        return
    model = part_of(options.model, options.out, options.layers, options.dtype)
    prepare(model, options.out, options.tokens)
    print(f"{options.tokens:,} tokens, {options.solver}, propagate = {options.propagate}, {options.device}\n")
    print("| processes | seconds | speed-up | MB each | solving, all together | held-out errors differ by |")
    print("| --- | --- | --- | --- | --- | --- |")
    base: dict[str, Any] = {}
    for count in options.counts.split(","):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count]
        done = subprocess.run([*launch, __file__, *sys.argv[1:], "--work", model], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{count} processes ended with {done.returncode}")
        found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"seconds"')))
        base = base or found
        differ = max(abs(a / b - 1) for a, b in zip(found["errors"], base["errors"], strict=True))
        shown = (
            count, f"{found['seconds']:.0f}", f"{base['seconds'] / found['seconds']:.2f}", f"{found['MB']:.0f}",
            f"{found['solve']:.0f} s", f"{differ:.1e}",
        )  # fmt: skip
        print(f"| {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
