"""Small tokenizers of the kinds that the supported model families use, trained on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = (
    "The quick brown fox jumps over the lazy dog. It wasn't there, they'll say.",
    "def main(argv):\n    for arg in argv:\n\t\tprint(f'{arg!r}')\n\n\nreturn  0",
    "Größe, naïve café, señor, Übermut, œuvre, Łódź, İstanbul",
    "Привет, мир! Как дела сегодня?",
    "你好，世界。今天天气很好。",
    "これは日本語の文章です。カタカナもあります。",
    "안녕하세요 세계",
    "مرحبا بالعالم",
    "नमस्ते दुनिया, क्षत्रिय",
    "ขอบคุณครับ",
    "😀👍🏽 👨‍👩‍👧‍👦 🇩🇪 e\u0301 \u00e9",
    "x" * 20 + "  " * 10 + "\r\n\u3000\u00a0\u200d",
    "∑ᵢ xᵢ² ≤ ∞, 𝔘𝔫𝔦𝔠𝔬𝔡𝔢, 𐍈",
    "0 1 12 123 1234 3.14159 -1e-9",
)


def byte_level_bpe(vocab_size: int = 600) -> Tokenizer:
    """GPT-2 and Llama 3 style, with a BOS. Ids 0 to 2 are special; the last ids are added plain words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|begin|>", "<|end|>", "<|turn|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS[:6], trainer)
    # One spelt in the byte alphabet though it is no byte sequence, one with characters outside of it.
    tokenizer.add_tokens([AddedToken("<Ä>", normalized=False), AddedToken("<tool 工具>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
    )
    return tokenizer


def byte_fallback_bpe(vocab_size: int = 500) -> Tokenizer:
    """Llama 2 style: a space in front of the text, U+2581 for spaces, unknown characters as bytes."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=specials, show_progress=False)
    trained.train_from_iterator(CORPUS[:4], trainer)
    # Trained as special only to get their ids: in such models the byte tokens are ordinary ones.
    state = json.loads(trained.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < 3]
    state["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def write_text_model(
    folder: Path, tokenizer: Tokenizer, *, chat_template: object = None, config: dict[str, Any] | None = None
) -> Path:
    """A folder with what a tokenizer needs: tokenizer.json and the two configs."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    bos, eos = ("<s>", "</s>") if tokenizer.token_to_id("<s>") is not None else ("<|begin|>", "<|end|>")
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "clean_up_tokenization_spaces": True,
    }
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | (config or {})))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder
