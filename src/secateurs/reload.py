"""Whether exported models load and say what they said: in a clean process, by transformers alone where they have room.

A model with no room as a whole is read block by block there, as it was pruned.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from secateurs.calibration import Batch
from secateurs.checkpoint import Checkpoint, layout
from secateurs.collect import logits_of
from secateurs.export import PROBE_FILE
from secateurs.parallel import ending
from secateurs.planner import SAFE, available

TRANSFORMERS = """
import inspect, json, sys
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
asked, found = json.loads(sys.stdin.read()), {}
for folder in asked["folders"]:
    options = {"trust_remote_code": asked["trust"]}
    AutoTokenizer.from_pretrained(folder, **options)
    with safe_open(f"{folder}/{asked['probe']}", "pt") as file:
        probe, exported_on = {key: file.get_tensor(key) for key in file.keys()}, (file.metadata() or {}).get("device")
    dtype = probe["computed"].dtype if "computed" in probe else "auto"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, **options).eval()
    try:
        if exported_on == "cuda" and torch.cuda.is_available():
            model.to("cuda")
    except torch.OutOfMemoryError:  # a prune needs a block at a time there, this all of them
        model.to("cpu")
    last = probe["logits"].shape[1]
    few = {"logits_to_keep": last} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with torch.inference_mode():
        logits = model(input_ids=probe["ids"].to(model.device), **few).logits[:, -last:].float().cpu()
    same = exported_on in (None, model.device.type)
    found[folder] = [float((logits - probe["logits"]).abs().max()), float(probe["logits"].abs().max()), same]
    del model
    torch.cuda.empty_cache()
print(json.dumps(found))
"""
BLOCKS = "from secateurs.reload import in_blocks; in_blocks()"


@dataclass(frozen=True)
class Reloaded:
    """How far logits were off at most, relative to the largest; and whether the model was loaded as a whole."""

    off: float
    whole: bool


def verify(
    folders: Sequence[Path], *, trust_remote_code: bool = False, tolerance: float = 1e-2, elsewhere: float = 5e-2
) -> dict[str, Reloaded]:
    """Reload every folder in a clean process and compare logits with those at export.

    With only transformers; those that have no room as a whole, block by block as they were pruned. RuntimeError if one
    does not load or differs by more than `tolerance`; by more than `elsewhere` on another kind of device than it was
    exported on, or where that one has no room for a whole model: bfloat16 is rounded otherwise there (by 1 % after 28
    blocks).
    """
    whole = [folder for folder in folders if _in_memory(folder) <= SAFE * available(torch.device("cpu"))]
    result: dict[str, Reloaded] = {}
    for code, some in ((TRANSFORMERS, whole), (BLOCKS, [folder for folder in folders if folder not in whole])):
        for folder, (difference, size, same) in _asked(code, some, trust_remote_code).items() if some else ():
            if not difference <= (tolerance if same else elsewhere) * size:
                raise RuntimeError(
                    f"{folder}: logits after reloading differ by {difference:.3g} (largest logit {size:.3g})"
                )
            result[folder] = Reloaded(difference / size, whole=code is TRANSFORMERS)
    return result


def _in_memory(folder: Path) -> int:
    """Bytes of all weights of a folder, in what they are computed in."""
    probe, _ = _probe(folder)
    computed = probe["computed"].dtype.itemsize if "computed" in probe else 0
    return sum(max(place.size, prod(place.shape) * computed) for place in layout(folder).values())


def _probe(folder: Path) -> tuple[dict[str, Tensor], str]:
    """What a model said at export, and on what kind of device."""
    with safe_open(folder / PROBE_FILE, "pt") as file:
        device = (file.metadata() or {}).get("device", "cpu")
    return load_file(folder / PROBE_FILE), device


def _asked(code: str, folders: Sequence[Path], trust: bool) -> dict[str, tuple[float, float, bool]]:
    """What a clean process says of some folders: the largest difference, the largest logit, and whether it is on the
    kind of device that they were exported on."""
    asked = json.dumps({"folders": [str(folder) for folder in folders], "probe": PROBE_FILE, "trust": trust})
    done = subprocess.run([sys.executable, "-c", code], input=asked, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        why = said[-1] if said and done.returncode > 0 else f"it ended {ending(done.returncode)}"
        raise RuntimeError(f"the exported model does not load in a clean process, though it is written: {why}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def in_blocks() -> None:
    """What the script above does, in a process of its own too, with one block in memory at a time."""
    asked, found = json.loads(sys.stdin.read()), {}
    for folder in asked["folders"]:
        AutoTokenizer.from_pretrained(folder, trust_remote_code=asked["trust"])
        probe, exported_on = _probe(Path(folder))
        device = exported_on if exported_on == "cpu" or torch.cuda.is_available() else "cpu"
        single = "computed" in probe and probe["computed"].dtype == torch.float32
        computed: Any = "float32" if single else "checkpoint"
        model = Checkpoint(folder, device=device, trust_remote_code=asked["trust"], compute_dtype=computed)
        batch = Batch(probe["ids"], torch.ones_like(probe["ids"]))
        with torch.inference_mode():
            (every,) = logits_of(model.model, [batch], model.opened)
            logits = every[-probe["logits"].shape[1] :][None].float().cpu()
        difference = float((logits - probe["logits"]).abs().max())
        found[folder] = difference, float(probe["logits"].abs().max()), device == exported_on
    print(json.dumps(found))
