"""What state the service is in, who may change it, and who hears of it. Event loop only.

One Lifecycle is one engine lifetime. Facts come in (loaded, draining, dead, leaving), health and calls
are set by them, and the state that operators and routers watch follows; no fact but a drain that an
operator asked for is ever taken back.
"""

from __future__ import annotations

import asyncio
import enum
import uuid
from collections.abc import Callable

import structlog

from photon_grpc.errors import EngineDeadError, EngineDrainingError, PhotonError
from photon_grpc.server.calls import Calls
from photon_grpc.server.health import HealthServicer

_LOADING = "the model is being loaded"
_log = structlog.get_logger(__name__)


class State(enum.Enum):
    """What `WatchState` says."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class Lifecycle:
    """Sets health and calls as the service comes, drains and goes. `propagation_s` is the time between
    NOT_SERVING and the refusal of new calls."""

    def __init__(self, calls: Calls, health: HealthServicer, propagation_s: float) -> None:
        self.instance_id = uuid.uuid4().hex
        self.revision = 1
        self.detail = _LOADING
        self._calls = calls
        self._health = health
        self._propagation_s = propagation_s
        self._state = State.STARTING
        self._changed = asyncio.Event()
        self._loaded = False
        self._draining = False
        self._leaving = False
        self._left = False
        self._farewell: Callable[[], PhotonError] = EngineDrainingError
        self._refuse_at = 0.0
        self._refusal_timer: asyncio.TimerHandle | None = None
        self._grace_s: float | None = None
        self._grace_timer: asyncio.TimerHandle | None = None

    @property
    def state(self) -> State:
        return self._state

    @property
    def farewell(self) -> Callable[[], PhotonError]:
        """Makes what calls hear that are refused or ended from now on."""
        return self._farewell

    @property
    def has_left(self) -> bool:
        """True when no change will come any more."""
        return self._left

    async def wait_beyond(self, revision: int, timeout_s: float | None) -> None:
        """Return once the revision is higher, the server leaves, or `timeout_s` has passed."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.revision <= revision and not self._left:
                    await self._changed.wait()
        except TimeoutError:
            return

    # --- facts ----------------------------------------------------------------------------------

    def set_loaded(self, loaded: bool) -> None:
        """Whether the model is loaded and warm. Ready then, unless a drain has begun."""
        self._loaded = loaded
        self._update()

    def set_dead(self) -> None:
        """The engine is dead: neither ready nor alive, and that is what calls hear from now on."""
        self._farewell = EngineDeadError
        self._update()
        self._health.set_live(False)

    def drain(self, grace_s: float | None) -> None:
        """Not ready; after the propagation time new calls are refused.

        With `grace_s` the calls that are in flight that long after the refusal are ended. Called again it
        changes that grace and nothing else.
        """
        loop = asyncio.get_running_loop()
        self._grace_s = grace_s
        if not self._draining:
            self._draining = True
            self._refuse_at = loop.time() + self._propagation_s
            self._refusal_timer = loop.call_at(self._refuse_at, self.refuse)
            _log.info("drain: not serving", live_calls=len(self._calls))
            self._update()
        self._set_grace_timer()

    def undo_drain(self) -> None:
        """Take a drain back; nothing to do where there is none. Raises EngineDrainingError after `leave`."""
        if self._leaving:
            raise self._farewell()
        if not self._draining:
            return
        self._draining = False
        self._cancel_timers()
        self._calls.accept()
        _log.info("drain: taken back")
        self._update()

    def leave(self) -> float:
        """Drain for good, with the grace of whoever leaves; seconds until new calls are refused."""
        self._leaving = True
        self.drain(None)
        self._update()
        return max(0.0, self._refuse_at - asyncio.get_running_loop().time())

    def refuse(self) -> None:
        """Take no calls from now on. A drain comes here by itself."""
        if self._refusal_timer is not None:
            self._refusal_timer.cancel()
        self._refusal_timer = None
        self._refuse_at = min(self._refuse_at, asyncio.get_running_loop().time())
        self._calls.refuse(self._farewell)
        _log.info("drain: refusing calls", live_calls=len(self._calls))

    def set_left(self) -> None:
        """The server closes: every Watch ends."""
        self._cancel_timers()
        self._left = True
        self._changed.set()
        self._health.leave()

    def _set_grace_timer(self) -> None:
        if self._grace_timer is not None:
            self._grace_timer.cancel()
            self._grace_timer = None
        if self._grace_s is not None:
            loop = asyncio.get_running_loop()
            end_at = max(self._refuse_at, loop.time()) + self._grace_s
            self._grace_timer = loop.call_at(end_at, self._end_calls)

    def _end_calls(self) -> None:
        self._grace_timer = None
        _log.warning("drain: ending calls", live_calls=len(self._calls))
        self._calls.end_all(self._farewell)

    def _cancel_timers(self) -> None:
        for timer in (self._refusal_timer, self._grace_timer):
            if timer is not None:
                timer.cancel()
        self._refusal_timer = self._grace_timer = None

    def _update(self) -> None:
        if self._farewell is EngineDeadError:
            state, detail = State.FAILED, "the engine has stopped"
        elif self._draining:
            state, detail = State.DRAINING, "leaving" if self._leaving else "an operator asked for it"
        elif self._loaded:
            state, detail = State.READY, ""
        else:
            state, detail = State.STARTING, _LOADING
        if (state, detail) == (self._state, self.detail):
            return
        self._state, self.detail = state, detail
        self._health.set_ready(state is State.READY)
        self.revision += 1
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
