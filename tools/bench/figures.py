"""What a load's records say: latencies, gaps between tokens, goodput. Pure functions of numbers.

Definitions, for one streamed call on the client's clock:

- TTFT: from the *intended* send time to the receipt of the first message that carries a token. In an
  open loop a late sender's delay is thus part of the latency, as it is for the user who waits.
- ITL: one gap per token after the first. A message of k tokens received t seconds after the one before
  it counts as k gaps of t/k; further tokens of the first message count as gaps of zero. So the gaps of
  a call always add up to the time from its first token to its last, however tokens were merged.
- Pause: the time between two successive messages with tokens, one per message. It is what a reader
  sees stand still, and merging tokens cannot make it look better.
- TPOT: the mean of a call's ITL gaps.
- Goodput: calls per second that ended OK with TTFT and TPOT within the objective.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

__all__ = ["CallRecord", "Distribution", "LoadSummary", "Objective", "Refusal", "summarize"]


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a failed call's trailers said. `reason` is empty where they had no ErrorInfo: the server did not
    answer, or the client ended the call. `retry_after_ms` is from RetryInfo, `pushback_ms` gRPC's own."""

    reason: str
    retry_after_ms: int | None
    pushback_ms: int | None

    @property
    def says_when(self) -> bool:
        """Whether it tells both an application and gRPC when to come back."""
        return bool(self.reason) and self.retry_after_ms is not None and self.pushback_ms is not None


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One call. Moments are seconds of the monotonic clock, which all processes of a host share.

    `tokens` holds `(received, number of tokens)` of each message that carried any; `num_messages`
    counts all messages, `code` is the name of the gRPC status, `refusal` is there when it is not OK.
    """

    intended: float
    sent: float
    ended: float
    code: str
    num_messages: int
    tokens: tuple[tuple[float, int], ...]
    refusal: Refusal | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens received."""
        return sum(count for _, count in self.tokens)

    @property
    def first_token_s(self) -> float:
        """TTFT; only of a call that brought a token."""
        return self.tokens[0][0] - self.intended

    def token_gaps_s(self) -> list[float]:
        """ITL: `num_tokens - 1` gaps that add up to the time from the first token to the last."""
        if not self.tokens:
            return []
        previous, first_count = self.tokens[0]
        gaps = [0.0] * (first_count - 1)
        for received, count in self.tokens[1:]:
            gaps += [(received - previous) / count] * count
            previous = received
        return gaps

    def pauses_s(self) -> list[float]:
        """Times between successive messages with tokens."""
        moments = [received for received, _ in self.tokens]
        return [later - earlier for earlier, later in pairwise(moments)]


@dataclass(frozen=True, slots=True)
class Distribution:
    """Percentiles of a sample, interpolated linearly between ranks; seconds where it is of durations."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    maximum: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Distribution | None:
        """None for an empty sample: there is no figure, and no zero stands for one."""
        if not values:
            return None
        sample = np.asarray(values, dtype=np.float64)
        p50, p90, p99 = (float(value) for value in np.percentile(sample, (50, 90, 99)))
        return cls(len(values), float(sample.mean()), p50, p90, p99, float(sample.max()))


@dataclass(frozen=True, slots=True)
class Objective:
    """When a call counts as good; seconds."""

    first_token_s: float
    token_gap_s: float

    def is_met(self, record: CallRecord) -> bool:
        """True for a call that ended OK and whose TTFT and TPOT are within the objective."""
        if record.code != "OK" or not record.tokens:
            return False
        gaps = record.token_gaps_s()
        mean_gap = sum(gaps) / len(gaps) if gaps else 0.0
        return record.first_token_s <= self.first_token_s and mean_gap <= self.token_gap_s


@dataclass(frozen=True, slots=True)
class LoadSummary:
    """One load. `elapsed_s` runs from the first intended send time to the end of the last call.

    Latencies are of calls that ended OK; tokens and messages of failed calls are counted, because the
    server produced them.
    """

    num_calls: int
    codes: dict[str, int]
    elapsed_s: float
    num_tokens: int
    num_messages: int
    tokens_per_second: float
    messages_per_second: float
    tokens_per_token_message: float
    calls_per_second: float
    goodput_calls_per_second: float
    first_token: Distribution | None
    token_gap: Distribution | None
    pause: Distribution | None
    end_to_end: Distribution | None
    send_lateness: Distribution | None


def summarize(records: Sequence[CallRecord], objective: Objective) -> LoadSummary:
    """The figures of one load; `records` must not be empty."""
    good = [record for record in records if record.code == "OK" and record.tokens]
    elapsed = max(r.ended for r in records) - min(r.intended for r in records)
    num_tokens = sum(record.num_tokens for record in records)
    num_messages = sum(record.num_messages for record in records)
    num_token_messages = sum(len(record.tokens) for record in records)
    return LoadSummary(
        num_calls=len(records),
        codes=dict(Counter(record.code for record in records)),
        elapsed_s=elapsed,
        num_tokens=num_tokens,
        num_messages=num_messages,
        tokens_per_second=num_tokens / elapsed,
        messages_per_second=num_messages / elapsed,
        tokens_per_token_message=num_tokens / num_token_messages if num_token_messages else 0.0,
        calls_per_second=len(good) / elapsed,
        goodput_calls_per_second=sum(objective.is_met(record) for record in records) / elapsed,
        first_token=Distribution.of([r.first_token_s for r in good]),
        token_gap=Distribution.of([gap for r in good for gap in r.token_gaps_s()]),
        pause=Distribution.of([pause for r in good for pause in r.pauses_s()]),
        end_to_end=Distribution.of([r.ended - r.intended for r in good]),
        send_lateness=Distribution.of([r.sent - r.intended for r in records]),
    )
