"""config.json and generation_config.json: both spellings, defaults of each family, refusals."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from photon_grpc.errors import ModelLoadError, UnsupportedModelError
from photon_grpc.models.config import (
    GenerationDefaults,
    LinearRopeScaling,
    Llama3RopeScaling,
    ModelConfig,
    RopeConfig,
    read_config,
)
from tests.support.tiny_model import make_config

_ABSENT: Any = object()


def _read(
    folder: Path,
    family: str = "llama",
    *,
    spelling: str = "rope_parameters",
    generation: Any = None,
    **changes: Any,
) -> ModelConfig:
    """Read a tiny config with keys changed in the file itself; `_ABSENT` removes one."""
    config = make_config(family, spelling) | changes
    content = {key: value for key, value in config.items() if value is not _ABSENT}
    (folder / "config.json").write_text(json.dumps(content))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return read_config(folder)


@pytest.mark.parametrize("family", ["llama", "llama-untied", "llama3", "mistral", "qwen2", "qwen3"])
def test_both_spellings_mean_the_same(tmp_path: Path, family: str) -> None:
    assert _read(tmp_path, family, spelling="rope_theta") == _read(tmp_path, family)


def test_every_field_comes_from_the_file(tmp_path: Path) -> None:
    config = _read(
        tmp_path,
        "llama3",
        spelling="rope_theta",
        hidden_size=60,
        intermediate_size=70,
        num_hidden_layers=3,
        num_attention_heads=14,
        num_key_value_heads=2,
        head_dim=10,
        vocab_size=513,
        max_position_embeddings=77,
        rms_norm_eps=0.25,
        rope_theta=317.25,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
        torch_dtype="bfloat16",
        bos_token_id=7,
        eos_token_id=[9, 8],
    )

    assert config == ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=513,
        hidden_size=60,
        intermediate_size=70,
        num_layers=3,
        num_heads=14,
        num_kv_heads=2,
        head_dim=10,
        max_position_embeddings=77,
        rms_norm_eps=0.25,
        rope=RopeConfig(317.25, Llama3RopeScaling(8.0, 1.0, 4.0, 64)),
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        qk_norm=False,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
        bos_token_id=7,
        eos_token_ids=(8, 9),
        generation=GenerationDefaults(),
    )


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"qkv_bias": False, "o_bias": False, "qk_norm": False}),
        ("mistral", {"qkv_bias": False, "o_bias": False, "qk_norm": False}),
        ("qwen2", {"qkv_bias": True, "o_bias": False, "qk_norm": False, "head_dim": 16}),
        ("qwen3", {"qkv_bias": False, "o_bias": False, "qk_norm": True, "head_dim": 24}),
    ],
)
def test_families_differ_in_data(tmp_path: Path, family: str, expected: dict[str, Any]) -> None:
    config = dataclasses.asdict(_read(tmp_path, family))
    assert {key: config[key] for key in expected} == expected


def test_absent_keys_take_the_family_default(tmp_path: Path) -> None:
    llama = _read(
        tmp_path,
        num_key_value_heads=_ABSENT,
        head_dim=_ABSENT,
        tie_word_embeddings=_ABSENT,
        rope_parameters=_ABSENT,
        dtype=_ABSENT,
        bos_token_id=None,
        eos_token_id=_ABSENT,
    )

    assert (llama.num_kv_heads, llama.head_dim, llama.tie_word_embeddings) == (6, 16, False)
    assert (llama.rope, llama.dtype) == (RopeConfig(10000.0), torch.float32)
    assert (llama.bos_token_id, llama.eos_token_ids) == (None, ())
    assert _read(tmp_path, "qwen3", head_dim=_ABSENT).head_dim == 128


def test_linear_scaling_under_its_old_name(tmp_path: Path) -> None:
    config = _read(tmp_path, spelling="rope_theta", rope_scaling={"type": "linear", "factor": 4})
    assert config.rope == RopeConfig(10000.0, LinearRopeScaling(4.0))


def test_eos_ids_of_generation_config_win(tmp_path: Path) -> None:
    assert _read(tmp_path, generation={"eos_token_id": [3, 1, 3]}).eos_token_ids == (1, 3)
    assert _read(tmp_path, generation={"eos_token_id": 0}).eos_token_ids == (0,)
    assert _read(tmp_path, generation={"eos_token_id": None}).eos_token_ids == (1,)
    assert _read(tmp_path, generation={}).eos_token_ids == (1,)


def test_generation_defaults(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 50,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
    }

    assert _read(tmp_path).generation == GenerationDefaults(1.0, 1.0, 0, 0.0, 1.0)
    assert _read(tmp_path, generation=values).generation == GenerationDefaults(**values)
    assert _read(tmp_path, generation=values | {"do_sample": False}).generation.temperature == 0.0


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"architectures": ["GPT2LMHeadModel"]}),
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"hidden_act": _ABSENT}),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}),
        ("llama", {"dtype": "float8_e4m3fn"}),
        ("llama", {"dtype": 16}),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}),
        ("llama", {"partial_rotary_factor": 0.5}),
        ("mistral", {"sliding_window": 256}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 256}),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}),
    ],
)
def test_what_would_change_results_is_refused_by_name(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    with pytest.raises(UnsupportedModelError, match=r"^config\.json: ") as raised:
        _read(tmp_path, family, **changes)
    key = next(iter(changes)) if len(changes) == 1 else "sliding_window"
    assert key in raised.value.message


def test_unknown_architecture_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"GPT2LMHeadModel.*LlamaForCausalLM, Mistral.*Qwen3"):
        _read(tmp_path, architectures=["GPT2LMHeadModel"])


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 512}),
        ("mistral", {"sliding_window": _ABSENT}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 16}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": None}),
        ("qwen3", {"layer_types": ["full_attention"] * 2, "sliding_window": 16}),
    ],
)
def test_windows_as_wide_as_the_context_are_no_windows(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    _read(tmp_path, family, **changes)


def test_mistral_without_the_key_has_the_window_that_transformers_assumes(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="sliding_window"):
        _read(tmp_path, "mistral", sliding_window=_ABSENT, max_position_embeddings=4097)


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
    ],
)
@pytest.mark.parametrize("value", [0, -4, 2.0, "8", True, [8], 1 << 40])
def test_sizes_are_positive_whole_numbers(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(ModelLoadError, match=rf"^config\.json: {key}: "):
        _read(tmp_path, **{key: value})


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "rms_norm_eps"])
def test_missing_keys_are_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(ModelLoadError, match=rf"^config\.json: {key}: is missing"):
        _read(tmp_path, **{key: _ABSENT})


@pytest.mark.parametrize("value", [0, -1e-6, math.nan, math.inf, "1e-6", True])
def test_real_numbers_are_positive_and_finite(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ModelLoadError, match="rms_norm_eps"):
        _read(tmp_path, rms_norm_eps=value)
    with pytest.raises(ModelLoadError, match="rope_theta"):
        _read(tmp_path, spelling="rope_theta", rope_theta=value)
    with pytest.raises(ModelLoadError, match="factor"):
        _read(tmp_path, rope_parameters={"rope_type": "linear", "factor": value})


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"hidden_size": 100, "head_dim": None}, "hidden_size"),
        ({"head_dim": 15}, "head_dim"),
        ({"eos_token_id": 512}, "eos_token_id"),
        ({"eos_token_id": [1, -1]}, "eos_token_id"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"bos_token_id": [0, 1]}, "bos_token_id"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"architectures": []}, "architectures"),
        ({"architectures": _ABSENT}, "architectures"),
        ({"rope_parameters": 7}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ModelLoadError, match=rf"^config\.json: .*{key}"):
        _read(tmp_path, **changes)


@pytest.mark.parametrize(
    "values", [{"temperature": -1}, {"top_p": 0}, {"top_k": 1.5}, {"min_p": 2}, {"eos_token_id": 9999}]
)
def test_generation_config_is_checked_too(tmp_path: Path, values: dict[str, Any]) -> None:
    with pytest.raises(ModelLoadError, match=rf"^generation_config\.json: {next(iter(values))}"):
        _read(tmp_path, generation=values)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"7", b"\xff\xfe", b"[" * 100_000, b'{"hidden_size": ' + b"9" * 5000 + b"}"]
)
def test_files_that_are_no_json_object(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"^config\.json: "):
        read_config(tmp_path)


def test_missing_folder_and_file(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no such model folder"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(ModelLoadError, match=r"^config\.json: not in the model folder"):
        read_config(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelLoadError, match=r"^config\.json: cannot be read"):
        read_config(tmp_path)


def test_huge_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 32)
    with pytest.raises(ModelLoadError, match=r"^config\.json: larger than"):
        read_config(tmp_path)
