"""The end-to-end tests, unchanged, on each choice of kernels: the servers read it from their environment."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dsc_kernels import native

FOLDER = Path(__file__).parent
CORE = (
    "test_the_kernels_that_the_environment_asks_for_serve",
    "test_golden_greedy_ids_over_http",
    "test_the_api_process_has_no_torch_and_the_engine_has",
)
HIDDEN_AVX512 = pytest.param(
    "avx2",
    marks=pytest.mark.skipif(
        "avx2" not in native.available() or native.active() == "avx2", reason="no AVX-512 that could be hidden here"
    ),
)


def run_tests(kernels: str, *options: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not full", *options]
    environment = {**os.environ, "DSC_SERVE__KERNELS": kernels}
    process = subprocess.Popen(
        command,
        env=environment,
        cwd=FOLDER,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # where it was cut short its servers run on
    assert process.returncode == 0, output


@pytest.mark.timeout(400)
@pytest.mark.parametrize("kernels", ["plain", HIDDEN_AVX512])
def test_the_core_of_the_server(kernels: str) -> None:
    run_tests(kernels, str(FOLDER / "test_server.py"), "-k", " or ".join(CORE))


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kernels", ["plain", HIDDEN_AVX512])
def test_the_whole_server(kernels: str) -> None:
    run_tests(kernels, str(FOLDER), "--ignore", __file__)
