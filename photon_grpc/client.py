"""Calls to a running server, as the command line makes them; plain Python on the near side.

Knows the contract and nothing of the server behind it. `Client` blocks and belongs to the thread that
made it; `measure` is a coroutine, for load of many calls at once.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from photon_grpc.v1 import (
    control_pb2,
    control_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
)

__all__ = [
    "Answer",
    "CallError",
    "Client",
    "ControlClient",
    "Ending",
    "Measurement",
    "Request",
    "ServedModel",
    "ServerState",
    "Tls",
    "Tokens",
    "measure",
    "open_channel",
]

_READY_SERVICE = "photon.v1.InferenceService"
_POLL_S = 0.1
# For an answer of a server that is there; one that is not says so at once.
_ONCE_S = 5.0
_CODES: dict[int, str] = {code.value[0]: code.name for code in grpc.StatusCode}
_ROLES = {
    "system": inference_pb2.ChatMessage.ROLE_SYSTEM,
    "user": inference_pb2.ChatMessage.ROLE_USER,
    "assistant": inference_pb2.ChatMessage.ROLE_ASSISTANT,
    "tool": inference_pb2.ChatMessage.ROLE_TOOL,
}


class CallError(Exception):
    """A call that did not end OK. `reason` is the server's ErrorInfo, empty where it sent none."""

    def __init__(
        self,
        status: str,
        message: str,
        *,
        reason: str = "",
        violations: Sequence[tuple[str, str]] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message
        self.reason = reason
        self.violations = tuple(violations)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Tls:
    """Whom to believe and what to show, as PEM. Certificate and key go together; neither shows nothing."""

    ca: bytes
    certificate: bytes | None = None
    key: bytes | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """What to generate from: `text`, or `messages` of role and content. None leaves it to the server."""

    text: str = ""
    messages: tuple[tuple[str, str], ...] = ()
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool | None = None


@dataclass(frozen=True, slots=True)
class Ending:
    """The last item of a stream, from the server's own counts and clocks. Durations in seconds."""

    finish_reason: str
    prompt_tokens: int
    cached_prompt_tokens: int
    output_tokens: int
    first_token_s: float
    decode_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Answer:
    """What the request number `item` of a batch came to: `text` and `ending`, or `error`."""

    item: int
    text: str = ""
    ending: Ending | None = None
    error: CallError | None = None


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids and, for each, its (start, end) in UTF-8 bytes of the text."""

    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What GetModelInfo and GetServerInfo say of themselves."""

    model: str
    version: str
    max_context_tokens: int


@dataclass(frozen=True, slots=True)
class ServerState:
    """One snapshot of WatchState. `load` has its figures by name, without those that are not known."""

    instance_id: str
    revision: int
    state: str
    detail: str
    load: dict[str, float]


@dataclass(frozen=True, slots=True)
class Measurement:
    """One streamed call on the client's clock; seconds. `gaps_s` has one entry per token after the first."""

    first_token_s: float
    gaps_s: tuple[float, ...]
    total_s: float
    output_tokens: int


def _channel_options() -> list[tuple[str, Any]]:
    """Pings no closer than the server allows; the largest answer is a whole unary completion."""
    return [
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.max_receive_message_length", 16 << 20),
        ("grpc.enable_retries", 0),
    ]


def _bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),) if token else ()


def _credentials(tls: Tls) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(tls.ca, tls.key, tls.certificate)


def _open_blocking_channel(address: str, tls: Tls | None) -> Any:
    if tls is None:
        return grpc.insecure_channel(address, options=_channel_options())
    return grpc.secure_channel(address, _credentials(tls), options=_channel_options())


class Client:
    """One channel to one server, in plaintext without `tls`. Use it as a context manager."""

    def __init__(self, address: str, *, tls: Tls | None = None, token: str = "") -> None:
        """`token`, where there is one, goes with every call as a bearer token."""
        self.address = address
        self._metadata = _bearer(token)
        self._channel = _open_blocking_channel(address, tls)
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._models = model_pb2_grpc.ModelServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is under way and close the channel."""
        self._channel.close()

    def stream(self, request: Request, *, timeout_s: float | None = None) -> Generator[str | Ending]:
        """Text as it is generated, then one Ending. Raises CallError.

        Closing the iterator cancels the call.
        """
        call = self._inference.StreamGenerate(
            _stream_request(request), timeout=timeout_s, metadata=self._metadata
        )
        reason = ""
        try:
            for response in call:
                event = response.WhichOneof("event")
                if event == "delta" and response.delta.text:
                    yield response.delta.text
                elif event == "finished":
                    reason = _finish_name(response.finished.finish)
                elif event == "summary":
                    yield _ending(reason, response.summary)
        except grpc.RpcError as error:
            raise _call_error(error) from None
        finally:
            call.cancel()

    def batch(
        self, requests: Sequence[Request], *, request_id: str = "", timeout_s: float | None = None
    ) -> Generator[Answer]:
        """One Answer per request, in the order in which they end. Raises CallError for the whole call.

        Closing the iterator cancels the call.
        """
        call = self._inference.BatchGenerate(
            inference_pb2.BatchGenerateRequest(
                request_id=request_id, specs=[_spec(request) for request in requests]
            ),
            timeout=timeout_s,
            metadata=self._metadata,
        )
        try:
            for response in call:
                yield _answer(response)
        except grpc.RpcError as error:
            raise _call_error(error) from None
        finally:
            call.cancel()

    def tokenize(self, text: str, *, add_special_tokens: bool | None = None) -> Tokens:
        """The tokens of `text`, with their places in it. Raises CallError."""
        request = inference_pb2.TokenizeRequest(
            text=text, add_special_tokens=add_special_tokens, return_offsets=True
        )
        try:
            response = self._inference.Tokenize(request, metadata=self._metadata)
        except grpc.RpcError as error:
            raise _call_error(error) from None
        pairs = zip(response.offsets[::2], response.offsets[1::2], strict=True)
        return Tokens(tuple(response.token_ids), tuple(pairs))

    def served_model(self) -> ServedModel:
        """What is served at the address. Raises CallError."""
        try:
            model = self._models.GetModelInfo(model_pb2.GetModelInfoRequest(), metadata=self._metadata)
            server = self._models.GetServerInfo(model_pb2.GetServerInfoRequest(), metadata=self._metadata)
        except grpc.RpcError as error:
            raise _call_error(error) from None
        return ServedModel(model.model, server.version, model.max_context_tokens)

    def wait_until_serving(self, timeout_s: float) -> bool:
        """Ask until the answer is SERVING; False if it was not within `timeout_s`: once where that is 0."""
        if timeout_s == 0:
            return self._is_serving(_ONCE_S)
        end = time.monotonic() + timeout_s
        while True:
            left = max(end - time.monotonic(), 0.0)
            if self._is_serving(max(left, _POLL_S)):
                return True
            if left == 0.0:
                return False
            time.sleep(min(_POLL_S, left))

    def _is_serving(self, timeout_s: float) -> bool:
        request = health_pb2.HealthCheckRequest(service=_READY_SERVICE)
        try:
            response = self._health.Check(request, timeout=timeout_s)
        except grpc.RpcError:
            # Refused connections and early servers look alike; the caller's time is the bound.
            return False
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


class ControlClient:
    """One channel to one admin listener, in plaintext without `tls`. Use it as a context manager."""

    def __init__(self, address: str, *, tls: Tls | None = None, token: str = "") -> None:
        """`token`, where there is one, goes with every call as a bearer token."""
        self._metadata = _bearer(token)
        self._channel = _open_blocking_channel(address, tls)
        self._control = control_pb2_grpc.ControlServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._channel.close()

    def drain(self, grace_s: float | None = None) -> int:
        """Begin a drain; the number of calls in flight. Raises CallError."""
        request = control_pb2.DrainRequest()
        if grace_s is not None:
            request.grace.FromNanoseconds(round(grace_s * 1e9))
        return self._drain(request)

    def undo_drain(self) -> int:
        """Take a drain back; the number of calls in flight. Raises CallError."""
        return self._drain(control_pb2.DrainRequest(undo=True))

    def _drain(self, request: control_pb2.DrainRequest) -> int:
        try:
            return int(self._control.Drain(request, metadata=self._metadata).in_flight)
        except grpc.RpcError as error:
            raise _call_error(error) from None

    def flush_cache(self, *, wait_idle: bool = False, timeout_s: float | None = None) -> int:
        """Forget every cached prefix; the number of blocks that kept one. Raises CallError."""
        request = control_pb2.FlushCacheRequest(wait_idle=wait_idle)
        try:
            response = self._control.FlushCache(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise _call_error(error) from None
        return int(response.blocks_freed)

    def watch(self, interval_s: float | None = None) -> Generator[ServerState]:
        """The state at once, on every change and every `interval_s`, until the server leaves.

        Raises CallError. Closing the iterator cancels the call.
        """
        request = control_pb2.WatchStateRequest()
        if interval_s is not None:
            request.load_interval.FromNanoseconds(round(interval_s * 1e9))
        call = self._control.WatchState(request, metadata=self._metadata)
        try:
            for response in call:
                yield _server_state(response)
        except grpc.RpcError as error:
            raise _call_error(error) from None
        finally:
            call.cancel()


def open_channel(address: str, *, tls: Tls | None = None) -> Any:
    """A `grpc.aio` channel for `measure`; an async context manager, bound to the running loop."""
    if tls is not None:
        return grpc.aio.secure_channel(address, _credentials(tls), options=_channel_options())
    return grpc.aio.insecure_channel(address, options=_channel_options())


async def measure(
    channel: Any, request: Request, *, timeout_s: float | None = None, token: str = ""
) -> Measurement:
    """Stream one call over a `grpc.aio` channel and time it. Raises CallError.

    A delta of several tokens counts as that many equal gaps.
    """
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    start = time.perf_counter()
    first = last = start
    gaps: list[float] = []
    num_tokens = 0
    try:
        call = stub.StreamGenerate(_stream_request(request), timeout=timeout_s, metadata=_bearer(token))
        async for response in call:
            new = response.delta.num_tokens
            if response.WhichOneof("event") != "delta" or not new:
                continue
            now = time.perf_counter()
            if num_tokens == 0:
                first = now
                gaps += [0.0] * (new - 1)
            else:
                gaps += [(now - last) / new] * new
            num_tokens += new
            last = now
    except grpc.RpcError as error:
        raise _call_error(error) from None
    return Measurement(
        first_token_s=first - start, gaps_s=tuple(gaps), total_s=last - start, output_tokens=num_tokens
    )


def _stream_request(request: Request) -> inference_pb2.StreamGenerateRequest:
    return inference_pb2.StreamGenerateRequest(spec=_spec(request))


def _spec(request: Request) -> inference_pb2.GenerationSpec:
    spec = inference_pb2.GenerationSpec(
        sampling=inference_pb2.SamplingParams(
            temperature=request.temperature, top_p=request.top_p, top_k=request.top_k, seed=request.seed
        ),
        stop=inference_pb2.StopParams(
            max_tokens=request.max_tokens, strings=request.stop, ignore_eos=request.ignore_eos
        ),
    )
    if request.messages:
        for role, content in request.messages:
            spec.chat.messages.add(role=_ROLES[role], content=content)
    else:
        spec.text = request.text
    return spec


def _finish_name(finish: inference_pb2.Finish) -> str:
    name = inference_pb2.FinishReason.Name(finish.reason).removeprefix("FINISH_REASON_")
    return f"{name} {finish.stop_string!r}" if finish.HasField("stop_string") else name


def _answer(response: inference_pb2.BatchGenerateResponse) -> Answer:
    if response.WhichOneof("result") == "error":
        return Answer(response.item, error=_error_of(response.error))
    result = response.response
    # A Request asks for one completion.
    (completion,) = result.completions
    ending = _ending(_finish_name(completion.finish), result)
    return Answer(response.item, text=completion.text, ending=ending)


def _ending(reason: str, summary: inference_pb2.Summary | inference_pb2.GenerateResponse) -> Ending:
    usage, timings = summary.usage, summary.timings
    return Ending(
        finish_reason=reason,
        prompt_tokens=usage.prompt_tokens,
        cached_prompt_tokens=usage.cached_prompt_tokens,
        output_tokens=usage.output_tokens,
        first_token_s=timings.first_token.ToTimedelta().total_seconds(),
        decode_s=timings.decode.ToTimedelta().total_seconds(),
        total_s=timings.total.ToTimedelta().total_seconds(),
    )


def _server_state(response: control_pb2.WatchStateResponse) -> ServerState:
    load: dict[str, float] = {}
    for field, value in response.load.ListFields():
        known = value.ToTimedelta().total_seconds() if field.message_type is not None else value
        load[field.name] = known
    return ServerState(
        instance_id=response.instance_id,
        revision=response.revision,
        state=control_pb2.WatchStateResponse.State.Name(response.state).removeprefix("STATE_"),
        detail=response.detail,
        load=load,
    )


def _call_error(error: Any) -> CallError:
    status = rpc_status.from_call(error)
    if status is None:
        return CallError(error.code().name, error.details() or "no message")
    return _error_of(status)


def _error_of(status: status_pb2.Status) -> CallError:
    reason = ""
    violations: list[tuple[str, str]] = []
    retry_after_s: float | None = None
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        bad = error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(bad):
            violations += [(violation.field, violation.description) for violation in bad.field_violations]
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
    return CallError(
        _CODES.get(status.code, "UNKNOWN"),
        status.message or "no message",
        reason=reason,
        violations=violations,
        retry_after_s=retry_after_s,
    )
