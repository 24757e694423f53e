"""The listeners: their options, their services, their start and their drain. Event loop only.

A grpc.aio server offers all its services on all its ports, so each listener is a server of its own on
the one loop. Knows the house only through the front door; signals are handled by whoever owns the
process.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health_pb2

from photon_grpc.errors import ConfigError, ListenError
from photon_grpc.frontend.base import FrontDoor
from photon_grpc.options import AuthOptions, LimitOptions, Options, ServerOptions, TlsOptions
from photon_grpc.server.acceptors.dispatcher import Dispatcher
from photon_grpc.server.acceptors.pool import AcceptorPool, address_of
from photon_grpc.server.callers import Callers
from photon_grpc.server.calls import Calls
from photon_grpc.server.control import ControlServicer
from photon_grpc.server.deserialize import add_service, require_compiled_protobuf
from photon_grpc.server.health import HealthServicer
from photon_grpc.server.inference import InferenceServicer
from photon_grpc.server.interceptors.auth import AuthInterceptor
from photon_grpc.server.interceptors.call_log import log_call
from photon_grpc.server.interceptors.call_record import CallObserver, CallRecordInterceptor
from photon_grpc.server.interceptors.errors import ErrorInterceptor
from photon_grpc.server.interceptors.requests import RequestInterceptor
from photon_grpc.server.interceptors.tenant import TenantInterceptor
from photon_grpc.server.lifecycle import Lifecycle
from photon_grpc.server.model_info import ModelServicer
from photon_grpc.server.reflection import add_reflection
from photon_grpc.server.tls import CertificateFiles, CertificateObserver, check_tls
from photon_grpc.telemetry.pseudonyms import Pseudonyms
from photon_grpc.v1 import control_pb2, inference_pb2, model_pb2

_MAX_SEND_BYTES = 4 << 20
_SOFT_METADATA_BYTES = 8 << 10
_HARD_METADATA_BYTES = 16 << 10
# An abuse cap only: past it calls queue silently in the client, so admission must refuse long before.
_STREAMS_PER_ADMITTED = 4
# Calls that the event loop has not come to yet count as well, and grpc resets what is above the cap, without
# a word of when to come back. A loop that is held up for a second must not come to that.
_MIN_STREAMS = 1024
# Sequences that run at the same time where the settings leave it to the backend, at most.
MOST_RUNNING = 256
# So that a connection's age never cuts a call that its own deadline would have let finish.
_AGE_GRACE_MARGIN_S = 30.0
# How long calls that are ended by the drain have to send their status.
_END_GRACE_S = 2.0
_STOP_GRACE_S = 2.0

_INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"]
_MODEL = model_pb2.DESCRIPTOR.services_by_name["ModelService"]
_CONTROL = control_pb2.DESCRIPTOR.services_by_name["ControlService"]
_HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class BoundPorts:
    """Where the listeners ended up; None for one that is switched off."""

    public: int
    admin: int | None
    probe: int | None


def channel_options(
    server: ServerOptions, limits: LimitOptions, max_admitted: int, *, num_acceptors: int = 0
) -> list[tuple[str, int]]:
    """grpc arguments of a listener that admits `max_admitted` generations, or of each of its acceptors.

    All three keepalive settings are needed: without the ping timeout a frozen peer is noticed only
    after a minute. With SO_REUSEPORT a second server would share the port silently, so it is for acceptors
    alone, which look first.
    """
    return [
        ("grpc.keepalive_time_ms", _milliseconds(server.keepalive_time_s)),
        ("grpc.keepalive_timeout_ms", _milliseconds(server.keepalive_timeout_s)),
        ("grpc.http2.ping_timeout_ms", _milliseconds(server.keepalive_timeout_s)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", _milliseconds(server.min_ping_interval_s)),
        ("grpc.max_connection_age_ms", _milliseconds(server.max_connection_age_s)),
        ("grpc.max_connection_age_grace_ms", _milliseconds(limits.max_deadline_s + _AGE_GRACE_MARGIN_S)),
        ("grpc.max_concurrent_streams", max(_MIN_STREAMS, _STREAMS_PER_ADMITTED * max_admitted)),
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.max_send_message_length", _MAX_SEND_BYTES),
        ("grpc.max_metadata_size", _SOFT_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", _HARD_METADATA_BYTES),
        ("grpc.server_handshake_timeout_ms", _milliseconds(server.handshake_timeout_s)),
        ("grpc.max_allowed_incoming_connections", server.max_connections // max(1, num_acceptors)),
        ("grpc.so_reuseport", 1 if num_acceptors else 0),
    ]


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a listener on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_options(server: ServerOptions, tls: TlsOptions, auth: AuthOptions) -> None:
    """Raises ConfigError for a listener that would be reachable without protection."""
    if not is_loopback(server.host) and not tls.cert_file and not server.allow_plaintext:
        raise ConfigError(
            f"server.host is {server.host}: off loopback it needs tls.cert_file, or server.allow_plaintext"
        )
    # Clients of the public listener have certificates too: it takes the role to tell an operator.
    if admin_is_exposed(server) and not (tls.client_ca_file and auth.callers_file):
        raise ConfigError(
            f"server.admin_host is {server.admin_host}: off loopback it needs tls.client_ca_file "
            "and auth.callers_file"
        )
    if server.reflection not in ("admin", "public", "off"):
        raise ConfigError(f"server.reflection is {server.reflection!r}: admin, public or off")
    problem = check_tls(tls)
    if problem:
        raise ConfigError(problem)
    if tls.client_ca_file and not tls.require_client_cert and not admin_is_exposed(server):
        raise ConfigError("tls.client_ca_file has no effect without tls.require_client_cert")


def admin_is_exposed(server: ServerOptions) -> bool:
    """Whether there is an admin listener that other machines can reach."""
    return server.admin_port >= 0 and not is_loopback(server.admin_host)


def _trusted_hops(auth: AuthOptions, callers: Callers | None) -> frozenset[str]:
    """Raises ConfigError for a name that no caller has."""
    names = frozenset(filter(None, (name.strip() for name in auth.trusted_hops.split(","))))
    for name in sorted(names):
        if callers is None or not callers.has(name):
            raise ConfigError(f"auth.trusted_hops: {name!r} is no caller of auth.callers_file")
    return names


class Server:
    """All listeners of one process. Build it on the running loop; start it before the model loads.

    Between `start` and `set_serving` calls are answered by what the front door says (it is starting)
    and probes read NOT_SERVING.
    """

    def __init__(
        self,
        front_door: FrontDoor,
        options: Options,
        *,
        call_observers: Sequence[CallObserver] = (),
        certificate_observer: CertificateObserver | None = None,
        num_acceptors: int = 0,
        on_acceptor_death: Callable[[], None] | None = None,
    ) -> None:
        """Raises ConfigError for an unprotected listener, for certificate files that cannot be served, and
        where protobuf is not the compiled one.

        `call_observers` hear of every call that has ended, before its log line is written. The public
        listener's connections are taken by `num_acceptors` processes; by this one where that is 0.
        `on_acceptor_death` hears of each of them that has died.
        """
        require_compiled_protobuf()
        check_options(options.server, options.tls, options.auth)
        self._callers = Callers(options.auth.callers_file) if options.auth.callers_file else None
        self._trusted_hops = _trusted_hops(options.auth, self._callers)
        self._pseudonyms = Pseudonyms()
        self._certificates = (
            CertificateFiles(options.tls, certificate_observer) if options.tls.cert_file else None
        )
        self._options = options
        self._call_observers = (*call_observers, log_call)
        self._calls = Calls(options.limits)
        self._health = HealthServicer()
        self._lifecycle = Lifecycle(self._calls, self._health, options.server.drain_propagation_s)
        self._inference = InferenceServicer(front_door, self._calls, options.limits)
        self._model = ModelServicer(front_door, options, self._lifecycle.instance_id)
        self._control = ControlServicer(front_door, self._lifecycle, self._calls, options.limits)
        self._certificate_observer = certificate_observer
        self._num_acceptors = num_acceptors
        self._on_acceptor_death = on_acceptor_death
        self._listeners: list[grpc.aio.Server | AcceptorPool] = []
        self._hurried = asyncio.Event()

    @property
    def num_live_calls(self) -> int:
        """Calls of InferenceService that are being handled."""
        return len(self._calls)

    @property
    def acceptor_process_ids(self) -> list[int]:
        """Of the processes that take connections at the moment. May be read on any thread."""
        pools = [listener for listener in tuple(self._listeners) if isinstance(listener, AcceptorPool)]
        return [number for pool in pools for number in pool.process_ids]

    async def start(self) -> BoundPorts:
        """Bind and serve. Raises ListenError, with nothing left listening."""
        server = self._options.server
        try:
            if self._num_acceptors:
                public = await self._accept(server.host, server.port)
            else:
                public = await self._listen(
                    "public", server.host, server.port, self._add_public, self._public_credentials()
                )
            admin = probe = None
            if server.admin_port >= 0:
                admin = await self._listen(
                    "admin", server.admin_host, server.admin_port, self._add_admin, self._admin_credentials()
                )
            if server.probe_port >= 0:
                probe = await self._listen("probe", server.probe_host, server.probe_port, self._add_health)
        except ListenError:
            await self._stop_listeners(0)
            raise
        self._health.set_live(True)
        return BoundPorts(public, admin, probe)

    def set_serving(self) -> None:
        """The model is loaded and warm."""
        self._lifecycle.set_loaded(True)

    def set_not_serving(self) -> None:
        """Not ready, but alive."""
        self._lifecycle.set_loaded(False)

    def set_dead(self) -> None:
        """The engine is dead: neither ready nor alive, and that is what calls ended from now on hear."""
        self._lifecycle.set_dead()

    def hurry(self) -> None:
        """Cut every wait of a drain short, now and from now on."""
        self._hurried.set()

    async def drain(self) -> None:
        """Leave in good order: no call in flight is lost that finishes within `drain_max_s`.

        NOT_SERVING, then calls go on being accepted while load balancers notice, then new ones are
        refused and the live ones waited for; what is left ends as draining. At the end nothing
        listens. A drain that an operator began goes on from where it is.
        """
        await self._wait(self._hurried.wait(), self._lifecycle.leave())
        self._lifecycle.refuse()
        await self._wait(self._calls.wait_idle(), self._options.server.drain_max_s)
        if len(self._calls):
            _log.warning("drain: ending calls", live_calls=len(self._calls))
        await self.stop()

    async def stop(self) -> None:
        """End what is live, end every Watch, close the listeners. Takes seconds; may be called twice."""
        self._calls.refuse(self._lifecycle.farewell)
        self._calls.end_all(self._lifecycle.farewell)
        try:
            async with asyncio.timeout(_END_GRACE_S):
                await self._calls.wait_idle()
        except TimeoutError:
            _log.warning("stop: calls did not end", live_calls=len(self._calls))
        self._lifecycle.set_left()
        await self._stop_listeners(_STOP_GRACE_S)

    async def _wait(self, condition: Coroutine[Any, Any, Any], limit_s: float) -> None:
        """Until `condition`, at most `limit_s`, not at all once hurried."""
        tasks = [asyncio.ensure_future(condition), asyncio.ensure_future(self._hurried.wait())]
        try:
            await asyncio.wait(tasks, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    def _public_credentials(self) -> grpc.ServerCredentials | None:
        if self._certificates is None:
            return None
        required = self._options.tls.require_client_cert
        return self._certificates.credentials(require_client_cert=required)

    def _admin_credentials(self) -> grpc.ServerCredentials | None:
        """On loopback the caller is the local operator, and has no certificate."""
        if self._certificates is None or not admin_is_exposed(self._options.server):
            return None
        return self._certificates.credentials(require_client_cert=True)

    def _guards(self, listener: str) -> tuple[grpc.aio.ServerInterceptor, ...]:
        """Who calls, and for whom.

        Nobody is asked who he is on an admin listener that only the local operator can reach, or where the
        settings name no callers. What concerns operators is done for no tenant, whoever asks for it.
        """
        is_admin = listener == "admin"
        trusted_hops = frozenset[str]() if is_admin else self._trusted_hops
        tenant = TenantInterceptor(trusted_hops, self._options.limits.max_priority, self._pseudonyms)
        if self._callers is None or (is_admin and not admin_is_exposed(self._options.server)):
            return (tenant,)
        return (AuthInterceptor(self._callers, self._pseudonyms), tenant)

    async def _listen(
        self,
        name: str,
        host: str,
        port: int,
        add_services: Any,
        credentials: grpc.ServerCredentials | None = None,
    ) -> int:
        listener = grpc.aio.server(
            interceptors=(RequestInterceptor(), *self._interceptors(name)),
            options=self._channel_options(num_acceptors=0),
        )
        add_services(listener)
        address = address_of(host, port)
        try:
            if credentials is None:
                bound = listener.add_insecure_port(address)
            else:
                bound = listener.add_secure_port(address, credentials)
        except RuntimeError as error:
            await listener.stop(0)
            raise ListenError(f"the {name} listener cannot bind {address}") from error
        await listener.start()
        self._listeners.append(listener)
        _log.info("listening", listener=name, address=address_of(host, bound), tls=credentials is not None)
        return int(bound)

    async def _accept(self, host: str, port: int) -> int:
        """The public listener, by processes of its own."""
        options = self._options
        dispatcher = Dispatcher(self._interceptors("public"))
        self._add_public(dispatcher)
        pool = AcceptorPool(
            dispatcher,
            self._num_acceptors,
            tls=options.tls,
            telemetry=options.telemetry,
            channel_options=self._channel_options(num_acceptors=self._num_acceptors),
            certificate_observer=self._certificate_observer,
            on_death=self._on_acceptor_death,
        )
        bound = await pool.start(host, port)
        self._listeners.append(pool)
        _log.info(
            "listening",
            listener="public",
            address=address_of(host, bound),
            tls=bool(options.tls.cert_file),
            acceptors=self._num_acceptors,
        )
        return bound

    def _interceptors(self, listener: str) -> tuple[grpc.aio.ServerInterceptor, ...]:
        return (
            CallRecordInterceptor(self._call_observers),
            ErrorInterceptor(_HARD_METADATA_BYTES),
            *self._guards(listener),
        )

    def _channel_options(self, *, num_acceptors: int) -> list[tuple[str, int]]:
        options = self._options
        # The listener is bound before the model says how many run at a time.
        max_running = options.scheduler.max_num_seqs or MOST_RUNNING
        max_admitted = max_running + options.limits.max_queued_requests
        return channel_options(options.server, options.limits, max_admitted, num_acceptors=num_acceptors)

    def _add_health(self, listener: grpc.aio.Server) -> None:
        add_service(listener, _HEALTH, self._health)

    def _add_public(self, listener: grpc.aio.Server) -> None:
        add_service(listener, _INFERENCE, self._inference)
        add_service(listener, _MODEL, self._model)
        self._add_health(listener)
        if self._options.server.reflection == "public":
            add_reflection(listener, [_INFERENCE.full_name, _MODEL.full_name, _HEALTH.full_name])

    def _add_admin(self, listener: grpc.aio.Server) -> None:
        add_service(listener, _CONTROL, self._control)
        self._add_health(listener)
        if self._options.server.reflection != "off":
            add_reflection(listener, [_CONTROL.full_name, _HEALTH.full_name])

    async def _stop_listeners(self, grace_s: float) -> None:
        listeners, self._listeners = self._listeners, []
        await asyncio.gather(*(listener.stop(grace_s) for listener in listeners))
