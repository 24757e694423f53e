"""From logits to tokens: every sampling parameter of the contract, for the CPU backend.

It is also the definition that a device kernel has to meet, so each step is exact. For one row, with
logits `l` (float32, as the model gives them), `V` entries, and `n` outputs so far:

 1. Check. A row with a NaN or +inf, or without any finite entry, is a fault of that row alone.
 2. Log-probabilities, if asked for, are `log_softmax(l)` in float64, before everything below.
 3. `logit_bias`: l[v] += bias.
 4. `repetition_penalty` r, for v in prompt or output: l[v] / r where l[v] >= 0, else l[v] * r
    (Keskar et al. 2019, as in Hugging Face).
 5. `frequency_penalty` f and `presence_penalty` q, for v that is c > 0 times in the output alone:
    l[v] = l[v] - f * c - q (as OpenAI defines them).
 6. `allowed_token_ids`, if any: every other entry becomes -inf.
 7. While n < min_tokens: banned ids (EOS and stop ids) become -inf. If that would leave nothing of
    what the caller allows, the ban does not apply to this sequence: the allowed set is the harder wish.
    Values that grew past the float32 range in 4 are held at its maximum. A row that has no entry above
    -inf by now is a fault, as in 1.
 8. Temperature 0: the token is the largest entry, the lowest id among equals. Done; no division.
 9. Otherwise s = (l - max l) / max(T, 1e-6), in float32; the largest s is 0 for every T.
10. Entries are ranked by s, largest first, the lower id first among equals.
11. `top_k` k > 0: ranks from k on are dropped.
12. `top_p` p < 1: with weights w = exp(s) in float64, summed in rank order over what 11 left (over the
    row in id order when top_k is off), an entry stays while the weight of the ranks before it is less
    than p times the sum. The entry that crosses p stays.
13. `min_p` m > 0: an entry stays if s >= log m, which is p(v) >= m * max p, whatever 11 and 12 did.
14. Draw: the largest s + noise among those that stay, in float64, the lower id among equals; `noise` is
    Gumbel noise from a counter (`philox.py`) keyed by seed, completion index, n and v. This draws from
    softmax(s) over what stays (Gumbel-max: Maddison, Tarlow, Minka 2014).

Nothing depends on the other rows of the batch or on when a row is computed. Entries so low that no
noise can lift them to the top (`NOISE_RANGE`) are left out of 14, which changes no result.

Must not know requests, streams or the scheduler beyond `SamplerSpec`. Lives on the engine thread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from photon_grpc.runner.philox import NOISE_RANGE, NoiseKeys
from photon_grpc.scheduler.output import RowFault, SamplerSpec
from photon_grpc.types import TokenLogprobs

NO_TOKEN = -1
"""Stands in `SampledRows.token_ids` for a faulted row; never a valid id."""

Floats = npt.NDArray[np.float32]

_MIN_TEMPERATURE = 1e-6
_FLOAT_MAX = np.finfo(np.float32).max
_LOW_32 = 0xFFFFFFFF

# Ranking costs with the number of ranks, and a nucleus is mostly narrow: the first width that holds it
# ends the search. The last resort is a full sort.
_RANKED_WIDTHS = (128, 1024)


@dataclass(frozen=True, slots=True)
class SampledRows:
    """One step's tokens in the order of the rows; log-probabilities and faults by seq_id."""

    token_ids: list[int]
    logprobs: dict[int, TokenLogprobs]
    faults: dict[int, RowFault]


class _TokenCounts:
    """How often each token occurs, as arrays of the distinct ones: their number stays small beside the
    vocabulary."""

    __slots__ = ("_counts", "_slots", "_token_ids")

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._slots: dict[int, int] = {}
        self._token_ids = np.empty(64, dtype=np.int64)
        self._counts = np.empty(64, dtype=np.float32)
        for token_id in token_ids:
            self.add(token_id)

    def add(self, token_id: int) -> None:
        slot = self._slots.get(token_id)
        if slot is not None:
            self._counts[slot] += 1
            return
        slot = len(self._slots)
        if slot == len(self._token_ids):
            self._token_ids = np.concatenate([self._token_ids, np.empty_like(self._token_ids)])
            self._counts = np.concatenate([self._counts, np.empty_like(self._counts)])
        self._slots[token_id] = slot
        self._token_ids[slot] = token_id
        self._counts[slot] = 1

    @property
    def token_ids(self) -> npt.NDArray[np.int64]:
        """The distinct tokens, in the order of their first occurrence."""
        return self._token_ids[: len(self._slots)]

    @property
    def counts(self) -> npt.NDArray[np.float32]:
        """The number of each of `token_ids`."""
        return self._counts[: len(self._slots)]


class _Sequence:
    """What the sampler keeps for one sequence."""

    __slots__ = (
        "allowed",
        "banned",
        "bias",
        "greedy",
        "index",
        "log_min_p",
        "min_tokens",
        "num_outputs",
        "outputs",
        "params",
        "processed",
        "seen",
        "seq_id",
        "temperature",
        "top_k",
        "top_logprobs",
        "top_p",
    )

    def __init__(
        self,
        seq_id: int,
        spec: SamplerSpec,
        token_ids: Sequence[int],
        num_prompt_tokens: int,
        vocab_size: int,
    ) -> None:
        params = spec.sampling
        self.seq_id = seq_id
        self.params = params
        self.index = spec.index
        self.top_logprobs = spec.top_logprobs
        self.min_tokens = spec.min_tokens
        self.num_outputs = len(token_ids) - num_prompt_tokens
        self.greedy = params.temperature == 0
        self.temperature = max(params.temperature, _MIN_TEMPERATURE)
        self.top_k = params.top_k if params.top_k < vocab_size else 0
        self.top_p = params.top_p
        self.log_min_p = math.log(params.min_p) if params.min_p > 0 else -math.inf

        self.bias = _pairs(params.logit_bias)
        self.allowed = np.array(params.allowed_token_ids) if params.allowed_token_ids else None
        self.banned = effective_ban(spec, vocab_size)
        # Prompt and output together, for the repetition penalty; output alone, for the other two.
        self.seen = _TokenCounts(token_ids) if params.repetition_penalty != 1 else None
        counted = params.presence_penalty or params.frequency_penalty
        self.outputs = _TokenCounts(token_ids[num_prompt_tokens:]) if counted else None
        self.processed = any(
            part is not None for part in (self.bias, self.allowed, self.banned, self.seen, self.outputs)
        )

    def process(self, logits: Floats) -> Floats:
        """Steps 3 to 7 on a copy of one row, float32 [vocab]."""
        row = logits.copy()
        params = self.params
        if self.bias is not None:
            np.add.at(row, *self.bias)
        if self.seen is not None:
            ids, penalty = self.seen.token_ids, np.float32(params.repetition_penalty)
            values = row[ids]
            with np.errstate(over="ignore"):  # infinity is what the maximum below is for
                row[ids] = np.where(values < 0, values * penalty, values / penalty)
        if self.outputs is not None:
            ids = self.outputs.token_ids
            row[ids] -= np.float32(params.frequency_penalty) * self.outputs.counts
            row[ids] -= np.float32(params.presence_penalty)
        if self.allowed is not None:
            allowed = row[self.allowed]
            row.fill(-np.inf)
            row[self.allowed] = allowed
        if self.banned is not None and self.num_outputs < self.min_tokens:
            row[self.banned] = -np.inf
        return np.minimum(row, _FLOAT_MAX, out=row)

    def advance(self, token_id: int) -> None:
        """The row's token is out."""
        self.num_outputs += 1
        if self.seen is not None:
            self.seen.add(token_id)
        if self.outputs is not None:
            self.outputs.add(token_id)


def _pairs(bias: Sequence[tuple[int, float]]) -> tuple[npt.NDArray[np.int64], Floats] | None:
    if not bias:
        return None
    token_ids, values = zip(*bias, strict=True)
    return np.array(token_ids), np.array(values, dtype=np.float32)


def effective_ban(spec: SamplerSpec, vocab_size: int) -> npt.NDArray[np.int64] | None:
    """The ids of step 7, or None where the ban does not apply."""
    if not spec.min_tokens or not spec.banned_token_ids:
        return None
    banned = {token_id for token_id in spec.banned_token_ids if token_id < vocab_size}
    allowed = spec.sampling.allowed_token_ids or range(vocab_size)
    if not banned or all(token_id in banned for token_id in allowed):
        return None
    return np.array(sorted(banned))


class Sampler:
    """Draws the tokens of a step and keeps, by seq_id, what the parameters of a sequence depend on."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        assert device.type == "cpu", "other devices sample in their own kernel"
        self._vocab_size = vocab_size
        self._sequences: dict[int, _Sequence] = {}
        # The rows of the last step and whether each is greedy without any parameter or log-probability:
        # decode steps mostly repeat the same rows, and most of them are that plain.
        self._rows: list[_Sequence] = []
        self._row_ids: tuple[int, ...] = ()
        self._plain = False

    def add(self, seq_id: int, spec: SamplerSpec, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        """A sequence enters, for the first time or again after preemption with its outputs so far."""
        self._sequences[seq_id] = _Sequence(seq_id, spec, token_ids, num_prompt_tokens, self._vocab_size)

    def remove(self, seq_id: int) -> None:
        """Forget a sequence."""
        del self._sequences[seq_id]
        self._row_ids = ()

    def clear(self) -> None:
        """Forget all sequences."""
        self._sequences.clear()
        self._row_ids = ()

    def sample(self, seq_ids: Sequence[int], logits: Tensor) -> SampledRows:
        """One token for each row of `logits` (float32 [len(seq_ids), vocab_size], left as it is).

        A faulted row has NO_TOKEN and does not advance.
        """
        rows = self._rows_of(seq_ids)
        scores = logits.numpy()
        # argmax stops at a NaN, so the entry it finds is finite just when the row passes the check.
        best = scores.argmax(axis=-1)
        finite = np.isfinite(scores[np.arange(len(rows)), best])
        token_ids: list[int] = best.tolist()
        logprobs: dict[int, TokenLogprobs] = {}
        faults: dict[int, RowFault] = {}
        if not (self._plain and finite.all()):
            usable = [i for i, is_finite in enumerate(finite.tolist()) if is_finite]
            drawn = self._choose(rows, usable, scores, token_ids)
            for i in sorted(set(range(len(rows))) - drawn):
                token_ids[i] = NO_TOKEN
                faults[rows[i].seq_id] = RowFault.NON_FINITE_LOGITS
            logprobs = self._logprobs(rows, sorted(drawn), logits, token_ids)
        for row, token_id in zip(rows, token_ids, strict=True):
            if token_id != NO_TOKEN:
                row.advance(token_id)
        return SampledRows(token_ids, logprobs, faults)

    def prompt_logprobs(self, logits: Tensor, token_ids: Tensor, top: int) -> list[TokenLogprobs]:
        """Log-probabilities of given tokens: `logits` float32 [n, vocab_size], `token_ids` int64 [n]."""
        return _score(logits, token_ids, [top] * logits.shape[0])

    def _rows_of(self, seq_ids: Sequence[int]) -> list[_Sequence]:
        key = tuple(seq_ids)
        if key != self._row_ids:
            self._rows = [self._sequences[seq_id] for seq_id in key]
            self._row_ids = key
            self._plain = all(
                row.greedy and not row.processed and row.top_logprobs is None for row in self._rows
            )
        return self._rows

    @staticmethod
    def _choose(
        rows: Sequence[_Sequence], usable: Sequence[int], logits: Floats, token_ids: list[int]
    ) -> set[int]:
        """Replace the argmax in `token_ids` where a row asks for more; the rows that have a token."""
        drawn = set(usable)
        sampled: list[int] = []
        processed: list[Floats] = []
        for i in usable:
            row = rows[i]
            if row.greedy and not row.processed:
                continue
            values = row.process(logits[i]) if row.processed else logits[i]
            if row.processed:
                token_ids[i] = int(values.argmax())
                if values[token_ids[i]] == -np.inf:
                    drawn.discard(i)
                    continue
            if not row.greedy:
                sampled.append(i)
                processed.append(values)
        if sampled:
            draws = _draw(torch.from_numpy(np.stack(processed)), [rows[i] for i in sampled])
            for i, token_id in zip(sampled, draws, strict=True):
                token_ids[i] = token_id
        return drawn

    @staticmethod
    def _logprobs(
        rows: Sequence[_Sequence], drawn: Sequence[int], logits: Tensor, token_ids: Sequence[int]
    ) -> dict[int, TokenLogprobs]:
        asking = [i for i in drawn if rows[i].top_logprobs is not None]
        if not asking:
            return {}
        scored = _score(
            logits[asking],
            torch.tensor([token_ids[i] for i in asking]),
            [rows[i].top_logprobs or 0 for i in asking],
        )
        return {rows[i].seq_id: entry for i, entry in zip(asking, scored, strict=True)}


def _draw(logits: Tensor, rows: Sequence[_Sequence]) -> list[int]:
    """Steps 9 to 14 for processed logits [n, vocab] of rows with a temperature."""
    keys = NoiseKeys(
        np.array([row.params.seed for row in rows], dtype=np.uint64),
        [row.index for row in rows],
        [row.num_outputs for row in rows],
    )
    temperature = torch.tensor([[row.temperature] for row in rows], dtype=torch.float32)
    scores = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    truncated = [i for i, row in enumerate(rows) if row.top_k or row.top_p < 1]
    whole = [i for i, row in enumerate(rows) if not (row.top_k or row.top_p < 1)]
    token_ids = [NO_TOKEN] * len(rows)
    for part, draw in ((whole, _draw_whole), (truncated, _draw_truncated)):
        if part:
            everything = len(part) == len(rows)
            draws = draw(
                scores if everything else scores[part],
                [rows[i] for i in part],
                keys if everything else keys.select(part),
            )
            for i, token_id in zip(part, draws, strict=True):
                token_ids[i] = token_id
    return token_ids


def _floors(rows: Sequence[_Sequence]) -> Tensor:
    """The score below which an entry is dropped by min_p or cannot win, [n, 1]."""
    return torch.tensor([[max(row.log_min_p, -NOISE_RANGE)] for row in rows], dtype=torch.float64)


def _draw_whole(scores: Tensor, rows: Sequence[_Sequence], keys: NoiseKeys) -> list[int]:
    """The draw for rows without top_k and top_p."""
    vocab_size = scores.shape[-1]
    kept = scores >= _floors(rows)
    width = int(kept.sum(dim=-1).max())
    if width * 4 <= vocab_size:
        ranked, token_ids = _rank(scores, width)
        return _largest(ranked, ranked >= _floors(rows), token_ids, keys)
    noisy = keys.gumbel_all(vocab_size).add_(scores)
    picks: list[int] = noisy.masked_fill_(~kept, -math.inf).numpy().argmax(axis=-1).tolist()
    return picks


def _draw_truncated(scores: Tensor, rows: Sequence[_Sequence], keys: NoiseKeys) -> list[int]:
    """The draw for rows with top_k, top_p or both."""
    vocab_size = scores.shape[-1]
    # Row by row, because a sum over one row of several may add in another order than over one alone.
    totals = [
        math.inf if row.top_k or row.top_p >= 1 else float(scores[i].double().exp_().sum())
        for i, row in enumerate(rows)
    ]
    token_ids = [NO_TOKEN] * len(rows)
    pending = list(range(len(rows)))
    for width in (*_RANKED_WIDTHS, vocab_size):
        width = min(width, vocab_size)
        now = [i for i in pending if rows[i].top_k <= width]
        if not now:
            continue
        ranked, ids = _rank(scores[now], width)
        kept = _kept(ranked, [rows[i] for i in now], [totals[i] for i in now])
        # Ranks are kept from the top down: once one is dropped, all that matter have been seen.
        full = kept[:, -1].tolist()
        done = [
            j for j, i in enumerate(now) if not full[j] or 0 < rows[i].top_k <= width or width == vocab_size
        ]
        if done:
            draws = _largest(ranked[done], kept[done], ids[done], keys.select([now[j] for j in done]))
            for j, token_id in zip(done, draws, strict=True):
                token_ids[now[j]] = token_id
        pending = [i for i in pending if token_ids[i] == NO_TOKEN]
        if not pending:
            break
    return token_ids


def _kept(ranked: Tensor, rows: Sequence[_Sequence], totals: Sequence[float]) -> Tensor:
    """Which ranks survive steps 11 to 13, bool [n, width]; `totals` are the sums of rows without top_k."""
    width = ranked.shape[-1]
    top_k = torch.tensor([[row.top_k or width] for row in rows])
    in_top_k = torch.arange(width) < top_k
    kept = in_top_k & (ranked >= _floors(rows))
    if any(row.top_p < 1 for row in rows):
        running = (ranked.exp() * in_top_k).cumsum(dim=-1)
        limits = [
            math.inf if row.top_p >= 1 else row.top_p * (float(running[j, -1]) if row.top_k else totals[j])
            for j, row in enumerate(rows)
        ]
        kept[:, 1:] &= running[:, :-1] < torch.tensor(limits, dtype=torch.float64).unsqueeze(-1)
    return kept


def _largest(ranked: Tensor, kept: Tensor, token_ids: Tensor, keys: NoiseKeys) -> list[int]:
    """The draw among ranked candidates; all arguments [n, width], `kept` true for leading ranks only."""
    width = int(kept.sum(dim=-1).max())
    ranked, kept, token_ids = ranked[:, :width], kept[:, :width], token_ids[:, :width]
    noisy = (keys.gumbel_at(token_ids) + ranked).masked_fill_(~kept, -math.inf)
    # The lower id among equals is not always the lower rank: noise can level two different scores.
    tied = noisy == noisy.amax(dim=-1, keepdim=True)
    picks: list[int] = token_ids.masked_fill(~tied, torch.iinfo(torch.int64).max).amin(dim=-1).tolist()
    return picks


def _rank(scores: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` largest of float32 scores [n, vocab]: float64 values and int64 ids, both [n, width].

    Equal scores rank by id, which plain topk leaves open: one integer holds the score's bits, made
    monotonic, above the complement of the id. Adding zero turns -0.0 into 0.0.
    """
    vocab_size = scores.shape[-1]
    bits = (scores + 0.0).view(torch.int32).to(torch.int64)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) << 32
    packed = ordered | (_LOW_32 - torch.arange(vocab_size))
    if width < vocab_size:
        packed = packed.topk(width, dim=-1).values
    else:
        packed = packed.sort(dim=-1, descending=True).values
    token_ids = _LOW_32 - (packed & _LOW_32)
    return scores.gather(-1, token_ids).double(), token_ids


def _score(logits: Tensor, token_ids: Tensor, tops: Sequence[int]) -> list[TokenLogprobs]:
    """Log-probabilities of `token_ids` [n] under raw logits [n, vocab], with `tops[i]` alternatives."""
    shifted = logits.double() - logits.amax(dim=-1, keepdim=True)
    # Row by row for the reason given in _draw_truncated.
    log_sums = torch.stack([row.exp().sum() for row in shifted]).log_().unsqueeze(-1)
    chosen = (shifted.gather(-1, token_ids.unsqueeze(-1)) - log_sums).flatten().tolist()
    width = min(max(tops, default=0), logits.shape[-1])
    if not width:
        return [TokenLogprobs(value) for value in chosen]
    _, top_ids = _rank(logits, width)
    top_values = (shifted.gather(-1, top_ids) - log_sums).tolist()
    return [
        TokenLogprobs(value, tuple(zip(ids[:top], values[:top], strict=True)))
        for value, ids, values, top in zip(chosen, top_ids.tolist(), top_values, tops, strict=True)
    ]
