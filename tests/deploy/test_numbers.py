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


def test_links_of_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", (DEPLOY / "README.md").read_text()):
        assert (DEPLOY / target).exists(), target


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
