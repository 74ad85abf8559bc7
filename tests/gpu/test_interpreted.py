"""Runs the kernels' checks under Triton's interpreter, in a process of their own.

Triton decides when a kernel is defined whether to interpret it, so a process that interprets cannot also compile.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = sorted(map(str, (Path(__file__).parent / "interpreted").glob("check_*.py")))

pytest.importorskip("triton", reason="Triton is not installed")


def run_checks(marks: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "-m", marks, *CHECKS]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(600)
def test_checks_pass_when_interpreted() -> None:
    run_checks("not full")


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_long_checks_pass_when_interpreted() -> None:
    run_checks("full")
