"""Token ids to text, a few tokens at a time, equal in sum to decoding all of them at once.

"All at once" is `tokenizers.Tokenizer.decode(output_ids, skip_special_tokens)`: the output on its own,
not as the continuation of the prompt, so a tokenizer of the SentencePiece kind drops the space before
the first word exactly as Hugging Face does. Ids without a token are dropped, as there.

The decoder that `tokenizer.json` describes is run as a chain of small incremental stages instead of
decoding windows of ids again and again: every id is looked at once, whatever the length of the output.
What the next token may still change is held back:

* byte-level BPE (Llama 3, Qwen): the bytes of an unfinished UTF-8 character, at most three;
* byte fallback (Llama 2): a run of byte tokens until a token of another kind ends it, because one
  invalid byte turns every byte of its run into U+FFFD.

Bytes that can never complete a character become U+FFFD, one per maximal subpart (Unicode 15, 3.9).

Must not know stop strings or requests. A `Detokenizer` belongs to one completion and is not shared;
a `DecodeTable` belongs to the model and may be used from any thread.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer as Backend

from photon_grpc.errors import UnsupportedModelError


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's reversible map: each byte stands as one printable character in a token's name."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    alphabet.update({chr(0x100 + n): byte for n, byte in enumerate(others)})
    return alphabet


_BYTE_OF = _byte_alphabet()


def _byte_level(piece: str) -> bytes:
    # An added token need not be spelt in the byte alphabet; the whole piece is then plain text.
    try:
        return bytes([_BYTE_OF[char] for char in piece])
    except KeyError:
        return piece.encode()


class _Stage(Protocol):
    """One step of a decoder: pieces in, pieces out, some of them later."""

    def push(self, pieces: list[str]) -> list[str]: ...

    def flush(self) -> list[str]: ...


class _Stateless:
    def flush(self) -> list[str]:
        return []


class _ByteLevel:
    """Joins the pieces' bytes and decodes UTF-8."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, pieces: list[str]) -> list[str]:
        return [self._utf8.decode(b"".join(map(_byte_level, pieces)))]

    def flush(self) -> list[str]:
        return [self._utf8.decode(b"", final=True)]


class _Replace(_Stateless):
    def __init__(self, old: str, new: str) -> None:
        self._old, self._new = old, new

    def push(self, pieces: list[str]) -> list[str]:
        return [piece.replace(self._old, self._new) for piece in pieces]


class _Metaspace(_Stateless):
    """Replacement characters become spaces, except those of the first piece when one was prepended."""

    def __init__(self, replacement: str, prepended: bool) -> None:
        self._replacement = replacement
        self._at_start = prepended

    def push(self, pieces: list[str]) -> list[str]:
        out = []
        for piece in pieces:
            out.append(piece.replace(self._replacement, "" if self._at_start else " "))
            self._at_start = False
        return out


class _ByteFallback:
    """Runs of `<0xNN>` become characters; a run that is not UTF-8 becomes one U+FFFD per byte."""

    def __init__(self) -> None:
        self._run = bytearray()

    def push(self, pieces: list[str]) -> list[str]:
        out = []
        for piece in pieces:
            byte = self._byte(piece)
            if byte is None:
                out += self.flush()
                out.append(piece)
            else:
                self._run.append(byte)
        return out

    def flush(self) -> list[str]:
        if not self._run:
            return []
        try:
            text = self._run.decode()
        except UnicodeDecodeError:
            text = "\ufffd" * len(self._run)
        self._run.clear()
        return [text]

    @staticmethod
    def _byte(piece: str) -> int | None:
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            try:
                return int(piece[3:5], 16)
            except ValueError:
                return None
        return None


class _Strip(_Stateless):
    """Drops up to `count` leading `char`s: of the whole text once it is fused, else of each piece."""

    def __init__(self, char: str, count: int, fused: bool) -> None:
        self._char, self._count, self._fused = char, count, fused
        self._left = count

    def push(self, pieces: list[str]) -> list[str]:
        return [self._strip(piece) for piece in pieces]

    def _strip(self, piece: str) -> str:
        if not self._fused:
            self._left = self._count
        while self._left and piece.startswith(self._char):
            piece = piece[1:]
            self._left -= 1
        if piece:
            self._left = 0
        return piece


class _Join(_Stateless):
    """Without a decoder, pieces are joined by single spaces."""

    def __init__(self) -> None:
        self._separator = ""

    def push(self, pieces: list[str]) -> list[str]:
        out = []
        for piece in pieces:
            out.append(self._separator + piece)
            self._separator = " "
        return out


def _flatten(decoder: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    if decoder["type"] == "Sequence":
        for part in decoder["decoders"]:
            yield from _flatten(part)
    else:
        yield decoder


def _stages(steps: Sequence[Mapping[str, Any]] | None) -> list[_Stage]:
    """The chain for a decoder of `tokenizer.json`. Raises UnsupportedModelError for any other."""
    if steps is None:
        return [_Join()]
    stages: list[_Stage] = []
    fused = False
    for step in steps:
        match step:
            case {"type": "Fuse"}:
                fused = True
            case {"type": "ByteLevel"} if not fused:
                stages.append(_ByteLevel())
                fused = True
            case {"type": "ByteFallback"} if not fused:
                stages.append(_ByteFallback())
            case {"type": "Metaspace", "replacement": str(mark), "prepend_scheme": scheme} if not fused:
                stages.append(_Metaspace(mark, prepended=scheme != "never"))
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if len(
                old
            ) == 1 or (old and not fused):
                stages.append(_Replace(old, new))
            case {"type": "Strip", "content": str(char), "start": int(count), "stop": 0}:
                stages.append(_Strip(char, count, fused))
            case _:
                raise UnsupportedModelError(
                    f"tokenizer.json: a decoder with {json.dumps(step)} at this place cannot be streamed; "
                    "supported are ByteLevel, ByteFallback, Metaspace, Replace of a string, Fuse and "
                    "Strip from the left"
                )
    return stages


class DecodeTable:
    """What decoding needs to know of a tokenizer; built once per model.

    Raises UnsupportedModelError when the tokenizer's decoder cannot be run incrementally.
    """

    def __init__(self, backend: Backend) -> None:
        decoder = json.loads(backend.to_str())["decoder"]
        self._backend = backend
        self._steps = None if decoder is None else list(_flatten(decoder))
        self._bytes: dict[int, bytes] = {}
        self.special_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self.is_byte_level = self._steps is not None and [s["type"] for s in self._steps] == ["ByteLevel"]
        self.stages()

    def stages(self) -> list[_Stage]:
        """A fresh chain for one completion."""
        return _stages(self._steps)

    def piece(self, token_id: int) -> str | None:
        """The token's name in the vocabulary."""
        return self._backend.id_to_token(token_id)

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes a byte-level token stands for; none for an id without a token."""
        found = self._bytes.get(token_id)
        if found is None:
            found = _byte_level(self.piece(token_id) or "")
            # Two threads may both get here; they store equal values.
            self._bytes[token_id] = found
        return found


class HasDecodeTable(Protocol):
    """A tokenizer, as far as detokenizing goes."""

    @property
    def decode_table(self) -> DecodeTable: ...


class Detokenizer:
    """The text of one completion, incrementally.

    The concatenation of every `push` and the final `flush` is the decoding of all ids at once, and no
    part of it ends inside a character.
    """

    __slots__ = ("_skipped", "_stages", "_table", "_utf8")

    def __init__(self, tokenizer: HasDecodeTable, skip_special_tokens: bool = True) -> None:
        self._table = tokenizer.decode_table
        self._skipped: frozenset[int] = self._table.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace") if self._table.is_byte_level else None
        self._stages = [] if self._utf8 is not None else self._table.stages()

    def push(self, token_ids: Iterable[int]) -> str:
        """The new text that these tokens settle; may be empty."""
        kept = [token_id for token_id in token_ids if token_id not in self._skipped]
        table = self._table
        if self._utf8 is not None:
            return self._utf8.decode(b"".join([table.bytes_of(token_id) for token_id in kept]))
        pieces = [piece for token_id in kept if (piece := table.piece(token_id)) is not None]
        for stage in self._stages:
            pieces = stage.push(pieces)
        return "".join(pieces)

    def flush(self) -> str:
        """What was held back, when nothing follows. Call it once, at the end."""
        if self._utf8 is not None:
            return self._utf8.decode(b"", final=True)
        pieces: list[str] = []
        for stage in self._stages:
            pieces = stage.push(pieces) + stage.flush()
        return "".join(pieces)
