"""Blocks for sequences: how many, shared with whom, given back when."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from photon_grpc.engine.messages import Submit
from photon_grpc.scheduler.kv_cache_manager import KVCacheManager
from photon_grpc.scheduler.output import RowFault, SamplerSpec
from photon_grpc.scheduler.prefix_cache import scope_root
from photon_grpc.scheduler.request import Request
from tests.support.builders import engine_request, run_to_end, sampling, scripted_core


def manager(num_blocks: int = 16, block_size: int = 4) -> KVCacheManager:
    return KVCacheManager(num_blocks, block_size, prefix_caching=True)


def sequence(seq_id: int, prompt: tuple[int, ...], **overrides: Any) -> Request:
    values: dict[str, Any] = {
        "seq_id": seq_id,
        "key": seq_id,
        "index": 0,
        "prompt_token_ids": prompt,
        "sampler": SamplerSpec(sampling()),
        "max_tokens": 8,
        "min_tokens": 0,
        "stop_token_ids": frozenset(),
        "eos_token_ids": frozenset(),
        "arrival_time": 0.0,
        "cache_root": scope_root(b"key", "", ""),
    }
    return Request(**{**values, **overrides})


def compute(kv: KVCacheManager, request: Request, num_tokens: int) -> None:
    assert kv.extend(request, num_tokens) is not None
    kv.advance(request, num_tokens)


def test_a_block_holds_a_token() -> None:
    with pytest.raises(ValueError, match="block_size"):
        KVCacheManager(4, 0, prefix_caching=False)


@given(st.integers(1, 9), st.lists(st.integers(1, 12), max_size=12))
def test_a_table_has_just_the_blocks_that_its_tokens_need(block_size: int, chunks: list[int]) -> None:
    """Bug of an ancestor: a length that is a multiple of the block read one entry behind the table."""
    kv = KVCacheManager(200, block_size, prefix_caching=True)
    request = sequence(1, tuple(range(sum(chunks) + 1)))
    done = 0
    for chunk in chunks:
        before = list(request.block_ids)
        new = kv.extend(request, chunk)
        assert new is not None
        assert request.block_ids == before + new
        kv.advance(request, chunk)
        done += chunk
        assert len(request.block_ids) == (done + block_size - 1) // block_size
        assert kv.num_slots_used == done
        kv.check_invariants([request])
    kv.free(request)
    assert kv.num_slots_used == 0
    assert kv.num_free_blocks == 200
    kv.free(request)
    kv.check_invariants([])


def test_extending_past_the_pool_takes_nothing() -> None:
    kv = manager(num_blocks=2)
    request = sequence(1, tuple(range(20)))
    assert kv.extend(request, 9) is None
    assert request.block_ids == []
    assert kv.num_free_blocks == 2
    assert kv.extend(request, 8) is not None


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 12])
def test_at_least_one_token_is_left_to_compute(length: int) -> None:
    kv = manager()
    prompt = tuple(range(100, 100 + length))
    first, second = sequence(1, prompt), sequence(2, prompt)
    compute(kv, first, length)
    prefix = kv.find_prefix(second)
    assert len(prefix) == (length - 1) // 4
    assert prefix == first.block_ids[: len(prefix)]
    kv.adopt_prefix(second, prefix)
    assert second.num_computed_tokens < length


def test_shared_blocks_count_once_and_live_as_long_as_any_holder() -> None:
    kv = manager()
    prompt = tuple(range(10))
    first, second = sequence(1, prompt), sequence(2, prompt)
    compute(kv, first, 10)
    kv.adopt_prefix(second, kv.find_prefix(second))
    compute(kv, second, 2)
    assert second.block_ids[:2] == first.block_ids[:2]
    assert second.block_ids[2] != first.block_ids[2]
    assert kv.pool.num_used == 4
    assert kv.num_slots_used == 12
    kv.check_invariants([first, second])
    kv.free(first)
    assert kv.pool.num_used == 3
    assert kv.num_slots_used == 10
    kv.check_invariants([second])


def test_only_full_blocks_of_the_same_beginning_are_found() -> None:
    kv = manager()
    compute(kv, sequence(1, (1, 2, 3, 4, 5, 6, 7)), 7)
    assert len(kv.find_prefix(sequence(2, (1, 2, 3, 4, 5, 6, 7, 8, 9)))) == 1
    assert kv.find_prefix(sequence(3, (0, 2, 3, 4, 5, 6))) == []
    assert kv.find_prefix(sequence(4, (1, 2, 3, 4), cache_root=scope_root(b"key", "x", ""))) == []


def test_a_hole_ends_the_prefix() -> None:
    kv = manager()
    first = sequence(1, tuple(range(13)))
    compute(kv, first, 12)
    kv.pool.forget(first.block_ids[1])
    assert kv.find_prefix(sequence(2, tuple(range(13)))) == first.block_ids[:1]


@pytest.mark.parametrize("num_pending", [0, 1])
def test_a_block_that_fills_token_by_token_is_named_when_the_next_one_begins(num_pending: int) -> None:
    """Its last token may be on its way when the block is full; it has come by the time the next begins."""
    kv = manager()
    request = sequence(1, tuple(range(6)))
    compute(kv, request, 6)
    request.token_ids.extend(range(6, 9 - num_pending))
    other = sequence(2, tuple(range(20)))
    for num_computed, num_found in ((7, 1), (8, 1), (9, 2)):
        compute(kv, request, 1)
        assert request.num_computed_tokens == num_computed
        assert len(kv.find_prefix(other)) == num_found
        assert kv.num_slots(request) == 4 * len(request.block_ids) == (8 if num_computed < 9 else 12)
        request.token_ids.append(num_computed + 2 - num_pending)


def test_the_tail_of_a_freed_sequence_is_reused_before_its_head() -> None:
    kv = manager(num_blocks=4)
    first = sequence(1, tuple(range(16)))
    compute(kv, first, 16)
    table = list(first.block_ids)
    kv.free(first)
    other = sequence(2, (99,) * 5)
    compute(kv, other, 5)
    assert other.block_ids == [table[3], table[2]]
    assert kv.find_prefix(sequence(3, tuple(range(16)))) == table[:2]


def test_fits_counts_cached_blocks_that_would_be_taken_out_of_the_free_ones() -> None:
    kv = manager(num_blocks=4)
    first = sequence(1, tuple(range(9)))
    compute(kv, first, 9)
    kv.free(first)
    blocker = sequence(2, (50,))
    compute(kv, blocker, 1)
    again = sequence(3, tuple(range(16)))
    prefix = kv.find_prefix(again)
    assert len(prefix) == 2
    assert kv.fits(prefix, 12)
    assert not kv.fits(prefix, 13)
    assert kv.fits([], 12)
    assert not kv.fits([], 13)


def test_what_a_faulted_request_computed_is_never_found_again() -> None:
    kv = manager()
    prompt = tuple(range(12))
    bad = sequence(1, prompt)
    compute(kv, bad, 12)
    kv.free(bad, forget=True)
    assert kv.find_prefix(sequence(2, prompt)) == []
    assert kv.num_free_blocks == 16


def test_a_fault_ends_the_sharing_of_blocks_that_others_still_hold() -> None:
    kv = manager()
    prompt = tuple(range(12))
    bad, other = sequence(1, prompt), sequence(2, prompt)
    compute(kv, bad, 12)
    kv.adopt_prefix(other, kv.find_prefix(other))
    compute(kv, other, 4)
    kv.free(bad, forget=True)
    kv.check_invariants([other])
    assert kv.find_prefix(sequence(3, prompt)) == []


@pytest.mark.parametrize("in_flight", [1, 2])
def test_after_a_fault_an_equal_prompt_is_computed_anew(in_flight: int) -> None:
    """Bug of an ancestor: a recycled block brought the values of the request that had broken."""
    core = scripted_core(
        faults={(12, 0): RowFault.NON_FINITE_LOGITS}, max_in_flight=in_flight, num_blocks=8, block_size=4
    )
    prompt = tuple(range(2, 14))
    core.submit(Submit(1, engine_request(prompt)))
    assert run_to_end(core)[-1].failure is not None
    core.submit(Submit(2, engine_request((*prompt, 77))))
    assert max(output.cached_prompt_tokens for output in run_to_end(core)) == 0
