"""The block books against plain Python: who holds what, what is reused when, what can be found."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from photon_grpc.scheduler.block_pool import BlockPool


def test_a_pool_needs_a_block() -> None:
    with pytest.raises(ValueError, match="at least one"):
        BlockPool(0)


def test_blocks_are_handed_out_once_each() -> None:
    pool = BlockPool(5)
    first, second = pool.allocate(2), pool.allocate(3)
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert (pool.num_free, pool.num_used) == (0, 5)


def test_allocating_more_than_is_free_is_the_caller_s_bug() -> None:
    pool = BlockPool(2)
    pool.allocate(1)
    with pytest.raises(AssertionError):
        pool.allocate(2)


def test_a_block_is_free_when_its_last_holder_lets_go() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.share([block])
    assert pool.ref_count(block) == 2
    pool.release([block])
    assert not pool.is_free(block)
    pool.release([block])
    assert pool.is_free(block)
    with pytest.raises(AssertionError, match="released more often"):
        pool.release([block])


def test_least_recently_released_is_reused_first_and_nameless_blocks_before_all() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(4)
    for block in blocks[:3]:
        pool.register(block, b"%d" % block)
    pool.release([blocks[1]])
    pool.release([blocks[2]])
    pool.release([blocks[0]])
    pool.release([blocks[3]])
    assert pool.allocate(4) == [blocks[3], blocks[1], blocks[2], blocks[0]]


def test_sharing_a_free_block_saves_it_and_makes_it_recently_used() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    for block in blocks:
        pool.register(block, b"%d" % block)
    pool.release(blocks)
    pool.share([blocks[0]])
    assert pool.num_free == 2
    pool.release([blocks[0]])
    assert pool.allocate(3) == [blocks[1], blocks[2], blocks[0]]


def test_a_reused_block_is_forgotten() -> None:
    pool = BlockPool(1)
    (block,) = pool.allocate(1)
    pool.register(block, b"old")
    pool.release([block])
    assert pool.find(b"old") == block
    pool.allocate(1)
    assert pool.find(b"old") is None
    pool.register(block, b"new")
    assert pool.find(b"new") == block


def test_the_first_of_two_equal_blocks_stays_the_known_one() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.register(first, b"same")
    pool.register(second, b"same")
    assert pool.find(b"same") == first
    pool.forget(second)
    assert pool.find(b"same") == first
    pool.forget(first)
    assert pool.find(b"same") is None


@given(st.lists(st.tuples(st.sampled_from("assrrnf"), st.integers(0, 7), st.integers(0, 5)), max_size=60))
def test_books_equal_a_plain_reference(operations: list[tuple[str, int, int]]) -> None:
    """References kept as a multiset and reuse order as a list, operation for operation."""
    pool = BlockPool(6)
    held: Counter[int] = Counter()
    order = list(range(6))
    names: dict[int, bytes] = {}
    for operation, number, name in operations:
        block = number % 6
        if operation == "a" and number <= len(order):
            taken, order = order[:number], order[number:]
            for taken_block in taken:
                names.pop(taken_block, None)
            assert pool.allocate(number) == taken
            held.update(taken)
        elif operation == "s":
            pool.share([block])
            held[block] += 1
            if block in order:
                order.remove(block)
        elif operation == "r" and held[block]:
            pool.release([block])
            held[block] -= 1
            if not held[block]:
                order.insert(len(order) if block in names else 0, block)
        elif operation == "n" and held[block]:
            pool.register(block, b"%d" % name)
            if block not in names and b"%d" % name not in names.values():
                names[block] = b"%d" % name
        elif operation == "f" and held[block]:
            pool.forget(block)
            names.pop(block, None)
        pool.check_invariants()
        assert pool.num_free == len(order)
        assert [pool.ref_count(b) for b in range(6)] == [held[b] for b in range(6)]
        for known in range(6):
            owner = next((b for b, n in names.items() if n == b"%d" % known), None)
            assert pool.find(b"%d" % known) == owner


def test_forget_all_counts_the_free_ones_and_takes_nothing_from_who_holds_a_block() -> None:
    pool = BlockPool(8)
    held, freed = pool.allocate(2), pool.allocate(3)
    for block_id in (*held, *freed):
        pool.register(block_id, bytes([block_id]))
    pool.release(freed)
    assert pool.forget_all() == 3
    assert all(pool.find(bytes([block_id])) is None for block_id in (*held, *freed))
    assert (pool.num_used, pool.num_free) == (2, 6)
    assert [pool.ref_count(block_id) for block_id in held] == [1, 1]
    pool.check_invariants()
    assert pool.forget_all() == 0
    pool.release(held)
    assert sorted(pool.allocate(8)) == list(range(8))
    pool.check_invariants()
