"""A small closed-loop load against a running server: so many calls under way, until so many are done.

For a first impression of a deployment from where its clients are. Latencies are the client's, so they
hold the network, and the client is one Python process: at thousands of tokens per second it is part
of what is measured. `tools/bench` measures from several processes and at a given rate.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from photon_grpc.client import CallError, Measurement, Request, Tls, measure, open_channel

__all__ = ["LoadReport", "percentile", "run_load"]


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What came of a load. `elapsed_s` runs from the first call to the last answer."""

    measurements: tuple[Measurement, ...]
    errors: tuple[CallError, ...]
    elapsed_s: float

    @property
    def output_tokens(self) -> int:
        """Output tokens of all calls that ended well."""
        return sum(m.output_tokens for m in self.measurements)

    @property
    def tokens_per_second(self) -> float:
        """Output tokens of all calls over the wall-clock time of the load."""
        return self.output_tokens / self.elapsed_s if self.elapsed_s else 0.0

    def first_token_s(self) -> list[float]:
        """Time to first token of each call that brought one."""
        return [m.first_token_s for m in self.measurements if m.output_tokens]

    def gaps_s(self) -> list[float]:
        """Every gap between two tokens, of all calls."""
        return [gap for m in self.measurements for gap in m.gaps_s]

    def total_s(self) -> list[float]:
        """Start to last token of each call."""
        return [m.total_s for m in self.measurements]


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile; NaN of nothing. `share` in (0, 1]."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)), 1) - 1]


def run_load(
    address: str,
    request: Request,
    *,
    concurrency: int,
    num_requests: int,
    timeout_s: float,
    tls: Tls | None = None,
    token: str = "",
    progress: Callable[[], None] = lambda: None,
) -> LoadReport:
    """Keep `concurrency` calls under way until `num_requests` have ended; failures are collected.

    Each prompt starts with its number, so that the prefix cache does not make the calls one. Calls
    `progress` after each. Runs its own event loop.
    """
    return asyncio.run(_load(address, request, concurrency, num_requests, timeout_s, tls, token, progress))


async def _load(
    address: str,
    request: Request,
    concurrency: int,
    num_requests: int,
    timeout_s: float,
    tls: Tls | None,
    token: str,
    progress: Callable[[], None],
) -> LoadReport:
    measurements: list[Measurement] = []
    errors: list[CallError] = []
    numbers = iter(range(num_requests))

    async with open_channel(address, tls=tls) as channel:

        async def work() -> None:
            for number in numbers:
                own = replace(request, text=f"{number} {request.text}")
                try:
                    measurements.append(await measure(channel, own, timeout_s=timeout_s, token=token))
                except CallError as error:
                    errors.append(error)
                progress()

        start = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, num_requests)):
                group.create_task(work())
        elapsed = time.perf_counter() - start
    return LoadReport(tuple(measurements), tuple(errors), elapsed)
