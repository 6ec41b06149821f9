"""A checkpoint on disk whose decoder blocks are read when their turn comes, and written over in a copy of its files.

Whatever the size of the model, what is held is one block and what lies around the blocks; on a CPU without embeddings
and head, which stay in their files. transformers' own loader maps names and packs experts, here as in
`from_pretrained`, so that the two agree to the bit.
"""

import ctypes
import json
import shutil
import struct
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from secateurs.linalg import all_finite
from secateurs.models import cannot_be_loaded, check_folder, decoder_blocks, model_path, name_of

ComputeDtype = Literal["auto", "checkpoint", "float32"]
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD = 2 * 10**9  # bytes of a file that is written, about
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Extent:
    """Where a tensor's bytes are in a file, from `start` on."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class Checkpoint:
    """The causal language model `name`, of which only one block at a time is held: `with checkpoint.opened(3): ...`.

    `compute_dtype` is what `model` computes in: "checkpoint", as it is stored; "float32"; or "auto", the faster one.
    `dtype` says which that is (`model.dtype` may be that of embeddings which are left in their file), `declared` what
    config.json says, and `stored` what weights are rounded to when they are written: that, or the type of the files'
    matrices if it is smaller.
    ValueError in one sentence for a missing folder, a damaged checkpoint or a quantised one.
    """

    def __init__(
        self,
        name: str,
        *,
        device: str = "cpu",
        trust_remote_code: bool = False,
        compute_dtype: ComputeDtype = "checkpoint",
    ):
        self.name, self.device = name, torch.device(device)
        self.trust_remote_code = trust_remote_code
        self._check(model_path(name))
        try:
            self.folder = self._fetched()
            self.places = self._layout()
            config: Any = AutoConfig.from_pretrained(self.folder, trust_remote_code=trust_remote_code)
            known = [DTYPES[place.dtype] for place in self.places.values() if place.dtype in DTYPES]
            self.declared: torch.dtype = config.dtype or known[0]
            self.dtype = faster(self.declared, self.device, compute_dtype)
            self.model = self._empty_model(config, self.dtype)
            self.prefix, self.blocks = decoder_blocks(self.model)
            self._sound: set[int] = set()  # blocks whose weights were seen to be finite
            self._mapping: list[Any] = list(get_model_conversion_mapping(self.model))
            self.names = self._names_in_model()
            inner = [self.places[key] for key, name in self.names.items() if name.startswith(f"{self.prefix}.")]
            matrices = [DTYPES[one.dtype] for one in inner if len(one.shape) > 1 and one.dtype in DTYPES]
            self.stored = min([self.declared, *matrices], key=lambda dtype: dtype.itemsize)
            inside = (name for name in self.model.state_dict() if name.startswith(f"{self.prefix}."))
            if absent := set(inside) - set(self.names.values()):
                raise ValueError(f"the checkpoint has no {min(absent)}")
            numbers = dict(self.model.named_parameters())
            if odd := [k for k, name in self.names.items() if name in numbers and self.places[k].dtype not in DTYPES]:
                raise ValueError(f"{odd[0]} is quantised ({self.places[odd[0]].dtype}): use the original")
            self._check_tied()
            tables = self._tables() if self.device.type == "cpu" else {}
            self.in_file = frozenset([self.names[key] for key in tables] + self._mapped())
            """Names of parameters that stay in their files, and take no memory but for what is changed in them."""
            around = [key for key, name in self.names.items() if not name.startswith(f"{self.prefix}.")]
            self._fill([key for key in around if key not in tables])
            for key, module in tables.items():
                self._leave_in_file(key, module)
            self._fill_buffers()
        except Exception as error:  # transformers, safetensors and the hub raise many types for the same user mistake
            raise cannot_be_loaded(f"model `{name}`", error) from error

    @contextmanager
    def opened(self, index: int) -> Iterator[None]:
        """While open, block `index` of `model` has its weights; before and after they are on the meta device."""
        block, prefix = self.blocks[index], f"{self.prefix}.{index}."
        self._fill([key for key, name in self.names.items() if name.startswith(prefix)])
        if absent := [name for name, tensor in block.state_dict().items() if tensor.is_meta]:  # an expert of several
            raise ValueError(f"model `{self.name}`: the checkpoint has no whole {prefix}{absent[0]}")
        if index not in self._sound:
            for name, weight in block.named_parameters():
                if weight.is_floating_point() and not all_finite(weight):
                    raise ValueError(f"model `{self.name}`: {prefix}{name} holds numbers that are not finite")
            self._sound.add(index)
        try:
            yield
        finally:
            for module in block.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    empty = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
                    setattr(module, name, empty)
                for name, buffer in module.named_buffers(recurse=False):
                    if name not in module._non_persistent_buffers_set:
                        setattr(module, name, buffer.to("meta"))
            give_back(self.device)

    def copy_to(self, folder: Path) -> None:
        """Copy the files that hold weights as they are, and the configuration."""
        files = {place.file for place in self.places.values()}
        for file in files if SINGLE in files else files | {INDEX}:  # beside a single file nothing reads an index
            shutil.copyfile(self.folder / file, folder / file)
        self.copy_settings(folder)

    def copy_settings(self, folder: Path) -> None:
        """Copy the configuration, and the code of a model that brings its own."""
        for name in ("config.json", "generation_config.json", *(file.name for file in self.folder.glob("*.py"))):
            if (self.folder / name).exists():
                shutil.copyfile(self.folder / name, folder / name)

    def write_block(self, index: int, folder: Path) -> None:
        """Put the weights that block `index` has now, while it is open, in their places in a copy of the files."""
        self._write(self.block_weights(index), folder)

    def write_head(self, folder: Path) -> None:
        """Put the weights that the head has now in their place in a copy of the files. It must not be tied."""
        head: Any = self.model.get_output_embeddings()
        weight = f"{name_of(self.model, head)}.weight"
        key = next(key for key, name in self.names.items() if name == weight)
        self._write({key: head.weight.to("cpu", DTYPES[self.places[key].dtype]).contiguous()}, folder)

    def _write(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        for key, data in weights.items():
            place = self.places[key]
            if tuple(data.shape) != place.shape or data.nbytes != place.size:
                raise RuntimeError(f"{key} is {tuple(data.shape)} now, and was {place.shape} in {place.file}")
            with (folder / place.file).open("r+b") as file:
                file.seek(place.start)
                file.write(data.view(-1).view(torch.uint8).numpy().data)

    def block_weights(self, index: int) -> dict[str, Tensor]:
        """The weights that block `index` has now, while it is open, under the names and types of its files."""
        weights = {f"{self.prefix}.{index}.{name}": value for name, value in self.blocks[index].state_dict().items()}
        return {
            key: tensor.to("cpu", DTYPES.get(self.places[key].dtype, tensor.dtype)).contiguous()
            for key, tensor in revert_weight_conversion(self.model, weights).items()
        }

    def around(self) -> Iterator[tuple[str, Tensor]]:
        """What lies around the blocks, under the names and types of its files."""
        for key, name in self.names.items():
            if not name.startswith(f"{self.prefix}."):
                yield key, self._tensor(key)

    def unused(self) -> Iterator[tuple[str, Tensor]]:
        """What the files hold for other parts than the text model, as a vision tower; but not what guesses tokens
        ahead, made of blocks like those that are cut: `mtp`, or more blocks in the same list."""
        inside = f"{self.prefix}.0."
        lists = {key.partition(".0.")[0] + "." for key, name in self.names.items() if name.startswith(inside)}
        for key in self.places:
            if key not in self.names and "mtp" not in key.split(".") and not key.startswith(tuple(lists)):
                yield key, self._tensor(key)

    def _fetched(self) -> Path:
        """The checkpoint's folder; of a hub id, the local copy of its files."""
        path = Path(model_path(self.name))
        if path.is_dir():
            return path
        wanted = ["*.safetensors", "*.json", *(["*.py"] if self.trust_remote_code else [])]
        fetched = snapshot_download(self.name, allow_patterns=wanted)
        self._check(fetched)
        return Path(fetched)

    def _check(self, path: str) -> None:
        """ValueError for what is no checkpoint, or none of dense weights."""
        check_folder(self.name, path)

    def _layout(self) -> Mapping[str, Extent]:
        return layout(self.folder)

    def _source(self, key: str, file: Any) -> Any:
        """What a tensor is read from when it is needed: a part of its file, which is open."""
        return file.get_slice(key)

    def _empty_model(self, config: Any, dtype: torch.dtype) -> PreTrainedModel:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=self.trust_remote_code)
        if (self.folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(self.folder)
        return model.eval()

    def _names_in_model(self) -> dict[str, str]:
        """Where each tensor of the checkpoint goes in the model: its name there, or one of them where it is packed."""
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        prefix, state = self.model.base_model_prefix, self.model.state_dict()
        names = {}
        for key in self.places:
            name, _ = rename_source_key(key, renamings, converters, prefix, state)
            if name not in state and key in state:
                name, _ = rename_source_key(key, [], [], prefix, state)
            if name in state:
                names[key] = name
        return names

    def _check_tied(self) -> None:
        """ValueError if the configuration ties embeddings and head, and the files hold two that differ."""
        config: Any = self.model.config.get_text_config(decoder=True)
        tied = list(self._ends())
        if (
            getattr(config, "tie_word_embeddings", False)
            and len(tied) == 2
            and not torch.equal(*map(self._tensor, tied))
        ):
            raise ValueError(f"config.json ties {' and '.join(tied)}, which differ: set tie_word_embeddings to false")

    def _fill(self, keys: Sequence[str]) -> None:
        """Read some tensors into the model. ValueError if one does not fit."""
        dtype: Any = self.dtype
        config = LoadStateDictConfig(
            device_map={"": self.device},
            dtype=dtype,
            dtype_plan=self.model._get_dtype_plan(dtype),
            weight_mapping=self._mapping,
        )
        with ExitStack() as stack, _quiet():
            files = {
                file: stack.enter_context(safe_open(self.folder / file, framework="pt"))
                for file in {self.places[key].file for key in keys}
            }
            slices = {key: self._source(key, files[self.places[key].file]) for key in keys}
            info, _ = convert_and_load_state_dict_in_model(self.model, slices, config)
        if info.mismatched_keys:
            raise _misfit(*min(info.mismatched_keys))
        if info.conversion_errors:
            name, reason = next(iter(info.conversion_errors.items()))  # a traceback, whose other lines are indented
            said = " ".join(line for line in reason.splitlines()[1:] if line and not line[0].isspace())
            raise ValueError(f"{name} cannot be put together from the checkpoint's tensors: {said[:300]}")

    def _tables(self) -> dict[str, Any]:
        """Embeddings and head, by key, as far as the checkpoint has a tensor of its type for each."""
        return {key: end for key, end in self._ends().items() if DTYPES.get(self.places[key].dtype) == self.stored}

    def _mapped(self) -> list[str]:
        """Parameters of blocks that are read as they lie in their files, which a CPU leaves to the system's pages."""
        if self.device.type != "cpu":
            return []
        numbers, made_of = dict(self.model.named_parameters()), Counter(self.names.values())
        return [
            name
            for key, name in self.names.items()
            if name.startswith(f"{self.prefix}.") and made_of[name] == 1 and name in numbers
            if DTYPES.get(self.places[key].dtype) == self.dtype and self.places[key].shape == numbers[name].shape
        ]

    def _ends(self) -> dict[str, Any]:
        """Embeddings and head, by key, as far as the checkpoint has a tensor for each."""
        modules = [module for module in _ends(self.model) if module is not None]
        by_name = {f"{name_of(self.model, module)}.weight": module for module in modules}
        return {key: by_name[name] for key, name in self.names.items() if name in by_name}

    def _tensor(self, key: str) -> Tensor:
        """As it is stored."""
        with safe_open(self.folder / self.places[key].file, framework="pt") as file:
            return file.get_tensor(key)

    def _leave_in_file(self, key: str, module: nn.Module) -> None:
        """Map a table's tensor from its file, as it is stored there. ValueError if it does not fit."""
        stored = self._tensor(key)
        empty: Any = module.weight
        if stored.shape != empty.shape:
            raise _misfit(self.names[key], stored.shape, empty.shape)
        module.weight = nn.Parameter(stored, requires_grad=False)

    def _fill_buffers(self) -> None:
        """Compute what no checkpoint holds (rotary frequencies), tie what is tied, and check that nothing is left."""
        model = self.model
        compute_buffers(model, self.device)
        model.tie_weights()
        mapped = {model.get_parameter(name) for name in self.in_file}
        for module in _ends(model):
            if getattr(module, "weight", None) in mapped and self.stored != self.dtype:
                _compute_in(self.dtype, module)
        around = (item for item in model.state_dict().items() if not item[0].startswith(f"{self.prefix}."))
        if absent := [name for name, tensor in around if tensor.is_meta]:
            raise ValueError(f"the checkpoint has no {absent[0]}")


def _ends(model: PreTrainedModel) -> tuple[Any, Any]:
    """Embeddings and head."""
    return model.get_input_embeddings(), model.get_output_embeddings()


def _misfit(name: str, found: Sequence[int], wanted: Sequence[int]) -> ValueError:
    return ValueError(f"{name} is {tuple(found)} in the checkpoint, and {tuple(wanted)} in the model")


def compute_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute the buffers of a model built on the meta device that no checkpoint holds (rotary frequencies)."""
    for name, buffer in model.named_non_persistent_buffers():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, torch.empty_like(buffer, device=device))
    for tensor in (*model.parameters(), *(b for _, b in model.named_buffers() if b.is_meta)):
        tensor._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue] # so buffers only are computed
    model.initialize_weights()


def give_back(device: torch.device) -> None:
    """Return memory that work on a CPU has freed to the system, where the C library keeps it otherwise (glibc)."""
    if device.type != "cpu":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _compute_in(dtype: torch.dtype, table: Any) -> None:
    """Let embeddings or a head compute in `dtype` on a weight that is left as it is: of embeddings, the rows in use."""

    def forward(x: Tensor) -> Tensor:
        inner, weight = copy(table), table.weight
        if isinstance(table, nn.Embedding):
            inner.padding_idx = None  # it is for gradients, and numbers a row of the whole table
            used, x = x.unique(return_inverse=True)
            weight = weight[used]
        else:
            x = x.to(dtype)  # some models hand states over in the type of the head
        inner._parameters = table._parameters | {"weight": weight.to(dtype)}
        return type(table).forward(inner, x)

    table.forward = forward


class Shards:
    """Writes tensors to the safetensors files of a folder as they come, and an index if there is more than one."""

    def __init__(self, folder: Path, stem: str) -> None:
        self.folder, self.stem = folder, stem
        self._open: dict[str, Tensor] = {}
        self._done: list[list[str]] = []

    def add(self, key: str, tensor: Tensor) -> None:
        """Another tensor; a file is written whenever there is enough for one."""
        self._open[key] = tensor
        if sum(one.nbytes for one in self._open.values()) >= SHARD:
            self._flush()

    def close(self) -> None:
        """Write the last file, and name them all."""
        self._flush()
        count = len(self._done)
        names = [f"{self.stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        names = [f"{self.stem}.safetensors"] if count == 1 else names
        for number, name in enumerate(names):
            self._part(number).rename(self.folder / name).chmod(0o644)
        if count > 1:
            where = {key: name for name, keys in zip(names, self._done, strict=True) for key in keys}
            size = sum((self.folder / name).stat().st_size for name in names)
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
            (self.folder / f"{self.stem}.safetensors.index.json").write_text(json.dumps(index, indent=2))

    def _flush(self) -> None:
        if self._open:
            save(self._open, self._part(len(self._done)), {"format": "pt"})
            self._done.append(list(self._open))
            self._open = {}

    def _part(self, number: int) -> Path:
        return self.folder / f"{self.stem}-part-{number}"


def faster(stored: torch.dtype, device: torch.device, wanted: ComputeDtype) -> torch.dtype:
    """What to compute in. A CPU without units for 16 bits takes several times as long with them as with float32."""
    if wanted == "float32":
        return torch.float32
    if wanted == "checkpoint" or device.type != "cpu" or stored not in (torch.bfloat16, torch.float16):
        return stored
    ending = "bf16" if stored == torch.bfloat16 else "fp16"
    units = any(found is True and name.endswith(ending) for name, found in torch.cpu.get_capabilities().items())
    return stored if units else torch.float32


def save(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file. OSError if the disk is full, say, of which that library has an error of its own."""
    try:
        save_file(tensors, file, metadata)
    except SafetensorError as error:
        raise OSError(f"{file.parent}: {error}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """No bar of transformers' own for every block."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def layout(folder: Path) -> Mapping[str, Extent]:
    """Where every tensor of a checkpoint is, from its index and the heads of its safetensors files.

    A head is its length in 8 bytes, little-endian, then JSON: dtype, shape and offsets of every tensor.
    ValueError if there are no safetensors files, an index names one that is not there, or a tensor is there twice.
    """
    places: dict[str, Extent] = {}
    for name in weight_files(folder):
        file = folder / name
        with safe_open(file, framework="pt"):
            pass  # it checks that the head is sound and the file complete
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            head = json.loads(opened.read(length))
        for key, entry in head.items():
            if key in places:  # which of them is read depends on the reader
                raise ValueError(f"{key} is in {places[key].file} and in {name}: take it out of one of them")
            if key != "__metadata__":
                start, end = entry["data_offsets"]
                places[key] = Extent(name, entry["dtype"], tuple(entry["shape"]), 8 + length + start, end - start)
    return places


def weight_files(folder: Path, stem: str = "model") -> list[str]:
    """The safetensors files of a folder: one, or, as transformers has it, else what its index names. ValueError if one
    is not there."""
    index, names = folder / f"{stem}.safetensors.index.json", [f"{stem}.safetensors"]
    if index.exists() and not (folder / names[0]).exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{index} is not an index of safetensors files ({error!r})") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"there is no {name} in {folder}; secateurs reads safetensors only")
    return names
