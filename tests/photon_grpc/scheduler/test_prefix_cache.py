"""Block names against hashlib written out by hand, and what they must tell apart."""

from __future__ import annotations

import hashlib
import struct
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from photon_grpc.engine.messages import Submit
from photon_grpc.options import KVCacheOptions
from photon_grpc.scheduler.prefix_cache import extend_hashes, scope_root
from tests.support.builders import engine_request, run_to_end, scripted_core

tokens = st.lists(st.integers(0, 2**32 - 1), min_size=0, max_size=40)


def reference(scope: bytes, token_ids: list[int], block_size: int) -> list[bytes]:
    """Each block hashed from the very beginning: the recursion written out."""
    order = "<" if sys.byteorder == "little" else ">"
    names = []
    for end in range(block_size, len(token_ids) + 1, block_size):
        digest = hashlib.sha256(b"photon/kv/" + scope).digest()
        for start in range(0, end, block_size):
            block = token_ids[start : start + block_size]
            digest = hashlib.sha256(digest + struct.pack(f"{order}{block_size}I", *block)).digest()
        names.append(digest)
    return names


@given(tokens, st.integers(1, 5), st.binary(max_size=8))
def test_names_are_a_chain_of_sha256(token_ids: list[int], block_size: int, scope: bytes) -> None:
    hashes: list[bytes] = []
    for count in range(len(token_ids) // block_size + 1):
        extend_hashes(hashes, scope_root(scope), token_ids, block_size, count)
        assert len(hashes) == count
    assert hashes == reference(scope, token_ids, block_size)


def test_a_block_s_name_depends_on_everything_before_it() -> None:
    def last(token_ids: list[int], scope: bytes = b"") -> bytes:
        hashes: list[bytes] = []
        extend_hashes(hashes, scope_root(scope), token_ids, 2, len(token_ids) // 2)
        return hashes[-1]

    names = [
        last([1, 2, 3, 4]),
        last([9, 2, 3, 4]),
        last([3, 4]),
        last([1, 2, 4, 3]),
        last([1, 2, 3, 4], b"x"),
    ]
    assert len(set(names)) == len(names)


def test_a_scope_is_not_confused_with_tokens_or_with_another_scope() -> None:
    assert scope_root(b"") != scope_root(b"a") != scope_root(b"b")
    assert scope_root(b"a") == scope_root(b"a")


def cached(scope_a: bytes, scope_b: bytes, **second: object) -> int:
    """Cached prompt tokens of a second, equal request."""
    core = scripted_core(num_blocks=64, block_size=KVCacheOptions().block_size, max_num_batched_tokens=256)
    prompt = tuple(range(2, 72))
    core.submit(Submit(1, engine_request(prompt, cache_scope=scope_a)))
    run_to_end(core)
    core.submit(Submit(2, engine_request(prompt, cache_scope=scope_b, **second)))
    return max(output.cached_prompt_tokens for output in run_to_end(core))


def test_a_64_token_prefix_hits_with_the_default_block_size() -> None:
    """Bug of an ancestor: 256-token blocks missed every short prefix."""
    core = scripted_core(num_blocks=64, block_size=KVCacheOptions().block_size, max_num_batched_tokens=256)
    shared = tuple(range(2, 66))
    core.submit(Submit(1, engine_request((*shared, 500, 501))))
    run_to_end(core)
    core.submit(Submit(2, engine_request((*shared, 600, 601, 602))))
    assert max(output.cached_prompt_tokens for output in run_to_end(core)) == 64


def test_scopes_do_not_share() -> None:
    assert cached(b"", b"") == 64
    assert cached(b"tenant", b"tenant") == 64
    assert cached(b"tenant", b"other") == 0
    assert cached(b"tenant", b"") == 0


def test_a_bypassing_request_neither_finds_nor_leaves_anything() -> None:
    assert cached(b"", b"", bypass_prefix_cache=True) == 0
    core = scripted_core(num_blocks=64, block_size=16, max_num_batched_tokens=256)
    prompt = tuple(range(2, 72))
    core.submit(Submit(1, engine_request(prompt, bypass_prefix_cache=True)))
    run_to_end(core)
    core.submit(Submit(2, engine_request(prompt)))
    assert max(output.cached_prompt_tokens for output in run_to_end(core)) == 0


@pytest.mark.parametrize("top", [0, 3])
def test_prompt_logprobs_need_the_whole_prompt_computed(top: int) -> None:
    assert cached(b"", b"", prompt_top_logprobs=top) == 0


def test_switched_off_means_off() -> None:
    core = scripted_core(num_blocks=64, block_size=4, prefix_caching=False)
    for key in (1, 2):
        core.submit(Submit(key, engine_request(tuple(range(2, 30)))))
        assert max(output.cached_prompt_tokens for output in run_to_end(core)) == 0
