"""compose.yaml and what it mounts: hardened, on loopback, and its parts name one another rightly."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import photon_grpc
from photon_grpc.server.server import check_options
from tests.deploy.test_dockerfile import CACHE, GID, UID
from tests.deploy.test_dockerfile import environment as image_environment
from tests.support.deploy_settings import options_of
from tests.support.programs import ROOT

DEPLOY = ROOT / "deploy"


def load(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


COMPOSE = load("compose.yaml")
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_hardened(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert int(service["user"].split(":")[0]) > 0
    assert not {"privileged", "cap_add", "network_mode", "pid", "ipc", "devices"} & service.keys()


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_published_on_loopback_only(name: str) -> None:
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[name].get("ports", ()))


@pytest.mark.parametrize("name", SERVICES)
def test_an_image_has_a_version(name: str) -> None:
    _, _, tag = SERVICES[name]["image"].partition(":")
    assert re.match(r"v?\d+\.\d+\.\d+", tag)


@pytest.mark.parametrize("name", SERVICES)
def test_mounts_exist_and_only_volumes_are_writable(name: str) -> None:
    volumes = set(COMPOSE["volumes"])
    for mount in SERVICES[name]["volumes"]:
        if mount.startswith("${MODEL"):
            assert mount.endswith(":/model:ro")
            continue
        source, _, rest = mount.partition(":")
        if source.startswith("."):
            assert (DEPLOY / source).exists(), source
            assert rest.endswith(":ro")
        else:
            assert source in volumes


def test_networks_are_declared() -> None:
    for service in SERVICES.values():
        assert set(service["networks"]) <= set(COMPOSE["networks"])
    assert COMPOSE["networks"]["telemetry"]["internal"] is True


def test_the_server_reads_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    server = SERVICES["server"]
    image = {name: value for name, value in image_environment().items() if name.startswith("PHOTON_")}
    read = options_of({**image, **server["environment"]}, monkeypatch)
    check_options(read.server, read.tls, read.auth)
    assert server["user"] == f"{UID}:{GID}"
    assert f"cache:{CACHE}" in server["volumes"]
    assert server["ports"] == [f"127.0.0.1:{read.server.port}:{read.server.port}"]
    drain_s = read.server.drain_propagation_s + read.server.drain_max_s + 10
    assert server["stop_grace_period"] == f"{drain_s:g}s"
    assert server["image"].startswith(f"photon-grpc:{photon_grpc.__version__}-")
    jobs = {job["job_name"]: job for job in load("prometheus/prometheus.yml")["scrape_configs"]}
    (targets,) = jobs["photon"]["static_configs"]
    assert targets["targets"] == [f"server:{read.server.metrics_port}"]


def test_the_build_names_files_that_exist() -> None:
    build = SERVICES["server"]["build"]
    context = (DEPLOY / build["context"]).resolve()
    assert context == ROOT
    assert (context / build["dockerfile"]).is_file()
    text = (context / build["dockerfile"]).read_text()
    assert all(re.search(rf"^ARG {name}=", text, flags=re.MULTILINE) for name in build["args"])


def test_prometheus_scrapes_what_the_collector_offers() -> None:
    collector = load("otel-collector.yaml")
    (own,) = collector["service"]["telemetry"]["metrics"]["readers"]
    offered = {
        own["pull"]["exporter"]["prometheus"]["port"],
        int(collector["exporters"]["prometheus"]["endpoint"].rpartition(":")[2]),
    }
    jobs = {job["job_name"]: job for job in load("prometheus/prometheus.yml")["scrape_configs"]}
    (targets,) = jobs["otel-collector"]["static_configs"]
    assert set(targets["targets"]) == {f"otel-collector:{port}" for port in offered}
    assert "otel-collector" in SERVICES


def test_the_collector_is_put_together_from_what_it_declares() -> None:
    collector = load("otel-collector.yaml")
    used: dict[str, set[str]] = {"receivers": set(), "processors": set(), "exporters": set()}
    for pipeline in collector["service"]["pipelines"].values():
        for kind, names in pipeline.items():
            used[kind] |= set(names)
        assert pipeline["processors"][0] == "memory_limiter"
        assert pipeline["processors"][-1] == "batch"
    assert used == {kind: set(collector[kind]) for kind in used}
    assert set(collector["service"]["extensions"]) == set(collector["extensions"])
    assert "127.0.0.1:4317:4317" in SERVICES["otel-collector"]["ports"]
    assert collector["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"].endswith(":4317")


def test_grafana_finds_prometheus_and_the_dashboard() -> None:
    (source,) = load("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert source["type"] == "prometheus"
    (provider,) = load("grafana/provisioning/dashboards/photon.yaml")["providers"]
    folder = Path(provider["options"]["path"])
    assert f"./grafana/photon.json:{folder / 'photon.json'}:ro" in SERVICES["grafana"]["volumes"]
