"""Changes of device state from one message; see cuda_kernels/apply_updates.cu."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from photon_grpc.kernels import launcher
from photon_grpc.kernels.checks import require
from photon_grpc.kernels.launcher import KernelSpec, Pointer

SEGMENT_DTYPE = np.dtype([("address", np.uint64), ("start", np.int32), ("count", np.int32)])
"""One run of words: where it goes, where in the message it begins, how long it is."""

SEGMENT_WORDS = SEGMENT_DTYPE.itemsize // 4

_THREADS = 128

APPLY_UPDATES = KernelSpec(
    name="apply_updates",
    source="apply_updates",
    parameters=(Pointer, Pointer),
    max_threads=_THREADS,
    overlaps=True,
)
SPECS = (APPLY_UPDATES,)


def apply_updates(message: Tensor, first_segment: int, num_segments: int) -> None:
    """Write the words of `message` [words] int32 to the places that its segments name.

    The segments, of SEGMENT_DTYPE, lie in the message themselves from word `first_segment` on, a multiple
    of 4. Their addresses are the caller's to answer for. Raises ValueError for segments that the message
    does not hold.
    """
    require("message", message, torch.int32, *message.shape)
    if first_segment % 4 or first_segment + num_segments * SEGMENT_WORDS > message.numel():
        raise ValueError(
            f"{num_segments} segments from word {first_segment} on, in a message of {message.numel()}"
        )
    address = message.data_ptr()
    launcher.load(APPLY_UPDATES.variant())(
        (num_segments, 1, 1), _THREADS, address, address + 4 * first_segment
    )
