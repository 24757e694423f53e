"""Model folders without weights: the configurations of `tools/bench/models`, and a tokenizer made here.

A server started on one with `model.load_format = random` has the speed of the real model. Its tokenizer
knows far fewer tokens than the model, so benchmarks send and receive token ids; text of ids beyond it is
empty.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tools.make_tiny_model import write_tokenizer

__all__ = ["FIRST_ID", "config_folder", "names", "servable_folder", "vocab_size"]

FIRST_ID = 4
"""Below it are the special tokens of the tokenizer."""

_MODELS = Path(__file__).resolve().parent / "models"
_TOKENIZER_SIZE = 512


def names() -> list[str]:
    """The configurations that are here."""
    return sorted(path.parent.name for path in _MODELS.glob("*/config.json"))


def config_folder(model: str) -> Path:
    """The folder with the config.json of a named configuration, or of a folder given by its path.

    Raises FileNotFoundError.
    """
    folder = _MODELS / model
    if not (folder / "config.json").is_file():
        folder = Path(model)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{model}: neither one of {', '.join(names())} nor a folder with config.json")
    return folder


def vocab_size(model: str) -> int:
    """Of the model, not of the tokenizer."""
    return int(json.loads((config_folder(model) / "config.json").read_text())["vocab_size"])


@contextmanager
def servable_folder(model: str) -> Iterator[Path]:
    """A temporary folder of the model's name that a server takes with `model.load_format = random`."""
    source = config_folder(model)
    with tempfile.TemporaryDirectory(prefix="photon-bench-") as parent:
        folder = Path(parent) / source.name
        folder.mkdir()
        shutil.copy(source / "config.json", folder)
        write_tokenizer(folder, min(_TOKENIZER_SIZE, vocab_size(model)), add_bos=False)
        yield folder
