"""The KV blocks as numbers: who holds each, which are free, which still carry a known prefix.

A block is *live* while its reference count is above zero. A free block may still be *cached*: it keeps
its content and its hash until it is handed out again, least recently used first, blocks without a
hash before all others. Runs on the engine thread; knows nothing of requests or tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class BlockPool:
    """`num_blocks` blocks with ids 0 to `num_blocks - 1`."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError("a pool needs at least one block")
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._cached: dict[bytes, int] = {}
        # In the order of reuse: the next block to hand out stands first.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out now, cached ones included."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that some sequence holds."""
        return self.num_blocks - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Hand out `count` blocks, forgetting what they cached. The caller has checked `num_free`."""
        assert count <= len(self._free), "allocate() without a check of num_free"
        blocks = []
        for _ in range(count):
            block_id, _ = self._free.popitem(last=False)
            if self._hashes[block_id] is not None:
                self.forget(block_id)
            self._ref_counts[block_id] = 1
            blocks.append(block_id)
        return blocks

    def share(self, block_ids: Iterable[int]) -> None:
        """Take one more reference to each block, live or free."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                del self._free[block_id]
            self._ref_counts[block_id] += 1

    def release(self, block_ids: Iterable[int]) -> None:
        """Give back one reference to each block, in the order in which they should be reused."""
        for block_id in block_ids:
            count = self._ref_counts[block_id] - 1
            assert count >= 0, f"block {block_id} was released more often than it was taken"
            self._ref_counts[block_id] = count
            if count == 0:
                self._free[block_id] = None
                if self._hashes[block_id] is None:
                    self._free.move_to_end(block_id, last=False)

    def is_free(self, block_id: int) -> bool:
        """True for a block that nobody holds."""
        return self._ref_counts[block_id] == 0

    def register(self, block_id: int, block_hash: bytes) -> None:
        """Make a full block findable. An equal block that is already known stays the known one."""
        if self._hashes[block_id] is None and block_hash not in self._cached:
            self._cached[block_hash] = block_id
            self._hashes[block_id] = block_hash

    def forget(self, block_id: int) -> None:
        """Make a block unfindable: it is being reused, or its content cannot be trusted."""
        block_hash = self._hashes[block_id]
        if block_hash is not None:
            del self._cached[block_hash]
            self._hashes[block_id] = None

    def forget_all(self) -> int:
        """Make every block unfindable; the number of free ones among them. Live blocks stay live."""
        known = list(self._cached.values())
        for block_id in known:
            self.forget(block_id)
        return sum(self._ref_counts[block_id] == 0 for block_id in known)

    def find(self, block_hash: bytes) -> int | None:
        """The block with this content, live or free."""
        return self._cached.get(block_hash)

    def ref_count(self, block_id: int) -> int:
        """How many sequences hold the block."""
        return self._ref_counts[block_id]

    def check_invariants(self) -> None:
        """Raise AssertionError if the books do not balance. For tests and idle checks; O(blocks)."""
        for block_id, count in enumerate(self._ref_counts):
            assert count >= 0
            assert (count == 0) == (block_id in self._free), f"block {block_id} is lost"
        for block_hash, block_id in self._cached.items():
            assert self._hashes[block_id] == block_hash
        assert len(self._cached) == sum(h is not None for h in self._hashes)
