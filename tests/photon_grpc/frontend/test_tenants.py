"""A tenant's quota in virtual time, and what a caller who has used it up hears."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from hypothesis import given
from hypothesis import strategies as st

from photon_grpc.errors import QuotaExceededError
from photon_grpc.frontend import tenants as tenants_module
from photon_grpc.frontend.tenants import Bucket, Tenants
from photon_grpc.options import AuthOptions, Options, SchedulerOptions, TenantOptions
from photon_grpc.v1 import inference_pb2 as pb
from tests.support.builders import FakeClock
from tests.support.grpc_harness import Harness, quick_options, rich_error, until
from tests.support.scripted_service import scripted_service


def books(**limits: Any) -> tuple[Tenants, FakeClock]:
    clock = FakeClock()
    return Tenants(TenantOptions(**limits), clock=clock), clock


def test_without_limits_anything_goes() -> None:
    tenants, _ = books()
    for _ in range(1000):
        tenants.enter("a").reserve(1 << 30)


def test_requests_at_the_same_time_are_bounded_for_each_tenant() -> None:
    tenants, _ = books(max_concurrent_requests=2)
    first, _second = tenants.enter("a"), tenants.enter("a")
    with pytest.raises(QuotaExceededError) as refused:
        tenants.enter("a")
    assert refused.value.limit == "requests at the same time"
    assert 0 < refused.value.retry_after_s < math.inf
    tenants.enter("b")
    first.close()
    first.close()
    tenants.enter("a")
    with pytest.raises(QuotaExceededError):
        tenants.enter("a")


def test_requests_per_second_are_bounded_after_a_burst() -> None:
    tenants, clock = books(requests_per_s=2.0, request_burst=3)
    for _ in range(3):
        tenants.enter("a").close()
    with pytest.raises(QuotaExceededError) as refused:
        tenants.enter("a")
    assert refused.value.retry_after_s == pytest.approx(0.5)
    tenants.enter("b").close()
    clock.advance(0.5)
    tenants.enter("a").close()
    with pytest.raises(QuotaExceededError):
        tenants.enter("a")


def test_tokens_are_reserved_at_most_and_the_rest_comes_back() -> None:
    tenants, clock = books(tokens_per_s=10.0, token_burst=100)
    lease = tenants.enter("a")
    lease.reserve(80)
    other = tenants.enter("a")
    with pytest.raises(QuotaExceededError) as refused:
        other.reserve(50)
    assert refused.value.retry_after_s == pytest.approx(3.0)
    other.close()
    lease.used_tokens = 20
    lease.close()
    clock.advance(1.0)
    # 100 - 20 used + 10 refilled.
    with tenants.enter("a") as more:
        with pytest.raises(QuotaExceededError):
            more.reserve(91)
        more.reserve(90)


def test_what_can_never_fit_is_told_apart_from_what_must_wait() -> None:
    tenants, _ = books(tokens_per_s=10.0, token_burst=100)
    with tenants.enter("a") as lease, pytest.raises(QuotaExceededError) as refused:
        lease.reserve(101)
    assert refused.value.retry_after_s == math.inf


def test_idle_tenants_are_forgotten_before_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenants_module, "_MANY_TENANTS", 10)
    tenants, clock = books(requests_per_s=1.0, request_burst=2)
    live = tenants.enter("live")
    for number in range(100):
        tenants.enter(f"t{number}").close()
        clock.advance(1.5)
    assert len(tenants) <= 10
    live.close()


def test_tenants_without_limits_are_forgotten_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenants_module, "_MANY_TENANTS", 10)
    tenants, _ = books()
    for number in range(100):
        with tenants.enter(f"t{number}") as lease:
            lease.reserve(50)
            lease.used_tokens = 20
    assert len(tenants) <= 10


def test_each_tenant_has_its_own_terms_and_new_ones_count_at_once(tmp_path: Path) -> None:
    file, clock = tmp_path / "tenants.toml", FakeClock()

    def write(text: str) -> None:
        new = tmp_path / "new"
        new.write_text(text)
        new.replace(file)

    write("[default]\nmax_concurrent_requests = 1\n[tenants.big]\nmax_concurrent_requests = 2\nweight = 3\n")
    tenants = Tenants(TenantOptions(file=str(file)), clock=clock)
    first, second = tenants.enter("big"), tenants.enter("big")
    assert first.terms.weight == 3
    small = tenants.enter("small")
    for name in ("big", "small"):
        with pytest.raises(QuotaExceededError):
            tenants.enter(name)
    write("[default]\nmax_concurrent_requests = 3\nrequests_per_s = 1\nrequest_burst = 2\n")
    tenants.enter("big").close()
    tenants.enter("big").close()
    with pytest.raises(QuotaExceededError) as refused:
        tenants.enter("big")
    assert refused.value.limit == "requests per second"
    # What was missing when the size grew is missing still.
    write("[default]\nrequests_per_s = 2\nrequest_burst = 3\n")
    tenants.enter("big").close()
    with pytest.raises(QuotaExceededError) as refused:
        tenants.enter("big")
    assert refused.value.retry_after_s == pytest.approx(0.5)
    for lease in (first, second, small):
        lease.close()


bucket_sizes = st.tuples(st.sampled_from((0.0, 0.5, 3.0)), st.floats(1.0, 100.0))


@given(bucket_sizes, st.lists(st.tuples(st.floats(0, 5), st.floats(0, 50), bucket_sizes), max_size=20))
def test_a_bucket_that_changes_holds_between_nothing_and_its_size(
    begin: tuple[float, float], steps: list[tuple[float, float, tuple[float, float]]]
) -> None:
    bucket, now = Bucket(*begin, 0.0), 0.0
    for pause, amount, (rate, size) in steps:
        now += pause
        if bucket.wait(now, amount) == 0.0:
            bucket.take(now, amount)
        bucket.change(rate, size, now)
        assert bucket.wait(now, 0.0) == 0.0
        assert not rate or bucket.wait(now, size * 1.01) == math.inf
        assert not rate or bucket.wait(now, size) <= size / rate + 1e-6


@given(
    st.floats(0.1, 1e3),
    st.floats(1.0, 1e4),
    st.lists(st.tuples(st.floats(0.0, 10.0), st.floats(0.0, 2e3)), max_size=50),
)
def test_a_bucket_gives_no_more_than_its_size_and_its_rate(
    rate: float, size: float, steps: list[tuple[float, float]]
) -> None:
    bucket, now, taken = Bucket(rate, size, 0.0), 0.0, 0.0
    for pause, amount in steps:
        now += pause
        wait = bucket.wait(now, amount)
        assert (wait == math.inf) == (amount > size)
        if wait == 0.0:
            bucket.take(now, amount)
            taken += amount
        assert taken <= (size + rate * now) * (1 + 1e-9) + 1e-6


@given(st.floats(0.1, 1e3), st.floats(1.0, 1e4), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_who_waits_as_long_as_told_is_served(rate: float, size: float, first: float, then: float) -> None:
    bucket = Bucket(rate, size, 0.0)
    bucket.take(0.0, first * size)
    wait = bucket.wait(0.0, then * size)
    assert bucket.wait(wait, then * size) == pytest.approx(0.0, abs=1e-6)


# --- over a real service --------------------------------------------------------------------------


def _options(**limits: Any) -> Options:
    return replace(quick_options(), tenants=TenantOptions(**limits))


def _request(max_tokens: int) -> pb.GenerateRequest:
    spec = pb.GenerationSpec(token_ids=pb.TokenIds(ids=range(20, 30)))
    spec.stop.max_tokens = max_tokens
    spec.stop.ignore_eos = True
    return pb.GenerateRequest(spec=spec)


async def test_a_client_that_has_used_up_its_tokens_hears_when_they_are_back(tmp_path: Path) -> None:
    """A request of 10 + 90 tokens leaves nothing; refilling 50 takes 500 s, less what the test takes."""
    async with scripted_service(tmp_path, _options(tokens_per_s=0.1, token_burst=100)) as harness:
        await harness.inference.Generate(_request(90))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await harness.inference.Generate(_request(40))
        error = rich_error(caught.value)
        assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.reason == "QUOTA_EXCEEDED"
        assert 400_000 < int(str(error.trailers["grpc-retry-pushback-ms"])) <= 500_000
        (violation,) = error.details[error_details_pb2.QuotaFailure].violations
        assert violation.subject == "tenant"
        assert "tokens per second" in violation.description
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await harness.inference.Generate(_request(91))
        error = rich_error(caught.value)
        assert error.trailers["grpc-retry-pushback-ms"] == "-1"
        assert error_details_pb2.RetryInfo not in error.details


async def test_refused_and_failed_calls_give_back_what_they_held(tmp_path: Path) -> None:
    limits = {"max_concurrent_requests": 1, "tokens_per_s": 0.001, "token_burst": 1000}
    # At this pace the stream of 700 tokens still runs when the next call comes, however slow the machine.
    async with scripted_service(tmp_path, _options(**limits), step_s=0.02) as harness:
        bad = _request(10)
        bad.spec.sampling.temperature = -1
        for _ in range(5):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await harness.inference.Generate(bad)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        # Each uses 20 of the thousand that it could have used.
        for _ in range(10):
            await harness.inference.Generate(_request(10))
        call = harness.inference.StreamGenerate(pb.StreamGenerateRequest(spec=_request(700).spec))
        await call.read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await harness.inference.Generate(_request(10))
        assert rich_error(caught.value).reason == "QUOTA_EXCEEDED"
        call.cancel()


# --- several tenants over a real service ----------------------------------------------------------


def _shared(folder: Path, terms: str, **limits: int) -> Options:
    """One place in the batch; whoever comes with the token `NAME-0123456789abcdef` is the tenant NAME."""
    (folder / "callers").write_text(
        "".join(f"{name} infer token:{_token(name)}\n" for name in ("blocker", "flood", "other"))
    )
    (folder / "tenants.toml").write_text(terms)
    return replace(
        quick_options(limits=limits),
        scheduler=SchedulerOptions(max_num_seqs=1, max_num_batched_tokens=64),
        auth=AuthOptions(str(folder / "callers")),
        tenants=TenantOptions(file=str(folder / "tenants.toml")),
    )


def _token(name: str) -> str:
    return f"{name}-0123456789abcdef"


def _stream(harness: Harness, name: str, max_tokens: int = 4) -> Any:
    request = pb.StreamGenerateRequest(spec=_request(max_tokens).spec)
    return harness.inference.StreamGenerate(request, metadata=(("authorization", f"Bearer {_token(name)}"),))


async def _blocked(harness: Harness) -> Any:
    """A call that has the place in the batch until it is cancelled."""
    call = _stream(harness, "blocker", 4000)
    await call.read()
    return call


async def _order(harness: Harness, calls: list[tuple[str, Any]], blocker: Any) -> list[str]:
    """Let the queue go; the tenants in the order in which their calls were served."""
    await until(lambda: harness.server.num_live_calls == len(calls) + 1, 30.0)
    order: list[str] = []

    async def read(name: str, call: Any) -> None:
        while await call.read() is not grpc.aio.EOF:
            pass
        assert await call.code() is grpc.StatusCode.OK
        order.append(name)

    blocker.cancel()
    await asyncio.gather(*(read(name, call) for name, call in calls))
    return order


async def test_a_flood_of_one_tenant_does_not_hold_up_another(tmp_path: Path) -> None:
    async with scripted_service(tmp_path, _shared(tmp_path, ""), step_s=0.01) as harness:
        blocker = await _blocked(harness)
        calls = [("flood", _stream(harness, "flood")) for _ in range(20)]
        await until(lambda: harness.server.num_live_calls == 21, 30.0)
        calls += [("other", _stream(harness, "other")) for _ in range(3)]
        order = await _order(harness, calls, blocker)
    # In turns: it is served second, fourth and sixth; two ends may reach the reader in either order.
    assert order[:8].count("other") == 3


async def test_a_tenant_of_more_shares_is_served_more(tmp_path: Path) -> None:
    options = _shared(tmp_path, "[tenants.other]\nweight = 4\n")
    async with scripted_service(tmp_path, options, step_s=0.01) as harness:
        blocker = await _blocked(harness)
        calls = [("flood", _stream(harness, "flood")) for _ in range(8)]
        await until(lambda: harness.server.num_live_calls == 9, 30.0)
        calls += [("other", _stream(harness, "other")) for _ in range(8)]
        order = await _order(harness, calls, blocker)
    assert order[:11].count("other") == 8


async def test_a_queue_that_one_tenant_has_filled_has_room_for_another(tmp_path: Path) -> None:
    options = _shared(tmp_path, "", max_queued_requests=4)
    async with scripted_service(tmp_path, options, step_s=0.01) as harness:
        blocker = await _blocked(harness)
        calls = [("flood", _stream(harness, "flood")) for _ in range(4)]
        await until(lambda: harness.server.num_live_calls == 5, 30.0)
        refused = _stream(harness, "flood")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await refused.read()
        error = rich_error(caught.value)
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "OVERLOADED")
        assert 50 <= int(str(error.trailers["grpc-retry-pushback-ms"])) <= 5000
        calls += [("other", _stream(harness, "other")) for _ in range(2)]
        assert sorted(await _order(harness, calls, blocker)) == ["flood"] * 4 + ["other"] * 2
