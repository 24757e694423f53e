"""SIGTERM in the middle of a load: no call that the server has taken fails, and it leaves in time."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass
from statistics import median
from typing import Any

from tools.bench.bars import Bar
from tools.bench.figures import CallRecord
from tools.bench.load import Load, poisson_arrivals, run_load
from tools.bench.overload import is_told_when, words
from tools.bench.server_handle import ServerHandle
from tools.bench.server_process import SCRIPTED_VOCAB_SIZE, ServerSpec

__all__ = ["DrainPlan", "DrainRow", "headline", "promises", "run"]

_FIRST_ID = 4


@dataclass(frozen=True, slots=True)
class DrainPlan:
    """Poisson arrivals for `duration_s`, SIGTERM after half of that."""

    rounds: int = 5
    duration_s: float = 6.0
    step_s: float = 0.025
    max_num_seqs: int = 32
    new_tokens: int = 50
    load: float = 0.7
    """Of what the engine can do."""
    propagation_s: float = 0.5
    max_s: float = 15.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class DrainRow:
    """One SIGTERM. In flight are calls that had been sent and had not ended at that moment.

    `failed_after_begin` counts calls that had brought a message and ended with an error, whenever they
    began; `refused` those that were told that the server drains and when to come back; `too_late` those
    that found nobody any more, and `wrong` has all others that failed, by what was said.
    """

    in_flight: int
    in_flight_failed: int
    failed_after_begin: int
    refused: int
    too_late: int
    wrong: dict[str, int]
    exit_code: int
    exit_s: float


def run(plan: DrainPlan) -> list[DrainRow]:
    """A server for each round."""
    return [_round(plan, plan.seed + number) for number in range(plan.rounds)]


def _round(plan: DrainPlan, seed: int) -> DrainRow:
    spec = ServerSpec(
        step_s=plan.step_s,
        max_num_seqs=plan.max_num_seqs,
        settings=(
            f"server.drain_propagation_s={plan.propagation_s}",
            f"server.drain_max_s={plan.max_s}",
        ),
    )
    rate = plan.load * plan.max_num_seqs / plan.step_s / plan.new_tokens
    with ServerHandle(spec) as server:
        load = Load(
            address=server.address,
            prompt_tokens=16,
            new_tokens=plan.new_tokens,
            first_id=_FIRST_ID,
            vocab_size=SCRIPTED_VOCAB_SIZE,
            arrivals=poisson_arrivals(rate, plan.duration_s, seed),
            seed=seed,
        )
        end: dict[str, Any] = {}

        def terminate() -> None:
            time.sleep(plan.duration_s / 2)
            end["at"] = time.monotonic()
            end["code"] = server.stop(plan.propagation_s + plan.max_s + 10)
            end["took"] = time.monotonic() - end["at"]

        thread = threading.Thread(target=terminate)
        records = run_load(load, 1, before=thread.start, after=lambda: None).records
        thread.join()
    return judge(records, end["at"], end["code"], end["took"])


def judge(records: tuple[CallRecord, ...], signalled: float, exit_code: int, exit_s: float) -> DrainRow:
    """What became of the calls around a SIGTERM at the monotonic moment `signalled`."""
    in_flight = [r for r in records if r.sent < signalled < r.ended]
    failed = [r for r in records if r.code != "OK"]
    unavailable = [r for r in failed if r.code == "UNAVAILABLE"]
    reasons = [r.refusal.reason if r.refusal else "" for r in unavailable]
    pairs = list(zip(unavailable, reasons, strict=True))
    refused = [r for r, reason in pairs if reason == "DRAINING" and is_told_when(r)]
    too_late = [r for r, reason in pairs if not reason and r.sent > signalled]
    return DrainRow(
        in_flight=len(in_flight),
        in_flight_failed=sum(r.code != "OK" for r in in_flight),
        failed_after_begin=sum(r.num_messages > 0 for r in failed),
        refused=len(refused),
        too_late=len(too_late),
        wrong=dict(Counter(words(r) for r in failed if r not in refused and r not in too_late)),
        exit_code=exit_code,
        exit_s=exit_s,
    )


def promises(plan: DrainPlan, rows: list[DrainRow]) -> list[Bar]:
    """Of all rounds together."""
    failed = sum(row.in_flight_failed + row.failed_after_begin for row in rows)
    wrong = sum(sum(row.wrong.values()) for row in rows)
    longest = max(row.exit_s for row in rows)
    # The stop of listeners and engine has bounds of its own.
    return [
        Bar("drain: calls in flight that failed", failed, 0, at_least=False),
        Bar("drain: later calls with a wrong end", wrong, 0, at_least=False),
        Bar("drain: exit codes that are not 0", sum(row.exit_code != 0 for row in rows), 0, at_least=False),
        Bar("drain: longest exit, s", longest, plan.propagation_s + plan.max_s, at_least=False),
    ]


def headline(rows: list[DrainRow]) -> str:
    """In one line."""
    in_flight, failed = sum(row.in_flight for row in rows), sum(row.in_flight_failed for row in rows)
    refused, too_late = sum(row.refused for row in rows), sum(row.too_late for row in rows)
    return (
        f"{len(rows)} x SIGTERM: {in_flight} calls in flight, {failed} failed; {refused} later ones refused "
        f"as draining, {too_late} found nobody; exit after "
        f"{median(row.exit_s for row in rows):.1f} s (median)"
    )
