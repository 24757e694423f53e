"""A server on free loopback ports over a given front door, and what a client reads out of an error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status.rpc_status import GRPC_DETAILS_METADATA_KEY

from photon_grpc.frontend.base import FrontDoor
from photon_grpc.options import LimitOptions, Options, ServerOptions
from photon_grpc.server.interceptors.call_record import CallObserver
from photon_grpc.server.server import BoundPorts, Server
from photon_grpc.v1 import control_pb2_grpc, inference_pb2_grpc, model_pb2_grpc

_DETAIL_CLASSES = (
    error_details_pb2.ErrorInfo,
    error_details_pb2.RequestInfo,
    error_details_pb2.BadRequest,
    error_details_pb2.ResourceInfo,
    error_details_pb2.RetryInfo,
    error_details_pb2.QuotaFailure,
)


def quick_options(
    server: Mapping[str, Any] | None = None, limits: Mapping[str, Any] | None = None
) -> Options:
    """Options for tests: free ports, no waiting for load balancers."""
    return Options(
        server=replace(
            ServerOptions(port=0, admin_port=0, probe_port=-1, drain_propagation_s=0.0, drain_max_s=5.0),
            **(server or {}),
        ),
        limits=replace(LimitOptions(), **(limits or {})),
    )


@dataclass
class Harness:
    """A running server with one channel to each listener."""

    server: Server
    ports: BoundPorts
    public: grpc.aio.Channel
    admin: grpc.aio.Channel
    inference: inference_pb2_grpc.InferenceServiceStub = field(init=False)
    models: model_pb2_grpc.ModelServiceStub = field(init=False)
    control: control_pb2_grpc.ControlServiceStub = field(init=False)
    health: health_pb2_grpc.HealthStub = field(init=False)

    def __post_init__(self) -> None:
        self.inference = inference_pb2_grpc.InferenceServiceStub(self.public)
        self.models = model_pb2_grpc.ModelServiceStub(self.public)
        self.control = control_pb2_grpc.ControlServiceStub(self.admin)
        self.health = health_pb2_grpc.HealthStub(self.public)

    @property
    def target(self) -> str:
        """Address of the public listener."""
        return f"127.0.0.1:{self.ports.public}"


def open_channel(port: int, **arguments: int) -> grpc.aio.Channel:
    """A channel with a connection of its own, so that tests do not share transports."""
    options = [("grpc.use_local_subchannel_pool", 1), *((f"grpc.{k}", v) for k, v in arguments.items())]
    return grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options)


_default_acceptors = 0


@contextmanager
def acceptors_by_default(number: int) -> Iterator[None]:
    """Meanwhile servers that are made here have `number` acceptors where nothing else is asked for."""
    global _default_acceptors
    before, _default_acceptors = _default_acceptors, number
    try:
        yield
    finally:
        _default_acceptors = before


def make_server(
    front_door: FrontDoor,
    options: Options | None = None,
    call_observers: Sequence[CallObserver] = (),
    *,
    num_acceptors: int | None = None,
) -> Server:
    """A server that is not started yet; on the running loop."""
    return Server(
        front_door,
        options or quick_options(),
        call_observers=call_observers,
        num_acceptors=_default_acceptors if num_acceptors is None else num_acceptors,
    )


@asynccontextmanager
async def running_server(
    front_door: FrontDoor,
    options: Options | None = None,
    call_observers: Sequence[CallObserver] = (),
    *,
    num_acceptors: int | None = None,
) -> AsyncIterator[Harness]:
    """A serving server, stopped at the end."""
    server = make_server(front_door, options, call_observers, num_acceptors=num_acceptors)
    ports = await server.start()
    server.set_serving()
    public = open_channel(ports.public)
    admin = open_channel(ports.admin or ports.public)
    try:
        yield Harness(server, ports, public, admin)
    finally:
        await public.close()
        await admin.close()
        await server.stop()


@dataclass
class RichError:
    """What `grpc-status-details-bin` said, by class of detail."""

    code: grpc.StatusCode
    message: str
    trailers: dict[str, str | bytes]
    details: dict[type[Message], Any]

    @property
    def info(self) -> error_details_pb2.ErrorInfo:
        return self.details[error_details_pb2.ErrorInfo]

    @property
    def reason(self) -> str:
        return self.info.reason

    @property
    def fields(self) -> list[str]:
        """The paths of BadRequest."""
        bad_request = self.details.get(error_details_pb2.BadRequest)
        return [] if bad_request is None else [v.field for v in bad_request.field_violations]


def rich_error(error: grpc.RpcError) -> RichError:
    """Decode the trailers of a failed call; the packed status must agree with the call's own."""
    trailers = dict(list(error.trailing_metadata() or ()))
    packed = trailers.get(GRPC_DETAILS_METADATA_KEY)
    assert isinstance(packed, bytes), f"no rich details in {error!r}"
    status = status_pb2.Status.FromString(packed)
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    return RichError(error.code(), error.details() or "", trailers, _details_of(status))


def rich_item_error(status: status_pb2.Status) -> RichError:
    """What the error of a batch's item says."""
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    return RichError(code, status.message, {}, _details_of(status))


def _details_of(status: status_pb2.Status) -> dict[type[Message], Any]:
    details: dict[type[Message], Any] = {}
    for item in status.details:
        for detail_class in _DETAIL_CLASSES:
            detail = detail_class()
            if item.Unpack(detail):
                details[detail_class] = detail
                break
        else:
            raise AssertionError(f"a detail of unexpected type {item.type_url}")
    return details


async def read_all(call: Any) -> list[Any]:
    """Every message of a stream; raises the error it ends in."""
    messages = []
    while (message := await call.read()) is not grpc.aio.EOF:
        messages.append(message)
    return messages


async def until_not_serving(harness: Harness) -> None:
    """Wait until a prober hears NOT_SERVING; TimeoutError when it never does."""
    async with asyncio.timeout(30):
        request = health_pb2.HealthCheckRequest()
        while (await harness.health.Check(request)).status != health_pb2.HealthCheckResponse.NOT_SERVING:
            pass


async def until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    """Wait for a condition that has no event of its own; TimeoutError when it does not come true."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  # what is watched is a figure of the server, not an event
            await asyncio.sleep(0.005)
