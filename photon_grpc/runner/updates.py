"""What a step changes of the state on the device: gathered on the host, sent in one copy, put in place by
one kernel.

Owns a pinned buffer for each step that may be under way. Knows addresses and words, not what they mean.
Engine thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from photon_grpc.kernels.apply_updates import SEGMENT_DTYPE, SEGMENT_WORDS
from photon_grpc.runner.stream import Stream

Words = npt.NDArray[np.int32]

ApplyUpdates = Callable[[Tensor, int, int], None]
"""`kernels.apply_updates.apply_updates`, or what stands in for it."""

_ALIGNMENT = 4
_FIRST_CAPACITY = 1 << 16


class Updates:
    """Words for device addresses, in the order of steps.

    `begin` a step, `write` what changes, `send`. A place may be written once per step: nothing orders two
    writes of one message.
    """

    def __init__(self, stream: Stream, apply_updates: ApplyUpdates, device: torch.device, depth: int) -> None:
        self._stream = stream
        self._apply = apply_updates
        self._device = device
        self._host = [stream.host_buffer(torch.int32, _FIRST_CAPACITY) for _ in range(depth)]
        self._words: list[Words] = [buffer.numpy() for buffer in self._host]
        self._message = torch.empty(_FIRST_CAPACITY, dtype=torch.int32, device=device)
        self._segments: list[tuple[int, int, int]] = []
        self._turn = 0
        self._end = 0

    def begin(self, turn: int) -> None:
        """The next writes go into buffer `turn`, whose last message has arrived."""
        self._turn = turn
        self._end = 0
        self._segments.clear()

    def write(self, target: Tensor, row: int, values: npt.NDArray[np.generic]) -> None:
        """Let row `row` of `target`, contiguous and on the device, become `values` from its beginning on.

        Values may go on into the rows behind it.
        """
        address = target.data_ptr() + row * target.stride(0) * target.element_size()
        self.write_at(address, np.ascontiguousarray(values).view(np.int32).ravel())

    def write_at(self, address: int, words: Words | Sequence[int]) -> None:
        """Let the memory from `address` on become `words`."""
        start, end = self._end, self._end + len(words)
        self._reserve(end)
        self._words[self._turn][start:end] = words
        self._segments.append((address, start, end - start))
        self._end = end

    def send(self) -> None:
        """Enqueue the copy and the kernel that puts everything in place; nothing where nothing changed."""
        num_segments = len(self._segments)
        if not num_segments:
            return
        first = -(-self._end // _ALIGNMENT) * _ALIGNMENT
        end = first + num_segments * SEGMENT_WORDS
        self._reserve(end)
        segments = np.array(self._segments, dtype=SEGMENT_DTYPE)
        self._words[self._turn][first:end] = segments.view(np.int32)
        if self._message.numel() < end:
            self._message = torch.empty(len(self._words[self._turn]), dtype=torch.int32, device=self._device)
        source, message = self._host[self._turn], self._message

        def arrive() -> None:
            message[:end].copy_(source[:end], non_blocking=True)
            self._apply(message, first, num_segments)

        self._stream.run(arrive)

    def _reserve(self, end: int) -> None:
        words = self._words[self._turn]
        if end <= len(words):
            return
        size = max(2 * len(words), end)
        grown = self._stream.host_buffer(torch.int32, size)
        self._host[self._turn], self._words[self._turn] = grown, grown.numpy()
        self._words[self._turn][: self._end] = words[: self._end]
