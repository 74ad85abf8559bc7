"""The Dockerfile's image, built, started as its own user on a read-only root, and asked."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from support.images import ROOT, Container, build, podman, start

IMAGE = "localhost/dsc-serve:test"
COMPILERS = ["as", "c++", "c99", "cc", "clang", "g++", "gcc", "ld", "nvcc", "rustc"]
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    build(tmp_path_factory.mktemp("image"), IMAGE)
    return IMAGE


@pytest.fixture(scope="module")
def server(image: str) -> Iterator[Container]:
    """A container that serves the embedded model."""
    with start(image) as container:
        yield container


@pytest.fixture(scope="session")
def health_check(image: str) -> list[str]:
    """The command of the image's HEALTHCHECK."""
    (described,) = json.loads(podman("image", "inspect", image))
    kind, *command = described["Healthcheck"]["Test"]
    assert kind == "CMD"
    return command


def inside(image: str, *command: str) -> str:
    """What a command prints that runs in a container of its own."""
    entry, *arguments = command
    return podman("run", "--rm", "--network", "none", "--entrypoint", entry, image, *arguments)


def test_hadolint_has_nothing_to_say() -> None:
    program = Path(sys.executable).with_name("hadolint")
    linted = subprocess.run([str(program), str(ROOT / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert linted.returncode == 0, linted.stdout


def test_a_completion_comes_from_an_unprivileged_process_on_a_read_only_root(server: Container) -> None:
    answer = httpx.post(
        server.url + "/v1/completions", json={"prompt": "Once upon a time", "max_tokens": 8}, timeout=120
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 8
    status = server.run("cat", "/proc/1/status")
    assert re.search(r"^Uid:\t10001\t10001\t10001\t10001$", status, re.MULTILINE)
    assert re.search(r"^CapEff:\t0+$", status, re.MULTILINE)
    assert server.status("touch", "/opt/dsc-serve/mark") != 0
    assert re.search(r" / \S+ ro[, ]", server.run("cat", "/proc/1/mounts"))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the C++ kernels are for x86-64")
def test_the_kernels_were_compiled_into_the_image(server: Container) -> None:
    assert "kernels: native C++" in server.log()


def test_the_health_check_tells_a_server_that_serves(server: Container, health_check: list[str]) -> None:
    assert server.status(*health_check) == 0


def test_the_health_check_tells_a_container_in_which_nothing_serves(image: str, health_check: list[str]) -> None:
    with start(image, "-c", "while :; do sleep 1; done", entrypoint="sh") as container:
        assert container.status(*health_check) != 0


def test_a_stop_ends_the_server_in_good_order(image: str) -> None:
    with start(image) as container:
        assert container.stop(limit_s=120) == 0


def test_the_image_holds_no_compiler(image: str) -> None:
    found = inside(image, "sh", "-c", f"for name in {' '.join(COMPILERS)}; do command -v $name; done; echo end")
    assert found.split() == ["end"]


def test_the_image_holds_exactly_the_pinned_packages(image: str) -> None:
    listed = inside(
        image, "pip", "--python", "/opt/dsc-serve", "list", "--format", "json", "--disable-pip-version-check"
    )
    packages: list[dict[str, Any]] = json.loads(listed.splitlines()[-1])
    found = {re.sub(r"[-_.]+", "-", package["name"]).lower(): package["version"].split("+")[0] for package in packages}
    pinned = dict(line.split("==") for line in (ROOT / "deploy/docker/requirements.txt").read_text().split())
    del found["dsc-serve"]
    assert found == pinned


def test_the_baseline_of_the_compose_file_serves(image: str) -> None:
    """The two containers of its profile, with one volume between them."""
    services = yaml.safe_load((ROOT / "deploy/compose/compose.yaml").read_text())["services"]
    make, serve = services["moe-model"], services["moe"]
    volume = podman("volume", "create").strip()
    try:
        (command,) = (re.sub(r"\$\{PRESET:-(\w+)\}", r"\1", text) for text in make["command"])
        entry, *options = make["entrypoint"]
        for _ in range(2):  # a second start finds the model
            podman(
                "run",
                "--rm",
                "--read-only",
                "--volume",
                f"{volume}:/models",
                "--entrypoint",
                entry,
                image,
                *options,
                command,
            )
        with start(image, *serve["command"], volume=f"{volume}:/models:ro") as container:
            body = {"prompt": [1, 2, 3], "max_tokens": 4}
            answer = httpx.post(container.url + "/v1/completions", json=body, timeout=120)
            assert answer.json()["usage"]["completion_tokens"] == 4, answer.text
    finally:
        podman("volume", "rm", "--force", volume)
