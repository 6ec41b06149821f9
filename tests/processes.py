"""Processes without the seconds that importing torch takes: forked from this one.

Where there is CUDA, which no fork can use, they are started anew as those of a user are.
"""

import multiprocessing
import os
import sys
from types import SimpleNamespace

import torch

from secateurs import cli

METHOD = "spawn" if torch.cuda.is_available() else "fork"


def fork_workers(monkeypatch) -> None:
    """From now on `secateurs.parallel` forks its processes."""
    forks = SimpleNamespace(get_context=lambda method: multiprocessing.get_context(METHOD))
    monkeypatch.setattr("secateurs.parallel.multiprocessing", forks)


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
