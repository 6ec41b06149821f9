"""Is anything lost where a run is killed, one of its processes dies, or the disk is full?

    python benchmarks/interruptions.py OUT [--recipe demo] [--set KEY=VALUE ...] [--kills 10] [--megabytes 1]

The same run undisturbed, by one process and by two of torchrun, and then disturbed and called again until it ends:
killed (-9) at random moments; one of the two processes killed, likewise; on a disk of so many megabytes, twice as many
each time it is full (root's right: it is mounted). A row each: calls that were cut short, the error that the last of
them named, seconds of all calls over the undisturbed run's, and files that differ from its: sealed traces, and weights.
"""

import argparse
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

SETS = [
    "sweep.arm=['prompt','rac']", "sweep.sparsity=[0.5]", "sweep.seed=[0]", "calibration.num_tokens=4000",
    "evaluate.num_questions=20",
]  # fmt: skip
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def results(out: Path) -> dict[str, str]:
    """What must not depend on when a run was stopped."""
    found = [*out.rglob("*.parquet"), *out.rglob("model/*.safetensors")]
    return {str(path.relative_to(out)): sha256(path.read_bytes()).hexdigest() for path in found}


def call(words: list[str], log: Path, disturb: Callable[[subprocess.Popen[str]], None]) -> tuple[int, str]:
    """Start a run, disturb it, wait for its end; its exit code and the error it named, if any."""
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *words], stdout=file, stderr=file, text=True, start_new_session=True
        )
        disturb(process)
        code = process.wait()
    return code, next((line for line in log.read_text().splitlines() if line.startswith("error: ")), "")


def rank_of(process: subprocess.Popen[str], rank: int) -> int | None:
    """The process id of one of torchrun's, once it is there."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    for pid in children.read_text().split() if children.exists() else []:
        if f"\0RANK={rank}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
            return int(pid)
    return None


def main() -> None:
    """A table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--set", action="append", help="instead of a small demo's")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--megabytes", type=int, default=1)
    options = parser.parse_args()
    moments = random.Random(0)
    sets = [word for one in options.set or SETS for word in ("--set", one)]

    def words(out: Path, processes: int) -> list[str]:
        return [*(TORCHRUN * (processes > 1)), "-m", "secateurs.cli", "run", options.recipe, "--out", str(out), *sets]

    options.out.mkdir(parents=True, exist_ok=True)
    undisturbed: dict[int, tuple[float, dict[str, str]]] = {}
    for processes in (1, 2):
        out = options.out / f"undisturbed-{processes}"
        start = time.monotonic()
        code, said = call(words(out, processes), options.out / "log", lambda process: None)
        assert code == 0, said
        undisturbed[processes] = time.monotonic() - start, results(out)
        print(f"undisturbed, {processes} processes: {undisturbed[processes][0]:.0f} s", flush=True)
    print("\n| | cut short | the last error | seconds / undisturbed | files | that differ |")
    print("| --- | --- | --- | --- | --- | --- |")

    def row(what: str, out: Path, processes: int, again: Callable[[int], Callable[[subprocess.Popen[str]], None]]):
        """Call until a call ends well; `again` says how to disturb it, given how many were cut short."""
        start, cut, last = time.monotonic(), 0, ""
        while True:
            code, said = call(words(out, processes), options.out / "log", again(cut))
            if code == 0:
                break
            cut, last = cut + 1, said
        took, expected = undisturbed[processes]
        found = results(out)
        differ = sum(found.get(name) != expected.get(name) for name in {*found, *expected})
        ratio = (time.monotonic() - start) / took
        print(f"| {what} | {cut} | {last} | {ratio:.1f} | {len(expected)} | {differ} |", flush=True)

    def kill_all(cut: int) -> Callable[[subprocess.Popen[str]], None]:
        def disturb(process: subprocess.Popen[str]) -> None:
            if cut < options.kills:
                time.sleep(moments.uniform(0.25, 0.55) * undisturbed[1][0])
                if process.poll() is None:
                    process.send_signal(signal.SIGKILL)

        return disturb

    def kill_one(cut: int) -> Callable[[subprocess.Popen[str]], None]:
        def disturb(process: subprocess.Popen[str]) -> None:
            if cut < options.kills:
                time.sleep(moments.uniform(0.25, 0.55) * undisturbed[2][0])
                if process.poll() is None and (one := rank_of(process, moments.randrange(2))):
                    subprocess.run(["kill", "-9", str(one)])

        return disturb

    disk, size = options.out / "disk", options.megabytes

    def larger(cut: int) -> Callable[[subprocess.Popen[str]], None]:
        remount = ["-o", f"remount,size={size * 2**cut}m"] if cut else ["-t", "tmpfs", "-o", f"size={size}m", "none"]
        subprocess.run(["mount", *remount, str(disk)], check=True)
        return lambda process: None

    row("killed", options.out / "killed", 1, kill_all)
    row("one of two processes killed", options.out / "one-killed", 2, kill_one)
    disk.mkdir(exist_ok=True)
    try:
        row("a full disk", disk / "run", 1, larger)
    finally:
        subprocess.run(["umount", str(disk)])


if __name__ == "__main__":
    main()
