"""What the kernels' timing runs: one module per operation, each with `cases()`.

A case is a tuple as `Case` has it, the last fields as needed. Its launch gets the number of the launch, so
that it can take another buffer each time: no two launches of one measurement should meet in the L2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

READ_BYTES_PER_US = 4.54e6
"""Measured read stream of one H200."""
ROTATED_BYTES = 256 << 20
MAX_COPIES = 256


class Case(NamedTuple):
    """One kernel at one size."""

    name: str
    num_bytes: int
    """Algorithmic: each input read once, each output written once."""
    floor_us: float
    predicted_us: float | None
    """Written down before the first measurement, and not edited afterwards."""
    launch: Callable[[int], None]
    eager: Callable[[int], None] | None = None
    """The same in plain torch, for comparison."""
    min_speedup: float = 0.0
    """Over `eager` in eager mode, which this project promises."""


def copies_for(num_bytes: int) -> int:
    """Sets of buffers to rotate over."""
    return max(2, min(MAX_COPIES, -(-ROTATED_BYTES // num_bytes)))


def predicted_us(num_bytes: int) -> float:
    """Of a simple kernel in a chain of overlapping ones: 1.8 us a stage, and 90 % of the read stream."""
    return 1.8 + num_bytes / (0.9 * READ_BYTES_PER_US)
