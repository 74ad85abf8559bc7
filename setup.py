"""Builds the CPU kernels: one object per instruction set, each with its own flags; the processor picks at run time.

Without a C++ compiler the package installs all the same, and plain torch serves.
"""

from __future__ import annotations

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

PACKAGE = Path("kernels/dsc_kernels")
COMMON = ["-std=c++20", "-O3", "-fopenmp", "-ffp-contract=fast", "-fvisibility=hidden", "-g0"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi"]
# `make sanitize` sets this: an instrumented build, which runs only with the sanitizers loaded first
SANITIZE = os.environ.get("DSC_SANITIZE", "").split()
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
FLAGS = {  # those that take the longest to compile come first, so that no core waits for one of them alone
    "cpu/avx2": AVX2,
    "cpu/avx512bf16": [*AVX512, "-mavx512bf16", "-mavx512vnni"],
    "cpu/avx512": AVX512,
    "cpu/baseline": ["-O1"],  # of processors of before 2013: more would take longer to compile than all others
    "bindings/module": [],
    "bindings/layers": [],
    "bindings/steps": [],
    "bindings/tokens": [],
    "bindings/scratch": [],
}


class BuildKernels(build_ext):
    """Compiles each source with the flags of its instruction set."""

    def build_extension(self, ext: Extension) -> None:
        compile_once = self.compiler.compile

        def compile_each(sources: list[str], *args: object, **kwargs: object) -> list[str]:
            def compile_one(source: str) -> list[str]:
                unit = Path(source).relative_to(PACKAGE).with_suffix("").as_posix()
                flags = [*COMMON, *WARNINGS, *FLAGS[unit], *SANITIZE]
                objects: list[str] = compile_once([source], *args, **{**kwargs, "extra_postargs": flags})
                return objects

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return [name for names in pool.map(compile_one, sources) for name in names]

        self.compiler.compile = compile_each
        super().build_extension(ext)


supported = platform.machine() in ("x86_64", "AMD64") and sys.platform == "linux"
kernels = Extension(
    "dsc_kernels._native",
    [str(PACKAGE / f"{unit}.cpp") for unit in FLAGS],
    depends=[str(header) for header in sorted(PACKAGE.glob("*/*.h"))],
    extra_link_args=["-fopenmp", *SANITIZE],
    language="c++",
    optional=True,
)
setup(ext_modules=[kernels] if supported else [], cmdclass={"build_ext": BuildKernels})
