"""Is anything lost where a run is killed, one of its processes dies, or the disk is full?

    python benchmarks/interruptions.py OUT [--recipe demo] [--set KEY=VALUE ...] [--kills 6] [--megabytes 1]

The same run undisturbed, by one process and by two of torchrun, and then disturbed and called again until it ends: all
of it killed (-9) at random moments; one of two processes killed, likewise; on a disk of so many megabytes, twice as
many each time it is full (as root, since it is mounted). A row each: calls that were cut short, when and with which
errors; time of all calls as a multiple of the undisturbed run's; how many files (sealed traces and answers, weights)
there are, and how many of them differ from its by a byte.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

SETS = [
    "sweep.arm=['prompt','rac']", "sweep.sparsity=[0.5]", "sweep.seed=[0]", "calibration.num_tokens=4000",
    "evaluate.num_questions=20",
]  # fmt: skip
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
MOST_CALLS = 30
Disturb = Callable[[subprocess.Popen[bytes]], None]


def results(out: Path) -> dict[str, str]:
    """What must not depend on when a run was stopped."""
    found = [*out.rglob("*.parquet"), *out.rglob("model/*.safetensors")]
    return {str(path.relative_to(out)): sha256(path.read_bytes()).hexdigest() for path in found}


def call(words: list[str], log: Path, disturb: Disturb) -> tuple[int, str]:
    """Start a run, disturb it, wait for its end; its exit code and the error it named, if any."""
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, *words], stdout=file, stderr=file, start_new_session=True)
        disturb(process)
        code = process.wait()
    return code, next((line for line in log.read_text().splitlines() if line.startswith("error: ")), "")


def family(pid: int) -> list[int]:
    """A process and all that came of it."""
    with suppress(FileNotFoundError, ProcessLookupError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [pid, *(each for child in children for each in family(int(child)))]
    return []


def rank_of(process: subprocess.Popen[bytes], rank: int) -> int | None:
    """The process id of one of torchrun's; None while it is not there."""
    for pid in family(process.pid)[1:]:
        with suppress(FileNotFoundError, ProcessLookupError):
            if f"\0RANK={rank}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
                return pid
    return None


def kill_all(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def main() -> None:
    """A table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--set", action="append", help="instead of a small demo's")
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--megabytes", type=int, default=1)
    options = parser.parse_args()
    options.out.mkdir(parents=True)  # a new one: a finished run would be called undisturbed
    moments = random.Random(0)
    sets = [word for one in options.set or SETS for word in ("--set", one)]

    def words(out: Path, processes: int) -> list[str]:
        return [*(TORCHRUN * (processes > 1)), "-m", "secateurs.cli", "run", options.recipe, "--out", str(out), *sets]

    undisturbed: dict[int, tuple[float, dict[str, str]]] = {}
    for processes in (1, 2):
        out = options.out / f"undisturbed-{processes}"
        start = time.monotonic()
        code, error = call(words(out, processes), options.out / "log", lambda process: None)
        assert code == 0, error
        undisturbed[processes] = time.monotonic() - start, results(out)
        print(f"undisturbed, {processes} processes: {undisturbed[processes][0]:.0f} s", flush=True)
    assert undisturbed[1][1]
    print("\n| | cut short | after, s | errors | x undisturbed | files | that differ |")
    print("| --- | --- | --- | --- | --- | --- | --- |")

    def row(what: str, out: Path, processes: int, again: Callable[[int], Disturb]) -> None:
        """Call until a call ends well; `again` says how to disturb it, given how many were cut short."""
        start, ends, errors = time.monotonic(), list[str](), dict[str, None]()
        while True:
            began = time.monotonic()
            code, error = call(words(out, processes), options.out / "log", again(len(ends)))
            if code == 0:
                break
            ends.append(f"{time.monotonic() - began:.0f}")
            errors |= {error: None} if error else {}
            assert len(ends) < MOST_CALLS, f"{what}: it does not come to an end; the last log is in {options.out}"
        took, expected = undisturbed[processes]
        found = results(out)
        differ = sum(found.get(name) != expected.get(name) for name in {*found, *expected})
        ratio, said = (time.monotonic() - start) / took, "; ".join(errors)
        print(
            f"| {what} | {len(ends)} | {', '.join(ends)} | {said} | {ratio:.1f} | {len(found)} | {differ} |", flush=True
        )

    def kill(processes: int, one_of_them: bool) -> Callable[[int], Disturb]:
        """As often as asked, at a moment of the first two thirds of a run, unless it has ended by then."""

        def disturb(process: subprocess.Popen[bytes]) -> None:
            time.sleep(moments.uniform(0.2, 0.66) * undisturbed[processes][0])
            rank = moments.randrange(2)
            if one_of_them:
                while (pid := rank_of(process, rank)) is None and process.poll() is None:
                    time.sleep(0.05)
                kill_all([pid] if pid else [])
            elif process.poll() is None:
                kill_all(family(process.pid))

        return lambda cut: disturb if cut < options.kills else lambda process: None

    row("killed", options.out / "killed", 1, kill(1, False))
    row("two processes, killed", options.out / "both-killed", 2, kill(2, False))
    row("two processes, one killed", options.out / "one-killed", 2, kill(2, True))
    if os.geteuid():
        print("a full disk was not tried: only root may mount a small one")
        return
    disk = options.out / "disk"
    disk.mkdir()

    def larger(cut: int) -> Disturb:
        size = f"size={options.megabytes * 2**cut}m"
        how = ["-o", f"remount,{size}"] if cut else ["-t", "tmpfs", "-o", size, "none"]
        subprocess.run(["mount", *how, str(disk)], check=True)
        return lambda process: None

    try:
        row("a full disk", disk / "run", 1, larger)
    finally:
        subprocess.run(["umount", str(disk)])


if __name__ == "__main__":
    main()
