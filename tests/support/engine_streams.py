"""What tests of an engine's client do with its streams, wherever the engine runs."""

from __future__ import annotations

from collections import defaultdict

from photon_grpc.engine.client import AsyncEngine, RequestStream, error_of
from tests.support.grpc_harness import until


async def read_all(stream: RequestStream, num_completions: int = 1) -> dict[int, list[int]]:
    """The tokens by completion, read to the last one's end; raises the error of a failure."""
    tokens: dict[int, list[int]] = defaultdict(list)
    ended = 0
    while ended < num_completions:
        for output in await stream.read():
            if output.failure is not None:
                raise error_of(output.failure)
            tokens[output.index].extend(output.token_ids)
            ended += output.is_last
    return dict(tokens)


async def until_idle(engine: AsyncEngine) -> None:
    """Wait until no request lives and no block is held."""

    def is_idle() -> bool:
        stats = engine.stats
        # The client's own count as well: the latest snapshot may be of before the request came.
        return engine._num_live == stats.running == stats.waiting == stats.kv_blocks_used == 0

    await until(is_idle)
