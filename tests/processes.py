"""Processes without the seconds that importing torch takes: forked from this one.

Where there is CUDA, which no fork can use, they are started anew as those of a user are.
"""

import multiprocessing
import os
import pickle
import sys
from types import SimpleNamespace

import torch

from secateurs import cli

METHOD = "spawn" if torch.cuda.is_available() else "fork"


def fork_workers(monkeypatch) -> None:
    """From now on `secateurs.parallel` forks its processes; what they are started with must be fit to be sent still."""
    context = multiprocessing.get_context(METHOD)

    def process(target, args, **options):
        pickle.dumps((target, args[1:]))  # without their end of a pipe
        return context.Process(target=target, args=args, **options)

    forks = SimpleNamespace(Pipe=context.Pipe, Process=process)
    monkeypatch.setattr("secateurs.parallel.multiprocessing", SimpleNamespace(get_context=lambda method: forks))


def started(words: list[str]):
    """A command that runs in a process of its own and says nothing."""
    process = multiprocessing.get_context(METHOD).Process(target=_run, args=(words,))
    process.start()
    return process


def _run(words: list[str]) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    sys.argv = ["secateurs", *words]
    cli.main()
