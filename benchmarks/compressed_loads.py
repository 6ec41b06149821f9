"""Does transformers say of a folder in compressed-tensors' format what it says of the model that it was made from?

    python benchmarks/compressed_loads.py MODEL COMPRESSED    # in an environment with transformers, compressed-tensors

For a model whose solver rounded it to int4 nothing may differ but by the rounding of float32; head and embeddings stay.
"""

import sys

import torch
from transformers import AutoModelForCausalLM


@torch.inference_mode()
def main() -> None:
    """The largest difference of the logits of 256 random tokens, and whether greedy continuations are the same."""
    logits, replies = [], []
    for folder in sys.argv[1:3]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(2, model.config.vocab_size, (8, 32), generator=draw)
        logits.append(model(ids).logits)
        options = {"do_sample": False, "max_new_tokens": 32, "min_new_tokens": 32, "pad_token_id": 0}
        replies.append(model.generate(ids, attention_mask=torch.ones_like(ids), **options))
    off = float((logits[0] - logits[1]).abs().max() / logits[0].abs().max())
    print(f"logits off by {off:.1e} of the largest; {int((replies[0] == replies[1]).all(1).sum())} of 8 replies alike")


if __name__ == "__main__":
    main()
