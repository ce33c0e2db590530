"""The Kubernetes manifests: valid against Kubernetes' own schemas, and in agreement with the image and the server.

kubectl renders the overlays; where it is not installed, or too old for components, those tests are skipped and say so.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

import lossgrad_server
from lossgrad_api.codec import SERVICE
from lossgrad_server import config
from lossgrad_server.transport import health

ROOT = Path(__file__).parents[1]
KUBERNETES = ROOT / "deploy/kubernetes"
VERSIONS = ("1.32", "1.34")
LABELS = {"app.kubernetes.io/name": "lossgrad"}


@cache
def rendered(overlay: str) -> str:
    """Return what `kubectl kustomize` makes of an overlay."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    result = subprocess.run(
        [kubectl, "kustomize", str(KUBERNETES / overlay)], capture_output=True, text=True, check=False, timeout=60
    )
    if "invalid Kustomization" in result.stderr or "unknown field" in result.stderr:
        pytest.skip(f"this kubectl is too old: {result.stderr.splitlines()[0]}")
    assert result.returncode == 0, result.stderr
    return result.stdout


def objects(overlay: str) -> dict[str, Any]:
    """Return an overlay's objects by their kind; there is one of each."""
    documents = list(yaml.safe_load_all(rendered(overlay)))
    found = {document["kind"]: document for document in documents}
    assert len(found) == len(documents)
    return found


OVERLAYS = ("overlays/cpu", "overlays/gpu")


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("version", VERSIONS)
def test_the_objects_follow_kubernetes_schemas(overlay: str, version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    for document in objects(overlay).values():
        validate.validate(document, version, strict=True)


def test_a_misspelt_probe_would_be_found() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    deployment = yaml.safe_load((KUBERNETES / "base/deployment.yaml").read_text())
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    container["readynessProbe"] = container.pop("readinessProbe")
    with pytest.raises(validate.ValidationError):
        validate.validate(deployment, VERSIONS[0], strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_selector_names_the_servers_and_nothing_else(overlay: str) -> None:
    found = objects(overlay)
    assert found["Deployment"]["spec"]["selector"]["matchLabels"] == LABELS
    assert found["Deployment"]["spec"]["template"]["metadata"]["labels"] == LABELS
    assert found["Service"]["spec"]["selector"] == LABELS
    assert found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == LABELS
    assert found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == LABELS


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_pods_are_confined(overlay: str) -> None:
    pod = objects(overlay)["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False  # a Service named lossgrad would set LOSSGRAD_PORT
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 10001  # the image's
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_settings_are_the_servers_and_the_image_is_this_version(overlay: str) -> None:
    (container,) = objects(overlay)["Deployment"]["spec"]["template"]["spec"]["containers"]
    known = {config.environment_variable(setting.name) for setting in dataclasses.fields(config.ServerConfig)}
    assert {variable["name"] for variable in container["env"]} <= known
    values = {variable["name"]: variable["value"] for variable in container["env"] if "value" in variable}
    parsed = config.from_command_line([], values)
    assert parsed.device == ("cpu" if overlay.endswith("cpu") else "cuda:0")
    name, _, tag = container["image"].partition(":")
    assert (name, tag.removesuffix("-gpu")) == ("lossgrad", lossgrad_server.__version__)
    gpus = container["resources"]["limits"].get("nvidia.com/gpu")
    assert gpus == (None if overlay.endswith("cpu") else "1")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubernetes_waits_longer_than_the_server_drains(overlay: str) -> None:
    pod = objects(overlay)["Deployment"]["spec"]["template"]["spec"]
    values = {variable["name"]: variable["value"] for variable in pod["containers"][0]["env"] if "value" in variable}
    server = config.from_command_line([], values)
    assert pod["terminationGracePeriodSeconds"] >= server.drain_delay_seconds + server.drain_grace_seconds + 5
    assert server.max_connection_age_seconds > 0  # or new replicas get no load


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_probes_ask_for_names_that_the_health_service_knows(overlay: str) -> None:
    (container,) = objects(overlay)["Deployment"]["spec"]["template"]["spec"]["containers"]
    ports = {port["containerPort"]: port["name"] for port in container["ports"]}
    defaults = config.ServerConfig()
    assert ports == {defaults.port: "grpc", defaults.metrics_port: "metrics"}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["grpc"]["port"] == defaults.port
        expected = health.LIVENESS_NAME if probe == "livenessProbe" else SERVICE
        assert container[probe]["grpc"]["service"] == expected


def test_the_autoscaler_in_the_documents_follows_the_schema_and_scales_what_there_is() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/scaling.md").read_text(), re.DOTALL)
    scaler = yaml.safe_load(text)
    for version in VERSIONS:
        validate.validate(scaler, version, strict=True)
    deployment = yaml.safe_load((KUBERNETES / "base/deployment.yaml").read_text())
    target = scaler["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == (deployment["kind"], deployment["metadata"]["name"])


@pytest.mark.parametrize("component", ["monitoring", "autoscaling"])
def test_the_components_can_be_added_to_an_overlay(component: str, tmp_path: Path) -> None:
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    overlay = tmp_path / "kubernetes/overlays/cpu/kustomization.yaml"
    overlay.write_text(overlay.read_text() + f"components:\n  - ../../components/{component}\n")
    kinds = objects(str(overlay.parent))
    expected = {"monitoring": {"PodMonitor", "PrometheusRule"}, "autoscaling": {"ScaledObject"}}
    assert expected[component] <= set(kinds)
    if component == "monitoring":
        assert kinds["PodMonitor"]["spec"]["selector"]["matchLabels"] == LABELS
    else:
        scaled = kinds["ScaledObject"]["spec"]
        assert scaled["scaleTargetRef"]["name"] == kinds["Deployment"]["metadata"]["name"]
        # The label `job` of what the PodMonitor scrapes: the value of its jobLabel on the pods.
        queries = [trigger["metadata"]["query"] for trigger in scaled["triggers"]]
        assert queries
        assert all(f'{{job="{LABELS["app.kubernetes.io/name"]}"}}' in query for query in queries)
        monitor = yaml.safe_load((KUBERNETES / "components/monitoring/podmonitor.yaml").read_text())
        assert monitor["spec"]["jobLabel"] in LABELS
