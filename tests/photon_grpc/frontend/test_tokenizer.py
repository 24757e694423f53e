"""The tokenizer against transformers, and its refusals."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tokenizers import normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from photon_grpc.errors import InvalidRequestError, ModelLoadError
from photon_grpc.frontend import tokenizer as module
from photon_grpc.frontend.detokenizer import Detokenizer
from photon_grpc.frontend.tokenizer import Tokenizer
from tests.support.text_models import CORPUS, byte_fallback_bpe, byte_level_bpe, write_text_model
from tests.support.tiny_model import tiny_model_folder

TRICKY = (
    *CORPUS,
    "",
    " ",
    "a<|turn|>b <|begin|>",
    "<s>x</s>",
    " leading and trailing ",
    "<Ä><tool 工具>",
    "\x00\x01\x7f",
    "\U0010ffff\ufffd\ufeff",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        "byte_level": write_text_model(root / "byte_level", byte_level_bpe()),
        "byte_fallback": write_text_model(root / "byte_fallback", byte_fallback_bpe()),
        "tiny_llama": tiny_model_folder(root, "llama"),
        "tiny_qwen3": tiny_model_folder(root, "qwen3"),
    }


KINDS = ("byte_level", "byte_fallback", "tiny_llama", "tiny_qwen3")


@pytest.mark.parametrize("add_special_tokens", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_text_equal_transformers(
    folders: dict[str, Path], kind: str, add_special_tokens: bool
) -> None:
    reference = AutoTokenizer.from_pretrained(str(folders[kind]), local_files_only=True)
    plain = PreTrainedTokenizerFast.from_pretrained(str(folders[kind]), local_files_only=True)
    ours = Tokenizer.load(folders[kind])
    for text in TRICKY:
        expected = reference(text, add_special_tokens=add_special_tokens)["input_ids"]
        assert expected == plain(text, add_special_tokens=add_special_tokens)["input_ids"]
        assert ours.encode(text, add_special_tokens=add_special_tokens) == expected
        for skip in (True, False):
            assert ours.decode(expected, skip_special_tokens=skip) == reference.decode(
                expected, skip_special_tokens=skip, clean_up_tokenization_spaces=False
            )
    assert ours.special_tokens == reference.special_tokens_map
    assert ours.vocab_size == len(reference)


@pytest.mark.parametrize(("kind", "bos"), [("byte_level", "<|begin|>"), ("byte_fallback", "<s>")])
def test_fault_22_exactly_one_bos(folders: dict[str, Path], kind: str, bos: str) -> None:
    tokenizer = Tokenizer.load(folders[kind])
    (bos_id,) = tokenizer.encode(bos, add_special_tokens=False)
    for text in CORPUS:
        assert tokenizer.encode(text).count(bos_id) == 1
        assert tokenizer.encode(text)[0] == bos_id
        assert tokenizer.encode(text, add_special_tokens=False).count(bos_id) == 0
    assert bos_id in tokenizer.special_ids


def test_no_bos_where_the_model_has_none(folders: dict[str, Path]) -> None:
    tokenizer = Tokenizer.load(folders["tiny_qwen3"])
    assert tokenizer.encode("hello") == tokenizer.encode("hello", add_special_tokens=False)


@pytest.mark.parametrize(
    "config",
    [
        {"tokenizer_class": "LlamaTokenizer"},
        {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_eos_token": True},
        {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False},
    ],
)
def test_classes_that_rebuild_the_tokenizer_are_followed(tmp_path: Path, config: dict[str, object]) -> None:
    """transformers 5 reads only vocabulary and merges of the file for these, and sets up the rest itself."""
    folder = write_text_model(tmp_path, byte_fallback_bpe(), config=config)
    reference = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    ours = Tokenizer.load(folder)
    for text in TRICKY:
        ids = reference(text)["input_ids"]
        assert ours.encode(text) == ids
        detokenizer = Detokenizer(ours)
        parts = [detokenizer.push([token_id]) for token_id in ids]
        assert "".join(parts) + detokenizer.flush() == reference.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def test_truncation_and_padding_of_the_file_do_not_apply(tmp_path: Path) -> None:
    backend = byte_level_bpe()
    whole = backend.encode("one two three four").ids
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    assert Tokenizer.load(write_text_model(tmp_path, backend)).encode("one two three four") == whole


@pytest.mark.parametrize("kind", KINDS)
def test_offsets_are_utf8_bytes(folders: dict[str, Path], kind: str) -> None:
    tokenizer = Tokenizer.load(folders[kind])
    for text in (*CORPUS, "aé中😀b"):
        ids, offsets = tokenizer.encode_with_offsets(text, add_special_tokens=False)
        assert list(ids) == tokenizer.encode(text, add_special_tokens=False)
        data = text.encode()
        covered = bytearray(len(data))
        for start, end in offsets:
            assert 0 <= start <= end <= len(data)
            data[start:end].decode()  # never inside a character
            covered[start:end] = b"\x01" * (end - start)
        assert all(covered)
        assert [start for start, _ in offsets] == sorted(start for start, _ in offsets)


def test_offsets_of_a_known_text(folders: dict[str, Path]) -> None:
    tokenizer = Tokenizer.load(folders["byte_level"])
    text = "中a<|turn|>"
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert ids[0] in tokenizer.special_ids
    assert offsets[0] == (0, 0)
    assert set(offsets[1:-2]) == {(0, 3)}
    assert offsets[-2:] == ((3, 4), (4, 12))


def test_offsets_survive_a_normalizer_that_changes_lengths(tmp_path: Path) -> None:
    backend = byte_level_bpe()
    backend.normalizer = normalizers.NFC()
    tokenizer = Tokenizer.load(write_text_model(tmp_path, backend))
    text = "xe\u0301y"
    _, offsets = tokenizer.encode_with_offsets(text, add_special_tokens=False)
    assert offsets[0] == (0, 1)
    assert offsets[-1] == (4, 5)


def test_a_special_token_spelt_in_the_text_is_that_token(folders: dict[str, Path]) -> None:
    tokenizer = Tokenizer.load(folders["byte_level"])
    ids = tokenizer.encode("a<|turn|>b", add_special_tokens=False)
    assert len(ids) == 3
    assert ids[1] in tokenizer.special_ids


def test_fault_09_lone_surrogates_are_refused(folders: dict[str, Path]) -> None:
    tokenizer = Tokenizer.load(folders["byte_level"])
    for call in (tokenizer.encode, tokenizer.encode_with_offsets):
        with pytest.raises(InvalidRequestError) as caught:
            call("secret \ud83d text", field="text")
        assert [violation.field for violation in caught.value.violations] == ["text"]
        assert "secret" not in caught.value.message


def test_threads_share_a_tokenizer(folders: dict[str, Path]) -> None:
    tokenizer = Tokenizer.load(folders["byte_level"])
    expected = [tokenizer.encode_with_offsets(text) for text in CORPUS]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert list(pool.map(tokenizer.encode_with_offsets, CORPUS)) == expected


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json: no such file"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}'),
        ("tokenizer.json", "\x00" * 100),
        ("tokenizer_config.json", "[not json"),
    ],
)
def test_a_damaged_file_is_a_load_error(tmp_path: Path, name: str, content: str) -> None:
    folder = write_text_model(tmp_path / "model", byte_level_bpe())
    (folder / name).write_text(content)
    with pytest.raises(ModelLoadError, match="model"):
        Tokenizer.load(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_huge_file_is_refused_before_it_is_read(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_text_model(tmp_path, byte_level_bpe())
    with (folder / name).open("ab") as file:
        file.truncate(module.MAX_FILE_BYTES[name] + 1)  # sparse: takes no space
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", None)
    with pytest.raises(ModelLoadError, match=f"{name}: .* bytes"):
        Tokenizer.load(folder)


def test_code_in_the_folder_is_not_run(tmp_path: Path) -> None:
    folder = write_text_model(
        tmp_path,
        byte_level_bpe(),
        config={"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}},
    )
    mark = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Evil: ...\n")
    with pytest.raises(ModelLoadError):
        Tokenizer.load(folder)
    assert not mark.exists()
