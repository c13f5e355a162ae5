"""The manifests for Kubernetes: fields that KubeRay knows, the promises of their comments, and the image."""

from __future__ import annotations

import re
import shlex
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from deploy_commands import check_wavemim, commands_of

ROOT = Path(__file__).parents[2]
CLUSTER, JOB = ROOT / "deploy" / "raycluster.yaml", ROOT / "deploy" / "rayjob.yaml"


def _fields(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
        "additionalProperties": False,
    }


# KubeRay's own definitions are 900 KB for each kind. These are the fields of them that the manifests use, as of KubeRay 1.6:
# Kubernetes drops a field that a definition lacks without an error, so that a misspelled one would have no effect.
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_COUNT = {"type": "integer", "minimum": 0}
_QUANTITIES = {"type": "object", "additionalProperties": {"type": "string", "pattern": r"^\d+(m|Mi|Gi)?$"}}
_CONTAINER = _fields(
    {
        "name": {"type": "string"},
        "image": {"type": "string"},
        "env": {"type": "array", "items": _fields({"name": {"type": "string"}, "value": {"type": "string"}})},
        "resources": _fields({"limits": _QUANTITIES, "requests": _QUANTITIES}),
    },
    {"ports": {"type": "array", "items": _fields({"containerPort": _COUNT, "name": {"type": "string"}})}},
)
_POD = _fields(
    {
        "spec": _fields(
            {"containers": {"type": "array", "items": _CONTAINER}, "serviceAccountName": {"type": "string"}},
            {
                "nodeSelector": _TEXTS,
                "terminationGracePeriodSeconds": _COUNT,
                "tolerations": {"type": "array", "items": _TEXTS},
            },
        )
    }
)
_WORKERS = _fields(
    {"groupName": {"type": "string"}, "minReplicas": _COUNT, "maxReplicas": _COUNT, "template": _POD},
    {"rayStartParams": _TEXTS, "replicas": _COUNT},
)
_SPECS = {
    "RayCluster": _fields(
        {
            "rayVersion": {"type": "string"},
            "authOptions": _fields({"mode": {"enum": ["disabled", "token"]}}),
            "enableInTreeAutoscaling": {"type": "boolean"},
            "autoscalerOptions": _fields({"version": {"enum": ["v1", "v2"]}, "idleTimeoutSeconds": _COUNT}),
            "headGroupSpec": _fields({"template": _POD}, {"rayStartParams": _TEXTS}),
            "workerGroupSpecs": {"type": "array", "items": _WORKERS},
        }
    ),
    "RayJob": _fields({"entrypoint": {"type": "string"}, "clusterSelector": _TEXTS}),
}


def _documents(file: Path) -> dict[str, Any]:
    return {document["kind"]: document for document in yaml.safe_load_all(file.read_text())}


def check(document: dict[str, Any]) -> None:
    """Raises where KubeRay would refuse or overlook a field."""
    assert document["apiVersion"] == "ray.io/v1"
    jsonschema.validate(document["spec"], _SPECS[document["kind"]])


@pytest.fixture
def cluster() -> dict[str, Any]:
    return _documents(CLUSTER)["RayCluster"]


def _pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    spec = cluster["spec"]
    return [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def test_all_fields_are_known(cluster: dict[str, Any]) -> None:
    check(cluster)
    check(_documents(JOB)["RayJob"])
    cluster["spec"]["workerGroupSpecs"][0]["maxReplica"] = 3
    with pytest.raises(jsonschema.ValidationError):
        check(cluster)


def test_the_cluster_wants_a_token_scales_by_itself_and_uses_a_role(cluster: dict[str, Any]) -> None:
    spec = cluster["spec"]
    assert spec["authOptions"]["mode"] == "token" and spec["enableInTreeAutoscaling"] is True
    assert all(group["minReplicas"] == 0 for group in spec["workerGroupSpecs"])
    account = _documents(CLUSTER)["ServiceAccount"]
    assert {pod["serviceAccountName"] for pod in _pods(cluster)} == {account["metadata"]["name"]}
    assert "eks.amazonaws.com/role-arn" in account["metadata"]["annotations"]
    environment = {env["name"] for pod in _pods(cluster) for env in pod["containers"][0]["env"]}
    assert not any("KEY" in name or "TOKEN" in name or "PASSWORD" in name for name in environment)
    assert {"serviceType", "enableIngress", "headService"}.isdisjoint(spec["headGroupSpec"])  # within Kubernetes only
    policy = _documents(CLUSTER)["NetworkPolicy"]["spec"]
    assert policy["podSelector"]["matchLabels"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    assert all(rule.get("from") for rule in policy["ingress"])  # a rule without `from` lets everybody in


def test_image_and_versions_are_those_of_the_lock(cluster: dict[str, Any]) -> None:
    assert cluster["spec"]["rayVersion"] == metadata.version("ray")
    (image,) = {pod["containers"][0]["image"] for pod in _pods(cluster)}
    docker = (ROOT / "deploy" / "Dockerfile").read_text()
    assert f"-t {image} " in docker  # the command that builds it
    assert image.rpartition(":")[2] == re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    copied = [path for line in re.findall(r"^COPY (.+) \S+$", docker, re.M) for path in line.split()]
    assert all((ROOT / path).exists() for path in copied)
    kept = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().splitlines()
    assert {f"!{path}" for path in copied} <= set(kept)


def test_the_job_runs_on_that_cluster(cluster: dict[str, Any]) -> None:
    job = _documents(JOB)["RayJob"]
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    recipe = check_wavemim(shlex.split(job["spec"]["entrypoint"]))
    assert recipe.train.workers <= cluster["spec"]["workerGroupSpecs"][1]["maxReplicas"]
    (logs,) = [command for command in commands_of(JOB) if command[:2] == ["kubectl", "logs"]]
    assert logs[-1] == f"job/{job['metadata']['name']}"


def test_the_commands_of_the_header_name_what_there_is(cluster: dict[str, Any]) -> None:
    commands = commands_of(CLUSTER)
    (submitted,) = [command for command in commands if command[:3] == ["ray", "job", "submit"]]
    check_wavemim(submitted[submitted.index("--") + 1 :])
    name = cluster["metadata"]["name"]
    forward = next(command for command in commands if "port-forward" in command)
    assert forward[2] == f"service/{name}-head-svc"  # as KubeRay names it
    assert any(f"get secret {name} " in " ".join(command) for command in commands if command[0] == "export")
    applied = [Path(command[command.index("-f") + 1]) for command in commands if "-f" in command]
    assert applied and all((ROOT / path).is_file() for path in applied)
