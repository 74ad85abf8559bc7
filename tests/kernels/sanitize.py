"""Builds the C++ kernels with the address and undefined-behaviour sanitizers and runs their tests: `make sanitize`.

The build is apart from the installed one, in build/sanitize. Scratch memory has red zones there (`cpu/scratch.h`), and
tensors are allocated by malloc, so that reading or writing beyond either shows. The instruction sets that this machine
has are run. Arguments are passed to pytest.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build/sanitize"
SANITIZERS = (
    "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-sanitize=alignment"  # tensors may lie anywhere
    " -O1 -g1 -fno-omit-frame-pointer"
)
TESTS = Path(__file__).parent
FOUND = BUILD / "found"
LOG = f"log_path={FOUND / 'report'}"
NOT_OF_KERNELS = {
    "built",
    "headers",
    "library",
    "ops",
    "plan",
    "certificate",
    "resident_memory",
}  # or in other tests too


def library(name: str) -> str:
    """A runtime library of the compiler's."""
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return str(Path(found.stdout.strip()).resolve())


def build() -> None:
    """A copy of the package with an instrumented module."""
    package = BUILD / "kernels"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "kernels", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, BUILD)
    environment = {**os.environ, "DSC_SANITIZE": SANITIZERS}
    subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=BUILD, env=environment, check=True)


def run(arguments: list[str]) -> int:
    """The tests' exit status."""
    preloaded = [library("libasan.so"), library("libubsan.so"), library("libstdc++.so")]
    environment = {
        **os.environ,
        "PYTHONPATH": str(BUILD / "kernels"),
        "LD_PRELOAD": " ".join(preloaded),
        # Python and torch keep memory until they end; torch's own code is not instrumented
        # findings go to files: what a test process writes as it dies is lost
        "ASAN_OPTIONS": f"detect_leaks=0:halt_on_error=1:allocator_may_return_null=1:detect_odr_violation=0:{LOG}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:halt_on_error=1:{LOG}",
        "PYTHONMALLOC": "malloc",
    }
    others = {TESTS / f"test_{name}.py" for name in NOT_OF_KERNELS}
    tests = sorted(str(test) for test in set(TESTS.glob("test_*.py")) - others)
    limits = ["-m", "not full", "-o", "timeout=1200", "-p", "no:cacheprovider"]
    shutil.rmtree(FOUND, ignore_errors=True)
    FOUND.mkdir(parents=True)
    command = [sys.executable, "-m", "pytest", "-q", *limits, *tests, *arguments]
    status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    reports = sorted(FOUND.iterdir())
    for report in reports:
        print(report.read_text(errors="replace"))
    return status or bool(reports)


if __name__ == "__main__":
    build()
    sys.exit(run(sys.argv[1:]))
