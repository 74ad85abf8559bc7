"""What kustomize makes of deploy/kubernetes, against Kubernetes' schemas and the server itself."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.kubectl import kubectl

from dsc_serve.config import LifeConfig
from dsc_serve.server.middleware import HEALTH
from dsc_serve.server.process import CLOSE_S
from dsc_serve.settings import SETTINGS, choose
from dsc_serve.worker.supervisor import STOP_TIMEOUT_S

Manifests = dict[str, dict[str, Any]]
OVERLAYS = ["cpu", "gpu"]
OLDEST, NEWEST = "1.32", "1.37"


def complaints(manifest: dict[str, Any], version: str) -> str:
    """What is wrong with a manifest by the schemas of a version of Kubernetes; nothing where it is right."""
    command = [str(Path(sys.executable).with_name("kubernetes-validate")), "--strict", "-k", version, "-"]
    done = subprocess.run(command, input=yaml.safe_dump(manifest), capture_output=True, text=True, timeout=60)
    return "" if done.returncode == 0 else done.stdout + done.stderr


@pytest.fixture(scope="session")
def built(deploy: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Manifests]:
    """What kustomize makes of a folder, by kind."""
    program = kubectl(tmp_path_factory.mktemp("kubectl"))
    known: dict[Path, Manifests] = {}

    def build(folder: Path) -> Manifests:
        if folder not in known:
            done = subprocess.run([program, "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr
            known[folder] = {manifest["kind"]: manifest for manifest in yaml.safe_load_all(done.stdout)}
        return known[folder]

    return build


@pytest.fixture(params=OVERLAYS)
def manifests(request: pytest.FixtureRequest, deploy: Path, built: Callable[[Path], Manifests]) -> Manifests:
    return built(deploy / "kubernetes" / "overlays" / request.param)


@pytest.fixture
def pod(manifests: Manifests) -> dict[str, Any]:
    spec: dict[str, Any] = manifests["Deployment"]["spec"]["template"]["spec"]
    return spec


@pytest.fixture
def server(pod: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod["containers"]
    return container


@pytest.fixture
def life(manifests: Manifests, tmp_path: Path) -> LifeConfig:
    """The limits that the manifests' settings give the server, read as the server reads them."""
    file = tmp_path / "dsc-serve.toml"
    file.write_text(manifests["ConfigMap"]["data"]["dsc-serve.toml"])
    return choose(file, {}, {}).config().life


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_every_manifest_follows_the_schema_of_its_kind(manifests: Manifests, version: str) -> None:
    assert set(manifests) == {"ConfigMap", "Deployment", "PodDisruptionBudget", "Service"}
    for manifest in manifests.values():
        assert not complaints(manifest, version)


def test_a_manifest_with_an_unknown_field_is_refused(manifests: Manifests) -> None:
    wrong = manifests["Service"] | {"spec": manifests["Service"]["spec"] | {"porst": []}}
    assert "porst" in complaints(wrong, NEWEST)


def test_probes_ask_endpoints_that_the_server_answers_without_a_key(server: dict[str, Any]) -> None:
    paths = {name: server[name]["httpGet"]["path"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert set(paths.values()) <= HEALTH
    assert paths["readinessProbe"] == "/health/ready"
    assert paths["livenessProbe"] == "/health/live"


def test_the_start_may_take_as_long_as_the_engine_may(server: dict[str, Any], life: LifeConfig) -> None:
    probe = server["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] > life.start_timeout_s


def test_the_grace_period_covers_the_pause_the_drain_and_the_end_of_the_engine(
    pod: dict[str, Any], server: dict[str, Any], life: LifeConfig
) -> None:
    command, pause_s = server["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    readiness = server["readinessProbe"]
    assert float(pause_s) >= readiness["periodSeconds"]
    needed_s = float(pause_s) + life.drain_s + 2 * CLOSE_S + 2 * STOP_TIMEOUT_S
    assert pod["terminationGracePeriodSeconds"] >= needed_s


def test_every_container_is_confined(pod: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert {"memory"} <= set(container["resources"]["limits"])


def test_user_and_port_are_the_images(deploy: Path, pod: dict[str, Any], server: dict[str, Any]) -> None:
    dockerfile = (deploy.parent / "Dockerfile").read_text()
    context = pod["securityContext"]
    assert f"USER {context['runAsUser']}:{context['runAsGroup']}\n" in dockerfile
    assert f"EXPOSE {server['ports'][0]['containerPort']}\n" in dockerfile


def test_the_service_and_the_budget_find_the_pods(manifests: Manifests, server: dict[str, Any]) -> None:
    labels = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert manifests["Service"]["spec"]["selector"].items() <= labels.items()
    assert manifests["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert manifests["Service"]["spec"]["ports"][0]["targetPort"] == server["ports"][0]["name"]


def test_prometheus_is_told_where_the_metrics_are(manifests: Manifests, server: dict[str, Any]) -> None:
    notes = manifests["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    assert notes["prometheus.io/port"] == str(server["ports"][0]["containerPort"])
    assert (notes["prometheus.io/scrape"], notes["prometheus.io/path"]) == ("true", "/metrics")


def test_variables_and_settings_are_the_servers(manifests: Manifests, server: dict[str, Any]) -> None:
    names = {entry["name"] for entry in server["env"] if "value" in entry}
    assert names <= {setting.variable for setting in SETTINGS.values()}
    mounted = next(mount["mountPath"] for mount in server["volumeMounts"] if mount["name"] == "settings")
    assert server["args"] == ["serve", "--config", f"{mounted}/dsc-serve.toml"]
    assert tomllib.loads(manifests["ConfigMap"]["data"]["dsc-serve.toml"])


def secrets_of(value: Any) -> list[dict[str, Any]]:
    """Every reference to a Secret's key, wherever it stands."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    found = [value["secretKeyRef"]] if isinstance(value, dict) and "secretKeyRef" in value else []
    return found + [reference for part in inner for reference in secrets_of(part)]


@pytest.mark.parametrize("name", ["kubernetes/base/deployment.yaml", "ray/rayservice.yaml"])
def test_no_pod_starts_without_its_secret(deploy: Path, name: str) -> None:
    found = [one for part in yaml.safe_load_all((deploy / name).read_text()) for one in secrets_of(part)]
    assert found
    assert all(reference == {"name": "dsc-serve-keys", "key": "api-keys"} for reference in found)


def test_cpus_are_whole_and_the_pods_own(deploy: Path, built: Callable[[Path], Manifests]) -> None:
    pod = built(deploy / "kubernetes" / "overlays" / "cpu")["Deployment"]["spec"]["template"]["spec"]
    resources = pod["containers"][0]["resources"]
    assert resources["requests"] == resources["limits"]
    assert resources["limits"]["cpu"].isdecimal()


def test_the_gpu_overlay_serves_on_a_gpu_with_a_writable_kernel_cache(
    deploy: Path, built: Callable[[Path], Manifests]
) -> None:
    pod = built(deploy / "kubernetes" / "overlays" / "gpu")["Deployment"]["spec"]["template"]["spec"]
    (server,) = pod["containers"]
    assert server["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert {"name": "DSC_SERVE__DEVICE", "value": "cuda"} in server["env"]
    (cache,) = (mount["mountPath"] for mount in server["volumeMounts"] if mount["name"] == "triton")
    assert f"TRITON_CACHE_DIR={cache}" in (deploy.parent / "Dockerfile").read_text()
    assert cache + "/." in pod["initContainers"][0]["command"]


@pytest.mark.parametrize("component", ["models", "adapters"])
def test_models_and_adapters_come_from_a_claim(
    component: str, deploy: Path, tmp_path: Path, built: Callable[[Path], Manifests]
) -> None:
    kubernetes = deploy / "kubernetes"
    up = Path(*[".."] * (len(tmp_path.parts) - 1))  # kustomize takes relative paths alone
    lines = ["resources:", f"  - {up}{kubernetes / 'overlays' / 'cpu'}"]
    lines += ["components:", f"  - {up}{kubernetes / 'components' / component}"]
    (tmp_path / "kustomization.yaml").write_text("\n".join(lines) + "\n")
    manifest = built(tmp_path)["Deployment"]
    assert not complaints(manifest, NEWEST)
    server = manifest["spec"]["template"]["spec"]["containers"][0]
    assert {"name": component, "mountPath": f"/{component}", "readOnly": True} in server["volumeMounts"]
    variables = {own["name"]: own.get("value") for own in server["env"]}
    assert variables.get("DSC_SERVE__ADAPTERS") == ("/adapters" if component == "adapters" else None)
