"""What a checkpoint's config.json and generation_config.json say, checked and in one spelling.

The one home of checkpoint quirks: which keys an architecture has, what they default to, and which
values would change the results in a way that is not implemented; those are refused by name. Knows
nothing of tensors but their data type. No state; any thread.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from photon_grpc.errors import ModelLoadError, UnsupportedModelError

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"

_MAX_JSON_BYTES = 4 << 20
# Far above any model there is; keeps products of two sizes in 64 bits and absurd files out.
_MAX_SIZE = 1 << 31

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class _Family:
    """How checkpoints of one architecture differ from Llama's."""

    qkv_bias: bool | None = False
    """None: the key `attention_bias` says so, for q, k, v and o alike."""
    mlp_bias_key: bool = False
    qk_norm: bool = False
    default_head_dim: int | None = None
    """Where config.json has none; None: hidden_size / num_attention_heads."""
    kv_heads_optional: bool = False
    """A config.json without `num_key_value_heads` means as many as there are query heads."""
    default_sliding_window: int | None = None
    """What Hugging Face assumes where config.json has no `sliding_window`."""
    windowed_by_flag: bool = False
    """`sliding_window` counts only where `use_sliding_window` is true."""


FAMILIES: Mapping[str, _Family] = {
    "LlamaForCausalLM": _Family(qkv_bias=None, mlp_bias_key=True, kv_heads_optional=True),
    "MistralForCausalLM": _Family(default_sliding_window=4096),
    "Qwen2ForCausalLM": _Family(qkv_bias=True, windowed_by_flag=True),
    "Qwen3ForCausalLM": _Family(qkv_bias=None, qk_norm=True, default_head_dim=128, windowed_by_flag=True),
}


@dataclass(frozen=True, slots=True)
class LinearRopeScaling:
    """All positions divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3RopeScaling:
    """Long wavelengths divided by `factor`, short ones kept, a smooth step between (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary base and its scaling, if any."""

    theta: float
    scaling: LinearRopeScaling | Llama3RopeScaling | None = None


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Sampling parameters that the checkpoint recommends; neutral where it says nothing."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only transformer, complete: differences between families are fields.

    `dtype` is what the checkpoint names, not necessarily what it is served in. `eos_token_ids` are
    those of generation_config.json, or of config.json where that has none.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    dtype: torch.dtype
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    generation: GenerationDefaults

    @property
    def q_size(self) -> int:
        """Features of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Features of all key heads, or of all value heads, together."""
        return self.num_kv_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Weights of the model, a tied head counted once."""
        hidden, inner = self.hidden_size, self.intermediate_size
        qkv = self.q_size + 2 * self.kv_size
        layer = hidden * (qkv + self.q_size + 3 * inner + 2)
        layer += self.qkv_bias * qkv + self.o_bias * hidden + self.mlp_bias * (2 * inner + hidden)
        layer += self.qk_norm * 2 * self.head_dim
        vocab_matrices = 1 if self.tie_word_embeddings else 2
        return self.num_layers * layer + vocab_matrices * self.vocab_size * hidden + hidden


def read_config(folder: Path) -> ModelConfig:
    """The configuration of the checkpoint in `folder`.

    Raises ModelLoadError for a file or key that is missing or malformed, UnsupportedModelError for one
    that asks for something else than is implemented.
    """
    if not folder.is_dir():
        raise ModelLoadError(f"{folder}: no such model folder")
    config = _Section(CONFIG_FILE, _read_json(folder / CONFIG_FILE))
    generation_path = folder / GENERATION_CONFIG_FILE
    generation = _Section(
        GENERATION_CONFIG_FILE, _read_json(generation_path) if generation_path.exists() else {}
    )
    architecture = _architecture(config)
    family = FAMILIES[architecture]
    _refuse_variants(config, family)

    num_heads = config.size("num_attention_heads")
    num_kv_heads = config.size("num_key_value_heads", default=num_heads if family.kv_heads_optional else None)
    if num_heads % num_kv_heads:
        raise config.error(
            "num_key_value_heads", f"{num_kv_heads} does not divide num_attention_heads ({num_heads})"
        )
    hidden_size = config.size("hidden_size")
    vocab_size = config.size("vocab_size")
    attention_bias = config.flag("attention_bias", default=False)
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=config.size("intermediate_size"),
        num_layers=config.size("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(config, family, hidden_size, num_heads),
        max_position_embeddings=config.size("max_position_embeddings"),
        rms_norm_eps=config.positive("rms_norm_eps"),
        rope=_rope(config),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        o_bias=attention_bias if family.qkv_bias is None else False,
        mlp_bias=family.mlp_bias_key and config.flag("mlp_bias", default=False),
        qk_norm=family.qk_norm,
        tie_word_embeddings=config.flag("tie_word_embeddings", default=False),
        dtype=_dtype(config),
        bos_token_id=config.token_id("bos_token_id", vocab_size),
        eos_token_ids=(
            generation.token_ids("eos_token_id", vocab_size) or config.token_ids("eos_token_id", vocab_size)
        ),
        generation=_generation_defaults(generation),
    )


class _Section:
    """A JSON object together with the name it is known by in error messages."""

    def __init__(self, name: str, values: Mapping[str, Any]) -> None:
        self.name = name
        self.values = values

    def error(self, key: str, problem: str) -> ModelLoadError:
        return ModelLoadError(f"{self.name}: {key}: {problem}")

    def unsupported(self, key: str, problem: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.name}: {key}: {problem}")

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def size(self, key: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self.get(key)
        if value is None:
            if default is None:
                raise self.error(key, "is missing")
            return default
        if type(value) is not int or not 0 < value <= _MAX_SIZE:
            raise self.error(key, f"{value!r} is not a positive whole number of reasonable size")
        return value

    def number(self, key: str, low: float, high: float, default: float) -> float:
        """A finite number from `low` to `high`."""
        value = self.get(key)
        if value is None:
            return default
        if type(value) not in (int, float) or not low <= value <= high:
            raise self.error(key, f"{value!r} is not a number from {low:g} to {high:g}")
        return float(value)

    def positive(self, key: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = self.get(key)
        if value is None:
            if default is None:
                raise self.error(key, "is missing")
            return default
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.error(key, f"{value!r} is not a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.error(key, f"{value!r} is neither true nor false")
        return value

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """One token id or a list of them, ascending and each once; empty where there are none."""
        value = self.get(key)
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        for token_id in ids:
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                raise self.error(key, f"{token_id!r} is not a token id below vocab_size ({vocab_size})")
        return tuple(sorted(set(ids)))

    def token_id(self, key: str, vocab_size: int) -> int | None:
        ids = self.token_ids(key, vocab_size)
        if len(ids) > 1:
            raise self.error(key, "more than one token id")
        return ids[0] if ids else None


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ModelLoadError(f"{path.name}: larger than {_MAX_JSON_BYTES} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelLoadError(f"{path.name}: not in the model folder") from None
    except OSError as error:
        raise ModelLoadError(f"{path.name}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path.name}: is no valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path.name}: is no JSON object")
    return content


def _architecture(config: _Section) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise config.error("architectures", f"{names!r} is not a list of one name")
    if names[0] not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise config.unsupported("architectures", f"{names[0]} is not implemented; known: {known}")
    return names[0]


def _refuse_variants(config: _Section, family: _Family) -> None:
    for key in ("quantization_config", "compression_config"):
        if config.get(key) is not None:
            raise config.unsupported(key, "quantised checkpoints are not implemented")
    activation = config.get("hidden_act")
    if activation != "silu":
        raise config.unsupported("hidden_act", f"{activation!r} is not implemented, only 'silu'")
    _refuse_sliding_window(config, family)


def _refuse_sliding_window(config: _Section, family: _Family) -> None:
    """A window is refused unless it is never narrower than the context."""
    window = config.values.get("sliding_window", family.default_sliding_window)
    if family.windowed_by_flag:
        layer_types = config.get("layer_types")
        if layer_types is not None:
            if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
                raise config.unsupported("layer_types", "only full_attention is implemented")
            return
        if not config.flag("use_sliding_window", default=False):
            return
    elif family.default_sliding_window is None:
        return
    if window is not None and config.size("sliding_window", window) < config.size("max_position_embeddings"):
        raise config.unsupported("sliding_window", "attention over a sliding window is not implemented")


def _head_dim(config: _Section, family: _Family, hidden_size: int, num_heads: int) -> int:
    if config.get("head_dim") is not None or family.default_head_dim is not None:
        head_dim = config.size("head_dim", default=family.default_head_dim)
    elif hidden_size % num_heads:
        raise config.error("hidden_size", f"{hidden_size} is not a multiple of num_attention_heads")
    else:
        head_dim = hidden_size // num_heads
    if head_dim % 2:
        raise config.error("head_dim", f"{head_dim} is odd; rotary embedding takes pairs")
    return head_dim


def _rope(config: _Section) -> RopeConfig:
    """Reads `rope_parameters`, or `rope_theta` with `rope_scaling`."""
    parameters = config.get("rope_parameters")
    if parameters is not None:
        section = _subsection(config, "rope_parameters", parameters)
        # A nested object is a parameter set per layer type.
        if any(isinstance(value, dict) for value in section.values.values()):
            raise config.unsupported("rope_parameters", "parameters per layer type are not implemented")
        theta = section.positive("rope_theta", default=config.positive("rope_theta", default=10000.0))
    else:
        theta = config.positive("rope_theta", default=10000.0)
        scaling = config.get("rope_scaling")
        section = _subsection(config, "rope_scaling", scaling if scaling is not None else {})
    for part in (config, section):
        if part.number("partial_rotary_factor", 0, 1, default=1.0) != 1:
            raise part.unsupported("partial_rotary_factor", "rotating a part of the head is not implemented")
    return RopeConfig(theta, _rope_scaling(config, section))


def _subsection(config: _Section, key: str, value: Any) -> _Section:
    if not isinstance(value, dict):
        raise config.error(key, "is no JSON object")
    return _Section(f"{config.name}: {key}", value)


def _rope_scaling(config: _Section, section: _Section) -> LinearRopeScaling | Llama3RopeScaling | None:
    # `type` is the older name of `rope_type`.
    kind = section.values.get("rope_type", section.values.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return LinearRopeScaling(section.positive("factor"))
    if kind != "llama3":
        raise section.unsupported("rope_type", f"{kind!r} is not implemented, only default, linear, llama3")
    # The key beside `rope_scaling` comes before the one inside it, as in Hugging Face transformers.
    original = "original_max_position_embeddings"
    holder = section if config.get(original) is None else config
    scaling = Llama3RopeScaling(
        factor=section.positive("factor"),
        low_freq_factor=section.positive("low_freq_factor"),
        high_freq_factor=section.positive("high_freq_factor"),
        original_max_position_embeddings=holder.size(original, config.size("max_position_embeddings")),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise section.error("high_freq_factor", "is not above low_freq_factor")
    return scaling


def _dtype(config: _Section) -> torch.dtype:
    key = "dtype" if config.get("dtype") is not None else "torch_dtype"
    name = config.get(key)
    if name is None:
        return torch.float32
    if not isinstance(name, str) or name not in _DTYPES:
        raise config.unsupported(key, f"{name!r} is not implemented, only {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _generation_defaults(section: _Section) -> GenerationDefaults:
    """Sampling defaults; a checkpoint that says `do_sample: false` is greedy by default."""
    neutral = GenerationDefaults()
    top_k = section.get("top_k")
    if top_k is not None and (type(top_k) is not int or not 0 <= top_k <= _MAX_SIZE):
        raise section.error("top_k", f"{top_k!r} is not a whole number from 0")
    greedy = section.get("do_sample") is not None and not section.flag("do_sample", default=True)
    return GenerationDefaults(
        temperature=0.0 if greedy else section.number("temperature", 0, 100, neutral.temperature),
        top_p=section.number("top_p", 1e-6, 1, neutral.top_p),
        top_k=neutral.top_k if top_k is None else top_k,
        min_p=section.number("min_p", 0, 1, neutral.min_p),
        repetition_penalty=section.number("repetition_penalty", 1e-3, 100, neutral.repetition_penalty),
    )
