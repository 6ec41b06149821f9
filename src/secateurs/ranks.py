"""The processes that prune together, as torchrun starts them: who does what, sums over all, what one tells the rest."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from secateurs.parallel import MISTAKES

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # the first process may sample for hours; a process that dies is noticed at once


class Elsewhere(Exception):
    """Something failed in one of the processes, and the first one says what."""


@dataclass(frozen=True)
class Ranks:
    """This process, of `count`. Alone, it sends nothing and waits for nobody.

    All but `sharing`, `shares` and `rounds` are collective: every process calls them, in the same order. RuntimeError
    if another one is gone.
    """

    index: int = 0
    count: int = 1
    nearby: int = 1
    """How many work on its machine: of these, or of the jobs of a study."""

    @property
    def first(self) -> bool:
        """Whether this is the process that samples, writes files and speaks."""
        return self.index == 0

    def sharing(self, device: torch.device) -> int:
        """How many work on this device: all nearby, but processes that torchrun started have a GPU each."""
        return 1 if device.type == "cuda" and self.count > 1 else self.nearby

    def shares(self, costs: Sequence[float]) -> list[int]:
        """Who takes each item, so that all have alike to do: the costliest goes first, to who has least."""
        loads, takers = [0.0] * self.count, [0] * len(costs)
        for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
            takers[item] = loads.index(min(loads))
            loads[takers[item]] += costs[item]
        return takers

    def rounds(self, items: Sequence[T], costs: Sequence[float]) -> list[list[T]]:
        """The items, as many together as there are processes, one for each; the costliest first."""
        ordered = [items[index] for index in sorted(range(len(items)), key=lambda index: -costs[index])]
        return [ordered[start : start + self.count] for start in range(0, len(ordered), self.count)]

    def add(self, tensor: Tensor, to: int | None = None) -> None:
        """Put the sum of every process's tensor in its place; with `to` only there: the others' is spoilt."""
        if self.count == 1:
            return
        with _noticing_deaths():
            if to is None:
                distributed.all_reduce(tensor)
            else:
                distributed.reduce(tensor, dst=to)

    def spread(self, tensor: Tensor, source: int = 0) -> None:
        """Put the tensor that `source` has in the place of everyone's."""
        if self.count == 1:
            return
        sent = tensor.contiguous()  # a view of a transposed expert is not
        with _noticing_deaths():
            distributed.broadcast(sent.view(-1).view(torch.uint8), src=source)
        if sent.data_ptr() != tensor.data_ptr():
            tensor.copy_(sent)

    def tell(self, value: T) -> T:
        """What the first process calls this with. For small things of ours: it goes through pickle."""
        if self.count == 1:
            return value
        box: list[Any] = [value]
        with _noticing_deaths():
            distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """What every process calls this with, in their order."""
        if self.count == 1:
            return [value]
        box: list[Any] = [None] * self.count
        with _noticing_deaths():
            distributed.all_gather_object(box, value)
        return box

    def together(self, function: Callable[[], T]) -> T:
        """What `function` returns here; if it fails anywhere it fails everywhere, Elsewhere in all but the first."""
        if self.count == 1:
            return function()
        result, mine = None, None
        try:
            result = function()
        except MISTAKES as error:
            mine = error
        problems = [text for text in self.gather(mine and str(mine)) if text is not None]
        if problems:
            raise (mine or RuntimeError(problems[0])) if self.first else Elsewhere(problems[0])
        return result  # type: ignore[return-value]

    def decide(self, function: Callable[[], T]) -> T:
        """What `function` returns in the first process, which alone calls it; its failure fails everywhere."""
        return self.tell(self.together(lambda: function() if self.first else None))  # type: ignore[arg-type]


ALONE = Ranks()


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """All processes that torchrun started with this one, or this one alone. Each takes the GPU of its number.

    ValueError for a device that processes cannot share their work on. What fails in it says in which process.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"resources.device is {device}: several processes work together on cpu or cuda only")
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, index, count = next(iter(rendezvous("env://", timeout=PATIENCE)))
    store.set_timeout(PATIENCE)
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":  # on several machines not all count the same restarts
        # What processes that torchrun started before these left in its store would be taken for theirs
        store = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "gloo" if kind == "cpu" else "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, store=store, rank=index, world_size=count, timeout=PATIENCE)
    try:
        yield Ranks(index, count, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    except Exception as error:
        if index:
            error.add_note(f"process {index} (of 0 to {count - 1})")
        raise
    finally:
        distributed.destroy_process_group()


@contextmanager
def _noticing_deaths() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1].partition(". ")[0]  # without the place in torch's sources
        raise RuntimeError(
            f"another process of this run ended, or cannot be reached ({reason}); what is done is kept, so run the "
            "command again"
        ) from error
