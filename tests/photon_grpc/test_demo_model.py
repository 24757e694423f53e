"""The shipped demo model: small enough to travel, and what its files say agrees with what they hold.

Checked with transformers and safetensors alone, so that a mistake shared with our own loader shows.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(str(files("photon_grpc"))) / "demo_model"
FILES = {
    "LICENSE-PSF.txt",
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def read_json(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    return content


def test_the_folder_is_complete_and_at_most_16_mib() -> None:
    found = {file.name: file.stat().st_size for file in FOLDER.iterdir()}
    assert set(found) >= FILES
    assert set(found) <= {*FILES, "loss.png"}
    assert sum(found.values()) <= 16 * 1024 * 1024


def test_weights_are_bfloat16_finite_and_number_8_to_12_million() -> None:
    count = 0
    with safe_open(FOLDER / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            tensor = file.get_tensor(name)
            assert tensor.dtype == torch.bfloat16, name
            assert torch.isfinite(tensor).all(), name
            assert tensor.float().std() > 0, name
            count += tensor.numel()
    assert 8_000_000 <= count <= 12_000_000
    assert read_json("config.json")["tie_word_embeddings"] is True


def test_transformers_finds_every_weight_and_no_other() -> None:
    _, info = AutoModelForCausalLM.from_pretrained(FOLDER, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]


def test_the_rotary_embedding_is_scaled_as_llama3() -> None:
    config = read_json("config.json")
    assert config["rope_scaling"]["rope_type"] == "llama3"
    scaled_to = config["rope_scaling"]["factor"] * config["rope_scaling"]["original_max_position_embeddings"]
    assert config["max_position_embeddings"] <= scaled_to


def test_a_prompt_gets_exactly_one_bos_and_comes_back_unchanged(tokenizer: Any) -> None:
    text = "class A:\n    def f(self):\n\n\treturn 'é λ 🙂'  # 12345\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) == read_json("config.json")["vocab_size"]


@pytest.mark.parametrize("tail", ["\n", "\n    ", "\n        "])
def test_a_prompt_cut_after_an_indentation_is_a_prefix_in_tokens(tokenizer: Any, tail: str) -> None:
    whole = tokenizer(f"def f(x):{tail}return x")["input_ids"]
    prompt = tokenizer(f"def f(x):{tail}")["input_ids"]
    assert whole[: len(prompt)] == prompt


def test_the_chat_template_renders_turns_and_one_bos(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Write f"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert text.endswith("<|assistant|>\n")
    assert tokens.count(tokenizer.bos_token) == 1
    assert tokens[0] == tokenizer.bos_token
    assert [t for t in tokens if t in ("<|system|>", "<|user|>", "<|assistant|>")] == [
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|user|>",
        "<|assistant|>",
    ]
    assert tokens.count("<|end_of_turn|>") == len(messages)


def test_generation_ends_at_end_of_text_and_at_end_of_turn(tokenizer: Any) -> None:
    expected = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|end_of_turn|>"])
    generation = read_json("generation_config.json")
    assert generation["eos_token_id"] == read_json("config.json")["eos_token_id"] == expected
    assert generation["do_sample"] is True
    assert 0 < generation["temperature"] <= 1
    assert 0 < generation["top_p"] <= 1


def test_it_has_learnt_python(tokenizer: Any, model: Any) -> None:
    """Untrained weights give a loss near ln(4096) = 8.3, those of a twenty-step training about 5.6."""
    text = (
        "def total(values):\n"
        '    """Return the sum of values."""\n'
        "    result = 0\n"
        "    for value in values:\n"
        "        result += value\n"
        "    return result\n"
    )
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < 3.0


def test_the_card_describes_this_file() -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest() in card
    assert "Python Software Foundation" in (FOLDER / "LICENSE-PSF.txt").read_text(encoding="utf-8")
    for heading in ("Data and licence", "Training", "Held-out perplexity", "Samples"):
        assert f"\n## {heading}\n" in card
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", card, re.M)
    assert rows
    for _, _, _, loss, perplexity, _ in rows:
        assert math.exp(float(loss)) == pytest.approx(float(perplexity), rel=1e-2)
        assert float(perplexity) < 10
