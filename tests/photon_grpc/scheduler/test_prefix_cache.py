"""Block names against hashlib written out by hand, and what they must tell apart."""

from __future__ import annotations

import hashlib
import hmac
import struct
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from photon_grpc.engine.messages import Submit
from photon_grpc.options import KVCacheOptions
from photon_grpc.scheduler.prefix_cache import KEY_BYTES, extend_hashes, scope_root
from tests.support.builders import engine_request, run_to_end, scripted_core

tokens = st.lists(st.integers(0, 2**32 - 1), min_size=0, max_size=40)
KEY = bytes(range(KEY_BYTES))


def reference(tenant: str, salt: str, token_ids: list[int], block_size: int) -> list[bytes]:
    """Each block hashed from the very beginning: the recursion written out."""
    order = "<" if sys.byteorder == "little" else ">"
    names = []
    scope = struct.pack(">I", len(tenant.encode())) + tenant.encode() + salt.encode()
    for end in range(block_size, len(token_ids) + 1, block_size):
        digest = hmac.new(KEY, scope, hashlib.sha256).digest()
        for start in range(0, end, block_size):
            block = token_ids[start : start + block_size]
            digest = hashlib.sha256(digest + struct.pack(f"{order}{block_size}I", *block)).digest()
        names.append(digest)
    return names


@given(tokens, st.integers(1, 5), st.text(max_size=8), st.text(max_size=8))
def test_names_are_a_chain_of_sha256(token_ids: list[int], block_size: int, tenant: str, salt: str) -> None:
    hashes: list[bytes] = []
    for count in range(len(token_ids) // block_size + 1):
        extend_hashes(hashes, scope_root(KEY, tenant, salt), token_ids, block_size, count)
        assert len(hashes) == count
    assert hashes == reference(tenant, salt, token_ids, block_size)


def test_a_block_s_name_depends_on_everything_before_it() -> None:
    def last(token_ids: list[int], tenant: str = "") -> bytes:
        hashes: list[bytes] = []
        extend_hashes(hashes, scope_root(KEY, tenant, ""), token_ids, 2, len(token_ids) // 2)
        return hashes[-1]

    names = [
        last([1, 2, 3, 4]),
        last([9, 2, 3, 4]),
        last([3, 4]),
        last([1, 2, 4, 3]),
        last([1, 2, 3, 4], "x"),
    ]
    assert len(set(names)) == len(names)


scopes = st.tuples(st.text(max_size=4), st.text(max_size=4))


@given(scopes, scopes)
def test_two_scopes_have_two_names(one: tuple[str, str], other: tuple[str, str]) -> None:
    assert (scope_root(KEY, *one) == scope_root(KEY, *other)) == (one == other)


def test_fault_38_no_salt_makes_one_tenant_s_scope_another_s() -> None:
    """Concatenated, each of these would read alike."""
    alike = [("a", "bc"), ("ab", "c"), ("abc", ""), ("", "abc"), ("", "\0\0\0\3abc")]
    assert len({scope_root(KEY, *scope) for scope in alike}) == len(alike)


def test_fault_38_no_name_can_be_computed_without_the_engine_s_key() -> None:
    """Each engine draws its own, so block names of two of them have nothing in common."""
    keys = [scripted_core(num_blocks=4, block_size=16)._cache_key for _ in range(3)]
    assert len(set(keys)) == 3
    assert {len(key) for key in keys} == {KEY_BYTES}
    assert len({scope_root(key, "a", "") for key in keys}) == 3


def cached(first: tuple[str, str], second: tuple[str, str], **fields: object) -> int:
    """Cached prompt tokens of a second, equal request; scopes are (tenant, salt)."""
    core = scripted_core(num_blocks=64, block_size=KVCacheOptions().block_size, max_num_batched_tokens=256)
    prompt = tuple(range(2, 72))
    core.submit(Submit(1, engine_request(prompt, tenant=first[0], cache_salt=first[1])))
    run_to_end(core)
    core.submit(Submit(2, engine_request(prompt, tenant=second[0], cache_salt=second[1], **fields)))
    return max(output.cached_prompt_tokens for output in run_to_end(core))


def test_a_64_token_prefix_hits_with_the_default_block_size() -> None:
    """Bug of an ancestor: 256-token blocks missed every short prefix."""
    core = scripted_core(num_blocks=64, block_size=KVCacheOptions().block_size, max_num_batched_tokens=256)
    shared = tuple(range(2, 66))
    core.submit(Submit(1, engine_request((*shared, 500, 501))))
    run_to_end(core)
    core.submit(Submit(2, engine_request((*shared, 600, 601, 602))))
    assert max(output.cached_prompt_tokens for output in run_to_end(core)) == 64


def test_fault_38_tenants_do_not_share_and_a_salt_only_narrows() -> None:
    assert cached(("", ""), ("", "")) == 64
    assert cached(("a", ""), ("a", "")) == 64
    assert cached(("a", "s"), ("a", "s")) == 64
    assert cached(("a", ""), ("a", "s")) == 0
    assert cached(("a", "s"), ("a", "")) == 0
    # Whatever the salt says, there is no way into another tenant's blocks.
    for salt in ("", "s"):
        assert cached(("a", salt), ("b", salt)) == 0
        assert cached(("", salt), ("b", salt)) == 0
        assert cached(("a", salt), ("", salt)) == 0
    assert cached(("a", "bc"), ("ab", "c")) == 0


def test_a_bypassing_request_neither_finds_nor_leaves_anything() -> None:
    assert cached(("", ""), ("", ""), bypass_prefix_cache=True) == 0
    core = scripted_core(num_blocks=64, block_size=16, max_num_batched_tokens=256)
    prompt = tuple(range(2, 72))
    core.submit(Submit(1, engine_request(prompt, bypass_prefix_cache=True)))
    run_to_end(core)
    core.submit(Submit(2, engine_request(prompt)))
    assert max(output.cached_prompt_tokens for output in run_to_end(core)) == 0


@pytest.mark.parametrize("top", [0, 3])
def test_prompt_logprobs_need_the_whole_prompt_computed(top: int) -> None:
    assert cached(("", ""), ("", ""), prompt_top_logprobs=top) == 0


def test_switched_off_means_off() -> None:
    core = scripted_core(num_blocks=64, block_size=4, prefix_caching=False)
    for key in (1, 2):
        core.submit(Submit(key, engine_request(tuple(range(2, 30)))))
        assert max(output.cached_prompt_tokens for output in run_to_end(core)) == 0
