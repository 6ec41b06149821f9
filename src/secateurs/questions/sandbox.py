"""Programs that a model wrote, tested where they can compute and answer, and do nothing else.

Two processes judge a program. The one that runs it gets calls through a pipe (a name, plain data) and answers with
plain data. The other, the examiner, holds the tests, calls through that pipe and compares what comes back; it alone
can give the verdict. Arguments are copies; what a program does to them in place is not seen. So a program cannot pass
by printing something, leaving early, changing `assert` or `==`, or looking for the tests, for none of it is where the
program is. What remains possible is to answer every call rightly by any means, such as a table learnt by heart.

Before either runs foreign code the kernel takes away (seccomp) every system call but those of ALLOWED: compute,
allocate, sleep, use pipes that are open already. No file, socket, process or signal is among them, so nothing can be
read (not the environment of the parent either), written, deleted, sent or killed; the modules of MODULES are loaded
before, others cannot be. It needs no privilege, and nothing that containers usually forbid. Each process then tries
what is forbidden, and ends if anything succeeds. Limits hold besides: CPU and wall-clock seconds, memory, an empty
directory, an empty environment, no site-packages.

Not enforced: how hard the program works CPU, caches and memory bus until its time is up. A fault in the kernel's
handling of an allowed call would be a way out. Without `isolated` only the limits hold.

Run as a program this file is those two processes: two JSON lines in, `ready` and a verdict out.
"""

import importlib
import json
import os
import platform
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any, NoReturn

# What may still be asked of the kernel: numbers on x86_64 and aarch64 (asm/unistd_64.h, asm-generic/unistd.h).
ALLOWED = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "lseek": (8, 62), "mmap": (9, 222),
    "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "rt_sigreturn": (15, 139), "sched_yield": (24, 124),
    "mremap": (25, 216), "madvise": (28, 233), "nanosleep": (35, 101), "getpid": (39, 172), "exit": (60, 93),
    "gettimeofday": (96, 169), "gettid": (186, 178), "futex": (202, 98), "restart_syscall": (219, 128),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "exit_group": (231, 94),
    "getrandom": (318, 278),
}  # fmt: skip
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of ALLOWED, AUDIT_ARCH_*
MODULES = [
    "_strptime", "abc", "array", "base64", "binascii", "bisect", "calendar", "cmath", "collections.abc", "contextlib",
    "copy", "csv", "ctypes", "dataclasses", "datetime", "decimal", "difflib", "enum", "fractions", "functools",
    "hashlib", "heapq", "html", "itertools", "math", "numbers", "operator", "pprint", "queue", "random", "re",
    "resource", "secrets", "socket", "statistics", "string", "textwrap", "timeit", "traceback", "types", "typing",
    "unicodedata", "uuid", "warnings",
]  # fmt: skip
START = 60.0  # seconds for the processes to be ready, on however busy a machine
ANSWER = 4 << 20  # bytes of one answer
ITEMS = 100_000  # that an iterator is followed for
NO_NEW_PRIVS, SET_SECCOMP, FILTER = 38, 22, 2  # prctl
KILL, EPERM, ALLOW = 0x80000000, 0x00050001, 0x7FFF0000  # SECCOMP_RET_*
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06  # BPF: a word of what is asked, compare and jump, decide


@dataclass(frozen=True, kw_only=True)
class Sandbox:
    """Limits of one program and, apart, of its examiner. Without `isolated` there is no lock, only limits."""

    seconds: int = 10
    """Of CPU."""
    clock: int = 30
    """Seconds by the clock; more than those of CPU, so that a busy machine fails no program."""
    memory: int = 1 << 29
    """Bytes of address space."""
    isolated: bool = True

    def prove(self) -> None:
        """ValueError, in a sentence, unless a program that is right passes here and runs locked in."""
        if not self.passes("def one():\n    return 1\n", "assert one() == 1", ("one",)):
            raise ValueError(f"a program that returns 1 fails here within {self.seconds} s and {self.memory:,} bytes")

    def passes(self, program: str, tests: str, names: tuple[str, ...], setup: str = "") -> bool:
        """Whether `tests` run to their end, with each of `names` calling the function of that name in `program`.

        `setup` runs before the tests, beside them. ValueError where the lock cannot be had, or not even a start.
        """
        command = [sys.executable, "-s", "-P", "-S", "-B", os.path.abspath(__file__)]
        command += map(str, (self.seconds, self.clock, self.memory, int(self.isolated)))
        with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryFile() as job:
            for line in (program, {"setup": setup, "tests": tests, "names": names}):
                job.write(json.dumps(line).encode() + b"\n")
            job.seek(0)
            process = subprocess.Popen(
                command, cwd=empty, env={"PYTHONHASHSEED": "0"}, start_new_session=True,
                stdin=job, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            assert process.stdout is not None
            try:
                first = _line(process.stdout, START)
                if first != b"ready\n":
                    raise ValueError(_refusal(first))
                return _line(process.stdout, self.clock) == b"pass\n"
            finally:
                os.killpg(process.pid, signal.SIGKILL)
                process.stdout.close()
                process.wait()


def _refusal(found: bytes) -> str:
    reason = found.decode("ascii", "replace").strip() or "its processes did not start"
    return (
        f"programs of a model are not run here, because they cannot be locked in: {reason}; that takes Linux with "
        f"seccomp on {' or '.join(MACHINES)}, or isolated = false in the question set, to run them with limits alone"
    )


def _line(stdout: IO[bytes], seconds: float) -> bytes:
    """One short line of `stdout`, or what came of it within `seconds`."""
    end, found = time.monotonic() + seconds, b""
    while not found.endswith(b"\n") and len(found) < 300 and (left := end - time.monotonic()) > 0:
        if select.select([stdout], [], [], left)[0]:
            more = os.read(stdout.fileno(), 1)
            if not more:
                break
            found += more
    return found


# From here on: inside the two processes.


SERIES: dict[str, Callable[[Any], Any]] = {
    "list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque, "iterator": iter,
}  # fmt: skip
TYPES: dict[str, type] = {kind.__name__: kind for kind in (bool, int, float, str, list, tuple, set, dict, type(None))}


def pack(value: Any) -> Any:
    """Plain data as JSON that `unpack` gives back with its types; subclasses become the type they extend.

    TypeError for anything else, such as a function or an object of the program's own class.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if isinstance(value, bytes):
        return ["bytes", value.hex()]
    if isinstance(value, dict):
        return ["dict", [[pack(key), pack(entry)] for key, entry in value.items()]]
    for name in ("list", "tuple", "set", "frozenset", "deque"):
        if isinstance(value, SERIES[name]):  # type: ignore[arg-type]
            return [name, [pack(item) for item in value]]
    if isinstance(value, Iterator):
        return ["iterator", [pack(item) for _, item in zip(range(ITEMS), value, strict=False)]]
    if value in TYPES.values():
        return ["type", value.__name__]
    raise TypeError(f"{type(value).__name__} is not plain data")


def unpack(value: Any) -> Any:
    """What `pack` was given. Anything else in it raises."""
    if not isinstance(value, list):
        return value
    kind, content = value
    if kind == "complex":
        return complex(*content)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "dict":
        return {unpack(key): unpack(entry) for key, entry in content}
    return TYPES[content] if kind == "type" else SERIES[kind]([unpack(item) for item in content])


def module(name: str) -> dict[str, Any]:
    """The scope of a new module, where `dataclass` and the like find it."""
    found = sys.modules[name] = type(sys)(name)
    return found.__dict__


def serve(program: str, inbox: IO[bytes], outbox: IO[bytes]) -> None:
    """Run the program, then answer calls of its functions until no more come."""
    scope = module("program")
    exec(compile(program, "program", "exec"), scope)
    for line in inbox:
        name, args, kwargs = json.loads(line)
        try:
            reply = ["value", pack(scope[name](*unpack(args), **unpack(kwargs)))]
        except Exception as error:
            reply = ["raised", repr(error)[:200]]
        outbox.write(json.dumps(reply).encode() + b"\n")
        outbox.flush()


def examine(job: dict[str, Any], inbox: IO[bytes], outbox: IO[bytes]) -> None:
    """Run the tests, with functions that ask the program. Whatever raises here is a fail."""

    def remote(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            outbox.write(json.dumps([name, pack(args), pack(kwargs)]).encode() + b"\n")
            outbox.flush()
            line = inbox.readline(ANSWER)
            if not line.endswith(b"\n"):
                raise EOFError("the program ended, or its answer does not")
            kind, value = json.loads(line)
            if kind != "value":
                raise RuntimeError(value)
            return unpack(value)

        return call

    scope = module("tests")
    exec(compile(job["setup"], "setup", "exec"), scope)
    scope.update({name: remote(name) for name in job["names"]})
    exec(compile(job["tests"], "tests", "exec"), scope)


def limit(seconds: int, clock: int, memory: int) -> None:
    """What the kernel counts, set before the lock: nothing inside can raise it, and no signal is caught inside."""
    import resource

    limits = {"CPU": seconds, "FSIZE": 0, "CORE": 0, "NPROC": 0, "NOFILE": 32}
    if sys.platform == "linux":  # elsewhere the limit on address space cannot be set or is not kept
        limits["AS"] = memory
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    signal.alarm(clock)


def lock() -> None:
    """From here on this process may make no system call but those of ALLOWED. OSError where that cannot be had."""
    import ctypes

    if sys.platform != "linux" or platform.machine() not in MACHINES:
        raise OSError(f"no filter for {sys.platform} on {platform.machine()}")
    column, machine = MACHINES[platform.machine()]
    numbers = [entry[column] for entry in ALLOWED.values()]
    steps = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, machine), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    steps += [(EQUAL, len(numbers) - at, 0, number) for at, number in enumerate(numbers)]
    steps += [(RETURN, 0, 0, EPERM), (RETURN, 0, 0, ALLOW)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("HP", len(steps), ctypes.addressof(code)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    for arguments in ((NO_NEW_PRIVS, 1, 0, 0, 0), (SET_SECCOMP, FILTER, ctypes.addressof(program), 0, 0)):
        if prctl(*map(ctypes.c_ulong, arguments)) != 0:
            raise OSError(f"the kernel refuses a filter ({os.strerror(ctypes.get_errno())})")


def escapes(parent: int) -> list[str]:
    """What a locked process can do although it must not, tried: nothing, or the lock does not hold."""
    import socket

    def connect() -> None:
        with socket.socket() as outside:
            outside.connect(("127.0.0.1", 9))

    def fork() -> None:
        if os.fork() == 0:
            os._exit(0)

    attempts: dict[str, Callable[[], Any]] = {
        "use a socket": connect,
        "read a file": lambda: os.open("/proc/self/environ", os.O_RDONLY),
        "write a file": lambda: os.open("probe", os.O_WRONLY | os.O_CREAT),
        "start a process": fork,
        "signal its parent": lambda: os.kill(parent, 0),
    }
    found = []
    for name, attempt in attempts.items():
        try:
            attempt()
        except PermissionError:
            continue
        except OSError:  # it got as far as the kernel's own answer
            pass
        found.append(name)
    return found


def main() -> NoReturn:
    """Read the program, part in two, lock both, and be the examiner in one and the program in the other."""
    seconds, clock, memory, isolated = map(int, sys.argv[1:])
    for name in MODULES:
        importlib.import_module(name)
    requests, answers, parent = os.pipe(), os.pipe(), os.getpid()
    source = os.fdopen(0, "rb", buffering=0, closefd=False)  # the second line never is in the program's memory
    program = json.loads(source.readline())
    examiner = os.fork() != 0
    verdict = os.dup(1)
    job = json.loads(source.readline()) if examiner else {}
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    read, write = (answers[0], requests[1]) if examiner else (requests[0], answers[1])
    for unused in (null, requests[0] if examiner else requests[1], answers[1] if examiner else answers[0]):
        os.close(unused)
    inbox, outbox = os.fdopen(read, "rb"), os.fdopen(write, "wb")
    limit(seconds, clock, memory)
    trouble = ""
    if isolated:
        try:
            lock()
            found = escapes(parent)
            trouble = f"a locked process could {', '.join(found)}" if found else ""
        except OSError as error:
            trouble = str(error)
    sys.modules["random"].seed(0)
    if not examiner:
        os.close(verdict)
        outbox.write(json.dumps(trouble).encode() + b"\n")
        outbox.flush()
        if not trouble:
            serve(program, inbox, outbox)
        os._exit(0)
    trouble = trouble or json.loads(inbox.readline(ANSWER))
    os.write(verdict, f"{trouble or 'ready'}\n".encode())
    if not trouble:
        try:
            examine(job, inbox, outbox)
            os.write(verdict, b"pass\n")
        except BaseException:
            os.write(verdict, b"fail\n")
    os._exit(0)


if __name__ == "__main__":
    main()
