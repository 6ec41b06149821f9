"""How the compiled kernels are built: with OpenMP, or without it where a compiler has none, as Apple's.

Everything else is in pyproject.toml.
"""

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

OPENMP = "-fopenmp"


class BuildKernels(build_ext):
    """Tries again without OpenMP; the C code is the same, and its kernels run in one thread then."""

    def build_extension(self, ext: Extension) -> None:
        """Build one. CompileError or LinkError where that does not help."""
        try:
            super().build_extension(ext)
        except (CompileError, LinkError):
            if OPENMP not in ext.extra_compile_args:
                raise
            self.warn(f"{ext.name} cannot be built with {OPENMP}: once more without, for one thread")
            ext.extra_compile_args = [one for one in ext.extra_compile_args if one != OPENMP]
            ext.extra_link_args = [one for one in ext.extra_link_args if one != OPENMP]
            super().build_extension(ext)


if __name__ == "__main__":  # so that a test can read it
    setup(cmdclass={"build_ext": BuildKernels})
