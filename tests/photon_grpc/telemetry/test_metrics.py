"""Metrics, read back through Prometheus' own text parser."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from photon_grpc.engine.messages import EngineStats
from photon_grpc.errors import ListenError
from photon_grpc.telemetry.call_record import CallRecord, GenerationRecord
from photon_grpc.telemetry.metrics import Metrics, MetricsServer
from photon_grpc.types import FinishReason, Timings, Usage
from tests.support.fake_front_door import EFFECTIVE

STATS = EngineStats(
    running=3,
    waiting=5,
    kv_blocks_used=10,
    kv_blocks_total=40,
    kv_slots_used=150,
    block_size=16,
    prompt_tokens=100,
    generation_tokens=77,
    prefix_queries=90,
    prefix_hits=30,
    preemptions=2,
    faults=1,
    lost_steps=4,
)


def samples(text: str) -> dict[str, float]:
    return {
        sample.name + "".join(f"{{{k}={v}}}" for k, v in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape(metrics: Metrics) -> dict[str, float]:
    return samples(generate_latest(metrics.registry).decode())


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    metrics = Metrics("1.2.3")
    metrics.observe_step(STATS)
    server = MetricsServer(metrics, "127.0.0.1", 0)
    yield server
    server.close()


def test_engine_figures_are_those_of_the_latest_snapshot() -> None:
    metrics = Metrics("1.2.3")
    metrics.observe_step(EngineStats(running=99))
    metrics.observe_step(STATS)
    read = scrape(metrics)
    assert {
        name: read[name] for name in read if not name.startswith(("process", "photon_request"))
    }.items() >= {
        "photon_num_requests_running": 3,
        "photon_num_requests_waiting": 5,
        "photon_kv_cache_usage_perc": 0.25,
        "photon_kv_slot_utilization": 150 / 160,
        "photon_prompt_tokens_total": 100,
        "photon_generation_tokens_total": 77,
        "photon_prefix_cache_queries_total": 90,
        "photon_prefix_cache_hits_total": 30,
        "photon_preemptions_total": 2,
        "photon_corrupted_requests_total": 1,
        "photon_lost_steps_total": 4,
        "photon_build_info{version=1.2.3}": 1,
    }.items()


def test_nothing_is_claimed_before_the_first_step() -> None:
    read = scrape(Metrics("1"))
    assert "photon_num_requests_running" not in read
    assert "photon_kv_cache_usage_perc" not in read


def test_an_idle_pool_has_no_utilization() -> None:
    metrics = Metrics("1")
    metrics.observe_step(EngineStats(kv_blocks_total=40, block_size=16))
    read = scrape(metrics)
    assert read["photon_kv_cache_usage_perc"] == 0
    assert "photon_kv_slot_utilization" not in read


def test_finished_requests_are_counted_by_reason() -> None:
    metrics = Metrics("1")
    usage = Usage(prompt_tokens=4, cached_prompt_tokens=0, output_tokens=9)
    timings = Timings(queue=0.3, prefill=0.1, first_token=0.5, decode=1.0, total=1.5, preemptions=0)
    metrics.observe_finished([FinishReason.EOS, FinishReason.STOP], usage, timings)
    metrics.observe_finished([FinishReason.EOS], usage, timings)
    read = scrape(metrics)
    assert read["photon_request_success_total{finished_reason=eos}"] == 2
    assert read["photon_request_success_total{finished_reason=stop}"] == 1
    assert read["photon_request_success_total{finished_reason=time_limit}"] == 0
    assert read["photon_time_to_first_token_seconds_sum"] == pytest.approx(1.0)
    assert read["photon_time_to_first_token_seconds_bucket{le=0.25}"] == 0
    assert read["photon_time_to_first_token_seconds_bucket{le=0.5}"] == 2
    assert read["photon_e2e_request_latency_seconds_sum"] == pytest.approx(3.0)
    assert read["photon_request_queue_time_seconds_count"] == 2
    assert read["photon_request_prefill_time_seconds_sum"] == pytest.approx(0.2)
    assert read["photon_request_decode_time_seconds_sum"] == pytest.approx(2.0)
    assert read["photon_request_prompt_tokens_sum"] == 8
    assert read["photon_request_prompt_tokens_bucket{le=4.0}"] == 2
    assert read["photon_request_generation_tokens_sum"] == 18
    assert read["photon_request_generation_tokens_bucket{le=8.0}"] == 0


def test_a_request_without_output_has_no_first_token() -> None:
    metrics = Metrics("1")
    timings = Timings(queue=0.3, prefill=0.0, first_token=0.0, decode=0.0, total=0.3, preemptions=0)
    metrics.observe_finished([FinishReason.TIME_LIMIT], Usage(4, 0, 0), timings)
    read = scrape(metrics)
    assert read["photon_time_to_first_token_seconds_count"] == 0
    assert read["photon_request_decode_time_seconds_count"] == 0
    assert read["photon_e2e_request_latency_seconds_count"] == 1


def test_a_merged_delta_counts_each_of_its_tokens() -> None:
    metrics = Metrics("1")
    metrics.observe_tokens(4, 0.4)
    metrics.observe_tokens(1, 0.003)
    read = scrape(metrics)
    assert read["photon_inter_token_latency_seconds_count"] == 5
    assert read["photon_inter_token_latency_seconds_sum"] == pytest.approx(0.403)
    assert read["photon_inter_token_latency_seconds_bucket{le=0.004}"] == 1
    assert read["photon_inter_token_latency_seconds_bucket{le=0.1}"] == 5


def test_each_step_is_counted_with_its_tokens_and_its_seconds() -> None:
    metrics = Metrics("1")
    metrics.observe_iteration(300, 0.03)
    metrics.observe_iteration(8, 0.001)
    read = scrape(metrics)
    assert read["photon_iteration_tokens_total_count"] == 2
    assert read["photon_iteration_tokens_total_sum"] == 308
    assert read["photon_iteration_tokens_total_bucket{le=8.0}"] == 1
    assert read["photon_step_seconds_sum"] == pytest.approx(0.031)
    assert read["photon_step_seconds_bucket{le=0.001}"] == 1


def call(code: str, reason: str = "", generation: GenerationRecord | None = None) -> CallRecord:
    return CallRecord(
        "photon.v1.InferenceService/Generate",
        0.0,
        seconds=0.5,
        code=code,
        reason=reason,
        generation=generation,
    )


def generating(*, has_first_token: bool = True) -> GenerationRecord:
    return GenerationRecord(
        0.0, "", "tiny", is_chat=False, effective=EFFECTIVE, has_first_token=has_first_token
    )


def test_calls_are_counted_by_method_and_status() -> None:
    metrics = Metrics("1")
    metrics.observe_call(call("OK", generation=generating()))
    metrics.observe_call(call("OK", generation=generating()))
    metrics.observe_call(call("INVALID_ARGUMENT", "INVALID_FIELD"))
    read = scrape(metrics)
    labels = "{code=%s}{method=photon.v1.InferenceService/Generate}"
    assert read["photon_rpc_seconds_count" + labels % "OK"] == 2
    assert read["photon_rpc_seconds_sum" + labels % "OK"] == 1.0
    assert read["photon_rpc_seconds_count" + labels % "INVALID_ARGUMENT"] == 1
    assert not any(
        read[name] for name in read if name.startswith(("photon_shed_total", "photon_cancelled_total"))
    )


def test_what_was_refused_is_shed_and_what_was_cut_off_is_cancelled() -> None:
    metrics = Metrics("1")
    assert scrape(metrics)["photon_shed_total{reason=overloaded}"] == 0
    metrics.observe_call(call("UNAVAILABLE", "OVERLOADED"))
    metrics.observe_call(call("UNAVAILABLE", "DRAINING"))
    metrics.observe_call(call("UNAVAILABLE", "DRAINING", generating()))
    metrics.observe_call(call("CANCELLED", generation=generating()))
    metrics.observe_call(call("CANCELLED", generation=generating(has_first_token=False)))
    metrics.observe_call(call("ABORTED", "ABORTED_BY_OPERATOR", generating()))
    metrics.observe_call(call("ABORTED", "CLIENT_STALLED", generating()))
    metrics.observe_call(call("DEADLINE_EXCEEDED", "QUEUE_TIMEOUT", generating(has_first_token=False)))
    # The fault of one request: nobody ended it.
    metrics.observe_call(call("INTERNAL", "REQUEST_FAULT", generating()))
    read = scrape(metrics)
    assert {k: v for k, v in read.items() if k.startswith("photon_shed_total") and v} == {
        "photon_shed_total{reason=overloaded}": 1,
        "photon_shed_total{reason=draining}": 1,
    }
    assert {k: v for k, v in read.items() if k.startswith("photon_cancelled_total") and v} == {
        "photon_cancelled_total{by=client}{state=generating}": 1,
        "photon_cancelled_total{by=client}{state=waiting}": 1,
        "photon_cancelled_total{by=operator}{state=generating}": 1,
        "photon_cancelled_total{by=server}{state=generating}": 2,
        "photon_cancelled_total{by=deadline}{state=waiting}": 1,
    }
    assert read["photon_slow_consumer_aborts_total"] == 1


def test_the_items_of_a_batch_are_counted_one_by_one() -> None:
    metrics = Metrics("1")
    served = call("OK")
    served.items = [
        call("OK", generation=generating()),
        call("UNAVAILABLE", "OVERLOADED"),
        call("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED"),
        call("ABORTED", "ABORTED_BY_OPERATOR", generating()),
    ]
    metrics.observe_call(served)
    ended = call("UNAVAILABLE", "DRAINING")
    ended.items = [
        call("OK", generation=generating()),
        call("CANCELLED", generation=generating()),
        # Begun, and not yet with the engine.
        call("CANCELLED"),
    ]
    metrics.observe_call(ended)
    read = scrape(metrics)
    assert {k: v for k, v in read.items() if k.startswith("photon_shed_total") and v} == {
        "photon_shed_total{reason=overloaded}": 1,
        "photon_shed_total{reason=quota_exceeded}": 1,
        "photon_shed_total{reason=draining}": 1,
    }
    assert {k: v for k, v in read.items() if k.startswith("photon_cancelled_total") and v} == {
        "photon_cancelled_total{by=operator}{state=generating}": 1,
        "photon_cancelled_total{by=server}{state=generating}": 1,
    }
    labels = "{code=%s}{method=photon.v1.InferenceService/Generate}"
    assert read["photon_rpc_seconds_count" + labels % "OK"] == 1


def test_what_is_watched_is_read_at_each_scrape() -> None:
    metrics = Metrics("1")
    figures = {"age": 1.5, "unread": 3, "lag": 0.25}
    metrics.watch_engine(lambda: figures["age"], lambda: int(figures["unread"]))
    metrics.watch_loop(lambda: figures["lag"])
    metrics.set_cache_config(num_blocks=40, block_size=16, prefix_caching=True)
    read = scrape(metrics)
    assert read["photon_engine_heartbeat_age_seconds"] == 1.5
    assert read["photon_stream_queue_depth"] == 3
    assert read["photon_event_loop_lag_seconds"] == 0.25
    assert read["photon_cache_config_info{block_size=16}{enable_prefix_caching=True}{num_blocks=40}"] == 1
    figures["age"] = 60.0
    assert scrape(metrics)["photon_engine_heartbeat_age_seconds"] == 60.0


@pytest.mark.skipif(sys.platform != "linux", reason="figures of a process come from /proc")
def test_the_engine_s_process_is_measured_beside_the_server_s() -> None:
    metrics = Metrics("1")
    running: list[int] = []
    metrics.watch_engine_process(lambda: running[0] if running else None)
    before = scrape(metrics)
    assert before["process_open_fds"] > 0
    assert not [name for name in before if name.startswith("photon_engine_process")]
    process = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    running.append(process.pid)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        read = scrape(metrics)
        assert read["photon_engine_process_resident_memory_bytes"] > 1 << 20
        assert read["photon_engine_process_cpu_seconds_total"] >= 0
        assert 3 <= read["photon_engine_process_open_fds"] <= read["photon_engine_process_max_fds"]
        assert read["photon_engine_process_start_time_seconds"] >= read["process_start_time_seconds"], (
            "it is the child's"
        )
    finally:
        process.communicate(b"\n")
    # Its number is known for a moment longer than it lives.
    after = scrape(metrics)
    assert not [name for name in after if name.startswith("photon_engine_process")]


@pytest.mark.skipif(sys.platform != "linux", reason="figures of a process come from /proc")
def test_acceptors_are_told_apart_and_their_deaths_counted() -> None:
    metrics = Metrics("1")
    running = [os.getpid()]
    metrics.watch_acceptors(lambda: running)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        running.append(other.pid)
        read = scrape(metrics)
        own, others = (read[f"photon_acceptor_process_start_time_seconds{{acceptor={n}}}"] for n in (0, 1))
        assert own == read["process_start_time_seconds"] < others
        assert read["photon_acceptor_process_open_fds{acceptor=0}"] > 2
        assert read["photon_acceptor_deaths_total"] == 0
        other.communicate(b"\n")
    # Its number is known for a moment longer than it lives.
    metrics.observe_acceptor_died()
    read = scrape(metrics)
    assert not [name for name in read if name.endswith("{acceptor=1}")]
    assert read["photon_acceptor_deaths_total"] == 1


def test_two_registries_do_not_share() -> None:
    first, second = Metrics("1"), Metrics("1")
    first.observe_tokens(1, 0.1)
    assert scrape(second)["photon_inter_token_latency_seconds_count"] == 0


def test_exposition_over_http(server: MetricsServer) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10) as response:
        read = samples(response.read().decode())
    assert read["photon_generation_tokens_total"] == 77


def test_closing_gives_the_port_back(server: MetricsServer) -> None:
    server.close()
    with socket.create_server(("127.0.0.1", server.port)):
        pass
    server.close()


def test_a_port_in_use_is_a_startup_error(server: MetricsServer) -> None:
    with pytest.raises(ListenError, match=f"metrics listener 127.0.0.1:{server.port}"):
        MetricsServer(Metrics("1"), "127.0.0.1", server.port)


def test_without_tls_no_certificate_expires() -> None:
    assert "photon_tls_cert_expiry_timestamp_seconds" not in scrape(Metrics("1.2.3"))


def test_the_expiry_is_that_of_the_latest_certificate_and_refusals_are_counted() -> None:
    metrics = Metrics("1.2.3")
    metrics.observe_certificate(1e9)
    metrics.observe_certificate(2e9)
    metrics.observe_certificate_refused()
    read = scrape(metrics)
    assert read["photon_tls_cert_expiry_timestamp_seconds"] == 2e9
    assert read["photon_tls_cert_refused_total"] == 1
