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

# Cold, made before the measurement of the kernels as they are. What they rest on, in µs: 5 for launch,
# parameters and the first cluster barrier; 4 to 5 more for candidates, their order and the draw; Philox at
# 40 per 256 rows, beside the reading; the mass of 256 rows at 60.
_PREDICTED_US = {
    "greedy": {1: 5.5, 16: 7.5, 64: 13.0, 256: 36.0},
    "sampled": {1: 12.0, 16: 14.0, 64: 23.0, 256: 48.0},
    "untruncated": {1: 10.0, 16: 13.0, 64: 26.0, 256: 75.0},
    "top_p": {1: 19.0, 16: 26.0, 64: 60.0, 256: 170.0},
    "penalties": {1: 14.0, 16: 18.0, 64: 35.0, 256: 90.0},
    "greedy_logprobs": {1: 19.0, 16: 28.0, 64: 65.0, 256: 190.0},
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
