"""Whole models against Hugging Face transformers: float32 logits and greedy tokens.

Logits within 1e-4, greedy tokens identical over 64 tokens, for every family, both spellings of
config.json, and sizes that no real checkpoint has in common.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.paged_model import PagedModel, TransformersModel, random_prompt
from tests.support.tiny_model import tiny_model_folder

BLOCK_SIZE = 16
TOLERANCE = 1e-4

# Each row: an id, a family, and what is odd about it.
MODELS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("llama", "llama", {}),
    ("llama-untied", "llama-untied", {"spelling": "rope_theta", "shards": 3}),
    ("llama3", "llama3", {}),
    ("llama3-old", "llama3", {"spelling": "rope_theta", "seed": 5}),
    ("mistral", "mistral", {}),
    ("qwen2", "qwen2", {}),
    ("qwen2-old", "qwen2", {"spelling": "rope_theta", "seed": 5}),
    ("qwen3", "qwen3", {}),
    ("qwen3-old", "qwen3", {"spelling": "rope_theta", "seed": 5}),
    ("theta-eps", "llama", {"rope_theta": 317.25, "rms_norm_eps": 0.05}),
    ("biased", "llama", {"attention_bias": True, "mlp_bias": True}),
    ("linear-rope", "llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    ("14-heads", "qwen2", {"hidden_size": 112, "num_attention_heads": 14, "num_key_value_heads": 2}),
    ("multi-head", "llama", {"num_key_value_heads": 6}),
    ("one-kv-head", "qwen3", {"num_key_value_heads": 1, "head_dim": 10, "vocab_size": 509}),
)


class Pair:
    """One checkpoint in both implementations."""

    def __init__(self, folder: Path) -> None:
        self.ours = PagedModel(folder, block_size=BLOCK_SIZE)
        self.theirs = TransformersModel(folder)


@pytest.fixture(scope="module", params=MODELS, ids=[name for name, _, _ in MODELS])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    name, family, overrides = request.param
    return Pair(tiny_model_folder(tmp_path_factory.mktemp(name), family, tokenizer=False, **overrides))


@pytest.mark.parametrize("length", [1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 200])
def test_greedy_tokens_and_logits_are_those_of_transformers(pair: Pair, length: int) -> None:
    prompt = random_prompt(length, seed=length, vocab_size=500)
    tokens, logits = pair.ours.greedy(prompt)

    assert tokens == pair.theirs.greedy(prompt)
    expected = pair.theirs.logits([*prompt, *tokens])[length - 1 : -1]
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)


def test_logits_of_every_prompt_position(pair: Pair) -> None:
    prompt = random_prompt(200, vocab_size=500)
    (logits,) = pair.ours.step([("all", prompt)])
    pair.ours.release("all")

    torch.testing.assert_close(logits, pair.theirs.logits(prompt), rtol=0, atol=TOLERANCE)
