"""The engine in a process of its own, as the event loop sees it: spawn, send, receive, reap.

The event loop's process then needs neither torch nor the device, and the two share no interpreter lock.
The child is spawned, never forked, and what it runs is `child.py`. Everything here happens on the event
loop but `join`. A child that ends without having said so is a dead engine, and is noticed at once: the
kernel closes its end of the channel whatever it died of.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys

import structlog

from photon_grpc.engine.channel import Channel
from photon_grpc.engine.child import PARENTS_SIGNALS, EngineSetup
from photon_grpc.engine.host import Deliver, RunnerFactory
from photon_grpc.engine.messages import EngineMessage, EngineReady, EngineStopped, LoopMessage, Shutdown
from photon_grpc.errors import EngineDeadError, StartupError
from photon_grpc.options import KVCacheOptions, SchedulerOptions

_log = structlog.get_logger(__name__)

_CHILD = "import sys; from photon_grpc.engine.child import main; main(int(sys.argv[1]), int(sys.argv[2]))"
# A killed process can stay for as long as a driver holds on to it; it needs nobody to wait for that.
_KILLED_S = 2.0


class EngineProcess:
    """Implements `engine.host.EngineHost`. `deliver` is called on the event loop that `start` ran on."""

    # The rest is for calls that begin and end.
    writing_share = 0.85

    def __init__(
        self,
        runner_factory: RunnerFactory,
        scheduler_options: SchedulerOptions,
        cache_options: KVCacheOptions,
        deliver: Deliver,
        *,
        step_timeout_s: float = 0.0,
    ) -> None:
        self._setup = EngineSetup(runner_factory, scheduler_options, cache_options, step_timeout_s)
        self._deliver = deliver
        self._loop: asyncio.AbstractEventLoop | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._outbox: list[EngineMessage] = []
        self._is_ready = False
        self._is_discarded = False
        self._has_stopped = False

    @property
    def process_id(self) -> int | None:
        """The child's; None before `start`, and once it is reaped, when the number may be another's."""
        if self._process is None or self._process.returncode is not None:
            return None
        return self._process.pid

    def start(self) -> None:
        """Spawn the child; EngineReady or EngineStopped follows."""
        self._loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        channel = Channel(ours)
        with theirs:
            # The socket has room for the first message before anybody reads it.
            channel.send((self._setup,))
            try:
                self._process = _spawn(theirs.fileno())
            except OSError as error:
                channel.close()
                reason = error.strerror or type(error).__name__
                self._deliver(EngineStopped(StartupError(f"the engine's process cannot start: {reason}")))
                return
        self._channel = channel
        self._loop.add_reader(channel.fileno(), self._on_readable)
        self._write_on()

    def post(self, message: EngineMessage) -> None:
        """Send a message, together with whatever else this turn of the loop posts."""
        if self._channel is None:
            return
        if isinstance(message, Shutdown) and not self._is_ready:
            # It would hear of it when it has loaded a model for nobody.
            self._is_discarded = True
            self._kill()
            return
        if not self._outbox:
            assert self._loop is not None
            self._loop.call_soon(self._send)
        self._outbox.append(message)

    def join(self, timeout_s: float) -> bool:
        """Wait for the child's end; False for one that had not ended after `timeout_s` and was killed."""
        if self._process is None:
            return True
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            _log.error("engine_process_killed", pid=self._process.pid, reason="it did not end by itself")
            self._kill()
            try:
                self._process.wait(_KILLED_S)
            except subprocess.TimeoutExpired:
                _log.error("engine_process_not_reaped", pid=self._process.pid)
            return False
        if code and not self._is_discarded:
            # Negative: minus the number of the signal that killed it.
            _log.error("engine_process_ended", pid=self._process.pid, code=code)
        return True

    def _kill(self) -> None:
        assert self._process is not None
        self._process.kill()

    # --- the channel ----------------------------------------------------------------------------

    def _send(self) -> None:
        messages, self._outbox = self._outbox, []
        if self._channel is None:
            return
        try:
            self._channel.send(messages)
        except OSError:
            return  # the child has gone, which the reading side is about to find and tell
        self._write_on()

    def _write_on(self) -> None:
        """Have the loop send what the socket did not take."""
        assert self._loop is not None
        if self._channel is not None and self._channel.has_unsent:
            self._loop.add_writer(self._channel.fileno(), self._on_writable)

    def _on_writable(self) -> None:
        assert self._loop is not None
        assert self._channel is not None
        try:
            self._channel.flush()
        except OSError:
            self._loop.remove_writer(self._channel.fileno())
            return
        if not self._channel.has_unsent:
            self._loop.remove_writer(self._channel.fileno())

    def _on_readable(self) -> None:
        assert self._channel is not None
        try:
            messages = self._channel.receive()
        except EOFError:
            self._on_end()
            return
        except Exception:  # noqa: BLE001 - a frame that cannot be read is the end of all that could follow
            _log.exception("engine_process_not_understood")
            self._kill()
            self._on_end()
            return
        for message in messages:
            self._receive(message)

    def _receive(self, message: LoopMessage) -> None:
        match message:
            case EngineReady():
                self._is_ready = True
            case EngineStopped():
                self._has_stopped = True
        self._deliver(message)

    def _on_end(self) -> None:
        """The child has closed its end: it is leaving as it said, or it has died."""
        assert self._loop is not None
        assert self._channel is not None
        self._loop.remove_reader(self._channel.fileno())
        self._loop.remove_writer(self._channel.fileno())
        self._channel.close()
        self._channel = None
        if self._has_stopped:
            return
        self._has_stopped = True
        if self._is_discarded:
            self._deliver(EngineStopped(None))
        else:
            _log.error("engine_process_died", pid=self.process_id)
            self._deliver(EngineStopped(EngineDeadError()))


def _spawn(fd: int) -> subprocess.Popen[bytes]:
    """Start `child.main` on the inherited socket `fd`."""
    # What can be imported here can be imported there, also where a program has changed the path.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    arguments = [sys.executable, "-c", _CHILD, str(fd), str(os.getpid())]
    # Blocked until the child ignores them: a Ctrl-C meanwhile is the parent's to act on.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, PARENTS_SIGNALS)
    try:
        return subprocess.Popen(arguments, stdin=subprocess.DEVNULL, pass_fds=(fd,), env=environment)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
