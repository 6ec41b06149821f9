"""What every test finds: seeds, threads, and run-time checks of every tensor shape in the mathematics modules."""

import io
import os
import random
import sys
from contextlib import redirect_stdout
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

from families import family, tiny_model  # noqa: F401

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # for this process and those it starts: equal threads, equal rounding

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it once, when anything first imports it

MATHEMATICS = ["patterns", "linalg", "layer", "scores", "solvers", "goals", "tune"]
install_import_hook([f"secateurs.{module}" for module in MATHEMATICS], "beartype.beartype")

settings.register_profile("secateurs", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("secateurs")
torch.set_num_threads(1)  # matrices this small lose more to a second thread, on a busy machine ten times more


LONGEST = [
    "cli",
    "study",
    "solvers",
    "ranks",
    "pruner",
    "engine_openai",
    "checkpoint",
    "packed",
    "benchmarks",
    "calibration",
    "cuts",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take longest come first, so that processes which share out the files end together."""
    place = {f"test_{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def without_reload(monkeypatch):
    """Models are not loaded again at the end of a run, in a process that takes longer than the rest of a small one."""
    monkeypatch.setattr("secateurs.study.verify", lambda folders, **_: {})


@pytest.fixture
def reload_here(monkeypatch):
    """Models are loaded again and compared as at the end of every run, but in this process and in no clean one."""

    def run(command, *, input, **_):
        said = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
            patch.setattr(sys, "stdin", io.StringIO(input))
            exec(command[-1], {})
        return SimpleNamespace(returncode=0, stdout=said.getvalue(), stderr="")

    monkeypatch.setattr("secateurs.reload.subprocess", SimpleNamespace(run=run))
