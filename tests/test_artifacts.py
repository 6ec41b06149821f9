"""Content keys tell values apart; writes are all or nothing whatever fails."""

import errno
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import pytest

from secateurs.artifacts import (
    Behind,
    atomic_folder,
    atomic_write,
    canonical_hash,
    canonical_json,
    folder_hash,
    locked,
    model_hash,
    read_json,
    sweep_temp,
    tokenizer_hash,
    write_json,
)


@dataclass(frozen=True)
class Stage:
    name: str
    damp: float
    shape: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class OtherStage:
    name: str
    damp: float
    shape: tuple[int, ...] = (1, 2)


class Colour(StrEnum):
    RED = "red"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_canonical_json_is_one_text_per_value() -> None:
    value = {"b": [1, 1.0, True, None], "a": Stage("ü", 0.01)}
    expected = '{"a":{"@dataclass":"Stage","damp":0.01,"name":"\\u00fc","shape":[1,2]},"b":[1,1.0,true,null]}'
    assert canonical_json(value) == expected
    assert canonical_json(dict(reversed(value.items()))) == expected
    # The key of a stage must not move between versions of this package: this is what sha256sum says of `expected`.
    assert canonical_hash(value) == "d24a2fb04257a203c0deb5a7d16ecef2804ae6f3aee1604f15207cb8027660c3"


def test_different_values_have_different_hashes() -> None:
    values = [1, 1.0, True, "1", None, [], {}, [1], {"1": 1}, Stage("a", 1.0), OtherStage("a", 1.0), Stage("a", 2.0)]
    assert len({canonical_hash(value) for value in values}) == len(values)


@pytest.mark.parametrize("value", [Path("x"), {1}, b"x", object(), Colour.RED, Stage, {1: 2}, {"@dataclass": "Stage"}])
def test_a_value_without_canonical_form_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match=r"value\.deep\[1\]"):
        canonical_hash({"deep": [0, value]})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_equals_nothing_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"value\.x"):
        canonical_hash({"x": value})


def test_atomic_write_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, "old")
    atomic_write(path, b"\x00new")
    assert path.read_bytes() == b"\x00new"
    assert names(tmp_path) == ["file"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_a_failing_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, code: int
) -> None:
    path = tmp_path / "file"
    atomic_write(path, "old")

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(OSError) as caught:
            atomic_write(path, "new")
    assert caught.value.errno == code
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_disk_that_fills_up_half_way(tmp_path: Path) -> None:
    # A real limit of the system on file size stops the write after 4096 of 10000 bytes, so os.write falls short first.
    script = (
        "import resource, sys; from secateurs.artifacts import atomic_write\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: atomic_write(sys.argv[1], b'n' * 10000)\n"
        "except OSError as error: print(error.errno)\n"
    )
    path = tmp_path / "file"
    atomic_write(path, "old")
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(errno.EFBIG)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_folder_that_cannot_be_flushed_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flush = os.fsync

    def fsync(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").resolve().is_dir():
            raise OSError(errno.EINVAL, "not here")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    atomic_write(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"


def test_atomic_folder_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with atomic_folder(out) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "weights").write_text("w")
        assert not out.exists()
        assert folder.parent == out.parent  # the rename must stay on one file system
    assert (out / "sub" / "weights").read_text() == "w"
    assert names(out.parent) == ["out"]


def test_atomic_folder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("h")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_atomic_folder_replaces_only_when_told(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with atomic_folder(out) as folder:  # an empty folder holds nothing that could be lost
        (folder / "a").write_text("1")
    with pytest.raises(ValueError, match="not empty"), atomic_folder(out):
        raise AssertionError("refused before any work")
    with pytest.raises(RuntimeError), atomic_folder(out, overwrite=True):
        raise RuntimeError
    assert names(out) == ["a"]
    with atomic_folder(out, overwrite=True) as folder:
        (folder / "b").write_text("2")
        assert names(out) == ["a"]
    assert names(out) == ["b"]
    assert names(tmp_path) == ["out"]


def test_atomic_folder_never_replaces_what_came_meanwhile(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OSError), atomic_folder(out) as folder:
        (folder / "mine").write_text("m")
        out.mkdir()
        (out / "theirs").write_text("t")
    assert names(out) == ["theirs"]
    assert names(tmp_path) == ["out"]


def test_atomic_folder_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(ValueError, match="file"), atomic_folder(tmp_path / "out", overwrite=True):
        pass
    assert (tmp_path / "out").read_text() == "precious"


def test_atomic_folder_keeps_the_old_one_if_the_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with atomic_folder(out) as folder:
        (folder / "a").write_text("1")
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if ".tmp-" in Path(source).name:
            raise OSError(errno.ENOSPC, "full")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="full"), atomic_folder(out, overwrite=True) as folder:
        (folder / "b").write_text("2")
    assert names(out) == ["a"]
    assert names(tmp_path) == ["out"]


def killed_folder_writer(out: Path, when: str) -> None:
    """Write a folder `out` in another process, which kills itself while writing, or between the two renames."""
    script = (
        "import os, signal, sys; from secateurs.artifacts import atomic_folder\n"
        "out, when = sys.argv[1:]\n"
        "rename = os.rename\n"
        "def rename_and_die(source, target):\n"
        "    rename(source, target)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "with atomic_folder(out, overwrite=True) as folder:\n"
        "    (folder / 'b').write_text('2')\n"
        "    if when == 'writing': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    os.rename = rename_and_die\n"
    )
    done = subprocess.run([sys.executable, "-c", script, out, when], check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("when", ["writing", "between renames"])
def test_what_a_killed_folder_writer_leaves_is_swept(tmp_path: Path, when: str) -> None:
    out = tmp_path / "out"
    with atomic_folder(out) as folder:
        (folder / "a").write_text("1")
    killed_folder_writer(out, when)
    assert names(tmp_path) != ["out"]
    (tmp_path / f".busy.tmp-{os.getpid()}-0").write_text("of a living process")
    (tmp_path / ".other.tmp-file").write_text("of somebody else")
    assert len(sweep_temp(tmp_path)) == 1
    assert names(tmp_path) == [f".busy.tmp-{os.getpid()}-0", ".other.tmp-file", "out"]
    assert names(out) == ["a"]  # also when it had been set aside already


def test_the_next_writer_sweeps_its_own_name(tmp_path: Path) -> None:
    killed_folder_writer(tmp_path / "out", "writing")
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "c").write_text("3")
    assert names(tmp_path) == ["out"]


def test_json_round_trip_and_stable_bytes(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": ["ü", 0.1]})
    write_json(tmp_path / "b.json", {"a": ["ü", 0.1], "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert read_json(tmp_path / "a.json") == {"a": ["ü", 0.1], "b": 1}
    for value, error in ((float("nan"), ValueError), (Path("x"), TypeError)):
        with pytest.raises(error):
            write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == {"a": ["ü", 0.1], "b": 1}


@pytest.mark.parametrize("content", [b'{\n"a": \n}', b'{\n"a": 1,\n"\xff": 2}', b"\n\n"])
def test_bad_json_names_file_and_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.json:3: not valid JSON"):
        read_json(tmp_path / "bad.json")


def test_missing_json_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


def test_folder_hash_is_about_names_and_content(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(bytes(range(256)) * 9000)
        (folder / "tokenizer.json").write_text("{}")
    (b / "README.md").write_text("not part of the model")
    before = model_hash(a)
    assert before == model_hash(b) == folder_hash(a, ("*.safetensors", "config.json"))
    assert tokenizer_hash(a) == tokenizer_hash(b) != before
    (b / "chat_template.jinja").write_text("x")
    assert tokenizer_hash(a) != tokenizer_hash(b)
    with open(b / "model.safetensors", "r+b") as file:
        file.seek(2_000_000)
        file.write(b"!")
    assert model_hash(b) != before
    (a / "model.safetensors").rename(a / "model-00001-of-00001.safetensors")
    assert model_hash(a) != before


def test_a_folder_without_weights_has_no_model_hash(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no file matches \*\.safetensors"):
        model_hash(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        model_hash(tmp_path / "none")


def test_what_is_done_behind_is_in_order_and_its_failure_is_not_lost():
    behind, done, go = Behind(), [], threading.Event()
    behind.do(lambda: go.wait(10) and done.append(1))
    assert not done, "nobody waits for it"
    go.set()
    behind.do(lambda: done.append(2))
    behind.wait()
    assert done == [1, 2]

    def fail() -> None:
        raise OSError("full")

    behind.do(fail)
    with pytest.raises(OSError, match="full"):
        behind.do(lambda: done.append(3))
    behind.do(fail)
    with pytest.raises(OSError, match="full"):
        behind.wait()
    behind.wait()
    assert done == [1, 2], "nothing is done after a failure that nobody has seen"


def test_a_locked_folder_is_for_one(tmp_path):
    taken = pytest.raises(ValueError, match=f"cell: process {os.getpid()} is writing this cell; wait for it or stop")
    with locked(tmp_path / "cell", "cell"), taken, locked(tmp_path / "cell", "cell"):
        pass
    with locked(tmp_path / "cell", "cell"):
        pass
