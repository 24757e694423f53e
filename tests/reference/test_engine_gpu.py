"""The whole engine on a GPU in 16 bits, by what transformers in float32 says of every token that it chose.

Greedy texts of two programs part where two tokens nearly tie, and have nothing in common from there on. So
each token is judged behind the engine's own ones before it: it must be the truth's wherever the truth's best
two are further apart than transformers in the same type can be off, and its log-probability must be as near.
In float32 the text itself is that of the CPU.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

import photon_grpc
from photon_grpc import LLM, GenerationParams
from photon_grpc.engine.messages import Submit
from photon_grpc.options import KVCacheOptions, ModelOptions, Options, SchedulerOptions
from photon_grpc.runner.factory import build_runner
from tests.support.builders import engine_core, engine_request, run_to_end
from tests.support.paged_model import TransformersModel, random_prompt
from tests.support.tiny_model import tiny_model_folder

pytestmark = pytest.mark.gpu

BATCHES = (1, 3, 8, 9, 17, 64, 65)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"head_dim": 64}),
    "llama3": ("llama3", {"head_dim": 32}),
    "qwen2": ("qwen2", {"num_attention_heads": 4}),
    "qwen3": ("qwen3", {"head_dim": 128}),
    # Those above have two or four query heads to a kv head; these have what others have: 1, 3, 5, 6, 7, 8.
    "llama2-7b": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 128}),
    "llama32-3b": ("llama3", {"hidden_size": 384, "num_attention_heads": 6, "head_dim": 128}),
    "qwen3-14b": ("qwen3", {"hidden_size": 320, "num_attention_heads": 10, "head_dim": 128}),
    "qwen25-1.5b": ("qwen2", {"hidden_size": 768, "num_attention_heads": 12}),
    "qwen25-0.5b": ("qwen2", {"hidden_size": 896, "num_attention_heads": 14}),
    "qwen3-32b": ("qwen3", {"num_attention_heads": 16, "head_dim": 128}),
}
VOCAB_SIZE = 1024
NUM_TOKENS = 16
# The largest error of a log-probability that transformers makes itself in the type, times this.
MOST = 1.5
DEMO = Path(photon_grpc.__file__).parent / "demo_model"
TEXTS = (
    "def fib(n):",
    "class Stack:\n    def __init__(self):\n",
    "import os\nimport sys\n\n\ndef main(",
    "    for index, value in enumerate(",
    '"""Read a file',
)
TEXT_TOKENS = 120


@dataclass(frozen=True)
class Chosen:
    """One sequence of the engine: its prompt, its tokens, and of each the log-probabilities it gave."""

    prompt: tuple[int, ...]
    token_ids: list[int]
    logprobs: list[dict[int, float]]


def options(dtype: str) -> Options:
    return Options(
        model=ModelOptions(backend="cuda", dtype=dtype, max_model_len=256),
        cache=KVCacheOptions(kv_cache_memory_bytes=256 << 20),
        scheduler=SchedulerOptions(max_num_seqs=max(BATCHES), max_num_batched_tokens=512),
    )


class Engine:
    """A core over a runner, for one set of prompts after the other."""

    def __init__(self, folder: Path, chosen: Options) -> None:
        self._runner = build_runner(folder, chosen)
        # Who was here before makes no difference to a later prompt.
        self._core = engine_core(
            self._runner,
            max_num_seqs=chosen.scheduler.max_num_seqs,
            max_num_batched_tokens=chosen.scheduler.max_num_batched_tokens,
            prefix_caching=False,
        )
        self._keys = itertools.count()

    def generate(self, prompts: Sequence[tuple[int, ...]], num_tokens: int = NUM_TOKENS) -> list[Chosen]:
        """All at the same time: behind the first ones' prompts they decode together."""
        chosen = {next(self._keys): Chosen(prompt, [], []) for prompt in prompts}
        for key, one in chosen.items():
            request = engine_request(one.prompt, num_tokens, eos_token_ids=(), top_logprobs=4)
            self._core.submit(Submit(key, request))
        for output in run_to_end(self._core):
            assert output.failure is None
            chosen[output.key].token_ids.extend(output.token_ids)
            for token_id, entry in zip(output.token_ids, output.logprobs, strict=True):
                chosen[output.key].logprobs.append({**dict(entry.top), token_id: entry.logprob})
        assert all(len(one.token_ids) == len(one.logprobs) == num_tokens for one in chosen.values())
        return list(chosen.values())

    def close(self) -> None:
        self._runner.close()


def judge(chosen: list[Chosen], exact: TransformersModel, rounded: TransformersModel) -> None:
    """`exact` in float32, `rounded` in the engine's type."""
    sequences = [[*one.prompt, *one.token_ids] for one in chosen]
    rows = [slice(len(one.prompt) - 1, -1) for one in chosen]
    truth, theirs = (
        [torch.log_softmax(logits[row].double(), -1) for row, (_, logits) in zip(rows, states, strict=True)]
        for states in (exact.states(sequences), rounded.states(sequences))
    )
    allowed = MOST * max(float((a - b).abs().max()) for a, b in zip(truth, theirs, strict=True))
    num_clear = 0
    for one, values in zip(chosen, truth, strict=True):
        best = values.topk(2)
        clear = best.values[:, 0] - best.values[:, 1] > 2 * allowed
        num_clear += int(clear.sum())
        tokens = torch.tensor(one.token_ids)
        assert torch.equal(tokens[clear], best.indices[clear, 0])
        for row, entries in zip(values, one.logprobs, strict=True):
            for token_id, logprob in entries.items():
                assert abs(logprob - float(row[token_id])) <= allowed
    assert num_clear >= sum(len(one.token_ids) for one in chosen) // 4, "hardly a token was judged"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The engine and the two references of a model in a type, made once."""
    engines: list[Engine] = []

    @functools.cache
    def make(name: str, dtype: torch.dtype) -> tuple[Engine, TransformersModel, TransformersModel]:
        word = str(dtype).removeprefix("torch.")
        if name == "demo":
            folder = DEMO
        else:
            family, sizes = MODELS[name]
            sizes = {"hidden_size": 256, "intermediate_size": 448, "num_attention_heads": 8, **sizes}
            folder = tiny_model_folder(
                tmp_path_factory.mktemp(name), family, vocab_size=VOCAB_SIZE, dtype=word, **sizes
            )
        engines.append(Engine(folder, options(word)))
        device = torch.device("cuda")
        exact, rounded = (
            TransformersModel(folder, dtype=one, device=device) for one in (torch.float32, dtype)
        )
        return engines[-1], exact, rounded

    yield make
    for engine in engines:
        engine.close()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.bfloat16) for name in (*MODELS, "demo")), ("llama", torch.float16)],
    ids=str,
)
def test_tokens_and_logprobs_are_those_of_transformers(made: Any, name: str, dtype: torch.dtype) -> None:
    """In batches of every size, one after the other, since an engine takes its time to start."""
    engine, exact, rounded = made(name, dtype)
    for batch in BATCHES:
        prompts = [
            tuple(random_prompt(1 + (7 * row + 14) % 41, seed=100 * batch + row, vocab_size=VOCAB_SIZE))
            for row in range(batch)
        ]
        judge(engine.generate(prompts), exact, rounded)


def text_prompts() -> list[tuple[int, ...]]:
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    return [tuple(tokenizer.encode(text).ids) for text in TEXTS]


def test_the_demo_model_writes_text_in_bfloat16(made: Any) -> None:
    """What its text is on a GPU unless told otherwise; how long it is that of float32, `-rP` shows."""
    engine, exact, rounded = made("demo", torch.bfloat16)
    chosen = engine.generate(text_prompts(), TEXT_TOKENS)
    judge(chosen, exact, rounded)
    for text, one in zip(TEXTS, chosen, strict=True):
        expected = exact.greedy(one.prompt, TEXT_TOKENS)
        same = next(
            (i for i, pair in enumerate(zip(one.token_ids, expected, strict=True)) if pair[0] != pair[1]), -1
        )
        print(f"{text!r}: parts at token {same}")
        if same >= 0:
            ((_, logits),) = exact.states([[*one.prompt, *expected[:same]]])
            values = torch.log_softmax(logits[-1].double(), -1)
            pair = one.token_ids[same], expected[same]
            print(f"  of {pair} float32 says {[round(float(values[i]), 4) for i in pair]}")


def texts(backend: str, dtype: str) -> list[str]:
    chosen = Options(
        model=ModelOptions(backend=backend, dtype=dtype, max_model_len=512),
        cache=KVCacheOptions(kv_cache_memory_bytes=64 << 20),
        scheduler=SchedulerOptions(max_num_seqs=8, max_num_batched_tokens=256),
    )
    with LLM("demo", options=chosen) as llm:
        params = GenerationParams(temperature=0, max_tokens=TEXT_TOKENS, ignore_eos=True)
        return [result.completions[0].text for result in llm.generate(list(TEXTS), params)]


def test_the_demo_model_writes_the_same_on_cpu_and_gpu() -> None:
    """In float32: every character of every text."""
    assert texts("cuda", "float32") == texts("cpu", "float32")
