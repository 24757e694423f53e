"""Random arrivals, aborts, clocks and tiny pools against scheduler, cache and a runner that keeps books.

The ScriptedRunner compares every row's block table with the tokens it should hold in every step, so a
block that is shared, freed or reused wrongly fails here, not only one that is lost.
"""

from __future__ import annotations

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from photon_grpc.engine.messages import Abort, AbortReason, Deadlines, EngineRequest, SequenceOutput, Submit
from photon_grpc.runner.scripted import echo
from photon_grpc.types import FinishReason
from tests.support.builders import FakeClock, engine_request, scripted_core

# Few first tokens and long repetitions, so that prefixes are shared all the time.
prompts = st.builds(
    lambda head, length, tail: (head,) * length + tail,
    st.integers(2, 4),
    st.integers(0, 40),
    st.lists(st.integers(2, 9), min_size=1, max_size=6).map(tuple),
)
delays = st.none() | st.floats(0.01, 20.0)


class EngineMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(20, 40),
        block_size=st.sampled_from([1, 3, 4]),
        max_num_seqs=st.integers(1, 6),
        budget=st.integers(6, 40),
        in_flight=st.integers(1, 2),
        prefix_caching=st.booleans(),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        budget: int,
        in_flight: int,
        prefix_caching: bool,
    ) -> None:
        self.clock = FakeClock()
        self.core = scripted_core(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_in_flight=in_flight,
            prefix_caching=prefix_caching,
            clock=self.clock,
        )
        self.capacity = num_blocks * block_size
        self.requests: dict[int, EngineRequest] = {}
        self.tokens: dict[tuple[int, int], list[int]] = {}
        self.last: dict[tuple[int, int], SequenceOutput] = {}

    @rule(
        prompt=prompts,
        max_tokens=st.integers(1, 30),
        n=st.integers(1, 3),
        priority=st.integers(0, 9),
        tenant=st.sampled_from("aab"),
        terms=st.tuples(st.sampled_from((0.5, 1.0, 3.0)), st.sampled_from((0.3, 1.0, 1.0))),
        clocks=st.tuples(delays, delays, delays, delays),
    )
    def submit(
        self,
        prompt: tuple[int, ...],
        max_tokens: int,
        n: int,
        priority: int,
        tenant: str,
        terms: tuple[float, float],
        clocks: tuple[float | None, ...],
    ) -> None:
        prompt = prompt[: self.capacity - 1]
        max_tokens = min(max_tokens, self.capacity - len(prompt))
        key = len(self.requests) + 1
        now = self.clock()
        moments = [None if delay is None else now + delay for delay in clocks]
        request = engine_request(
            prompt,
            max_tokens,
            n,
            arrival_time=now,
            priority=priority,
            tenant=tenant,
            weight=terms[0],
            kv_share=terms[1],
            eos_token_ids=(9,),
            deadlines=Deadlines(*moments),
        )
        self.requests[key] = request
        for index in range(n):
            self.tokens[key, index] = []
        self.core.submit(Submit(key, request))

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), reason=st.sampled_from(AbortReason))
    def abort(self, data: st.DataObject, reason: AbortReason) -> None:
        key = data.draw(st.sampled_from(sorted(self.requests)))
        index = data.draw(st.none() | st.integers(0, self.requests[key].sampling.n - 1))
        self.core.abort(Abort(key, index, reason))

    @rule(seconds=st.floats(0.0, 5.0))
    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(steps=st.integers(1, 10))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            for output in self.core.step().outputs:
                self.take(output)
            self.core.scheduler.check_invariants()

    def take(self, output: SequenceOutput) -> None:
        name = (output.key, output.index)
        assert name not in self.last, "something came after the last output"
        request = self.requests[output.key]
        for token_id in output.token_ids:
            position = len(self.tokens[name])
            assert token_id == echo(request.prompt_token_ids, output.index, position), "lost or repeated"
            self.tokens[name].append(token_id)
        if output.is_last:
            self.last[name] = output
            self.check_ending(request, self.tokens[name], output)

    @staticmethod
    def check_ending(request: EngineRequest, tokens: list[int], output: SequenceOutput) -> None:
        assert (output.finish is None) != (output.failure is None)
        assert 9 not in tokens[:-1], "went on after EOS"
        assert len(tokens) <= request.max_tokens
        if output.finish is None:
            return
        match output.finish.reason:
            case FinishReason.EOS:
                assert tokens[-1] == 9
            case FinishReason.MAX_TOKENS:
                assert len(tokens) == request.max_tokens
            case FinishReason.TIME_LIMIT:
                assert request.deadlines.finish_by is not None
            case FinishReason.ABORTED:
                pass
            case other:
                raise AssertionError(other)

    @invariant()
    def balanced(self) -> None:
        self.core.scheduler.check_invariants()

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        for _ in range(5000):
            if not self.core.has_work:
                break
            for output in self.core.step().outputs:
                self.take(output)
        for output in self.core.flush().outputs:
            self.take(output)
        assert set(self.last) == set(self.tokens), "a sequence never ended"
        stats = self.core.scheduler.stats()
        assert stats.kv_blocks_used == 0
        assert stats.kv_slots_used == 0
        assert stats.running == stats.waiting == stats.waiting_tokens == 0


TestEngineMachine = EngineMachine.TestCase
# Shrinking a failure takes longer than the time a test has; the unshrunk steps are printed.
TestEngineMachine.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)
