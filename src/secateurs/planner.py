"""What pruning a model will hold in memory, part by part, and where its hidden states should lie."""

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateurs.collect import Place, solve_cost
from secateurs.models import Matrix, computes_in, decoder_blocks
from secateurs.pruner import Plan, prunable
from secateurs.ranks import ALONE, Ranks
from secateurs.solvers.rounded import Rounded

Where = Literal["device", "cpu", "disk"]
SAFE = 0.8  # of the memory that is free now
# Working memory of a solve in Grams of its inputs and in float32 copies of its weights, at the moments of which one has
# the most (benchmarks/memory.py)
Moments = tuple[tuple[float, float], ...]
WORK: dict[str, Moments] = {
    "magnitude": ((0.0, 4.0),),
    "wanda": ((0.0, 4.0),),
    "admm": ((3.0, 3.6),),
    "admm+": ((3.0, 3.6),),
    "alps": ((10.0, 0.0), (4.0, 11.3)),
}
OTHER_WORK: Moments = ((4.6, 0.0), (1.2, 3.5))
ROUNDED_WORK: Moments = ((5.9, 0.0), (3.7, 3.3))  # after any of them (`solvers.rounded`)
TUNED = 16  # bytes that a step of a fine-tune takes for a weight: its gradient, two moments, and one more
SWAPPED_ROW = 8 * 4 * 64**2  # bytes that "admm+" takes for a row beside it
MOST_CHOSEN = 8  # experts for a token, where a configuration does not say


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Bytes. `hidden` is where `Where` says; the rest is on the device."""

    around: int
    """Embeddings, norms, head, but for what stays in its file."""
    block: int
    """The weights of the largest block, but for what stays in its file until it is solved."""
    grams: int
    """Of one block's distinct inputs, and the drift of each where a goal needs it."""
    held_out: int
    """Inputs of held-out tokens to one block."""
    hidden: int
    """Hidden states of all documents between two blocks."""
    forward: int
    """One batch on its way through a block, beside the copies below of the whole block where it follows the solves; or
    a step of a fine-tune."""
    solve: int
    """What the solver takes for a group of matrices, with the dense weights, solutions and masks that there are then:
    the costliest group is the first to be solved."""

    @property
    def on_device(self) -> int:
        """Without the hidden states."""
        return self.around + self.block + self.grams + self.held_out + max(self.forward, self.solve)


def needs(
    model: PreTrainedModel,
    plan: Plan,
    solver: str,
    *,
    tokens: int,
    held_out_tokens: int,
    batch_tokens: int,
    longest: int = 0,
    stored: torch.dtype | None = None,
    in_file: Collection[str] = (),
) -> Needs:
    """An estimate from shapes alone; `tokens` are all of them, padding and held-out ones included, `longest` those of
    the longest document, and `in_file` names parameters that take no memory until they are written to.

    Which matrices share an input is guessed: those of one module with as many inputs, but not the last, if it writes
    to the residual stream. An expert is taken to see its share of the tokens. `eager` attention holds what every head
    of a batch gives every pair of tokens three times: as a product, as a share in float32, and in the model's type.
    """
    prefix, blocks = decoder_blocks(model)
    config: Any = model.config.get_text_config(decoder=True)
    computed, width = computes_in(model), config.hidden_size
    size, dense = computed.itemsize, (stored or computed).itemsize
    held_in_file = {model.get_parameter(name) for name in in_file}
    inside = [_bytes(block.parameters(), held_in_file) for block in blocks]
    outside = (p for name, p in model.named_parameters() if not name.startswith(prefix))
    around = _bytes(outside, held_in_file)
    chosen = getattr(config, "num_experts_per_tok", None) or MOST_CHOSEN
    grams = held = solve = copies = pruned = reach = 0
    widest, imitates = width, plan.goal != "own"
    moments = WORK.get(solver, OTHER_WORK) + (ROUNDED_WORK if isinstance(plan.solver, Rounded) else ())
    for matrices in prunable(model, plan):
        groups = _groups(matrices, width, chosen, held_in_file)
        grams = max(grams, sum(4 * (1 + imitates) * group.d_in**2 for group in groups))
        held = max(held, sum(_held(int(g.share * held_out_tokens), g.d_in, size, plan) for g in groups))
        there = 0
        for group in sorted(groups, key=lambda group: -solve_cost(group.rows, group.d_in)):
            weights, gram = group.rows * group.d_in, 4 * group.d_in**2
            work = max(int(a * gram + b * 4 * weights) for a, b in moments)
            if solver == "admm+":
                work += group.rows * SWAPPED_ROW
            if group.matrices > 1:
                work += weights * dense  # put together
            if dense < 4:
                work += weights * 4  # in float32
            stays = imitates * (4 * weights + 2 * gram)  # a target, and the Gram and the drift of what is held out
            solve = max(solve, there + weights * dense + stays + work)
            there += weights * (dense + 1) + stays  # and the mask; solutions are in the block
            there += weights * size * group.in_file
        copies = max(copies, there)
        pruned = max(pruned, sum(group.rows * group.d_in for group in groups))
        reach = max(reach, sum(int(group.share * (group.rows + group.d_in)) for group in groups))
        widest = max([widest, *(group.d_in for group in groups)])
    states = 1 + imitates + (plan.tune is not None)
    rows = min(max(batch_tokens, longest), tokens)
    forward = rows * size * 3 * (width + widest)
    if config._attn_implementation == "eager":
        forward += config.num_attention_heads * rows * (longest or rows) * (2 * size + 4)
    tuning = 0
    if plan.tune:  # in float32, whatever the block computes in
        rows = min(max(plan.tune.tokens, longest), tokens)
        wider = max(sum(p.numel() for p in block.parameters()) for block in blocks) * max(4 - size, 0)
        tuning = copies + wider + pruned * (1 + size + TUNED) + rows * 4 * (reach + 12 * width)
    return Needs(
        around=around,
        block=max(inside),
        grams=grams,
        held_out=held,
        hidden=tokens * width * size * states,
        forward=max(forward + (copies if plan.propagate == "group" else 0), tuning),
        solve=solve,
    )


def _bytes(parameters: Iterable[nn.Parameter], but: Collection[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters if p not in but)


def _held(tokens: int, d_in: int, size: int, plan: Plan) -> int:
    """Bytes that are kept of so many held-out tokens (`collect.Held`): all, twice where a goal needs how far off they
    are; else a Gram for those of the largest region, which is taken to be three quarters."""
    if plan.goal != "own":
        return 2 * tokens * size * d_in
    return min(tokens * size, 4 * d_in + tokens // 4 * size) * d_in


@dataclass
class _Group:
    """Matrices with the same inputs: how many, with how many rows together, the share of the tokens that arrive, and
    whether they stay in their file until they are solved."""

    d_in: int
    share: float
    in_file: bool
    rows: int = 0
    matrices: int = 0


def _groups(matrices: Sequence[Matrix], width: int, chosen: int, in_file: Collection[nn.Parameter]) -> list[_Group]:
    """Those of a block, where a router chooses so many experts for a token."""
    groups: dict[Any, _Group] = {}
    for matrix in matrices:
        d_out, d_in = matrix.weight.shape
        parent = matrix.name.rsplit(".", 1)[0]
        writes = d_out == width and any(key[:1] == (parent,) for key in groups)
        experts = len(matrix.parameter) if matrix.expert is not None else 1
        new = _Group(d_in, min(1.0, chosen / experts), matrix.parameter in in_file)
        group = groups.setdefault((parent, d_in, writes, matrix.expert), new)
        group.rows, group.matrices = group.rows + d_out, group.matrices + 1
    return list(groups.values())


def available(device: torch.device) -> int:
    """Bytes that are free on a device now, within what this process and its control groups may take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [1024 * found for found in _numbers("/proc/meminfo", "MemAvailable:")]
    may_take = _numbers("/proc/self/limits", "Max address space")  # ulimit -v
    free += [most - 1024 * taken for most in may_take for taken in _numbers("/proc/self/status", "VmSize:")]
    for line in _lines("/proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        old = "memory" in controllers.split(",")
        root = Path("/sys/fs/cgroup/memory" if old else "/sys/fs/cgroup")
        group = root / path.lstrip("/")  # not there in a container that sees only its own, as the root
        for folder in (group, *group.parents) if old or not controllers else ():
            if folder.is_relative_to(root):
                free += _free_in_group(folder)
    return max(min(free), 0) if free else 2**63


def _free_in_group(folder: Path) -> list[int]:
    """What a control group's limit leaves, counting file pages that the system would give back; nothing without one."""
    for limit, used, idle in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        most, taken = (_numbers(str(folder / file), "") for file in (limit, used))
        if most and taken:
            return [most[0] - taken[0] + sum(_numbers(str(folder / "memory.stat"), f"{idle} "))]
    return []


def _numbers(file: str, what: str) -> list[int]:
    """The first word after `what`, of the lines that start with it, if it is a number."""
    rest = (line.removeprefix(what).split() for line in _lines(file) if line.startswith(what))
    return [int(words[0]) for words in rest if words and words[0].isdecimal()]


def _lines(file: str) -> list[str]:
    return Path(file).read_text().splitlines() if Path(file).exists() else []


def choose(wanted: Needs, device: torch.device, ranks: Ranks = ALONE) -> Where:
    """Where hidden states fit: the device if it has room for them beside the rest, else the CPU, else the disk.

    What is free is shared with the processes that work there too.
    """
    if wanted.on_device + wanted.hidden <= SAFE * available(device) / ranks.sharing(device):
        return "device"
    cpu = torch.device("cpu")
    if device != cpu and wanted.hidden <= SAFE * available(cpu) / ranks.sharing(cpu):
        return "cpu"
    return "disk"


def shelf(where: Where, folder: Path) -> Place:
    """What puts hidden states where they are to stay: as they are, on the CPU, or in files that the system pages.

    Files have no name, so they go with the tensors, and with a process that is killed. OSError if the disk is full.
    """

    def place(hidden: Tensor) -> Tensor:
        if where != "disk":
            return hidden if where == "device" else hidden.cpu()
        with NamedTemporaryFile(prefix="hidden-", dir=folder) as file:
            if hasattr(os, "posix_fallocate"):  # or else a full disk is found out by a signal that kills
                os.posix_fallocate(file.fileno(), 0, max(hidden.nbytes, 1))
            mapped = torch.from_file(file.name, shared=True, size=hidden.numel(), dtype=hidden.dtype)
        return mapped.view(hidden.shape).copy_(hidden)

    if where == "disk":
        folder.mkdir(parents=True, exist_ok=True)
    return place
