"""The soak: what it asks for, what it complains of, what it takes for a leak, and a short one for real."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace

import pytest

from photon_grpc.runner.base import Runner
from photon_grpc.runner.scripted import ScriptedRunner
from photon_grpc.scheduler.output import (
    ModelOutput,
    NewSequence,
    RowFault,
    SamplerSpec,
    ScheduledSequence,
    SchedulerOutput,
)
from photon_grpc.v1 import inference_pb2
from tests.support.builders import model_info, sampling
from tools.bench import soak, soak_log
from tools.bench.fault_runner import FaultPlan, FaultyFactory, FaultyRunner
from tools.bench.mixed_load import MixedLoad, Tally, check_response, check_stream, request_id, scenario
from tools.bench.soak import Sample, SoakPlan, SoakResult, grown, judge, mib_per_hour

LOAD = MixedLoad(first_id=4, vocab_size=512, max_prompt_tokens=100, max_new_tokens=60)
PLAN = SoakPlan(model="demo", minutes=1.0)
Response = inference_pb2.StreamGenerateResponse


def test_a_call_is_fixed_by_its_number_and_the_seed() -> None:
    assert scenario(LOAD, 7) == scenario(LOAD, 7)
    assert scenario(LOAD, 7) != scenario(LOAD, 8)
    assert scenario(LOAD, 7) != scenario(replace(LOAD, seed=1), 7)


def test_every_kind_of_call_comes_up_and_all_stay_within_bounds() -> None:
    seen: Counter[str] = Counter()
    for number in range(2000):
        one = scenario(LOAD, number)
        spec, ids = one.spec, one.spec.token_ids.ids
        assert len(ids) <= 100
        assert all(4 <= token_id < 512 for token_id in ids)
        assert 1 <= spec.stop.max_tokens <= 60
        assert spec.stop.min_tokens <= spec.stop.max_tokens
        seen.update(
            name
            for name, is_there in {
                "text": bool(spec.text),
                "ids": bool(ids),
                "greedy": spec.sampling.temperature == 0,
                "sampled": spec.sampling.temperature > 0,
                "penalty": spec.sampling.HasField("presence_penalty"),
                "bias": bool(spec.sampling.logit_bias),
                "allowed": bool(spec.sampling.allowed_token_ids),
                "n": spec.sampling.n > 1,
                "stop string": bool(spec.stop.strings),
                "stop id": bool(spec.stop.token_ids),
                "logprobs": spec.output.HasField("top_logprobs"),
                "prompt logprobs": spec.output.HasField("prompt_top_logprobs"),
                "unary": one.unary,
                "chunks": one.chunk_policy is not None,
                "cancel at once": one.cancel_after == 0,
                "cancel later": bool(one.cancel_after),
                "deadline": one.timeout_s < 1,
                "queue timeout": spec.scheduling.HasField("queue_timeout"),
                "time limit": spec.stop.HasField("time_limit"),
                "bypass": spec.cache.bypass_prefix_cache,
            }.items()
            if is_there
        )
        assert ("CANCELLED" in one.allowed) == (one.cancel_after is not None)
    assert len(seen) == 20
    assert min(seen.values()) >= 20


def test_prefixes_are_shared() -> None:
    starts = Counter(tuple(scenario(LOAD, n).spec.token_ids.ids[:3]) for n in range(500))
    shared = [start for start, count in starts.items() if len(start) == 3 and count > 5]
    assert 1 <= len(shared) <= 4


def spec(**sampling: int) -> inference_pb2.GenerationSpec:
    found = inference_pb2.GenerationSpec(sampling=inference_pb2.SamplingParams(**sampling))
    found.stop.max_tokens = 8
    found.output.token_ids = True
    found.token_ids.ids.extend((5, 6, 7))
    return found


def stream(*ids: int, output_tokens: int | None = None, index: int = 0) -> list[Response]:
    """A stream of one completion with a delta per token."""
    responses = [Response(started=inference_pb2.Started())]
    responses += [
        Response(delta=inference_pb2.Delta(index=index, token_ids=[token_id], num_tokens=1))
        for token_id in ids
    ]
    responses.append(Response(finished=inference_pb2.Finished(index=index)))
    total = len(ids) if output_tokens is None else output_tokens
    usage = inference_pb2.Usage(prompt_tokens=3, output_tokens=total)
    responses.append(Response(summary=inference_pb2.Summary(usage=usage)))
    for seq, response in enumerate(responses, start=1):
        response.seq = seq
    return responses


def test_a_good_stream_has_nothing_wrong_and_its_tokens_count() -> None:
    assert check_stream(spec(), stream(9, 10, 11), 512) == ("", 3)


@pytest.mark.parametrize(
    ("responses", "problem"),
    [
        (stream(9, 10)[:-1], "started ... summary"),
        (stream(9, 10)[1:], "seq"),
        ([*stream(9)[:2], *stream(9)[:2]], "seq"),
        (stream(9, 10, output_tokens=3), "usage says 3"),
        (stream(9, 600), "outside of the vocabulary"),
        (stream(*range(10, 19)), "max_tokens is 8"),
        (stream(), "max_tokens is 8"),
        (stream(9, index=1), "finished for [1]"),
        ([], "started ... summary"),
    ],
)
def test_what_is_wrong_with_a_stream_is_said(responses: list[Response], problem: str) -> None:
    assert problem in check_stream(spec(), responses, 512)[0]


def test_a_completion_that_is_missing_is_missed() -> None:
    assert "n is 2" in check_stream(spec(n=2), stream(9), 512)[0]
    response = inference_pb2.GenerateResponse(completions=[inference_pb2.Completion(token_ids=[9])])
    assert "n is 2" in check_response(spec(n=2), [response], 512)[0]


def test_logprobs_are_those_that_were_asked_for() -> None:
    asked = spec()
    asked.output.top_logprobs = 0
    responses = stream(9, 10)
    assert "log-probabilities" in check_stream(asked, responses, 512)[0]
    for response in responses[1:3]:
        response.delta.logprobs.values.append(-0.5)
    assert check_stream(asked, responses, 512) == ("", 2)
    assert "log-probabilities" in check_stream(spec(), responses, 512)[0]
    responses[1].delta.logprobs.values[0] = float("nan")
    assert "is none" in check_stream(asked, responses, 512)[0]


def sample(time: float, resident: int | None = 100 << 20, used: int = 3) -> Sample:
    return Sample(time, 10, 100, 1, 0, used, 64, resident, 0, 0, None, 20, 8)


def result(residents: list[int], **after: int) -> SoakResult:
    samples = [sample(float(moment), resident << 20) for moment, resident in enumerate(residents)]
    tally = Tally(begun=5, codes=Counter(OK=5))
    return SoakResult(samples, replace(sample(100.0, used=0), running=0, **after), tally)


def test_growth_counts_from_the_end_of_the_warm_up() -> None:
    warming = [100 + 5 * min(moment, 30) for moment in range(100)]
    assert grown(result(warming).samples, "resident_bytes") == 0
    leaking = [100 + moment for moment in range(100)]
    # From the middle of 33 to 47.85 to the middle of 84.15 to 99.
    assert grown(result(leaking).samples, "resident_bytes") == pytest.approx(52 << 20, rel=0.02)
    assert grown(result(leaking).samples, "gpu_bytes") is None
    assert grown([sample(0.0)], "resident_bytes") is None


def test_a_quiet_run_passes() -> None:
    assert judge(PLAN, result([100] * 50)) == []


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        (result([100 + 2 * moment for moment in range(100)]), "resident memory grew"),
        (result([100] * 50, used_blocks=2), "2 of 64 blocks in use"),
        (result([100] * 50, queued=1), "1 queued"),
        (replace(result([100] * 50), after=None), "did not answer"),
        (replace(result([100] * 50), tally=Tally()), "no call ended OK"),
        (
            replace(result([100] * 50), tally=Tally(1, Counter(OK=1), 0, 1, ["call 3: ended with INTERNAL"])),
            "call 3: ended with INTERNAL",
        ),
    ],
)
def test_every_fault_keeps_a_run_from_passing(found: SoakResult, problem: str) -> None:
    (said,) = judge(PLAN, found)
    assert problem in said


def test_the_slope_is_that_of_the_second_half() -> None:
    growing = [100 + moment for moment in range(50)] + [150 + moment // 10 for moment in range(50)]
    # A MiB in ten seconds.
    assert mib_per_hour(result(growing).samples) == pytest.approx(360, rel=0.1)
    assert mib_per_hour([sample(0.0, None)] * 9) is None
    assert mib_per_hour([]) is None


def test_a_slope_counts_in_a_run_that_is_long_enough() -> None:
    residents = [100 + moment / 10 for moment in range(100)]
    samples = [sample(10.0 * i, round(mib * (1 << 20))) for i, mib in enumerate(residents)]
    found = replace(result([]), samples=samples)
    (said,) = judge(replace(PLAN, max_growth_bytes=1 << 40), found)
    assert "36.0 MiB/h" in said
    assert judge(replace(PLAN, max_mib_per_hour=40), found) == []
    assert judge(PLAN, replace(found, samples=samples[:50])) == []


MANY_CALLS = 240_000


def long_run(**per_call: float) -> SoakResult:
    """Ten minutes of 400 calls a second, of which each kind of process keeps so many bytes per call.

    On top of that every process warms up, as far as a logarithm, and takes its heap in stretches.
    """
    samples = []
    for i in range(301):
        calls = MANY_CALLS * i // 300
        warm = [
            round(0.5e6 * math.log1p(calls / 2000)) + (calls // step << 17)
            for step in (70_000, 90_000, 80_000)
        ]
        grown_by = [round(calls * per_call.get(kind, 0.0)) for kind in ("event_loop", "engine", "acceptors")]
        main, engine, acceptors = (10**8 + a + b for a, b in zip(warm, grown_by, strict=True))
        samples.append(
            replace(
                sample(2.0 * i, main + engine + acceptors),
                calls_ended=calls,
                engine_resident_bytes=engine,
                acceptors_resident_bytes=acceptors,
            )
        )
    return replace(result([]), samples=samples)


def test_memory_that_levels_off_passes() -> None:
    found = long_run()
    assert judge(PLAN, found) == []
    for kind in soak.PROCESS_KINDS:
        per_call = soak.bytes_per_call(found.samples, kind)
        assert per_call is not None
        assert 0 < per_call < 12


def test_what_a_process_that_levels_off_has_taken_hides_no_leak_of_another() -> None:
    """The run on an H100 in which grpc lost its cut writes: of the event loop, the engine, the acceptors."""
    found = long_run(event_loop=4.0, engine=19.0, acceptors=32.0)
    said = "; ".join(judge(PLAN, found))
    assert "MiB/h" in said
    assert "of the engine" in said
    assert "of the acceptors" in said
    assert "of the event loop" not in said


@pytest.mark.parametrize("kind", ["event loop", "engine", "acceptors"])
def test_sixteen_bytes_of_each_call_are_found_in_every_kind_of_process(kind: str) -> None:
    found = long_run(**{kind.replace(" ", "_"): 16.0})
    (said,) = judge(replace(PLAN, max_mib_per_hour=100), found)
    assert f"of the {kind} grew by" in said
    plain = soak.bytes_per_call(long_run().samples, kind)
    leaking = soak.bytes_per_call(found.samples, kind)
    assert plain is not None
    assert leaking is not None
    assert leaking - plain == pytest.approx(16, abs=0.01)


def test_bytes_per_call_are_of_processes_that_there_are_and_of_many_calls() -> None:
    found = long_run(engine=16.0)
    one_process = [replace(one, engine_resident_bytes=0, acceptors_resident_bytes=0) for one in found.samples]
    assert soak.bytes_per_call(one_process, "engine") is None
    assert soak.bytes_per_call(one_process, "acceptors") is None
    whole = soak.bytes_per_call(one_process, "event loop")
    assert whole is not None
    assert whole > 16
    assert soak.bytes_per_call([sample(0.0, None)] * 9, "event loop") is None
    few = [replace(one, calls_ended=one.calls_ended // 3) for one in found.samples]
    assert judge(replace(PLAN, max_mib_per_hour=100), replace(found, samples=few)) == []


def line(event: str, **fields: object) -> str:
    return json.dumps({"event": event, "level": "info", **fields}) + "\n"


def finished(number: int, code: str, reason: str = "") -> str:
    told = {"reason": reason} if reason else {}
    method = "photon.v1.InferenceService/Generate"
    return line("call finished", method=method, request_id=request_id(number), code=code, **told)


def tally_of(**ends: tuple[str, str]) -> Tally:
    return Tally(ends={int(name[1:]): end for name, end in ends.items()})


QUIET_LOG = [
    "not JSON\n",
    line("tasks", moment=1.0, tasks=8),
    line("call finished", method="grpc.health.v1.Health/Check", request_id="x", code="OK"),
    line("fault injected", kind="row"),
    finished(0, "OK"),
    finished(1, "INTERNAL", "REQUEST_FAULT"),
    finished(2, "OK"),
    line("tasks", moment=2.0, tasks=9),
]


def test_a_log_that_agrees_with_the_clients_has_nothing_wrong() -> None:
    log = soak_log.read(QUIET_LOG)
    assert log.tasks == [(1.0, 8), (2.0, 9)]
    assert log.injected == {"row": 1}
    assert log.counted_ends() == {"OK": 2, "INTERNAL REQUEST_FAULT": 1}
    # The third client left while its answer was on the way, the fourth before the server knew of it.
    seen = tally_of(
        _0=("OK", ""), _1=("INTERNAL", "REQUEST_FAULT"), _2=("CANCELLED", ""), _3=("CANCELLED", "")
    )
    assert soak_log.audit(log, seen) == []


@pytest.mark.parametrize(
    ("more", "seen", "problem"),
    [
        ([finished(0, "OK")], tally_of(_0=("OK", "")), "ended more than once"),
        ([], tally_of(_7=("OK", "")), "unlike the log"),
        ([], tally_of(_0=("ABORTED", "ABORTED_BY_OPERATOR")), "unlike the log"),
        ([finished(4, "INTERNAL", "REQUEST_FAULT")], tally_of(), "2 calls failed by 1 faults of a row"),
        ([json.dumps({"event": "call failed", "level": "error"})], tally_of(), "1 errors"),
    ],
)
def test_where_log_and_clients_disagree_is_said(more: list[str], seen: Tally, problem: str) -> None:
    (said,) = soak_log.audit(soak_log.read([*QUIET_LOG, *more]), seen)
    assert problem in said


@pytest.mark.parametrize(
    ("message", "is_error"),
    [
        (
            'Failed "execute_batch": (<grpc._cython.cygrpc.SendStatusFromServerOperation object at 0x7f>,)',
            False,
        ),
        ('Failed "execute_batch": (<SendInitialMetadataOperation>, <SendStatusFromServerOperation>)', False),
        ("Failed grpc_call_start_batch: 8 with grpc_call_error value: 'TOO_MANY_OPERATIONS'", True),
        ('Failed "execute_batch": (<grpc._cython.cygrpc.SendMessageOperation object at 0x7f>,)', True),
    ],
)
def test_a_status_for_a_client_that_has_left_is_no_error(message: str, is_error: bool) -> None:
    event = "ExecuteBatchError raised in core by servicer method [/x]"
    exception = [{"exc_type": "ExecuteBatchError", "exc_value": message}]
    log = soak_log.read([json.dumps({"event": event, "level": "error", "exception": exception})])
    assert (log.num_errors, log.num_unheard) == ((1, 0) if is_error else (0, 1))


@pytest.mark.parametrize(
    ("log", "exit_code", "problem"),
    [
        (QUIET_LOG, 1, "left with 1"),
        (QUIET_LOG[2:-1], 0, "logged no tasks"),
        (
            [*QUIET_LOG, line("tasks", moment=3.0, tasks=17)],
            0,
            "17 tasks after the load, 8 before",
        ),
    ],
)
def test_how_the_server_left_is_judged(log: list[str], exit_code: int, problem: str) -> None:
    found = replace(result([100] * 50), exit_code=exit_code, log=soak_log.read(log))
    (said,) = judge(PLAN, found)
    assert problem in said
    assert judge(PLAN, replace(found, exit_code=0, log=soak_log.read(QUIET_LOG))) == []


def test_a_faulty_runner_fails_the_rows_that_its_plan_says_and_changes_nothing_else() -> None:
    model = model_info(max_model_len=64)

    def outputs(runner: Runner) -> list[ModelOutput]:
        spec = SamplerSpec(sampling())
        new = NewSequence(7, (5, 6), 2, 0, (0,), spec)
        found = []
        for step in range(40):
            rows = (ScheduledSequence(7, 1 if step else 2, True),)
            runner.launch(SchedulerOutput(step, (), () if step else (new,), rows, 1))
            found.append(runner.collect())
        return found

    def scripted() -> ScriptedRunner:
        return ScriptedRunner(model, num_blocks=64, block_size=64)

    plain = outputs(scripted())
    never = FaultyFactory(lambda progress: scripted(), FaultPlan(0.0, 0.0, seed=1))
    assert outputs(never(lambda done, total: None)) == plain
    faulty = outputs(FaultyRunner(scripted(), FaultPlan(0.5, 0.0, seed=1)))
    assert faulty == outputs(FaultyRunner(scripted(), FaultPlan(0.5, 0.0, seed=1)))
    assert [replace(output, faults={}) for output in faulty] == plain
    assert 5 < sum(output.faults == {7: RowFault.NON_FINITE_LOGITS} for output in faulty) < 35


@pytest.mark.slow
@pytest.mark.parametrize("acceptors", [-1, 2])
def test_a_few_seconds_against_a_server_on_random_weights(acceptors: int) -> None:
    """Growth says nothing in so short a time; all else has to hold."""
    plan = SoakPlan(
        model="tiny",
        minutes=0.15,
        concurrency=8,
        backend="cpu",
        max_new_tokens=40,
        max_growth_bytes=1 << 40,
        settings=(f"server.acceptors={acceptors}",),
    )
    found = soak.run(plan, lambda text: None)
    assert found.problems == []
    assert all(bool(one.acceptors_resident_bytes) == (acceptors > 0) for one in found.samples)
    assert found.tally.codes["OK"] > 0
    assert found.after is not None
    assert found.after.total_blocks > 0
    assert max(one.used_blocks for one in found.samples) > 0
