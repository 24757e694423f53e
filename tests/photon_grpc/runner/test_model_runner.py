"""The whole engine over a real model: greedy output against transformers, whatever happens around it.

Every test compares with Hugging Face on the request alone, so chunking, batching, preemption, prefix sharing
and a full pool are all judged by the same independent answer. In float32 that is `generate`, token by token.
In bfloat16, which is what a GPU captures graphs in, two right programs part at near ties: there every token
is judged behind those before it, and must be what transformers in float32 says wherever its best two are
further apart than its own run in bfloat16 is off.
"""

from __future__ import annotations

import functools
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import photon_grpc
from photon_grpc.engine.core import EngineCore
from photon_grpc.engine.messages import EngineRequest, FailureKind, Submit
from photon_grpc.models.loader import load_weights
from photon_grpc.models.registry import build_model, load_config
from photon_grpc.options import ModelOptions, Options
from photon_grpc.runner.backend import Backend, choose_backend
from photon_grpc.runner.kv_cache import KVCache
from photon_grpc.runner.sampler import Sampler
from photon_grpc.runner.warmup import warm_up
from photon_grpc.scheduler.output import SamplerSpec, SequenceOutput
from photon_grpc.types import EffectiveSampling, TokenLogprobs
from tests.support.aftermath import assert_core_clean, assert_told_once
from tests.support.builders import engine_core, engine_request, generate, model_info, run_to_end, sampling
from tests.support.paged_model import TransformersModel
from tests.support.tiny_model import tiny_model_folder

FAMILIES = ("llama", "llama3", "qwen2", "qwen3", "demo")
DEMO = Path(photon_grpc.__file__).parent / "demo_model"
BLOCK_SIZE = 16
NUM_TOKENS = 64
# Rows of a batch at which a GPU takes another product kernel, and beyond.
BATCHES = (3, 8, 9, 17, 65)
# Room for errors of another order than those of transformers' own run.
MOST = 1.5

BF16 = torch.bfloat16
CPU, CUDA = ("cpu", torch.float32), pytest.param(("cuda", torch.float32), marks=pytest.mark.gpu, id="cuda")
BACKENDS = (pytest.param(CPU, id="cpu"), CUDA)
BACKENDS_AND_TYPES = (*BACKENDS, pytest.param(("cuda", BF16), marks=pytest.mark.gpu, id="cuda-bfloat16"))


class Checkpoint:
    """One tiny model folder: transformers' answers, and engines over it."""

    def __init__(self, folder: Path, backend: Backend, dtype: torch.dtype) -> None:
        self.config = load_config(folder)
        self._backend = backend
        self._dtype = dtype
        self._decoder = build_model(self.config, backend.ops, dtype=dtype, device=backend.device)
        load_weights(self._decoder, folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._rounded = None if dtype is torch.float32 else TransformersModel(folder, dtype=dtype)
        self._answers: dict[tuple[tuple[int, ...], int], list[int]] = {}

    def greedy(self, prompt: tuple[int, ...], num_tokens: int = NUM_TOKENS) -> list[int]:
        """What transformers says, EOS ignored."""
        if (prompt, num_tokens) not in self._answers:
            ids = torch.tensor([prompt])
            with torch.inference_mode():
                output = self._reference.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    min_new_tokens=num_tokens,
                    max_new_tokens=num_tokens,
                    eos_token_id=None,
                    pad_token_id=0,
                )
            self._answers[prompt, num_tokens] = output[0, len(prompt) :].tolist()
        return self._answers[prompt, num_tokens]

    def assert_greedy(
        self, tokens: dict[str, list[int]], prompts: dict[str, tuple[int, ...]], num_tokens: int = NUM_TOKENS
    ) -> None:
        """Each of `tokens` is that many greedy ones behind its prompt, as far as the type can tell."""
        assert tokens.keys() == prompts.keys()
        for name, prompt in prompts.items():
            assert len(tokens[name]) == num_tokens, name
            if self._rounded is None:
                assert tokens[name] == self.greedy(prompt, num_tokens), name
            else:
                self._judge(prompt, tokens[name])

    def _judge(self, prompt: tuple[int, ...], tokens: list[int]) -> None:
        assert self._rounded is not None
        token_ids, own = [*prompt, *tokens], slice(len(prompt) - 1, -1)
        logits = self.logits(token_ids)[own]
        off = float((self._rounded.logits(token_ids)[own] - logits).abs().max())
        chosen = logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        lost = float((logits.max(-1).values - chosen).max())
        assert lost <= 2 * MOST * off, (len(prompt), lost, off)
        assert off < float(logits.std()) / 5, "the type is too coarse for the model to judge anything"

    def assert_drawn(self, prompt: tuple[int, ...], tokens: list[int], spec: EffectiveSampling) -> None:
        """Behind those before it each token is what the CPU sampler draws from transformers' logits; in 16
        bits most are, since a draw has near ties as well, and a wrong seed or count would leave none.
        """
        sampler = Sampler(self.config.vocab_size, torch.device("cpu"))
        sampler.add(0, SamplerSpec(spec), prompt, len(prompt))
        logits = self.logits([*prompt, *tokens])[len(prompt) - 1 : -1]
        drawn = [sampler.sample([0], row[None]).token_ids[0] for row in logits]
        equal = sum(one == other for one, other in zip(tokens, drawn, strict=True))
        assert equal >= len(tokens) * (1.0 if self._rounded is None else 0.85), (equal, len(tokens))

    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """[tokens, vocab] of transformers."""
        with torch.inference_mode():
            return self._reference(torch.tensor([token_ids])).logits[0]

    def runner(self, num_blocks: int = 256, max_num_seqs: int = 16, max_num_batched_tokens: int = 512) -> Any:
        backend = self._backend
        cache = KVCache(
            self.config, backend.ops, num_blocks, BLOCK_SIZE, dtype=self._dtype, device=backend.device
        )
        for layer in cache.layers:
            layer.fill_(float("nan"))
        info = model_info(
            vocab_size=self.config.vocab_size,
            max_model_len=min(self.config.max_position_embeddings, num_blocks * BLOCK_SIZE),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
        )
        return backend.make_runner(self._decoder, info, cache)

    def core(self, num_blocks: int = 256, **scheduler: Any) -> EngineCore:
        max_num_seqs = scheduler.setdefault("max_num_seqs", 16)
        budget = scheduler.setdefault("max_num_batched_tokens", 512)
        return engine_core(self.runner(num_blocks, max_num_seqs, budget), **scheduler)

    def prompt(self, length: int, seed: int = 0) -> tuple[int, ...]:
        choose = random.Random(f"{length}/{seed}")
        return tuple(choose.randrange(4, self.config.vocab_size) for _ in range(length))


def tiny_folder(folder: Path, family: str, dtype: str) -> Path:
    """Heads of 32, which every backend has; Qwen2 states none and divides the hidden size."""
    sizes = {} if family == "qwen2" else {"head_dim": 32}
    return tiny_model_folder(folder, family, hidden_size=192, dtype=dtype, **sizes)


@functools.cache
def all_checkpoints(folder: Path, backend: str, dtype: torch.dtype) -> dict[str, Checkpoint]:
    """By family; those that are trained or drawn in float32 are rounded where `dtype` is smaller."""
    chosen = choose_backend(Options(model=ModelOptions(backend=backend)))
    word = str(dtype).removeprefix("torch.")
    return {
        family: Checkpoint(
            DEMO if family == "demo" else tiny_folder(folder / f"{backend}-{word}", family, word),
            chosen,
            dtype,
        )
        for family in FAMILIES
    }


@pytest.fixture(scope="module")
def one_thread(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the models, while torch computes on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path_factory.mktemp("models")
    torch.set_num_threads(threads)
    all_checkpoints.cache_clear()


@pytest.fixture(scope="module", params=BACKENDS_AND_TYPES)
def checkpoints(request: pytest.FixtureRequest, one_thread: Path) -> dict[str, Checkpoint]:
    return all_checkpoints(one_thread, *request.param)


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, checkpoints: dict[str, Checkpoint]) -> Checkpoint:
    return checkpoints[request.param]


@pytest.fixture(scope="module")
def llama(checkpoints: dict[str, Checkpoint]) -> Checkpoint:
    return checkpoints["llama"]


@pytest.fixture(scope="module", params=BACKENDS)
def llama_float32(request: pytest.FixtureRequest, one_thread: Path) -> Checkpoint:
    """Where equal numbers are asked for, or steps that are captured nowhere."""
    return all_checkpoints(one_thread, *request.param)["llama"]


def greedy_request(prompt: tuple[int, ...], num_tokens: int = NUM_TOKENS, **overrides: Any) -> EngineRequest:
    return engine_request(prompt, num_tokens, eos_token_ids=(), **overrides)


@pytest.mark.parametrize("length", [1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 200])
def test_fault_17_greedy_tokens_are_those_of_transformers(checkpoint: Checkpoint, length: int) -> None:
    prompt = checkpoint.prompt(length)
    checkpoint.assert_greedy(generate(checkpoint.core(), only=greedy_request(prompt)), {"only": prompt})


@pytest.mark.parametrize("budget", [16, 23, 64])
def test_fault_14_chunks_do_not_change_the_output(checkpoint: Checkpoint, budget: int) -> None:
    prompt = checkpoint.prompt(200)
    core = checkpoint.core(max_num_batched_tokens=budget)
    checkpoint.assert_greedy(generate(core, only=greedy_request(prompt)), {"only": prompt})


def test_fault_13_company_in_the_batch_does_not_change_the_output(checkpoint: Checkpoint) -> None:
    prompts = {f"p{length}": checkpoint.prompt(length) for length in (1, 7, 8, 9, 40, 100, 200)}
    tokens = generate(checkpoint.core(), **{name: greedy_request(prompt) for name, prompt in prompts.items()})
    checkpoint.assert_greedy(tokens, prompts)


@pytest.mark.parametrize("batch", BATCHES)
def test_fault_13_any_number_of_rows(llama: Checkpoint, batch: int) -> None:
    """All decode at the same time: after the first ones' prompts the step's rows are all of them."""
    prompts = {f"p{row}": llama.prompt(1 + (7 * row + 14) % 41, row) for row in range(batch)}
    core = llama.core(num_blocks=400, max_num_seqs=batch, max_num_batched_tokens=2048)
    tokens = generate(core, **{name: greedy_request(prompt, 12) for name, prompt in prompts.items()})
    llama.assert_greedy(tokens, prompts, 12)


def test_fault_16_batch_that_grows_shrinks_and_grows(llama: Checkpoint) -> None:
    core = llama.core(max_num_seqs=6)
    lengths = [(5, 40), (60, 8), (9, 20), (17, 64), (33, 3), (120, 30)]
    tokens: dict[int, list[int]] = {}
    outputs: list[SequenceOutput] = []
    for key, (length, num_tokens) in enumerate(lengths):
        core.submit(Submit(key, greedy_request(llama.prompt(length), num_tokens)))
        for _ in range(7):
            outputs.extend(core.step().outputs)
    outputs.extend(run_to_end(core))
    for output in outputs:
        tokens.setdefault(output.key, []).extend(output.token_ids)
    for key, (length, num_tokens) in enumerate(lengths):
        llama.assert_greedy({"it": tokens[key]}, {"it": llama.prompt(length)}, num_tokens)


def test_fault_11_preemption_in_the_middle_does_not_change_the_output(checkpoint: Checkpoint) -> None:
    prompts = {f"p{seed}": checkpoint.prompt(30, seed) for seed in range(5)}
    core = checkpoint.core(num_blocks=24)
    tokens = generate(core, **{name: greedy_request(prompt) for name, prompt in prompts.items()})
    assert core.scheduler.stats().preemptions > 0
    checkpoint.assert_greedy(tokens, prompts)
    assert core.scheduler.stats().kv_blocks_used == 0


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_fault_15_shared_prefixes_do_not_change_the_output(
    checkpoint: Checkpoint, prefix_caching: bool
) -> None:
    head = checkpoint.prompt(50)
    prompts = {f"p{seed}": head + checkpoint.prompt(1 + 9 * seed, seed) for seed in range(3)}
    core = checkpoint.core(prefix_caching=prefix_caching)
    for _ in range(2):
        tokens = generate(core, **{n: greedy_request(p) for n, p in prompts.items()})
        checkpoint.assert_greedy(tokens, prompts)
    assert (core.scheduler.stats().prefix_hits > 0) == prefix_caching


def test_prefix_blocks_survive_churn(llama: Checkpoint) -> None:
    """Blocks are evicted and reused between hits; a recycled block must never pass for its old content."""
    core = llama.core(num_blocks=40)
    head = llama.prompt(48)
    for round_number in range(6):
        prompts = {
            "again": head + llama.prompt(5),
            "other": llama.prompt(100, seed=round_number),
        }
        tokens = generate(core, **{n: greedy_request(p, 24) for n, p in prompts.items()})
        llama.assert_greedy(tokens, prompts, 24)


def test_more_requests_than_fit(llama: Checkpoint) -> None:
    prompts = {f"p{i}": llama.prompt(10 + i, seed=i) for i in range(20)}
    core = llama.core(num_blocks=30, max_num_seqs=4, max_num_batched_tokens=40)
    tokens = generate(core, **{name: greedy_request(prompt, 30) for name, prompt in prompts.items()})
    llama.assert_greedy(tokens, prompts, 30)


def test_warm_up_leaves_no_trace(llama: Checkpoint) -> None:
    runner = llama.runner(max_num_seqs=1)
    warm_up(runner)
    core = engine_core(runner, max_num_seqs=1)
    prompt = llama.prompt(20)
    llama.assert_greedy(generate(core, only=greedy_request(prompt, 20)), {"only": prompt}, 20)
    assert core.scheduler.stats().generation_tokens == 20


def logprobs_of(outputs: list[SequenceOutput]) -> tuple[list[TokenLogprobs], list[TokenLogprobs]]:
    prompt = [entry for output in outputs for entry in output.prompt_logprobs]
    return prompt, [entry for output in outputs for entry in output.logprobs]


@pytest.mark.parametrize("budget", [16, 512])
def test_logprobs_are_those_of_transformers(llama_float32: Checkpoint, budget: int) -> None:
    prompt = llama_float32.prompt(37)
    core = llama_float32.core(max_num_batched_tokens=budget)
    core.submit(Submit(1, greedy_request(prompt, 6, top_logprobs=3, prompt_top_logprobs=2)))
    prompt_logprobs, output_logprobs = logprobs_of(run_to_end(core))

    token_ids = [*prompt, *llama_float32.greedy(prompt, 6)]
    expected = torch.log_softmax(llama_float32.logits(token_ids).double(), dim=-1)
    assert len(prompt_logprobs) == len(prompt) - 1
    assert len(output_logprobs) == 6
    for position, entry in enumerate([*prompt_logprobs, *output_logprobs]):
        top = 2 if position < len(prompt) - 1 else 3
        row = expected[position]
        assert entry.logprob == pytest.approx(row[token_ids[position + 1]].item(), abs=1e-4)
        best = torch.topk(row, top)
        assert [token_id for token_id, _ in entry.top] == best.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_fault_20_seeded_sampling_depends_on_the_request_alone(llama_float32: Checkpoint) -> None:
    prompt = llama_float32.prompt(30)
    wanted = greedy_request(prompt, 40)

    def seeded(seed: int, n: int = 1, tokens: int = 40) -> EngineRequest:
        return (
            greedy_request(prompt, tokens)
            if n < 1
            else engine_request(
                prompt,
                tokens,
                n,
                eos_token_ids=(),
                sampling=sampling(temperature=0.9, top_p=0.95, seed=seed, n=n),
            )
        )

    alone = generate(llama_float32.core(), only=seeded(7))["only"]
    assert alone != llama_float32.greedy(prompt, 40)
    assert alone != generate(llama_float32.core(), only=seeded(8))["only"]
    chunked = generate(llama_float32.core(max_num_batched_tokens=16, max_num_seqs=4), only=seeded(7))["only"]
    assert chunked == alone
    company = {f"c{i}": seeded(100 + i) for i in range(5)}
    assert generate(llama_float32.core(), only=seeded(7), greedy=wanted, **company)["only"] == alone
    small = llama_float32.core(num_blocks=20)
    assert generate(small, **company, only=seeded(7))["only"] == alone
    assert small.scheduler.stats().preemptions > 0


@pytest.mark.parametrize(
    ("where", "company"),
    [
        ({}, 0),
        ({"max_num_batched_tokens": 16, "max_num_seqs": 4}, 0),
        ({}, 5),
        ({"num_blocks": 20}, 5),
    ],
    ids=["alone", "chunked", "company", "preempted"],
)
def test_fault_20_seeded_draws_are_those_of_the_cpu_sampler(
    llama: Checkpoint, where: dict[str, int], company: int
) -> None:
    prompt = llama.prompt(30)
    specs = [sampling(temperature=0.9, top_p=0.95, seed=7 + 100 * n) for n in range(1 + company)]
    core = llama.core(**where)
    requests = {
        f"r{n}": engine_request(prompt, 40, eos_token_ids=(), sampling=spec) for n, spec in enumerate(specs)
    }
    tokens = generate(core, **requests)
    for spec, drawn in zip(specs, tokens.values(), strict=True):
        llama.assert_drawn(prompt, drawn, spec)
    assert (core.scheduler.stats().preemptions > 0) == ("num_blocks" in where)


def test_completions_of_one_request_differ(llama_float32: Checkpoint) -> None:
    core = llama_float32.core()
    prompt = llama_float32.prompt(20)
    request = engine_request(prompt, 20, eos_token_ids=(), sampling=sampling(temperature=1.0, seed=3, n=3))
    core.submit(Submit(1, request))
    tokens: dict[int, list[int]] = {}
    for output in run_to_end(core):
        tokens.setdefault(output.index, []).extend(output.token_ids)
    assert len({tuple(ids) for ids in tokens.values()}) == 3


def test_fault_06_one_row_of_nan_harms_nobody_else(
    llama_float32: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = llama_float32.runner()
    core = engine_core(runner, max_num_batched_tokens=512)
    victim, other = llama_float32.prompt(20, 1), llama_float32.prompt(25, 2)
    compute = runner._decoder.compute_logits
    calls = 0

    def poisoned(hidden: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        logits = compute(hidden)
        if calls == 5:
            logits[0, 3] = float("nan")
        return logits

    monkeypatch.setattr(runner._decoder, "compute_logits", poisoned)
    core.submit(Submit(1, greedy_request(victim, 20)))
    core.submit(Submit(2, greedy_request(other, 20)))
    outputs = run_to_end(core)
    assert [o.failure is not None for o in outputs if o.key == 1 and o.is_last] == [True]
    assert [t for o in outputs if o.key == 2 for t in o.token_ids] == llama_float32.greedy(other, 20)
    assert core.scheduler.stats().faults == 1
    assert_told_once(core, outputs, (1, 2))
    assert_core_clean(core)


NO_MEMORY: dict[str, Callable[[], object]] = {
    # As much as no machine has: the error that the allocator really raises.
    "torch": lambda: torch.empty(1 << 55, dtype=torch.int8),
    "numpy": lambda: np.empty(1 << 58),
    "a device": lambda: _raise(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")),
}
PLACES = ("forward", "compute_logits", "sample", "add")


def _raise(error: Exception) -> None:
    raise error


def lacking(runner: Any, place: str, at: int, allocate: Callable[[], object]) -> None:
    """Let call number `at` of a method of model or sampler find no memory, after it has done its work."""
    if place == "sample" and runner.max_in_flight > 1:
        pytest.skip("a GPU's runner samples inside of its graphs")
    owner = runner._decoder if place in ("forward", "compute_logits") else runner._sampler
    method = getattr(owner, place)
    calls = 0

    def lack(*arguments: Any, **values: Any) -> Any:
        nonlocal calls
        calls += 1
        result = method(*arguments, **values)
        if calls == at:
            allocate()
        return result

    setattr(owner, place, lack)


@pytest.mark.parametrize("kind", NO_MEMORY)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("at", [1, 3, 9])
def test_fault_03_out_of_memory_changes_no_token(
    llama_float32: Checkpoint, place: str, at: int, kind: str
) -> None:
    """Call 1 is of a prompt, 9 of decodes alone but for `add`, which is a third sequence that enters."""
    lengths = (40, 25, 60, 3, 17, 33, 48, 20, 9, 50) if place == "add" else (40, 25, 60)
    prompts = {f"p{n}": llama_float32.prompt(length, n) for n, length in enumerate(lengths)}
    runner = llama_float32.runner()
    lacking(runner, place, at, NO_MEMORY[kind])
    core = engine_core(runner, max_num_seqs=16, max_num_batched_tokens=64)
    tokens = generate(core, **{name: greedy_request(prompt, 20) for name, prompt in prompts.items()})
    assert tokens == {name: llama_float32.greedy(prompt, 20) for name, prompt in prompts.items()}
    assert core.scheduler.stats().lost_steps == 1
    assert core.scheduler.stats().preemptions > 0
    assert_core_clean(core)


def test_fault_03_a_request_alone_without_memory_fails_and_the_next_is_served(
    llama_float32: Checkpoint,
) -> None:
    runner = llama_float32.runner()
    lacking(runner, "forward", 4, NO_MEMORY["torch"])
    core = engine_core(runner, max_num_batched_tokens=512)
    prompt = llama_float32.prompt(20, 1)
    core.submit(Submit(1, greedy_request(prompt, 20)))
    outputs = run_to_end(core)
    assert_told_once(core, outputs, (1,))
    assert outputs[-1].failure is FailureKind.OUT_OF_MEMORY
    assert [t for o in outputs for t in o.token_ids] == llama_float32.greedy(prompt, 20)[
        : 4 - runner.max_in_flight
    ]
    assert generate(core, again=greedy_request(prompt, 20))["again"] == llama_float32.greedy(prompt, 20)
    assert_core_clean(core)


def test_fault_03_another_error_of_the_step_is_not_taken_for_it(llama_float32: Checkpoint) -> None:
    runner = llama_float32.runner()
    lacking(runner, "forward", 2, lambda: _raise(RuntimeError("CUDA error: an illegal memory access")))
    core = engine_core(runner, max_num_batched_tokens=512)
    core.submit(Submit(1, greedy_request(llama_float32.prompt(20, 1), 20)))
    core.step()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        core.step()
