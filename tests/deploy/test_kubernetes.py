"""What a cluster would be given: valid for its API, hardened, and in agreement with the server's settings."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

import photon_grpc
from photon_grpc.errors import ConfigError
from photon_grpc.options import LimitOptions, Options, ServerOptions
from photon_grpc.server.health import LIVE_SERVICES, READY_SERVICES
from photon_grpc.server.server import check_options
from tests.deploy.test_dockerfile import CACHE, GID, UID
from tests.support.deploy_settings import options_of
from tests.support.kustomize import Resource, build, containers, identity
from tests.support.programs import ROOT

FOLDER = ROOT / "deploy" / "kubernetes"
OVERLAYS = sorted(path.name for path in (FOLDER / "overlays").iterdir())
COMPONENTS = sorted(path.name for path in (FOLDER / "components").iterdir())
# The oldest that still gets patches, and the newest that the validator knows.
VERSIONS = ["1.34", "1.37"]
# Kinds of other people, which the Kubernetes schemas do not cover.
FOREIGN = {
    "ServiceMonitor": "monitoring.coreos.com/v1",
    "PeerAuthentication": "security.istio.io/v1",
    "DestinationRule": "networking.istio.io/v1",
    "VirtualService": "networking.istio.io/v1",
}


def with_components(folder: Path, overlay: str) -> Path:
    """A kustomization of an overlay and every component, in a folder of its own."""
    here = folder / "everything"
    here.mkdir()

    def path(*parts: str) -> str:
        return os.path.relpath(FOLDER.joinpath(*parts), here)

    content = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [path("overlays", overlay)],
        "components": [path("components", name) for name in COMPONENTS],
    }
    (here / "kustomization.yaml").write_text(yaml.safe_dump(content))
    return here


@pytest.fixture(params=[*OVERLAYS, *(f"{name}+components" for name in OVERLAYS)])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    name, plus, _ = request.param.partition("+")
    return with_components(tmp_path, name) if plus else FOLDER / "overlays" / name


@pytest.fixture
def resources(folder: Path) -> list[Resource]:
    return build(folder)


def only(resources: list[Resource], kind: str) -> Resource:
    (found,) = [resource for resource in resources if resource["kind"] == kind]
    return found


def pod_of(resources: list[Resource]) -> dict[str, Any]:
    spec: dict[str, Any] = only(resources, "Deployment")["spec"]["template"]["spec"]
    return spec


def server_of(resources: list[Resource]) -> dict[str, Any]:
    (container,) = pod_of(resources)["containers"]
    found: dict[str, Any] = container
    return found


def options(resources: list[Resource], monkeypatch: pytest.MonkeyPatch) -> Options:
    environment = {variable["name"]: variable["value"] for variable in server_of(resources)["env"]}
    assert len(environment) == len(server_of(resources)["env"])
    return options_of(environment, monkeypatch)


def container_ports(resources: list[Resource]) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in server_of(resources)["ports"]}


def selectors(resources: list[Resource]) -> Iterator[tuple[tuple[str, str], dict[str, str]]]:
    """Everything that picks the server's pods by label."""
    for resource in resources:
        spec = resource.get("spec", {})
        match resource["kind"]:
            case "Service":
                yield identity(resource), spec["selector"]
            case "NetworkPolicy":
                yield identity(resource), spec["podSelector"]["matchLabels"]
            case "Deployment" | "PodDisruptionBudget" | "PeerAuthentication":
                yield identity(resource), spec["selector"]["matchLabels"]


def test_every_file_is_named_by_a_kustomization() -> None:
    named = set()
    for path in FOLDER.rglob("kustomization.yaml"):
        content = yaml.safe_load(path.read_text())
        names = [*content.get("resources", ()), *(patch["path"] for patch in content.get("patches", ()))]
        named |= {(path.parent / name).resolve() for name in names}
    files = {path.resolve() for path in FOLDER.rglob("*") if path.is_file()}
    assert {path for path in files if path.name != "kustomization.yaml"} == {p for p in named if p.is_file()}


def test_the_real_program_builds_the_same(folder: Path, resources: list[Resource]) -> None:
    kustomize, kubectl = shutil.which("kustomize"), shutil.which("kubectl")
    if kustomize is None and kubectl is None:
        pytest.skip("neither kustomize nor kubectl is installed, and no package of Debian's is recent enough")
    command = [kustomize, "build"] if kustomize else [str(kubectl), "kustomize"]
    result = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr

    def normal(documents: list[Resource]) -> dict[tuple[str, str], Resource]:
        documents = deepcopy(documents)
        for document in documents:
            for container in containers(document):
                container["env"].sort(key=lambda variable: variable["name"])
        return {identity(document): document for document in documents}

    assert normal(resources) == normal(list(yaml.safe_load_all(result.stdout)))


@pytest.mark.parametrize("version", VERSIONS)
def test_the_api_accepts_it(resources: list[Resource], version: str) -> None:
    for resource in resources:
        if resource["kind"] in FOREIGN:
            assert resource["apiVersion"] == FOREIGN[resource["kind"]]
        else:
            kubernetes_validate.validate(resource, version, strict=True)


def test_the_validator_notices_a_mistake() -> None:
    resource = only(build(FOLDER / "overlays" / OVERLAYS[0]), "Deployment")
    resource["spec"]["template"]["spec"]["terminationGracePeriod"] = 140
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriod"):
        kubernetes_validate.validate(resource, VERSIONS[0], strict=True)


def test_selectors_match_the_pods(resources: list[Resource]) -> None:
    labels = only(resources, "Deployment")["spec"]["template"]["metadata"]["labels"]
    found = dict(selectors(resources))
    assert {"Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"} <= {kind for kind, _ in found}
    for name, selector in found.items():
        assert selector, f"{name} selects every pod of the namespace"
        assert selector.items() <= labels.items(), name
    for spread in pod_of(resources)["topologySpreadConstraints"]:
        assert spread["labelSelector"]["matchLabels"].items() <= labels.items()


def test_peers_of_the_network_policy_are_not_the_server_itself(resources: list[Resource]) -> None:
    labels = only(resources, "Deployment")["spec"]["template"]["metadata"]["labels"]
    for resource in resources:
        if resource["kind"] != "NetworkPolicy":
            continue
        assert set(resource["spec"]["policyTypes"]) == {"Ingress", "Egress"}
        for rule in [*resource["spec"]["ingress"], *resource["spec"]["egress"]]:
            assert rule["ports"], "a rule without ports opens all of them"
            for peer in rule.get("from") or rule["to"]:
                chosen = peer.get("podSelector", {}).get("matchLabels", {})
                assert not labels.keys() & chosen.keys()


def test_the_base_policy_opens_calls_and_metrics_only(resources: list[Resource]) -> None:
    (policy,) = [resource for resource in resources if identity(resource) == ("NetworkPolicy", "photon-grpc")]
    opened = [port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]]
    assert opened == ["grpc", "metrics"]
    assert set(opened) <= set(container_ports(resources))


def test_the_admin_listener_is_reachable_from_nowhere(
    resources: list[Resource], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = options(resources, monkeypatch)
    assert read.server.admin_port not in container_ports(resources).values()
    check_options(read.server, read.tls, read.auth)


def test_the_server_reads_its_environment(resources: list[Resource], monkeypatch: pytest.MonkeyPatch) -> None:
    read = options(resources, monkeypatch)
    assert read.server.host == read.server.probe_host == read.server.metrics_host == "0.0.0.0"
    assert container_ports(resources) == {
        "grpc": read.server.port,
        "probe": read.server.probe_port,
        "metrics": read.server.metrics_port,
    }
    assert read.server.port == ServerOptions().port
    assert read.model.path == server_of(resources)["volumeMounts"][0]["mountPath"]


def test_a_service_named_like_the_server_cannot_stop_it(
    resources: list[Resource], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What enableServiceLinks would inject is refused as an unknown setting."""
    assert pod_of(resources)["enableServiceLinks"] is False
    with pytest.raises(ConfigError):
        options_of({"PHOTON_MODEL__PATH": "/m", "PHOTON_GRPC_SERVICE_HOST": "10.0.0.1"}, monkeypatch)


def test_probes_ask_the_probe_port_for_names_that_the_server_knows(
    resources: list[Resource], monkeypatch: pytest.MonkeyPatch
) -> None:
    container = server_of(resources)
    port = options(resources, monkeypatch).server.probe_port
    for probe, names in {
        "startupProbe": READY_SERVICES,
        "readinessProbe": READY_SERVICES,
        "livenessProbe": LIVE_SERVICES,
    }.items():
        assert container[probe]["grpc"]["port"] == port
        assert container[probe]["grpc"]["service"] in names
    assert container["livenessProbe"]["grpc"]["service"] == "photon.liveness"


def test_grace_period_holds_the_whole_drain(
    resources: list[Resource], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = options(resources, monkeypatch).server
    hook = server_of(resources).get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    expected = hook + server.drain_propagation_s + server.drain_max_s + 10
    assert pod_of(resources)["terminationGracePeriodSeconds"] == expected


def test_a_drain_is_noticed_before_calls_are_refused(
    resources: list[Resource], monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = server_of(resources)["readinessProbe"]
    noticed = probe["periodSeconds"] * probe["failureThreshold"] + probe["timeoutSeconds"]
    assert noticed < options(resources, monkeypatch).server.drain_propagation_s


def test_loading_has_minutes(resources: list[Resource]) -> None:
    probe = server_of(resources)["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 300
    assert "initialDelaySeconds" not in server_of(resources)["livenessProbe"]


def test_the_pod_is_hardened(resources: list[Resource]) -> None:
    pod, container = pod_of(resources), server_of(resources)
    security = pod["securityContext"]
    assert security["runAsNonRoot"] is True
    assert (security["runAsUser"], security["runAsGroup"], security["fsGroup"]) == (UID, GID, GID)
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "privileged": False,
        "capabilities": {"drop": ["ALL"]},
    }
    for name in ("hostNetwork", "hostPID", "hostIPC", "initContainers"):
        assert name not in pod


def test_no_token_reaches_the_pod(resources: list[Resource]) -> None:
    account = only(resources, "ServiceAccount")
    assert account["automountServiceAccountToken"] is False
    assert pod_of(resources)["automountServiceAccountToken"] is False
    assert pod_of(resources)["serviceAccountName"] == account["metadata"]["name"]


def test_volumes(resources: list[Resource]) -> None:
    volumes = {volume["name"]: volume for volume in pod_of(resources)["volumes"]}
    mounts = {mount["mountPath"]: mount for mount in server_of(resources)["volumeMounts"]}
    assert {mount["name"] for mount in mounts.values()} == set(volumes)
    assert mounts["/model"]["readOnly"] is True
    assert volumes["model"]["persistentVolumeClaim"]["readOnly"] is True
    writable = {path: mount for path, mount in mounts.items() if not mount.get("readOnly")}
    assert set(writable) == {CACHE, "/tmp"}
    for mount in writable.values():
        assert volumes[mount["name"]]["emptyDir"]["sizeLimit"]


def test_the_image_is_of_this_version(resources: list[Resource]) -> None:
    name, _, tag = server_of(resources)["image"].partition(":")
    assert name == "photon-grpc"
    assert tag.rpartition("-")[0] == photon_grpc.__version__


def test_memory_is_bounded_and_holds_the_cache(
    resources: list[Resource], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = server_of(resources)["resources"]
    limit = int(wanted["limits"]["memory"].removesuffix("Gi")) << 30
    assert wanted["requests"]["memory"] == wanted["limits"]["memory"]
    assert options(resources, monkeypatch).cache.kv_cache_memory_bytes < limit / 2
    if gpus := wanted["limits"].get("nvidia.com/gpu"):
        assert gpus == "1"


def test_services_lead_to_ports_of_the_pod(resources: list[Resource]) -> None:
    services = [resource for resource in resources if resource["kind"] == "Service"]
    headless = [service for service in services if service["spec"].get("clusterIP") == "None"]
    assert [service["metadata"]["name"] for service in headless] == ["photon-grpc"]
    for service in services:
        for port in service["spec"]["ports"]:
            assert container_ports(resources)[port["targetPort"]] == port["port"]


def test_replicas_outlive_a_disruption(resources: list[Resource]) -> None:
    scaler = only(resources, "HorizontalPodAutoscaler")["spec"]
    deployment = only(resources, "Deployment")
    assert scaler["scaleTargetRef"] == {
        "apiVersion": deployment["apiVersion"],
        "kind": "Deployment",
        "name": deployment["metadata"]["name"],
    }
    assert "replicas" not in deployment["spec"], "the autoscaler and the manifest would fight over them"
    assert scaler["minReplicas"] > only(resources, "PodDisruptionBudget")["spec"]["maxUnavailable"]


def test_the_service_monitor_finds_the_metrics_port() -> None:
    monitor = yaml.safe_load((FOLDER / "components/service-monitor/servicemonitor.yaml").read_text())
    base = build(FOLDER / "base")
    (service,) = [resource for resource in base if resource["kind"] == "Service"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    # The alerts are written for this job.
    assert {"targetLabel": "job", "replacement": "photon", "action": "replace"} in endpoint["relabelings"]


def test_the_mesh_is_more_patient_than_the_server(tmp_path: Path) -> None:
    resources = build(with_components(tmp_path, OVERLAYS[0]))
    routing = only(resources, "VirtualService")["spec"]
    rule = only(resources, "DestinationRule")["spec"]
    services = {r["metadata"]["name"] for r in resources if r["kind"] == "Service"}
    (route,) = routing["http"]
    assert set(routing["hosts"]) <= services
    assert route["route"][0]["destination"]["host"] in services
    assert rule["host"] in services
    assert "outlierDetection" not in rule["trafficPolicy"]
    assert int(route["timeout"].removesuffix("s")) > LimitOptions().max_deadline_s
    assert "unavailable" not in route["retries"]["retryOn"]


def test_the_sidecar_outlives_the_drain_and_leaves_the_probe_alone(tmp_path: Path) -> None:
    resources = build(with_components(tmp_path, OVERLAYS[0]))
    metadata = only(resources, "Deployment")["spec"]["template"]["metadata"]
    proxy = yaml.safe_load(metadata["annotations"]["proxy.istio.io/config"])
    assert proxy["proxyMetadata"]["EXIT_ON_ZERO_ACTIVE_CONNECTIONS"] == "true"
    excluded = metadata["annotations"]["traffic.sidecar.istio.io/excludeInboundPorts"]
    assert json.loads(excluded) == container_ports(resources)["probe"]
    mtls = only(resources, "PeerAuthentication")["spec"]
    assert mtls["mtls"]["mode"] == "STRICT"
    assert set(mtls["portLevelMtls"]) == {str(container_ports(resources)["metrics"])}
