"""deploy/ray: the Serve configs by Ray's own schema and this program's settings, the pods by Kubernetes' schemas.

The RayService object around them has no schema offline; its fields' names are held to the list below.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray._common.utils import import_attr
from ray.serve.schema import ServeDeploySchema
from test_kubernetes import NEWEST, OLDEST, complaints

from dsc_serve.config import ConfigError, generation_slots
from dsc_serve.scale.app import STOP_S, build
from dsc_serve.scale.local import load
from dsc_serve.scale.settings import read

SERVICE = {"serveConfigV2", "rayClusterConfig"}
CLUSTER = {"rayVersion", "enableInTreeAutoscaling", "headGroupSpec", "workerGroupSpecs"}
WORKERS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}


@pytest.fixture(scope="module")
def manifests() -> dict[str, dict[str, Any]]:
    file = Path(__file__).parents[2] / "deploy" / "ray" / "rayservice.yaml"
    return {manifest["kind"]: manifest for manifest in yaml.safe_load_all(file.read_text())}


@pytest.fixture
def service(manifests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    spec: dict[str, Any] = manifests["RayService"]["spec"]
    return spec


def templates(service: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = service["rayClusterConfig"]
    return [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]


@pytest.mark.parametrize("source", ["serve.yaml", "rayservice.yaml"])
def test_serve_configs_are_of_rays_schema_and_name_settings_that_exist(
    source: str, deploy: Path, service: dict[str, Any]
) -> None:
    text = (deploy / "ray" / "serve.yaml").read_text() if source == "serve.yaml" else service["serveConfigV2"]
    config = ServeDeploySchema.model_validate(yaml.safe_load(text))
    (application,) = config.applications
    assert import_attr(application.import_path) is build
    server, _ = read(application.args)
    options = {deployment.name: deployment for deployment in application.deployments}
    assert set(options) <= {"door", "replica"}
    if source == "serve.yaml":
        assert (config.http_options.host, options["replica"].num_replicas) == ("127.0.0.1", 2)
    else:
        scaling = options["replica"].autoscaling_config
        assert server.engine.max_running <= scaling["target_ongoing_requests"] < generation_slots(server)


def test_pods_and_policy_are_of_kubernetes_schemas(manifests: dict[str, Any], service: dict[str, Any]) -> None:
    policy = manifests["NetworkPolicy"]
    pods = [{"apiVersion": "v1", "kind": "Pod", **template} for template in templates(service)]
    for i, pod in enumerate(pods):
        pod["metadata"] = {**pod["metadata"], "name": f"pod-{i}"}
    for manifest in (*pods, policy):
        for version in (OLDEST, NEWEST):
            assert not complaints(manifest, version)
    for pod in pods:
        assert pod["metadata"]["labels"] == policy["spec"]["podSelector"]["matchLabels"]


def test_the_service_says_what_the_program_means(service: dict[str, Any]) -> None:
    cluster = service["rayClusterConfig"]
    assert set(service) == SERVICE and set(cluster) == CLUSTER
    assert all(set(group) == WORKERS for group in cluster["workerGroupSpecs"])
    assert cluster["rayVersion"] == ray.__version__
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(service["serveConfigV2"])).applications
    replica = next(deployment for deployment in application.deployments if deployment.name == "replica")
    server, scale = read(application.args)
    (workers,) = cluster["workerGroupSpecs"]
    assert int(workers["rayStartParams"]["num-cpus"]) == replica.ray_actor_options.num_cpus
    assert replica.autoscaling_config["max_replicas"] == workers["maxReplicas"]
    for template in templates(service):
        pod = template["spec"]
        (container,) = pod["containers"]
        assert container["securityContext"]["readOnlyRootFilesystem"] and pod["securityContext"]["runAsNonRoot"]
        assert pod["terminationGracePeriodSeconds"] >= server.life.drain_s + STOP_S + scale.take_s


def test_a_host_that_serve_ray_would_not_serve_on_is_refused(tmp_path: Path, deploy: Path) -> None:
    text = (deploy / "ray" / "serve.yaml").read_text()
    (tmp_path / "serve.yaml").write_text(text.replace("host: 127.0.0.1", "host: 0.0.0.0"))
    with pytest.raises(ConfigError, match=r"http_options\.host is .0\.0\.0\.0.; here it must be 127\.0\.0\.1"):
        load(tmp_path / "serve.yaml")
    assert load(deploy / "ray" / "serve.yaml").http_options.port == 8000
