"""What must hold after any fault: nothing is held or runs on, everyone was told once, figures are true."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from photon_grpc.engine.core import EngineCore
from photon_grpc.engine.messages import SequenceOutput

if TYPE_CHECKING:
    # GPU tests run where what it imports is not installed.
    from photon_grpc.engine.client import AsyncEngine

# Threads that outlive a service by design: the loop's default pool, and grpc's one poller of the process.
_SHARED_THREADS = ("asyncio_", "_poll_wrapper")
_PATIENCE_S = 30.0


def assert_core_clean(core: EngineCore) -> None:
    """No live sequence, no step under way, no block held, every reference count zero, books balanced."""
    scheduler = core.scheduler
    scheduler.check_invariants()
    stats = scheduler.stats()
    pool = scheduler.kv.pool
    assert not core.has_work
    assert core.num_tokens_under_way == 0
    assert (stats.running, stats.waiting, stats.waiting_tokens) == (0, 0, 0)
    assert (stats.kv_blocks_used, stats.kv_slots_used) == (0, 0)
    assert pool.num_free == pool.num_blocks
    assert not any(pool.ref_count(block_id) for block_id in range(pool.num_blocks))
    assert not scheduler._ended_in_flight, "results are awaited that never come"


def assert_told_once(core: EngineCore, outputs: Iterable[SequenceOutput], expected: Iterable[int]) -> None:
    """Each request of `expected` (n = 1) ended once, with nothing behind its end, and every token is counted.

    `outputs` is all that ever came out of `core`.
    """
    ended: Counter[int] = Counter()
    num_tokens = 0
    for output in outputs:
        assert not ended[output.key], f"request {output.key}: something came after its end"
        assert (output.finish is not None) + (output.failure is not None) == output.is_last
        ended[output.key] += output.is_last
        num_tokens += len(output.token_ids)
    assert +ended == Counter(expected)
    assert core.scheduler.stats().generation_tokens == num_tokens


async def engine_clean(engine: AsyncEngine) -> None:
    """Wait until a living engine holds nothing and knows of no request."""

    def is_clean() -> bool:
        stats = engine.stats
        return (
            engine.num_live_requests == engine._num_live == 0
            and stats.running == stats.waiting == stats.waiting_tokens == 0
            and stats.kv_blocks_used == stats.kv_slots_used == 0
        )

    async with asyncio.timeout(_PATIENCE_S):
        while not is_clean():  # noqa: ASYNC110  # what is watched are figures of the engine, not an event
            await asyncio.sleep(0.005)


@asynccontextmanager
async def nothing_left_running() -> AsyncIterator[None]:
    """Around a whole service: no task and no thread that it started is there once it has ended."""
    tasks, threads = asyncio.all_tasks(), set(threading.enumerate())
    yield

    def left() -> list[object]:
        strangers = [t for t in threading.enumerate() if t not in threads]
        return [
            *(asyncio.all_tasks() - tasks),
            *(thread for thread in strangers if not any(name in thread.name for name in _SHARED_THREADS)),
        ]

    give_up_at = time.monotonic() + _PATIENCE_S
    while strangers := left():
        assert time.monotonic() < give_up_at, f"still there: {strangers}"
        await asyncio.sleep(0.005)
