"""SchedulerOutput -> model -> tokens, synchronously: the CPU's runner, and what others are held to.

Built and used on the engine thread. Decode rows stand before prefill rows in the batch, because they
take the vectorised path through attention.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import torch

from photon_grpc.models.llama import DecoderModel
from photon_grpc.ops.base import AttentionMetadata
from photon_grpc.runner.base import StepOutOfMemoryError
from photon_grpc.runner.input_batch import InputBatch, IntArray, StepIndices
from photon_grpc.runner.kv_cache import KVCache
from photon_grpc.runner.memory import OUT_OF_MEMORY_TYPES, is_out_of_memory
from photon_grpc.runner.prompt_scores import num_scored, score_prompt
from photon_grpc.runner.sampler import SampledRows
from photon_grpc.scheduler.output import ModelOutput, SamplerSpec, ScheduledSequence, SchedulerOutput
from photon_grpc.types import ModelInfo, TokenLogprobs


class RowSampler(Protocol):
    """What `Sampler` and `CudaSampler` have in common; see there."""

    def add(
        self, seq_id: int, spec: SamplerSpec, token_ids: Sequence[int], num_prompt_tokens: int
    ) -> None: ...

    def remove(self, seq_id: int) -> None: ...

    def clear(self) -> None: ...

    def sample(self, seq_ids: Sequence[int], logits: torch.Tensor) -> SampledRows: ...

    def prompt_logprobs(
        self, logits: torch.Tensor, token_ids: torch.Tensor, top: int
    ) -> list[TokenLogprobs]: ...


class ModelRunner:
    """Implements `runner.base.Runner` for a torch model."""

    max_in_flight = 1

    def __init__(
        self,
        decoder: DecoderModel,
        model: ModelInfo,
        kv_cache: KVCache,
        sampler: RowSampler,
        *,
        max_num_seqs: int,
    ) -> None:
        self.model = model
        self.num_blocks = kv_cache.num_blocks
        self.block_size = kv_cache.block_size
        self._decoder = decoder
        self._kv_cache = kv_cache
        self._batch = InputBatch(max_num_seqs, model.max_model_len, kv_cache.block_size)
        self._sampler = sampler
        self._device = kv_cache.device
        self._prompt_logprobs: dict[int, int] = {}
        self._num_prompt_tokens: dict[int, int] = {}
        self._outputs: deque[ModelOutput] = deque()

    def launch(self, output: SchedulerOutput) -> None:
        """Compute one step; its tokens wait for `collect`."""
        try:
            with torch.inference_mode():
                self._outputs.append(self._execute(output))
        except OUT_OF_MEMORY_TYPES as error:
            if not is_out_of_memory(error):
                raise
            self._forget_sequences()
            raise StepOutOfMemoryError(str(error)) from error

    def collect(self) -> ModelOutput:
        """The oldest launched step."""
        return self._outputs.popleft()

    def close(self) -> None:
        """Let go of model and cache."""
        self._outputs.clear()

    def _execute(self, output: SchedulerOutput) -> ModelOutput:
        self._update_batch(output)
        if output.is_empty:
            return ModelOutput(output.step, (), ())
        rows = sorted(output.rows, key=lambda row: row.num_tokens > 1)
        num_decodes = sum(row.num_tokens == 1 for row in rows)
        starts = (
            [self._batch.num_computed_tokens(row.seq_id) for row in rows] if self._prompt_logprobs else []
        )
        indices = self._batch.step(
            [row.seq_id for row in rows], [row.num_tokens for row in rows], num_decodes
        )
        sampled = [i for i, row in enumerate(rows) if row.sample]
        ends = torch.tensor([indices.query_starts[i + 1] - 1 for i in sampled], dtype=torch.int64)
        ends = ends.to(self._device)
        is_scored = bool(self._prompt_logprobs)
        hidden = self._decoder.forward(
            self._on_device(indices.token_ids),
            self._on_device(indices.positions),
            self._kv_cache,
            self._attention_metadata(indices, num_decodes),
            wanted=None if is_scored or len(sampled) == indices.query_starts[-1] else ends,
        )
        prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        if is_scored:
            prompt_logprobs = self._score_prompts(rows, starts, indices, hidden)
            hidden = hidden.index_select(0, ends)
        return self._sample(output.step, [rows[i].seq_id for i in sampled], hidden, prompt_logprobs)

    def _forget_sequences(self) -> None:
        self._batch.clear()
        self._sampler.clear()
        self._prompt_logprobs.clear()
        self._num_prompt_tokens.clear()

    def _update_batch(self, output: SchedulerOutput) -> None:
        for seq_id in output.removed:
            self._batch.remove(seq_id)
            self._sampler.remove(seq_id)
            self._prompt_logprobs.pop(seq_id, None)
            self._num_prompt_tokens.pop(seq_id, None)
        for new in output.new:
            self._batch.add(new.seq_id, new.token_ids, new.block_ids, new.num_computed_tokens)
            self._sampler.add(new.seq_id, new.sampler, new.token_ids, new.num_prompt_tokens)
            if new.sampler.prompt_top_logprobs is not None:
                self._prompt_logprobs[new.seq_id] = new.sampler.prompt_top_logprobs
                self._num_prompt_tokens[new.seq_id] = new.num_prompt_tokens
        for seq_id, block_ids in output.new_block_ids.items():
            self._batch.append_blocks(seq_id, block_ids)

    def _sample(
        self,
        step: int,
        seq_ids: Sequence[int],
        hidden: torch.Tensor,
        prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]],
    ) -> ModelOutput:
        """`hidden` are the states of the newest token of each sequence."""
        if not seq_ids:
            return ModelOutput(step, (), (), prompt_logprobs=prompt_logprobs)
        result = self._sampler.sample(seq_ids, self._decoder.compute_logits(hidden))
        for seq_id, token_id in zip(seq_ids, result.token_ids, strict=True):
            self._batch.append_token(seq_id, token_id)
        return ModelOutput(
            step=step,
            seq_ids=tuple(seq_ids),
            token_ids=tuple((token_id,) for token_id in result.token_ids),
            logprobs={seq_id: (entry,) for seq_id, entry in result.logprobs.items()},
            prompt_logprobs=prompt_logprobs,
            faults=result.faults,
        )

    def _score_prompts(
        self,
        rows: Sequence[ScheduledSequence],
        starts: Sequence[int],
        indices: StepIndices,
        hidden: torch.Tensor,
    ) -> dict[int, tuple[TokenLogprobs, ...]]:
        """Log-probabilities of the prompt tokens that follow those computed in this step."""
        scores: dict[int, tuple[TokenLogprobs, ...]] = {}
        for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
            top = self._prompt_logprobs.get(row.seq_id)
            if top is None:
                continue
            count = num_scored(row.num_tokens, start, self._num_prompt_tokens[row.seq_id])
            if not count:
                continue
            targets = self._on_device(self._batch.token_at(row.seq_id, start + 1, start + 1 + count))
            first = indices.query_starts[i]
            scores[row.seq_id] = score_prompt(
                self._decoder, self._sampler, hidden[first : first + count], targets, top
            )
        return scores

    def _attention_metadata(self, indices: StepIndices, num_decodes: int) -> AttentionMetadata:
        return AttentionMetadata(
            num_decodes=num_decodes,
            slot_mapping=self._on_device(indices.slot_mapping),
            block_tables=self._on_device(indices.block_tables),
            context_lens=self._on_device(indices.context_lens),
            query_starts=indices.query_starts,
            context_lens_host=tuple(indices.context_lens.tolist()),
        )

    def _on_device(self, array: IntArray) -> torch.Tensor:
        """On the CPU the array itself, without a copy."""
        return torch.from_numpy(array).to(self._device)
