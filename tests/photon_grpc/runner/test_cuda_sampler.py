"""The GPU sampler against the CPU sampler, which defines it: the same tokens from the same bits."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from photon_grpc.kernels import sampling as kernels
from photon_grpc.kernels import sampling_state as layout
from photon_grpc.runner.cuda_sampler import CudaSampler, pack_sequence
from photon_grpc.runner.philox import NOISE_RANGE
from photon_grpc.runner.sampler import NO_TOKEN, SampledRows, Sampler
from photon_grpc.scheduler.output import RowFault, SamplerSpec
from photon_grpc.types import EffectiveSampling, TokenLogprobs

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
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
GREEDY = replace(NEUTRAL, temperature=0.0)


def _logits(rows: int, vocab: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


# --- packing ------------------------------------------------------------------------------------


def test_packing_of_plain_parameters() -> None:
    sampling = replace(NEUTRAL, temperature=0.7, top_k=40, top_p=0.9, seed=0x1234_5678_9ABC_DEF0)
    packed = pack_sequence(SamplerSpec(sampling, index=3), (1, 2, 3), 2, 100)
    record = packed.record[0]
    assert (record["flags"], record["marks"], packed.marks, packed.num_outputs) == (0, 0, None, 1)
    assert (record["temperature"], record["top_k"], record["top_p"]) == (np.float32(0.7), 40, 0.9)
    assert (record["seed_low"], record["seed_high"], record["index"]) == (0x9ABC_DEF0, 0x1234_5678, 3)
    assert record["top_logprobs"] == -1
    assert record["floor_key"] == layout.floor_key(-NOISE_RANGE)


def test_packing_holds_parameters_within_their_meaning() -> None:
    tiny = pack_sequence(SamplerSpec(replace(NEUTRAL, temperature=1e-30, top_k=100)), (), 0, 100).record[0]
    assert (tiny["temperature"], tiny["top_k"]) == (np.float32(1e-6), 0)
    assert not tiny["flags"] & layout.FLAG_GREEDY
    assert pack_sequence(SamplerSpec(GREEDY), (), 0, 100).record[0]["flags"] == layout.FLAG_GREEDY
    strict = pack_sequence(SamplerSpec(replace(NEUTRAL, min_p=1.0)), (), 0, 100).record[0]
    assert strict["floor_key"] == 0


def test_packing_of_everything_that_differs_by_entry() -> None:
    sampling = replace(
        NEUTRAL,
        repetition_penalty=1.5,
        frequency_penalty=0.5,
        logit_bias=((9, 1.0), (4, -2.0)),
        allowed_token_ids=(4, 5, 6),
    )
    spec = SamplerSpec(sampling, min_tokens=3, banned_token_ids=(5, 1000), top_logprobs=4)
    packed = pack_sequence(spec, (7, 4, 5, 5), 2, 100)
    record = packed.record[0]
    assert record["flags"] == (
        layout.FLAG_REPETITION | layout.FLAG_COUNTED | layout.FLAG_ALLOWED_ONLY | layout.FLAG_BAN
    )
    assert (record["num_biases"], record["min_tokens"], record["top_logprobs"]) == (2, 3, 4)
    assert packed.bias.token_ids.tolist() == [4, 9]
    assert packed.marks is not None
    allowed, seen, biased = layout.MARK_ALLOWED, layout.MARK_SEEN, layout.MARK_BIASED
    assert dict(zip(*(part.tolist() for part in packed.marks), strict=True)) == {
        4: allowed | seen | biased,
        5: allowed | seen | layout.MARK_BANNED | 2,
        6: allowed,
        7: seen,
        9: biased,
    }


@pytest.mark.parametrize(
    ("change", "needs"),
    [
        ({}, False),
        ({"top_k": 3, "top_p": 0.5, "min_p": 0.1, "temperature": 0.0}, False),
        ({"repetition_penalty": 1.1}, True),
        ({"presence_penalty": 0.1}, True),
        ({"frequency_penalty": -0.1}, True),
        ({"logit_bias": ((1, 1.0),)}, True),
        ({"allowed_token_ids": (1,)}, True),
    ],
    ids=str,
)
def test_memory_per_entry_only_for_those_that_need_it(change: dict[str, Any], needs: bool) -> None:
    packed = pack_sequence(SamplerSpec(replace(NEUTRAL, **change)), (1, 2), 1, 50)
    assert (packed.marks is not None) is needs


def test_a_ban_that_would_leave_nothing_is_not_packed() -> None:
    sampling = replace(NEUTRAL, allowed_token_ids=(3, 4))
    spec = SamplerSpec(sampling, min_tokens=5, banned_token_ids=(3, 4))
    assert not pack_sequence(spec, (), 0, 50).record[0]["flags"] & layout.FLAG_BAN


# --- on a device, next to the CPU ---------------------------------------------------------------


class Pair:
    """Both samplers with the same sequences; every sample is compared."""

    def __init__(self, vocab: int, slots: int) -> None:
        self.vocab = vocab
        self.cpu = Sampler(vocab, CPU)
        self.cuda = CudaSampler(vocab, CUDA, max_num_seqs=slots)

    def add(
        self, seq_id: int, spec: SamplerSpec, prompt: Sequence[int] = (), outputs: Sequence[int] = ()
    ) -> None:
        for sampler in (self.cpu, self.cuda):
            sampler.add(seq_id, spec, (*prompt, *outputs), len(prompt))

    def remove(self, seq_id: int) -> None:
        for sampler in (self.cpu, self.cuda):
            sampler.remove(seq_id)

    def sample(self, seq_ids: Sequence[int], logits: torch.Tensor) -> SampledRows:
        """`logits` on the CPU, in any storage type; it is what the GPU gets."""
        expected = self.cpu.sample(seq_ids, logits.float())
        on_device = logits.to(CUDA)
        before = on_device.clone()
        result = self.cuda.sample(seq_ids, on_device)
        assert result.token_ids == expected.token_ids
        assert result.faults == expected.faults
        _assert_close(result.logprobs, expected.logprobs)
        bits = torch.int32 if logits.dtype is torch.float32 else torch.int16
        assert torch.equal(on_device.view(bits), before.view(bits))
        return result


def _assert_close(result: dict[int, TokenLogprobs], expected: dict[int, TokenLogprobs]) -> None:
    assert result.keys() == expected.keys()
    for seq_id, entry in expected.items():
        assert result[seq_id].logprob == pytest.approx(entry.logprob, abs=1e-11)
        assert [token for token, _ in result[seq_id].top] == [token for token, _ in entry.top]
        values = [value for _, value in result[seq_id].top]
        assert values == pytest.approx([value for _, value in entry.top], abs=1e-11)


def _random_spec(chance: random.Random, vocab: int) -> SamplerSpec:
    def ids(count: int) -> tuple[int, ...]:
        return tuple(chance.sample(range(vocab), min(count, vocab)))

    sampling = replace(
        NEUTRAL,
        temperature=chance.choice([0.0, 1e-4, 0.3, 0.8, 1.0, 2.0]),
        top_p=chance.choice([1.0, 1.0, 0.999, 0.95, 0.5, 0.05]),
        top_k=chance.choice([0, 0, 1, 3, 50, 1500, max(vocab // 2, 1), max(vocab - 1, 1), vocab]),
        min_p=chance.choice([0.0, 0.0, 0.02, 0.3, 1.0]),
        presence_penalty=chance.choice([0.0, 0.0, 1.5, -2.0]),
        frequency_penalty=chance.choice([0.0, 0.0, 0.7, -0.4]),
        repetition_penalty=chance.choice([1.0, 1.0, 1.3, 0.6]),
        seed=chance.getrandbits(64),
        logit_bias=tuple(
            (token, chance.choice([-100.0, -1.0, 2.5, 100.0])) for token in ids(chance.choice([0, 0, 3, 300]))
        ),
        allowed_token_ids=chance.choice([(), (), ids(6), ids(1024)]),
    )
    return SamplerSpec(
        sampling,
        index=chance.randrange(8),
        min_tokens=chance.randrange(6),
        banned_token_ids=chance.choice([(), ids(4)]),
        top_logprobs=chance.choice([None, None, 0, 3, 20]),
    )


def _some_tokens(chance: random.Random, vocab: int, most: int) -> tuple[int, ...]:
    return tuple(chance.randrange(vocab) for _ in range(chance.randrange(most)))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("vocab", "rows"),
    [
        (1, 3),
        (2, 5),
        (24, 64),
        (61, 33),
        (4096, 31),
        (4099, 16),
        (32000, 17),
        (50257, 8),
        (128256, 7),
        (151936, 9),
        (151937, 3),
    ],
)
@pytest.mark.parametrize("spread", [3.0, 0.02, 12.0])
def test_random_mixes_over_steps_and_reused_slots(vocab: int, rows: int, spread: float) -> None:
    chance = random.Random(vocab * 1000 + rows)
    pair = Pair(vocab, rows)
    live: list[int] = []
    entered = 0
    for step in range(6):
        for seq_id in [one for one in live if chance.random() < 0.3]:
            live.remove(seq_id)
            pair.remove(seq_id)
        while len(live) < rows:
            pair.add(
                entered,
                _random_spec(chance, vocab),
                _some_tokens(chance, vocab, 40),
                _some_tokens(chance, vocab, 8),
            )
            live.append(entered)
            entered += 1
        chosen = chance.sample(live, chance.randrange(1, rows + 1))
        logits = _logits(len(chosen), vocab, seed=step, spread=spread)
        if step % 2:
            logits = (logits * 2).round() / 2
        result = pair.sample(chosen, logits)
        for seq_id, token_id in zip(chosen, result.token_ids, strict=True):
            if token_id != NO_TOKEN:
                assert int(pair.cuda.state.last_token_ids[pair.cuda.slot(seq_id)]) == token_id


_EACH: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.05},
    {"temperature": 1e-30},
    {"temperature": 2.0},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 1024},
    {"top_k": 1025},
    {"top_k": 20000},
    {"top_p": 1e-300},
    {"top_p": 0.01},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 0.3, "min_p": 0.02},
    {"top_p": 1 - 2**-53},
    {"top_k": 50, "top_p": 0.95, "temperature": 0.8},
    {"top_k": 9000, "top_p": 0.9, "temperature": 2.0},
    {"min_p": 1e-9},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"presence_penalty": 2.0},
    {"frequency_penalty": -2.0},
    {"repetition_penalty": 2.0},
    {"repetition_penalty": 1e-6},
    {"seed": 2**64 - 1},
    {"logit_bias": ((0, 100.0), (31999, -100.0), (5, 3.5))},
    {"allowed_token_ids": (31999,)},
    {"allowed_token_ids": (0, 3, 31998), "top_k": 50, "top_p": 0.9},
]


@pytest.mark.gpu
@pytest.mark.parametrize("change", _EACH, ids=str)
@pytest.mark.parametrize("shape", ["normal", "narrow", "ties", "flat", "holes", "far", "level"])
def test_each_parameter(change: dict[str, Any], shape: str) -> None:
    vocab, rows = 32000, 6
    logits = _logits(rows, vocab, seed=5)
    if shape == "narrow":
        logits *= 5
    elif shape == "ties":
        logits = logits.round()
    elif shape == "flat":
        logits.fill_(-1.25)
    elif shape == "holes":
        logits[torch.rand(rows, vocab, generator=torch.Generator().manual_seed(3)) < 0.7] = -math.inf
        logits[:, -2:] = 0.0
        logits[:, 0] = -0.0
    elif shape == "far":
        # Bounds of the draw are coarse where logits are large, and many round to the same.
        logits += 3e4
    elif shape == "level":
        # Thousands in the bin where a count or a mass is reached, no two alike.
        logits *= 1e-3
    pair = Pair(vocab, rows)
    for row in range(rows):
        sampling = replace(NEUTRAL, seed=row)
        pair.add(row, SamplerSpec(replace(sampling, **change)), (1, 2, 3), (9, 9, 31999))
    pair.sample(range(rows), logits)
    pair.sample(range(rows), logits.flip(0))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 16, 32, 33, 64, 65, 256])
def test_batches_of_a_large_vocabulary(rows: int, dtype: torch.dtype) -> None:
    """Greedy alone and mixed with other parameters, on either side of every launch shape."""
    vocab = 128256
    logits = _logits(rows, vocab, seed=rows).to(dtype)
    for mixed in (False, True):
        pair = Pair(vocab, rows)
        for row in range(rows):
            sampling = replace(NEUTRAL, seed=row, temperature=0.8)
            usual = replace(sampling, top_p=0.95, top_k=50)
            kind = [usual, GREEDY, sampling, replace(sampling, top_p=0.95)][row % 4]
            pair.add(row, SamplerSpec(kind if mixed else GREEDY))
        pair.sample(range(rows), logits)


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [GREEDY, NEUTRAL, replace(NEUTRAL, top_p=0.5, repetition_penalty=1.5)])
def test_faults_are_of_their_row_alone(sampling: EffectiveSampling) -> None:
    vocab = 4099
    logits = _logits(8, vocab)
    logits[1, 4098] = math.nan
    logits[2, 0] = -math.nan
    logits[3, 2000] = math.inf
    logits[4] = -math.inf
    logits[5] = -math.inf
    logits[5, 77] = math.nan
    logits[6] = -math.inf
    logits[6, 4097] = -5.0
    pair = Pair(vocab, 8)
    for row in range(8):
        pair.add(row, SamplerSpec(replace(sampling, seed=row), top_logprobs=2), (1,), (2, 3))
    result = pair.sample(range(8), logits)
    assert result.faults == dict.fromkeys((1, 2, 3, 4, 5), RowFault.NON_FINITE_LOGITS)
    assert result.token_ids[6] == 4097
    # None of the faulted ones has advanced.
    pair.sample(range(8), _logits(8, vocab, seed=1))


@pytest.mark.gpu
def test_nothing_allowed_above_minus_infinity_is_a_fault() -> None:
    logits = torch.full((1, 40), -math.inf)
    logits[0, 3] = 1.0
    pair = Pair(40, 1)
    pair.add(0, SamplerSpec(replace(NEUTRAL, allowed_token_ids=(1, 2))))
    assert pair.sample([0], logits).faults == {0: RowFault.NON_FINITE_LOGITS}


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e4, 1e38])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"temperature": 1e-4},
        {"temperature": 2.0},
        {"top_k": 3, "top_p": 0.9},
        {"min_p": 0.5},
        {"repetition_penalty": 1e-6},
        {"repetition_penalty": 2.0},
        {"frequency_penalty": 1.1, "presence_penalty": 0.3},
    ],
    ids=str,
)
def test_extreme_logits(scale: float, change: dict[str, Any]) -> None:
    """Subnormal ones as well: the kernels are compiled to flush those, and must not."""
    logits = torch.tensor([[1, -1, 0.0, 1, -1, 1.4, -0.0, 0.3]]) * scale
    for seed in range(20):
        pair = Pair(8, 1)
        sampling = replace(replace(NEUTRAL, seed=seed), **change)
        pair.add(0, SamplerSpec(sampling, top_logprobs=8), (0, 1), (3, 3, 6))
        pair.sample([0], logits)


@pytest.mark.gpu
def test_rows_do_not_depend_on_their_batch() -> None:
    chance = random.Random(4)
    vocab, rows = 50257, 12
    specs = [_random_spec(chance, vocab) for _ in range(rows)]
    logits = _logits(rows, vocab, seed=8).cuda()

    def sample(chosen: Sequence[int]) -> SampledRows:
        sampler = CudaSampler(vocab, CUDA, max_num_seqs=rows)
        for row in chosen:
            sampler.add(row, specs[row], (1, 2), 2)
        return sampler.sample(chosen, logits[list(chosen)])

    together, again = sample(range(rows)), sample(range(rows))
    assert together == again
    backwards = sample(range(rows - 1, -1, -1))
    assert backwards.token_ids == together.token_ids[::-1]
    assert backwards.logprobs == together.logprobs
    for row in range(rows):
        alone = sample([row])
        assert alone.token_ids == together.token_ids[row : row + 1]
        assert alone.logprobs.get(row) == together.logprobs.get(row)


@pytest.mark.gpu
@pytest.mark.parametrize("cluster", [1, 2, 8])
def test_every_sharing_of_a_row_draws_the_same(monkeypatch: pytest.MonkeyPatch, cluster: int) -> None:
    """One CTA a row is what devices without clusters have; the others go by the number of rows."""
    monkeypatch.setattr(kernels, "cluster_size", lambda device, rows: cluster)
    chance = random.Random(9)
    for vocab in (4097, 30000, 128256):
        pair = Pair(vocab, 9)
        for row in range(9):
            pair.add(row, _random_spec(chance, vocab), _some_tokens(chance, vocab, 9), (1, 2))
        for step in range(2):
            pair.sample(range(9), _logits(9, vocab, seed=step))


@pytest.mark.gpu
@pytest.mark.parametrize("greedy", [False, True])
def test_a_captured_graph_serves_other_rows_and_parameters(greedy: bool) -> None:
    vocab, rows = 32000, 8
    chance = random.Random(1)
    specs = [_random_spec(chance, vocab) for _ in range(20)]
    if greedy:
        specs = [replace(spec, sampling=replace(spec.sampling, temperature=0.0)) for spec in specs]
    pair = Pair(vocab, rows)
    buffer = torch.zeros(rows, vocab, device=CUDA)
    # The first launch compiles and loads.
    pair.cuda.set_rows([], rows)
    pair.cuda.launch(buffer, greedy=greedy, logprobs=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pair.cuda.launch(buffer, greedy=greedy, logprobs=True)
    live: list[int] = []
    for step in range(12):
        if len(live) > 3:
            pair.remove(live.pop(0))
        while len(live) < 5 and step + len(live) < len(specs):
            seq_id = step * 100 + len(live)
            pair.add(seq_id, specs[step + len(live)], (1, 2, 3), (4,))
            live.append(seq_id)
        logits = _logits(len(live), vocab, seed=step)
        expected = pair.cpu.sample(live, logits)
        buffer.fill_(math.nan)
        buffer[: len(live)] = logits.cuda()
        pair.cuda.set_rows(live, rows)
        graph.replay()
        result = pair.cuda.collect(live)
        assert (result.token_ids, result.faults) == (expected.token_ids, expected.faults)
        _assert_close(result.logprobs, expected.logprobs)
        assert pair.cuda.token_ids[len(live) :].tolist() == [NO_TOKEN] * (rows - len(live))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"temperature": 1.7},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"top_k": 20, "top_p": 0.9, "min_p": 0.02, "temperature": 1.3},
        {"allowed_token_ids": (3, 5, 8, 30), "logit_bias": ((3, 3.0), (5, -2.0))},
    ],
    ids=str,
)
def test_draws_have_the_right_frequencies(change: dict[str, Any]) -> None:
    vocab, sequences, steps = 40, 5000, 20
    sampling = replace(NEUTRAL, **change)
    logits = _logits(1, vocab, seed=1, spread=1.5)[0]
    values = logits.double()
    for token, bias in sampling.logit_bias:
        values[token] += bias
    if sampling.allowed_token_ids:
        mask = torch.ones(vocab, dtype=torch.bool)
        mask[list(sampling.allowed_token_ids)] = False
        values[mask] = -math.inf
    weights = torch.exp((values - values.max()) / sampling.temperature)
    order = weights.argsort(descending=True)[: sampling.top_k or vocab]
    mass = weights[order].cumsum(0)
    order = order[(mass - weights[order] < sampling.top_p * mass[-1]) & (weights[order] >= sampling.min_p)]
    expected = torch.zeros(vocab, dtype=torch.float64)
    expected[order] = weights[order] / weights[order].sum() * sequences * steps

    sampler = CudaSampler(vocab, CUDA, max_num_seqs=sequences)
    for seq_id in range(sequences):
        sampler.add(seq_id, SamplerSpec(replace(sampling, seed=seq_id * 0x1_0000_0001)), (), 0)
    sampler.set_rows(range(sequences))
    batch = logits.cuda().expand(sequences, -1).contiguous()
    counts = torch.zeros(vocab, dtype=torch.float64, device=CUDA)
    for _ in range(steps):
        sampler.launch(batch)
        counts += torch.bincount(sampler.token_ids, minlength=vocab)
    seen = counts.cpu()
    assert seen[expected == 0].sum() == 0
    large = expected >= 5
    cells = torch.cat([seen[large], seen[~large].sum()[None]])
    wanted = torch.cat([expected[large], expected[~large].sum()[None]])
    filled = wanted > 0
    statistic = float(((cells - wanted) ** 2)[filled].div(wanted[filled]).sum())
    freedom = int(filled.sum()) - 1
    # The 99.9 % point by Wilson and Hilferty (1931).
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_tokens_go_to_pinned_memory_as_they_go_to_the_device(temperature: float) -> None:
    """Launch after launch, with one row idle and one that has no token."""
    rows, vocab = 9, 32000
    logits = _logits(rows, vocab).cuda()
    logits[3, 5] = math.nan
    told = torch.full((2, rows + 3), -7, dtype=torch.int32, pin_memory=True)
    samplers = [CudaSampler(vocab, CUDA, max_num_seqs=rows) for _ in range(2)]
    for sampler in samplers:
        for seq_id in range(rows - 1):
            sampler.add(seq_id, SamplerSpec(replace(NEUTRAL, temperature=temperature, seed=seq_id)), (), 0)
        sampler.set_rows(range(rows - 1), rows)
    for launch in range(4):
        samplers[0].launch(logits, greedy=not temperature)
        samplers[1].launch(logits, greedy=not temperature, told=told[launch % 2])
        torch.cuda.synchronize()
        assert told[launch % 2, :rows].tolist() == samplers[0].token_ids.tolist()
        assert told[launch % 2, rows:].tolist() == [-7] * 3
        assert torch.equal(samplers[0].state.last_token_ids, samplers[1].state.last_token_ids)


@pytest.mark.gpu
@pytest.mark.parametrize("top", [0, 5, 20])
@pytest.mark.parametrize("vocab", [7, 33, 32000])
def test_prompt_logprobs(vocab: int, top: int) -> None:
    logits = _logits(64, vocab)
    targets = torch.randint(0, vocab, (64,), generator=torch.Generator().manual_seed(1))
    expected = Sampler(vocab, CPU).prompt_logprobs(logits, targets, top)
    result = CudaSampler(vocab, CUDA, max_num_seqs=1).prompt_logprobs(logits.cuda(), targets, top)
    _assert_close(dict(enumerate(result)), dict(enumerate(expected)))


@pytest.mark.gpu
def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    sampler = CudaSampler(100, CUDA, max_num_seqs=1, max_logit_bias=2, max_top_logprobs=3)
    with pytest.raises(ValueError, match="logit_bias"):
        sampler.add(0, SamplerSpec(replace(NEUTRAL, logit_bias=((1, 1.0), (2, 1.0), (3, 1.0)))), (), 0)
    with pytest.raises(ValueError, match="top_logprobs"):
        sampler.add(0, SamplerSpec(NEUTRAL, top_logprobs=4), (), 0)
    sampler.add(0, SamplerSpec(NEUTRAL, top_logprobs=3), (), 0)
    with pytest.raises(RuntimeError, match="slots"):
        sampler.add(1, SamplerSpec(NEUTRAL), (), 0)
    sampler.remove(0)
    sampler.add(1, SamplerSpec(NEUTRAL), (), 0)
    assert 0 <= sampler.sample([1], _logits(1, 100).cuda()).token_ids[0] < 100


@pytest.mark.gpu
def test_marks_are_shared_out_from_a_pool() -> None:
    """Many sequences one after the other take no more device memory than those at one time."""
    sampler = CudaSampler(32000, CUDA, max_num_seqs=4)
    spec = SamplerSpec(replace(NEUTRAL, presence_penalty=1.0))
    addresses = set()
    for seq_id in range(50):
        sampler.add(seq_id, spec, (1, 2), 1)
        record = sampler.state.params[sampler.slot(seq_id)].cpu().numpy().view(layout.SLOT_DTYPE)
        addresses.add(int(record["marks"][0]))
        sampler.remove(seq_id)
    assert len(addresses) <= 8
