"""Tasks in processes of their own: results in order, progress from all of them, none that outlives its parent."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol, Self

import torch

MISTAKES = (ValueError, OSError, RuntimeError, ArithmeticError)  # what a command turns into one sentence
PR_SET_PDEATHSIG = 1  # linux/prctl.h
Task = tuple[Callable[..., Any], tuple[Any, ...]]


class Progress(Protocol):
    """Where a stage says how far it is; total 0 means unknown."""

    def __call__(self, stage: str, done: float, total: float, unit: str) -> None: ...


def silent(stage: str, done: float, total: float, unit: str) -> None:
    """No progress shown."""


class Workers:
    """`jobs` processes that share tasks until the `with` that they are made in ends; `run` starts those it needs.

    Each works with what make(progress) gives there, once. With one job that is this process; so it is for one task
    alone, of which nothing is kept here then. With more everything must be picklable. A process whose parent dies is
    killed with it on Linux, elsewhere it ends at its next word of progress.
    """

    def __init__(self, make: Callable[[Progress], Any], jobs: int, progress: Progress) -> None:
        self.make, self.jobs, self.progress = make, jobs, progress
        self._processes: dict[Connection, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @cached_property
    def _here(self) -> Any:
        return self.make(self.progress)

    def run(self, tasks: Sequence[Task]) -> list[Any]:
        """function(made, *args) of every (function, args), in order, with a share of torch's threads for each process.

        A task's error is raised here, and ends the others at once with the `with`, so tasks must leave nothing behind
        that a kill would spoil. A process that dies is a RuntimeError.
        """
        if self.jobs == 1 or len(tasks) < 2:
            made = self._here if self.jobs == 1 else self.make(self.progress)
            return [function(made, *args) for function, args in tasks]
        count = min(self.jobs, len(tasks))
        threads = max(1, torch.get_num_threads() // count)
        while len(self._processes) < count:
            pipe, process = start(self._stack, _serve, self.make, threads)
            self._processes[pipe] = process
        results: dict[int, Any] = {}
        waiting = list(enumerate(tasks))
        for pipe in list(self._processes)[:count]:
            pipe.send((threads, *waiting.pop(0)))
        while len(results) < len(tasks):
            for pipe in wait(list(self._processes)):
                assert isinstance(pipe, Connection)
                kind, *content = self._hear(pipe)
                if kind == "progress":
                    self.progress(*content)
                elif kind == "failed":
                    raise content[0]
                else:
                    index, results[index] = content
                    if waiting:
                        pipe.send((threads, *waiting.pop(0)))
        return [results[index] for index in range(len(tasks))]

    def _hear(self, pipe: Connection) -> tuple[Any, ...]:
        try:
            return pipe.recv()
        except (EOFError, ConnectionResetError):
            self._processes[pipe].join()
            raise RuntimeError(
                f"a worker process ended {ending(self._processes[pipe].exitcode)}; what is done is kept, so run the "
                "command again, with fewer jobs if memory was short"
            ) from None


def _serve(pipe: Connection, make: Callable[[Progress], Any], threads: int, parent: int) -> None:
    """A process' life: a task in, its result out, until the parent closes the pipe or dies."""
    settle(threads, parent)
    try:

        def progress(stage: str, done: float, total: float, unit: str) -> None:
            pipe.send(("progress", stage, done, total, unit))

        made = make(progress)
        while True:
            threads, index, (function, args) = pipe.recv()
            torch.set_num_threads(threads)
            pipe.send(("done", index, function(made, *args)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(1)  # nobody is left to tell
    except MISTAKES as error:
        pipe.send(("failed", portable(error)))


def start(stack: ExitStack, serve: Callable[..., None], *args: Any) -> tuple[Connection, Any]:
    """A process that runs serve(its end of a pipe, *args, our process id) and ends with `stack`; our end, and it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    worker = context.Process(target=serve, args=(theirs, *args, os.getpid()), daemon=True)
    with deaf():
        worker.start()
    stack.callback(end, worker, ours)
    theirs.close()
    return ours, worker


@contextmanager
def deaf() -> Iterator[None]:
    """While open, Ctrl-C is not heard, nor ever by a process that is started: its parent hears it and ends it."""
    if threading.current_thread() is not threading.main_thread():  # which alone may say who hears
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def settle(threads: int, parent: int) -> None:
    """Make this a process that works for `parent`: deaf to Ctrl-C, which that hears too, and dead when that dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    torch.set_num_threads(threads)


def ending(code: int | None) -> str:
    """How a process ended, by its exit code."""
    return f"by signal {-code}, perhaps for want of memory" if code and code < 0 else f"with {code}"


def portable(error: Exception) -> Exception:
    """The error, as one that survives being pickled."""
    return error if type(error).__module__ == "builtins" else RuntimeError(str(error))


def end(worker: Any, pipe: Connection) -> None:
    """Stop a process and its pipe, whatever it does."""
    worker.terminate()
    worker.join()
    pipe.close()
