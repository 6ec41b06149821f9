"""Does vLLM load a pruned folder, and say what transformers says? In an environment of vLLM's own, which has both.

    python benchmarks/vllm_loads.py FOLDER...     # greedy continuations of eight prompts, in float32, token by token

A line a folder: how many of the tokens are equal until the first that differs, or why vLLM refuses it.
"""

import json
import subprocess
import sys

PROMPTS, LENGTH, TOKENS = 8, 24, 32


def compare(folder: str) -> dict[str, object]:
    """Of PROMPTS random prompts, those continued alike, and the tokens that are equal up to the first difference."""
    import torch
    from transformers import AutoModelForCausalLM
    from vllm import LLM, SamplingParams

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(2, model.config.vocab_size, (PROMPTS, LENGTH), generator=draw)
    options = {"do_sample": False, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "pad_token_id": 0}
    ours = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)[:, LENGTH:].tolist()
    engine = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=256)
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, min_tokens=TOKENS, detokenize=False)
    asked = [{"prompt_token_ids": row} for row in prompts.tolist()]
    theirs = [list(each.outputs[0].token_ids) for each in engine.generate(asked, sampling)]
    equal = [
        next((i for i in range(TOKENS) if our[i] != their[i]), TOKENS) for our, their in zip(ours, theirs, strict=True)
    ]
    return {"alike": equal.count(TOKENS), "prompts": PROMPTS, "equal": sum(equal), "tokens": PROMPTS * TOKENS}


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print("\n" + json.dumps(compare(sys.argv[2])))
        return
    for folder in sys.argv[1:]:
        done = subprocess.run([sys.executable, __file__, "--one", folder], capture_output=True, text=True)
        lines = (done.stdout + done.stderr).splitlines()
        wanted = [line for line in lines if ("Error: " in line if done.returncode else line.startswith('{"alike"'))]
        print(folder, wanted[0] if wanted else f"ended with {done.returncode}", flush=True)


if __name__ == "__main__":
    main()
