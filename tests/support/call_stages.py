"""A call that has come to a chosen point of its life in a scripted server, ready for a fault.

Two servers: in the *roomy* one a long prompt takes seconds and two completions run at a time; in the *tight*
one two calls do not fit into the cache, so that the later one is preempted until the other ends.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from photon_grpc.v1 import control_pb2, inference_pb2, inference_pb2_grpc
from tests.support.builders import model_info
from tests.support.engine_factories import Scripted
from tests.support.server_aftermath import Aftermath, census_of
from tests.support.server_process import ServerProcess, server_process
from tools.make_tiny_model import write_tokenizer

VOCAB_SIZE = 512
# A client that gives the server next to no room: any message that it does not read stays pending.
NO_WINDOW = (("grpc.http2.lookahead_bytes", 5), ("grpc.http2.bdp_probe", 0))
_OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)
_REACH_S = 60.0

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Ask:
    """What a call asks for. `prompt_logprobs` make a first message of some 120 bytes per prompt token."""

    prompt_tokens: int = 4
    max_tokens: int = 3000
    prompt_logprobs: bool = False
    sampling: Mapping[str, Any] = field(default_factory=dict)
    stop: Mapping[str, Any] = field(default_factory=dict)
    scheduling: Mapping[str, Any] = field(default_factory=dict)

    def request(self, request_id: str = "") -> inference_pb2.StreamGenerateRequest:
        """No two have a prefix in common."""
        number = next(_numbers)
        first = (5 + number % 500, 5 + number // 500 % 500)
        ids = [*first, *(5 + i % 90 for i in range(self.prompt_tokens - 2))]
        spec = inference_pb2.GenerationSpec(
            token_ids=inference_pb2.TokenIds(ids=ids),
            sampling=self.sampling,
            stop={"max_tokens": self.max_tokens, "ignore_eos": True, **self.stop},
            scheduling=self.scheduling,
        )
        if self.prompt_logprobs:
            spec.output.prompt_top_logprobs = 20
        return inference_pb2.StreamGenerateRequest(request_id=request_id or f"call-{number}", spec=spec)


def scripted_server(folder: Path, runner: Scripted, **settings: object) -> Any:
    """`server_process` over `runner`, whose vocabulary must be of VOCAB_SIZE; with quick keepalive and clocks
    that no test waits for."""
    write_tokenizer(folder, VOCAB_SIZE, add_bos=False)
    defaults: dict[str, object] = {
        "server__keepalive_time_s": 1,
        "server__keepalive_timeout_s": 1,
        "server__min_ping_interval_s": 0.2,
        "limits__slow_consumer_timeout_s": 600,
    }
    return server_process(folder, folder / "log", runner=runner, **{**defaults, **settings})


def scripted_runner(
    *, step_s: float = 0.01, num_blocks: int = 1024, max_model_len: int = 4096, **values: Any
) -> Scripted:
    """A factory for `scripted_server`."""
    model = model_info(vocab_size=VOCAB_SIZE, max_model_len=max_model_len)
    return Scripted(model, num_blocks=num_blocks, step_s=step_s, **values)


def open_channel(address: str, *options: tuple[str, int]) -> grpc.Channel:
    """A channel with a connection of its own."""
    return grpc.insecure_channel(address, options=[*_OWN_CONNECTION, *options])


def reason_of(error: grpc.RpcError) -> str:
    """The reason of its ErrorInfo."""
    status = rpc_status.from_call(error)
    assert status is not None, error
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in status.details)
    return str(info.reason)


@dataclass(frozen=True)
class Stage:
    """`before` are calls that were sent and answered earlier; `reads` is how many messages of the call itself
    the client takes; `reached` is asked until it is so."""

    reached: Callable[[Staged], bool]
    ask: Ask = field(default_factory=Ask)
    before: tuple[Ask, ...] = ()
    reads: int = 0
    has_window: bool = True
    is_tight: bool = False


class StageMissedError(Exception):
    """The call ended before it came to its stage: a clock was too short for this machine."""


@dataclass
class Staged:
    """A call at its stage, and those that hold the place that it wants."""

    server: ServerProcess
    aftermath: Aftermath
    request_id: str = ""
    call: Any = None
    before: dict[str, Any] = field(default_factory=dict)

    def load(self) -> control_pb2.GetLoadResponse:
        return self.server.load()

    def leave(self) -> None:
        """End the other calls."""
        for call in self.before.values():
            call.cancel()

    def check(self, *codes: str) -> None:
        """The aftermath, once the call ended in one of `codes` and the others were cancelled."""
        self.leave()
        self.aftermath.check({self.request_id: codes, **dict.fromkeys(self.before, "CANCELLED")})


def _is_stalled(at: Staged) -> bool:
    return bool(census_of(at.server)["stalled"])


def _runs_and_waits(running: int, waiting: int) -> Callable[[Staged], bool]:
    def reached(at: Staged) -> bool:
        load = at.load()
        return (load.running, load.queued) == (running, waiting)

    return reached


def _prefills(at: Staged) -> bool:
    load = at.load()
    return load.running == 1 and load.used_kv_blocks > 0


STAGES: dict[str, Stage] = {
    "queued": Stage(_runs_and_waits(2, 1), before=(Ask(), Ask())),
    "prefilling": Stage(_prefills, Ask(prompt_tokens=4000, max_tokens=10)),
    "decoding": Stage(lambda at: True, reads=1),
    "preempted": Stage(
        _runs_and_waits(1, 1),
        Ask(prompt_tokens=1000, max_tokens=990),
        before=(Ask(prompt_tokens=1000, max_tokens=990),),
        reads=1,
        is_tight=True,
    ),
    "writing_the_first": Stage(_is_stalled, Ask(200, prompt_logprobs=True), has_window=False),
    "writing": Stage(_is_stalled, reads=1, has_window=False),
}


class StagedServers:
    """The two servers, each started when it is first wanted."""

    def __init__(self, folder: Path, stack: ExitStack, **settings: object) -> None:
        self._folder = folder
        self._stack = stack
        self._settings = settings
        self._started: dict[bool, tuple[ServerProcess, Aftermath]] = {}

    def get(self, is_tight: bool = False) -> tuple[ServerProcess, Aftermath]:
        """The server and its baseline."""
        if is_tight not in self._started:
            folder = self._folder / ("tight" if is_tight else "roomy")
            folder.mkdir()
            runner = (
                scripted_runner(step_s=0.005, num_blocks=130, max_model_len=2000)
                if is_tight
                else scripted_runner()
            )
            settings = {
                "scheduler__max_num_seqs": 2,
                "scheduler__max_num_batched_tokens": 256 if is_tight else 8,
                **self._settings,
            }
            server = self._stack.enter_context(scripted_server(folder, runner, **settings))
            self._started[is_tight] = (server, Aftermath(server))
        return self._started[is_tight]

    def stop(self) -> None:
        """Each must leave in good order."""
        for server, _ in self._started.values():
            assert server.stop() == 0

    @contextmanager
    def staged(
        self, name: str, *, timeout_s: float | None = None, channel: grpc.Channel | None = None, **asked: Any
    ) -> Iterator[Staged]:
        """A call at the stage `name`; `asked` changes its Ask, `channel` is the one that it goes through.

        Raises StageMissedError when it ended on its way there.
        """
        stage = STAGES[name]
        at = Staged(*self.get(stage.is_tight))
        with ExitStack() as stack:
            if channel is None:
                options = () if stage.has_window else NO_WINDOW
                channel = stack.enter_context(open_channel(at.server.address, *options))
            others = stack.enter_context(open_channel(at.server.address))
            stack.callback(at.leave)
            for ask in stage.before:
                request = ask.request()
                call = inference_pb2_grpc.InferenceServiceStub(others).StreamGenerate(request)
                next(call)
                at.before[request.request_id] = call
            request = replace(stage.ask, **asked).request()
            at.request_id = request.request_id
            at.call = inference_pb2_grpc.InferenceServiceStub(channel).StreamGenerate(
                request, timeout=timeout_s
            )
            stack.callback(at.call.cancel)
            _reach(at, stage)
            yield at


def _reach(at: Staged, stage: Stage) -> None:
    try:
        for _ in range(stage.reads):
            next(at.call)
    except (grpc.RpcError, StopIteration) as error:
        raise StageMissedError from error
    deadline = time.monotonic() + _REACH_S
    while not stage.reached(at):
        if not at.call.is_active():
            raise StageMissedError
        assert time.monotonic() < deadline, f"never reached\n{at.server.log.read_text()[-4000:]}"
        time.sleep(0.01)
