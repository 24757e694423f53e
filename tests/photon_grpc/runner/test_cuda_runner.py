"""The GPU's runner without a GPU: the same tokens as the synchronous runner, whatever is under way.

A lazy stream stands for the device (`tests/support/step_device.py`): nothing has happened before the host
waits for it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from photon_grpc.engine.core import EngineCore
from photon_grpc.engine.messages import Abort, AbortReason, EngineRequest, SequenceOutput, Submit
from photon_grpc.models.llama import DecoderModel
from photon_grpc.models.loader import load_weights
from photon_grpc.models.registry import build_model, load_config
from photon_grpc.ops.base import Ops
from photon_grpc.ops.torch_ops import TorchOps
from photon_grpc.runner.base import Runner
from photon_grpc.runner.cuda_runner import CudaRunner
from photon_grpc.runner.cuda_sampler import HostRows
from photon_grpc.runner.kv_cache import KVCache
from photon_grpc.runner.model_runner import ModelRunner
from photon_grpc.runner.sampler import Sampler
from photon_grpc.runner.stream import Work
from photon_grpc.runner.warmup import warm_up
from photon_grpc.scheduler.output import NewSequence, SamplerSpec, ScheduledSequence, SchedulerOutput
from tests.support.aftermath import assert_core_clean
from tests.support.builders import engine_core, engine_request, model_info, run_to_end, sampling
from tests.support.step_device import CPU, TORCH_STEP_KERNELS, LazyStream, PaddedTorchOps, lane_sampler
from tests.support.tiny_model import tiny_model_folder

BLOCK_SIZE = 4
VOCAB = 512
MAX_MODEL_LEN = 160


class Models:
    """One checkpoint, twice: for the runner under test and for the one that it is held to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = load_config(folder)
        self.plain = self._load(TorchOps())
        self.padded = self._load(PaddedTorchOps())

    def synchronous(self, num_blocks: int, max_num_seqs: int) -> ModelRunner:
        cache = self._cache(TorchOps(), num_blocks)
        return ModelRunner(
            self.plain, self._info(num_blocks), cache, Sampler(VOCAB, CPU), max_num_seqs=max_num_seqs
        )

    def ahead(
        self, num_blocks: int, max_num_seqs: int, budget: int = 64, *, capture: bool = True
    ) -> CudaRunner:
        return CudaRunner(
            self.padded,
            self._info(num_blocks),
            self._cache(PaddedTorchOps(), num_blocks),
            lane_sampler(VOCAB, max_num_seqs),
            kernels=TORCH_STEP_KERNELS,
            stream=LazyStream(),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            capture=capture,
        )

    def cores(self, num_blocks: int = 64, **scheduler: Any) -> tuple[EngineCore, EngineCore]:
        max_num_seqs = scheduler.setdefault("max_num_seqs", 6)
        budget = scheduler.setdefault("max_num_batched_tokens", 40)
        capture = scheduler.pop("capture", True)
        return (
            engine_core(self.synchronous(num_blocks, max_num_seqs), **scheduler),
            engine_core(self.ahead(num_blocks, max_num_seqs, budget, capture=capture), **scheduler),
        )

    def _load(self, ops: Ops) -> DecoderModel:
        decoder = build_model(self.config, ops, dtype=torch.float32, device=CPU)
        load_weights(decoder, self.folder)
        return decoder

    def _cache(self, ops: Ops, num_blocks: int) -> KVCache:
        cache = KVCache(self.config, ops, num_blocks, BLOCK_SIZE, dtype=torch.float32, device=CPU)
        for layer in cache.layers:
            layer.fill_(float("nan"))
        return cache

    def _info(self, num_blocks: int) -> Any:
        return model_info(vocab_size=VOCAB, max_model_len=min(MAX_MODEL_LEN, num_blocks * BLOCK_SIZE))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tiny_model_folder(
        tmp_path_factory.mktemp("model"), hidden_size=48, head_dim=8, intermediate_size=32
    )
    yield Models(folder)
    torch.set_num_threads(threads)


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    choose = random.Random(f"{length}/{seed}")
    return tuple(choose.randrange(4, VOCAB) for _ in range(length))


def request(tokens: tuple[int, ...], max_tokens: int = 20, **overrides: Any) -> EngineRequest:
    return engine_request(tokens, max_tokens, **{"eos_token_ids": (), **overrides})


def results(core: EngineCore, requests: list[EngineRequest], gap: int = 0) -> list[SequenceOutput]:
    """Submit, `gap` steps between one and the next, and run to the end."""
    outputs: list[SequenceOutput] = []
    for key, one in enumerate(requests):
        core.submit(Submit(key, one))
        for _ in range(gap):
            outputs.extend(core.step().outputs)
    return outputs + run_to_end(core)


def tokens_of(outputs: list[SequenceOutput]) -> dict[tuple[int, int], list[int]]:
    tokens: dict[tuple[int, int], list[int]] = {}
    for output in outputs:
        tokens.setdefault((output.key, output.index), []).extend(output.token_ids)
    return tokens


def assert_same(models: Models, requests: list[EngineRequest], gap: int = 0, **core: Any) -> EngineCore:
    """Both runners give the same tokens; the core of the one under test."""
    expected, actual = models.cores(**core)
    assert tokens_of(results(actual, requests, gap)) == tokens_of(results(expected, requests, gap))
    assert actual.scheduler.stats().kv_blocks_used == 0
    return actual


@pytest.mark.parametrize("length", [1, 2, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 39, 40, 41, 100])
def test_one_request(models: Models, length: int) -> None:
    assert_same(models, [request(prompt(length))])


@pytest.mark.parametrize("gap", [0, 1, 3])
@pytest.mark.parametrize("capture", [True, False])
def test_fault_16_company_captured_or_not(models: Models, gap: int, capture: bool) -> None:
    requests = [request(prompt(length, i), 5 + 4 * i) for i, length in enumerate((1, 30, 4, 17, 90, 5, 8, 9))]
    assert_same(models, requests, gap, capture=capture)


def test_preemption_with_steps_under_way(models: Models) -> None:
    core = assert_same(models, [request(prompt(20, i), 30) for i in range(5)], num_blocks=30)
    assert core.scheduler.stats().preemptions > 0


def test_prefixes_are_shared(models: Models) -> None:
    head = prompt(24)
    core = assert_same(models, [request(head + prompt(i, i), 12) for i in (1, 5, 9)], gap=2)
    assert core.scheduler.stats().prefix_hits > 0


def test_the_token_after_an_end_is_dropped(models: Models) -> None:
    (tokens,) = tokens_of(results(models.cores()[0], [request(prompt(9), 12)])).values()
    ends = [request(prompt(9), 12, stop_token_ids=(tokens[5],)), request(prompt(10), 12)]
    assert_same(models, ends)


def test_sampled_rows_beside_greedy_ones(models: Models) -> None:
    noisy = [sampling(temperature=0.9, top_p=0.9, seed=seed, n=2) for seed in (3, 4)]
    penalised = sampling(repetition_penalty=1.5, logit_bias=((7, 3.0),))
    requests = [request(prompt(5 + i, i), 15, sampling=one) for i, one in enumerate([*noisy, penalised])]
    assert_same(models, [*requests, request(prompt(33))], gap=1)


CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.7, "seed": 5},
    {"repetition_penalty": 1.3},
    {"logit_bias": ((7, 3.0),)},
    {"allowed_token_ids": (3, 5, 8)},
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: "-".join(change) or "none")
def test_logits_are_skipped_where_every_row_takes_the_largest(models: Models, change: dict[str, Any]) -> None:
    requests = [request(prompt(9), 12), request(prompt(10), 12, sampling=sampling(**change))]
    core = models.cores()[1]
    runner = core.runner
    assert isinstance(runner, CudaRunner)
    outputs = tokens_of(results(core, requests))
    assert outputs == tokens_of(results(models.cores()[0], requests))
    skipped = runner._sampler.num_best_launches  # type: ignore[attr-defined]  # the fake's
    assert bool(skipped) == (not change)


def test_logprobs_of_outputs_and_prompts(models: Models) -> None:
    requests = [
        request(prompt(45), 6, top_logprobs=3, prompt_top_logprobs=2),
        request(prompt(7), 9),
        request(prompt(8), 9, top_logprobs=0),
    ]
    told = []
    for core in models.cores():
        outputs = results(core, requests, gap=1)
        told.append(
            [
                [entry for output in outputs if output.key == key for entry in getattr(output, name)]
                for key in range(len(requests))
                for name in ("prompt_logprobs", "logprobs")
            ]
        )
    expected, actual = told
    assert [len(entries) for entries in actual] == [44, 6, 0, 0, 0, 9]
    for one, other in zip(expected, actual, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
            assert [token_id for token_id, _ in a.top] == [token_id for token_id, _ in b.top]


def test_fault_06_a_row_of_nan_ends_its_request_alone(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = models.cores()[1]
    runner = core.runner
    assert isinstance(runner, CudaRunner)
    # What both ways of a decode step ask for their logits.
    ops = runner._decoder._ops
    compute = ops.logits
    calls = 0

    def poisoned(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        logits = compute(hidden, weight)
        if bool(runner._sampler.row_slots[0] >= 0):
            calls += 1
            if calls == 5:
                logits[0, 3] = float("nan")
        return logits

    monkeypatch.setattr(ops, "logits", poisoned)
    outputs = results(core, [request(prompt(20)), request(prompt(25))])
    assert [o.failure is not None for o in outputs if o.key == 0 and o.is_last] == [True]
    (expected,) = tokens_of(results(models.cores()[0], [request(prompt(25))])).values()
    assert tokens_of(outputs)[1, 0] == expected
    assert core.scheduler.stats().faults == 1


def test_a_steady_batch_sends_only_its_new_blocks(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    core = models.cores()[1]
    runner = core.runner
    assert isinstance(runner, CudaRunner)
    for key in range(3):
        core.submit(Submit(key, request(prompt(BLOCK_SIZE + key), 40)))
    for _ in range(4):
        core.step()
    sent: list[int] = []
    send = runner._updates.send

    def noted() -> None:
        sent.append(sum(count for _, _, count in runner._updates._segments))
        send()

    monkeypatch.setattr(runner._updates, "send", noted)
    for _ in range(2 * BLOCK_SIZE):
        core.step()
    assert sum(sent) == 3 * 2
    assert sent.count(0) == 2


def test_slots_that_change_hands_in_a_step_with_the_same_rows(models: Models) -> None:
    """Both sequences leave and come back in one step, all but one token in the cache, the other first."""
    told = []
    for runner in (models.synchronous(8, 2), models.ahead(8, 2)):
        tokens: list[dict[int, int]] = []

        def step(
            new: Sequence[NewSequence] = (),
            removed: tuple[int, ...] = (),
            runner: Runner = runner,
            tokens: list[dict[int, int]] = tokens,
        ) -> None:
            rows = tuple(ScheduledSequence(seq_id, 1, True) for seq_id in (1, 2))
            runner.launch(SchedulerOutput(len(tokens) + 1, removed, tuple(new), rows, 2))
            output = runner.collect()
            tokens.append({s: t for s, (t,) in zip(output.seq_ids, output.token_ids, strict=True)})

        def entering(num_tokens: int, tokens: list[dict[int, int]] = tokens) -> list[NewSequence]:
            known = {seq_id: (7 * seq_id, *(one[seq_id] for one in tokens)) for seq_id in (1, 2)}
            return [
                NewSequence(seq_id, known[seq_id], 1, num_tokens - 1, (seq_id,), SamplerSpec(sampling()))
                for seq_id in (2, 1)
            ]

        step(entering(1))
        step()
        step(entering(3), (1, 2))
        step(entering(4), (2, 1))
        told.append(tokens)
    assert told[0] == told[1]


def test_every_small_step_is_a_replay(models: Models) -> None:
    _, core = models.cores(max_num_batched_tokens=64)
    runner = core.runner
    assert isinstance(runner, CudaRunner)
    stream = runner._stream
    assert isinstance(stream, LazyStream)
    runner.prepare()
    captured = stream.num_captures
    results(core, [request(prompt(3 + 9 * i, i), 6 + i) for i in range(8)], gap=2)
    assert stream.num_captures == captured
    assert stream.num_replays == captured + core.scheduler.stats().steps


def test_every_graph_is_captured_whole_behind_a_run_of_the_layers_that_differ(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = models.ahead(64, 4)
    forward = runner._decoder.forward
    seen: list[tuple[int, int | None]] = []

    def noted(
        token_ids: torch.Tensor, *rest: Any, num_layers: int | None = None, **more: Any
    ) -> torch.Tensor:
        seen.append((len(token_ids), num_layers))
        return forward(token_ids, *rest, num_layers=num_layers, **more)

    monkeypatch.setattr(runner._decoder, "forward", noted)
    runner.prepare()
    runner._steps[0].arrived.set()
    runner._steps[0].arrived.wait()
    # Those whose tokens the sampling kernel writes to the host, for each step that may be under way.
    runs = [
        (kind.shape.num_tokens, 1 if kind.logprobs else runner.max_in_flight)
        for kind in runner._buckets.kinds()
    ]
    assert {captures for _, captures in runs} == {1, 2}
    assert seen == [run for size, captures in runs for run in ((size, 2), *[(size, None)] * captures)]


def test_scored_prompts_of_any_length_bring_no_new_shapes(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each, cuBLAS and the tables of kernels keep something for as long as the process lives."""
    expected, core = models.cores(max_num_batched_tokens=64)
    runner = core.runner
    assert isinstance(runner, CudaRunner)
    captured = {kind.shape.num_tokens for kind in runner._buckets.kinds()}
    forward, seen = runner._decoder.forward, set()

    def noted(token_ids: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        seen.add(len(token_ids))
        return forward(token_ids, *rest, **more)

    monkeypatch.setattr(runner._decoder, "forward", noted)
    requests = [request(prompt(9), 40)]
    requests += [request(prompt(length), 3, prompt_top_logprobs=1) for length in range(3, 50, 5)]
    outputs, others = (results(one, requests, gap=3) for one in (core, expected))
    assert len(seen) > 1
    assert seen <= captured
    assert tokens_of(outputs) == tokens_of(others)
    told, due = (
        {(o.key, i): entry.logprob for o in of for i, entry in enumerate(o.prompt_logprobs)}
        for of in (outputs, others)
    )
    assert len(told) == sum(range(2, 49, 5))
    assert told == pytest.approx(due, abs=1e-4)


def test_warm_up_leaves_no_trace(models: Models) -> None:
    runner = models.ahead(64, 1)
    runner.prepare()
    warm_up(runner)
    expected = tokens_of(results(models.cores()[0], [request(prompt(20))]))
    assert tokens_of(results(engine_core(runner, max_num_seqs=1), [request(prompt(20))])) == expected


def test_fault_16_idle_rows_write_no_kv(models: Models) -> None:
    runner = models.ahead(64, 6)
    runner.prepare()
    runner._steps[0].arrived.set()
    runner._steps[0].arrived.wait()
    assert all(bool(layer.isnan().all()) for layer in runner._kv_cache.layers)


class LackingStream(LazyStream):
    """Finds no memory when piece of work number `at` is enqueued, once it is or instead of that."""

    def __init__(self, at: int, *, enqueues: bool) -> None:
        super().__init__()
        self._at = at
        self._enqueues = enqueues
        self.num_lacks = 0

    def run(self, work: Work) -> None:
        self._at -= 1
        if self._at or self._enqueues:
            super().run(work)
        if not self._at:
            self.num_lacks += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("at", [1, 2, 3, 8, 9, 10, 11, 20, 21, 22, 40])
@pytest.mark.parametrize("enqueues", [False, True])
@pytest.mark.parametrize("capture", [False, True])
def test_fault_03_out_of_memory_in_any_piece_of_a_step(
    models: Models, at: int, enqueues: bool, capture: bool
) -> None:
    """The step before is under way, and the device may have done any part of the lost one."""
    requests = [
        request(prompt(length, i), 6 + 2 * i, sampling=sampling(temperature=0.7 * (i % 2), seed=i))
        for i, length in enumerate((1, 30, 4, 17, 60, 5))
    ]
    runner = models.ahead(64, 6, 40, capture=capture)
    runner.prepare()
    stream = LackingStream(at, enqueues=enqueues)
    hand_over(runner, stream)
    core = engine_core(runner, max_num_seqs=6, max_num_batched_tokens=40)
    outputs = results(core, requests, 2)
    assert stream.num_lacks == core.scheduler.stats().lost_steps == 1
    expected = results(models.cores()[0], requests, 2)
    told, wanted = tokens_of(outputs), tokens_of(expected)
    failed = [output.key for output in outputs if output.failure is not None]
    assert len(failed) <= 1
    for key in failed:
        tokens = told.pop((key, 0))
        assert tokens == wanted.pop((key, 0))[: len(tokens)]
    assert told == wanted
    assert_core_clean(core)


def hand_over(runner: CudaRunner, stream: LackingStream) -> None:
    """Let the runner go on with another stream, the one it has being done."""
    runner._steps[0].arrived.set()
    runner._steps[0].arrived.wait()
    runner._stream = runner._updates._stream = stream
    for step in runner._steps:
        step.arrived = stream.mark()


def test_fault_03_out_of_memory_for_the_tokens_of_a_step(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both steps under way are lost with them."""
    requests = [request(prompt(length, i), 12) for i, length in enumerate((1, 30, 4, 17))]
    expected, core = models.cores()
    tokens, calls = HostRows.tokens, 0

    def lacking(self: HostRows, num_rows: int) -> list[int]:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise MemoryError
        return tokens(self, num_rows)

    monkeypatch.setattr(HostRows, "tokens", lacking)
    outputs = results(core, requests)
    monkeypatch.undo()
    assert tokens_of(outputs) == tokens_of(results(expected, requests))
    assert core.scheduler.stats().lost_steps == 2
    assert_core_clean(core)


def test_close_waits_and_may_be_called_twice(models: Models) -> None:
    core = models.cores()[1]
    core.submit(Submit(1, request(prompt(5))))
    core.step()
    core.runner.close()
    core.runner.close()


@given(
    num_blocks=st.integers(12, 48),
    max_num_seqs=st.integers(1, 6),
    budget=st.integers(6, 48),
    prefix_caching=st.booleans(),
    capture=st.booleans(),
    events=st.lists(
        st.tuples(
            st.integers(1, 40),  # length of the prompt
            st.integers(1, 24),  # outputs
            st.integers(0, 3),  # which prompt
            st.integers(1, 2),  # completions
            st.booleans(),  # greedy
            st.integers(0, 4),  # steps until the next
            st.none() | st.integers(0, 8),  # which request is aborted then
        ),
        min_size=1,
        max_size=9,
    ),
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_course_of_events_gives_the_same_tokens(
    models: Models,
    num_blocks: int,
    max_num_seqs: int,
    budget: int,
    prefix_caching: bool,
    capture: bool,
    events: list[tuple[int, int, int, int, bool, int, int | None]],
) -> None:
    capacity = min(num_blocks * BLOCK_SIZE, MAX_MODEL_LEN)
    told: list[dict[tuple[int, int], list[int]]] = []
    aborted: set[int] = set()
    cores = models.cores(
        num_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        prefix_caching=prefix_caching,
        capture=capture,
    )
    for core in cores:
        outputs: list[SequenceOutput] = []
        for key, (length, max_tokens, seed, n, greedy, steps, victim) in enumerate(events):
            length = min(length, capacity - 1)
            parameters = sampling(n=n) if greedy else sampling(n=n, temperature=0.8, top_k=20, seed=key)
            core.submit(
                Submit(
                    key,
                    request(
                        prompt(40, seed)[:length], min(max_tokens, capacity - length), sampling=parameters
                    ),
                )
            )
            for _ in range(steps):
                outputs.extend(core.step().outputs)
                core.scheduler.check_invariants()
            if victim is not None and victim <= key:
                aborted.add(victim)
                core.abort(Abort(victim, None, AbortReason.CANCELLED))
        outputs.extend(run_to_end(core))
        outputs.extend(core.flush().outputs)
        told.append(tokens_of(outputs))
    expected, actual = told
    assert set(expected) == set(actual)
    for (key, index), tokens in actual.items():
        other = expected[key, index]
        if key in aborted:
            # The one that is a step ahead has had other tokens by then.
            shorter = min(len(tokens), len(other))
            tokens, other = tokens[:shorter], other[:shorter]
        assert tokens == other
