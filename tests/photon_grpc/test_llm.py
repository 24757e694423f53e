"""The Python API over a tiny model, judged by transformers and by the limits of the service."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from photon_grpc import (
    LLM,
    ChatMessage,
    Delta,
    FinishReason,
    GenerationParams,
    Options,
    Role,
    Started,
    Summary,
)
from photon_grpc.errors import InvalidRequestError, ModelLoadError
from photon_grpc.options import EngineOptions, KVCacheOptions, LimitOptions, SchedulerOptions
from tests.support.tiny_model import tiny_model_folder

GREEDY = GenerationParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    options = Options(
        engine=EngineOptions(num_threads=1),
        cache=KVCacheOptions(kv_cache_memory_bytes=8 << 20),
        scheduler=SchedulerOptions(max_num_seqs=4),
    )
    with LLM(str(folder), options=options) as llm:
        yield llm


def test_results_come_in_the_order_of_the_prompts_and_are_those_of_transformers(
    llm: LLM, folder: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = [tuple(range(10 + i, 20 + 2 * i)) for i in range(9)]
    for prompt, result in zip(prompts, llm.generate(prompts, GREEDY), strict=True):
        expected = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :]
        assert list(result.completions[0].token_ids) == expected.tolist()
        assert result.completions[0].finish.reason is FinishReason.MAX_TOKENS
        assert result.usage.prompt_tokens == len(prompt)


def test_a_stream_tells_what_generate_returns(llm: LLM) -> None:
    whole = llm.generate("hello there", GREEDY)[0]
    events = list(llm.stream("hello there", GREEDY))
    assert isinstance(events[0], Started)
    assert isinstance(events[-1], Summary)
    deltas = [event for event in events if isinstance(event, Delta)]
    assert "".join(delta.text for delta in deltas) == whole.completions[0].text
    assert tuple(t for delta in deltas for t in delta.token_ids) == whole.completions[0].token_ids


def test_a_stream_that_is_left_early_frees_its_blocks(llm: LLM) -> None:
    stream = llm.stream("hello", GenerationParams(max_tokens=100, ignore_eos=True))
    next(stream)
    stream.close()
    llm.generate("another", GREEDY)
    assert llm._stack.engine.num_live_requests == 0
    assert llm._stack.generator.stats().kv_blocks_used == 0


def test_chat_uses_the_model_s_template(llm: LLM) -> None:
    result = llm.chat([ChatMessage(Role.USER, "hi")], GREEDY)
    plain = llm.generate("hi", GREEDY)[0]
    assert result.usage.prompt_tokens > plain.usage.prompt_tokens


def test_more_prompts_than_the_engine_admits_at_once(folder: Path) -> None:
    options = Options(
        engine=EngineOptions(num_threads=1),
        cache=KVCacheOptions(kv_cache_memory_bytes=8 << 20),
        scheduler=SchedulerOptions(max_num_seqs=2),
        limits=LimitOptions(max_queued_requests=3),
    )
    with LLM(str(folder), options=options) as llm:
        results = llm.generate(["x"] * 20, GenerationParams(n=2, max_tokens=2, ignore_eos=True))
    assert [len(result.completions) for result in results] == [2] * 20


def test_a_wrong_parameter_names_its_field_as_the_caller_knows_it(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        llm.generate("x", GenerationParams(top_p=0.0))
    assert [violation.field for violation in raised.value.violations] == ["sampling.top_p"]


def test_an_empty_list_is_no_work(llm: LLM) -> None:
    assert llm.generate([]) == []


def test_a_folder_that_is_none_leaves_no_thread(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with pytest.raises(ModelLoadError, match="no such folder"):
        LLM(str(tmp_path / "nowhere"))
    with pytest.raises(ModelLoadError):
        LLM(str(tmp_path))
    for thread in set(threading.enumerate()) - before:
        thread.join(30)
        assert not thread.is_alive(), thread


def test_close_twice_is_harmless(folder: Path) -> None:
    llm = LLM(str(folder), options=Options(cache=KVCacheOptions(kv_cache_memory_bytes=1 << 20)))
    llm.close()
    llm.close()
