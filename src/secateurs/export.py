"""A pruned model as a plain Hugging Face folder that loads everywhere, with a card, a side file and a probe."""

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy
import torch
from jinja2 import Environment, PackageLoader

from secateurs.artifacts import atomic_file, atomic_folder, read_json, write_json
from secateurs.calibration import Batch
from secateurs.checkpoint import INDEX, Checkpoint, save
from secateurs.collect import Logits, Opened, Shell, Stream
from secateurs.models import Matrix, decoder_blocks
from secateurs.trim import Smaller

SIDE_FILE = "secateurs.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")  # of any kind
PROBE_FILE = "secateurs.probe"  # not *.safetensors, though it is one: vLLM and SGLang take all of those for weights
PROBE_TOKENS = 64  # whose logits are kept, after as many as the narrowest attention sees


def export(
    checkpoint: Checkpoint,
    tokenizer: Any,
    selected: Sequence[Sequence[Matrix]],
    opened: Opened,
    out: Path,
    *,
    provenance: Mapping[str, Any],
    layers: Sequence[Mapping[str, Any]],
    probe_ids: Sequence[int],
    smaller: Callable[[Checkpoint, Path], Smaller] | None = None,
) -> None:
    """Write `out`: the checkpoint's own files with exact zeros in them, tokenizer, card; one block at a time.

    `selected` are the matrices of every block, and `opened` gives a block its pruned weights. What was cut is written
    by `smaller` (`trim`), without what went. Otherwise the configuration stays as it is;
    ValueError for one with a sparsity or quantisation entry. `secateurs.json` holds, for every pruned matrix,
    its figures and the sha256 of its mask's bits (row-major, packed eight to a byte), so that anyone can check later
    that the zeros are still where they were; of a cut model, what it has kept. The folder appears whole or not at all.
    """
    model = checkpoint.model
    for key in ("quantization_config", "sparsity_config"):
        if getattr(model.config, key, None) is not None:
            raise ValueError(f"the model's config has a `{key}`; serving engines would refuse the pruned model")
    ids = torch.tensor([list(probe_ids)])
    shell, batch = Shell(model), Batch(ids, torch.ones_like(ids))
    probe = Stream(batch, held_out=True, shell=shell, hidden=shell.enter(batch))
    hashes = {}
    with atomic_folder(out, overwrite=True) as folder, torch.inference_mode():
        trimmer = smaller(checkpoint, folder) if smaller else None
        if trimmer is None:
            checkpoint.copy_to(folder)
        tokenizer.save_pretrained(folder)
        for index, block in enumerate(decoder_blocks(model)[1]):
            with opened(index):
                if trimmer is not None:
                    trimmer.write_block(index)
                else:
                    hashes |= {matrix.name: mask_hash(matrix.weight) for matrix in selected[index]}
                    checkpoint.write_block(index, folder)
                probe.hidden = probe.run(block, index)
        logits = Logits(probe)[-PROBE_TOKENS:][None].float().cpu()
        computed = torch.zeros(0, dtype=checkpoint.dtype)  # its type says what in
        with atomic_file(folder / PROBE_FILE) as file:
            save({"ids": ids, "logits": logits, "computed": computed}, file, {"device": model.device.type})
        side = {
            "schema": "secateurs.model",
            "version": 1,
            "provenance": dict(provenance),
            "layers": [dict(layer) | ({} if trimmer else {"mask_sha256": hashes[layer["name"]]}) for layer in layers],
            "cut": trimmer.close() if trimmer else None,
        }
        write_json(folder / SIDE_FILE, side)
        recipe = json.dumps(side["provenance"], indent=2)
        write_card("model_card.md.j2", checkpoint.folder, folder, side=side, recipe=recipe)


def write_card(template: str, source: Path, out: Path, **facts: Any) -> None:
    """Write the card of a model that was made from the one in `source`, with the licence that this one's names."""
    old = source / "README.md"
    head = re.match(r"---\n(.*?\n)---\n", old.read_text(errors="replace"), re.DOTALL) if old.exists() else None
    licence = "".join(re.findall(r"^license.*\n(?:[ -].*\n)*", head[1], re.MULTILINE)) if head else ""
    card = Environment(loader=PackageLoader("secateurs"), autoescape=False).get_template(template)
    (out / "README.md").write_text(card.render(licence=licence, **facts))


def packed_card(source: Path, out: Path, **facts: Any) -> None:
    """Write the card of a packed model, in the place of the one in `source`."""
    file = source / SIDE_FILE
    write_card("packed_card.md.j2", source, out, side=read_json(file) if file.exists() else {}, **facts)


def mask_hash(weight: torch.Tensor) -> str:
    """sha256 of the kept/zero bits of a weight, row-major, packed eight to a byte."""
    return sha256(numpy.packbits((weight != 0).cpu().numpy()).tobytes()).hexdigest()


def mask_hashes(folder: Path) -> dict[str, str]:
    """Those of a pruned model's masks, by matrix; none without a side file, or for a model that was cut."""
    file = folder / SIDE_FILE
    if not file.exists():
        return {}
    try:
        rows = read_json(file)["layers"]
        return {row["name"]: row["mask_sha256"] for row in rows if "mask_sha256" in row}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a side file as secateurs writes it ({error!r})") from None


def has_moved(masks: Mapping[str, str], name: str, weight: torch.Tensor) -> bool:
    """Whether zeros of a matrix are not where they were when it was pruned, by `mask_hashes`."""
    return name in masks and masks[name] != mask_hash(weight)


def copy_beside(source: Path, out: Path) -> None:
    """Copy what lies beside the weights of a folder (configuration, tokenizer, card), but not the probe of these."""
    for file in source.iterdir():
        if file.is_file() and file.suffix not in WEIGHTS and file.name not in (INDEX, PROBE_FILE):
            shutil.copyfile(file, out / file.name)


def rename_probe(folder: Path) -> None:
    """Of a folder from before 26 November 2026, where its name made engines take it for weights."""
    if (old := folder / "secateurs_probe.safetensors").exists():
        old.rename(folder / PROBE_FILE)
