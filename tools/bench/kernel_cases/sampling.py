"""Timing cases of the sampling kernels: Llama 3's vocabulary, float32 logits.

"cold" rotates over more memory than the L2 holds; "warm" keeps one buffer, as behind an lm_head that has
just written the logits (they fit up to some 64 rows). The floor is one read of the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from photon_grpc.runner.cuda_sampler import CudaSampler
from photon_grpc.scheduler.output import SamplerSpec
from photon_grpc.types import EffectiveSampling

VOCAB = 128256
READ_BYTES_PER_US = 4.54e6
ROTATED_BYTES = 512 << 20

Case = tuple[str, int, float, float | None, Callable[[int], None]]
"""Name, bytes, floor in µs, prediction in µs, and a launch for the i-th of the rotating buffers."""

_PARAMETERS: dict[str, tuple[dict[str, float | int], int | None]] = {
    "greedy": ({"temperature": 0.0}, None),
    "sampled": ({"temperature": 0.8, "top_p": 0.95, "top_k": 50}, None),
    "untruncated": ({"temperature": 0.8}, None),
    "top_p": ({"temperature": 0.8, "top_p": 0.95}, None),
    "penalties": ({"temperature": 0.8, "top_p": 0.95, "top_k": 50, "presence_penalty": 0.5}, None),
    "greedy_logprobs": ({"temperature": 0.0}, 5),
}

# Cold, made before any measurement.
_PREDICTED_US = {
    "greedy": {1: 6.0, 16: 6.5, 64: 13.0, 256: 38.0},
    "sampled": {1: 11.0, 16: 12.0, 64: 26.0, 256: 80.0},
}


def cases(rows: tuple[int, ...] = (1, 16, 64, 256)) -> Iterator[Case]:
    """Every parameter set at every number of rows; each case keeps its buffers alive."""
    for name, (change, top_logprobs) in _PARAMETERS.items():
        for count in rows:
            num_bytes = count * VOCAB * 4
            predicted = _PREDICTED_US.get(name, {}).get(count)
            for state, copies in (("cold", max(2, ROTATED_BYTES // num_bytes)), ("warm", 1)):
                launch = _launch(count, copies, change, top_logprobs)
                floor = num_bytes / READ_BYTES_PER_US
                yield f"{name} B={count} {state}", num_bytes, floor, predicted, launch


def _launch(
    rows: int, copies: int, change: dict[str, float | int], top_logprobs: int | None
) -> Callable[[int], None]:
    device = torch.device("cuda")
    neutral: dict[str, float | int] = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "n": 1,
    }
    sampler = CudaSampler(VOCAB, device, max_num_seqs=rows)
    for seq_id in range(rows):
        sampling = EffectiveSampling(**{**neutral, **change, "seed": seq_id})  # type: ignore[arg-type]
        sampler.add(seq_id, SamplerSpec(sampling, top_logprobs=top_logprobs), (1, 2, 3), 3)
    sampler.set_rows(range(rows))
    greedy, logprobs = sampler.are_greedy(range(rows)), sampler.want_logprobs(range(rows))
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.empty(copies, rows, VOCAB, device=device).normal_(std=3.0, generator=generator)
    return lambda i: sampler.launch(logits[i % copies], greedy=greedy, logprobs=logprobs)
