"""Numbers and names that several files of deploy/ and the server must have in common."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from photon_grpc.config import known_fields
from photon_grpc.options import LimitOptions, SchedulerOptions, ServerOptions
from photon_grpc.server.health import READY_SERVICES
from photon_grpc.server.server import _END_GRACE_S as END_GRACE_S
from photon_grpc.server.server import _STOP_GRACE_S as STOP_GRACE_S
from photon_grpc.server.server import MOST_RUNNING, channel_options
from tests.support.programs import ROOT

DEPLOY = ROOT / "deploy"
SERVER, LIMITS = ServerOptions(), LimitOptions()
ENVOY: dict[str, Any] = yaml.safe_load((DEPLOY / "envoy" / "envoy.yaml").read_text())["static_resources"]
NGINX = (DEPLOY / "nginx" / "nginx.conf").read_text()
DOCUMENTS = ["README.md", "RUNBOOK.md"]


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


def manager() -> dict[str, Any]:
    found: dict[str, Any] = ENVOY["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    return found


def routes() -> list[dict[str, Any]]:
    return [route["route"] for route in manager()["route_config"]["virtual_hosts"][0]["routes"]]


def cluster() -> dict[str, Any]:
    found: dict[str, Any] = ENVOY["clusters"][0]
    return found


def server_option(name: str) -> int:
    max_running = SchedulerOptions().max_num_seqs or MOST_RUNNING
    max_admitted = max_running + LIMITS.max_queued_requests
    return dict(channel_options(SERVER, LIMITS, max_admitted))[name]


def test_no_proxy_gives_up_before_the_server() -> None:
    assert seconds(manager()["stream_idle_timeout"]) > LIMITS.max_deadline_s
    assert manager()["request_timeout"] == "0s"
    for route in routes():
        assert route["timeout"] == "0s"
        assert seconds(route["idle_timeout"]) > LIMITS.max_deadline_s
        assert seconds(route["max_stream_duration"]["max_stream_duration"]) > LIMITS.max_deadline_s
    for name in ("grpc_read_timeout", "grpc_send_timeout"):
        (value,) = re.findall(rf"{name} (\S+);", NGINX)
        assert seconds(value) > LIMITS.max_deadline_s


def test_envoy_pings_no_more_often_than_the_server_allows() -> None:
    protocol = cluster()["typed_extension_protocol_options"]
    (options,) = protocol.values()
    keepalive = options["explicit_http_config"]["http2_protocol_options"]["connection_keepalive"]
    assert seconds(keepalive["interval"]) > SERVER.min_ping_interval_s


def test_envoy_notices_a_drain_before_calls_are_refused() -> None:
    (check,) = cluster()["health_checks"]
    assert check["grpc_health_check"]["service_name"] in READY_SERVICES
    assert check["unhealthy_threshold"] * seconds(check["interval"]) < SERVER.drain_propagation_s
    (endpoint,) = cluster()["load_assignment"]["endpoints"][0]["lb_endpoints"]
    assert endpoint["endpoint"]["address"]["socket_address"]["port_value"] == SERVER.port


def test_circuit_breakers_are_those_of_the_server() -> None:
    (thresholds,) = cluster()["circuit_breakers"]["thresholds"]
    assert thresholds["max_requests"] == server_option("grpc.max_concurrent_streams")
    rule = yaml.safe_load((DEPLOY / "kubernetes/components/istio/destinationrule.yaml").read_text())
    http = rule["spec"]["trafficPolicy"]["connectionPool"]["http"]
    assert http["http2MaxRequests"] == thresholds["max_requests"]


def test_nginx_takes_every_message_that_the_server_takes() -> None:
    (size,) = re.findall(r"client_max_body_size (\d+)m;", NGINX)
    assert int(size) << 20 > LIMITS.max_message_bytes
    (server,) = re.findall(r"server photon-grpc:(\d+)", NGINX)
    assert int(server) == SERVER.port


def test_proxies_offer_the_public_services_only() -> None:
    public = {f"/{name}/" for name in (*filter(None, READY_SERVICES), "grpc.health.v1.Health")}
    virtual_host = manager()["route_config"]["virtual_hosts"][0]
    assert {route["match"]["prefix"] for route in virtual_host["routes"]} == public
    passed = re.findall(r"location (/\S+)\s+\{ grpc_pass", NGINX)
    assert set(passed) == public


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_name_settings_that_exist(name: str) -> None:
    known = set(known_fields())
    sections = {field.partition(".")[0] for field in known}
    text = (DEPLOY / name).read_text()
    named = set(re.findall(rf"`((?:{'|'.join(sections)})\.[a-z_0-9]+)`", text))
    assert named
    assert named <= known


def anchors_of(document: Path) -> set[str]:
    """What `#...` may follow the document's name: GitHub's form of its headings."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "document",
    [ROOT / "README.md", *(DEPLOY / name for name in DOCUMENTS), ROOT / "proto" / "README.md"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", document.read_text())
    assert targets
    for target in targets:
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), target
        assert not anchor or anchor in anchors_of(path), target


def test_the_seconds_of_a_drain_are_those_of_the_defaults() -> None:
    section = (DEPLOY / "README.md").read_text().partition("## Upgrades and drain")[2]
    rows = re.findall(r"^\| (\d+)[^|]* \|[^|]+\| ([^|]*) \|$", section, flags=re.MULTILINE)
    seconds_of = {setter.strip("`").partition("`")[0]: int(second) for second, setter in rows}
    assert seconds_of["server.drain_propagation_s"] == SERVER.drain_propagation_s
    assert seconds_of["server.drain_max_s"] == SERVER.drain_propagation_s + SERVER.drain_max_s
    (deployment,) = yaml.safe_load_all((DEPLOY / "kubernetes/base/deployment.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    assert seconds_of["terminationGracePeriodSeconds"] == pod["terminationGracePeriodSeconds"]
    probe = pod["containers"][0]["readinessProbe"]
    noticed = probe["periodSeconds"] * probe["failureThreshold"] + probe["timeoutSeconds"]
    assert seconds_of["the readiness probe, Envoy's health check"] == noticed
    # From the last wait to SIGKILL: statuses, listeners, the log's and the collector's last records.
    last = pod["terminationGracePeriodSeconds"] - seconds_of["server.drain_max_s"]
    assert last > END_GRACE_S + STOP_GRACE_S


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in (".yaml", ".yml") and path.is_file())


@pytest.mark.parametrize("path", files_of(DEPLOY), ids=lambda path: str(path.relative_to(DEPLOY)))
def test_no_key_stands_twice(path: Path) -> None:
    """YAML takes the last of two equal keys without a word."""

    class Strict(yaml.SafeLoader):
        pass

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        assert len(keys) == len(set(keys)), f"{path.name}:{node.start_mark.line + 1}: {keys}"
        loader.flatten_mapping(node)
        return loader.construct_mapping(node, deep=True)

    Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    for _ in yaml.load_all(path.read_text(), Loader=Strict):
        pass
