"""Words to their places: all of them, nothing beside them, whatever their number."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from photon_grpc.kernels.apply_updates import SEGMENT_DTYPE, apply_updates
from tests.support.kernels import FakeLauncher, Fenced


@pytest.mark.gpu
def test_words_arrive_where_they_belong() -> None:
    memory = Fenced()
    counts = [1, 2, 127, 128, 129, 1000, 0, 5]
    targets = [memory.empty(count, dtype=torch.int32) for count in counts]
    words = np.arange(sum(counts), dtype=np.int32)
    first = -(-len(words) // 4) * 4
    starts = np.cumsum([0, *counts[:-1]])
    segments = np.array(
        [(target.data_ptr(), start, len(target)) for target, start in zip(targets, starts, strict=True)],
        dtype=SEGMENT_DTYPE,
    )
    message = np.zeros(first + 4 * len(segments), dtype=np.int32)
    message[: len(words)] = words
    message[first:] = segments.view(np.int32)
    apply_updates(torch.from_numpy(message).cuda(), first, len(segments))

    for target, start in zip(targets, starts, strict=True):
        assert target.tolist() == list(range(start, start + len(target)))
    memory.check()


def test_segments_must_lie_in_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeLauncher().install(monkeypatch)
    message = torch.zeros(16, dtype=torch.int32)
    for first, count in ((2, 1), (16, 1), (8, 3)):
        with pytest.raises(ValueError, match="segments from word"):
            apply_updates(message, first, count)
    with pytest.raises(ValueError, match=r"message must be torch\.int32"):
        apply_updates(message.long(), 0, 1)
    assert fake.launches == []
    apply_updates(message, 8, 2)
    (launch,) = fake.launches
    assert launch.grid == (2, 1, 1)
    assert launch.arguments == (message.data_ptr(), message.data_ptr() + 32)
