"""A model driven by hand over a paged cache, and the same checkpoint in transformers.

Blocks are handed out in shuffled order and every slot that nobody has written holds NaN, so a read of a
wrong or unwritten slot shows in the logits.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from photon_grpc.models.loader import load_weights
from photon_grpc.models.registry import build_model, load_config
from photon_grpc.ops.base import AttentionMetadata, Ops
from photon_grpc.ops.torch_ops import TorchOps
from photon_grpc.runner.kv_cache import KVCache

CPU = torch.device("cpu")
GREEDY_TOKENS = 64


class PagedModel:
    """Sequences are named by the caller; `step` computes the next tokens of several at once."""

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype = torch.float32,
        block_size: int = 16,
        num_blocks: int = 64,
        ops: Ops | None = None,
        device: torch.device = CPU,
    ) -> None:
        ops = ops or TorchOps()
        self.config = load_config(folder)
        self.model = build_model(self.config, ops, dtype=dtype, device=device)
        load_weights(self.model, folder)
        self.cache = KVCache(self.config, ops, num_blocks, block_size, dtype=dtype, device=device)
        self.device = device
        self.block_size = block_size
        self._free = list(range(num_blocks))
        random.Random(0).shuffle(self._free)
        self._blocks: dict[str, list[int]] = {}
        self._lengths: dict[str, int] = {}
        for layer in self.cache.layers:
            layer.fill_(float("nan"))

    def step(self, rows: Sequence[tuple[str, Sequence[int]]]) -> list[Tensor]:
        """Logits [tokens, vocab] of each row: a sequence and its next tokens."""
        return [logits for _, logits in self.states(rows)]

    def states(self, rows: Sequence[tuple[str, Sequence[int]]]) -> list[tuple[Tensor, Tensor]]:
        """The same with the hidden states after the final norm before them, [tokens, hidden]; on the CPU."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][1]) > 1)
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        for i in order:
            name, tokens = rows[i]
            begin = self._lengths.get(name, 0)
            self._lengths[name] = begin + len(tokens)
            blocks = self._blocks.setdefault(name, [])
            while len(blocks) * self.block_size < begin + len(tokens):
                blocks.append(self._free.pop())
            for token, position in enumerate(range(begin, begin + len(tokens))):
                ids.append(tokens[token])
                positions.append(position)
                block, offset = divmod(position, self.block_size)
                slots.append(blocks[block] * self.block_size + offset)
            starts.append(len(ids))
        lengths = tuple(self._lengths[rows[i][0]] for i in order)
        tables = [self._blocks[rows[i][0]] for i in order]
        width = max(map(len, tables))
        metadata = AttentionMetadata(
            num_decodes=sum(len(tokens) == 1 for _, tokens in rows),
            slot_mapping=torch.tensor(slots, device=self.device),
            block_tables=torch.tensor(
                [table + [0] * (width - len(table)) for table in tables], device=self.device
            ),
            context_lens=torch.tensor(lengths, device=self.device),
            query_starts=tuple(starts),
            context_lens_host=lengths,
        )
        with torch.inference_mode():
            hidden = self.model.forward(
                torch.tensor(ids, device=self.device),
                torch.tensor(positions, device=self.device),
                self.cache,
                metadata,
            )
            both = hidden.cpu(), self.model.compute_logits(hidden).cpu()
        result: list[tuple[Tensor, Tensor]] = [both] * len(rows)
        for place, i in enumerate(order):
            own = slice(starts[place], starts[place + 1])
            result[i] = both[0][own], both[1][own]
        return result

    def release(self, name: str) -> None:
        """Give back a sequence's blocks; their contents stay, as in the server."""
        del self._lengths[name]
        self._free[:0] = self._blocks.pop(name)

    def written_slots(self, layer: int = 0) -> int:
        """Slots that hold something, in one layer."""
        return int((~self.cache.layers[layer].flatten(0, 1).flatten(1).isnan()).any(1).sum())

    def greedy(self, prompt: Sequence[int], num_tokens: int = GREEDY_TOKENS) -> tuple[list[int], Tensor]:
        """Tokens that follow `prompt`, and the logits [num_tokens, vocab] they were taken from."""
        tokens: list[int] = []
        logits: list[Tensor] = []
        pending = list(prompt)
        while len(tokens) < num_tokens:
            logits.append(self.step([("greedy", pending)])[0][-1])
            pending = [int(logits[-1].argmax())]
            tokens += pending
        self.release("greedy")
        return tokens, torch.stack(logits)


class TransformersModel:
    """The independent judge."""

    def __init__(
        self, folder: Path, *, dtype: torch.dtype = torch.float32, device: torch.device = CPU
    ) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self._model = model.to(device).eval()
        self._device = device

    def states(self, sequences: Sequence[Sequence[int]]) -> list[tuple[Tensor, Tensor]]:
        """Of each sequence the hidden states after the final norm and the logits, on the CPU as float32.

        In one batch: what pads the shorter ones stands behind them, where no token of theirs looks.
        """
        width = max(map(len, sequences))
        ids = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in sequences], device=self._device)
        with torch.inference_mode():
            hidden = self._model.model(ids).last_hidden_state
            logits = self._model.lm_head(hidden)
        hidden, logits = hidden.float().cpu(), logits.float().cpu()
        return [(hidden[i, : len(ids)], logits[i, : len(ids)]) for i, ids in enumerate(sequences)]

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """[tokens, vocab]."""
        with torch.inference_mode():
            result: Tensor = self._model(torch.tensor([list(token_ids)], device=self._device)).logits[0]
        return result.cpu()

    def greedy(self, prompt: Sequence[int], num_tokens: int = GREEDY_TOKENS) -> list[int]:
        ids = torch.tensor([list(prompt)], device=self._device)
        with torch.inference_mode():
            output = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=num_tokens,
                max_new_tokens=num_tokens,
                eos_token_id=None,
                pad_token_id=0,
            )
        tokens: list[int] = output[0, len(prompt) :].tolist()
        return tokens


def random_prompt(length: int, seed: int = 0, vocab_size: int = 512) -> list[int]:
    """Token ids above the special ones."""
    generator = random.Random(seed)
    return [generator.randrange(4, vocab_size) for _ in range(length)]
