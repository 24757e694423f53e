"""Incremental decoding against `tokenizers.Tokenizer.decode` of all ids at once."""

from __future__ import annotations

from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from photon_grpc.errors import UnsupportedModelError
from photon_grpc.frontend.detokenizer import DecodeTable, Detokenizer
from photon_grpc.frontend.tokenizer import Tokenizer
from tests.support.text_models import CORPUS, byte_fallback_bpe, byte_level_bpe


@lru_cache
def _backend(kind: str) -> Backend:
    if kind == "byte_level":
        return byte_level_bpe()
    backend = byte_fallback_bpe()
    decoder = {
        "byte_fallback": backend.decoder,
        "metaspace": decoders.Metaspace(),
        "metaspace_never": decoders.Metaspace(prepend_scheme="never"),
        "fallback_metaspace": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
        "gemma": decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
        "strip_each": decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 2, 0)]),
        "none": None,
    }[kind]
    if decoder is None:
        backend = Backend(models.BPE(vocab={"<s>": 0, "a": 1, "b▁": 2, "": 3}, merges=[]))
        backend.add_special_tokens(["<s>"])
    else:
        backend.decoder = decoder
    return backend


@lru_cache
def _tokenizer(kind: str) -> Tokenizer:
    return Tokenizer(_backend(kind))


KINDS = (
    "byte_level",
    "byte_fallback",
    "metaspace",
    "metaspace_never",
    "fallback_metaspace",
    "gemma",
    "strip_each",
    "none",
)


def _assert_equal_to_whole(kind: str, ids: list[int], cuts: list[int], skip: bool) -> None:
    detokenizer = Detokenizer(_tokenizer(kind), skip)
    parts, start = [], 0
    for size in [*cuts, len(ids)]:
        parts.append(detokenizer.push(ids[start : start + size]))
        start += size
    assert "".join(parts) + detokenizer.flush() == _backend(kind).decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_random_ids(kind: str, data: st.DataObject, skip: bool) -> None:
    # Ids past the end of the vocabulary have no token; a model's head is often padded that far.
    top = _backend(kind).get_vocab_size() + 2
    ids = data.draw(st.lists(st.one_of(st.integers(0, min(260, top)), st.integers(0, top)), max_size=24))
    cuts = data.draw(st.lists(st.integers(0, 3), max_size=24))
    _assert_equal_to_whole(kind, ids, cuts, skip)


_HARD = [
    "中",
    "é",
    "😀",
    "👨‍👩‍👧",
    " ",
    "  ",
    "a",
    "▁",
    "<0x41>",
    "<s>",
    "<|turn|>",
    "<tool 工具>",
    "\n",
    "\ufffd",
]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@settings(max_examples=150, deadline=None)
@given(text=st.one_of(st.text(max_size=30), st.lists(st.sampled_from(_HARD), max_size=12).map("".join)))
def test_encoded_text_token_by_token(kind: str, text: str) -> None:
    ids = _backend(kind).encode(text).ids
    _assert_equal_to_whole(kind, ids, [1] * len(ids), skip=True)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=16))
def test_arbitrary_bytes_through_byte_level_tokens(data: bytes) -> None:
    """Invalid UTF-8 of every kind: overlong forms, surrogates, truncated characters."""
    table = DecodeTable(_backend("byte_level"))
    id_of = {table.bytes_of(token_id): token_id for token_id in range(260) if token_id > 2}
    ids = [id_of[bytes([byte])] for byte in data]
    _assert_equal_to_whole("byte_level", ids, [1] * len(ids), skip=True)
    assert _backend("byte_level").decode(ids) == data.decode(errors="replace")


@pytest.mark.parametrize("text", CORPUS)
@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_valid_text_never_shows_a_broken_character(kind: str, text: str) -> None:
    tokenizer = _tokenizer(kind)
    detokenizer = Detokenizer(tokenizer)
    shown = ""
    for token_id in tokenizer.encode(text):
        delta = detokenizer.push([token_id])
        assert "\ufffd" not in delta
        shown += delta
        assert text.startswith(shown)
    assert shown + detokenizer.flush() == text


def test_byte_level_text_lags_by_less_than_a_character() -> None:
    tokenizer = _tokenizer("byte_level")
    detokenizer = Detokenizer(tokenizer)
    shown = b""
    total = b""
    for token_id in tokenizer.encode(CORPUS[10]):
        total += b"" if token_id in tokenizer.special_ids else tokenizer.decode_table.bytes_of(token_id)
        shown += detokenizer.push([token_id]).encode()
        assert len(total) - len(shown) <= 3


def test_fault_09_a_truncated_character_is_flushed_as_one_replacement() -> None:
    tokenizer = _tokenizer("byte_level")
    detokenizer = Detokenizer(tokenizer)
    *most, _ = tokenizer.encode("😀", add_special_tokens=False)
    assert len(most) == 3
    assert [detokenizer.push([token_id]) for token_id in most] == ["", "", ""]
    assert detokenizer.flush() == "\ufffd"


def test_the_space_before_the_first_word_goes_and_later_ones_stay() -> None:
    tokenizer = _tokenizer("byte_fallback")
    ids = tokenizer.encode("the fox  the fox", add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer)
    # A skipped special token in front must not use up the one space that is stripped.
    text = detokenizer.push([2]) + "".join(detokenizer.push([token_id]) for token_id in ids)
    assert text == "the fox  the fox"


def test_skipping_special_tokens_is_optional() -> None:
    tokenizer = _tokenizer("byte_level")
    ids = tokenizer.encode("a<|turn|>b")
    assert Detokenizer(tokenizer, skip_special_tokens=True).push(ids) == "ab"
    assert Detokenizer(tokenizer, skip_special_tokens=False).push(ids) == "<|begin|>a<|turn|>b"


def test_each_id_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear work: ids resolved equal ids pushed, however long the output, also in one long byte run."""
    for kind in ("byte_level", "byte_fallback"):
        tokenizer = _tokenizer(kind)
        seen: list[int] = []
        name = "bytes_of" if kind == "byte_level" else "piece"
        original = getattr(DecodeTable, name)

        def counting(self: DecodeTable, token_id: int, _original=original, _seen=seen):  # type: ignore[no-untyped-def]
            _seen.append(token_id)
            return _original(self, token_id)

        monkeypatch.setattr(DecodeTable, name, counting)
        ids = tokenizer.encode("नमस्ते" * 200, add_special_tokens=False)
        detokenizer = Detokenizer(tokenizer)
        for token_id in ids:
            detokenizer.push([token_id])
        assert seen == ids


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.WordPiece(),
        decoders.CTC(),
        decoders.Sequence([decoders.Fuse(), decoders.ByteFallback()]),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
    ],
)
def test_a_decoder_that_cannot_be_streamed_is_refused_at_load(decoder: decoders.Decoder) -> None:
    backend = byte_fallback_bpe()
    backend.decoder = decoder
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.json"):
        Tokenizer(backend)
