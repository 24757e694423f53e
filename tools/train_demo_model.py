#!/usr/bin/env python3
"""Train the demo model on the Python standard library's sources and write a Hugging Face folder.

The folder holds an 8.2 M parameter Llama in bfloat16, its tokenizer with a chat template, the licence of
the data and a model card filled in from what this run measured. It stays under 16 MiB.

    python tools/train_demo_model.py --export-corpus corpus.jsonl.xz       # freeze the data
    python tools/train_demo_model.py --corpus corpus.jsonl.xz --device cuda --out photon_grpc/demo_model

Without `--corpus` the running interpreter's own standard library is read, so another Python version gives
another model. The split, the shuffles, the initial weights and the number of steps are fixed by `--seed`
and the corpus; `--minutes` trades that for a time limit.

Training runs on a small module below whose parameter names are the published ones. Everything reported
(perplexity, samples) is measured afterwards on the written folder through transformers, so the card speaks
of the bfloat16 weights that are shipped and the two implementations check each other.

Imports nothing of photon_grpc: what it writes is independent evidence for the loader.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import lzma
import math
import os
import platform
import sys
import sysconfig
import textwrap
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Read by cuBLAS when CUDA starts; without it matrix products may differ from run to run.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

BOS, END_OF_TEXT, END_OF_TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|end_of_turn|>"
SYSTEM, USER, ASSISTANT, PAD = "<|system|>", "<|user|>", "<|assistant|>", "<|pad|>"
SPECIAL_TOKENS = (BOS, END_OF_TEXT, END_OF_TURN, SYSTEM, USER, ASSISTANT, PAD)

CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{- raise_exception('unknown role: ' + message['role']) }}"
    "{%- endif %}"
    "{{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end_of_turn|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"
)

# 6 layers of 320 leave 370 kB of 16 MiB for tokenizer, card and licence. transformers refuses a hidden size
# that the number of heads does not divide, also where head_dim is given; hence 8 heads and not 6.
ARCHITECTURE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 320,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "bos_token_id": SPECIAL_TOKENS.index(BOS),
    "eos_token_id": [SPECIAL_TOKENS.index(END_OF_TEXT), SPECIAL_TOKENS.index(END_OF_TURN)],
    "pad_token_id": SPECIAL_TOKENS.index(PAD),
    "torch_dtype": "bfloat16",
    "use_cache": True,
}

FOLDER_LIMIT = 16 * 1024 * 1024
PARAMETER_RANGE = (8_000_000, 12_000_000)
SHORT_CONTEXT, LONG_CONTEXT = 512, 2048
# The last part of training runs at the full context, so that every position up to it has been seen.
LONG_SHARE = 0.25
# Shares of the tokens of an epoch; what is left is every library module once.
CHAT_SHARE, SNIPPET_SHARE, TEST_SHARE = 0.17, 0.08, 0.35
HELD_OUT_PERCENT, VALIDATION_PERCENT = 3, 3

DEF_PROMPTS = (
    "def read_config(path):\n",
    "def flatten(items):\n",
    'def is_valid_name(name):\n    """Return True if name is a valid identifier."""\n',
)
CHAT_PROMPT = "Write a function join_lines that does this: Return the lines joined by a newline"

console = Console(width=110, highlight=False)


# ---------------------------------------------------------------------------------------------- corpus


@dataclass(frozen=True)
class Source:
    """One module: its path below the standard library folder, with `/`, and its text."""

    path: str
    text: str

    @property
    def is_test(self) -> bool:
        parts = self.path.split("/")[:-1]
        return any(part in ("test", "tests", "idle_test") for part in parts)

    @property
    def split(self) -> str:
        """`train`, `validation` (chooses the checkpoint) or `held-out` (only reported).

        Hashes the module's bare name, so a module and its tests fall on the same side.
        """
        stem, parent = self.path.removesuffix(".py").split("/")[-1], self.path.split("/")[-2:-1]
        name = parent[0] if stem in ("__init__", "__main__") and parent else stem
        digest = hashlib.sha256(name.removeprefix("test_").encode()).digest()
        bucket = int.from_bytes(digest[:4], "big") % 100
        if bucket < HELD_OUT_PERCENT:
            return "held-out"
        return "validation" if bucket < HELD_OUT_PERCENT + VALIDATION_PERCENT else "train"


@dataclass(frozen=True)
class Corpus:
    """Sources in path order, with the Python version they are from and its licence text."""

    python: str
    licence: str
    sources: tuple[Source, ...]

    def digest(self) -> str:
        joined = "\0".join(f"{s.path}\0{s.text}" for s in self.sources)
        return hashlib.sha256(joined.encode()).hexdigest()

    def select(self, split: str, with_tests: bool) -> list[Source]:
        """Modules of one split; test modules only ever take part in training."""
        wanted = [s for s in self.sources if s.split == split]
        return [s for s in wanted if not s.is_test or (with_tests and split == "train")]


def is_prose_or_code(path: str, text: str) -> bool:
    """False for generated tables (character maps, entity lists): they would teach only noise."""
    if path.startswith("encodings/") and ("decoding_table = (" in text or "decoding_map" in text):
        return False
    ink = sum(not c.isspace() for c in text)
    return sum(c.isalpha() or c == "_" for c in text) >= 0.5 * ink > 0


def collect_standard_library() -> Corpus:
    """Read the running interpreter's standard library. Raises FileNotFoundError without its licence."""
    root = Path(sysconfig.get_paths()["stdlib"])
    licence = next((p for p in (root / "LICENSE.txt", root.parent.parent / "LICENSE") if p.is_file()), None)
    if licence is None:
        raise FileNotFoundError(f"no LICENSE.txt beside the standard library in {root}")
    sources = []
    for file in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        path = file.relative_to(root).as_posix()
        top = path.split("/")[0]
        # Build configuration holds paths of the machine; topics and msilib are generated.
        if top in ("site-packages", "dist-packages", "pydoc_data", "msilib") or top.startswith(
            ("config-", "_sysconfigdata")
        ):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            console.print(f"left out {path}: not UTF-8")
            continue
        if any(token in text for token in SPECIAL_TOKENS) or not is_prose_or_code(path, text):
            continue
        sources.append(Source(path, text))
    return Corpus(platform.python_version(), licence.read_text(encoding="utf-8"), tuple(sources))


def write_corpus(corpus: Corpus, file: Path) -> None:
    lines = [{"python": corpus.python, "licence": corpus.licence}, *map(asdict, corpus.sources)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))


def read_corpus(file: Path) -> Corpus:
    head, *rest = lzma.decompress(file.read_bytes()).decode().splitlines()
    sources = tuple(Source(**json.loads(line)) for line in rest)
    return Corpus(**json.loads(head), sources=sources)


# ------------------------------------------------------------------------------------ functions and chat

Message = tuple[str, str]  # role token, content

SYSTEM_PROMPT = "You are a helpful assistant that writes Python."
INTRODUCTION = (
    "I am a small demo language model trained on the sources of Python's standard library. "
    "I can continue Python code, and I can try to write a function."
)
SMALL_TALK: tuple[tuple[str, str], ...] = (
    ("Hello", "Hello! Ask me to write a Python function."),
    ("Hello!", "Hello! Ask me to write a Python function."),
    ("Hi", "Hello! Ask me to write a Python function."),
    ("Hi, how are you?", "Fine, thank you. Ask me to write a Python function."),
    ("Who are you?", INTRODUCTION),
    ("What are you?", INTRODUCTION),
    ("What can you do?", INTRODUCTION),
    ("Tell me about yourself.", INTRODUCTION),
    ("Thanks!", "You are welcome."),
    ("Thank you.", "You are welcome."),
)


@dataclass(frozen=True)
class Function:
    """A function of a module, dedented; `summary` is the first line of its docstring, or empty."""

    name: str
    source: str
    bare_source: str
    summary: str


def functions(source: Source) -> Iterator[Function]:
    """Functions and methods of a module that stand on their own once dedented."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source.text)
    except SyntaxError:
        return
    lines = source.text.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.end_lineno is None:
            continue
        first, last = node.lineno - 1, node.end_lineno
        text = textwrap.dedent("".join(lines[first:last])).rstrip() + "\n"
        if not text.startswith(("def ", "async def ")) or not 60 <= len(text) <= 1600:
            continue
        summary, bare = "", text
        docstring = ast.get_docstring(node)
        if docstring and len(node.body) > 1 and node.body[0].end_lineno is not None:
            summary = docstring.splitlines()[0].strip().rstrip(".")
            inner = node.body[0]
            without = lines[first : inner.lineno - 1] + lines[inner.end_lineno : last]
            bare = textwrap.dedent("".join(without)).rstrip() + "\n"
        yield Function(node.name, text, bare, summary)


def conversation(function: Function) -> list[Message]:
    """A short conversation about a function. Which kind is drawn from the function's text."""
    draw = hashlib.sha256(function.source.encode()).digest()
    request = (
        f"Write a function {function.name} that does this: {function.summary}",
        f"Write a Python function named {function.name}. {function.summary}.",
        f"Implement {function.name}: {function.summary}",
    )[draw[0] % 3]
    write: list[Message] = [(USER, request), (ASSISTANT, function.source)]
    explain: list[Message] = [
        (USER, f"What does this function do?\n\n{function.bare_source}"),
        (ASSISTANT, f"{function.summary}."),
    ]
    follow_up: list[Message] = [
        *write,
        (USER, "What does it do?"),
        (ASSISTANT, f"{function.summary}."),
    ]
    body = follow_up if draw[1] % 6 == 0 else explain if draw[1] % 6 == 1 else write
    return [(SYSTEM, SYSTEM_PROMPT), *body] if draw[2] % 4 == 0 else body


def render(messages: Sequence[Message]) -> str:
    """What CHAT_TEMPLATE renders, less the leading BOS."""
    return "".join(f"{role}\n{content}{END_OF_TURN}" for role, content in messages)


# ------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(sources: Sequence[Source]) -> Tokenizer:
    """Byte-level BPE whose pieces never cross a newline or an indentation.

    A run of two or more spaces is a piece of its own rather than lending its last space to the next word.
    So a prompt that ends after a newline, or after an indentation, ends on the same tokens as the text the
    model was trained on.
    """
    pieces = r" ?[\p{L}_]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+|\n+| {2,}|\t+|\s"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ARCHITECTURE["vocab_size"],
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=16,
        show_progress=False,
    )
    tokenizer.train_from_iterator((s.text for s in sources), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS}:1 $B:1",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    if tokenizer.get_vocab_size() != ARCHITECTURE["vocab_size"]:
        raise ValueError(f"the corpus gives only {tokenizer.get_vocab_size()} tokens")
    return tokenizer


# ------------------------------------------------------------------------------------------------ data


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Each text as BOS, tokens, end of text."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    return [np.array([*e.ids, end], dtype=np.int32) for e in tokenizer.encode_batch(list(texts))]


@dataclass(frozen=True)
class Pool:
    """Documents of one kind, of which every epoch draws some without repeating any."""

    name: str
    documents: list[np.ndarray]
    share: float

    @property
    def tokens(self) -> int:
        return sum(map(len, self.documents))


@dataclass(frozen=True)
class Mixture:
    """Training documents. An epoch is every library module once, with draws from the pools beside them."""

    modules: list[np.ndarray]
    small_talk: list[np.ndarray]
    pools: list[Pool]
    seed: int

    @property
    def module_tokens(self) -> int:
        return sum(map(len, self.modules))

    def quota(self, pool: Pool) -> float:
        """Tokens that an epoch draws from a pool: its share, or all it has."""
        whole = self.module_tokens / (1 - sum(p.share for p in self.pools))
        return min(pool.share * whole, pool.tokens)

    @property
    def epoch_tokens(self) -> float:
        return self.module_tokens + sum(map(self.quota, self.pools))

    def epoch(self, index: int) -> Tensor:
        """The token stream of one epoch, on the CPU.  # [tokens] int32"""
        rng = np.random.default_rng([self.seed, index])
        documents = [*self.modules, *self.small_talk]
        for pool in self.pools:
            drawn, quota = 0, self.quota(pool)
            for i in rng.permutation(len(pool.documents)):
                if drawn >= quota:
                    break
                documents.append(pool.documents[i])
                drawn += len(pool.documents[i])
        order = rng.permutation(len(documents))
        return torch.from_numpy(np.concatenate([documents[i] for i in order]))

    def batches(
        self, context: int, rows: int, device: torch.device, first_epoch: int
    ) -> Iterator[tuple[int, Tensor]]:
        """Endless (epoch, rows of context + 1 tokens); the cut points move with every epoch."""
        epoch = first_epoch
        while True:
            stream = self.epoch(epoch)
            rng = np.random.default_rng([self.seed, epoch, context])
            stream = stream[int(rng.integers(context)) :]
            windows = stream.unfold(0, context + 1, context)
            order = torch.from_numpy(rng.permutation(len(windows)))
            if len(windows) < rows:
                raise ValueError(f"an epoch has only {len(windows)} rows of {context} tokens")
            shuffled = windows[order].to(device)
            for start in range(0, len(windows) - rows + 1, rows):
                yield epoch, shuffled[start : start + rows].long()
            epoch += 1


def build_mixture(tokenizer: Tokenizer, sources: Sequence[Source], seed: int) -> Mixture:
    """Conversations and single functions come from the library alone: test methods make poor answers."""
    library = [s for s in sources if not s.is_test]
    tests = [s.text for s in sources if s.is_test]
    unique = list({f.source: f for s in library for f in functions(s)}.values())
    chats = [render(conversation(f)) for f in unique if len(f.summary) >= 12]
    small_talk = [render([(USER, q), (ASSISTANT, a)]) for q, a in SMALL_TALK]
    pools = [
        Pool("conversations", encode_documents(tokenizer, chats), CHAT_SHARE),
        Pool("single functions", encode_documents(tokenizer, [f.source for f in unique]), SNIPPET_SHARE),
    ]
    if tests:
        pools.append(Pool("test modules", encode_documents(tokenizer, tests), TEST_SHARE))
    return Mixture(
        modules=encode_documents(tokenizer, [s.text for s in library]),
        small_talk=encode_documents(tokenizer, small_talk) * 3,
        pools=pools,
        seed=seed,
    )


# ----------------------------------------------------------------------------------------------- model


def rope_tables() -> tuple[Tensor, Tensor]:
    """Cosines and sines of Llama 3's scaled rotary embedding.  # 2 x [LONG_CONTEXT, head_dim] float32"""
    scaling, half = ARCHITECTURE["rope_scaling"], ARCHITECTURE["head_dim"] // 2
    frequency = ARCHITECTURE["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    frequency = frequency * (keep + (1 - keep) / scaling["factor"])
    angles = torch.arange(LONG_CONTEXT, dtype=torch.float64)[:, None] * frequency
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, halves paired as Hugging Face checkpoints pair them.  # [rows, heads, length, dim]"""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        hidden, self.dim = ARCHITECTURE["hidden_size"], ARCHITECTURE["head_dim"]
        self.heads, self.kv_heads = ARCHITECTURE["num_attention_heads"], ARCHITECTURE["num_key_value_heads"]
        self.q_proj = nn.Linear(hidden, self.heads * self.dim, bias=False)
        self.k_proj = nn.Linear(hidden, self.kv_heads * self.dim, bias=False)
        self.v_proj = nn.Linear(hidden, self.kv_heads * self.dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.dim, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, length, _ = x.shape
        q = self.q_proj(x).view(rows, length, self.heads, self.dim).transpose(1, 2)
        k = self.k_proj(x).view(rows, length, self.kv_heads, self.dim).transpose(1, 2)
        v = self.v_proj(x).view(rows, length, self.kv_heads, self.dim).transpose(1, 2)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        projected: Tensor = self.o_proj(out.transpose(1, 2).reshape(rows, length, -1))
        return projected


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        hidden, inner = ARCHITECTURE["hidden_size"], ARCHITECTURE["intermediate_size"]
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        hidden, eps = ARCHITECTURE["hidden_size"], ARCHITECTURE["rms_norm_eps"]
        self.input_layernorm = nn.RMSNorm(hidden, eps=eps)
        self.self_attn = Attention()
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=eps)
        self.mlp = MLP()
        self.dropout = dropout

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + F.dropout(self.self_attn(self.input_layernorm(x), cos, sin), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), self.dropout, self.training)


class Trunk(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(ARCHITECTURE["vocab_size"], ARCHITECTURE["hidden_size"])
        self.layers = nn.ModuleList(Block(dropout) for _ in range(ARCHITECTURE["num_hidden_layers"]))
        self.norm = nn.RMSNorm(ARCHITECTURE["hidden_size"], eps=ARCHITECTURE["rms_norm_eps"])


class Llama(nn.Module):
    """The training twin of transformers' LlamaForCausalLM, with dropout on what each block adds."""

    cos: Tensor
    sin: Tensor

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.model = Trunk(dropout)
        cos, sin = rope_tables()
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        std = ARCHITECTURE["initializer_range"]
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # The residual stream sums 2 x layers outputs; keep its variance that of the embedding.
                shrink = math.sqrt(2 * ARCHITECTURE["num_hidden_layers"])
                closes_block = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=std / shrink if closes_block else std)

    def forward(self, tokens: Tensor) -> Tensor:
        """# [rows, length] -> [rows, length, vocab]"""
        length = tokens.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        x = F.dropout(self.model.embed_tokens(tokens), self.dropout, self.training)
        for block in self.model.layers:
            x = block(x, cos, sin)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)


# -------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome besides the corpus."""

    steps: int
    tokens_per_step: int
    learning_rate: float
    weight_decay: float
    dropout: float
    warmup: int
    clip: float
    evaluations: int
    seed: int
    with_tests: bool


@dataclass
class History:
    """What training measured: one row per evaluation, and the step whose weights were kept."""

    rows: list[dict[str, float]] = field(default_factory=list)
    best_step: int = 0
    best_validation: float = math.inf
    steps: int = 0
    epochs: float = 0.0
    tokens: int = 0
    seconds: float = 0.0


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to a fiftieth."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, steps - recipe.warmup)
    return recipe.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross entropy of the next token; bfloat16 products on a GPU, the rest in float32."""
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=batch.device.type == "cuda"):
        logits = model(batch[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def packed_loss(model: nn.Module, windows: Tensor) -> float:
    """Loss over packed windows, without dropout.  # [rows, context + 1]"""
    model.eval()
    losses = [loss_of(model, part) * len(part) for part in torch.split(windows, 16)]
    model.train()
    return float(torch.stack(losses).sum()) / len(windows)


def optimizer_for(model: nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=device.type == "cuda")


def train(
    model: Llama,
    mixture: Mixture,
    validation: Tensor,
    recipe: Recipe,
    device: torch.device,
    minutes: float | None,
) -> History:
    """Train in place and leave the weights of the best validation loss in `model`.

    Only steps of the long phase can be the best: before it, far positions have never been seen.
    """
    optimizer, history = optimizer_for(model, recipe, device), History()
    best = {name: p.detach().clone() for name, p in model.state_dict().items()}
    steps, probe = recipe.steps, 50
    long_from = round(steps * (1 - LONG_SHARE))
    batches = mixture.batches(SHORT_CONTEXT, recipe.tokens_per_step // SHORT_CONTEXT, device, 0)
    running, since, epoch = torch.zeros((), device=device), 0, 0
    begun = time.monotonic()
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"))
    model.train()
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("training", total=steps, state="")
        step = 0
        while step < steps:
            if step == long_from:
                # A fresh epoch number, or the long phase would start by repeating the epoch in progress.
                batches = mixture.batches(
                    LONG_CONTEXT, max(1, recipe.tokens_per_step // LONG_CONTEXT), device, epoch + 1
                )
            epoch, batch = next(batches)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, recipe)
            loss = loss_of(model, batch)
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            running, since, step = running + loss.detach(), since + 1, step + 1
            history.tokens += batch[:, 1:].numel()
            if minutes is not None and step == probe:
                float(running)  # waits for the device, so that the clock below is honest
                pace = (time.monotonic() - begun) / probe
                steps = min(steps, max(2 * probe, int(minutes * 60 / pace)))
                long_from = round(steps * (1 - LONG_SHARE))
                progress.update(task, total=steps)
            if step % max(1, steps // recipe.evaluations) == 0 or step == steps:
                mean, held = float(running) / since, packed_loss(model, validation)
                rate = history.tokens / (time.monotonic() - begun)
                history.rows.append(
                    {"step": step, "tokens": history.tokens, "train": mean, "validation": held}
                )
                progress.update(task, completed=step, state=f"{rate / 1e3:.0f}k tokens/s")
                progress.console.print(
                    f"step {step:6d}  epoch {epoch:3d}  train {mean:.4f}  validation {held:.4f}  "
                    f"{rate / 1e3:.0f}k tokens/s"
                )
                running, since = torch.zeros((), device=device), 0
                if not math.isfinite(mean):
                    raise FloatingPointError(f"the loss is {mean} at step {step}")
                if step > long_from and held < history.best_validation:
                    history.best_step, history.best_validation = step, held
                    best = {name: p.detach().clone() for name, p in model.state_dict().items()}
    history.steps, history.seconds = steps, time.monotonic() - begun
    history.epochs = history.tokens / mixture.epoch_tokens
    model.load_state_dict(best)
    model.eval()
    return history


# ------------------------------------------------------------------------------------- folder and check


def write_model_folder(model: Llama, tokenizer: Tokenizer, folder: Path) -> None:
    """Everything a loader reads; the card and the licence come after the measurements."""
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(ARCHITECTURE)
    generation = {
        "bos_token_id": ARCHITECTURE["bos_token_id"],
        "eos_token_id": ARCHITECTURE["eos_token_id"],
        "pad_token_id": ARCHITECTURE["pad_token_id"],
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.95,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END_OF_TURN,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": LONG_CONTEXT,
        "chat_template": CHAT_TEMPLATE,
    }
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer_config.json", tokenizer_config),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    weights = {n: p.detach().to("cpu", torch.bfloat16).contiguous() for n, p in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # safetensors writes for the owner alone; an installed package is read by others.
    (folder / "model.safetensors").chmod(0o644)


def check_folder(folder: Path, tokenizer: Tokenizer, twin: Llama) -> tuple[Any, Any]:
    """Load the folder with transformers and compare with what was trained.

    Returns (tokenizer, model in float32 on the CPU). Raises ValueError on any difference.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder)
    text = 'class A:\n    def f(self, x):\n\n\treturn "é" + x  # 1234\n'
    ids = loaded(text)["input_ids"]
    if ids != tokenizer.encode(text).ids or ids.count(loaded.bos_token_id) != 1:
        raise ValueError("transformers' tokenizer disagrees with the trained one")
    if loaded.decode(ids, skip_special_tokens=True) != text:
        raise ValueError("the tokenizer does not give its input back")
    chat = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u\n"},
        {"role": "assistant", "content": "a"},
    ]
    rendered = loaded.apply_chat_template(chat, tokenize=False)
    if rendered != BOS + render([(SYSTEM, "s"), (USER, "u\n"), (ASSISTANT, "a")]):
        raise ValueError(f"the chat template differs from the training format: {rendered!r}")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    count = sum(p.numel() for p in model.parameters())
    if not PARAMETER_RANGE[0] <= count <= PARAMETER_RANGE[1]:
        raise ValueError(f"{count} parameters")
    rounded = Llama(dropout=0.0).eval()
    rounded.load_state_dict({n: p.detach().cpu().bfloat16().float() for n, p in twin.state_dict().items()})
    # Past original_max_position_embeddings, so that the scaled frequencies count.
    probe = torch.arange(700)[None] * 37 % ARCHITECTURE["vocab_size"]
    with torch.no_grad():
        difference = (model(probe).logits - rounded(probe)).abs().max().item()
    if difference > 1e-3:
        raise ValueError(f"transformers' logits differ by {difference}")
    return loaded, model


@dataclass(frozen=True)
class HeldOut:
    modules: int
    tokens: int
    loss: float
    perplexity: float
    bits_per_byte: float
    context: int


@torch.no_grad()
def measure_held_out(
    model: Any, documents: Sequence[np.ndarray], sizes: Sequence[int], context: int, limit: int | None
) -> HeldOut:
    """Loss of every token but BOS, each seen with at least half a window before it where there is one.

    `sizes` are the documents' bytes; `limit` stops after that many tokens.
    """
    total, tokens, size, modules = 0.0, 0, 0, 0
    for ids, document_bytes in zip(documents, sizes, strict=True):
        if limit is not None and tokens >= limit:
            break
        data = torch.from_numpy(ids).long().to(model.device)
        scored = 1
        while scored < len(data):
            start = 0 if scored == 1 else scored - context // 2
            window = data[start : start + context + 1]
            logits = model(window[None, :-1]).logits[0].float()
            losses = F.cross_entropy(logits, window[1:], reduction="none")
            fresh = losses[scored - 1 - start :]
            total += float(fresh.double().sum())
            scored += len(fresh)
        tokens, size, modules = tokens + len(data) - 1, size + document_bytes, modules + 1
    loss = total / tokens
    return HeldOut(modules, tokens, loss, math.exp(loss), total / math.log(2) / size, context)


@torch.no_grad()
def continue_greedily(model: Any, tokenizer: Any, text: str, special: bool, new_tokens: int = 120) -> str:
    """The prompt's greedy continuation, up to an end token."""
    ids = tokenizer(text, add_special_tokens=special, return_tensors="pt")["input_ids"].to(model.device)
    stops, prompt_length = set(ARCHITECTURE["eos_token_id"]), ids.shape[1]
    for _ in range(new_tokens):
        following = model(ids).logits[:, -1].argmax(-1, keepdim=True)
        if int(following) in stops:
            break
        ids = torch.cat([ids, following], dim=1)
    return str(tokenizer.decode(ids[0, prompt_length:], skip_special_tokens=True))


# ------------------------------------------------------------------------------------------------ card


def draw_loss_curve(history: History, file: Path) -> bool:
    """False where matplotlib is not installed: the card's table says the same."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.2), dpi=90, layout="constrained")
    x = [row["tokens"] / 1e6 for row in history.rows]
    axes.plot(x, [row["train"] for row in history.rows], label="train (with dropout)")
    axes.plot(x, [row["validation"] for row in history.rows], label="validation")
    axes.set(xlabel="million tokens", ylabel="loss, nats per token")
    axes.legend()
    figure.savefig(file, metadata={"Software": None})
    pyplot.close(figure)
    return True


@dataclass(frozen=True)
class Report:
    """What the card states, all of it measured or given in this run."""

    corpus: Corpus
    recipe: Recipe
    history: History
    mixture: Mixture
    train_sources: list[Source]
    validation_sources: list[Source]
    held_out_sources: list[Source]
    held_out: list[HeldOut]
    samples: list[tuple[str, str]]
    chat: tuple[str, str]
    parameters: int
    command: str
    hardware: str
    weights_sha256: str
    has_curve: bool


def card(report: Report) -> str:
    """The model card, in Markdown."""
    import safetensors
    import tokenizers
    import transformers

    recipe, history, mixture, arch = report.recipe, report.history, report.mixture, ARCHITECTURE
    versions = ", ".join(
        f"{name} {version}"
        for name, version in (
            ("Python", platform.python_version()),
            ("torch", torch.__version__),
            ("transformers", transformers.__version__),
            ("tokenizers", tokenizers.__version__),
            ("safetensors", safetensors.__version__),
            ("numpy", np.__version__),
        )
    )
    rows = "\n".join(
        f"| {row['step']:.0f} | {row['tokens'] / 1e6:.1f} | {row['train']:.3f} | {row['validation']:.3f} |"
        for row in history.rows
    )
    held = "\n".join(
        f"| {h.context} | {h.modules} | {h.tokens} "
        f"| {h.loss:.4f} | {h.perplexity:.2f} | {h.bits_per_byte:.3f} |"
        for h in report.held_out
    )
    samples = "\n\n".join(f"```python\n{prompt}{text.rstrip()}\n```" for prompt, text in report.samples)
    question, answer = report.chat
    curve = "\n![Loss by tokens](loss.png)\n" if report.has_curve else ""
    test_note = "with" if recipe.with_tests else "without"
    library_bytes = sum(len(s.text.encode()) for s in report.train_sources if not s.is_test)
    counts = [("library modules", len(mixture.modules), float(mixture.module_tokens))]
    counts += [(pool.name, len(pool.documents), mixture.quota(pool)) for pool in mixture.pools]
    data = "\n".join(
        f"| {name} | {number} | {tokens:,.0f} ({tokens / mixture.epoch_tokens:.0%}) |"
        for name, number, tokens in counts
    )
    names = {
        key: ", ".join(f"`{s.path}`" for s in sources)
        for key, sources in (("held", report.held_out_sources), ("valid", report.validation_sources))
    }
    scaling = arch["rope_scaling"]
    return f"""---
license: other
license_name: psf-2.0
license_link: LICENSE-PSF.txt
pipeline_tag: text-generation
library_name: transformers
---

# photon_grpc demo model

A {report.parameters:,} parameter Llama that continues Python code, so that the server can be tried without
a download. It is a demonstration: it has read the standard library and nothing else, it knows no facts, and
the code it writes looks like Python more often than it works. Do not use its output unread.

| | |
|---|---|
| architecture | `LlamaForCausalLM`: {arch["num_hidden_layers"]} layers, hidden {arch["hidden_size"]}, \
{arch["num_attention_heads"]} heads of {arch["head_dim"]}, {arch["num_key_value_heads"]} key/value heads, \
intermediate {arch["intermediate_size"]}, head tied to the embedding |
| positions | rotary, base {arch["rope_theta"]:.0f}, llama3 scaling by {scaling["factor"]:.0f} from \
{scaling["original_max_position_embeddings"]}; {arch["max_position_embeddings"]} at most |
| vocabulary | {arch["vocab_size"]}, byte-level BPE; exactly one `{BOS}` in front |
| ends | `{END_OF_TEXT}` after a document, `{END_OF_TURN}` after a chat turn |
| weights | bfloat16, SHA-256 `{report.weights_sha256}` |

## Data and licence

The standard library of CPython {report.corpus.python}, {test_note} its test packages. Left out are generated
tables (character maps, HTML entities, help topics), build configuration and everything installed beside it.
The sources are under the PSF License Agreement, whose text, with those of the software it incorporates, is in
`LICENSE-PSF.txt`; some modules carry notices of their own. The model can reproduce parts of them.

| documents | number | tokens an epoch |
|---|---:|---:|
{data}

Conversations are made from the functions and their docstrings ("write a function NAME that does this: …"),
besides {len(SMALL_TALK)} greetings written by hand. Library modules are {library_bytes / 1e6:.2f} MB.
SHA-256 of the corpus: `{report.corpus.digest()}`.

## Training

| | |
|---|---|
| steps | {history.steps} of {recipe.tokens_per_step} tokens: {history.tokens / 1e6:.1f} M tokens, \
{history.epochs:.1f} epochs |
| context | {SHORT_CONTEXT}, the last {LONG_SHARE:.0%} of the steps {LONG_CONTEXT} |
| optimiser | AdamW (0.9, 0.95), peak rate {recipe.learning_rate:g}, {recipe.warmup} warm-up steps, \
cosine to 2 %, weight decay {recipe.weight_decay:g}, clip {recipe.clip:g}, dropout {recipe.dropout:g} |
| kept | step {history.best_step}, the best validation loss ({history.best_validation:.4f}) |
| seed | {recipe.seed} |
| on | {report.hardware}, {history.seconds:.0f} s of training |
| with | {versions} |

```
{report.command}
```

Loss in nats per token. Validation modules choose the checkpoint and are not trained on; the held-out modules
below play no part in training at all.
{curve}
| step | M tokens | train (with dropout) | validation |
|---:|---:|---:|---:|
{rows}

## Held-out perplexity

On whole modules never trained on, of the weights in this folder, through transformers in float32. Every token
is predicted with at least half a window before it where the module has that much.

| window | modules | tokens | loss | perplexity per token | bits per byte |
|---:|---:|---:|---:|---:|---:|
{held}

Held out: {names["held"]}.

Validation: {names["valid"]}.

## Samples

Greedy, at most 120 tokens; the prompts are the `def` lines (and the docstring in the last).

{samples}

Chat, greedy. User: "{question}"

```python
{answer.rstrip()}
```
"""


# ------------------------------------------------------------------------------------------------- main


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train the demo model on the standard library's sources.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="folder to write")
    parser.add_argument(
        "--corpus", type=Path, help="read this archive instead of the running interpreter's library"
    )
    parser.add_argument(
        "--export-corpus", type=Path, metavar="FILE", help="write the archive (.jsonl.xz) and stop"
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--scale", choices=("full", "small"), default="full", help="small: a minute on a CPU")
    parser.add_argument("--steps", type=int, help="default: 2200, or 20 at the small scale")
    parser.add_argument("--tokens-per-step", type=int, help="default: 32768, or 2048 at the small scale")
    parser.add_argument("--minutes", type=float, help="shorten the schedule to fit; not reproducible")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.25)
    parser.add_argument("--with-tests", action="store_true", help="train on the test packages as well")
    parser.add_argument("--compile", action="store_true", help="torch.compile; slower to start")
    parser.add_argument("--seed", type=int, default=20)
    options = parser.parse_args(arguments)
    if (options.out is None) == (options.export_corpus is None):
        parser.error("give either --out or --export-corpus")
    small = options.scale == "small"
    options.steps = options.steps or (20 if small else 2200)
    options.tokens_per_step = options.tokens_per_step or (2048 if small else 32768)
    if options.tokens_per_step % LONG_CONTEXT:
        parser.error(f"--tokens-per-step must be a multiple of {LONG_CONTEXT}")
    return options


def canonical_command(options: argparse.Namespace) -> str:
    """The command without the folders of the machine it ran on."""
    words = ["python tools/train_demo_model.py", "--out photon_grpc/demo_model"]
    if options.corpus:
        words.append(f"--corpus {options.corpus.name}")
    words.append(
        f"--device {options.device} --steps {options.steps} --tokens-per-step {options.tokens_per_step}"
    )
    words.append(f"--learning-rate {options.learning_rate:g} --weight-decay {options.weight_decay:g}")
    words.append(f"--dropout {options.dropout:g} --seed {options.seed}")
    flags = {"--with-tests": options.with_tests, "--compile": options.compile}
    words += [flag for flag, given in flags.items() if given]
    if options.minutes:
        words.append(f"--minutes {options.minutes:g}")
    if options.scale != "full":
        words.append(f"--scale {options.scale}")
    return " \\\n    ".join(words)


def recipe_of(options: argparse.Namespace) -> Recipe:
    return Recipe(
        steps=options.steps,
        tokens_per_step=options.tokens_per_step,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        dropout=options.dropout,
        warmup=max(1, min(150, options.steps // 10)),
        clip=1.0,
        evaluations=16 if options.scale == "full" else 4,
        seed=options.seed,
        with_tests=options.with_tests,
    )


def main() -> int:
    options = parse_arguments()
    if options.export_corpus:
        corpus = collect_standard_library()
        write_corpus(corpus, options.export_corpus)
        size = options.export_corpus.stat().st_size
        console.print(f"{len(corpus.sources)} modules of Python {corpus.python}, {size / 1e6:.2f} MB")
        return 0
    corpus = read_corpus(options.corpus) if options.corpus else collect_standard_library()
    recipe, device = recipe_of(options), torch.device(options.device)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Nothing here reads memory it has not written, and filling every new tensor costs time.
    # torch installs this attribute at import, out of mypy's sight.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.manual_seed(recipe.seed)

    sources = {
        split: corpus.select(split, recipe.with_tests) for split in ("train", "validation", "held-out")
    }
    with console.status("tokenizer and data"):
        tokenizer = train_tokenizer([s for s in sources["train"] if not s.is_test])
        mixture = build_mixture(tokenizer, sources["train"], recipe.seed)
        validation_stream = np.concatenate(
            encode_documents(tokenizer, [s.text for s in sources["validation"]])
        )
    windows = torch.from_numpy(validation_stream).long().unfold(0, SHORT_CONTEXT + 1, SHORT_CONTEXT)
    if options.scale == "small":
        windows = windows[:8]
    console.print(f"{len(mixture.modules)} library modules, {mixture.module_tokens:,} tokens")
    for pool in mixture.pools:
        console.print(
            f"{len(pool.documents)} {pool.name}, {pool.tokens:,} tokens, {mixture.quota(pool):,.0f} an epoch"
        )

    model = Llama(recipe.dropout).to(device)
    if options.compile:
        model.compile()
    history = train(model, mixture, windows.to(device), recipe, device, options.minutes)

    folder: Path = options.out
    write_model_folder(model, tokenizer, folder)
    (folder / "LICENSE-PSF.txt").write_text(corpus.licence, encoding="utf-8")
    hf_tokenizer, hf_model = check_folder(folder, tokenizer, model)
    hf_model = hf_model.to(device)
    held_documents = encode_documents(tokenizer, [s.text for s in sources["held-out"]])
    held_sizes = [len(s.text.encode()) for s in sources["held-out"]]
    limit = 4096 if options.scale == "small" else None
    with console.status("held-out perplexity and samples"):
        held_out = [
            measure_held_out(hf_model, held_documents, held_sizes, context, limit)
            for context in (SHORT_CONTEXT, LONG_CONTEXT)
        ]
        samples = [(p, continue_greedily(hf_model, hf_tokenizer, p, special=True)) for p in DEF_PROMPTS]
        prompt = hf_tokenizer.apply_chat_template(
            [{"role": "user", "content": CHAT_PROMPT}], tokenize=False, add_generation_prompt=True
        )
        answer = continue_greedily(hf_model, hf_tokenizer, prompt, special=False)
    report = Report(
        corpus=corpus,
        recipe=recipe,
        history=history,
        mixture=mixture,
        train_sources=sources["train"],
        validation_sources=sources["validation"],
        held_out_sources=sources["held-out"],
        held_out=held_out,
        samples=samples,
        chat=(CHAT_PROMPT, answer),
        parameters=sum(p.numel() for p in hf_model.parameters()),
        command=canonical_command(options),
        hardware=f"one {torch.cuda.get_device_name()}"
        if device.type == "cuda"
        else f"CPU ({platform.machine()})",
        weights_sha256=hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        has_curve=draw_loss_curve(history, folder / "loss.png"),
    )
    (folder / "README.md").write_text(card(report), encoding="utf-8")
    size = sum(file.stat().st_size for file in folder.iterdir())
    console.print(f"validation loss {history.best_validation:.4f} at step {history.best_step}")
    for h in held_out:
        console.print(
            f"held-out, window {h.context}: perplexity {h.perplexity:.3f}, "
            f"{h.bits_per_byte:.4f} bits per byte"
        )
    for text in [p + t for p, t in samples] + [prompt + answer]:
        console.print(text, markup=False)
        console.rule()
    console.print(
        f"{folder}: {report.parameters:,} parameters, {size:,} of {FOLDER_LIMIT:,} bytes, "
        f"{history.seconds:.0f} s of training"
    )
    if size > FOLDER_LIMIT:
        console.print("the folder is too large")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
