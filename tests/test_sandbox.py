"""Hostile programs: each tries what a model might write, and nothing of it happens, passes or stays behind."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from secateurs.questions import sandbox
from secateurs.questions.sandbox import Sandbox, pack, unpack

BOX = Sandbox()
SMALL = Sandbox(seconds=1, clock=1, memory=1 << 28)
TEST = "assert f(2) == 4\nassert f(3) == 9\n"
RIGHT = "\ndef f(x):\n    return x * x\n"


def passes(program: str, tests: str = TEST, box: Sandbox = BOX) -> bool:
    return box.passes(program, tests, ("f",))


def all_pass(programs: dict[str, str], box: Sandbox = BOX) -> dict[str, bool]:
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(programs, pool.map(partial(passes, box=box), programs.values()), strict=True))


def test_right_passes_and_wrong_fails():
    assert passes(RIGHT)
    assert not passes("def f(x):\n    return 4\n")
    assert not passes("def g(x):\n    return x * x\n")
    assert not passes("def f(x) return")
    assert not passes("def f(x):\n    raise ValueError\n")
    assert not passes("")


FORGED = {
    "leave early": "import sys\nsys.exit(0)",
    "leave at once": "import os\nos._exit(0)",
    "leave when called": "import os\ndef f(x):\n    os._exit(0)",
    "print the verdict": "print('pass', flush=True)\nimport os\nfor fd in range(32):\n"
    "    try: os.write(fd, b'pass\\n')\n    except OSError: pass\nos._exit(0)",
    "print the verdict when called": "import os\ndef f(x):\n  for fd in range(32):\n"
    "    try: os.write(fd, b'pass\\n')\n    except OSError: pass\n  os._exit(0)",
    "equal everything": "class E:\n    def __eq__(self, other): return True\n    __hash__ = None\ndef f(x): return E()",
    "be an int that equals everything": "class E(int):\n    def __eq__(self, other): return True\n"
    "    __hash__ = None\ndef f(x): return E(0)",
    "change the builtins": "import builtins\nbuiltins.AssertionError = None\nbuiltins.compile = builtins.exec = print\n"
    "def f(x): return 0",
    "change the examiner": "import __main__\n__main__.examine = print\n__main__.json.loads = lambda s: ['value', 4]\n"
    "def f(x): return 0",
    "an answer without an end": "import __main__, sys\ndef f(x):\n    out = sys._getframe(1).f_locals['outbox']\n"
    "    while True: out.write(b'[' * 10**6)",
    "a nested answer": "def f(x):\n    deep = []\n    for _ in range(10**5): deep = [deep]\n    return deep",
    "an answer that is not data": "def f(x): return f",
    "a false protocol": "import sys\ndef f(x):\n    out = sys._getframe(1).f_locals['outbox']\n"
    '    out.write(b\'["value", ["eval", ["1"]]]\\n{}\\npass\\n\'); out.flush()\n    return 4',
}


def test_a_verdict_cannot_be_forged():
    assert all_pass(FORGED) == dict.fromkeys(FORGED, False)


def test_the_tests_are_nowhere_in_the_process_of_the_program():
    program = """
import gc, re, sys
def f(x):
    frame, seen = sys._getframe(), gc.get_objects()
    while frame:
        seen += [frame.f_locals, frame.f_globals]
        frame = frame.f_back
    seen = [repr(thing)[:10**5] for thing in seen if isinstance(thing, (dict, list, tuple))]
    found = [re.search(r"f\\(2\\) == (\\d{8})", text) for text in seen]
    return [int(match[1]) for match in found if match][0]
"""
    assert not passes(program, "assert f(2) == 81273645")
    assert passes(program + "\nSEEN = 'f(2) == 81273645'", "assert f(2) == 81273645"), "it would find them"


def attempt(code: str) -> str:
    """A program that tries `code` when called, and answers rightly only if that succeeded."""
    return "import os, sys\ndef f(x):\n" + "".join(f"    {line}\n" for line in code.splitlines()) + "    return x * x\n"


FORBIDDEN = {
    "a socket": "import socket\nsocket.socket()",
    "a socket pair": "import socket\nsocket.socketpair()",
    "a name server": "import socket\nsocket.getaddrinfo('localhost', 80)",
    "a process": "os.fork()",
    "a command": "os.execv('/bin/true', ['true'])",
    "a command by the shell": "assert os.system('true') == 0",
    "a thread": "import threading\nthreading.Thread(target=print).start()",
    "kill the parent": "os.kill(os.getppid(), 9)",
    "kill everything": "os.kill(-1, 9)",
    "kill its group": "os.killpg(0, 9)",
    "limits of the parent": "import resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU)",
    "its own limits": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (9, 9))",
    "catch a signal": "import signal\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)",
    "put off the alarm": "import signal\nsignal.setitimer(signal.ITIMER_REAL, 0)",
    "the parent's environment": "open(f'/proc/{os.getppid()}/environ').read()",
    "its own environment in /proc": "open('/proc/self/environ').read()",
    "the shell's environment": "assert 'PATH' in os.environ or 'HOME' in os.environ",
    "a file": "open('/etc/passwd').read()",
    "a list of files": "os.listdir('/')",
    "a file in its directory": "open('x', 'w')",
    "a file in the home": "open(os.path.expanduser('~/secateurs-was-here'), 'w')",
    "delete": "os.remove(TARGET)",
    "delete a directory": "os.rmdir(os.path.dirname(TARGET))",
    "rename": "os.rename(TARGET, TARGET + '2')",
    "change a mode": "os.chmod(TARGET, 0o777)",
    "link": "os.symlink(TARGET, 'link')",
    "another place": "os.chdir('/')",
    "another group": "os.setsid()",
    "memory with a name": "os.memfd_create('x')",
    "native code": "import ctypes\nlibc = ctypes.CDLL(None)\nassert libc.getppid() > 1",
    "native code, a socket": "import ctypes\nlibc = ctypes.CDLL(None)\nassert libc.socket(2, 1, 0) >= 0",
    "native code, the old calls": "import ctypes\nassert ctypes.CDLL(None).syscall(0x40000029, 2, 1, 0) >= 0",
    "native code, io_uring": "import ctypes\nassert ctypes.CDLL(None).syscall(425, 1, b'\\0' * 120) >= 0",
    "a module from outside": "import wave",
    "an installed package": "import pytest",
}


def test_what_is_forbidden_does_not_happen(tmp_path):
    target = tmp_path / "inside" / "target"
    target.parent.mkdir()
    target.write_text("kept")
    mode = target.stat().st_mode
    programs = {name: f"TARGET = {str(target)!r}\n{attempt(code)}" for name, code in FORBIDDEN.items()}
    assert all_pass(programs) == dict.fromkeys(FORBIDDEN, False)
    assert target.read_text() == "kept" and target.stat().st_mode == mode and os.listdir(target.parent) == ["target"]
    assert not (Path.home() / "secateurs-was-here").exists()


def test_what_is_forbidden_would_succeed_without_the_lock(tmp_path):
    """So that the table above tests the lock, and not its own mistakes."""
    (tmp_path / "target").write_text("gone")
    loose = Sandbox(isolated=False)
    for name in (
        "a socket",
        "a list of files",
        "the parent's environment",
        "native code",
        "a module from outside",
    ):
        assert passes(attempt(FORBIDDEN[name]), box=loose), name
    program = f"TARGET = {str(tmp_path / 'target')!r}\n" + attempt(FORBIDDEN["delete"])
    assert passes(program, "assert f(2) == 4", loose)
    assert not (tmp_path / "target").exists()


GREEDY = {
    "a wait": "import time\nwhile True: time.sleep(9)",
    "an endless loop that catches": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "memory": "x = bytearray(10**10)",
    "memory bit by bit": "x = []\nwhile True: x.append(bytearray(10**7))",
    "output": "while True: print('x' * 10**6)",
    "a fork bomb": "import os\nwhile True: os.fork()",
    "recursion in C": "x = None\nfor _ in range(10**6): x = (x,)\nhash(x)\nrepr(x)",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef g(n): return g(n + 1)\ng(0)",
}


WRONG_AND_STAYS = """
import sys, time
def f(x):
    out = sys._getframe(1).f_locals['outbox']
    out.write(b'["value", 0]\\n')
    out.flush()
    time.sleep(999)
"""


def test_seconds_of_cpu_are_limited_whatever_the_clock_allows():
    started = time.monotonic()
    assert not passes("while True: pass", box=Sandbox(seconds=1, clock=600))
    assert time.monotonic() - started < 500


def test_memory_is_limited():
    program = "def f(x):\n    space = bytearray(4 * 10**8)\n    return x * x\n"
    assert passes(program, box=Sandbox(memory=1 << 30)) and not passes(program, box=Sandbox(memory=1 << 28))


def test_what_is_greedy_or_waits_ends_and_nothing_stays_behind(monkeypatch, tmp_path):
    started: list[subprocess.Popen[bytes]] = []
    begin = subprocess.Popen

    def noted(*args, **kwargs):
        started.append(begin(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", noted)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert all_pass(GREEDY, SMALL) == dict.fromkeys(GREEDY, False)
    assert passes(RIGHT)
    assert not passes(WRONG_AND_STAYS, box=Sandbox(clock=600))
    for process in started:
        with pytest.raises(ProcessLookupError):
            for _ in range(6000):  # a killed grandchild is gone once its new parent has reaped it
                os.killpg(process.pid, 0)
                time.sleep(0.01)
    assert len(started) == len(GREEDY) + 2 and not list(tmp_path.iterdir())


def test_the_program_ends_by_itself_when_its_parent_is_killed():
    code = "from secateurs.questions.sandbox import Sandbox\n"
    code += "Sandbox(clock=1).passes('import time; time.sleep(99)', 'f()', ('f',))"
    parent = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})

    def children(pid: int) -> list[int]:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def until(found, wait=60.0):
        end = time.monotonic() + wait
        while not (value := found()) and time.monotonic() < end:
            time.sleep(0.02)
        return value

    inside = until(lambda: [(child, grandchild) for child in children(parent.pid) for grandchild in children(child)])
    assert inside
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pair in inside for pid in pair))


def test_the_environment_and_the_directory_are_empty_and_nothing_is_random():
    assert passes(
        "import os\ndef f(x):\n    return x * x if set(os.environ) <= {'PYTHONHASHSEED', 'LC_CTYPE'} else 0\n"
    )
    program = "import random\ndef f(x):\n    return [random.random(), list({'a', 'b', 'c', 'd', 'e', 'f'})]\n"
    first = "x = f(0)\nassert x == "
    for box in (Sandbox(), Sandbox()):
        import random

        assert passes(program, f"{first}[{random.Random(0).random()!r}, x[1]]", box)
    assert all(
        passes("def f(x):\n    return hash('secateurs')", f"assert f(0) == {hash_of('secateurs')}") for _ in range(2)
    )


def hash_of(text: str) -> int:
    code = f"print(hash({text!r}))"
    return int(subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": "0"}, capture_output=True).stdout)


@pytest.mark.parametrize(
    "value",
    [
        None, True, 3, -(10**40), 2.5, float("inf"), "x\ud83d\n", b"\x00", 1 + 2j, [], [1, [2]], (1, ("a",)), {1, 2},
        set(), frozenset({1}), {1: "a", (1, 2): [3]}, {}, int, str,
    ],
    ids=repr,
)  # fmt: skip
def test_plain_data_comes_through_with_its_type(value):
    import json

    back = unpack(json.loads(json.dumps(pack(value))))
    assert back == value and type(back) is type(value)


@pytest.mark.parametrize(
    ("old", "new", "lesson"),
    [
        ("MACHINES = {", "MACHINES = {} and {", "locked in: no filter for linux on .*isolated = false"),
        ("FILTER = 38, 22, 2", "FILTER = 38, 22, 99", "locked in: the kernel refuses a filter .Invalid argument"),
        ("0x80000000, 0x00050001", "0x80000000, 0x7FFF0000", "could use a socket, read"),
    ],
)  # fmt: skip
def test_where_programs_cannot_be_locked_in_they_are_not_run(monkeypatch, tmp_path, old, new, lesson):
    """Copies of the file: no filter for this machine, one that the kernel refuses, one that lets everything through."""
    source = Path(sandbox.__file__).read_text()
    assert old in source
    (tmp_path / "sandbox.py").write_text(source.replace(old, new))
    monkeypatch.setattr(sandbox, "__file__", str(tmp_path / "sandbox.py"))
    with pytest.raises(ValueError, match=lesson):
        passes(RIGHT)
    assert passes(RIGHT, box=Sandbox(isolated=False))
