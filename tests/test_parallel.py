"""Processes that work side by side: order, progress, errors, deaths of children and of the parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from processes import fork_workers
from secateurs.parallel import Task, Workers, deaf, silent


class Bench:
    """What a process makes once."""

    def __init__(self, progress):
        self.progress, self.made_in = progress, os.getpid()


def work(bench: Bench, number: int) -> tuple[int, int]:
    bench.progress("squares", number, 9, "numbers")
    assert bench.made_in == os.getpid()
    return number**2, bench.made_in


def fail(bench: Bench, error: Exception) -> None:
    raise error


def die(bench: Bench) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep(bench: Bench, folder: str) -> None:
    """Say who sleeps, then sleep without a word, as a long solve does."""
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(120)


def tasks(jobs: int, *wanted: Task) -> list:
    with Workers(Bench, jobs, silent) as workers:
        return workers.run(wanted)


@pytest.mark.parametrize("jobs", [1, 2])
def test_results_come_in_order_and_everyones_progress_arrives(jobs):
    heard = []
    with Workers(Bench, jobs, lambda *words: heard.append(words)) as workers:
        results = workers.run([(work, (n,)) for n in range(9)])
        again = workers.run([(work, (n,)) for n in (5, 6, 7)])
        assert workers.run([(work, (5,))])[0] == (25, os.getpid()), "one task alone is done here"
    del heard[9:]
    assert [square for square, _ in results] == [n**2 for n in range(9)]
    assert sorted(heard) == [("squares", n, 9, "numbers") for n in range(9)]
    processes = {process for _, process in results}
    assert len(processes) <= jobs and (os.getpid() in processes) == (jobs == 1)
    assert [square for square, _ in again] == [25, 36, 49] and {process for _, process in again} <= processes
    assert not any(_lives(process) for process in processes - {os.getpid()})


@pytest.mark.parametrize("error", [ValueError("sparsity is 2"), FileNotFoundError(2, "no such file", "a.toml")])
def test_a_tasks_error_is_raised_here_and_ends_the_others(error, tmp_path, monkeypatch):
    fork_workers(monkeypatch)
    clock = time.monotonic()
    with pytest.raises(type(error)) as found:
        tasks(2, (sleep, (str(tmp_path),)), (fail, (error,)))
    assert str(found.value) == str(error)
    assert time.monotonic() - clock < 110, "the other slept on"


def test_a_process_that_dies_is_named(tmp_path, monkeypatch):
    fork_workers(monkeypatch)
    with pytest.raises(RuntimeError, match="ended by signal 9, perhaps for want of memory; what is done is kept"):
        tasks(2, (sleep, (str(tmp_path),)), (die, ()))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process ends at its next word of progress")
def test_no_process_outlives_its_parent(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_parallel as t; "
        "t.tasks(2, *[(t.sleep, (sys.argv[2],))] * 2)"
    )
    guarded = f"if __name__ == '__main__':\n    {code}"
    (tmp_path / "main.py").write_text(guarded)
    said = tmp_path / "said"
    said.mkdir()
    parent = subprocess.Popen([sys.executable, tmp_path / "main.py", Path(__file__).parent, said])
    wait = time.monotonic() + 90
    while len(list(said.iterdir())) < 2 and time.monotonic() < wait:
        time.sleep(0.05)
    children = [int(path.name) for path in said.iterdir()]
    parent.kill()
    parent.wait()
    assert len(children) == 2
    wait = time.monotonic() + 30
    while any(_lives(child) for child in children) and time.monotonic() < wait:
        time.sleep(0.05)
    assert not any(_lives(child) for child in children)


def _lives(pid: int) -> bool:
    """Whether a process still runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_process_that_is_started_deaf_stays_so_and_its_parent_hears_again():
    before = signal.getsignal(signal.SIGINT)
    asks = "import signal; print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)"
    with deaf():
        child = subprocess.run([sys.executable, "-c", asks], capture_output=True, text=True)
    assert child.stdout.strip() == "True" and signal.getsignal(signal.SIGINT) is before
