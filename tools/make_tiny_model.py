#!/usr/bin/env python3
"""Write a small model folder with random weights, in the layout of a Hugging Face checkpoint.

For tests and for trying the server without a download. The folder holds config.json (in either of the
two spellings in use), generation_config.json, safetensors (one file, or shards with an index) and,
unless told otherwise, a byte-level BPE tokenizer trained on a few paragraphs below, with a chat
template. The same arguments write the same weights.

Random weights are scaled so that the layers outweigh the embedding in the residual stream. Otherwise a
tied head answers every token with itself, and a test over such output would prove little.

Imports nothing of photon_grpc: what it writes is independent evidence for the loader.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

BOS, EOS, IM_START, IM_END = "<|bos|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (BOS, EOS, IM_START, IM_END)

CHAT_TEMPLATE = (
    "{{ bos_token if bos_token else '' }}"
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% if not (loop.last and continue_final_message) %}<|im_end|>\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

CORPUS = (
    "The river came down from the hills in the spring, brown and quick, and the people of the town "
    "stood on the bridge to watch it pass. When the water was high they talked of other years.",
    "def read_lines(path, encoding='utf-8'):\n    with open(path, encoding=encoding) as file:\n"
    "        for line in file:\n            yield line.rstrip('\\n')\n",
    "class Counter:\n    def __init__(self, start=0):\n        self.value = start\n\n"
    "    def next(self):\n        self.value += 1\n        return self.value\n",
    "A server takes requests, puts them into a queue, and answers each of them in turn. If there are "
    "too many requests the server says so, and the client comes back later.",
    "Die Brücke über den Fluß ist alt. Où est la gare? El tren llega mañana. Привет, мир. 你好，世界。",
    "for index, value in enumerate(values):\n    if value is None:\n        continue\n"
    "    total = total + value * weights[index]\nreturn total / len(values)\n",
    "0 1 2 3 4 5 6 7 8 9 10 11 12 100 1000 3.14 -1 1e-5 [1, 2, 3] {'a': 1, 'b': 2} 🙂 naïve café",
)

FAMILIES = ("llama", "llama-untied", "llama3", "mistral", "qwen2", "qwen3")
SPELLINGS = ("rope_parameters", "rope_theta")

_ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "llama-untied": ("LlamaForCausalLM", "llama"),
    "llama3": ("LlamaForCausalLM", "llama"),
    "mistral": ("MistralForCausalLM", "mistral"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
}

# A short original context puts the knees of the llama3 curve inside what a test can reach.
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def make_config(family: str, spelling: str = "rope_parameters", **overrides: Any) -> dict[str, Any]:
    """config.json of a tiny model of `family`. `overrides` replace or add keys.

    The rotary base is given as `rope_theta` and, if any, its scaling as `rope_scaling`, whatever the
    spelling; the data type as `dtype`.
    """
    if family not in _ARCHITECTURES:
        raise ValueError(f"unknown family {family!r}; known: {', '.join(FAMILIES)}")
    if spelling not in SPELLINGS:
        raise ValueError(f"unknown spelling {spelling!r}; known: {', '.join(SPELLINGS)}")
    architecture, model_type = _ARCHITECTURES[family]
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": 96,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "vocab_size": 512,
        "max_position_embeddings": 512,
        "initializer_range": 0.02,
        "tie_word_embeddings": family not in ("llama-untied", "mistral"),
        "use_cache": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "rope_theta": 10000.0,
        "rope_scaling": dict(_LLAMA3_ROPE) if family == "llama3" else None,
        "dtype": "float32",
    }
    if model_type == "llama":
        config |= {"attention_bias": False, "mlp_bias": False}
    elif model_type == "mistral":
        config |= {"sliding_window": None}
    elif model_type == "qwen2":
        # Qwen2 has no head_dim key: heads divide the hidden size.
        del config["head_dim"]
        config |= {"use_sliding_window": False, "rms_norm_eps": 1e-6}
    elif model_type == "qwen3":
        config |= {"attention_bias": False, "use_sliding_window": False, "rms_norm_eps": 1e-6}
    config |= overrides

    theta, scaling, dtype = config.pop("rope_theta"), config.pop("rope_scaling"), config.pop("dtype")
    if spelling == "rope_parameters":
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": theta} | (scaling or {})
        config["dtype"] = dtype
    else:
        config["rope_theta"] = theta
        config["rope_scaling"] = scaling
        config["torch_dtype"] = dtype
    return config


def make_weights(config: Mapping[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors for `config`, under the names that Hugging Face checkpoints use."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    qwen2, qwen3 = config["model_type"] == "qwen2", config["model_type"] == "qwen3"

    def normal(*shape: int, std: float, mean: float = 0.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * std + mean).to(dtype)

    weights: dict[str, torch.Tensor] = {}

    def linear(name: str, rows: int, columns: int, gain: float, bias: bool) -> None:
        weights[f"{name}.weight"] = normal(rows, columns, std=gain / math.sqrt(columns))
        if bias:
            weights[f"{name}.bias"] = normal(rows, std=0.1)

    def norm(name: str, size: int) -> None:
        weights[f"{name}.weight"] = normal(size, std=0.1, mean=1.0)

    attention_bias = bool(config.get("attention_bias", False))
    mlp_bias = bool(config.get("mlp_bias", False))
    weights["model.embed_tokens.weight"] = normal(config["vocab_size"], hidden, std=0.2)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        norm(f"{prefix}.input_layernorm", hidden)
        linear(f"{prefix}.self_attn.q_proj", heads * head_dim, hidden, 1.0, attention_bias or qwen2)
        linear(f"{prefix}.self_attn.k_proj", kv_heads * head_dim, hidden, 1.0, attention_bias or qwen2)
        linear(f"{prefix}.self_attn.v_proj", kv_heads * head_dim, hidden, 1.5, attention_bias or qwen2)
        linear(f"{prefix}.self_attn.o_proj", hidden, heads * head_dim, 2.0, attention_bias)
        if qwen3:
            norm(f"{prefix}.self_attn.q_norm", head_dim)
            norm(f"{prefix}.self_attn.k_norm", head_dim)
        norm(f"{prefix}.post_attention_layernorm", hidden)
        linear(f"{prefix}.mlp.gate_proj", inner, hidden, 1.5, mlp_bias)
        linear(f"{prefix}.mlp.up_proj", inner, hidden, 1.5, mlp_bias)
        linear(f"{prefix}.mlp.down_proj", hidden, inner, 2.0, mlp_bias)
    norm("model.norm", hidden)
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = normal(config["vocab_size"], hidden, std=0.2)
    return weights


def write_weights(folder: Path, weights: Mapping[str, torch.Tensor], shards: int = 1) -> None:
    """Save `weights` as model.safetensors, or as `shards` files and their index."""
    if shards == 1:
        save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(weights)
    per_shard = math.ceil(len(names) / shards)
    weight_map: dict[str, str] = {}
    for number, start in enumerate(range(0, len(names), per_shard), start=1):
        file_name = f"model-{number:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name] for name in names[start : start + per_shard]}
        save_file(part, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    total = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def write_tokenizer(folder: Path, vocab_size: int, add_bos: bool) -> None:
    """Train and save a byte-level BPE tokenizer of at most `vocab_size` tokens.

    All 256 bytes are in the vocabulary, so any text encodes. Ids 0 to 3 are `SPECIAL_TOKENS`. With
    `add_bos` plain text is encoded with a BOS in front, as Llama's tokenizers do.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A",
            pair=f"{BOS} $A {BOS} $B",
            special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
        )
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS if add_bos else None,
            "eos_token": EOS,
            "pad_token": EOS,
            "additional_special_tokens": [IM_START, IM_END],
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1_000_000,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def write_model(
    folder: Path,
    family: str = "llama",
    *,
    spelling: str = "rope_parameters",
    shards: int = 1,
    tokenizer: bool = True,
    seed: int = 0,
    generation_config: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Path:
    """Write a whole model folder and return it. `overrides` are keys of config.json, as in `make_config`.

    generation_config.json names both EOS and IM_END as end tokens, config.json EOS alone, as instruct
    checkpoints do.
    """
    config = make_config(family, spelling, **overrides)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", config)
    generation: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": [1, 3]}
    _write_json(folder / "generation_config.json", generation | dict(generation_config or {}))
    write_weights(folder, make_weights(config, seed), shards)
    if tokenizer:
        write_tokenizer(folder, config["vocab_size"], add_bos=not family.startswith("qwen"))
    return folder


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a small model folder with random weights.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", choices=FAMILIES, default="llama")
    parser.add_argument("--spelling", choices=SPELLINGS, default="rope_parameters", help="of config.json")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-tokenizer", action="store_true")
    parser.add_argument(
        "--set",
        metavar="KEY=JSON",
        action="append",
        default=[],
        help="a key of config.json, such as hidden_size=320; may be repeated",
    )
    arguments = parser.parse_args()
    overrides: dict[str, Any] = {}
    for item in arguments.set:
        key, separator, value = item.partition("=")
        if not separator:
            parser.error(f"--set {item}: expected KEY=JSON")
        try:
            overrides[key] = json.loads(value)
        except json.JSONDecodeError:
            overrides[key] = value
    write_model(
        arguments.folder,
        arguments.family,
        spelling=arguments.spelling,
        shards=arguments.shards,
        tokenizer=not arguments.no_tokenizer,
        seed=arguments.seed,
        **overrides,
    )


if __name__ == "__main__":
    main()
