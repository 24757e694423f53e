"""Parsing under hostile bytes, judged by protobuf itself, and without memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
from google.protobuf.internal import api_implementation
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from photon_grpc.errors import ConfigError, MalformedMessageError, OutOfMemoryError
from photon_grpc.server.deserialize import parse, require_compiled_protobuf
from photon_grpc.v1 import inference_pb2 as pb


def nested_template_args(depth: int) -> bytes:
    """A chat request whose template_args nest `depth` lists, built from the inside out."""

    def field(number: int, payload: bytes) -> bytes:
        length = len(payload)
        varint = bytearray()
        while length > 0x7F:
            varint.append(length & 0x7F | 0x80)
            length >>= 7
        return bytes([number << 3 | 2]) + bytes(varint) + bytes([length]) + payload

    value = b""
    for _ in range(depth):
        value = field(6, field(1, value))
    entry = field(1, b"k") + field(2, value)
    return field(2, field(4, field(2, field(1, entry))))


MALFORMED = {
    "truncated": pb.GenerateRequest(request_id="abc").SerializeToString()[:-1],
    "garbage": b"\xff" * 64,
    "wrong end group": b"\x0c",
    "field zero": b"\x00\x01",
    "bad utf-8": b"\x0a\x02\xff\xfe",
    "lone surrogate": b"\x0a\x03\xed\xa0\x80",
    "bad utf-8 in text": b"\x12\x04\x12\x02\xc3\x28",
    "deep": nested_template_args(5000),
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_bytes(data: bytes) -> None:
    with pytest.raises(MalformedMessageError) as caught:
        parse(pb.GenerateRequest, data)
    assert caught.value.message == "the request is no valid GenerateRequest"


def test_the_nesting_builder_nests() -> None:
    message = parse(pb.GenerateRequest, nested_template_args(3))
    assert message.spec.chat.template_args.fields["k"].list_value.values[0].list_value.values


@given(st.binary(max_size=200))
def test_any_bytes_parse_as_protobuf_says(data: bytes) -> None:
    try:
        expected = pb.StreamGenerateRequest.FromString(data)
    except DecodeError:
        with pytest.raises(MalformedMessageError):
            parse(pb.StreamGenerateRequest, data)
    else:
        assert parse(pb.StreamGenerateRequest, data).SerializeToString(
            deterministic=True
        ) == expected.SerializeToString(deterministic=True)


_WITHOUT_MEMORY = """
import resource
from photon_grpc.errors import OutOfMemoryError
from photon_grpc.server.deserialize import parse
from photon_grpc.v1 import inference_pb2 as pb
message = pb.GenerateRequest()
for _ in range(300_000):
    message.spec.chat.messages.add()
data = message.SerializeToString()
del message
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
resource.setrlimit(resource.RLIMIT_AS, (size + (8 << 20), hard))
kept = []
try:
    while True:
        kept.append(parse(pb.GenerateRequest, data))
except OutOfMemoryError:
    pass
kept.clear()
resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
assert len(parse(pb.GenerateRequest, data).spec.chat.messages) == 300_000
print("recovered")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited on Linux alone")
def test_a_message_for_which_there_is_no_memory_is_not_called_malformed() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _WITHOUT_MEMORY], capture_output=True, text=True, check=False
    )
    assert (ended.stdout, ended.returncode) == ("recovered\n", 0), ended.stderr


def test_the_interpreter_s_own_want_of_memory_is_told_the_same() -> None:
    def refuse() -> pb.TokenizeRequest:
        raise MemoryError

    with pytest.raises(OutOfMemoryError):
        parse(refuse, b"")  # type: ignore[arg-type]


def test_only_the_compiled_protobuf_is_good_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    require_compiled_protobuf()
    for other in ("python", "cpp"):
        monkeypatch.setattr(api_implementation, "Type", lambda other=other: other)
        with pytest.raises(ConfigError, match=f"'{other}'.*PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"):
            require_compiled_protobuf()
