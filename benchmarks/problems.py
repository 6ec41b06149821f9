"""Layer problems to compare solvers on: Grams of a model's own traces, in three parts that share no question.

    python benchmarks/problems.py RECIPE OUT.safetensors [--set model=FOLDER] [--blocks 2,25] [--matrices q_proj,...]

For every chosen matrix OUT holds `NAME.weight`, and the Grams `NAME.train` (what a solver sees), `NAME.validation`
(what a choice may be made on) and `NAME.test` (what is reported). The dense model's activations throughout.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from secateurs import ask
from secateurs.calibration import Document, batches, trace_document
from secateurs.dense import Dense
from secateurs.layer import Gram, LayerProblem
from secateurs.models import decoder, decoder_blocks, linears
from secateurs.patterns import Pattern
from secateurs.recipe import load_recipe

PARTS = ("train", "validation", "test")


def split(documents: list[Document], held_out_tokens: int) -> dict[str, list[Document]]:
    """Whole traces: half of the held-out tokens to test, half to validation, the rest to training."""
    parts: dict[str, list[Document]] = {part: [] for part in PARTS}
    total = 0
    for document in documents:
        part = "train" if total >= held_out_tokens else "test" if total < held_out_tokens / 2 else "validation"
        parts[part].append(document)
        total += len(document.ids)
    return parts


@torch.inference_mode()
def grams(model, chosen: dict[str, torch.nn.Linear], documents: list[Document], batch_tokens: int) -> dict[str, Gram]:
    """The Gram of every chosen matrix's inputs over whole documents, padding left out."""
    sums = {name: Gram.zeros(module.in_features) for name, module in chosen.items()}
    for batch in batches(documents, batch_tokens):
        counted = batch.regions.flatten() > 0
        hooks = [
            module.register_forward_pre_hook(
                lambda _, args, name=name, counted=counted: sums[name].update(args[0].flatten(0, -2)[counted])
            )
            for name, module in chosen.items()
        ]
        decoder(model)(input_ids=batch.ids, use_cache=False)
        for hook in hooks:
            hook.remove()
    return sums


def load(path: Path, pattern: Pattern) -> list[tuple[LayerProblem, Gram, Gram]]:
    """Every problem of a file with its validation and test Grams. Weights in float32."""
    tensors = load_file(path)
    names = [key.removesuffix(".weight") for key in tensors if key.endswith(".weight")]

    def gram(name: str, part: str) -> Gram:
        tokens = int(tensors[f"{name}.{part}.tokens"])
        return Gram(tensors[f"{name}.{part}"], float(tokens), tokens)

    return [
        (
            LayerProblem(name=n, weight=tensors[f"{n}.weight"].float(), gram=gram(n, "train"), pattern=pattern),
            gram(n, "validation"),
            gram(n, "test"),
        )
        for n in names
    ]


def main() -> None:
    """Trace, collect, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("out", type=Path)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--blocks", default="2,25")
    parser.add_argument("--matrices", default="q_proj,o_proj,gate_proj,down_proj")
    options = parser.parse_args()
    recipe = load_recipe(options.recipe, options.set)
    dense = Dense(recipe)
    traced = ask.trace(recipe, options.out.with_suffix(""), recipe.seed, dense, lambda *done: print(*done, flush=True))
    print(traced.summary)
    parts = split(
        [trace_document(trace) for trace in (*traced.held_out, *traced.traces)], recipe.calibration.held_out_tokens
    )
    prefix, blocks = decoder_blocks(dense.model)
    chosen = {
        f"{prefix}.{index}.{name}": module
        for index in map(int, options.blocks.split(","))
        for name, module in linears(blocks[index]).items()
        if name.rpartition(".")[2] in options.matrices.split(",")
    }
    tensors = {f"{name}.weight": module.weight.detach() for name, module in chosen.items()}
    for part, documents in parts.items():
        for name, gram in grams(dense.model, chosen, documents, recipe.calibration.batch_tokens).items():
            tensors[f"{name}.{part}"] = gram.xtx
            tensors[f"{name}.{part}.tokens"] = torch.tensor(gram.tokens)
    save_file(tensors, options.out)
    print(f"{len(chosen)} matrices, { ({part: sum(len(d.ids) for d in docs) for part, docs in parts.items()}) } tokens")


if __name__ == "__main__":
    main()
