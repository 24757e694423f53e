"""Text to token ids and back, with the tokenizer of the model folder.

The folder is opened by transformers' `AutoTokenizer`, which is the reference for every quirk of
`tokenizer_config.json` (which BOS or EOS is added, which tokens are special, which template is the
default); encoding and decoding then go straight to the `tokenizers` object inside, which is immutable
after loading and safe to use from several threads. Nothing is downloaded and no code of the folder is
run.

Text that contains the spelling of a special token becomes that special token, as in Hugging Face.

Must not know requests, torch or the transport. Loaded at start-up; used from the text pool.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from photon_grpc.errors import InvalidRequestError, ModelLoadError
from photon_grpc.frontend.detokenizer import DecodeTable

TOKENIZER_FILE = "tokenizer.json"

# Several times the largest seen in the supported families (Gemma's tokenizer.json has 33 MB); parsing
# needs a multiple of the file's size in memory.
MAX_FILE_BYTES = {
    TOKENIZER_FILE: 128 << 20,
    "tokenizer_config.json": 16 << 20,
    "special_tokens_map.json": 1 << 20,
    "added_tokens.json": 16 << 20,
    "chat_template.jinja": 1 << 20,
    "chat_template.json": 1 << 20,
    "config.json": 16 << 20,
}


class Tokenizer:
    """One model's tokenizer. Every method may be called from any thread."""

    def __init__(
        self,
        backend: Backend,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | None = None,
    ) -> None:
        """Wrap a loaded `tokenizers` object; `load` is the usual way in.

        `special_tokens` maps names such as `bos_token` to their text, for chat templates. Raises
        UnsupportedModelError when the decoder cannot be run incrementally.
        """
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.chat_template = chat_template
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.decode_table = DecodeTable(backend)

    @classmethod
    def load(cls, folder: str | Path, *, spare_torch: bool = False) -> Tokenizer:
        """Load from a model folder. Raises ModelLoadError naming the file that is missing or damaged.

        With `spare_torch` transformers finds no torch, whose import for it, and of what it wants beside it,
        takes seconds. For a process that does not use transformers' models afterwards: transformers remembers
        what it has not found. No other thread may be importing torch meanwhile.
        """
        folder = Path(folder)
        if not (folder / TOKENIZER_FILE).is_file():
            raise ModelLoadError(f"{folder / TOKENIZER_FILE}: no such file")
        for name, limit in MAX_FILE_BYTES.items():
            path = folder / name
            if path.is_file() and (size := path.stat().st_size) > limit:
                raise ModelLoadError(f"{path}: {size} bytes, at most {limit} are read")
        try:
            with _hidden_torch() if spare_torch else nullcontext():
                # Here and not above: what does not tokenise need not wait for transformers.
                from transformers import AutoTokenizer

                loaded = AutoTokenizer.from_pretrained(
                    str(folder), local_files_only=True, trust_remote_code=False
                )
            backend = loaded.backend_tokenizer
        except Exception as error:
            # The libraries raise whatever a damaged file leads them to, bare Exception included.
            raise ModelLoadError(f"{folder}: the tokenizer cannot be loaded: {error}") from error
        return cls(
            backend,
            special_tokens=loaded.special_tokens_map,
            chat_template=_default_template(loaded.chat_template),
        )

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that `skip_special_tokens` leaves out."""
        return self.decode_table.special_ids

    def encode(self, text: str, *, add_special_tokens: bool = True, field: str = "spec.text") -> list[int]:
        """The ids of `text`; with `add_special_tokens`, BOS and the like where the model's tokenizer
        adds them. Raises InvalidRequestError on `field` for text that is not Unicode (lone surrogates).
        """
        _check_unicode(text, field)
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_with_offsets(
        self, text: str, *, add_special_tokens: bool = True, field: str = "spec.text"
    ) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
        """Like `encode`, with the (start, end) of each token in UTF-8 bytes of `text`.

        Tokens that are parts of one character each cover all of it; added tokens cover (0, 0).
        """
        _check_unicode(text, field)
        encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        if text.isascii():
            return tuple(encoding.ids), tuple(encoding.offsets)
        byte_at = list(accumulate((len(char.encode()) for char in text), initial=0))
        offsets = tuple((byte_at[start], byte_at[end]) for start, end in encoding.offsets)
        return tuple(encoding.ids), offsets

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """All of `token_ids` at once. Ids without a token are dropped; they must not be negative."""
        return str(self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens))


@contextmanager
def _hidden_torch() -> Iterator[None]:
    """Keep transformers from importing torch, which it does for its models wherever torch is installed."""
    if "torch" in sys.modules:
        yield
        return
    advice = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(advice)
    # It would warn that without torch there are no models.
    os.environ[advice] = "1"
    sys.modules["torch"] = None  # type: ignore[assignment]  # what `import` documents for "not there"
    try:
        yield
    finally:
        del sys.modules["torch"]
        if before is None:
            del os.environ[advice]
        else:
            os.environ[advice] = before


def _default_template(template: Any) -> str | None:
    """transformers gives a string, or a dict by name when the folder has several."""
    if isinstance(template, Mapping):
        template = template.get("default")
    return template if isinstance(template, str) else None


def _check_unicode(text: str, field: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidRequestError.of(field, "is not valid Unicode (a lone surrogate)") from None
