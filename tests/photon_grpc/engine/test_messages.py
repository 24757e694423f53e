"""Everything that crosses the engine's boundary is plain data: it can be pickled to another process."""

from __future__ import annotations

import dataclasses
import pickle
import types
import typing

import pytest

from photon_grpc.engine import messages
from photon_grpc.engine.messages import (
    Abort,
    AbortReason,
    CacheFlushed,
    Deadlines,
    EngineMessage,
    EngineReady,
    EngineStats,
    EngineStopped,
    FailureKind,
    FlushCache,
    LoadProgress,
    LoopMessage,
    PlainTokens,
    SequenceOutput,
    SequenceTimings,
    Shutdown,
    StepOutputs,
    Submit,
)
from photon_grpc.errors import ModelLoadError
from photon_grpc.types import Finish, FinishReason, TokenLogprobs
from tests.support.builders import engine_request, model_info

OUTPUT = SequenceOutput(
    key=1,
    index=2,
    token_ids=(3, 4),
    logprobs=(TokenLogprobs(-0.5, ((3, -0.5), (9, -1.5))),),
    prompt_logprobs=(TokenLogprobs(-1.0),),
    finish=Finish(FinishReason.STOP, stop_token_id=4),
    cached_prompt_tokens=16,
    timings=SequenceTimings(1.0, 2.0, None, 4.0, 1),
)
EXAMPLES: list[EngineMessage | LoopMessage] = [
    Submit(
        7,
        engine_request(
            (1, 2, 3), n=2, deadlines=Deadlines(1.0, None, 2.0, 3.0), top_logprobs=2, cache_salt="s"
        ),
    ),
    Abort(7),
    Abort(7, index=1, reason=AbortReason.OPERATOR),
    Shutdown(),
    LoadProgress(1 << 20, 1 << 33),
    EngineReady(model_info(), 100, 16),
    StepOutputs(
        (OUTPUT, SequenceOutput(2, 0, failure=FailureKind.MAX_DURATION)),
        EngineStats(running=3),
        5.0,
        PlainTokens((3, 4), (0, 1), (70, 80)),
    ),
    FlushCache(3),
    CacheFlushed(3, 70),
    EngineStopped(None),
]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_round_trip(message: object) -> None:
    copy = pickle.loads(pickle.dumps(message))
    assert copy == message
    assert copy is not message


def test_the_error_of_a_stopped_engine_survives() -> None:
    copy = pickle.loads(pickle.dumps(EngineStopped(ModelLoadError("model.safetensors: cut short"))))
    assert isinstance(copy.error, ModelLoadError)
    assert copy.error.message == "model.safetensors: cut short"


def test_every_message_type_has_an_example() -> None:
    known = {*typing.get_args(messages.EngineMessage), *typing.get_args(messages.LoopMessage)}
    assert known == {type(message) for message in EXAMPLES}


def test_messages_are_frozen() -> None:
    for message in EXAMPLES:
        assert dataclasses.is_dataclass(message)
        params = message.__dataclass_params__  # type: ignore[union-attr]  # typeshed leaves it out
        assert params.frozen


def test_plain_tokens_are_outputs_like_any_other() -> None:
    step = StepOutputs((OUTPUT,), EngineStats(), 5.0, PlainTokens((3, 4), (0, 1), (70, 80)))
    assert step.outputs == (OUTPUT, SequenceOutput(3, 0, (70,)), SequenceOutput(4, 1, (80,)))
    assert StepOutputs((OUTPUT,), EngineStats(), 5.0).outputs == (OUTPUT,)


def test_nothing_alive_is_hidden_in_a_message() -> None:
    """No callables, futures or tensors: the annotations name plain types only."""
    plain = (int, float, str, bytes, bool, types.NoneType)
    seen: set[object] = set()

    def walk(annotation: object) -> None:
        if annotation in seen or annotation in plain or annotation is Ellipsis:
            return
        seen.add(annotation)
        arguments = typing.get_args(annotation)
        if arguments:
            assert typing.get_origin(annotation) in (tuple, typing.Union, types.UnionType)
            for argument in arguments:
                walk(argument)
        elif dataclasses.is_dataclass(annotation) or hasattr(annotation, "_fields"):
            for hint in typing.get_type_hints(annotation).values():
                walk(hint)
        else:
            assert isinstance(annotation, type)
            assert issubclass(annotation, (messages.AbortReason, FailureKind, FinishReason, Exception))

    for message_type in {type(message) for message in EXAMPLES}:
        walk(message_type)
