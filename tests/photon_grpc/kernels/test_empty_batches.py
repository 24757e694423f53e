"""A batch of nothing: every kernel takes it, launches nothing, or a CTA without work, and writes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from photon_grpc.kernels import linear_output
from photon_grpc.kernels import sampling as sampling_kernels
from photon_grpc.kernels.apply_updates import apply_updates
from photon_grpc.kernels.best_token import best_token
from photon_grpc.kernels.embedding import embedding
from photon_grpc.kernels.gemv import gemv, normed_gemv
from photon_grpc.kernels.head_gemm import head_gemm
from photon_grpc.kernels.paged_attention_decode import allocate_workspace, paged_attention_decode
from photon_grpc.kernels.paged_attention_prefill import paged_attention_prefill
from photon_grpc.kernels.registry import SPECS
from photon_grpc.kernels.rmsnorm import add_rms_norm, rms_norm
from photon_grpc.kernels.rope_store_kv import qk_norm_rope, rope, rope_store_kv, store_kv
from photon_grpc.kernels.sampling import SamplingState
from photon_grpc.kernels.silu_and_mul import silu_and_mul
from photon_grpc.kernels.skinny_gemm import skinny_gemm
from photon_grpc.kernels.skinny_gemm_tma import skinny_gemm_tma
from photon_grpc.kernels.step_inputs import SequenceState, StepInputs, StepRows, step_inputs
from photon_grpc.kernels.swiglu_gemm import swiglu_gemm
from tests.support.kernels import FakeLauncher

DTYPES = (torch.bfloat16, torch.float16)


class Memory:
    """Tensors on one device; those that hold anything are remembered as they are."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self._device = device
        self.dtype = dtype
        self._kept: list[tuple[Tensor, Tensor]] = []

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        tensor = torch.full(shape, 7, device=self._device).to(dtype or self.dtype)
        self._kept.append((tensor, tensor.clone()))
        return tensor

    def check(self) -> None:
        assert all(torch.equal(tensor, before) for tensor, before in self._kept)


def run_apply_updates(made: Memory) -> None:
    apply_updates(made(16, dtype=torch.int32), 8, 0)


def run_embedding(made: Memory) -> None:
    embedding(made(0, 64, dtype=torch.float32), made(0, dtype=torch.int64), made(10, 64))


def run_gemv(made: Memory) -> None:
    gemv(linear_output.store_rows(made(0, 32)), made(0, 64), made(32, 64))
    residual = made(0, 64, dtype=torch.float32)
    normed_gemv(linear_output.store_rows(made(0, 32)), residual, made(64), 1e-5, made(32, 64))


def run_skinny_gemm(made: Memory) -> None:
    for warpgroup in (False, True):
        output = linear_output.store_rows(made(0, 32))
        skinny_gemm(output, made(0, 64), made(32, 64), warpgroup=warpgroup)


def run_skinny_gemm_tma(made: Memory) -> None:
    skinny_gemm_tma(linear_output.store_rows(made(0, 64)), made(0, 64), made(64, 64))


def run_best_token(made: Memory) -> None:
    ranks = made(0, 5, dtype=torch.int64)
    state = SamplingState.allocate(4, 8, ranks.device)
    best_token(made(0, dtype=torch.int32), ranks, made(0, dtype=torch.int32), state)
    assert not state.num_outputs.any()


def run_head_gemm(made: Memory) -> None:
    head_gemm(linear_output.float_rows(made(0, 64, dtype=torch.float32)), made(0, 64), made(64, 64))
    head_gemm(linear_output.best_rows(made(0, 1, dtype=torch.int64), 64), made(0, 64), made(64, 64))


def run_decode(made: Memory) -> None:
    cache, tables = made(9, 2, 2, 16, 64), made(0, 5, dtype=torch.int32)
    workspace = allocate_workspace(4, 8, 2, 64, cache.device)
    q, lens = made(0, 8, 64), made(0, dtype=torch.int32)
    paged_attention_decode(made(0, 8, 64), workspace, q, cache, tables, lens, 0.125)
    assert not workspace.counters.any()


def run_prefill(made: Memory) -> None:
    cache = made(9, 2, 2, 16, 64)
    for rows in (0, 3):
        tables, lens = made(rows, 5, dtype=torch.int32), made(rows, dtype=torch.int32)
        starts = torch.zeros(rows + 1, dtype=torch.int32, device=cache.device)
        q = made(0, 8, 64)
        paged_attention_prefill(made(0, 8, 64), q, cache, tables, lens, starts, 0.125)


def run_rms_norm(made: Memory) -> None:
    rms_norm(made(0, 64), made(0, 64), made(64), 1e-5)


def run_add_rms_norm(made: Memory) -> None:
    add_rms_norm(made(0, 64), made(0, 64, dtype=torch.float32), made(0, 64), made(64), 1e-5)


def run_rope_store_kv(made: Memory) -> None:
    table, positions = made(9, 64, dtype=torch.float32), made(0, dtype=torch.int64)
    norms = made(64), made(64)
    cache, slots = made(9, 2, 2, 16, 64), made(0, dtype=torch.int64)
    rope_store_kv(made(0, 8, 64), cache, made(0, 12, 64), norms, 1e-5, table, positions, slots)
    rope(made(0, 8, 64), table, positions)
    qk_norm_rope(made(0, 8, 64), norms[0], 1e-5, table, positions)


def run_store_kv(made: Memory) -> None:
    store_kv(made(9, 2, 2, 16, 64), made(0, 2, 2, 64), made(0, dtype=torch.int64))


def run_silu_and_mul(made: Memory) -> None:
    silu_and_mul(made(0, 64), made(0, 128))


def run_swiglu_gemm(made: Memory) -> None:
    swiglu_gemm(made(0, 128), made(0, 64), made(256, 64))


def run_step_inputs(made: Memory) -> None:
    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return made(*shape, dtype=dtype)

    tokens = (empty(torch.int64, 0) for _ in range(3))
    context_lens, tables = empty(torch.int32, 0), empty(torch.int32, 0, 64)
    out = StepInputs(*tokens, context_lens, tables, empty(torch.int64, 0))
    state = SequenceState(empty(torch.int32, 4), empty(torch.int32, 4, 64), empty(torch.int32, 4))
    step_inputs(out, state, StepRows(empty(torch.int32, 0), None, empty(torch.int32, 0)), 0, 16)


def sampled(kernel: Callable[..., None]) -> Callable[[Memory], None]:
    def run(made: Memory) -> None:
        logits = made(0, 64)
        state = SamplingState.allocate(4, 8, logits.device)
        kernel(made(0, dtype=torch.int32), logits, made(0, dtype=torch.int32), state)
        assert not any(bool(getattr(state, name).any()) for name in ("num_outputs", "last_token_ids"))

    return run


def run_logprobs(made: Memory) -> None:
    chosen, values = made(0, dtype=torch.float64), made(0, 5, dtype=torch.float64)
    token_ids = made(0, dtype=torch.int32)
    sampling_kernels.logprobs(chosen, made(0, 5, dtype=torch.int32), values, made(0, 64), token_ids, 5)


EMPTY: dict[str, Callable[[Memory], None]] = {
    "apply_updates": run_apply_updates,
    "best_token": run_best_token,
    "embedding": run_embedding,
    "gemv": run_gemv,
    "head_gemm": run_head_gemm,
    "skinny_gemm": run_skinny_gemm,
    "skinny_gemm_tma": run_skinny_gemm_tma,
    "paged_attention_decode": run_decode,
    "paged_attention_prefill": run_prefill,
    "paged_attention_prefill_wgmma": run_prefill,
    "swiglu_gemm": run_swiglu_gemm,
    "rms_norm": run_rms_norm,
    "add_rms_norm": run_add_rms_norm,
    "rope_store_kv": run_rope_store_kv,
    "store_kv": run_store_kv,
    "silu_and_mul": run_silu_and_mul,
    "step_inputs": run_step_inputs,
    "sample": sampled(sampling_kernels.sample),
    "sample_greedy": sampled(sampling_kernels.sample_greedy),
    "logprobs": run_logprobs,
}
# Launched with a CTA for each row and one, which finds nothing to do.
FIND_NO_WORK = ("step_inputs",)


def test_no_kernel_is_missing() -> None:
    assert EMPTY.keys() == {spec.name for spec in SPECS}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", EMPTY)
def test_nothing_is_written(kernel: str, dtype: torch.dtype) -> None:
    memory = Memory("cuda", dtype)
    EMPTY[kernel](memory)
    torch.cuda.synchronize()
    memory.check()


@pytest.mark.parametrize("kernel", EMPTY)
def test_nothing_is_launched(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeLauncher().install(monkeypatch)
    EMPTY[kernel](Memory("cpu", torch.bfloat16))
    launched = [launch for launch in fake.launches if 0 not in launch.grid]
    assert bool(launched) == (kernel in FIND_NO_WORK)
    assert all(launch.grid == (1, 1, 1) for launch in launched)
