"""Whether two mathematical answers are the same, by math-verify in a process of its own, which may hang or crash.

Run as a program this file is that process: a JSON line when it is ready, then a JSON line in, a JSON line out.
"""

import json
import os
import re
import select
import subprocess
import sys
import tempfile
import weakref
from dataclasses import dataclass, field
from itertools import pairwise

SECONDS = 10.0
STARTS_IN = 300.0  # seconds, on a busy machine
MEMORY = 4 << 30
LONGEST = 20_000  # characters; an answer stands at the end
BOX = re.compile(r"\\boxed\s*\{")
BRACE = re.compile(r"[{}]")
THIN_SPACE = re.compile(r"(?<=\d)\\[,; ](?=\d{3})")  # between thousands
JOINED = re.compile(r"[\s$,;()\[\]\\]*(?:(?:and|or)[\s$,;()\[\]\\]*)?")


@dataclass
class MathJudge:
    """Starts its process when first asked. A pair that takes too long, or kills the process, counts as different.

    RuntimeError if no process can be started: then nothing can be judged.
    """

    seconds: float = SECONDS
    unjudged: int = 0
    """Pairs that could not be judged."""
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)

    def same(self, reference: str, reply: str) -> bool:
        """Whether the answer in `reply` (in a box, else the last one in it) equals `reference`, which is LaTeX."""
        line = json.dumps({"reference": reference, "reply": reply[-LONGEST:]}).encode() + b"\n"
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], self.seconds)
            verdict = process.stdout.readline() if ready else b""
        except BrokenPipeError:
            verdict = b""
        if verdict:
            return bool(json.loads(verdict)["same"])
        self.unjudged += 1
        process.kill()
        process.wait()
        self._process = None
        return False

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "secateurs.questions.math_judge"]
        with tempfile.TemporaryFile() as said:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said)
            weakref.finalize(self, _end, process)
            assert process.stdout is not None
            ready, _, _ = select.select([process.stdout], [], [], STARTS_IN)
            if not (ready and process.stdout.readline()):
                _end(process)
                said.seek(0)
                why = said.read().decode(errors="replace").strip().splitlines() or [f"not ready in {STARTS_IN:g} s"]
                raise RuntimeError(f"the process that judges mathematics does not start: {why[-1]}")
        self._process = process
        return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def last_boxes(reply: str) -> str:
    """`reply` from behind the last box that is taken back: `\\boxed{17}, no, it is \\boxed{18}` says 18.

    Boxes with nothing but commas, signs of mathematics, `and` or `or` between them stay together, as one answer.
    """
    starts = [found.start() for found in BOX.finditer(reply)]
    for earlier, later in reversed(list(pairwise(starts))):
        end = _end_of_box(reply, earlier)
        if not JOINED.fullmatch(reply, min(end, later), later):
            return reply[min(end, later) :].lstrip("$)]\\ ")
    return reply


def _end_of_box(text: str, start: int) -> int:
    """Behind the brace that closes the box at `start`; the end of the text where none does."""
    depth = 0
    for brace in BRACE.finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.end()
    return len(text)


def main() -> None:
    """Judge what comes in until nothing more does."""
    import resource

    if sys.platform == "linux":  # elsewhere the limit on address space cannot be set or is not kept
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    from math_verify import parse, verify

    print(json.dumps({"ready": True}), flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # from now on nobody reads it
    for line in sys.stdin:
        pair = json.loads(line)
        reference = parse(f"${pair['reference']}$")
        print(
            json.dumps({"same": bool(verify(reference, parse(THIN_SPACE.sub("", last_boxes(pair["reply"])))))}),
            flush=True,
        )


if __name__ == "__main__":
    main()
