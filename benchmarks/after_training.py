"""What becomes of a pruned model's zeros in transformers' Trainer, and in a LoRA that peft trains and merges?

    python benchmarks/after_training.py PRUNED OUT [--steps 20]    # in an environment that has accelerate and peft too

A row a way: zeros that were lost, as `secateurs mask check` counts them, and after `secateurs mask apply`; the loss of
the first and the last batch. It trains on random tokens, so a loss says only that weights moved.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from secateurs.masks import KeepZeros, apply, check


def train(pruned: str, way: str, steps: int, out: Path) -> tuple[float, float]:
    """Train `pruned` one way, write what comes of it to `out`, and return the first loss and the last."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)
    ids = torch.randint(2, model.config.vocab_size, (8, 64))
    rows = [{"input_ids": row, "labels": row} for row in ids] * steps
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear")) if way == "LoRA, merged" else None
    how = TrainingArguments(
        output_dir=str(out / "trainer"), max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-3,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    keep = [KeepZeros()] if way == "whole model, KeepZeros" else None
    trainer = Trainer(model=adapted or model, args=how, train_dataset=rows, callbacks=keep)
    trainer.train()
    (adapted.merge_and_unload() if adapted else model).save_pretrained(out)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses[0], losses[-1]


def main() -> None:
    """A table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pruned")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    options.out.mkdir(parents=True)  # what is there already would be refused after all the training
    table = ["| trained | loss | zeros | lost | lost after `mask apply` |", "| --- | --- | --- | --- | --- |"]
    for way in ("whole model", "whole model, KeepZeros", "LoRA, merged"):
        tuned, mended = (options.out / f"{way.replace(', ', '-').replace(' ', '-')}{end}" for end in ("", "-mended"))
        first, last = train(options.pruned, way, options.steps, tuned)
        found = check(str(tuned), options.pruned)
        apply(str(tuned), options.pruned, mended)
        lost, after = (sum(one.lost or 0 for one in each) for each in (found, check(str(mended), options.pruned)))
        zeros = sum(one.zeros for one in found)
        table.append(f"| {way} | {first:.2f}, {last:.2f} | {zeros:,} | {lost:,} | {after:,} |")
    print("\n".join(table))


if __name__ == "__main__":
    main()
