"""A pruned model as a plain Hugging Face folder that loads everywhere, with a card, a side file and a reload check."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy
import torch
from jinja2 import Environment, PackageLoader

from secateurs.artifacts import atomic_file, atomic_folder, write_json
from secateurs.calibration import Batch
from secateurs.checkpoint import INDEX, Checkpoint, save
from secateurs.collect import Opened, Shell, Stream
from secateurs.models import Matrix, decoder_blocks
from secateurs.trim import Smaller

SIDE_FILE = "secateurs.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")  # of any kind
PROBE_FILE = "secateurs.probe"  # not *.safetensors, though it is one: vLLM and SGLang take all of those for weights

RELOAD = """
import json, sys
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
worst = {}
for folder, probe_file in json.loads(sys.stdin.read()).items():
    AutoTokenizer.from_pretrained(folder)
    with safe_open(probe_file, "pt") as file:
        probe, exported_on = {key: file.get_tensor(key) for key in file.keys()}, (file.metadata() or {}).get("device")
    dtype = probe["computed"].dtype if "computed" in probe else "auto"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True).eval()
    try:
        if exported_on == "cuda" and torch.cuda.is_available():
            model.to("cuda")
    except torch.OutOfMemoryError:  # a prune needs a block at a time there, this all of them
        model.to("cpu")
    with torch.inference_mode():
        logits = model(input_ids=probe["ids"].to(model.device)).logits.float().cpu()
    same = exported_on in (None, model.device.type)
    worst[folder] = [float((logits - probe["logits"]).abs().max()), float(probe["logits"].abs().max()), same]
    del model
    torch.cuda.empty_cache()
print(json.dumps(worst))
"""


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
        logits = shell.leave(batch, probe.hidden, logits=True).float().cpu()
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
        card = Environment(loader=PackageLoader("secateurs"), autoescape=False).get_template("model_card.md.j2")
        (folder / "README.md").write_text(card.render(side=side, recipe=json.dumps(side["provenance"], indent=2)))


def mask_hash(weight: torch.Tensor) -> str:
    """sha256 of the kept/zero bits of a weight, row-major, packed eight to a byte."""
    return sha256(numpy.packbits((weight != 0).cpu().numpy()).tobytes()).hexdigest()


def copy_beside(source: Path, out: Path) -> None:
    """Copy what lies beside the weights of a folder (configuration, tokenizer, card), but not the probe of these."""
    for file in source.iterdir():
        if file.is_file() and file.suffix not in WEIGHTS and file.name not in (INDEX, PROBE_FILE):
            shutil.copyfile(file, out / file.name)


def rename_probe(folder: Path) -> None:
    """Of a folder from before 26 November 2026, where its name made engines take it for weights."""
    if (old := folder / "secateurs_probe.safetensors").exists():
        old.rename(folder / PROBE_FILE)


def verify(folders: Sequence[Path], tolerance: float = 1e-2, elsewhere: float = 5e-2) -> dict[str, float]:
    """Reload every folder with only transformers in one clean process and compare logits with those at export.

    Returns the largest difference relative to the largest logit, by folder. RuntimeError if one does not load or
    differs by more than `tolerance`; by more than `elsewhere` on another kind of device than it was exported on, or
    where that one has no room for a whole model: bfloat16 is rounded otherwise there (by 1 % after 28 blocks).
    """
    command, asked = [sys.executable, "-c", RELOAD], json.dumps({str(one): str(one / PROBE_FILE) for one in folders})
    done = subprocess.run(command, input=asked, capture_output=True, text=True)
    if done.returncode:
        code, said = done.returncode, done.stderr.strip().splitlines()
        ended = f"it ended with {code}" if code > 0 else f"it ended by signal {-code}, perhaps for want of memory"
        why = said[-1] if said and code > 0 else ended
        raise RuntimeError(f"the exported model does not load in a clean process, though it is written: {why}")
    result = {}
    for folder, (difference, size, same) in json.loads(done.stdout.strip().splitlines()[-1]).items():
        result[folder] = difference / size
        if not difference <= (tolerance if same else elsewhere) * size:
            raise RuntimeError(
                f"{folder}: logits after reloading differ by {difference:.3g} (largest logit {size:.3g})"
            )
    return result
