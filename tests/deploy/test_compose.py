"""deploy/compose against the specification's schema, the image and the server's settings."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsc_serve.config import API_KEYS, LifeConfig
from dsc_serve.server.process import CLOSE_S
from dsc_serve.settings import SETTINGS
from dsc_serve.worker.supervisor import STOP_TIMEOUT_S

FILES = ["compose.yaml", "gpu.yaml"]


@pytest.fixture(scope="session")
def services(deploy: Path) -> dict[str, dict[str, Any]]:
    named: dict[str, dict[str, Any]] = yaml.safe_load((deploy / "compose" / "compose.yaml").read_text())["services"]
    return named


@pytest.mark.parametrize("name", FILES)
def test_the_file_follows_the_specification(deploy: Path, name: str) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    checked = subprocess.run([*command, str(deploy / "compose" / name)], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_server_is_watched_and_compared(services: dict[str, dict[str, Any]]) -> None:
    always = {name for name, service in services.items() if "profiles" not in service}
    assert always == {"server", "prometheus", "grafana"}
    assert {name for name, service in services.items() if service.get("profiles") == ["moe"]} == {"moe", "moe-model"}


def test_images_are_pinned(services: dict[str, dict[str, Any]]) -> None:
    for service in services.values():
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), service["image"]


def test_every_container_is_confined(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name


def test_what_is_mounted_from_the_repository_is_there(deploy: Path, services: dict[str, dict[str, Any]]) -> None:
    sources = {volume.split(":")[0] for service in services.values() for volume in service.get("volumes", [])}
    theirs = {"./models", "./adapters"}  # made by whoever has some
    for source in sources - theirs:
        if source.startswith("."):
            assert any((deploy / "compose" / source).resolve().rglob("*.*")), source


def test_variables_are_the_servers(deploy: Path) -> None:
    known = {setting.variable for setting in SETTINGS.values()} | {API_KEYS}
    for name in FILES:
        named = yaml.safe_load((deploy / "compose" / name).read_text())["services"]
        for service in named.values():
            variables = {key for key in service.get("environment", {}) if key.startswith("DSC_SERVE")}
            assert variables <= known, variables - known


def test_a_forgotten_secret_is_an_error(services: dict[str, dict[str, Any]]) -> None:
    given = {name: service.get("environment", {}) for name, service in services.items()}
    secrets = [given["server"][API_KEYS], given["moe"][API_KEYS], given["grafana"]["GF_SECURITY_ADMIN_PASSWORD"]]
    for value in secrets:
        assert re.fullmatch(r"\$\{[A-Z_]+:\?[^}]+\}", value), value
    for service in given.values():
        for name, value in service.items():
            if re.search("KEY|PASSWORD|SECRET|TOKEN", name):
                assert value in secrets


def test_a_stop_waits_for_the_drain_and_the_end_of_the_engine(services: dict[str, dict[str, Any]]) -> None:
    needed_s = LifeConfig().drain_s + 2 * CLOSE_S + 2 * STOP_TIMEOUT_S
    for name in ("server", "moe"):
        assert float(services[name]["stop_grace_period"].removesuffix("s")) >= needed_s


def test_grafana_finds_prometheus_and_the_dashboards(deploy: Path, services: dict[str, dict[str, Any]]) -> None:
    provisioning = deploy / "compose" / "grafana"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "dsc-serve.yaml").read_text())["providers"]
    targets = {volume.split(":")[0]: volume.split(":")[1] for volume in services["grafana"]["volumes"]}
    assert targets["../grafana"] == provider["options"]["path"]
    assert targets["./grafana"] == "/etc/grafana/provisioning"


def test_prometheus_scrapes_the_services_by_their_names(deploy: Path, services: dict[str, dict[str, Any]]) -> None:
    jobs = yaml.safe_load((deploy / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    asked = {target for job in jobs for config in job.get("static_configs", []) for target in config["targets"]}
    looked_up = {
        f"{name}:{dns['port']}" for job in jobs for dns in job.get("dns_sd_configs", []) for name in dns["names"]
    }
    servers = {f"{name}:8000" for name, service in services.items() if service.get("command", [""])[0] == "serve"}
    assert asked | looked_up == servers
    always = {f"{name}:8000" for name, service in services.items() if "profiles" not in service} & servers
    assert asked == always
