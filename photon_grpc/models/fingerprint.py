"""A short name for exactly this model: config, weights manifest and tokenizer.

Reading all weights would take longer than loading them, so of each safetensors file the first and the
last megabyte and the size count: the header with all names and shapes, and enough weights that no
two trainings agree on them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

_WHOLE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
_HEADER_BYTES = 1 << 20


def fingerprint(folder: Path, load_format: str = "safetensors") -> str:
    """16 hex digits over the model folder's files; equal folders give equal names.

    Weights that do not come from the folder give it another name.
    """
    digest = hashlib.sha256()
    for name in _WHOLE_FILES:
        path = folder / name
        if path.is_file():
            digest.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    if load_format != "safetensors":
        digest.update(load_format.encode() + b"\0")
        return digest.hexdigest()[:16]
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_HEADER_BYTES)
            file.seek(max(0, size - _HEADER_BYTES))
            tail = file.read(_HEADER_BYTES)
        digest.update(path.name.encode() + b"\0" + size.to_bytes(8, "little"))
        digest.update(hashlib.sha256(head).digest() + hashlib.sha256(tail).digest())
    return digest.hexdigest()[:16]
