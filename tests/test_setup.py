"""How the compiled kernels are built: without OpenMP where a compiler has none, and not at all where that fails too."""

import runpy
import sys
from ctypes import CDLL
from pathlib import Path
from shutil import which

import pytest
from setuptools import Distribution, Extension
from setuptools.errors import CompileError

BUILD = runpy.run_path(str(Path(__file__).parents[1] / "setup.py"))["BuildKernels"]
CODE = "int threads(void) {\n#ifdef _OPENMP\n    return 2;\n#endif\n    return 1;\n}\n"


@pytest.fixture
def build(tmp_path, monkeypatch):
    """What a C file says when it was built by a compiler: a shell script that ends with it."""
    (tmp_path / "one.c").write_text(CODE)

    def build(script: str) -> int:
        compiler = tmp_path / "compiler"
        compiler.write_text(f"#!/bin/sh\n{script}\n")
        compiler.chmod(0o755)
        monkeypatch.setenv("CC", str(compiler))
        flags = ["-O1", "-fopenmp"]
        extension = Extension("one", [str(tmp_path / "one.c")], extra_compile_args=flags, extra_link_args=flags[1:])
        command = BUILD(Distribution({"ext_modules": [extension]}))
        command.build_lib, command.build_temp = str(tmp_path / "lib"), str(tmp_path / "temp")
        command.ensure_finalized()
        command.run()
        return CDLL(command.get_ext_fullpath("one")).threads()

    return build


@pytest.mark.skipif(which("cc") is None, reason="no C compiler")
def test_openmp_is_left_out_where_a_compiler_refuses_it(build):
    refuse = 'case "$*" in *-fopenmp*) echo "unsupported option" >&2; exit 1;; esac'
    assert build(f'{refuse}\nexec cc "$@"') == 1


@pytest.mark.skipif(which("cc") is None, reason="no C compiler")
def test_openmp_is_left_out_where_its_library_is_missing(build):
    refuse = 'case "$*" in *" -c "*) ;; *-fopenmp*) echo "cannot find -lgomp" >&2; exit 1;; esac'
    assert build(f'{refuse}\nexec cc "$@"') == 1


@pytest.mark.skipif(which("cc") is None or sys.platform == "darwin", reason="no compiler that is known to have OpenMP")
def test_openmp_is_used_where_it_is(build):
    assert build('exec cc "$@"') == 2


def test_a_compiler_that_builds_nothing_is_an_error_of_its_own(build):
    with pytest.raises(CompileError):
        build("exit 1")
