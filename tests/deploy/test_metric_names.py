"""Names in dashboard, alerts and autoscaling against those that the server exports.

`NOT_EXPORTED_YET` is the whole difference: a name that the server has learnt to export must leave it,
and nothing that the server does not export may be used without standing there.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import Any

import yaml
from prometheus_client import CollectorRegistry

from photon_grpc.engine.messages import EngineStats
from photon_grpc.telemetry.call_record import CallRecord
from photon_grpc.telemetry.metrics import Metrics
from photon_grpc.types import FinishReason, Timings, Usage
from tests.support.programs import ROOT

DEPLOY = ROOT / "deploy"
DASHBOARD = DEPLOY / "grafana" / "photon.json"
RUNBOOK = DEPLOY / "RUNBOOK.md"

NOT_EXPORTED_YET: set[str] = set()

_NAME = re.compile(r"\b(?:photon|process)_[a-z0-9_]+")
_PART_OF_HISTOGRAM = re.compile(r"_(?:bucket|sum|count)$")


def exported() -> set[str]:
    """What one scrape of a server that has worked can hold, histograms under their own name."""
    metrics = Metrics("test")
    metrics.observe_step(EngineStats(kv_blocks_used=1, kv_blocks_total=2, kv_slots_used=1, block_size=16))
    metrics.observe_tokens(1, 0.01)
    metrics.observe_finished(
        [FinishReason.EOS],
        Usage(1, 0, 1),
        Timings(queue=0.0, prefill=0.0, first_token=0.0, decode=0.0, total=0.0, preemptions=0),
    )
    metrics.observe_call(CallRecord("photon.v1.InferenceService/Generate", started=0.0, code="OK"))
    metrics.watch_engine(lambda: 0.0, lambda: 0)
    metrics.watch_engine_process(os.getpid)
    metrics.watch_acceptors(lambda: [os.getpid()])
    metrics.watch_loop(lambda: 0.0)
    metrics.watch_log(lambda: 0)
    metrics.observe_certificate(expires_at=2e9)
    return set(names_of(metrics.registry))


def names_of(registry: CollectorRegistry) -> Iterator[str]:
    for family in registry.collect():
        for sample in family.samples:
            yield _PART_OF_HISTOGRAM.sub("", sample.name) if family.type == "histogram" else sample.name


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def adapter_rules() -> list[dict[str, Any]]:
    values = yaml.safe_load((DEPLOY / "prometheus" / "adapter-values.yaml").read_text())
    rules: list[dict[str, Any]] = values["rules"]["custom"]
    return rules


def expressions() -> Iterator[str]:
    """Every PromQL expression and metric name that deploy/ uses."""
    for panel in panels():
        for target in panel["targets"]:
            yield target["expr"]
    for variable in json.loads(DASHBOARD.read_text())["templating"]["list"]:
        yield variable.get("definition", "")
    for group in yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["expr"]
    for rule in adapter_rules():
        yield rule["seriesQuery"]
        yield rule["metricsQuery"]


def used() -> set[str]:
    return {_PART_OF_HISTOGRAM.sub("", name) for text in expressions() for name in _NAME.findall(text)}


def test_every_name_is_exported_or_known_not_to_be() -> None:
    assert used() - exported() == NOT_EXPORTED_YET


def test_the_list_of_names_to_come_holds_no_name_that_is_exported() -> None:
    assert not NOT_EXPORTED_YET & exported()


def test_the_runbook_names_metrics_and_panels_that_exist() -> None:
    text = RUNBOOK.read_text()
    assert {_PART_OF_HISTOGRAM.sub("", name) for name in _NAME.findall(text)} <= exported()
    titles = re.findall(r"\*\*([^*]+)\*\*", text)
    assert titles
    assert set(titles) <= {panel["title"] for panel in panels()}


def test_the_dashboard_is_sound() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    titles = [panel["title"] for panel in panels()]
    assert len(titles) == len(set(titles))
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, f"{panel['title']} lies on another panel"
        taken |= cells
    for panel in panels():
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])


def test_the_autoscaler_asks_for_metrics_that_the_adapter_makes() -> None:
    made = {rule["name"]["as"] for rule in adapter_rules()}
    scaler = yaml.safe_load((DEPLOY / "kubernetes" / "base" / "hpa.yaml").read_text())
    asked = {metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"]}
    assert asked == made
