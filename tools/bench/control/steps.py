"""What an engine loses while the server answers calls that cost the engine nothing.

Requests with several completions keep the batch full and are answered in one message each, so that their own
transport costs next to nothing; the time of their decoding, by the server's clock, is taken in turns without
and with a client that asks for token counts at a fixed rate.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from statistics import median

import grpc

from photon_grpc.v1 import inference_pb2, inference_pb2_grpc
from tools.bench.bars import Bar
from tools.bench.server_handle import ServerHandle
from tools.bench.server_process import ServerSpec

__all__ = ["StepsPlan", "StepsRow", "headline", "promises", "run"]

_TIMEOUT_S = 300.0
_COMPLETIONS = 8


@dataclass(frozen=True, slots=True)
class StepsPlan:
    """`models`: a folder, `demo`, or empty for the scripted engine with steps of `step_s` asleep."""

    models: tuple[str, ...] = ("", "demo")
    processes: tuple[str, ...] = ("shared", "own")
    rate: float = 300.0
    """Calls per second beside the engine."""
    rounds: int = 5
    requests: int = 2
    new_tokens: int = 300
    step_s: float = 0.005


@dataclass(frozen=True, slots=True)
class StepsRow:
    """Steps per second of each round, alone and with calls, and the calls per second there really were."""

    model: str
    process: str
    alone: list[float]
    with_calls: list[float]
    calls_per_second: list[float]

    @property
    def lost(self) -> float:
        """The part of the steps that the calls cost, by the medians."""
        return 1 - median(self.with_calls) / median(self.alone)


def run(plan: StepsPlan) -> list[StepsRow]:
    """A server for every model and kind of process."""
    return [_measure(plan, model, process) for model in plan.models for process in plan.processes]


def _measure(plan: StepsPlan, model: str, process: str) -> StepsRow:
    spec = ServerSpec(
        model=model, num_threads=1, step_s=0.0 if model else plan.step_s, process=process, backend="cpu"
    )
    alone, with_calls, rates = [], [], []
    with ServerHandle(spec) as server:
        _steps_per_second(plan, server.address)  # warms up
        for _ in range(plan.rounds):
            alone.append(_steps_per_second(plan, server.address))
            caller = subprocess.Popen(
                [sys.executable, "-m", "tools.bench.control.caller", server.address, str(plan.rate)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            try:
                assert caller.stdout is not None
                caller.stdout.readline()
                with_calls.append(_steps_per_second(plan, server.address))
                told, _ = caller.communicate("", _TIMEOUT_S)
                rates.append(float(told))
            finally:
                caller.kill()
                caller.wait()
    return StepsRow(model or f"steps of {plan.step_s * 1e3:g} ms", process, alone, with_calls, rates)


def _steps_per_second(plan: StepsPlan, address: str) -> float:
    spec = inference_pb2.GenerationSpec(
        token_ids=inference_pb2.TokenIds(ids=[5 + i % 90 for i in range(16)]),
        sampling=inference_pb2.SamplingParams(temperature=0.0, n=_COMPLETIONS),
        stop=inference_pb2.StopParams(max_tokens=plan.new_tokens, ignore_eos=True),
        output=inference_pb2.OutputOptions(text=False),
    )
    request = inference_pb2.GenerateRequest(spec=spec)
    with grpc.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        calls = [stub.Generate.future(request, timeout=_TIMEOUT_S) for _ in range(plan.requests)]
        answers = [call.result() for call in calls]
    # A step brings each completion a token; the first came with the prompt.
    return median((plan.new_tokens - 1) / answer.timings.decode.ToNanoseconds() * 1e9 for answer in answers)


def promises(rows: list[StepsRow]) -> list[Bar]:
    """Of an engine with a process of its own; what one that shares loses is a figure, not a promise."""
    return [
        Bar(f"steps lost to calls, own process, {row.model}, %", row.lost * 100, 10, at_least=False)
        for row in rows
        if row.process == "own"
    ]


def headline(rows: list[StepsRow]) -> str:
    """A line for each."""
    return "\n".join(
        f"{row.model}, engine {row.process}: {median(row.alone):.1f} steps/s alone, "
        f"{median(row.with_calls):.1f} with {median(row.calls_per_second):.0f} calls/s, {row.lost:.1%} lost"
        for row in rows
    )
