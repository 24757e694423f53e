"""The shapes that steps are padded to: each step gets the smallest that holds it, or none."""

from __future__ import annotations

import pytest

from photon_grpc.runner.buckets import Buckets, StepKind, StepShape


@pytest.mark.parametrize(
    ("rows", "padded"),
    [
        (1, 1),
        (2, 2),
        (3, 4),
        (9, 16),
        (17, 24),
        (33, 48),
        (64, 64),
        (65, 96),
        (97, 128),
        (225, 256),
        (256, 256),
    ],
)
def test_decode_rows(rows: int, padded: int) -> None:
    assert Buckets(256, 8192).fit(rows, 0, 0) == StepShape(padded, 0, 0)


@pytest.mark.parametrize("max_num_seqs", [1, 3, 64, 65, 100, 257])
def test_a_full_batch_has_a_shape_of_its_own(max_num_seqs: int) -> None:
    buckets = Buckets(max_num_seqs, max(512, max_num_seqs))
    assert buckets.fit(max_num_seqs, 0, 0) == StepShape(max_num_seqs, 0, 0)
    assert buckets.fit(max_num_seqs + 1, 0, 0) is None


def test_mixed_steps_and_those_that_are_too_large() -> None:
    buckets = Buckets(256, 8192)
    assert buckets.fit(0, 1, 1) == StepShape(0, 16, 16)
    assert buckets.fit(5, 2, 129) == StepShape(16, 16, 256)
    assert buckets.fit(255, 1, 512) == StepShape(256, 16, 512)
    assert buckets.fit(1, 1, 513) == StepShape(16, 32, 768)
    assert buckets.fit(65, 32, 1537) == StepShape(128, 32, 2048)
    assert buckets.fit(129, 32, 1537) == StepShape(256, 32, 2048)
    assert buckets.fit(1, 17, 100) == StepShape(16, 32, 768)
    assert buckets.fit(1, 1, 2049) is None
    assert buckets.fit(1, 33, 2048) is None
    assert Buckets(256, 512).fit(1, 1, 513) is None
    assert Buckets(256, 1000).fit(1, 2, 800) == StepShape(16, 32, 1000)


@pytest.mark.parametrize(
    ("tokens", "padded"),
    [(256, 256), (257, 384), (385, 512), (513, 640), (641, 768), (1025, 1280), (1281, 1536), (1793, 2048)],
)
def test_prompts_alone_have_finer_shapes(tokens: int, padded: int) -> None:
    shape = Buckets(256, 8192).fit(0, 1, tokens)
    assert shape is not None
    assert (shape.num_decodes, shape.num_prefill_tokens) == (0, padded)
    # Beside decode rows every size is a graph for each number of them.
    beside = Buckets(256, 8192).fit(1, 1, 257)
    assert beside == StepShape(4, 16, 512)


def test_finer_shapes_end_with_the_budget() -> None:
    assert Buckets(256, 1000).fit(0, 1, 897) == StepShape(0, 32, 1000)
    assert Buckets(256, 1000).fit(0, 1, 800) == StepShape(0, 32, 896)
    assert Buckets(256, 300).fit(0, 1, 280) == StepShape(0, 16, 300)


@pytest.mark.parametrize(
    ("max_num_seqs", "budget"), [(1, 1), (1, 64), (4, 64), (64, 512), (64, 700), (256, 8192), (300, 300)]
)
def test_every_small_step_has_a_captured_kind(max_num_seqs: int, budget: int) -> None:
    buckets = Buckets(max_num_seqs, budget)
    kinds = buckets.kinds()
    assert len(set(kinds)) == len(kinds)
    sizes = [kind.shape.num_tokens for kind in kinds]
    assert sizes == sorted(sizes, reverse=True)
    assert all(kind.shape.num_rows <= buckets.largest.num_rows for kind in kinds)
    assert max(sizes) == buckets.largest.num_tokens
    for decodes in range(max_num_seqs + 1):
        for tokens in (*range(min(budget, 520) + 1), *range(520, min(budget, 2048) + 1, 61)):
            prefills = min(1, tokens)
            if not 0 < decodes + prefills <= max_num_seqs or decodes + tokens > budget:
                continue
            shape = buckets.fit(decodes, prefills, tokens)
            assert shape is not None
            assert shape.num_decodes >= decodes
            assert shape.num_prefill_tokens >= tokens
            assert buckets.kind(shape, greedy=True, logprobs=False) in kinds


def test_a_kind_never_leaves_out_what_is_asked_for() -> None:
    buckets = Buckets(8, 64)
    decode, mixed = StepShape(8, 0, 0), StepShape(4, 8, 16)
    assert buckets.kind(decode, greedy=True, logprobs=False) == StepKind(decode, True, False)
    assert buckets.kind(decode, greedy=False, logprobs=False) == StepKind(decode, False, False)
    for greedy in (False, True):
        assert buckets.kind(decode, greedy=greedy, logprobs=True) == StepKind(decode, False, True)
        for logprobs in (False, True):
            assert buckets.kind(mixed, greedy=greedy, logprobs=logprobs) == StepKind(mixed, False, True)
