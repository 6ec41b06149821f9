"""Does llama.cpp's own converter take a pruned folder, does the engine say what transformers says, and how fast is it?

    python benchmarks/llama_cpp.py WORK FOLDER... [--types bf16,q8_0] [--threads 2] [--rounds 5] [--tokens 48]

In an environment of its own, with torch, transformers, sentencepiece and xllamacpp (llama.cpp and its server in a
wheel). The converter is in the source archive of llama-cpp-python, which is fetched to WORK; GGUF files are made there
too, under the folder's name. One JSON line a file: tokens a second of one request after a prompt of 128 tokens, the
median of rounds in which all files take turns, the slowest and the fastest; and how many of the greedy tokens after
eight prompts are those of transformers in float32, until the first that differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
from itertools import takewhile
from pathlib import Path
from statistics import median
from typing import Any

SOURCES = "llama-cpp-python==0.3.36"
PROMPTS, LENGTH, TOKENS = 8, 24, 32
BEFORE = 128


def converter(work: Path) -> Path:
    """The folder of llama.cpp with its converter, fetched once."""
    package, version = SOURCES.split("==")
    name = f"{package.replace('-', '_')}-{version}"
    if not (work / name).exists():
        fetch = ["download", "--quiet", "--no-deps", "--no-binary", package, "--dest", str(work), SOURCES]
        subprocess.run([sys.executable, "-m", "pip", *fetch], check=True)
        with tarfile.open(work / f"{name}.tar.gz") as archive:
            archive.extractall(work, filter="data")
    return work / name / "vendor" / "llama.cpp"


def convert(work: Path, folder: Path, kind: str) -> Path:
    """The GGUF file of a folder, made if it is not there."""
    written = max(one.stat().st_mtime_ns for one in folder.glob("*.safetensors"))
    file = work / f"{folder.resolve().as_posix().strip('/').replace('/', '-')}-{written}-{kind}.gguf"
    if not file.exists():
        sources = converter(work)
        with_gguf = os.environ | {"PYTHONPATH": str(sources / "gguf-py")}
        words = [str(sources / "convert_hf_to_gguf.py"), str(folder), "--outtype", kind, "--outfile", f"{file}.part"]
        done = subprocess.run([sys.executable, *words], env=with_gguf, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{folder}: llama.cpp's converter says: {done.stderr.strip().splitlines()[-1]}")
        Path(f"{file}.part").rename(file)
    return file


def expected(folder: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Random prompts, and what transformers says to them, without the token that ends it."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(2, model.config.vocab_size, (PROMPTS, LENGTH), generator=draw)
    options = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": TOKENS}
    said = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return prompts.tolist(), [list(takewhile(lambda id: id not in ends, row)) for row in said[:, LENGTH:].tolist()]


def serve(file: Path, threads: int) -> Any:
    """llama.cpp with one slot."""
    import xllamacpp  # pyright: ignore[reportMissingImports]

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = str(file), 1024, 1, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    return xllamacpp.Server(settings)


def ask(server: Any, prompt: list[int], tokens: int, *, to_the_end: bool = False) -> dict[str, Any]:
    """What it says greedily, and how long that took; `to_the_end` of so many tokens, whatever it would say."""
    words = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": to_the_end, "cache_prompt": False}
    answer = server.handle_completions(words | {"return_tokens": True, "verbose": True})
    return json.loads(answer) if isinstance(answer, (str, bytes)) else answer


def equal(ours: list[int], theirs: list[int]) -> int:
    """How many tokens are the same until the first that is not."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))


def main() -> None:
    """Convert, compare, time; one line a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--types", default="bf16,q8_0", help="of the converter's: f32, f16, bf16, q8_0")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    servers: list[Any] = []
    for folder in options.folders:
        prompts, said = expected(folder)
        for kind in options.types.split(","):
            file = convert(options.work, folder, kind)
            server = serve(file, options.threads)
            answers = [ask(server, prompt, TOKENS) for prompt in prompts]
            same = sum(equal(one["__verbose"]["tokens"], words) for one, words in zip(answers, said, strict=True))
            rows.append({"folder": str(folder), "type": kind, "MB": round(file.stat().st_size / 1e6), "equal": same,
                         "of": sum(map(len, said)), "speeds": []})  # fmt: skip
            servers.append(server)
    for turn in range(options.rounds):
        for row, server in zip(rows, servers, strict=True):
            prompt = [5 + (turn + place) % 50 for place in range(BEFORE)]
            row["speeds"].append(
                ask(server, prompt, options.tokens, to_the_end=True)["timings"]["predicted_per_second"]
            )
    for row in rows:
        speeds = sorted(row.pop("speeds"))
        print(json.dumps(row | {"tokens_per_second": round(median(speeds), 1), "slowest": round(speeds[0], 1),
                                "fastest": round(speeds[-1], 1)}), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
