"""A narrower residual stream: its main directions, a model that has only those, and weights that make up for the rest.

A stream h of d_model numbers becomes Qᵀh, with the k directions Q in which the normalised stream has most energy on the
calibration tokens. RMS norms do not mind a rotation once their weights are folded into the matrices that read them
(SliceGPT, Ashkboos et al. 2024, arXiv 2401.15024); one rotation for all blocks leaves nothing between them, so the
result is a plain configuration. Then each matrix is fitted again, block by block, to what the dense model does.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from secrets import token_hex
from time import perf_counter
from typing import Any, cast

import torch
from jaxtyping import Float32
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateurs.artifacts import atomic_folder, atomic_write
from secateurs.calibration import CalibrationSet, worth
from secateurs.checkpoint import Checkpoint, Shards
from secateurs.collect import Enough, Place, Stream, added, capture, matrices_of
from secateurs.cuts import STAGES, Anatomy, Hidden, anatomy
from secateurs.goals import Drift, Imitation, imitate
from secateurs.layer import Gram, Outcome
from secateurs.models import Matrix, decoder, name_of
from secateurs.pruner import LayerResult, is_saved, load_block, save_block
from secateurs.ranks import ALONE, Ranks

SIGN = "sign"
READERS = dict.fromkeys(STAGES[0], "input_layernorm") | dict.fromkeys(STAGES[2], "post_attention_layernorm")
WRITERS = (*STAGES[1], *STAGES[3])


@dataclass(frozen=True)
class Narrowing:
    """How a narrower stream is made: projected only, or fitted to the dense model's outputs and stream too."""

    refit: bool


NARROWINGS: dict[str, Callable[..., Narrowing]] = {
    "pca": partial(Narrowing, refit=False),
    "pca+refit": partial(Narrowing, refit=True),
}


@dataclass(frozen=True)
class Narrowed:
    """A narrower model on disk, whose blocks have what was found for them while `opened`."""

    checkpoint: Checkpoint
    selected: list[list[Matrix]]
    results: list[LayerResult]
    lift: Float32[Tensor, "d_model k"]
    """Times its final hidden states: the dense model's, as near as they can be had. In its head already."""


@torch.no_grad()
def narrow(
    dense: Checkpoint,
    calibration: CalibrationSet,
    cut: Hidden,
    how: Narrowing,
    folder: Path,
    *,
    batch_tokens: int = 2048,
    place: Place = lambda hidden: hidden,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    ranks: Ranks = ALONE,
) -> Narrowed:
    """Write the narrower model to `folder`: `projected`, a checkpoint, and `blocks`, the weights found for each block.

    Called again, it goes on after the last block. Memory: embeddings and heads, a block and the hidden states of both
    models, and what the block's matrices give for one batch. ValueError for a stream that cannot be narrowed
    (`cuts.Hidden`). All `ranks` call this together, each for its share of the tokens, and read what the first one
    writes: RuntimeError for a folder that not all of them see.
    """
    body, projected = anatomy(dense.model), folder / "projected"
    sign = ranks.decide(partial(_put_sign, folder))
    ranks.together(partial(_see_sign, folder, sign))
    ranks.decide((folder / SIGN).unlink)
    directions = _directions(dense, calibration, folder / "directions.safetensors", batch_tokens, place, ranks)
    basis = directions[:, : cut.kept(body)].to(dense.device)
    ranks.decide(lambda: projected.exists() or _project(dense, body, basis, projected))
    ranks.together(partial(_must_be_there, projected))
    computes = "float32" if dense.dtype == torch.float32 else "checkpoint"
    small = Checkpoint(
        str(projected), device=str(dense.device), compute_dtype=computes,
        trust_remote_code=dense.trust_remote_code,
    )  # fmt: skip
    selected = [list(matrices_of(block, f"{small.prefix}.{index}")) for index, block in enumerate(small.blocks)]
    saved, results = folder / "blocks", list[LayerResult]()
    last = folder / "lift.safetensors"
    there = ranks.tell([is_saved(saved, index) for index in range(len(selected))])
    complete = ranks.decide(last.exists) and all(there)
    pairs = [] if complete else _pairs(dense, small, calibration, batch_tokens, place, ranks)
    fit = _Fit(basis, str(cut), how.refit, dense.stored, calibration.weights, pairs, ranks)
    for index, (old, new) in enumerate(zip(dense.blocks, small.blocks, strict=True)):
        found = ranks.together(partial(_load, saved, index, selected[index])) if there[index] else None
        with nullcontext() if complete else dense.opened(index), nullcontext() if complete else small.opened(index):
            if found is None:
                done = fit.block(old, new, index, selected[index])
                save_block(saved, index, selected[index], done, dense.stored, ranks)
            else:
                weights, done = found
                for matrix in () if complete else selected[index]:
                    matrix.weight.copy_(weights[matrix.name])
            for pair in pairs:
                for stream, block in ((pair.dense, old), (pair.small, new)):
                    stream.hidden.copy_(stream.run(block, index))
        results += done
        progress(index + 1, len(selected), f"block {index + 1} of {len(selected)}")
    if not complete:
        every = torch.eye(body.d_model, device=dense.device)
        fit.lift(_folded(every, _last_norm(dense.model).weight, basis), last)
    lift = ranks.together(lambda: load_file(last)["lift"])
    heads: Any = [one.model.get_output_embeddings() for one in (small, dense)]
    heads[0].weight.copy_((heads[1].weight.float() @ lift.to(dense.device)).to(dense.stored))
    return Narrowed(small, selected, results, lift)


def _put_sign(folder: Path) -> str:
    """Something that was not in the folder before, for all processes to find there."""
    sign = token_hex(8)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SIGN).write_text(sign)
    return sign


def _see_sign(folder: Path, sign: str) -> None:
    if not (folder / SIGN).exists() or (folder / SIGN).read_text() != sign:
        raise ValueError(
            f"{folder} is not there on every machine: a narrower stream needs a folder that all processes see"
        )


def _must_be_there(path: Path) -> None:
    if not path.exists():
        raise ValueError(f"{path} cannot be seen by every process")


def _load(saved: Path, index: int, matrices: Sequence[Matrix]) -> tuple[dict[str, Tensor], list[LayerResult]]:
    found = load_block(saved, index, matrices)
    if found is None:
        raise ValueError(f"block {index} in {saved} cannot be seen by every process")
    return found


def _directions(
    dense: Checkpoint, calibration: CalibrationSet, file: Path, batch_tokens: int, place: Place, ranks: Ranks
) -> Float32[Tensor, "d_model d_model"]:
    """The principal directions of what the norms of the dense model give without their weights, the largest first."""
    if not ranks.decide(file.exists):
        streams = capture(dense.model, replace(calibration, held_out=()), batch_tokens, place=place, ranks=ranks)
        moments = Gram.zeros(len(_last_norm(dense.model).weight), dense.device)

        def add(stream: Stream, hidden: Tensor) -> None:
            unit = nn.functional.normalize(hidden.to(dense.device).float(), dim=-1)
            moments.update(unit, worth(stream.batch.regions, calibration.weights).to(dense.device))

        for index, block in enumerate(dense.blocks):
            with dense.opened(index):
                for stream in streams:
                    add(stream, stream.hidden)
                    watched = _watch(block, index, stream)
                    add(stream, watched.between)
                    stream.hidden.copy_(watched.after)
        for stream in streams:
            add(stream, stream.hidden)
        moments = added(moments, ranks, 0)

        def write() -> None:
            vectors = torch.linalg.eigh(moments.xtx.double())[1].flip(1)
            atomic_write(file, save({"directions": vectors.float().cpu().contiguous()}))

        ranks.decide(write)
    return ranks.together(lambda: load_file(file)["directions"])


def _folded(weight: Tensor, norm: Tensor, basis: Tensor) -> Float32[Tensor, "d_out k"]:
    """A matrix that reads a norm's output, for the narrower stream and a norm without weights over fewer numbers."""
    d, k = basis.shape
    return (weight.float() * norm.float()) @ basis * (d / k) ** 0.5


def _project(dense: Checkpoint, body: Anatomy, basis: Tensor, out: Path) -> None:
    """Write the model with its stream in other directions, and only some of them: exact, if they are all there.

    With a head of its own, as embeddings have no norm's weights in them.
    """
    model: Any = dense.model
    norm, head = _last_norm(model).weight, model.get_output_embeddings().weight
    around = {
        f"{name_of(model, model.get_input_embeddings())}.weight": model.get_input_embeddings().weight.float() @ basis,
        f"{name_of(model, _last_norm(model))}.weight": torch.ones(basis.shape[1]),
        f"{name_of(model, model.get_output_embeddings())}.weight": _folded(head, norm, basis),
    }
    with atomic_folder(out) as folder:
        files = Shards(folder, "model")
        for name, tensor in around.items():
            files.add(name, tensor.to("cpu", dense.stored).contiguous())
        for index in range(body.blocks):
            with dense.opened(index):
                weights = dict(dense.blocks[index].state_dict())
            for name, tensor in weights.items():
                part, kind = name.rsplit(".", 1)
                if part in READERS and kind == "weight":
                    tensor = _folded(tensor, weights[f"{READERS[part]}.weight"], basis)
                elif part in WRITERS:
                    tensor = basis.T @ tensor.float()
                elif part in READERS.values():
                    tensor = torch.ones(basis.shape[1])
                files.add(f"{dense.prefix}.{index}.{name}", tensor.to("cpu", dense.stored).contiguous())
        files.close()
        dense.copy_settings(folder)
        config = json.loads((folder / "config.json").read_text())
        config |= {"hidden_size": basis.shape[1], "head_dim": body.head_dim, "tie_word_embeddings": False}
        (folder / "config.json").write_text(json.dumps(config, indent=2))


@dataclass(frozen=True)
class _Pair:
    """The same documents on their way through both models."""

    dense: Stream
    small: Stream


def _pairs(
    dense: Checkpoint, small: Checkpoint, calibration: CalibrationSet, batch_tokens: int, place: Place, ranks: Ranks
) -> list[_Pair]:
    streams = (capture(one.model, calibration, batch_tokens, place=place, ranks=ranks) for one in (dense, small))
    return [_Pair(*both) for both in zip(*streams, strict=True)]


@dataclass
class _Watched:
    """A block at work on a batch: what some of its linears receive and give (without bias), the stream between its
    attention and its MLP, and after it."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    between: Tensor
    after: Tensor


def _watch(block: nn.Module, index: int, stream: Stream, stage: Sequence[str] = ()) -> _Watched:
    """The block runs as far as is needed to see a stage's linears, and what those that write are to give."""
    seen = _Watched({}, {}, torch.empty(0), torch.empty(0))

    def note(part: str) -> Callable[..., None]:
        def hook(linear: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
            seen.inputs[part], seen.outputs[part] = args[0], out if linear.bias is None else out - linear.bias
            if stage[0] in READERS and len(seen.outputs) == len(stage):
                raise Enough

        return hook

    def note_between(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.between = args[0]
        if stage == STAGES[1]:
            raise Enough

    with ExitStack() as stack, suppress(Enough):
        for part in stage:
            stack.callback(block.get_submodule(part).register_forward_hook(note(part)).remove)
        norm = block.get_submodule("post_attention_layernorm")
        stack.callback(norm.register_forward_pre_hook(note_between).remove)
        seen.after = stream.run(block, index)
    return seen


class _Sums:
    """Over some tokens: the Gram of a stage's inputs, and for each matrix what its output lacks, as sums with them."""

    def __init__(self, rows: Mapping[str, int], d_in: int, device: torch.device) -> None:
        self.gram = Gram.zeros(d_in, device)
        self.lacking = {part: torch.zeros(d_out, d_in, device=device) for part, d_out in rows.items()}
        self.energies = {part: torch.zeros(2, dtype=torch.float64) for part in rows}
        """Of what is lacking, and of what is wanted."""

    def add(self, part: str, x: Tensor, off: Tensor, wanted: Tensor, counts: Tensor) -> None:
        """Tokens x [tokens, d_in], what is wanted of a matrix for them, and how far off that is [tokens, d_out]."""
        weighted = off * counts[:, None]
        self.lacking[part] += weighted.T @ x
        self.energies[part][0] += (weighted * off).sum(dtype=torch.float64).cpu()
        self.energies[part][1] += (wanted.square().sum(1) * counts).sum(dtype=torch.float64).cpu()

    def of_all(self, ranks: Ranks) -> "_Sums":
        """Over the tokens of all processes."""
        self.gram = added(self.gram, ranks)
        for tensor in (*self.lacking.values(), *self.energies.values()):
            ranks.add(tensor)
        return self

    def error(self, part: str, change: Tensor) -> float | None:
        """The relative error when a matrix has changed by so much; None without tokens."""
        if not self.gram.tokens:
            return None
        moved = ((change @ self.gram.xtx - 2 * self.lacking[part]) * change).sum(dtype=torch.float64)
        lost, size = (float(energy) for energy in self.energies[part])
        lost = max(lost + float(moved), 0.0)
        return lost / size if size else float(lost > 0)


@dataclass(frozen=True)
class _Fit:
    """Fits blocks of the narrower model, one after the other."""

    basis: Tensor
    pattern: str
    refit: bool
    stored: torch.dtype
    weights: Mapping[str, float]
    pairs: Sequence[_Pair]
    ranks: Ranks

    def block(self, old: nn.Module, new: nn.Module, index: int, matrices: Sequence[Matrix]) -> list[LayerResult]:
        """Fit its matrices in place, stage by stage, those of a stage side by side."""
        results: dict[str, LayerResult] = {}
        for stage in STAGES:
            parts = {part: matrix for matrix in matrices for part in stage if matrix.name.endswith(f".{part}")}
            takers = self.ranks.shares([len(matrix.weight) for matrix in parts.values()])
            clock = perf_counter()
            sums = self._sums(old, new, index, stage)
            each = (perf_counter() - clock) / len(parts)
            here = partial(self._stage, parts, takers, old, index, *sums, each)
            for found in self.ranks.gather(self.ranks.together(here)):
                results |= found
            for matrix, source in zip(parts.values(), takers, strict=True):
                self.ranks.spread(matrix.weight, source)
        return [results[matrix.name] for matrix in matrices]

    def _stage(
        self, parts: Mapping[str, Matrix], takers: Sequence[int], old: nn.Module, index: int, train: _Sums,
        held: _Sums, seconds: float,
    ) -> dict[str, LayerResult]:  # fmt: skip
        """Fit those of a stage's matrices that this process takes; `seconds` went for each of them before."""
        results = {}
        for (part, matrix), taker in zip(parts.items(), takers, strict=True):
            if taker != self.ranks.index:
                continue
            clock, before, beta = perf_counter(), matrix.weight.to(torch.float32, copy=True), 0.0
            if self.refit:
                found = self._fitted(before, part, train, held)
                matrix.weight.copy_(found.target.to(self.stored))
                beta = found.beta
            change, wide = matrix.weight.float() - before, cast(Tensor, old.get_submodule(part).weight)
            zeros, (d_out, d_in) = wide.numel() - matrix.weight.numel(), wide.shape
            results[matrix.name] = LayerResult(
                name=matrix.name, block=index, shape=(d_out, d_in), pattern=self.pattern, zeros_asked=zeros,
                zeros=zeros, error_train=train.error(part, change) or 0.0, error_held_out=held.error(part, change),
                error_by_region={}, damp=0.0, seconds=seconds + perf_counter() - clock, outcome=str(Outcome.OK),
                tokens=train.gram.tokens, beta=beta,
            )  # fmt: skip
        return results

    def _sums(self, old: nn.Module, new: nn.Module, index: int, stage: Sequence[str]) -> tuple[_Sums, _Sums]:
        linears: list[Any] = [new.get_submodule(part) for part in stage]
        linear, rows = linears[0], {part: one.out_features for part, one in zip(stage, linears, strict=True)}
        sums = [_Sums(rows, linear.in_features, linear.weight.device) for _ in range(2)]
        for pair in self.pairs:
            wide, small = _watch(old, index, pair.dense, stage), _watch(new, index, pair.small, stage)
            counts = self._counts(pair, linear.weight.device)
            real = counts > 0
            into = sums[pair.dense.held_out]
            x = small.inputs[stage[0]][real].float()
            into.gram.update(x, counts[real])
            for part in stage:
                given, wanted = small.outputs[part][real].float(), wide.outputs[part][real].float()
                if part in WRITERS:
                    wanted = self._lacking(part, pair, wide, small, new)[real]
                into.add(part, x, wanted - given, wanted, counts[real])
        return sums[0].of_all(self.ranks), sums[1].of_all(self.ranks)

    def _lacking(self, part: str, pair: _Pair, wide: _Watched, small: _Watched, new: nn.Module) -> Tensor:
        """What a matrix must write to the narrower stream so that it is what the dense model's is in its directions."""
        bias: Any = new.get_submodule(part).bias
        goal, now = (wide.between, pair.small.hidden) if part == WRITERS[0] else (wide.after, small.between)
        wanted = goal.float() @ self.basis - now.to(goal.device).float()
        return wanted if bias is None else wanted - bias.float()

    def lift(self, before: Tensor, file: Path) -> None:
        """Write what turns its final states into the dense model's [d_model, k]: `before`, fitted."""
        train, held = (_Sums({"": before.shape[0]}, before.shape[1], before.device) for _ in range(2))
        for pair in self.pairs if self.refit else ():
            x, wanted = (one.shell.leave(one.batch, one.hidden) for one in (pair.small, pair.dense))
            counts = self._counts(pair, x.device)
            real = counts > 0
            into, x, wanted = held if pair.dense.held_out else train, x[real].float(), wanted[real].float()
            into.gram.update(x, counts[real])
            into.add("", x, wanted - x @ before.T, wanted, counts[real])
        train, held = train.of_all(self.ranks), held.of_all(self.ranks)

        def write() -> None:
            lift = self._fitted(before, "", train, held).target if self.refit else before
            atomic_write(file, save({"lift": lift.cpu().contiguous()}))

        self.ranks.decide(write)

    def _counts(self, pair: _Pair, device: torch.device) -> Tensor:
        """What each token of a batch counts for."""
        regions = pair.dense.batch.regions.to(device)
        return (regions > 0).float() if pair.dense.held_out else worth(regions, self.weights).float()

    def _fitted(self, before: Tensor, part: str, train: _Sums, held: _Sums) -> Imitation:
        """A matrix that makes up for what its outputs lack, as far as that helps tokens that are held out."""
        judge = held if held.gram.tokens else train
        drift, held_drift = (Drift(None, sums.lacking[part]) for sums in (train, judge))
        return imitate(before, train.gram, drift, judge.gram, held_drift)


def _last_norm(model: PreTrainedModel) -> Any:
    return decoder(model).norm
