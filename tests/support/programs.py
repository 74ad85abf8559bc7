"""The system's programs that tests drive. Run as a script: install those named, or all that deploy/ is tested with,
where they are missing, or say how."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = {  # program: its Debian packages
    "buildah": "buildah",
    "debootstrap": "debootstrap",
    "podman": "podman",
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "runc": "runc",
    "chromium": "chromium fonts-dejavu-core",
}
BROWSER = "chromium"


def missing(programs: list[str]) -> list[str]:
    return [program for program in programs if shutil.which(program) is None]


def install_line(programs: list[str]) -> list[str]:
    packages = sorted({package for program in programs for package in PACKAGES[program].split()})
    return ["apt-get", "install", "--yes", "--no-install-recommends", *packages]


def program(name: str) -> str:
    """The path of one of PACKAGES; the test that asks for it is skipped where it is missing."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is missing: {' '.join(install_line([name]))}")
    return found


def main(wanted: list[str]) -> int:
    programs = missing(wanted)
    if not programs:
        return 0
    line = install_line(programs)
    root = [] if os.geteuid() == 0 else ["sudo", "--non-interactive"]
    if Path("/usr/bin/apt-get").exists() and (not root or shutil.which("sudo")):
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["apt-get", "update", "--quiet"], line):
            subprocess.run([*root, *command], env=env, stdout=subprocess.DEVNULL)
    if left := missing(wanted):
        print(f"{', '.join(left)} cannot be found; type\n    sudo {' '.join(line)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or [program for program in PACKAGES if program != BROWSER]))
