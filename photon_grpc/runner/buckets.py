"""The sizes that steps are padded to, so that a few captured graphs serve every small step.

Pure arithmetic: knows no tensors and no sequences.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

# Decode rows of a step that has nothing else: fine where a step is short. 224 rows take longer than 256: the
# products do.
_DECODE_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192)
_DECODE_STEP = 64
# Decode rows beside a prefill, and its tokens. Every pair is a graph, so both are coarse.
_MIXED_ROWS = (0, 4, 16, 32, 64)
_MIXED_STEP = 64
_PREFILL_TOKENS = (16, 32, 64, 128, 256, 512)
_PREFILL_ROWS = 16
# The same of larger steps. Kernel by kernel the host takes 6 ms for one of a small model, as long as the
# device for 2,048 tokens; beyond that the device sets the pace.
_WIDE_ROWS = (0, 16, 64, 128)
_WIDE_STEP = 128
_WIDE_TOKENS = (768, 1024, 1536, 2048)
_WIDE_PREFILL_ROWS = 32
# Prompts alone come in finer sizes: a large model takes as long for tokens that only fill a shape.
_ALONE_TOKENS = (384, 640, 896, 1280, 1792)
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
    """Every row takes the largest of its logits as they are, which need not be written then."""
    logprobs: bool
    """Some row may have asked for log-probabilities."""


@dataclass(frozen=True, slots=True)
class _Mixed:
    """Shapes of steps with prefills: every pair of decode rows and tokens."""

    decodes: tuple[int, ...]
    num_prefills: int
    tokens: tuple[int, ...]

    def fit(self, num_decodes: int, num_prefills: int, num_prefill_tokens: int) -> StepShape | None:
        place = bisect_left(self.decodes, num_decodes)
        tokens = bisect_left(self.tokens, num_prefill_tokens)
        if num_prefills > self.num_prefills or place == len(self.decodes) or tokens == len(self.tokens):
            return None
        return StepShape(self.decodes[place], self.num_prefills, self.tokens[tokens])

    def shapes(self) -> list[StepShape]:
        return [StepShape(rows, self.num_prefills, tokens) for tokens in self.tokens for rows in self.decodes]


class Buckets:
    """The shapes that are captured for steps of up to `max_num_seqs` rows."""

    def __init__(self, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self._decodes = _up_to(max_num_seqs, _DECODE_ROWS, _DECODE_STEP)
        largest = min(max_num_batched_tokens, _PREFILL_TOKENS[-1])
        small = _Mixed(
            (0, *_up_to(max_num_seqs, _MIXED_ROWS[1:], _MIXED_STEP)),
            min(_PREFILL_ROWS, max_num_seqs),
            _up_to(largest, _PREFILL_TOKENS, largest),
        )
        self._mixed = [small]
        if max_num_batched_tokens > largest:
            widest = min(max_num_batched_tokens, _WIDE_TOKENS[-1])
            wide = _Mixed(
                (0, *_up_to(max_num_seqs, _WIDE_ROWS[1:], _WIDE_STEP)),
                min(_WIDE_PREFILL_ROWS, max_num_seqs),
                _up_to(widest, _WIDE_TOKENS, widest),
            )
            self._mixed.append(wide)
        # The last is the largest.
        most = self._mixed[-1].tokens[-1]
        between = tuple(tokens for tokens in _ALONE_TOKENS if tokens < most)
        if between:
            self._mixed.insert(0, _Mixed((0,), min(_WIDE_PREFILL_ROWS, max_num_seqs), between))

    def fit(self, num_decodes: int, num_prefills: int, num_prefill_tokens: int) -> StepShape | None:
        """The smallest shape that holds such a step; None where none does."""
        if not num_prefills:
            place = bisect_left(self._decodes, num_decodes)
            return StepShape(self._decodes[place], 0, 0) if place < len(self._decodes) else None
        shapes = (mixed.fit(num_decodes, num_prefills, num_prefill_tokens) for mixed in self._mixed)
        fitting = (shape for shape in shapes if shape is not None)
        return min(fitting, key=lambda shape: (shape.num_tokens, shape.num_rows), default=None)

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
        mixed = [shape for mixed in self._mixed for shape in mixed.shapes()]
        kinds = [StepKind(shape, *kind) for shape in decodes for kind in _DECODE_KINDS]
        kinds += [StepKind(shape, *kind) for shape in mixed for kind in _MIXED_KINDS]
        return sorted(kinds, key=lambda kind: -kind.shape.num_tokens)

    @property
    def largest(self) -> StepShape:
        """The shape with most rows and most tokens."""
        return self._mixed[-1].shapes()[-1]


def _up_to(limit: int, sizes: tuple[int, ...], step: int) -> tuple[int, ...]:
    """`sizes`, then by `step`, all below `limit`, and `limit` itself."""
    more = range(sizes[-1] + step, limit, step)
    return (*(size for size in (*sizes, *more) if size < limit), limit)
