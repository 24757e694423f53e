"""The bounds of the queue and the estimate of its length, in virtual time and over a real service."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from hypothesis import given
from hypothesis import strategies as st

from photon_grpc.engine.messages import Deadlines, EngineStats
from photon_grpc.errors import DeadlineTooShortError, DeadlineUnreachableError, OverloadedError
from photon_grpc.frontend.admission import Admission, Fastest, Throughput, Ticket
from photon_grpc.options import LimitOptions, SchedulerOptions
from photon_grpc.v1 import inference_pb2 as pb
from tests.support.builders import FakeClock
from tests.support.grpc_harness import Harness, quick_options, rich_error, until
from tests.support.scripted_service import scripted_service


@dataclass
class FakeEngine:
    """As much load as a test says."""

    num_live_completions: int = 0
    max_num_seqs: int = 4
    stats: EngineStats = field(default_factory=EngineStats)


@dataclass
class Desk:
    """An admission over a fake engine whose work a test does by hand."""

    engine: FakeEngine
    clock: FakeClock
    admission: Admission

    def work(self, seconds: float, tokens: int, *, waiting: int = 10) -> None:
        self.clock.now += seconds
        done = self.engine.stats.generation_tokens + tokens
        self.engine.stats = self.engine.stats._replace(generation_tokens=done, waiting=waiting)
        self.look()

    def look(self) -> None:
        # What is measured does not depend on the answer.
        with contextlib.suppress(OverloadedError):
            self.admission.check()


def desk(**limits: int) -> Desk:
    engine, clock = FakeEngine(), FakeClock()
    return Desk(engine, clock, Admission(engine, LimitOptions(**limits), clock=clock))


def test_completions_are_bounded_by_places_and_waiting_room() -> None:
    it = desk(max_queued_requests=3)
    it.engine.num_live_completions = 5
    with pytest.raises(OverloadedError):
        it.admission.enter(1, 3)
    it.admission.enter(1, 2)
    it.engine.num_live_completions = 7
    with pytest.raises(OverloadedError):
        it.admission.check()


def test_prompt_tokens_are_bounded_until_the_first_token() -> None:
    it = desk(max_queued_tokens=100)
    first, second = it.admission.enter(60, 1), it.admission.enter(20, 2)
    assert it.admission.queued_tokens == 100
    with pytest.raises(OverloadedError):
        it.admission.enter(1, 1)
    assert it.admission.queued_tokens == 100
    first.start()
    first.start()
    assert it.admission.queued_tokens == 40
    third = it.admission.enter(60, 1)
    for ticket in (first, second, third, second):
        ticket.close()
    assert it.admission.queued_tokens == 0


def test_an_empty_queue_takes_a_request_larger_than_its_bounds() -> None:
    it = desk(max_queued_requests=1, max_queued_tokens=10)
    with it.admission.enter(1000, 8), pytest.raises(OverloadedError):
        it.admission.enter(1, 1)
    it.admission.enter(1000, 8)


def test_nothing_is_known_of_an_engine_that_was_never_busy() -> None:
    it = desk()
    it.work(1.0, 100, waiting=0)
    it.work(1.0, 100, waiting=0)
    assert it.admission.estimated_wait() == 0.0
    it.engine.num_live_completions = 4
    assert it.admission.estimated_wait() is None
    it = desk(max_queued_requests=1)
    it.engine.num_live_completions = 5
    with pytest.raises(OverloadedError) as refused:
        it.admission.check()
    assert refused.value.retry_after_s == 1.0


def test_the_wait_is_the_work_that_stands_before_over_what_the_engine_does() -> None:
    """200 tokens a second; outputs of 40 and prompts of 60 make 100 tokens a request, two a second."""
    it = desk(max_queued_requests=10)
    old = it.admission.enter(60, 1)
    old.num_output_tokens = 40
    old.close()
    tickets = [it.admission.enter(60, 1) for _ in range(10)]
    it.engine.num_live_completions = 14
    for _ in range(20):
        it.work(0.5, 100)
    assert it.admission.estimated_wait() == pytest.approx((10 + 1) * 100 / 200)
    with pytest.raises(OverloadedError) as refused:
        it.admission.check()
    assert refused.value.retry_after_s == pytest.approx(5.5)
    for ticket in tickets:
        ticket.close()
    it.engine.num_live_completions = 3
    it.work(0.5, 100, waiting=0)
    assert it.admission.estimated_wait() == 0.0


def test_a_step_longer_than_the_time_between_two_looks_is_no_standstill() -> None:
    """A thousand tokens every second, looked at ten times a second."""
    it = desk()
    it.admission.enter(100, 1)
    it.engine.num_live_completions = 13
    it.work(0.1, 1)
    for _ in range(5):
        for _ in range(9):
            it.work(0.1, 0)
            assert it.admission.estimated_wait() in (None, pytest.approx(11 * 100 / 1000))
        it.work(0.1, 1000)
    assert it.admission.estimated_wait() == pytest.approx(11 * 100 / 1000)


def test_no_wait_is_longer_than_can_be_told() -> None:
    it = desk()
    it.admission.enter(1 << 20, 1)
    it.engine.num_live_completions = 14
    it.work(0.5, 1)
    it.work(100.0, 1)
    assert it.admission.estimated_wait() == 3600.0


def test_a_full_batch_is_as_good_a_measure_as_a_queue() -> None:
    it = desk()
    it.admission.enter(100)
    it.engine.num_live_completions = 4
    it.engine.stats = EngineStats(running=4)
    for _ in range(5):
        it.work(0.5, 100, waiting=0)
    assert it.admission.estimated_wait() == pytest.approx(100 / 200)


spans = st.lists(st.floats(0.001, 20.0), min_size=3, max_size=40)


@given(spans, st.floats(1.0, 1e5))
def test_a_constant_rate_is_found_however_often_one_looks(spans: list[float], rate: float) -> None:
    throughput, now = Throughput(), 100.0
    throughput.observe(now, 0, is_busy=True)
    for span in spans:
        now += span
        throughput.observe(now, round(rate * (now - 100.0)), is_busy=True)
    assert throughput.per_second is not None or rate * sum(spans) < 1.5 or sum(spans) < 0.2
    if throughput.per_second is not None:
        # Whole tokens: at the shortest span that counts, one more or less changes the rate by ten.
        assert throughput.per_second == pytest.approx(rate, rel=1e-6, abs=20.0)


@given(st.lists(st.tuples(st.floats(0.001, 20.0), st.integers(0, 1000), st.booleans()), max_size=60))
def test_the_rate_lies_between_the_slowest_and_the_fastest_busy_span(
    steps: list[tuple[float, int, bool]],
) -> None:
    """The bounds are taken over all spans between two looks at a busy engine, by counting alone."""
    throughput, now, total = Throughput(), 0.0, 0
    rates: list[float] = []
    run: list[tuple[float, int]] = []
    for span, tokens, is_busy in steps:
        now, total = now + span, total + tokens
        throughput.observe(now, total, is_busy=is_busy)
        run = [*run, (now, total)] if is_busy else []
        rates += [(total - then) / (now - moment) for moment, then in run[:-1] if now - moment >= 0.1]
    if throughput.per_second is not None:
        assert rates
        assert min(rates) - 1e-6 <= throughput.per_second <= max(rates) * (1 + 1e-9) + 1e-6
    if not rates:
        assert throughput.per_second is None


# --- tenants --------------------------------------------------------------------------------------


def test_a_tenant_under_its_share_enters_a_queue_that_another_has_filled() -> None:
    it = desk(max_queued_requests=8)
    it.engine.num_live_completions = 4

    def enter(tenant: str, **values: Any) -> Ticket:
        ticket = it.admission.enter(1, tenant=tenant, **values)
        it.engine.num_live_completions += 1
        return ticket

    flood = [enter("flood") for _ in range(8)]
    with pytest.raises(OverloadedError):
        enter("flood")
    # Half of the queue is for each of two.
    for _ in range(4):
        it.admission.check("other")
        enter("other")
    for tenant in ("flood", "other"):
        with pytest.raises(OverloadedError):
            it.admission.check(tenant)
        with pytest.raises(OverloadedError):
            enter(tenant)
    # With three shares, a tenant has three of five.
    for _ in range(4):
        enter("heavy", weight=3.0)
    # Twice the bound is in the queue, and not even a newcomer gets in.
    with pytest.raises(OverloadedError):
        enter("newcomer")
    for ticket in flood:
        ticket.close()
        it.engine.num_live_completions -= 1
    enter("flood")


def test_one_tenant_s_prompts_leave_room_for_another_s() -> None:
    it = desk(max_queued_tokens=100)
    it.admission.enter(90, tenant="flood")
    with pytest.raises(OverloadedError):
        it.admission.enter(20, tenant="flood")
    it.admission.enter(30, tenant="other")
    it.admission.enter(20, tenant="other")
    with pytest.raises(OverloadedError):
        it.admission.enter(1, tenant="other")
    with pytest.raises(OverloadedError):
        it.admission.enter(70, tenant="newcomer")
    it.admission.enter(60, tenant="newcomer")
    assert it.admission.queued_tokens == 200


def test_without_others_a_full_queue_is_full_whoever_comes() -> None:
    """Those that fill the places have their first tokens; nobody is there to share a queue with."""
    it = desk(max_queued_requests=2)
    it.engine.num_live_completions = 6
    for tenant in ("a", "b"):
        with pytest.raises(OverloadedError):
            it.admission.enter(1, tenant=tenant)


def test_a_tenant_waits_for_its_own_queue_and_for_what_others_are_entitled_to() -> None:
    """200 tokens a second, 100 tokens a request: `flood` has ten waiting, `other` two, `heavy` none."""
    it = desk(max_queued_requests=1)
    old = it.admission.enter(60, 1, tenant="flood")
    old.num_output_tokens = 40
    old.close()
    tickets = [it.admission.enter(60, 1, tenant="flood") for _ in range(10)]
    it.engine.num_live_completions = 0
    tickets += [it.admission.enter(60, 1, tenant="other") for _ in range(2)]
    it.engine.num_live_completions = 16
    for _ in range(20):
        it.work(0.5, 100, waiting=12)
    assert it.admission.queue_wait() == pytest.approx(13 * 100 / 200)
    # Its own two, its place, and as much of the flood's.
    assert it.admission.estimated_wait("other") == pytest.approx(6 * 100 / 200)
    assert it.admission.estimated_wait("flood") == pytest.approx((11 + 2) * 100 / 200)
    assert it.admission.estimated_wait("newcomer") == pytest.approx(3 * 100 / 200)
    assert it.admission.estimated_wait("heavy", 4.0) == pytest.approx((1 + 2 / 4) * 100 / 200)
    # Whoever is refused is told when its own turn would have come, and deadlines are held to the same.
    for tenant, wait in (("flood", 6.5), ("other", 3.0)):
        with pytest.raises(OverloadedError) as refused:
            it.admission.check(tenant)
        assert refused.value.retry_after_s == pytest.approx(wait)
    for ticket in tickets[1:]:
        ticket.close()
    it.engine.num_live_completions = 4
    late = Deadlines(start_by=it.clock() + 0.1)
    with pytest.raises(DeadlineUnreachableError) as unreachable:
        it.admission.enter(60, 1, late, tenant="flood")
    assert unreachable.value.retry_after_s == it.admission.estimated_wait("flood")


tenant_queues = st.dictionaries(
    st.sampled_from("abcd"),
    st.tuples(st.integers(1, 20), st.integers(1, 1000), st.sampled_from((0.5, 1.0, 3.0))),
    min_size=1,
)


@given(tenant_queues, st.sampled_from("abcde"), st.sampled_from((0.5, 1.0, 3.0)))
def test_no_tenant_is_told_more_than_the_whole_queue_and_its_own_place(
    queues: dict[str, tuple[int, int, float]], tenant: str, weight: float
) -> None:
    it = desk(max_queued_tokens=1 << 40)
    num_waiting = 0
    for name, (count, tokens, own_weight) in queues.items():
        for _ in range(count):
            it.admission.enter(tokens, tenant=name, weight=own_weight)
        num_waiting += count
    it.engine.num_live_completions = 4 + num_waiting
    for _ in range(5):
        it.work(0.5, 100, waiting=num_waiting)
    wait = it.admission.estimated_wait(tenant, weight)
    assert wait is not None
    queued = it.admission.queued_tokens
    place = queues[tenant][1] if tenant in queues else queued / num_waiting
    own = queues[tenant][0] * queues[tenant][1] if tenant in queues else 0
    assert min((own + place) / 200, 3600.0) - 1e-6 <= wait <= (queued + place) / 200 + 1e-6
    assert len(queues) > 1 or tenant not in queues or wait == it.admission.estimated_wait()


def test_a_tenant_with_nothing_queued_is_forgotten() -> None:
    it = desk()
    for number in range(100):
        it.admission.enter(10, tenant=f"t{number}").close()
    assert not it.admission._queues


# --- deadlines ------------------------------------------------------------------------------------


def busy_desk() -> Desk:
    """Ten wait, for 5.5 s: as above."""
    it = desk()
    old = it.admission.enter(60)
    old.num_output_tokens = 40
    old.close()
    for _ in range(10):
        it.admission.enter(60)
    it.engine.num_live_completions = 14
    for _ in range(20):
        it.work(0.5, 100)
    return it


@pytest.mark.parametrize("clock", ["start_by", "first_token_by", "end_by"])
def test_what_the_queue_is_too_long_for_is_refused_with_the_wait(clock: str) -> None:
    it = busy_desk()
    before = it.admission.queued_tokens
    with pytest.raises(DeadlineUnreachableError) as refused:
        it.admission.enter(60, 1, Deadlines(**{clock: it.clock() + 5.4}))
    assert refused.value.retry_after_s == pytest.approx(5.5)
    assert it.admission.queued_tokens == before
    it.admission.enter(60, 1, Deadlines(**{clock: it.clock() + 5.6}))


def test_a_soft_end_is_no_deadline() -> None:
    it = busy_desk()
    it.admission.enter(60, 1, Deadlines(finish_by=it.clock() + 0.1))


def test_what_no_idle_server_could_do_is_told_apart() -> None:
    it = desk()
    for prefill_s in (0.9, 0.7, 0.5, 0.8):
        it.admission.enter(1000).start(prefill_s)
    # Four observations may be bad luck.
    it.admission.enter(1000, 1, Deadlines(end_by=it.clock() + 0.1)).close()
    it.admission.enter(1000).start(0.6)
    for clock in ("first_token_by", "end_by"):
        with pytest.raises(DeadlineTooShortError) as refused:
            it.admission.enter(1000, 1, Deadlines(**{clock: it.clock() + 0.4}))
        assert refused.value.estimate_s == 0.5
    it.admission.enter(1000, 1, Deadlines(end_by=it.clock() + 0.6)).close()
    # A longer prompt takes at least as long; nothing is known of a shorter one.
    with pytest.raises(DeadlineTooShortError):
        it.admission.enter(3000, 1, Deadlines(end_by=it.clock() + 0.4))
    it.admission.enter(500, 1, Deadlines(end_by=it.clock() + 0.1)).close()


def test_prompts_that_shared_their_steps_with_a_queue_say_nothing_of_an_idle_server() -> None:
    it = desk()
    it.engine.stats = EngineStats(waiting=3)
    for _ in range(10):
        it.admission.enter(1000).start(5.0)
    it.engine.stats = EngineStats()
    it.admission.enter(1000, 1, Deadlines(end_by=it.clock() + 0.1))


samples = st.lists(st.tuples(st.integers(1, 1 << 17), st.floats(1e-4, 100.0)), max_size=60)


@given(samples, st.integers(1, 1 << 17))
def test_the_bound_is_no_longer_than_a_prompt_up_to_twice_as_long_has_taken(
    samples: list[tuple[int, float]], length: int
) -> None:
    fastest = Fastest()
    for num_tokens, seconds in samples:
        fastest.observe(num_tokens, seconds)
    bound = fastest.seconds(length)
    # Whatever is claimed has been seen, of a prompt that is not longer than the next power of two.
    assert bound == 0.0 or any(t < 2 * length and s == bound for t, s in samples)
    assert fastest.seconds(2 * length) >= bound


# --- over a real service --------------------------------------------------------------------------


def _request(max_tokens: int, prompt_tokens: int = 8) -> pb.StreamGenerateRequest:
    spec = pb.GenerationSpec(token_ids=pb.TokenIds(ids=range(20, 20 + prompt_tokens)))
    spec.stop.max_tokens = max_tokens
    spec.stop.ignore_eos = True
    return pb.StreamGenerateRequest(spec=spec)


async def _read(call: Any) -> int:
    num_tokens = 0
    while (message := await call.read()) is not grpc.aio.EOF:
        num_tokens += message.delta.num_tokens
    return num_tokens


async def _refusal(harness: Harness, request: pb.StreamGenerateRequest, **options: Any) -> Any:
    call = harness.inference.StreamGenerate(request, **options)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _read(call)
    return rich_error(caught.value)


@pytest.mark.parametrize(
    "limits", [{"max_queued_requests": 4}, {"max_queued_tokens": 256}], ids=["requests", "tokens"]
)
async def test_a_client_of_a_full_server_hears_when_to_come_back(
    tmp_path: Path, limits: dict[str, int]
) -> None:
    options = replace(
        quick_options(limits=limits), scheduler=SchedulerOptions(max_num_seqs=2, max_num_batched_tokens=256)
    )
    async with scripted_service(tmp_path, options, step_s=0.002) as harness:
        # They run for longer than all that is asked meanwhile takes, then leave.
        running = [harness.inference.StreamGenerate(_request(4000)) for _ in range(2)]
        for call in running:
            await call.read()
        # Prompts of a length that makes the wait longer than the shortest that is ever told.
        waiting = [harness.inference.StreamGenerate(_request(400, 64)) for _ in range(4)]
        reads = [asyncio.ensure_future(_read(call)) for call in waiting]
        await until(lambda: harness.server.num_live_calls == 6)
        # Looked at twice while sequences wait, the engine's pace is known.
        await _refusal(harness, _request(4))
        await asyncio.sleep(0.3)
        refusals = [await _refusal(harness, _request(4)) for _ in range(8)]
        for error in refusals:
            assert error.code is grpc.StatusCode.UNAVAILABLE
            assert error.reason == "OVERLOADED"
            pushback = int(str(error.trailers["grpc-retry-pushback-ms"]))
            assert 50 <= pushback <= 5000
            delay = error.details[error_details_pb2.RetryInfo].retry_delay
            assert delay.ToMilliseconds() == pushback
        # Spread, and not the constant of a server that has measured nothing.
        assert len({str(error.trailers["grpc-retry-pushback-ms"]) for error in refusals}) > 1
        # Health has no place in the queue.
        health = await harness.health.Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        for call in running:
            call.cancel()
        assert await asyncio.gather(*reads) == [400] * 4
        # Every place is given back.
        again = [harness.inference.StreamGenerate(_request(4)) for _ in range(4)]
        assert await asyncio.gather(*map(_read, again)) == [4] * 4


async def test_a_client_whose_deadline_cannot_be_met_hears_so_at_once(tmp_path: Path) -> None:
    # Deadlines that no estimate passes, or those that are to wait would be refused as well.
    limits = {"default_deadline_s": 10_000.0, "max_deadline_s": 10_000.0}
    options = replace(
        quick_options(limits=limits), scheduler=SchedulerOptions(max_num_seqs=1, max_num_batched_tokens=256)
    )
    async with scripted_service(tmp_path, options, step_s=0.01) as harness:
        for _ in range(5):
            assert await _read(harness.inference.StreamGenerate(_request(40))) == 40
        # Those that wait are ten seconds' work and more, so that the deadline does not pass by itself.
        calls = [harness.inference.StreamGenerate(_request(400)) for _ in range(40)]
        reads = [asyncio.ensure_future(_read(call)) for call in calls]
        await until(lambda: harness.server.num_live_calls == 40)
        # A look starts the measurement, the next one reads it.
        for _ in range(2):
            await _call_and_leave(harness)
            await asyncio.sleep(0.3)
        error = await _refusal(harness, _request(4), timeout=10.0)
        assert error.code is grpc.StatusCode.UNAVAILABLE
        assert error.reason == "DEADLINE_UNREACHABLE"
        assert error.trailers["grpc-retry-pushback-ms"] == "50"
        assert int(error.info.metadata["wait_ms"]) > 10_000
        for call in calls:
            call.cancel()
        await asyncio.gather(*reads, return_exceptions=True)
        await until(lambda: harness.server.num_live_calls == 0)


async def test_a_client_in_more_haste_than_an_idle_server_hears_so_at_once(tmp_path: Path) -> None:
    async with scripted_service(tmp_path, step_s=0.5) as harness:
        # Each takes a step of half a second, as the fastest of five is known to do.
        for _ in range(5):
            assert await _read(harness.inference.StreamGenerate(_request(1))) == 1
        error = await _refusal(harness, _too_hasty(), timeout=30.0)
        assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert error.reason == "DEADLINE_TOO_SHORT"
        assert error.trailers["grpc-retry-pushback-ms"] == "-1"
        assert int(error.info.metadata["estimate_ms"]) >= 500


async def _call_and_leave(harness: Harness) -> None:
    """A call that waits in the queue for a moment."""
    call = harness.inference.StreamGenerate(_request(4))
    await asyncio.sleep(0.05)
    call.cancel()


def _too_hasty() -> pb.StreamGenerateRequest:
    request = _request(4)
    request.spec.scheduling.first_token_budget.FromMilliseconds(250)
    return request
