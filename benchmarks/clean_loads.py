"""Do exported folders load where there is nothing but torch and transformers, and say there what they say here?

    python benchmarks/clean_loads.py ENVIRONMENT FOLDER...    # a virtual environment, which is made if it is not there

A line a folder: its parameters, and how many of eight greedy continuations are the same there as here.
"""

import json
import subprocess
import sys
import venv
from pathlib import Path

PROMPTS, LENGTH, TOKENS = 8, 24, 32
CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"


def continuations(folder: str) -> dict[str, object]:
    """What a folder's model says greedily after random prompts; an error for weights that are missing or left over."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), f"weights that do not fit: {info}"
    AutoTokenizer.from_pretrained(folder)
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(2, model.config.vocab_size, (PROMPTS, LENGTH), generator=draw)
    options = {"do_sample": False, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "pad_token_id": 0}
    said = model.eval().generate(prompts, attention_mask=torch.ones_like(prompts), **options)[:, LENGTH:]
    return {"parameters": model.num_parameters(), "said": said.tolist()}


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print("\n" + json.dumps(continuations(sys.argv[2])))
        return
    environment, folders = Path(sys.argv[1]), sys.argv[2:]
    clean = str(environment / "bin" / "python")
    made = environment / "made"  # once all is installed
    if environment.exists() and not made.exists():
        sys.exit(f"{environment} is there, and is no environment that this script made: name another folder")
    if not made.exists():
        venv.create(environment, with_pip=True)
        install = [clean, "-m", "pip", "install", "--quiet", "--constraint", str(CONSTRAINTS), "torch", "transformers"]
        subprocess.run(install, check=True)
        made.touch()
    has = subprocess.run([clean, "-m", "pip", "list", "--format", "freeze"], check=True, capture_output=True, text=True)
    names = [line.partition("==")[0].lower() for line in has.stdout.splitlines()]
    assert "transformers" in names and "secateurs" not in names, f"{environment} is not clean"
    print(f"{environment}: {', '.join(line for line in has.stdout.split() if line.startswith(('torch', 'transf')))}")
    bad = 0
    for folder in folders:
        answers = []
        for python in (clean, sys.executable):
            one = [python, "-I", __file__, "--one", folder]
            done = subprocess.run(one, capture_output=True, text=True)
            if done.returncode:
                print(f"{folder}: {(done.stderr.splitlines() or [f'ended with {done.returncode}'])[-1]}", flush=True)
                bad += 1
                break
            answers.append(json.loads(done.stdout.splitlines()[-1]))
        else:
            there, here = answers
            alike = sum(a == b for a, b in zip(there["said"], here["said"], strict=True))
            print(f"{folder}: {there['parameters']:,} parameters, {alike} of {PROMPTS} alike", flush=True)
            bad += alike < PROMPTS
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
