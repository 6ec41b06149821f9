"""Tasks in processes of their own: results in order, progress from all of them, none that outlives its parent."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import torch

MISTAKES = (ValueError, OSError, RuntimeError, ArithmeticError)  # what a command turns into one sentence
PR_SET_PDEATHSIG = 1  # linux/prctl.h
Task = tuple[Callable[..., Any], tuple[Any, ...]]


class Progress(Protocol):
    """Where a stage says how far it is; total 0 means unknown."""

    def __call__(self, stage: str, done: float, total: float, unit: str) -> None: ...


def silent(stage: str, done: float, total: float, unit: str) -> None:
    """No progress shown."""


def run_tasks(make: Callable[[Progress], Any], tasks: Sequence[Task], jobs: int, progress: Progress) -> list[Any]:
    """function(made, *args) of every (function, args), in order; `made` is make(progress), once a process.

    With `jobs` above 1 everything must be picklable, and each process gets its share of torch's threads. A task's error
    is raised here and ends the others at once, so tasks must leave nothing behind that a kill would spoil. A process
    that dies is a RuntimeError; one whose parent dies is killed with it on Linux, elsewhere it ends at its next word
    of progress.
    """
    if jobs == 1 or len(tasks) < 2:
        made = make(progress)
        return [function(made, *args) for function, args in tasks]
    jobs = min(jobs, len(tasks))
    results: dict[int, Any] = {}
    waiting = list(enumerate(tasks))
    with ExitStack() as stack:
        workers: dict[Connection, Any] = {}
        for _ in range(jobs):
            ours, worker = start(stack, _serve, make, max(1, torch.get_num_threads() // jobs))
            workers[ours] = worker
            ours.send(waiting.pop(0))
        while len(results) < len(tasks):
            for pipe in wait(list(workers)):
                assert isinstance(pipe, Connection)
                try:
                    kind, *content = pipe.recv()
                except (EOFError, ConnectionResetError):
                    workers[pipe].join()
                    code = workers[pipe].exitcode
                    reason = f"by signal {-code}, perhaps for want of memory" if code and code < 0 else f"with {code}"
                    raise RuntimeError(
                        f"a worker process ended {reason}; what is done is kept, so run the command again, with fewer "
                        "jobs if memory was short"
                    ) from None
                if kind == "progress":
                    progress(*content)
                elif kind == "failed":
                    raise content[0]
                else:
                    index, results[index] = content
                    if waiting:
                        pipe.send(waiting.pop(0))
    return [results[index] for index in range(len(tasks))]


def _serve(pipe: Connection, make: Callable[[Progress], Any], threads: int, parent: int) -> None:
    """A process' life: a task in, its result out, until the parent closes the pipe or dies."""
    settle(threads, parent)
    try:

        def progress(stage: str, done: float, total: float, unit: str) -> None:
            pipe.send(("progress", stage, done, total, unit))

        made = make(progress)
        while True:
            index, (function, args) = pipe.recv()
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


def portable(error: Exception) -> Exception:
    """The error, as one that survives being pickled."""
    return error if type(error).__module__ == "builtins" else RuntimeError(str(error))


def end(worker: Any, pipe: Connection) -> None:
    """Stop a process and its pipe, whatever it does."""
    worker.terminate()
    worker.join()
    pipe.close()
