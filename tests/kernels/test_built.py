"""That the other tests of the C++ kernels are not skipped where kernels could have been built."""

from __future__ import annotations

import platform
import shutil
import sysconfig
from pathlib import Path

import pytest

from dsc_kernels import native

BUILDS = (
    platform.system() == "Linux"
    and platform.machine() == "x86_64"
    and shutil.which("g++") is not None
    and Path(sysconfig.get_path("include"), "Python.h").is_file()
)


@pytest.mark.skipif(not BUILDS, reason="needs x86-64 Linux, g++ and the headers of Python")
def test_kernels_are_built_where_they_can_be() -> None:
    assert native.kernels.supported(), "the build failed, which the installation leaves unsaid; see setup.py"
