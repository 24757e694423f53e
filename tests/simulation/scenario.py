"""What happens in one seed, decided before it runs: the engine's size, who calls when, what goes wrong.

A scenario is plain data made from its seed alone, so a failing seed can be run again, and with some of
its calls left out. Lengths crowd around block boundaries, prompts share their beginnings, pools are
often just large enough for the largest call: that is where schedulers have their bugs.
"""

from __future__ import annotations

import enum
import random
from dataclasses import dataclass
from functools import cached_property

from photon_grpc.engine.core import MAX_FAILURES
from photon_grpc.types import FinishReason
from tests.simulation.oracle import EOS_IDS, FIRST_PLAIN_ID, STOP_IDS, VOCABULARY, Completion, complete

MAX_PROMPT = 48


class State(enum.Enum):
    """Where a call is when its caller leaves it."""

    QUEUED = enum.auto()
    MID_CHUNK = enum.auto()
    DECODING = enum.auto()
    PREEMPTED = enum.auto()
    IN_FLIGHT = enum.auto()


class Way(enum.Enum):
    """How a call is ended from outside."""

    CLOSE = enum.auto()
    ONE_COMPLETION = enum.auto()
    OPERATOR = enum.auto()


@dataclass(frozen=True)
class Leave:
    """End the call the first time that it is seen in `state`, after `tokens` tokens have come."""

    state: State
    way: Way
    tokens: int = 0


@dataclass(frozen=True)
class Call:
    """One request. `number` is unique in the scenario and travels through the engine as its seed."""

    number: int
    at: float
    request_id: str
    prompt: tuple[int, ...]
    n: int
    max_tokens: int
    min_tokens: int
    eos_ids: tuple[int, ...]
    stop_ids: tuple[int, ...]
    length_finish: FinishReason
    priority: int
    tenant: str
    weight: float
    kv_share: float
    salt: str
    bypass_prefix_cache: bool
    top_logprobs: int | None
    prompt_top_logprobs: int | None
    start_within: float | None
    first_token_within: float | None
    end_within: float | None
    finish_within: float | None
    leave: Leave | None
    read_every: int
    # (completion index, output position) at which the logits are not finite.
    faults: frozenset[tuple[int, int]]

    @cached_property
    def alone(self) -> tuple[Completion, ...]:
        """What each completion is when the call runs alone and nothing goes wrong."""
        return tuple(
            complete(
                self.prompt,
                index,
                max_tokens=self.max_tokens,
                min_tokens=self.min_tokens,
                eos_ids=self.eos_ids,
                stop_ids=self.stop_ids,
                length_finish=self.length_finish,
            )
            for index in range(self.n)
        )


class Happening(enum.Enum):
    """What happens to the whole engine."""

    JUMP = enum.auto()
    JUMP_TO_DEADLINE = enum.auto()
    ABORT_ALL = enum.auto()
    DRAIN = enum.auto()
    SHUTDOWN = enum.auto()


@dataclass(frozen=True)
class Event:
    at: float
    what: Happening
    seconds: float = 0.0


class CrashPoint(enum.Enum):
    """Where the device fails for good, or has no memory for a step."""

    LAUNCH = enum.auto()
    COLLECT = enum.auto()


@dataclass(frozen=True)
class Scenario:
    seed: int
    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    mixed_chunk_tokens: int
    max_queued: int
    max_in_flight: int
    prefix_caching: bool
    priority_boost_s: float
    step_s: float
    crash: tuple[CrashPoint, int] | None
    close_fails: bool
    # The launches and collections, counted from 1, for which there is no memory: fewer than the engine bears.
    lacks: frozenset[tuple[CrashPoint, int]]
    calls: tuple[Call, ...]
    events: tuple[Event, ...]


def scenario_of(seed: int) -> Scenario:
    """The scenario of a seed; equal for equal seeds on every machine."""
    return _Maker(seed).scenario()


class _Maker:
    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = rng = random.Random(seed)
        self.block_size = rng.choice((1, 2, 3, 4, 4, 8, 16))
        self.max_num_seqs = rng.choice((1, 2, 3, 4, 4, 6, 8))
        self.longest_prompt = rng.choice((8, 16, 32, MAX_PROMPT))
        self.longest_output = rng.choice((3, 12, 24, 32))
        # The largest call must fit: the validator refuses what does not.
        enough = -(-(self.longest_prompt + self.longest_output) // self.block_size)
        self.num_blocks = max(enough, int(enough * rng.choice((1.0, 1.0, 1.2, 1.5, 3.0))))
        self.step_s = rng.choice((0.001, 0.01, 0.03))
        self.gap_s = rng.choice((0.0, 0.1, 1.0, 4.0)) * self.step_s
        self.documents = [self.tokens(self.longest_prompt) for _ in range(rng.choice((1, 1, 2, 3)))]
        self.salts = ["", "b"][: rng.choice((1, 2))]
        self.eos_is_common = self.chance(0.7)
        # Whose calls they are is drawn apart, so that one tenant or three see the same calls.
        self.tenant_random = random.Random(f"tenants of {seed}")
        self.id_random = random.Random(f"ids of {seed}")
        names = "abc"[: self.tenant_random.choice((1, 2, 2, 3))]
        self.tenants = {name: self.tenant_random.choice((0.5, 1.0, 1.0, 2.0, 4.0)) for name in names}
        # Caps of half of the pool or less, in some scenarios.
        has_caps = self.tenant_random.random() < 0.4
        self.kv_shares = {
            name: self.tenant_random.choice((0.125, 0.25, 0.5, 1.0)) if has_caps else 1.0
            for name in self.tenants
        }
        self.shares = {name: rng.choice((0.0, 0.0, 0.0, 0.1, 0.4)) for name in _FEATURES}
        self.calls: list[Call] = []

    def scenario(self) -> Scenario:
        rng = self.random
        at = 0.0
        for number in range(1, rng.randint(3, 12) + 1):
            if not self.chance(0.3):
                at += rng.expovariate(1 / self.gap_s) if self.gap_s else 0.0
            self.calls.append(self.call(number, at))
        end = at + 20 * self.step_s
        return Scenario(
            seed=self.seed,
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=max(self.max_num_seqs, rng.choice((1, 2, 4, 8, 16, 64))),
            # Drawn apart, so that it changes nothing else of a seed.
            mixed_chunk_tokens=random.Random(f"chunks of {self.seed}").choice((0, 0, 1, 2, 5, 16)),
            max_queued=rng.choice((1, 4, 1024, 1024)),
            max_in_flight=rng.choice((1, 2, 2, 3)),
            prefix_caching=self.chance(0.85),
            priority_boost_s=rng.choice((0.5, 3.0, 1000.0)) * self.step_s,
            step_s=self.step_s,
            crash=(rng.choice(tuple(CrashPoint)), rng.randint(1, 40)) if self.chance(0.1) else None,
            close_fails=self.chance(0.1),
            lacks=frozenset(self.lacks()),
            calls=tuple(self.calls),
            events=tuple(self.events(end)),
        )

    def lacks(self) -> set[tuple[CrashPoint, int]]:
        # Drawn apart, so that they change nothing else of a seed.
        rng = random.Random(f"lacks of {self.seed}")
        if rng.random() > 0.3:
            return set()
        lacks = {(rng.choice(tuple(CrashPoint)), rng.randint(1, 60)) for _ in range(rng.randint(1, 5))}
        if rng.random() < 0.3:
            # Again and again, until the batch is down to one sequence and beyond.
            first = rng.randint(1, 30)
            lacks |= {(CrashPoint.LAUNCH, first + n) for n in range(rng.randint(2, MAX_FAILURES - 6))}
        return lacks

    def events(self, end: float) -> list[Event]:
        rng = self.random
        events: list[Event] = []
        if self.chance(0.25):
            for _ in range(rng.randint(1, 2)):
                seconds = self.step_s * 10 ** rng.uniform(0.5, 6)
                events.append(Event(rng.uniform(0, end), Happening.JUMP, seconds))
        for what, share in (
            (Happening.JUMP_TO_DEADLINE, 0.2),
            (Happening.ABORT_ALL, 0.1),
            (Happening.DRAIN, 0.1),
            (Happening.SHUTDOWN, 0.1),
        ):
            if self.chance(share):
                events.append(Event(rng.uniform(0, end), what))
        return events

    def call(self, number: int, at: float) -> Call:
        rng = self.random
        prompt = self.prompt()
        max_tokens = rng.choice((rng.randint(1, self.longest_output), self.longest_output))
        leave = self.leave(max_tokens)
        ends_one = leave is not None and leave.way is Way.ONE_COMPLETION
        n = rng.choice((2, 3)) if ends_one or self.has("n") else 1
        faults = {(index, rng.randrange(max_tokens)) for index in range(n) if self.has("fault")}
        if leave is not None and leave.state is State.IN_FLIGHT and self.chance(0.3):
            # The row whose caller has just left is the faulty one.
            faults = {(n - 1, leave.tokens)}
        tenant = self.tenant()
        request_id = f"r{number}"
        if self.calls and self.chance(0.05):
            request_id = rng.choice(self.calls).request_id
        others = [call.request_id for call in self.calls if call.tenant != tenant]
        if others and self.id_random.random() < 0.3:
            request_id = self.id_random.choice(others)
        return Call(
            number=number,
            at=at,
            request_id=request_id,
            prompt=prompt,
            n=n,
            max_tokens=max_tokens,
            min_tokens=rng.randint(0, max_tokens) if self.chance(0.2) else 0,
            eos_ids=rng.choice((EOS_IDS, EOS_IDS[:1])) if self.eos_is_common else (),
            stop_ids=STOP_IDS if self.has("stop_ids") else (),
            length_finish=rng.choice((FinishReason.MAX_TOKENS, FinishReason.CONTEXT_LIMIT)),
            priority=rng.randint(0, 9) if self.has("priority") else 0,
            tenant=tenant,
            weight=self.tenants[tenant],
            kv_share=self.kv_shares[tenant],
            salt=rng.choice(self.salts),
            bypass_prefix_cache=self.has("bypass"),
            top_logprobs=rng.choice((0, 2)) if self.has("logprobs") else None,
            prompt_top_logprobs=rng.choice((0, 1)) if self.has("prompt_logprobs") else None,
            start_within=self.delay("start_within"),
            first_token_within=self.delay("first_token_within"),
            end_within=self.delay("end_within"),
            finish_within=self.delay("finish_within"),
            leave=leave,
            read_every=rng.choice((1, 1, 1, 3, 10)),
            faults=frozenset(faults),
        )

    def tenant(self) -> str:
        """Often the one of the call before: floods, and tenants that come late."""
        rng = self.tenant_random
        return self.calls[-1].tenant if self.calls and rng.random() < 0.6 else rng.choice([*self.tenants])

    def prompt(self) -> tuple[int, ...]:
        rng = self.random
        if self.calls and self.chance(0.2):
            # The next turn of a conversation: what the engine has said comes back in the prompt.
            before = rng.choice(self.calls)
            document = (*before.prompt, *before.alone[0].token_ids)
        else:
            document = rng.choice(self.documents)
        length = rng.randint(0, len(document))
        if self.chance(0.6):
            length = length // self.block_size * self.block_size + rng.choice((-1, 0, 0, 1))
        tail = self.tokens(rng.choice((0, 0, 1, 2, self.block_size)))
        prompt = (*document[: max(0, length)], *tail)[: self.longest_prompt]
        return prompt or self.tokens(1)

    def leave(self, max_tokens: int) -> Leave | None:
        rng = self.random
        if not self.has("leave"):
            return None
        way = rng.choice((Way.CLOSE, Way.CLOSE, Way.ONE_COMPLETION, Way.OPERATOR))
        return Leave(rng.choice(tuple(State)), way, rng.choice((0, 0, rng.randrange(max_tokens))))

    def delay(self, name: str) -> float | None:
        return self.step_s * self.random.expovariate(1 / 20) if self.has(name) else None

    def tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self.random.randrange(FIRST_PLAIN_ID, VOCABULARY) for _ in range(count))

    def has(self, feature: str) -> bool:
        """True for the scenario's share of calls: some scenarios are full of a feature, many are without."""
        return self.chance(self.shares[feature])

    def chance(self, share: float) -> bool:
        return self.random.random() < share


_FEATURES = (
    "n",
    "stop_ids",
    "priority",
    "bypass",
    "logprobs",
    "prompt_logprobs",
    "start_within",
    "first_token_within",
    "end_within",
    "finish_within",
    "leave",
    "fault",
)
