"""Texts, tenants and tokens, looked for wherever a server tells of itself: logs, metrics, spans, errors.

Every secret of these tests holds the word that is looked for; completions are looked for as they came.
"""

from __future__ import annotations

import json
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from photon_grpc.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc, model_pb2
from tests.support.server_process import ServerProcess, server_process
from tests.support.tiny_model import tiny_model_folder

CANARY = "canary"
PROMPT = f"the {CANARY} sings of"
TOKENS = {name: f"{CANARY}-token-of-{name}" for name in ("alice", "bob", "gateway", "inspector")}
CALLERS = "".join(
    f"{CANARY}-{name} {'inspect' if name == 'inspector' else 'infer,inspect'} token:{token}\n"
    for name, token in TOKENS.items()
)
TENANTS = f"[tenants.{CANARY}-alice]\nmax_concurrent_requests = 2\nmax_priority = 3\n"
GENERATE = "/photon.v1.InferenceService/Generate"
REFLECT = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


def spec(text: str = PROMPT, max_tokens: int = 24, **fields: Any) -> inference_pb2.GenerationSpec:
    message = inference_pb2.GenerationSpec(text=text, **fields)
    message.stop.max_tokens, message.stop.ignore_eos = max_tokens, True
    message.stop.strings.append(f"{CANARY} stop")
    message.cache.cache_salt = f"{CANARY}-salt"
    return message


def generate(**fields: Any) -> bytes:
    data: bytes = inference_pb2.GenerateRequest(spec=spec(**fields)).SerializeToString()
    return data


class Collector(grpc.GenericRpcHandler):
    """An OTLP collector that keeps what it gets as it came."""

    def __init__(self) -> None:
        self.received: list[tuple[str, bytes]] = []

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        def take(data: bytes, context: Any) -> bytes:
            self.received.append((details.method, data))
            return b""

        return grpc.unary_unary_rpc_method_handler(take)

    @classmethod
    @contextmanager
    def running(cls) -> Iterator[tuple[str, Collector]]:
        collector = cls()
        server = grpc.server(ThreadPoolExecutor(2), handlers=(collector,))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"http://127.0.0.1:{port}", collector
        finally:
            server.stop(0).wait()


@dataclass
class Clients:
    """Makes calls and keeps what is told around their answers: status, message, headers, trailers."""

    server: ServerProcess
    public: grpc.Channel
    told: list[str] = field(default_factory=list)
    codes: Counter[str] = field(default_factory=Counter)
    completions: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stub = inference_pb2_grpc.InferenceServiceStub(self.public)

    def end(self, call: Any) -> str:
        """The status of a call, which is over, or is read to its end."""
        if hasattr(call, "__next__"):
            try:
                for message in call:
                    self.keep(getattr(message, "delta", None))
            except grpc.RpcError:
                pass  # its status is read below
        code = str(call.code().name)
        parts = (call.details(), call.initial_metadata(), call.trailing_metadata())
        self.told.append(f"{code} {parts}")
        self.codes[code] += 1
        return code

    def keep(self, delta: Any) -> None:
        if delta is not None and len(delta.text) > 5:
            self.completions.append(delta.text)

    def send(self, data: bytes, metadata: Sequence[tuple[str, str]], method: str = GENERATE) -> str:
        try:
            answer, call = self.public.unary_unary(method).with_call(data, metadata=metadata, timeout=60)
        except grpc.RpcError as error:
            return self.end(error)
        if method == GENERATE:
            for completion in inference_pb2.GenerateResponse.FromString(answer).completions:
                self.completions.append(completion.text)
        return self.end(call)

    def begin(self, name: str, request_id: str = "") -> Any:
        """A stream that is under way."""
        request = inference_pb2.StreamGenerateRequest(request_id=request_id, spec=spec(max_tokens=400))
        call = self.stub.StreamGenerate(request, metadata=of(name), timeout=60)
        next(call)
        return call

    def control(self, method: str, request: Any) -> str:
        with grpc.insecure_channel(self.server.admin) as channel:
            try:
                _, call = getattr(control_pb2_grpc.ControlServiceStub(channel), method).with_call(
                    request, timeout=30
                )
            except grpc.RpcError as error:
                return self.end(error)
            return self.end(call)


def of(name: str, *stated: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {TOKENS[name]}"), *stated)


def calls_that_go_well(clients: Clients) -> None:
    alice, gateway = of("alice"), of("gateway", ("photon-tenant", f"{CANARY}-tenant"))
    assert clients.send(generate(), alice) == "OK"
    assert clients.send(generate(), gateway) == "OK"
    message = inference_pb2.ChatMessage(role=inference_pb2.ChatMessage.ROLE_USER, content=PROMPT)
    chat = spec(chat=inference_pb2.ChatInput(messages=[message]), text=None)
    chat.output.top_logprobs, chat.output.token_ids, chat.output.echo_prompt = 2, True, True
    assert clients.send(inference_pb2.GenerateRequest(spec=chat).SerializeToString(), alice) == "OK"
    counted = inference_pb2.GenerateRequest(spec=spec(), validate_only=True).SerializeToString()
    assert clients.send(counted, alice) == "OK"
    stream = inference_pb2.StreamGenerateRequest(spec=spec())
    assert clients.end(clients.stub.StreamGenerate(stream, metadata=gateway, timeout=60)) == "OK"
    bad = spec()
    bad.constraint.regex = CANARY
    items = inference_pb2.BatchGenerateRequest(specs=[spec(), bad, spec(text=PROMPT * 200)])
    batch = clients.stub.BatchGenerate(items, metadata=alice, timeout=60)
    for item in batch:
        clients.told.append(str(item.error))
        clients.completions.extend(completion.text for completion in item.response.completions)
    assert clients.end(batch) == "OK"
    for method, data in (
        ("InferenceService/Tokenize", inference_pb2.TokenizeRequest(text=PROMPT)),
        ("InferenceService/Detokenize", inference_pb2.DetokenizeRequest(token_ids=range(5, 60))),
        ("ModelService/GetModelInfo", model_pb2.GetModelInfoRequest()),
        ("ModelService/GetServerInfo", model_pb2.GetServerInfoRequest()),
    ):
        assert clients.send(data.SerializeToString(), alice, f"/photon.v1.{method}") == "OK"
    for control, request in (
        ("GetLoad", control_pb2.GetLoadRequest()),
        ("FlushCache", control_pb2.FlushCacheRequest()),
    ):
        assert clients.control(control, request) == "OK"


def requests_that_are_wrong(clients: Clients) -> None:
    alice = of("alice")
    constrained, adapted = spec(adapter=f"{CANARY}-adapter"), spec()
    adapted.constraint.regex = CANARY
    experimental, templated, salted, stopped = spec(), spec(), spec(), spec()
    experimental.experimental[CANARY] = CANARY
    templated.chat.template_args[CANARY] = {CANARY: CANARY}
    salted.cache.cache_salt = f"{CANARY} salt"
    stopped.stop.strings.extend([CANARY * 40] * 20)
    wrong = (constrained, adapted, experimental, templated, salted, stopped, spec(text=PROMPT * 200))
    batch = inference_pb2.BatchGenerateRequest(request_id="batch", specs=[*wrong, spec()])
    call = clients.stub.BatchGenerate(batch, metadata=alice, timeout=60)
    items = {item.item: item for item in call}
    assert [items[n].WhichOneof("result") for n in range(len(items))] == ["error"] * len(wrong) + ["response"]
    clients.told.append(repr([item.error for item in items.values()]))
    clients.completions.append(items[len(wrong)].response.completions[0].text)
    assert clients.end(call) == "OK"
    for bad in wrong:
        code = clients.send(inference_pb2.GenerateRequest(spec=bad).SerializeToString(), alice)
        assert code in ("INVALID_ARGUMENT", "UNIMPLEMENTED"), bad
    for data in (
        generate()[:-1],
        generate() + b"\xff\xff",
        generate().replace(CANARY.encode(), b"canar\xff"),
        inference_pb2.GenerateRequest(request_id=f"{CANARY} id", spec=spec()).SerializeToString(),
        b"",
    ):
        assert clients.send(data, alice) == "INVALID_ARGUMENT"


def callers_that_are_refused(clients: Clients) -> None:
    for metadata in (
        (),
        (("authorization", f"Bearer {CANARY}-token-of-nobody"),),
        (("authorization", f"Basic {CANARY}"),),
        (("photon-tenant", f"{CANARY}-tenant"),),
    ):
        assert clients.send(generate(), metadata) == "UNAUTHENTICATED"
        stream = clients.stub.StreamGenerate(inference_pb2.StreamGenerateRequest(), metadata=metadata)
        assert clients.end(stream) == "UNAUTHENTICATED"
        reflection = clients.public.stream_stream(REFLECT)(iter([b""]), metadata=metadata)
        assert clients.end(reflection) == "UNAUTHENTICATED"
    assert clients.send(generate(), of("inspector")) == "PERMISSION_DENIED"
    assert clients.send(generate(), of("alice", ("photon-tenant", f"{CANARY}-bob"))) == "PERMISSION_DENIED"
    assert clients.send(generate(), of("gateway", ("photon-tenant", f"{CANARY} x"))) == "INVALID_ARGUMENT"
    twice = (("photon-tenant", f"{CANARY}-a"), ("photon-tenant", f"{CANARY}-b"))
    assert clients.send(generate(), of("gateway", *twice)) == "INVALID_ARGUMENT"


def calls_that_are_cut_short(clients: Clients) -> None:
    """Two at a time are her quota here."""
    hers, his = clients.begin("alice", "r-1"), clients.begin("bob", "r-1")
    same = inference_pb2.GenerateRequest(request_id="r-1", spec=spec()).SerializeToString()
    assert clients.send(same, of("alice")) == "ALREADY_EXISTS"
    assert clients.control("Abort", control_pb2.AbortRequest(request_id="r-1")) == "INVALID_ARGUMENT"
    bobs = control_pb2.AbortRequest(request_id="r-1", tenant=f"{CANARY}-bob")
    assert clients.control("Abort", bobs) == "OK"
    assert clients.end(his) == "ABORTED"
    assert clients.control("Abort", bobs) == "NOT_FOUND"
    second = clients.begin("alice")
    assert clients.send(generate(), of("alice")) == "RESOURCE_EXHAUSTED"
    for call in (hers, second):
        call.cancel()
        assert clients.end(call) == "CANCELLED"
    clients.server.wait_until_idle()
    late = spec(max_tokens=400)
    late.stop.time_limit.FromMilliseconds(1)
    assert clients.send(inference_pb2.GenerateRequest(spec=late).SerializeToString(), of("alice")) == "OK"
    hurried = spec()
    hurried.scheduling.first_token_budget.FromNanoseconds(1000)
    data = inference_pb2.GenerateRequest(spec=hurried).SerializeToString()
    assert clients.send(data, of("alice")) in ("DEADLINE_EXCEEDED", "UNAVAILABLE")


def the_files_change(clients: Clients, file: Path, tenants: Path) -> None:
    for terms in (f"[tenants.{CANARY}-alice]\nwieght = 2\n", TENANTS):
        tenants.write_text(terms)
        assert clients.send(generate(max_tokens=1), of("alice")) == "OK"
    for content in (
        f"{CANARY}-x infer token:{CANARY}-new",
        f"{CANARY}-x no-role token:{CANARY}-new\n",
        CALLERS,
    ):
        file.write_text(content)
        assert clients.send(generate(max_tokens=1), of("alice")) == "OK"


def the_server_drains(clients: Clients) -> None:
    assert clients.control("Drain", control_pb2.DrainRequest()) == "OK"
    deadline = time.monotonic() + 30
    while (code := clients.send(generate(max_tokens=1), of("alice"))) == "OK":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert code == "UNAVAILABLE"


@pytest.mark.parametrize("process", ["shared", "own"])
def test_nothing_that_a_server_tells_repeats_a_text_a_name_or_a_token(
    model: Path, tmp_path: Path, process: str
) -> None:
    """At the most talkative level, over all kinds of calls and all the ways in which they fail."""
    callers = tmp_path / "callers"
    callers.write_text(CALLERS)
    tenants = tmp_path / "tenants"
    tenants.write_text(TENANTS)
    with (
        Collector.running() as (endpoint, collector),
        server_process(
            model,
            tmp_path / "log",
            engine__process=process,
            telemetry__log_level="debug",
            telemetry__otlp_endpoint=endpoint,
            server__metrics_port=0,
            server__reflection="public",
            auth__callers_file=callers,
            auth__trusted_hops=f"{CANARY}-gateway",
            tenants__file=tenants,
        ) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        clients = Clients(server, channel)
        steps: tuple[Callable[[Clients], None], ...] = (
            calls_that_go_well,
            requests_that_are_wrong,
            callers_that_are_refused,
            calls_that_are_cut_short,
        )
        for step in steps:
            step(clients)
        the_files_change(clients, callers, tenants)
        server.wait_until_idle()
        with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=30) as page:
            metrics = page.read().decode()
        the_server_drains(clients)
        assert server.stop() == 0
    check_log(server.log.read_text(), clients)
    assert {"OK", "UNIMPLEMENTED", "UNAVAILABLE"} <= clients.codes.keys()
    spans = b"".join(data for _, data in collector.received)
    assert b"photon.v1.InferenceService/Generate" in spans
    assert {method.rpartition("/")[0].rpartition(".")[2] for method, _ in collector.received} == {
        "TraceService",
        "MetricsService",
    }
    assert "photon_rpc_seconds" in metrics
    completions = [text for text in clients.completions if len(text) > 20]
    assert len(completions) >= 4
    for place in (
        server.log.read_bytes(),
        metrics.encode(),
        spans,
        *(told.encode() for told in clients.told),
    ):
        assert CANARY.encode() not in place
        for text in completions:
            assert text.encode() not in place
            assert json.dumps(text)[1:-1].encode() not in place


def check_log(log: str, clients: Clients) -> None:
    """It has a line for each call, and the lines of one tenant can be told from another's."""
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    events = Counter(line["event"] for line in lines)
    assert events["file refused, the last good one stays"] == 3
    assert events["call forbidden"] == 1
    assert events["abort"] == 1
    finished = [line for line in lines if line["event"] == "call finished"]
    codes = Counter(line["code"] for line in finished if "Control" not in line["method"])
    # What is refused in a stream of both ways leaves no line.
    for code in ("ABORTED", "ALREADY_EXISTS", "RESOURCE_EXHAUSTED", "CANCELLED", "UNIMPLEMENTED"):
        assert codes[code] == clients.codes[code] > 0, code
    tenants = {line["tenant"] for line in finished if "tenant" in line}
    assert len(tenants) == 3, "alice, bob, and the one that the gateway states"
    assert all(len(tenant) == 16 for tenant in tenants)
