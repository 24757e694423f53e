"""KV blocks for sequences: find shared prefixes, extend, free.

A full block that is known by its hash is shared, never copied: everything a sequence writes lies
behind its shared prefix, in blocks of its own.
"""

from __future__ import annotations

from photon_grpc.scheduler.block_pool import BlockPool
from photon_grpc.scheduler.prefix_cache import extend_hashes
from photon_grpc.scheduler.request import Request


class KVCacheManager:
    """Owns the block pool and each request's `block_ids`."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool) -> None:
        if block_size < 1:
            raise ValueError("block_size must be at least 1")
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self._prefix_caching = prefix_caching
        # Slots of allocated blocks, counted once per holder, that hold no token yet.
        self._num_empty_slots = 0

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be handed out now."""
        return self.pool.num_free

    @property
    def num_slots_used(self) -> int:
        """Token slots in live blocks that hold a token. Shared blocks are full, so each counts once."""
        return self.pool.num_used * self.block_size - self._num_empty_slots

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens fill or begin."""
        return -(-num_tokens // self.block_size)

    def find_prefix(self, request: Request) -> list[int]:
        """The longest run of known blocks with which `request` begins; nothing is taken yet.

        At least one token is always left to compute, since its logits are what the step is for. A
        request that asks for prompt log-probabilities needs all of them.
        """
        if (
            not self._prefix_caching
            or request.bypass_prefix_cache
            or request.sampler.prompt_top_logprobs is not None
        ):
            return []
        num_blocks = (len(request.token_ids) - 1) // self.block_size
        extend_hashes(
            request.block_hashes, request.cache_root, request.token_ids, self.block_size, num_blocks
        )
        found = []
        for block_hash in request.block_hashes[:num_blocks]:
            block_id = self.pool.find(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def fits(self, prefix: list[int], num_tokens: int) -> bool:
        """True when `num_tokens` tokens that begin with the blocks of `prefix` fit into what is free."""
        revived = sum(self.pool.is_free(block_id) for block_id in prefix)
        return self.blocks_for(num_tokens) - len(prefix) <= self.pool.num_free - revived

    def adopt_prefix(self, request: Request, prefix: list[int]) -> None:
        """Begin `request` with shared blocks; their tokens count as computed."""
        assert not request.block_ids
        assert request.num_computed_tokens == 0
        self.pool.share(prefix)
        request.block_ids = list(prefix)
        request.num_registered_blocks = len(prefix)
        request.num_computed_tokens = len(prefix) * self.block_size

    def extend(self, request: Request, num_tokens: int) -> list[int] | None:
        """Blocks for the next `num_tokens` tokens, appended to the request's; None: the pool is short."""
        # Rounded up: `blocks_for`, written out because this runs whenever a decoding sequence fills a block.
        needed = -(-(request.num_computed_tokens + num_tokens) // self.block_size) - len(request.block_ids)
        if needed <= 0:
            return []
        if needed > self.pool.num_free:
            return None
        new = self.pool.allocate(needed)
        request.block_ids.extend(new)
        self._num_empty_slots += needed * self.block_size
        return new

    def advance(self, request: Request, num_tokens: int) -> None:
        """Count `num_tokens` more tokens of `request` as computed and name the blocks they fill.

        A block may be named as soon as the step that fills it is scheduled: within a step every layer
        writes all keys and values before it reads any, and steps run in order. A block that fills token by
        token is named when the next one begins, so that only every `block_size`-th such call has work.
        """
        before = request.num_computed_tokens
        request.num_computed_tokens = before + num_tokens
        self._num_empty_slots -= num_tokens
        if not self._prefix_caching or request.bypass_prefix_cache:
            return
        if num_tokens == 1 and before % self.block_size:
            return
        # Only tokens that are known can be hashed; those of uncollected steps wait for a later call.
        num_full = min(before + num_tokens, len(request.token_ids)) // self.block_size
        if num_full > request.num_registered_blocks:
            extend_hashes(
                request.block_hashes, request.cache_root, request.token_ids, self.block_size, num_full
            )
            for index in range(request.num_registered_blocks, num_full):
                self.pool.register(request.block_ids[index], request.block_hashes[index])
            request.num_registered_blocks = num_full

    def num_slots(self, request: Request) -> int:
        """Tokens for which `request` has blocks."""
        return len(request.block_ids) * self.block_size

    def count_advanced(self, num_sequences: int) -> None:
        """Count one token more of each of `num_sequences`: the caller advanced them in their last blocks."""
        self._num_empty_slots -= num_sequences

    def free(self, request: Request, *, forget: bool = False) -> None:
        """Give back all blocks, the tail first so that prefixes live longest; idempotent.

        With `forget` nobody will find them again.
        """
        if forget:
            self.forget(request)
        self._num_empty_slots -= len(request.block_ids) * self.block_size - request.num_computed_tokens
        self.pool.release(reversed(request.block_ids))
        request.block_ids = []
        request.num_registered_blocks = 0
        request.num_computed_tokens = 0

    def forget(self, request: Request) -> None:
        """What the request computed cannot be trusted: nobody may find it again.

        By name, not by table: a request that was preempted or has ended with a step under way holds
        nothing any more, and yet its blocks can be found.
        """
        for block_hash in request.block_hashes:
            known = self.pool.find(block_hash)
            if known is not None:
                self.pool.forget(known)

    def forget_from(self, request: Request, position: int) -> None:
        """What was to be computed of `request` from `position` on was not: nobody may find it.

        A block of equal content that another sequence computed stays known.
        """
        for index in range(position // self.block_size, request.num_registered_blocks):
            self.pool.forget(request.block_ids[index])

    def check_invariants(self, requests: list[Request]) -> None:
        """Raise AssertionError unless `requests` hold exactly the live blocks. For tests."""
        self.pool.check_invariants()
        holders = [0] * self.pool.num_blocks
        empty = 0
        for request in requests:
            assert len(set(request.block_ids)) == len(request.block_ids), "a block stands twice in a table"
            assert len(request.block_ids) == self.blocks_for(request.num_computed_tokens)
            empty += len(request.block_ids) * self.block_size - request.num_computed_tokens
            for block_id in request.block_ids:
                holders[block_id] += 1
        assert empty == self._num_empty_slots
        for block_id, count in enumerate(holders):
            assert self.pool.ref_count(block_id) == count
