"""The benchmarks' own arithmetic: arrivals, percentiles, gaps between merged tokens, goodput."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from photon_grpc.errors import MaxDurationError, OverloadedError, PhotonError
from photon_grpc.scheduler.output import ScheduledSequence, SchedulerOutput
from photon_grpc.server.status import to_status
from photon_grpc.v1 import inference_pb2
from tests.support.tiny_model import tiny_model_folder
from tools.bench import engine, host, overload
from tools.bench.figures import CallRecord, Distribution, Objective, Refusal, summarize
from tools.bench.load import Load, poisson_arrivals, read_refusal, request_bytes, split
from tools.bench.scripted_factory import Pace
from tools.bench.server_handle import CpuTimes
from tools.bench.server_process import ServerSpec

OBJECTIVE = Objective(first_token_s=0.5, token_gap_s=0.05)


def record(
    *tokens: tuple[float, int], intended: float = 0.0, sent: float | None = None, code: str = "OK"
) -> CallRecord:
    return CallRecord(
        intended=intended,
        sent=intended if sent is None else sent,
        ended=tokens[-1][0] if tokens else intended + 1.0,
        code=code,
        num_messages=len(tokens) + 3,
        tokens=tokens,
    )


@given(st.lists(st.floats(0, 1e3), min_size=2, max_size=200))
def test_percentiles_are_those_of_the_standard_library_and_numpy(values: list[float]) -> None:
    found = Distribution.of(values)
    assert found is not None
    hundredths = statistics.quantiles(values, n=100, method="inclusive")
    for percentile, value in ((50, found.p50), (90, found.p90), (99, found.p99)):
        assert value == pytest.approx(hundredths[percentile - 1], rel=1e-9, abs=1e-9)
        assert value == pytest.approx(float(np.percentile(values, percentile)), rel=1e-9, abs=1e-9)
    assert found.maximum == max(values)
    assert found.mean == pytest.approx(statistics.fmean(values), rel=1e-9, abs=1e-9)
    assert found.count == len(values)


def test_goodput_counts_what_good_calls_brought_in_a_span() -> None:
    good = record((1.0, 3), (2.0, 5), (4.0, 7))
    bad = record((2.0, 100), code="UNAVAILABLE")
    assert overload.tokens_per_second([good, bad], 1.0, 4.0) == pytest.approx(8 / 3)
    assert overload.tokens_per_second([good, bad], 5.0, 6.0) == 0.0


@pytest.mark.parametrize(
    ("demands", "capacity", "shares"),
    [
        ([1.0, 5.0], 10.0, [1.0, 5.0]),
        ([10.0, 50.0], 20.0, [10.0, 10.0]),
        ([50.0, 6.0], 20.0, [14.0, 6.0]),
        ([9.0, 1.0, 9.0], 11.0, [5.0, 1.0, 5.0]),
    ],
)
def test_a_small_demand_is_met_and_the_rest_is_divided(
    demands: list[float], capacity: float, shares: list[float]
) -> None:
    assert overload.max_min_shares(demands, capacity) == pytest.approx(shares)


@pytest.mark.parametrize(
    ("error", "reason", "says_when"),
    [
        (OverloadedError("full", retry_after_s=0.2), "OVERLOADED", True),
        (MaxDurationError(), "MAX_DURATION", False),
    ],
)
def test_the_trailers_of_a_refusal_are_read(error: PhotonError, reason: str, says_when: bool) -> None:
    refusal = read_refusal(to_status(error, "id").trailing_metadata)
    assert (refusal.reason, refusal.says_when) == (reason, says_when)
    assert (refusal.pushback_ms is not None) is says_when


@pytest.mark.parametrize(
    ("code", "refusal", "is_right"),
    [
        ("OK", None, True),
        ("UNAVAILABLE", Refusal("OVERLOADED", 200, 210), True),
        ("RESOURCE_EXHAUSTED", Refusal("QUOTA_EXCEEDED", 200, 210), True),
        ("UNAVAILABLE", Refusal("OVERLOADED", None, 210), False),
        ("UNAVAILABLE", Refusal("OVERLOADED", 200, None), False),
        ("UNAVAILABLE", Refusal("", None, None), False),
        ("UNAVAILABLE", None, False),
        ("DEADLINE_EXCEEDED", Refusal("QUEUE_TIMEOUT", 200, 210), False),
    ],
)
def test_an_overloaded_call_is_served_or_told_when_to_come_back(
    code: str, refusal: Refusal | None, is_right: bool
) -> None:
    call = CallRecord(0.0, 0.0, 1.0, code, 0, (), refusal)
    assert overload.is_told_when(call) is is_right


def test_an_empty_sample_has_no_figures() -> None:
    assert Distribution.of([]) is None


def test_arrivals_are_fixed_by_the_seed() -> None:
    assert poisson_arrivals(20.0, 10.0, seed=7) == poisson_arrivals(20.0, 10.0, seed=7)
    assert poisson_arrivals(20.0, 10.0, seed=7) != poisson_arrivals(20.0, 10.0, seed=8)


def test_a_longer_load_begins_like_the_shorter_one() -> None:
    short = poisson_arrivals(20.0, 5.0, seed=7)
    assert poisson_arrivals(20.0, 10.0, seed=7)[: len(short)] == short


def test_arrivals_are_poisson() -> None:
    """Mean and variance of a count are both rate x time, and gaps are exponential: of 20,000 the sample
    mean has a relative standard error of 0.7 %, and a fixed seed makes this no game of chance."""
    rate, duration = 200.0, 100.0
    moments = poisson_arrivals(rate, duration, seed=1)
    assert all(0 <= a < b < duration for a, b in pairwise(moments))
    gaps = np.diff((0.0, *moments))
    assert gaps.mean() == pytest.approx(1 / rate, rel=0.03)
    assert gaps.std() == pytest.approx(1 / rate, rel=0.03)
    assert np.mean(gaps > 1 / rate) == pytest.approx(math.exp(-1), rel=0.03)
    counts = np.histogram(moments, bins=100, range=(0, duration))[0]
    assert counts.var() == pytest.approx(rate, rel=0.4)


def test_a_message_of_several_tokens_counts_as_equal_gaps() -> None:
    call = record((1.0, 1), (1.4, 1), (2.0, 3))
    assert call.token_gaps_s() == pytest.approx([0.4, 0.2, 0.2, 0.2])
    assert call.pauses_s() == pytest.approx([0.4, 0.6])


def test_tokens_merged_into_the_first_message_have_no_gap_between_them() -> None:
    assert record((1.0, 3), (1.5, 1)).token_gaps_s() == pytest.approx([0.0, 0.0, 0.5])


def test_a_call_without_tokens_has_no_gaps() -> None:
    assert record().token_gaps_s() == []
    assert record().pauses_s() == []


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 9)), min_size=1, max_size=30))
def test_gaps_add_up_however_tokens_are_merged(parts: list[tuple[float, int]]) -> None:
    moments = sorted(moment for moment, _ in parts)
    call = record(*zip(moments, (count for _, count in parts), strict=True))
    gaps = call.token_gaps_s()
    assert len(gaps) == call.num_tokens - 1
    assert sum(gaps) == pytest.approx(moments[-1] - moments[0])
    assert sum(call.pauses_s()) == pytest.approx(moments[-1] - moments[0])


def test_latency_counts_from_the_intended_moment() -> None:
    late = record((3.0, 1), intended=1.0, sent=2.5)
    summary = summarize([late], OBJECTIVE)
    assert summary.first_token is not None
    assert summary.end_to_end is not None
    assert summary.send_lateness is not None
    assert summary.first_token.p50 == pytest.approx(2.0)
    assert summary.end_to_end.p50 == pytest.approx(2.0)
    assert summary.send_lateness.p50 == pytest.approx(1.5)


def test_summary_counts_what_came() -> None:
    calls = [record((0.5, 2), (1.0, 2)), record((1.0, 1), (4.0, 1), intended=0.5), record(code="UNAVAILABLE")]
    summary = summarize(calls, OBJECTIVE)
    assert summary.elapsed_s == pytest.approx(4.0)
    assert summary.codes == {"OK": 2, "UNAVAILABLE": 1}
    assert (summary.num_calls, summary.num_tokens, summary.num_messages) == (3, 6, 13)
    assert summary.tokens_per_second == pytest.approx(1.5)
    assert summary.tokens_per_token_message == pytest.approx(1.5)
    assert summary.calls_per_second == pytest.approx(0.5)


def test_latencies_leave_out_calls_that_failed() -> None:
    summary = summarize([record((1.0, 1), (1.5, 1)), record((9.0, 1), (99.0, 1), code="ABORTED")], OBJECTIVE)
    assert summary.token_gap is not None
    assert summary.token_gap.maximum == pytest.approx(0.5)
    assert summary.num_tokens == 4


@pytest.mark.parametrize(
    ("call", "good"),
    [
        (record((0.5, 1), (0.54, 1)), True),
        (record((0.51, 1), (0.55, 1)), False),
        (record((0.5, 1), (0.61, 2)), False),
        (record((0.5, 1), (0.7, 1), (0.71, 5)), True),
        (record((0.1, 1)), True),
        (record((0.1, 1), code="ABORTED"), False),
        (record(), False),
    ],
)
def test_goodput_asks_for_both_latencies_and_ok(call: CallRecord, good: bool) -> None:
    assert OBJECTIVE.is_met(call) is good


LOAD = Load(address="", prompt_tokens=8, new_tokens=4, first_id=4, vocab_size=512)


@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 40))
def test_splitting_a_closed_loop_loses_and_repeats_no_request(
    num_processes: int, concurrency: int, num_requests: int
) -> None:
    num_requests = max(num_requests, concurrency)
    load = Load("", 8, 4, 4, 512, concurrency=concurrency, num_requests=num_requests)
    parts = split(load, num_processes)
    assert sum(part.concurrency for part, _, _ in parts) == concurrency
    numbers = [first + i * step for part, first, step in parts for i in range(part.num_requests or 0)]
    if concurrency >= num_processes:
        assert sorted(numbers) == list(range(num_requests))


def test_splitting_an_open_loop_keeps_every_arrival() -> None:
    load = Load("", 8, 4, 4, 512, arrivals=(0.1, 0.2, 0.3, 0.4, 0.5))
    parts = split(load, 2)
    assert [part.arrivals for part, _, _ in parts] == [(0.1, 0.3, 0.5), (0.2, 0.4)]
    assert len(split(load, 8)) == 5


def test_a_request_is_fixed_by_seed_and_number_and_asks_for_all_its_tokens() -> None:
    data = request_bytes(LOAD, 3)
    assert data == request_bytes(LOAD, 3)
    assert data != request_bytes(LOAD, 4)
    spec = inference_pb2.StreamGenerateRequest.FromString(data).spec
    assert len(spec.token_ids.ids) == 8
    assert all(4 <= token_id < 512 for token_id in spec.token_ids.ids)
    assert (spec.stop.max_tokens, spec.stop.ignore_eos, spec.sampling.temperature) == (4, True, 0.0)
    assert spec.cache.bypass_prefix_cache


def test_outputs_spread_evenly_around_their_length() -> None:
    load = replace(LOAD, new_tokens=40, spread=10)
    specs = [inference_pb2.StreamGenerateRequest.FromString(request_bytes(load, n)).spec for n in range(400)]
    lengths = [spec.stop.max_tokens for spec in specs]
    assert (min(lengths), max(lengths)) == (30, 50)
    assert statistics.fmean(lengths) == pytest.approx(40, rel=0.03)


def test_server_cpu_is_told_apart_by_thread() -> None:
    used = CpuTimes(process=10.0, event_loop=6.0, engine=3.0) - CpuTimes(2.0, 1.0, 1.0)
    assert (used.process, used.event_loop, used.engine) == (8.0, 5.0, 2.0)
    assert (used.front_end, used.others) == (6.0, 1.0)


def test_a_server_spec_survives_the_command_line() -> None:
    spec = ServerSpec(model="demo", dtype="float32", num_threads=2, step_s=0.02, max_num_seqs=256)
    assert ServerSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_the_host_benchmark_keeps_a_full_batch_decoding(prefix_caching: bool) -> None:
    """A sequence that ended or waited would make its steps look cheap; a token pickles to a few bytes."""
    plan = host.HostPlan((1, 5), steps=40, repeats=2, prefix_caching=prefix_caching)
    one, five = host.run(plan, lambda _: None)
    assert (one.batch, five.batch) == (1, 5)
    assert five.pickle_bytes - one.pickle_bytes >= 4 * 3
    for row in (one, five):
        parts = [row.median_us[name] for name in ("schedule", "update", "message")]
        assert all(0 < part < row.median_us["total"] * 1.5 for part in parts)
        assert row.p99_us["total"] >= row.median_us["total"] > 0


def test_the_engine_benchmark_has_equal_tokens_on_both_sides(tmp_path: Path) -> None:
    model = str(tiny_model_folder(tmp_path))
    plan = engine.EnginePlan(model, "auto", batches=(1, 3), prompt_tokens=9, new_tokens=5, repeats=1)
    rows = engine.run(plan, lambda text: None)
    assert [(row.batch, row.same_rows) for row in rows] == [(1, (1, 1)), (3, (3, 3))]


def test_a_paced_step_takes_what_its_rows_and_prompts_take() -> None:
    pace = Pace(step_s=1.0, row_s=0.1, prefill_s=10.0, prompt_token_s=0.001)

    def step(*num_tokens: int) -> SchedulerOutput:
        rows = tuple(ScheduledSequence(seq_id, count, True) for seq_id, count in enumerate(num_tokens))
        return SchedulerOutput(1, (), (), rows, sum(num_tokens))

    assert pace.seconds(step(1, 1, 1)) == pytest.approx(1.3)
    assert pace.seconds(step(1, 1, 100, 50)) == pytest.approx(1.0 + 0.4 + 10.0 + 0.150)
    assert ServerSpec.from_json(ServerSpec(pace=(1.0, 0.1, 10.0, 0.001)).to_json()).pace == (
        1.0,
        0.1,
        10.0,
        0.001,
    )
