"""Tiny random-weight model folders for tests; `tools/make_tiny_model.py` says what is in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools.make_tiny_model import (
    BOS,
    CHAT_TEMPLATE,
    EOS,
    FAMILIES,
    IM_END,
    IM_START,
    make_config,
    make_weights,
    write_model,
    write_weights,
)

__all__ = [
    "BOS",
    "CHAT_TEMPLATE",
    "EOS",
    "FAMILIES",
    "IM_END",
    "IM_START",
    "make_config",
    "make_weights",
    "tiny_model_folder",
    "write_weights",
]


def tiny_model_folder(folder: Path, family: str = "llama", **overrides: Any) -> Path:
    """A model folder under `folder`, named after the family: weights, configs, tokenizer.

    `overrides` are keys of config.json (`hidden_size=96`, `rope_theta=5e5`, `dtype="bfloat16"`), or the
    keyword arguments of `write_model` (`spelling`, `shards`, `tokenizer`, `seed`,
    `generation_config`). Vocabulary 512; id 0 is BOS, 1 EOS, 2 and 3 the chat markers; EOS ids 1 and 3.
    """
    return write_model(folder / family, family, **overrides)
