"""Content keys, and writes that survive a crash: canonical hashes, atomic files and folders. No torch.

Every write goes to a temporary name in the same folder, is flushed to disk and then renamed into place, so a reader
sees the old content or the new, never half of it. Temporary names carry the writer's process id: `sweep_temp` removes
those a killed process left behind, and no others.
"""

import dataclasses
import errno
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_TEMP_NAME = re.compile(r"\.(?P<name>.+)\.(?P<kind>tmp|old)-(?P<pid>\d{1,9})-\d+")
_serial = itertools.count()


def canonical_json(value: object) -> str:
    """One text for one value: sorted keys, no spaces, ASCII; tuples are lists, a dataclass carries its class name.

    Raises TypeError for any other type, also for a subclass such as a numpy float or an Enum (nothing is turned into
    text behind your back), and ValueError for NaN and infinities, which equal nothing and so can be no part of a key.
    """
    return json.dumps(_plain(value, "value"), sort_keys=True, separators=(",", ":"), allow_nan=False)


def canonical_hash(value: object) -> str:
    """sha256 (hex) of `canonical_json(value)`: a stage's key, from its dataclass, input keys and schema version."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def _plain(value: Any, where: str) -> object:
    """`value` in the types JSON has; `where` names the place of a value that cannot be converted."""
    if value is None or type(value) in (str, int, bool):
        return value
    if type(value) is float:
        if not math.isfinite(value):
            raise ValueError(f"{where}: {value} has no canonical form; use None for a missing number")
        return value
    if type(value) in (list, tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if not isinstance(value, type) and dataclasses.is_dataclass(value):
        fields = {f.name: _plain(getattr(value, f.name), f"{where}.{f.name}") for f in dataclasses.fields(value)}
        return {"@dataclass": type(value).__qualname__} | fields
    if type(value) is dict:
        for key in value:
            if type(key) is not str or key == "@dataclass":
                raise TypeError(f"{where}: {key!r} cannot be a key of a canonical dict; use other text")
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    raise TypeError(
        f"{where}: a {type(value).__module__}.{type(value).__qualname__} has no canonical form; "
        "use dataclasses, dicts, lists, str, int, float, bool and None"
    )


def atomic_write(path: Path | str, content: bytes | str) -> None:
    """Replace the file `path` by `content`, all or nothing.

    Text is written as UTF-8. The bytes are on disk when this returns. An OSError (disk full, no permission) leaves
    the old file as it was.
    """
    with atomic_file(path) as temp, temp.open("wb", buffering=0) as file:
        write_all(file.fileno(), content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """Yield the path of an empty file that replaces the file `path` when the block ends well, else is removed.

    Its bytes are on disk then.
    """
    path = Path(path)
    temp = _temp_sibling(path, "tmp")
    try:
        temp.touch()
        mode = temp.stat().st_mode  # 0o666 less the umask, as of any file
        yield temp
        if temp.stat().st_mode != mode:  # safetensors puts a file of its own there, which others may not read
            temp.chmod(mode)
        fsync_path(temp)
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)  # after the rename there is nothing left to remove
    fsync_path(path.parent)


def write_all(descriptor: int, content: bytes) -> None:
    """Write all of `content`; `os.write` alone may stop short."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def fsync_path(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE file systems cannot flush a folder and say EINVAL; a rename is all they offer.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


class Behind:
    """Does one thing after the other in the background. What fails there is raised by the next call."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def do(self, work: Callable[[], None]) -> None:
        """Start this, when what was before it is done."""
        self.wait()
        self._last = self._pool.submit(work)

    def wait(self) -> None:
        """Until all is done."""
        last, self._last = self._last, None
        if last is not None:
            last.result()


@contextmanager
def atomic_folder(path: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends well, and is removed when it raises.

    An existing folder that holds anything is refused (ValueError, before any work is done) unless `overwrite`: then
    it stays whole until the new one is complete, and is then removed with all it holds, so the caller first checks
    whose it is. A kill between the two renames leaves the old folder under a temporary name; `sweep_temp`, which the
    next call runs for this name, puts it back. Missing parent folders are made.
    """
    path = Path(path).resolve()  # a rename cannot replace a symbolic link to a folder
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep_temp(path.parent, path.name)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path}: this is a file and a folder is wanted; choose another path")
    if path.exists() and any(path.iterdir()) and not overwrite:
        raise ValueError(f"{path}: the folder exists and is not empty; choose another path")
    temp, old = _temp_sibling(path, "tmp"), _temp_sibling(path, "old")
    if temp.exists():  # of a dead process whose id is ours now, as happens in containers
        shutil.rmtree(temp)
    try:
        temp.mkdir()
        yield temp
        for folder, _, names in os.walk(temp):
            for name in names:
                fsync_path(Path(folder, name))
            fsync_path(Path(folder))
        if overwrite and path.exists():
            os.rename(path, old)
            try:
                os.rename(temp, path)
            except BaseException:
                os.rename(old, path)
                raise
        else:
            os.rename(temp, path)  # fails if someone else filled `path` meanwhile
        fsync_path(path.parent)
    finally:
        if temp.exists():
            shutil.rmtree(temp)
    if old.exists():
        shutil.rmtree(old)


def lock(folder: Path, what: str) -> int:
    """Descriptor of a folder's lock file, locked and with our process id in it. The system unlocks it when we die.

    ValueError if another process, or this one, has it: it is writing this `what`.
    """
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        write_all(descriptor, str(os.getpid()).encode())
    except BlockingIOError:
        owner = os.read(descriptor, 32).decode(errors="replace") or "that just started"
        os.close(descriptor)
        raise ValueError(f"{folder}: process {owner} is writing this {what}; wait for it or stop it") from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """`lock` while open, of a folder that is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = lock(folder, what)
    try:
        yield
    finally:
        os.close(descriptor)


def _temp_sibling(path: Path, kind: str) -> Path:
    # The serial number keeps two threads that write one path apart.
    return path.with_name(f".{path.name}.{kind}-{os.getpid()}-{next(_serial)}")


def sweep_temp(folder: Path | str, name: str | None = None) -> list[Path]:
    """Remove what killed writers left in `folder` (of the target `name` only, if given); returns the removed paths.

    A folder that was set aside by a writer killed before its successor was in place is put back instead. Files of
    living processes stay; ids are those of this machine, so sweep only folders in which this machine alone writes.
    """
    removed = []
    for entry in sorted(Path(folder).iterdir()):
        match = _TEMP_NAME.fullmatch(entry.name)
        if match is None or name not in (None, match["name"]) or _alive(int(match["pid"])):
            continue
        target = entry.with_name(match["name"])
        if match["kind"] == "old" and not target.exists():
            os.rename(entry, target)
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
        removed.append(entry)
    return removed


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it exists and is someone else's
        return True
    return True


def read_json(path: Path | str) -> Any:
    """The value in a JSON file. ValueError names file and line if it is not JSON; FileNotFoundError if missing."""
    content = Path(path).read_bytes()
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not valid JSON (the bytes are not UTF-8 text)") from None


def write_json(path: Path | str, value: object) -> None:
    """Write `value` as JSON, atomically; equal values give equal bytes (sorted keys, indent 2). ValueError for NaN."""
    atomic_write(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def folder_hash(path: Path | str, patterns: Sequence[str], *, optional: Sequence[str] = ()) -> str:
    """sha256 (hex) over name and content of the files in `path` that match the glob `patterns` or `optional`.

    Every one of `patterns` must match a file (ValueError), so that a folder without weights never passes for a model.
    Files are streamed, several at a time; the cost is reading them once (about 1 GB/s a file). Names count: the same
    weights in other shards hash differently.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; give the folder that holds {' and '.join(patterns)}")
    files: set[Path] = set()
    for pattern in (*patterns, *optional):
        found = [file for file in path.glob(pattern) if file.is_file()]
        if not found and pattern in patterns:
            raise ValueError(f"{path}: no file matches {pattern}, so this folder cannot be identified")
        files.update(found)
    named = {file.relative_to(path).as_posix(): file for file in files}
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        digests = list(pool.map(file_hash, named.values()))
    return canonical_hash(dict(zip(named, digests, strict=True)))


def file_hash(path: Path | str) -> str:
    """sha256 (hex) of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_hash(path: Path | str) -> str:
    """`folder_hash` of what a model computes with: config.json and the safetensors weights."""
    return folder_hash(path, ("config.json", "*.safetensors"))


def tokenizer_hash(path: Path | str) -> str:
    """`folder_hash` of what turns messages into ids: tokenizer files, vocabulary, chat template."""
    return folder_hash(
        path,
        ("tokenizer*",),
        optional=("vocab.*", "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.*"),
    )
