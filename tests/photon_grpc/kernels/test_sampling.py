"""The sampling kernels as such: memory that they may touch, storage types, shapes, and argument checks.

What they draw is compared with the CPU sampler in `runner/test_cuda_sampler.py`.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from photon_grpc.kernels import launcher
from photon_grpc.kernels import sampling as kernels
from photon_grpc.kernels.launcher import Device, Variant
from photon_grpc.kernels.sampling import SamplingState
from photon_grpc.runner.cuda_sampler import pack_sequence
from photon_grpc.scheduler.output import SamplerSpec
from photon_grpc.types import EffectiveSampling

NEUTRAL = EffectiveSampling(
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    min_p=0.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    repetition_penalty=1.0,
    seed=0,
    n=1,
)
CPU = torch.device("cpu")
GUARD = 1024
POISON = -123456789


# --- what needs no device -----------------------------------------------------------------------


class FakeKernel:
    def __init__(self, calls: list[tuple[object, ...]], variant: Variant, shared_bytes: int) -> None:
        self._calls, self._variant, self._shared_bytes = calls, variant, shared_bytes

    def __call__(self, grid: tuple[int, int, int], num_threads: int, *arguments: object) -> None:
        assert tuple(map(type, arguments)) == self._variant.spec.parameters
        self._calls.append((self._variant, self._shared_bytes, grid, num_threads))


def _device(capability: tuple[int, int] = (9, 0), shared: int = 232448) -> Device:
    return Device(0, "fake", capability, 132, shared)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    made: list[tuple[object, ...]] = []
    monkeypatch.setattr(launcher, "require_cuda", _device)
    monkeypatch.setattr(launcher, "load", lambda variant, shared=0: FakeKernel(made, variant, shared))
    return made


def _arguments(rows: int = 3, vocab: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.zeros(rows, dtype=torch.int32),
        torch.zeros(rows, vocab),
        torch.zeros(rows, dtype=torch.int32),
    )


def test_launch_shapes(calls: list[tuple[object, ...]]) -> None:
    state = SamplingState.allocate(4, 8, CPU)
    kernels.sample(*_arguments(3, 128256), state)
    kernels.sample_greedy(*_arguments(3, 128256), state)
    kernels.sample(*_arguments(200, 128256), state)
    kernels.sample_greedy(*_arguments(200, 64), state)
    kernels.sample(*_arguments(1, 1), state)
    # 32,064 groups of four: two batches of four for each of 8 x 512 threads, eight for 2 x 512.
    assert [(shared, grid, threads) for _, shared, grid, threads in calls] == [
        (2 * 2048, (8, 3, 1), 512),
        (0, (8, 3, 1), 512),
        (8 * 2048, (2, 200, 1), 512),
        (0, (2, 200, 1), 512),
        (2048, (8, 1, 1), 512),
    ]
    assert all(variant.spec in kernels.SPECS for variant, *_ in calls)  # type: ignore[attr-defined]


def test_figures_have_room_for_every_thread_and_batch() -> None:
    assert [kernels.cluster_size(_device((8, 0), 166912), rows) for rows in (1, 256)] == [1, 1]
    for cluster in (1, 2, 8):
        for vocab in (1, 3, 4, 5, 31, 33, 65536, 65537, 128256, (1 << 18) - 1):
            groups = math.ceil(vocab / 4)
            floats = kernels.figures_bytes(vocab, cluster) // 4
            assert floats % 512 == 0
            assert floats - 512 < math.ceil(math.ceil(groups / cluster) / 4) <= floats
    # Beside the static part, on the smallest of the devices that we promise.
    assert kernels.figures_bytes((1 << 18) - 1, 1) < 100 << 10


@pytest.mark.parametrize("vocab", [0, 1 << 18])
def test_vocabularies_out_of_range_are_refused(calls: list[tuple[object, ...]], vocab: int) -> None:
    state = SamplingState.allocate(4, 8, CPU)
    for run in (kernels.sample, kernels.sample_greedy):
        with pytest.raises(ValueError, match="vocabular"):
            run(*_arguments(1, vocab), state)
    assert not calls


def test_every_launchable_variant_is_checked_without_a_gpu(calls: list[tuple[object, ...]]) -> None:
    state = SamplingState.allocate(4, 8, CPU)
    for rows, dtype in itertools.product((3, 33), (torch.float32, torch.bfloat16, torch.float16)):
        token_ids, logits, slots = _arguments(rows)
        logits = logits.to(dtype)
        kernels.sample(token_ids, logits, slots, state)
        kernels.sample_greedy(token_ids, logits, slots, state)
        top_ids, values = torch.zeros(rows, 5, dtype=torch.int32), torch.zeros(rows, 5, dtype=torch.float64)
        kernels.logprobs(values[:, 0].contiguous(), top_ids, values, logits, token_ids, 5)
    for variant, *_ in calls:
        assert variant.macros in variant.spec.checked  # type: ignore[attr-defined]


def test_wrong_arguments_are_refused(calls: list[tuple[object, ...]]) -> None:
    state = SamplingState.allocate(4, 8, CPU)
    token_ids, logits, slots = _arguments()
    wrong = [
        (token_ids.long(), logits, slots, state, "token_ids"),
        (token_ids[:2], logits, slots, state, "token_ids"),
        (token_ids, logits.double(), slots, state, "float64"),
        (token_ids, logits.T, slots, state, "logits"),
        (token_ids, logits, slots.long(), state, "row_slots"),
        (token_ids, logits, slots, replace(state, params=state.params[:3]), "params"),
        (token_ids, logits, slots, replace(state, num_outputs=state.num_outputs.long()), "num_outputs"),
    ]
    for first, second, third, fourth, match in wrong:
        with pytest.raises(ValueError, match=match):
            kernels.sample(first, second, third, fourth)
        with pytest.raises(ValueError, match=match):
            kernels.sample_greedy(first, second, third, fourth)
    with pytest.raises(ValueError, match="do not fit"):
        kernels.logprobs(
            torch.zeros(3, dtype=torch.float64),
            torch.zeros(3, 2, dtype=torch.int32),
            torch.zeros(3, 2, dtype=torch.float64),
            logits,
            token_ids,
            3,
        )
    assert not calls


# --- on a device --------------------------------------------------------------------------------


def _guarded(rows: int, dtype: torch.dtype, width: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """A buffer of POISON and the part in its middle that a kernel gets."""
    whole = torch.full((2 * GUARD + rows * width,), POISON, dtype=dtype, device="cuda")
    part = whole[GUARD : GUARD + rows * width]
    return whole, part.view(rows, width) if width > 1 else part


def _untouched(whole: torch.Tensor) -> bool:
    return bool((whole[:GUARD] == POISON).all()) and bool((whole[-GUARD:] == POISON).all())


def _state(specs: list[EffectiveSampling], vocab: int, top_logprobs: int | None = None) -> SamplingState:
    state = SamplingState.allocate(len(specs), 4, torch.device("cuda"))
    for slot, sampling in enumerate(specs):
        packed = pack_sequence(SamplerSpec(sampling, top_logprobs=top_logprobs), (1,), 1, vocab)
        state.params[slot] = torch.from_numpy(packed.record.view("u1")).cuda()
    return state


MIX = [
    replace(NEUTRAL, temperature=0.0),
    NEUTRAL,
    replace(NEUTRAL, top_k=50, top_p=0.95, temperature=0.8),
    replace(NEUTRAL, top_p=0.9),
    replace(NEUTRAL, top_k=5000, temperature=2.0),
    replace(NEUTRAL, min_p=0.1),
]


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [1, 2, 3, 5, 31, 4096, 4097, 32000, 128256, 151936, 151937])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nothing_is_written_but_the_outputs(vocab: int, dtype: torch.dtype) -> None:
    rows = len(MIX) + 1
    state = _state([replace(one, seed=i) for i, one in enumerate(MIX)], vocab)
    # Rows apart and off 16 bytes; NaN behind each row's end.
    stride = vocab + 3
    memory = torch.full((1 + rows * stride,), float("nan"), dtype=dtype, device="cuda")
    logits = memory[1:].view(rows, stride)[:, :vocab]
    generator = torch.Generator("cuda").manual_seed(vocab)
    logits.copy_(torch.randn(rows, vocab, generator=generator, device="cuda") * 3)
    before = memory.clone()
    slots = torch.tensor([*range(len(MIX)), -1], dtype=torch.int32, device="cuda")
    for run in (kernels.sample, kernels.sample_greedy):
        whole, token_ids = _guarded(rows, torch.int32)
        whole_last, state_last = _guarded(len(MIX), torch.int32)
        whole_count, state_count = _guarded(len(MIX), torch.int32)
        state_count.fill_(1)
        guarded = replace(state, last_token_ids=state_last, num_outputs=state_count)
        run(token_ids, logits, slots, guarded)
        first = token_ids.tolist()
        assert first[-1] == -1
        assert all(0 <= token_id < vocab for token_id in first[:-1])
        assert state_last.tolist() == first[:-1]
        assert state_count.tolist() == [2] * len(MIX)
        assert all(map(_untouched, (whole, whole_last, whole_count)))
        state_count.fill_(1)
        run(token_ids, logits, slots, guarded)
        assert token_ids.tolist() == first
    assert torch.equal(memory.view(torch.uint8), before.view(torch.uint8))
    # The CPU's argmax is the first of several; the device's may be any.
    assert token_ids[:-1].tolist() == logits[:-1].float().cpu().argmax(dim=-1).tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [1, 3, 33, 32000, 128256, 151937])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("top", [0, 1, 20])
def test_logprobs_are_those_of_float64(vocab: int, dtype: torch.dtype, top: int) -> None:
    rows, width = 5, min(top, vocab)
    generator = torch.Generator("cuda").manual_seed(vocab)
    logits = (torch.randn(rows, vocab, generator=generator, device="cuda") * 4).to(dtype)
    logits[1] = 0.25
    wanted = torch.randint(0, vocab, (rows,), generator=generator, device="cuda", dtype=torch.int32)
    wanted[4] = -1
    whole_chosen, chosen = _guarded(rows, torch.float64)
    whole_ids, top_ids = _guarded(rows, torch.int32, 24)
    whole_values, top_values = _guarded(rows, torch.float64, 24)
    results = []
    for _ in range(2):
        kernels.logprobs(chosen, top_ids, top_values, logits, wanted, top)
        results.append((chosen.clone(), top_ids.clone(), top_values.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(map(_untouched, (whole_chosen, whole_ids, whole_values)))
    expected = torch.log_softmax(logits[:4].double(), dim=-1)
    picked = expected.gather(-1, wanted[:4, None].long())[:, 0]
    assert (chosen[:4] - picked).abs().max() < 1e-11
    # A stable sort ranks equals by id.
    order = logits[:4].float().sort(dim=-1, descending=True, stable=True).indices[:, :width]
    assert torch.equal(top_ids[:4, :width].long(), order)
    if width:
        assert (top_values[:4, :width] - expected.gather(-1, order)).abs().max() < 1e-11
    assert chosen[4] == POISON
    assert bool((top_ids[4] == POISON).all())
    assert bool((top_ids[:, width:] == POISON).all())
    assert bool((top_values[:, width:] == POISON).all())


@pytest.mark.gpu
def test_logprobs_of_a_row_without_meaning_are_nan() -> None:
    logits = torch.zeros(4, 100, device="cuda")
    logits[0, 7] = float("nan")
    logits[1, 99] = float("inf")
    logits[2] = -float("inf")
    wanted = torch.zeros(4, dtype=torch.int32, device="cuda")
    chosen = torch.zeros(4, dtype=torch.float64, device="cuda")
    top_ids = torch.full((4, 2), -5, dtype=torch.int32, device="cuda")
    top_values = torch.zeros(4, 2, dtype=torch.float64, device="cuda")
    kernels.logprobs(chosen, top_ids, top_values, logits, wanted, 2)
    assert chosen.isnan().tolist() == [True, True, True, False]
    assert top_values.isnan().all(dim=-1).tolist() == [True, True, True, False]
    assert top_ids.tolist() == [[0, 1]] * 4


@pytest.mark.gpu
def test_only_rows_that_asked_are_scored() -> None:
    state = SamplingState.allocate(3, 4, torch.device("cuda"))
    for slot, top in enumerate((None, 0, 2)):
        packed = pack_sequence(SamplerSpec(NEUTRAL, top_logprobs=top), (1,), 1, 50)
        state.params[slot] = torch.from_numpy(packed.record.view("u1")).cuda()
    logits = torch.randn(4, 50, device="cuda")
    row_slots = torch.tensor([2, 0, 1, -1], dtype=torch.int32, device="cuda")
    token_ids = torch.tensor([3, 3, 3, -1], dtype=torch.int32, device="cuda")
    chosen = torch.full((4,), float(POISON), dtype=torch.float64, device="cuda")
    top_ids = torch.full((4, 3), POISON, dtype=torch.int32, device="cuda")
    top_values = torch.full((4, 3), float(POISON), dtype=torch.float64, device="cuda")
    kernels.logprobs(chosen, top_ids, top_values, logits, token_ids, (row_slots, state))
    assert (chosen == POISON).tolist() == [False, True, False, True]
    assert (top_ids != POISON).sum(dim=-1).tolist() == [2, 0, 0, 0]
