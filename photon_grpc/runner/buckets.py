"""The sizes that steps are padded to, so that a few captured graphs serve every small step.

Pure arithmetic: knows no tensors and no sequences.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

# Decode rows of a step that has nothing else: fine where a step is short.
_DECODE_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
_DECODE_STEP = 32
# Decode rows beside a prefill, and its tokens. Every pair is a graph, so both are coarse.
_MIXED_ROWS = (0, 4, 16, 32, 64)
_MIXED_STEP = 64
_PREFILL_TOKENS = (16, 32, 64, 128, 256, 512)
_PREFILL_ROWS = 16
# (greedy, logprobs) of the captured steps. A prefill step is long beside its sampling, so one kind serves
# every row there is; log-probabilities cost nothing where nobody asked for them.
_DECODE_KINDS = ((False, True), (False, False), (True, False))
_MIXED_KINDS = ((False, True),)


@dataclass(frozen=True, slots=True)
class StepShape:
    """Rows and tokens of a step as the kernels see it, idle ones included."""

    num_decodes: int
    """Rows of one token, the newest of their sequences; they stand first."""
    num_prefills: int
    """Rows of any number of tokens that the host brings."""
    num_prefill_tokens: int
    """Tokens of all of those."""

    @property
    def num_rows(self) -> int:
        return self.num_decodes + self.num_prefills

    @property
    def num_tokens(self) -> int:
        return self.num_decodes + self.num_prefill_tokens


@dataclass(frozen=True, slots=True)
class StepKind:
    """What tells one captured step from another."""

    shape: StepShape
    greedy: bool
    """Every row is; the kernel for it is shorter."""
    logprobs: bool
    """Some row may have asked for log-probabilities."""


class Buckets:
    """The shapes that are captured for steps of up to `max_num_seqs` rows."""

    def __init__(self, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self._decodes = _up_to(max_num_seqs, _DECODE_ROWS, _DECODE_STEP)
        self._mixed = (0, *_up_to(max_num_seqs, _MIXED_ROWS[1:], _MIXED_STEP))
        largest = min(max_num_batched_tokens, _PREFILL_TOKENS[-1])
        self._tokens = _up_to(largest, _PREFILL_TOKENS, largest)
        self._num_prefills = min(_PREFILL_ROWS, max_num_seqs)

    def fit(self, num_decodes: int, num_prefills: int, num_prefill_tokens: int) -> StepShape | None:
        """The smallest shape that holds such a step; None where none does."""
        if not num_prefills:
            place = bisect_left(self._decodes, num_decodes)
            return StepShape(self._decodes[place], 0, 0) if place < len(self._decodes) else None
        place = bisect_left(self._mixed, num_decodes)
        tokens = bisect_left(self._tokens, num_prefill_tokens)
        if num_prefills > self._num_prefills or place == len(self._mixed) or tokens == len(self._tokens):
            return None
        return StepShape(self._mixed[place], self._num_prefills, self._tokens[tokens])

    def kind(self, shape: StepShape, *, greedy: bool, logprobs: bool) -> StepKind:
        """The captured step that serves such rows in this shape."""
        kinds = _MIXED_KINDS if shape.num_prefills else _DECODE_KINDS
        # The last that promises no more and leaves nothing out.
        return next(
            StepKind(shape, *kind) for kind in reversed(kinds) if kind[0] <= greedy and kind[1] >= logprobs
        )

    def kinds(self) -> list[StepKind]:
        """Every captured step, the largest first."""
        decodes = [StepShape(rows, 0, 0) for rows in self._decodes]
        mixed = [
            StepShape(rows, self._num_prefills, tokens) for tokens in self._tokens for rows in self._mixed
        ]
        kinds = [StepKind(shape, *kind) for shape in decodes for kind in _DECODE_KINDS]
        kinds += [StepKind(shape, *kind) for shape in mixed for kind in _MIXED_KINDS]
        return sorted(kinds, key=lambda kind: -kind.shape.num_tokens)

    @property
    def largest(self) -> StepShape:
        """The shape with most rows and most tokens."""
        return StepShape(self._mixed[-1], self._num_prefills, self._tokens[-1])


def _up_to(limit: int, sizes: tuple[int, ...], step: int) -> tuple[int, ...]:
    """`sizes`, then by `step`, all below `limit`, and `limit` itself."""
    more = range(sizes[-1] + step, limit, step)
    return (*(size for size in (*sizes, *more) if size < limit), limit)
