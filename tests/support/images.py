"""The image, built and started without a daemon: buildah builds it, podman starts it."""

from __future__ import annotations

import configparser
import contextlib
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from support.programs import program

ROOT = Path(__file__).parents[2]
BASE = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[0]
STAND_IN = "localhost/dsc-serve-test-python:bookworm"
PACKAGES = ["ca-certificates", "python3", "python3-dev", "python3-pip", "python3-venv"]
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
BUILD_LIMIT_S = 1500
START_LIMIT_S = 180
PODMAN = ("podman", "--cgroup-manager", "cgroupfs", "--runtime", "runc")
PROCESSES = 4096


def run(*command: str, limit_s: float = 120) -> str:
    """What a command prints. Fails with all of it where the command does."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit_s)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}"
    return done.stdout


def exists(image: str) -> bool:
    found = subprocess.run([program("buildah"), "inspect", "--type", "image", image], capture_output=True, timeout=60)
    return found.returncode == 0


def base_image(folder: Path) -> str:
    """The Dockerfile's own base, or, where no registry can be reached, Debian's Python of the same minor version."""
    if exists(STAND_IN):
        return STAND_IN
    pulled = subprocess.run([program("buildah"), "pull", "--quiet", f"docker.io/library/{BASE}"], timeout=600)
    if pulled.returncode == 0:
        return f"docker.io/library/{BASE}"
    root = folder / "root"
    include = "--include=" + ",".join(PACKAGES)
    run(program("debootstrap"), "--variant=minbase", include, "bookworm", str(root), limit_s=BUILD_LIMIT_S)
    for mark in root.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
        mark.unlink()
    (root / "usr/bin/python").symlink_to("python3")
    if CERTIFICATES.exists():
        shutil.copy(CERTIFICATES, root / CERTIFICATES.relative_to("/"))
    # Packages that are newer than this machine's clock are as good.
    (root / "etc/apt/apt.conf.d/99dates").write_text('Acquire::Check-Date "false";\n')
    container = run(program("buildah"), "from", "scratch").split()[-1]
    try:
        run(program("buildah"), "add", "--quiet", container, str(root), "/", limit_s=600)
        run(program("buildah"), "config", "--env", "PATH=/usr/local/bin:/usr/bin:/usr/sbin:/bin:/sbin", container)
        run(program("buildah"), "commit", "--quiet", container, STAND_IN, limit_s=600)
    finally:
        run(program("buildah"), "rm", container)
    return STAND_IN


def pip_settings() -> dict[str, str]:
    """How pip finds packages on this machine, from its files and from the environment."""
    listed = run(sys.executable, "-m", "pip", "config", "list")
    pairs = re.findall(r"^(?:global|user|:env:)\.([\w-]+)='(.*)'$", listed, re.MULTILINE)
    wanted = {"index-url", "extra-index-url", "find-links", "cert", "trusted-host", "default-timeout"}
    return {name: value for name, value in pairs if name in wanted}


def pip_volumes(folder: Path) -> Iterator[str]:
    """Mounts that let pip work in the build as it does here: its settings, and the folders they name."""
    settings = pip_settings()
    parser = configparser.RawConfigParser()
    parser["global"] = settings
    with (folder / "pip.conf").open("w") as file:
        parser.write(file)
    yield f"{folder / 'pip.conf'}:/etc/pip.conf:ro"
    for value in " ".join(settings.values()).split():
        place = Path(value.removeprefix("file://"))
        if place.is_absolute() and place.is_dir():
            place = place.parent if value.startswith("file://") else place  # an index may keep its files beside itself
            yield f"{place}:{place}:ro"


def build(folder: Path, image: str, *arguments: str) -> None:
    """Build the repository's Dockerfile with these build arguments, such as `CUDA=1`."""
    volumes = [part for volume in pip_volumes(folder) for part in ("--volume", volume)]
    given = [part for argument in arguments for part in ("--build-arg", argument)]
    run(
        *(
            "nice",
            program("buildah"),
            "build",
            "--isolation",
            "chroot",
            "--network",
            "host",
            "--format",
            "docker",
            "--layers",
        ),
        *("--build-arg", f"PYTHON_IMAGE={base_image(folder)}", *given, *volumes, "--tag", image, str(ROOT)),
        limit_s=BUILD_LIMIT_S,
    )


def podman(*arguments: str, limit_s: float = 300) -> str:
    """What podman prints; limits and health checks are left as they are here, where no systemd runs."""
    if arguments[0] == "run":
        files = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 4096)
        limits = ("--ulimit", f"nofile={files}:{files}", "--ulimit", f"nproc={PROCESSES}:{PROCESSES}")
        arguments = ("run", "--no-healthcheck", *limits, *arguments[1:])
    return run(*PODMAN, *arguments, limit_s=limit_s)


@dataclass
class Container:
    """A running container that is confined as deploy/ confines it."""

    name: str
    url: str  # where its server listens

    def run(self, *command: str) -> str:
        return podman("exec", self.name, *command)

    def status(self, *command: str) -> int:
        return subprocess.run([*PODMAN, "exec", self.name, *command], capture_output=True, timeout=120).returncode

    def log(self) -> str:
        return podman("logs", self.name)

    def stop(self, limit_s: float) -> int:
        """Ask it to stop, and kill it after the limit; its exit status."""
        podman("stop", "--time", f"{limit_s:.0f}", self.name, limit_s=limit_s + 60)
        return int(podman("inspect", "--format", "{{.State.ExitCode}}", self.name))

    def serves(self) -> bool:
        try:
            return httpx.get(self.url + "/health/ready", timeout=5).status_code == 200
        except httpx.TransportError:
            return False


@contextlib.contextmanager
def start(image: str, *arguments: str, entrypoint: str = "", volume: str = "") -> Iterator[Container]:
    """A container of the image, waited for until it serves; with another entry point it is not waited for."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    confined = ("--read-only", "--read-only-tmpfs=false", "--tmpfs", "/tmp", "--cap-drop", "all")
    confined += ("--security-opt", "no-new-privileges", "--network", "host", "--env", f"DSC_SERVE__PORT={port}")
    more = ("--entrypoint", entrypoint) if entrypoint else ()
    more += ("--volume", volume) if volume else ()
    name = podman("run", "--detach", *confined, *more, image, *arguments).split()[-1]
    container = Container(name, f"http://127.0.0.1:{port}")
    try:
        end = time.monotonic() + START_LIMIT_S
        while not entrypoint and not container.serves():
            assert time.monotonic() < end, f"it does not serve after {START_LIMIT_S} s: {container.log()}"
            time.sleep(0.5)
        yield container
    finally:
        podman("rm", "--force", "--time", "1", name)
